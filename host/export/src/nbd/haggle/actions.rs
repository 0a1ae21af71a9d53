//! The first half of an option: it is complete, and carried out or turned into a question.
//!
//! Part of [`Haggle`]; the caller's answers come back in [`super::answers`]. Invariant: every
//! option leaves a reply, a question or the end behind.

use super::{Asked, Disconnect, Haggle, Phase, Question, Text, TlsMode};
use crate::nbd::options::{
    ContextQuery, InfoQuery, OptionId, RepErr, parse_name, push_ack, push_error,
};
use crate::nbd::reply::ReplyMode;

impl Haggle {
    pub(super) fn refuse(&mut self, option: OptionId, error: RepErr, text: Text) {
        let id = option.0;
        let text = match text {
            Text::NotBeforeTls => format!("Option 0x{id:x} not permitted before TLS"),
            Text::NoData => format!("option '{}' has unexpected length", words(option)),
            Text::TooBig => format!("option {id} has more data than this server reads"),
            Text::Unsupported => format!("Unsupported option {id}"),
        };
        push_error(&mut self.out, option, error, &text);
    }

    /// Carries out an option that has no data, or none that matters.
    pub(super) fn act(&mut self, option: OptionId) {
        match option {
            OptionId::ABORT => {
                push_ack(&mut self.out, option);
                self.phase = Phase::Over(Disconnect::Aborted);
            }
            OptionId::LIST => self.phase = Phase::Listing,
            OptionId::STARTTLS => self.start_tls(),
            OptionId::STRUCTURED_REPLY => self.adopt(option, ReplyMode::Structured),
            OptionId::EXTENDED_HEADERS => self.adopt(option, ReplyMode::Extended),
            // Not reached: every other option is refused or has data.
            _ => self.refuse(option, RepErr::Unsup, Text::Unsupported),
        }
    }

    /// Another kind of reply: once each, and not the lesser after the greater.
    fn adopt(&mut self, option: OptionId, wanted: ReplyMode) {
        const STRUCTURED: &str = "structured reply already negotiated";
        const EXTENDED: &str = "extended headers already negotiated";
        let refusal = match (self.mode, wanted) {
            (ReplyMode::Structured, ReplyMode::Structured) => (RepErr::Invalid, STRUCTURED),
            (ReplyMode::Extended, ReplyMode::Extended) => (RepErr::Invalid, EXTENDED),
            (ReplyMode::Extended, _) => (RepErr::ExtHeaderReqd, EXTENDED),
            _ => {
                self.mode = wanted;
                return push_ack(&mut self.out, option);
            }
        };
        push_error(&mut self.out, option, refusal.0, refusal.1);
    }

    fn start_tls(&mut self) {
        let option = OptionId::STARTTLS;
        if self.tls_up {
            push_error(
                &mut self.out,
                option,
                RepErr::Invalid,
                "TLS is established already",
            );
        } else if self.config.tls == TlsMode::None {
            push_error(&mut self.out, option, RepErr::Policy, "TLS not configured");
        } else {
            // CVE-2021-3716: nothing that was said in the clear counts any more.
            self.mode = ReplyMode::Simple;
            self.contexts = None;
            push_ack(&mut self.out, option);
            self.phase = Phase::StartTls;
        }
    }

    /// Parses an option's data and asks for the export that it names.
    pub(super) fn act_on_data(&mut self, option: OptionId, data: &[u8]) {
        let parsed = match option {
            OptionId::EXPORT_NAME => match parse_name(data) {
                Ok(name) => Ok((name, Asked::ExportName)),
                Err(bad) => {
                    self.phase = Phase::Over(Disconnect::ExportName(bad.text));
                    return;
                }
            },
            OptionId::INFO | OptionId::GO => {
                InfoQuery::parse(data).map(|query| (query.name, Asked::Info(query.wants)))
            }
            _ if self.mode == ReplyMode::Simple => {
                let text = format!(
                    "request option '{}' when structured reply is not negotiated",
                    words(option)
                );
                push_error(&mut self.out, option, RepErr::Invalid, &text);
                return;
            }
            _ => {
                ContextQuery::parse(data).map(|query| (query.name, Asked::Contexts(query.queries)))
            }
        };
        match parsed {
            Ok((name, kind)) => self.phase = Phase::Asking(Question { option, name, kind }),
            Err(bad) => push_error(&mut self.out, option, bad.error, bad.text),
        }
    }
}

/// QEMU's words for an option.
fn words(option: OptionId) -> &'static str {
    match option {
        OptionId::LIST => "list",
        OptionId::STARTTLS => "starttls",
        OptionId::STRUCTURED_REPLY => "structured reply",
        OptionId::EXTENDED_HEADERS => "extended headers",
        OptionId::LIST_META_CONTEXT => "list meta context",
        OptionId::SET_META_CONTEXT => "set meta context",
        _ => "<unknown>",
    }
}
