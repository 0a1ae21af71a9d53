//! The file that `config` of a `blkdebug` node names: QEMU's configuration format.
//!
//! ```text
//! [inject-error]
//! event = "read_aio"
//! errno = "28"
//!
//! [set-state]
//! event = "write_aio"
//! new_state = "2"
//! ```
//!
//! The parser is pure; only [`read`] touches the file, on a thread that may wait.

use outport_block::Errno;
use outport_block::filter::blkdebug::{Event, InjectError, IoType, SetState};
use outport_qmp::Error;

/// Rules are written by hand: a longer file is not one.
const BYTES_MAX: u64 = 1 << 20;

type Parsed = (Vec<SetState>, Vec<InjectError>);

/// Reads and parses a file.
///
/// # Errors
/// In QEMU's words.
pub(super) async fn read(path: &str) -> Result<Parsed, Error> {
    let path = path.to_owned();
    let text = tokio::task::spawn_blocking(move || {
        use std::io::Read;
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path)?;
        file.take(BYTES_MAX).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    });
    let text = text
        .await
        .map_err(|error| Error::generic(error.to_string()))?;
    let text = text.map_err(|error| {
        let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
        Error::generic(format!("Could not read blkdebug config file: {reason}"))
    })?;
    parse(&text)
}

/// The error of this number; `None` for 0, which lets requests pass.
pub(super) fn errno(number: i64) -> Option<Errno> {
    match i32::try_from(number.unsigned_abs()) {
        Ok(0) => None,
        Ok(number) => Some(Errno::from_raw(number)),
        Err(_) => Some(Errno::Io),
    }
}

/// One group as it was read.
struct Group {
    injects: bool,
    /// Later values of a key count.
    values: Vec<(String, String)>,
}

const COMMON: [&str; 2] = ["event", "state"];
const INJECT: [&str; 5] = ["iotype", "errno", "sector", "once", "immediately"];
const SET: [&str; 1] = ["new_state"];

fn parse(text: &str) -> Result<Parsed, Error> {
    let mut groups: Vec<Group> = Vec::new();
    for line in text.lines() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let name = header.split([']', ' ']).next().unwrap_or_default();
            let injects = match name {
                "inject-error" if header.contains(']') => true,
                "set-state" if header.contains(']') => false,
                _ => return Err(Error::generic(format!("There is no option group '{name}'"))),
            };
            let values = Vec::new();
            groups.push(Group { injects, values });
            continue;
        }
        let group = groups.last_mut();
        let group = group.ok_or_else(|| Error::generic("no group defined"))?;
        let (key, value) = key_and_value(line);
        let own: &[&str] = if group.injects { &INJECT } else { &SET };
        if !COMMON.contains(&key) && !own.contains(&key) {
            return Err(Error::generic(format!("Invalid parameter '{key}'")));
        }
        check_value(key, value)?;
        group.values.push((key.to_owned(), value.to_owned()));
    }
    let mut parsed = Parsed::default();
    for group in &groups {
        if group.injects {
            parsed.1.push(group.inject_error()?);
        } else {
            parsed.0.push(group.set_state()?);
        }
    }
    Ok(parsed)
}

/// `key = "value"`, with one blank on each side; otherwise a key without a value.
fn key_and_value(line: &str) -> (&str, &str) {
    let line = line.trim_start();
    let (key, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim_start().strip_prefix('=').unwrap_or_default();
    let value = rest.trim_start().strip_prefix('"').unwrap_or_default();
    (key, value.split('"').next().unwrap_or_default())
}

fn check_value(key: &str, value: &str) -> Result<(), Error> {
    match key {
        "once" | "immediately" if boolean(value).is_none() => Err(Error::generic(format!(
            "Parameter '{key}' expects 'on' or 'off'"
        ))),
        "state" | "errno" | "sector" | "new_state" if number(value).is_none() => Err(
            Error::generic(format!("Parameter '{key}' expects a number")),
        ),
        _ => Ok(()),
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// C's notation; a negative number wraps around, as in QEMU.
fn number(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let value = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hex) => i64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    Some(if digits.len() < text.len() {
        -value
    } else {
        value
    })
}

impl Group {
    fn get(&self, key: &str) -> Option<&str> {
        let found = self.values.iter().rev().find(|(other, _)| other == key);
        found.map(|(_, value)| value.as_str())
    }

    fn number(&self, key: &str) -> Option<i64> {
        self.get(key).and_then(number)
    }

    fn event(&self) -> Result<Event, Error> {
        let name = self.get("event");
        let name = name.ok_or_else(|| Error::generic("Missing event name for rule"))?;
        Event::named(name).ok_or_else(|| bad_value(name))
    }

    fn set_state(&self) -> Result<SetState, Error> {
        Ok(SetState {
            event: self.event()?,
            state: self.number("state").unwrap_or(0),
            new_state: self.number("new_state").unwrap_or(0),
        })
    }

    fn inject_error(&self) -> Result<InjectError, Error> {
        let event = self.event()?;
        let iotype = match self.get("iotype") {
            None => None,
            Some("read") => Some(IoType::Read),
            Some("write") => Some(IoType::Write),
            Some("write-zeroes") => Some(IoType::WriteZeroes),
            Some("discard") => Some(IoType::Discard),
            Some("flush") => Some(IoType::Flush),
            Some("block-status") => Some(IoType::BlockStatus),
            Some(other) => return Err(bad_value(other)),
        };
        let flag = |key: &str| self.get(key).and_then(boolean).unwrap_or(false);
        let sector = self.number("sector").filter(|sector| *sector != -1);
        Ok(InjectError {
            event,
            state: self.number("state").unwrap_or(0),
            iotype,
            errno: errno(self.number("errno").unwrap_or(Errno::Io.raw().into())),
            sector: sector.map(|sector| u64::try_from(sector).unwrap_or(u64::MAX)),
            once: flag("once"),
            immediately: flag("immediately"),
        })
    }
}

fn bad_value(text: &str) -> Error {
    Error::generic(format!("invalid parameter value: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_qemu_reads_them() {
        let (set, inject) = parse(
            "# comment\n[inject-error]\nevent = \"read_aio\"\nerrno = \"0x1c\"\nonce = \"on\"\n\n\
             [set-state \"x\"]\n event = \"write_aio\"\n state = \"1\"\n new_state = \"2\"\n",
        )
        .unwrap();
        assert_eq!(inject[0].event, Event::READ_AIO);
        assert_eq!(inject[0].errno, Some(Errno::NoSpc));
        assert!(inject[0].once && !inject[0].immediately);
        assert_eq!((set[0].state, set[0].new_state), (1, 2));
        for (text, want) in [
            ("[foo]", "There is no option group 'foo'"),
            ("x = \"y\"", "no group defined"),
            (
                "[set-state]\nnew_state = \"3\"",
                "Missing event name for rule",
            ),
            (
                "[inject-error]\nevent=\"read_aio\"",
                "Invalid parameter 'event=\"read_aio\"'",
            ),
            (
                "[inject-error]\nonce",
                "Parameter 'once' expects 'on' or 'off'",
            ),
            (
                "[inject-error]\nsector = \"x\"",
                "Parameter 'sector' expects a number",
            ),
            (
                "[inject-error]\nevent = \"zz\"",
                "invalid parameter value: zz",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().desc, want, "{text}");
        }
    }
}
