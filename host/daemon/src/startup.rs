//! From the command line to a serving daemon, and to its end.
//!
//! The options are carried out in order, each seeing what the ones before it made; then monitors
//! are answered. Invariant: whatever way the daemon ends (quit, a signal, a bad option), exports
//! are closed before nodes, nodes are written back, and socket files and the PID file go.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::rc::Rc;

use tokio::task::LocalSet;

use crate::args::{self, Args, Parsed};
use crate::commands::Control;
use crate::daemon::Daemon;
use crate::daemonize::{self, Side};
use crate::ending::{self, Ending};
use crate::monitor::Dispatcher;
use crate::pidfile::Pidfile;
use crate::plugin_check;
use crate::signals::Requests;
use crate::{PROGRAM, logging};

mod check;
mod config_file;
mod drivers;
mod settings;

use settings::{Applied, Settings};

/// Runs the daemon with these arguments until it ends.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(code) = plugin_check::asked(&arguments) {
        return code;
    }
    let args = match args::parse(arguments) {
        Parsed::Run(args) => args,
        Parsed::Print(text) => {
            answer(&text);
            return ExitCode::SUCCESS;
        }
        Parsed::Fail(message) => return fail(&message),
    };
    if args.check_config {
        return match check::check(&args.settings) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                say(&message);
                ExitCode::FAILURE
            }
        };
    }
    if args.daemonize {
        match daemonize::split() {
            Ok(Side::Parent(code)) => return code,
            Ok(Side::Child) => {}
            Err(error) => return fail(&format!("cannot daemonize: {error}")),
        }
    }
    logging::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    let code = LocalSet::new().block_on(&runtime, serve(args));
    // A thread may still wait for standard input, which may never come.
    runtime.shutdown_background();
    code
}

fn fail(message: &str) -> ExitCode {
    say(&format!("{PROGRAM}: {message}"));
    ExitCode::FAILURE
}

/// Writes a line to standard error. Nobody may read it any more, which is no reason to fail.
fn say(message: &str) {
    let _nobody_reads_it = writeln!(std::io::stderr(), "{message}");
}

/// Writes an answer to standard output; the same.
fn answer(text: &str) {
    let mut out = std::io::stdout();
    let _nobody_reads_it = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The daemon's life on the control thread.
async fn serve(args: Args) -> ExitCode {
    let mut requests = match Requests::catch(args.end_with_stdin) {
        Ok(requests) => requests,
        Err(error) => return fail(&format!("cannot catch signals: {error}")),
    };
    let (daemon, events, commands) = Daemon::new();
    tokio::task::spawn_local(daemon.events.clone().forward(events));
    let control = Rc::new(Control::new(daemon.clone()));
    let mut dispatcher = Dispatcher::new(control, commands);

    let mut pidfile = None;
    let mut starting = Box::pin(start(&daemon, args, &mut pidfile));
    let started = tokio::select! {
        biased;
        started = &mut starting => Some(started),
        // A client that `wait=on` waits for may never come.
        reason = requests.next() => {
            tracing::info!(reason, "the daemon ends");
            None
        }
    };
    let interrupted = started.is_none();
    let ending = match started {
        Some(Ok(true)) => {
            let reason = tokio::select! {
                () = dispatcher.run() => "quit",
                reason = requests.next() => reason,
            };
            tracing::info!(reason, "the daemon ends");
            Ending::Orderly
        }
        Some(Ok(false)) | None => Ending::Orderly,
        Some(Err(message)) => {
            say(&message);
            Ending::Refused
        }
    };
    let begun = async {
        match interrupted {
            true => _ = (&mut starting).await,
            false => dispatcher.go_on().await,
        }
    };
    let ended = ending::end(&daemon, begun, &mut requests, ending).await;
    drop(starting);
    drop(pidfile);
    ended.into()
}

/// Carries the options out and starts the monitors. `false`: one of them was a question, which is
/// answered.
async fn start(
    daemon: &Rc<Daemon>,
    args: Args,
    pidfile: &mut Option<Pidfile>,
) -> Result<bool, String> {
    let mut settings = Settings::new(daemon.clone(), &args);
    for setting in &args.settings {
        daemon.goes_on()?;
        match settings.apply(setting).await {
            Ok(Applied::Done) => {}
            Ok(Applied::Print(text)) => {
                answer(&text);
                return Ok(false);
            }
            Err(message) => return Err(setting.complaint(&message)),
        }
    }
    daemon.goes_on()?;
    if let Some(path) = &args.pidfile {
        *pidfile = Some(Pidfile::create(path).map_err(|m| args::complaint(None, &m))?);
    }
    if args.daemonize {
        let ready = daemonize::ready();
        ready.map_err(|error| args::complaint(None, &format!("cannot daemonize: {error}")))?;
    }
    daemon.monitors.open();
    Ok(true)
}
