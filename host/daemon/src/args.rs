//! The command line, as QSD reads it: GNU options in two passes.
//!
//! Pure. The first pass looks for what must be known before anything happens (`-h`, `-V`,
//! `--daemonize`, `--pidfile`, unknown options); the rest is returned in order, because each
//! option acts on what the ones before it made.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use crate::PROGRAM;

mod help;

/// An option that acts in the second pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Blockdev,
    Chardev,
    /// Ours: commands in a file.
    Config,
    Export,
    Monitor,
    NbdServer,
    Object,
    /// Ours: directories whose files images may name.
    AllowPaths,
    /// Accepted for scripts; logs are chosen by environment variables here.
    Trace,
    /// An argument that belongs to no option: an error when its turn comes.
    Positional,
}

/// One option of the second pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) action: Action,
    pub(crate) value: String,
    /// As it was typed, for messages.
    pub(crate) typed: String,
    /// What messages call it instead: of a program that starts the daemon for somebody.
    pub(crate) called: Option<String>,
}

impl Setting {
    /// A complaint on the terminal about this option.
    pub(crate) fn complaint(&self, message: &str) -> String {
        match &self.called {
            Some(called) => format!("{called}: {message}"),
            None => complaint(Some(&self.typed), message),
        }
    }
}

/// A command line that can be carried out.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) daemonize: bool,
    /// Ours: the end of standard input ends the daemon.
    pub(crate) end_with_stdin: bool,
    /// Ours: only say whether the rest is right.
    pub(crate) check_config: bool,
    pub(crate) pidfile: Option<PathBuf>,
    pub(crate) settings: Vec<Setting>,
}

/// What the first pass found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    Run(Args),
    /// Print and exit with success.
    Print(String),
    /// Complain and exit with failure.
    Fail(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Name {
    Called,
    Help,
    Version,
    CheckConfig,
    Daemonize,
    EndWithStdin,
    Pidfile,
    Act(Action),
}

const LONG: [(&str, Name); 16] = [
    ("allow-paths", Name::Act(Action::AllowPaths)),
    ("blockdev", Name::Act(Action::Blockdev)),
    ("called", Name::Called),
    ("chardev", Name::Act(Action::Chardev)),
    ("check-config", Name::CheckConfig),
    ("config", Name::Act(Action::Config)),
    ("daemonize", Name::Daemonize),
    ("end-with-stdin", Name::EndWithStdin),
    ("export", Name::Act(Action::Export)),
    ("help", Name::Help),
    ("monitor", Name::Act(Action::Monitor)),
    ("nbd-server", Name::Act(Action::NbdServer)),
    ("object", Name::Act(Action::Object)),
    ("pidfile", Name::Pidfile),
    ("trace", Name::Act(Action::Trace)),
    ("version", Name::Version),
];

impl Name {
    fn takes_value(self) -> bool {
        !matches!(
            self,
            Self::Help | Self::Version | Self::CheckConfig | Self::Daemonize | Self::EndWithStdin
        )
    }
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Parsed {
    let mut arguments = arguments.into_iter();
    let mut args = Args::default();
    let mut only_positionals = false;
    let mut called = None;
    while let Some(argument) = arguments.next() {
        let argument = match argument.into_string() {
            Ok(argument) => argument,
            Err(argument) => return Parsed::Fail(not_utf8(&argument)),
        };
        let option = match argument.as_str() {
            "--" if !only_positionals => {
                only_positionals = true;
                continue;
            }
            text if only_positionals || !text.starts_with('-') || text == "-" => {
                args.push(Action::Positional, argument.clone(), argument, None);
                continue;
            }
            text => match text.strip_prefix("--") {
                Some(long) => long_option(long),
                None => short_option(text),
            },
        };
        let (name, canonical, attached) = match option {
            Ok(option) => option,
            Err(message) => return Parsed::Fail(message),
        };
        let (value, typed) = match attached {
            Some(_) if !name.takes_value() => {
                return Parsed::Fail(format!("option '{canonical}' doesn't allow an argument"));
            }
            Some(value) => (value, argument),
            None if !name.takes_value() => (String::new(), argument),
            None => match arguments.next().map(OsString::into_string) {
                Some(Ok(value)) => {
                    let typed = format!("{argument} {value}");
                    (value, typed)
                }
                Some(Err(value)) => {
                    let message = not_utf8(&value);
                    return Parsed::Fail(format!("{argument}: {message}"));
                }
                None => return Parsed::Fail(needs_argument(&canonical)),
            },
        };
        match name {
            Name::Help => return Parsed::Print(help::help()),
            Name::Version => return Parsed::Print(help::version()),
            Name::Called => called = Some(value),
            Name::CheckConfig => args.check_config = true,
            Name::Daemonize => args.daemonize = true,
            Name::EndWithStdin => args.end_with_stdin = true,
            Name::Pidfile => args.pidfile = Some(value.into()),
            Name::Act(action) => args.push(action, value, typed, called.take()),
        }
    }
    if args.daemonize && args.end_with_stdin {
        // In the background standard input is /dev/null, which has ended.
        return Parsed::Fail("--daemonize and --end-with-stdin exclude each other".into());
    }
    Parsed::Run(args)
}

impl Args {
    fn push(&mut self, action: Action, value: String, typed: String, called: Option<String>) {
        self.settings.push(Setting {
            action,
            value,
            typed,
            called,
        });
    }
}

/// Options that QSD has not.
const OURS: [&str; 5] = [
    "allow-paths",
    "called",
    "check-config",
    "config",
    "end-with-stdin",
];

/// The option, its full spelling, and the value after `=` or the letter.
type Found = Result<(Name, String, Option<String>), String>;

fn long_option(text: &str) -> Found {
    let (given, value) = match text.split_once('=') {
        Some((given, value)) => (given, Some(value.to_owned())),
        None => (text, None),
    };
    let found = |(name, option): &(&str, Name)| Ok((*option, format!("--{name}"), value.clone()));
    if let Some(exact) = LONG.iter().find(|(name, _)| *name == given) {
        return found(exact);
    }
    let (ours, qsds): (Vec<_>, Vec<_>) = LONG
        .iter()
        .filter(|(name, _)| name.starts_with(given))
        .partition(|(name, _)| OURS.contains(name));
    // What was an abbreviation for QSD stays one.
    let matches = if qsds.is_empty() { ours } else { qsds };
    match matches.as_slice() {
        [] => Err(format!("unrecognized option '--{given}'")),
        [one] => found(one),
        many => {
            let possible: Vec<_> = many
                .iter()
                .map(|(name, _)| format!(" '--{name}'"))
                .collect();
            let possible = possible.concat();
            Err(format!(
                "option '--{given}' is ambiguous; possibilities:{possible}"
            ))
        }
    }
}

fn short_option(text: &str) -> Found {
    let mut letters = text.chars().skip(1);
    let letter = letters.next().unwrap_or_default();
    let rest: String = letters.collect();
    let name = match letter {
        'h' => Name::Help,
        'V' => Name::Version,
        'T' => Name::Act(Action::Trace),
        _ => return Err(format!("invalid option -- '{letter}'")),
    };
    let value = (name.takes_value() && !rest.is_empty()).then_some(rest);
    Ok((name, letter.to_string(), value))
}

/// QMP is UTF-8, and what an option says can be said over QMP.
fn not_utf8(argument: &OsStr) -> String {
    format!(
        "The argument {argument:?} is not UTF-8; pass such a file with /dev/fdset or a link to it"
    )
}

fn needs_argument(option: &str) -> String {
    match option.strip_prefix("--") {
        Some(_) => format!("option '{option}' requires an argument"),
        None => format!("option requires an argument -- '{option}'"),
    }
}

/// A complaint on the terminal, with the option that it is about.
pub(crate) fn complaint(typed: Option<&str>, message: &str) -> String {
    // A hint that QEMU keeps from QMP.
    let hint = match message.ends_with("expects an identifier") {
        true => "\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        false => "",
    };
    match typed {
        Some(typed) => format!("{PROGRAM}: {typed}: {message}{hint}"),
        None => format!("{PROGRAM}: {message}{hint}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(arguments: &[&str]) -> Parsed {
        parse(arguments.iter().map(OsString::from))
    }

    fn failure(arguments: &[&str]) -> String {
        match of(arguments) {
            Parsed::Fail(message) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_keep_their_order_and_their_spelling() {
        let Parsed::Run(args) = of(&["--bl", "null-co", "--nbd=a=b", "pos", "--pid", "/p"]) else {
            panic!("it runs");
        };
        let typed: Vec<_> = args.settings.iter().map(|s| s.typed.as_str()).collect();
        assert_eq!(typed, ["--bl null-co", "--nbd=a=b", "pos"]);
        assert_eq!(args.settings[1].value, "a=b");
        assert_eq!(args.settings[2].action, Action::Positional);
        assert_eq!(args.pidfile, Some("/p".into()));
    }

    #[test]
    fn who_starts_the_daemon_says_what_an_option_is_called() {
        let arguments = ["--called", "disk", "--blockdev", "b", "--export=e"];
        let Parsed::Run(args) = of(&arguments) else {
            panic!("it runs");
        };
        let complaints = args.settings.iter().map(|it| it.complaint("no"));
        let want = ["disk: no", "outportd: --export=e: no"];
        assert_eq!(complaints.collect::<Vec<_>>(), want);
    }

    #[test]
    fn mistakes_have_getopts_words() {
        assert_eq!(failure(&["--nosuch"]), "unrecognized option '--nosuch'");
        assert_eq!(
            failure(&["--bl"]),
            "option '--blockdev' requires an argument"
        );
        assert_eq!(failure(&["-x"]), "invalid option -- 'x'");
        assert_eq!(
            failure(&["--help=5"]),
            "option '--help' doesn't allow an argument"
        );
    }

    #[test]
    fn an_argument_that_is_not_utf8_is_named() {
        use std::os::unix::ffi::OsStringExt;
        let odd = || OsString::from_vec(b"file=\xff".to_vec());
        for (arguments, want) in [
            (vec![odd()], r#"The argument "file=\xFF" is not UTF-8"#),
            (
                vec!["--blockdev".into(), odd()],
                r#"--blockdev: The argument "file=\xFF" is not UTF-8"#,
            ),
        ] {
            let Parsed::Fail(message) = parse(arguments) else {
                panic!("it fails");
            };
            assert!(message.starts_with(want), "{message}");
        }
    }

    #[test]
    fn help_and_version_win_over_what_follows() {
        assert!(matches!(of(&["-V", "--nosuch"]), Parsed::Print(_)));
        assert!(matches!(
            of(&["--blockdev", "x", "-h", "--nosuch"]),
            Parsed::Print(_)
        ));
        assert!(matches!(of(&["--nosuch", "-V"]), Parsed::Fail(_)));
    }
}
