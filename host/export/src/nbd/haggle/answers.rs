//! The second half of an option: the caller knows the export now, the client gets its answer.
//!
//! Part of [`Haggle`]; split off by size. Invariant: INFO and GO are answered by the same code
//! from the same facts, so that they cannot differ, but for one flag: as QEMU does, INFO offers
//! status payloads to a client that has not selected contexts yet, and GO no more.

use super::{Asked, Disconnect, Haggle, Phase, Question};
use crate::nbd::contexts::{QueryKind, select};
use crate::nbd::exports::{BlockSizes, ContextInfo, ExportInfo, Exports, Lookup};
use crate::nbd::options::{
    INFO_DESCRIPTION, INFO_NAME, InfoWants, OptionId, RepErr, push_ack, push_context, push_error,
    push_info_block_size, push_info_export, push_info_text, push_server,
};
use crate::nbd::reply::ReplyMode;
use crate::nbd::session::Session;
use crate::nbd::wire::{ClientFlags, EXPORT_NAME_PADDING};

/// The outcome of the last `NBD_OPT_SET_META_CONTEXT`. It counts only for a client that enters
/// the export under this very name.
#[derive(Debug)]
pub(super) struct SelectedContexts {
    name: String,
    contexts: Vec<ContextInfo>,
}

impl Haggle {
    /// Answers the [`Step::LookUp`](super::Step::LookUp) that was returned last.
    pub fn found(&mut self, lookup: Lookup) {
        if !matches!(self.phase, Phase::Asking(_)) {
            return;
        }
        let Phase::Asking(question) = std::mem::replace(&mut self.phase, Phase::Header) else {
            return;
        };
        let refusal = match lookup {
            Lookup::Found(export) => match self.acceptable(&export, &question.kind) {
                Ok(()) => return self.answer(question, *export),
                Err(refusal) => refusal,
            },
            Lookup::Unknown => {
                // The text has to fit a protocol string; the name alone may fill one.
                let name: String = question.name.chars().take(256).collect();
                (RepErr::Unknown, format!("export '{name}' not present"))
            }
            Lookup::Denied(text) => (RepErr::Policy, text),
            Lookup::ShuttingDown => (RepErr::Shutdown, "Server is shutting down".to_owned()),
        };
        self.refuse_export(&question, refusal.0, &refusal.1);
    }

    /// Answers a [`Step::List`](super::Step::List).
    pub fn list(&mut self, exports: &dyn Exports) {
        if !matches!(self.phase, Phase::Listing) {
            return;
        }
        let mut out = std::mem::take(&mut self.out);
        exports.list(&mut |export| {
            // "MAY omit entries [...] if TLS has not been negotiated": the name is a secret too.
            if !self.hidden(export) {
                push_server(&mut out, export);
            }
        });
        push_ack(&mut out, OptionId::LIST);
        self.out = out;
        self.phase = Phase::Header;
    }

    /// Whether what was negotiated so far is enough for this export.
    fn acceptable(&self, export: &ExportInfo, asked: &Asked) -> Result<(), (RepErr, String)> {
        if self.hidden(export) {
            return Err((
                RepErr::TlsReqd,
                "this export is only available over TLS".to_owned(),
            ));
        }
        let promised = match asked {
            Asked::Info(wants) => wants.block_size,
            Asked::ExportName => false,
            Asked::Contexts(_) => true,
        };
        if export.block_size_required && !promised && export.block_sizes.in_order().minimum > 1 {
            let text = "this export needs a client that obeys its minimum block size";
            return Err((RepErr::BlockSizeReqd, text.to_owned()));
        }
        Ok(())
    }

    fn refuse_export(&mut self, question: &Question, error: RepErr, text: &str) {
        if let Asked::ExportName = question.kind {
            let why = match error {
                RepErr::TlsReqd => "TLS is required",
                RepErr::BlockSizeReqd => "the client cannot learn the block size",
                RepErr::Policy => "not permitted",
                RepErr::Shutdown => "the server is shutting down",
                _ => "not present",
            };
            self.phase = Phase::Over(Disconnect::ExportName(why));
            return;
        }
        push_error(&mut self.out, question.option, error, text);
    }

    fn answer(&mut self, question: Question, export: ExportInfo) {
        let Question { option, name, kind } = question;
        match kind {
            Asked::Info(wants) => {
                self.push_infos(option, &name, wants, &export);
                push_ack(&mut self.out, option);
                if option == OptionId::GO {
                    self.enter(name, export);
                }
            }
            Asked::ExportName => {
                let flags = Session::offered_flags(self.mode, &export, false);
                self.out.extend_from_slice(&export.size.to_be_bytes());
                self.out.extend_from_slice(&flags.bits().to_be_bytes());
                if !self.client.contains(ClientFlags::NO_ZEROES) {
                    self.out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
                }
                self.enter(name, export);
            }
            Asked::Contexts(queries) if option == OptionId::LIST_META_CONTEXT => {
                self.list_contexts(&export, &queries);
            }
            Asked::Contexts(queries) => self.set_contexts(name, &export, &queries),
        }
    }

    fn push_infos(&mut self, option: OptionId, name: &str, wants: InfoWants, export: &ExportInfo) {
        // Whoever asks with INFO may select contexts after it has seen what they are good for.
        let with_contexts = option == OptionId::INFO || !self.contexts_for(name, export).is_empty();
        let flags = Session::offered_flags(self.mode, export, with_contexts);
        let out = &mut self.out;
        push_info_export(out, option, export.size, flags);
        if wants.name {
            push_info_text(out, option, INFO_NAME, &export.name);
        }
        if wants.description && !export.description.is_empty() {
            push_info_text(out, option, INFO_DESCRIPTION, &export.description);
        }
        // The payload limit concerns every client, so the sizes are sent unasked too, as QEMU
        // does. Who did not ask promised nothing: its minimum is 1, and unaligned requests are
        // served (exports that cannot do so were refused above).
        let sizes = export.block_sizes.in_order();
        let minimum = if wants.block_size { sizes.minimum } else { 1 };
        push_info_block_size(out, option, BlockSizes { minimum, ..sizes });
    }

    fn list_contexts(&mut self, export: &ExportInfo, queries: &[String]) {
        let option = OptionId::LIST_META_CONTEXT;
        let extended = self.mode == ReplyMode::Extended;
        // Listing has no bound of its own to exceed.
        for context in
            select(QueryKind::List, &export.contexts, extended, queries).unwrap_or_default()
        {
            // "The metadata context ID in these replies is reserved and SHOULD be set to zero".
            push_context(&mut self.out, option, 0, &context.name);
        }
        push_ack(&mut self.out, option);
    }

    fn set_contexts(&mut self, name: String, export: &ExportInfo, queries: &[String]) {
        let option = OptionId::SET_META_CONTEXT;
        let extended = self.mode == ReplyMode::Extended;
        let Ok(chosen) = select(QueryKind::Set, &export.contexts, extended, queries) else {
            push_error(
                &mut self.out,
                option,
                RepErr::TooBig,
                "Too many metadata contexts",
            );
            return;
        };
        for context in &chosen {
            push_context(&mut self.out, option, context.id, &context.name);
        }
        push_ack(&mut self.out, option);
        let contexts = chosen.into_iter().cloned().collect();
        self.contexts = Some(SelectedContexts { name, contexts });
    }

    /// What the client selected for this name, as far as the export still has it.
    fn contexts_for(&self, name: &str, export: &ExportInfo) -> Vec<ContextInfo> {
        let Some(selected) = self
            .contexts
            .as_ref()
            .filter(|selected| selected.name == name)
        else {
            return Vec::new();
        };
        let still = |context: &&ContextInfo| {
            export.contexts.contains(context) && (!context.wide || self.mode == ReplyMode::Extended)
        };
        selected.contexts.iter().filter(still).cloned().collect()
    }

    fn enter(&mut self, name: String, export: ExportInfo) {
        let contexts = self.contexts_for(&name, &export);
        let session = Session::new(self.mode, name, export, contexts);
        self.phase = Phase::Enter(Box::new(session));
    }
}
