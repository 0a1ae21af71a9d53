//! The envelope around commands, replies and events, and the negotiation of one connection.
//!
//! A [`Session`] lives as long as its client. It is told each value that arrives and says what the
//! value is: a request to run, or an error to answer. It never runs anything (spec 1.3, 1.4).

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::de::{self, Mode};
use crate::error::Error;
use crate::events::Event;
use crate::types::control::{QmpCapabilities, QmpCapability, VersionInfo};

/// A command as a client sent it; its arguments are not read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What the client wants to find in the answer; any JSON value, `null` included.
    pub id: Option<Value>,
    /// The client sent `exec-oob`.
    pub oob: bool,
    /// The command.
    pub name: String,
    /// Its arguments; empty if absent.
    pub arguments: Map<String, Value>,
}

/// A value that is no request, or a request that may not be run: to be answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The `id` to echo, if the message was an object that had one.
    pub id: Option<Value>,
    /// Why.
    pub error: Error,
}

impl Request {
    /// Checks the envelope of `message`. `oob` tells whether `exec-oob` was negotiated; without
    /// it, the member is as unknown as any other.
    ///
    /// # Errors
    /// The first offence, members in the order of the map (spec 1.4).
    pub fn from_value(message: Value, oob: bool) -> Result<Self, Rejection> {
        let Value::Object(mut message) = message else {
            let error = Error::generic("QMP input must be a JSON object");
            return Err(Rejection { id: None, error });
        };
        let id = message.remove("id");
        match Self::check(message, oob) {
            Ok((oob, name, arguments)) => Ok(Self {
                id,
                oob,
                name,
                arguments,
            }),
            Err(error) => Err(Rejection { id, error }),
        }
    }

    fn check(
        message: Map<String, Value>,
        oob: bool,
    ) -> Result<(bool, String, Map<String, Value>), Error> {
        let mut command = None;
        let mut arguments = Map::new();
        for (member, value) in message {
            let is_oob = match (member.as_str(), value) {
                ("arguments", Value::Object(members)) => {
                    arguments = members;
                    continue;
                }
                ("arguments", _) => return Err(bad_member("arguments", "must be an object")),
                ("execute", value) => (false, value),
                ("exec-oob", value) if oob => (true, value),
                _ => return Err(bad_member(&member, "is unexpected")),
            };
            let (is_oob, Value::String(name)) = is_oob else {
                return Err(bad_member(&member, "must be a string"));
            };
            if command.replace((is_oob, name)).is_some() {
                return Err(bad_member("execute", "clashes with 'exec-oob'"));
            }
        }
        let Some((is_oob, name)) = command else {
            return Err(Error::generic("QMP input lacks member 'execute'"));
        };
        Ok((is_oob, name, arguments))
    }
}

/// Whether a client that negotiated `oob` wants `message` answered before those in front of it.
pub fn overtakes(message: &Value) -> bool {
    let member = |name| message.get(name).is_some();
    member("exec-oob") && !member("execute")
}

fn bad_member(member: &str, offence: &str) -> Error {
    Error::generic(format!("QMP input member '{member}' {offence}"))
}

/// Whether a connection may send commands yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Negotiation,
    Commands { oob: bool },
}

/// The negotiation of one client; a new client gets a new one.
#[derive(Debug)]
pub struct Session {
    oob_offered: bool,
    phase: Phase,
}

/// What the daemon has to do with a value that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// Run this command and answer with its `id`.
    Run(Request),
    /// Answer success with this `id`: the session itself has done what was asked.
    Negotiated(Option<Value>),
    /// Answer this error.
    Reject(Rejection),
}

impl Session {
    /// A client that just connected. `oob_offered` tells whether its channel can run commands
    /// that overtake others.
    pub fn new(oob_offered: bool) -> Self {
        Self {
            oob_offered,
            phase: Phase::Negotiation,
        }
    }

    /// What to send first.
    pub fn greeting(&self, version: &VersionInfo) -> Value {
        let capabilities = if self.oob_offered {
            vec!["oob"]
        } else {
            Vec::new()
        };
        json!({"QMP": {"version": version, "capabilities": capabilities}})
    }

    /// Whether events go to this client: not before it has negotiated.
    pub fn receives_events(&self) -> bool {
        self.phase != Phase::Negotiation
    }

    /// Whether the client may have several commands in flight.
    pub fn oob(&self) -> bool {
        self.phase == Phase::Commands { oob: true }
    }

    /// Says what `message` is, and leaves negotiation if it is the command to do so.
    pub fn receive(&mut self, message: Value) -> Incoming {
        let request = match Request::from_value(message, self.oob()) {
            Ok(request) => request,
            Err(rejection) => return Incoming::Reject(rejection),
        };
        let outcome = match (self.phase, request.name.as_str()) {
            (Phase::Negotiation, "qmp_capabilities") => self.negotiate(&request.arguments),
            (Phase::Negotiation, _) => Err(Error::command_not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            (Phase::Commands { .. }, name) if request.oob => Err(refuse_oob(name)),
            // Its arguments are read all the same.
            (Phase::Commands { .. }, "qmp_capabilities") => {
                de::from_arguments::<QmpCapabilities>(&request.arguments, Mode::Typed).and(Err(
                    Error::command_not_found(
                        "Capabilities negotiation is already complete, command ignored",
                    ),
                ))
            }
            (Phase::Commands { .. }, _) => return Incoming::Run(request),
        };
        match outcome {
            Ok(()) => Incoming::Negotiated(request.id),
            Err(error) => Incoming::Reject(Rejection {
                id: request.id,
                error,
            }),
        }
    }

    /// A failed attempt leaves the session in negotiation.
    fn negotiate(&mut self, arguments: &Map<String, Value>) -> Result<(), Error> {
        let arguments: QmpCapabilities = de::from_arguments(arguments, Mode::Typed)?;
        let oob = arguments
            .enable
            .unwrap_or_default()
            .contains(&QmpCapability::Oob);
        if oob && !self.oob_offered {
            return Err(Error::generic("Capability oob not available"));
        }
        self.phase = Phase::Commands { oob };
        Ok(())
    }
}

/// No command may run beside another of its client, as in QSD; an unknown one is unknown first. The
/// refusal itself overtakes.
fn refuse_oob(name: &str) -> Error {
    if crate::commands::Command::NAMES.contains(&name) {
        Error::generic(format!("The command {name} does not support OOB"))
    } else {
        Error::unknown_command(name)
    }
}

/// The answer to a command, `id` echoed if there was one.
pub fn reply(id: Option<Value>, outcome: Result<Value, Error>) -> Value {
    let (member, value) = match outcome {
        Ok(value) => ("return", value),
        Err(error) => ("error", json!(error)),
    };
    let mut message = Map::new();
    message.insert(member.into(), value);
    if let Some(id) = id {
        message.insert("id".into(), id);
    }
    Value::Object(message)
}

/// A message that tells of an event; to be written with [`crate::wire::line`].
///
/// A struct, not a map: clients that use regular expressions want seconds before microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EventMessage {
    timestamp: Timestamp,
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u64,
}

/// A message that tells of `event`, which happened `micros` microseconds after the Unix epoch.
pub fn event(event: &Event, micros: u64) -> EventMessage {
    let timestamp = Timestamp {
        seconds: micros / 1_000_000,
        microseconds: micros % 1_000_000,
    };
    EventMessage {
        timestamp,
        event: event.name(),
        data: event.data(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::BlockExportDeleted;

    fn rejection(session: &mut Session, message: Value) -> String {
        match session.receive(message) {
            Incoming::Reject(rejection) => rejection.error.desc,
            other => panic!("{other:?}"),
        }
    }

    fn negotiated(enable: &[&str]) -> Session {
        let mut session = Session::new(true);
        let message = json!({"execute": "qmp_capabilities", "arguments": {"enable": enable}});
        assert_eq!(session.receive(message), Incoming::Negotiated(None));
        session
    }

    #[test]
    fn envelope_offences_have_qemus_words() {
        let mut session = negotiated(&[]);
        let cases = [
            (json!([]), "QMP input must be a JSON object"),
            (json!({}), "QMP input lacks member 'execute'"),
            (
                json!({"execute": 5}),
                "QMP input member 'execute' must be a string",
            ),
            (
                json!({"exec-oob": "quit"}),
                "QMP input member 'exec-oob' is unexpected",
            ),
            (
                json!({"execute": "quit", "arguments": null}),
                "QMP input member 'arguments' must be an object",
            ),
            (
                json!({"execut": "quit"}),
                "QMP input member 'execut' is unexpected",
            ),
        ];
        for (message, want) in cases {
            assert_eq!(rejection(&mut session, message), want);
        }
    }

    #[test]
    fn oob_is_checked_where_it_was_negotiated() {
        let mut session = negotiated(&["oob"]);
        assert!(session.oob());
        let both = json!({"execute": "quit", "exec-oob": "quit"});
        let clash = "QMP input member 'execute' clashes with 'exec-oob'";
        assert_eq!(rejection(&mut session, both), clash);
        let oob = rejection(&mut session, json!({"exec-oob": "quit"}));
        assert_eq!(oob, "The command quit does not support OOB");
        let unknown = rejection(&mut session, json!({"exec-oob": "nosuch"}));
        assert_eq!(unknown, "The command nosuch has not been found");
    }

    #[test]
    fn nothing_runs_before_negotiation() {
        let mut session = Session::new(false);
        let early = rejection(
            &mut session,
            json!({"execute": "quit", "arguments": {"x": 1}}),
        );
        assert_eq!(
            early,
            "Expecting capabilities negotiation with 'qmp_capabilities'"
        );
        for (enable, want) in [
            (json!(["oob"]), "Capability oob not available"),
            (
                json!(["nosuch"]),
                "Parameter 'null' does not accept value 'nosuch'",
            ),
            (
                json!([5]),
                "Invalid parameter type for 'enable[0]', expected: string",
            ),
        ] {
            let message = json!({"execute": "qmp_capabilities", "arguments": {"enable": enable}});
            assert_eq!(rejection(&mut session, message), want);
            assert!(!session.receives_events());
        }
        let message = json!({"execute": "qmp_capabilities", "id": null});
        assert_eq!(
            session.receive(message.clone()),
            Incoming::Negotiated(Some(Value::Null))
        );
        assert!(session.receives_events());
        let again = rejection(&mut session, message);
        assert_eq!(
            again,
            "Capabilities negotiation is already complete, command ignored"
        );
    }

    #[test]
    fn id_is_echoed_even_in_envelope_errors() {
        let rejected = Request::from_value(json!({"execute": 1, "id": [1, null]}), false);
        assert_eq!(rejected.unwrap_err().id, Some(json!([1, null])));
        let answer = reply(Some(Value::Null), Ok(json!({})));
        assert_eq!(answer, json!({"return": {}, "id": null}));
    }

    #[test]
    fn events_split_their_time() {
        let event_of = Event::BlockExportDeleted(BlockExportDeleted { id: "e".into() });
        let want = concat!(
            r#"{"timestamp": {"seconds": 3, "microseconds": 14}, "#,
            r#""event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}}"#,
            "\r\n",
        );
        let line = crate::wire::line(&event(&event_of, 3_000_014));
        assert_eq!(String::from_utf8(line).unwrap(), want);
    }
}
