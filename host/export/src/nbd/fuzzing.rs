//! Entry points for fuzzers: bytes in, nothing out, no panic, bounded memory.
//!
//! Not used by the server. The assertions here are the core's promises; breaking one is a find.

use super::client::handshake::{self, Handshake};
use super::client::receiver::{Event, OPEN_MAX, Open, Receiver};
use super::exports::{BlockSizes, ContextInfo, ExportFlags, ExportInfo, Exports};
use super::haggle::{Config, Haggle, Step, TlsMode};
use super::limits::{OPTION_DATA_MAX, SWALLOW_MAX};
use super::reply::ReplyMode;
use super::session::{Checked, Operation, Reject, Session};
use super::status::{StatusAsked, StatusExtents};
use super::wire::{Command, Request, TransmissionFlags};

/// Largest answer to one option: a few exports and contexts, or padding.
const OUTPUT_MAX: usize = 16 * 1024;
const SIZE: u64 = 1 << 20;

struct TwoExports;

fn export(name: &str) -> ExportInfo {
    let context = |id, name: &str, wide| ContextInfo {
        name: name.to_owned(),
        id,
        wide,
    };
    ExportInfo {
        name: name.to_owned(),
        description: "for fuzzing".to_owned(),
        size: SIZE,
        flags: ExportFlags::all(),
        block_sizes: BlockSizes {
            minimum: 512,
            ..BlockSizes::default()
        },
        block_size_required: name == "strict",
        tls_only: name == "strict",
        contexts: vec![
            context(0, "base:allocation", false),
            context(1, "qemu:allocation-depth", false),
            context(2, "x-wide:heat", true),
        ],
    }
}

impl Exports for TwoExports {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        match name {
            "" | "a" => Some(export("a")),
            "strict" => Some(export("strict")),
            _ => None,
        }
    }

    fn list(&self, visit: &mut dyn FnMut(&ExportInfo)) {
        visit(&export("a"));
        visit(&export("strict"));
    }
}

/// A handshake: the first byte configures it, the second cuts the rest into pieces. What follows
/// a successful one is taken for requests.
pub fn haggle(data: &[u8]) {
    let [setup, cut, data @ ..] = data else {
        return;
    };
    let tls = match setup & 3 {
        0 | 1 => TlsMode::None,
        2 => TlsMode::Forced,
        _ => TlsMode::Selective,
    };
    let mut haggle = Haggle::new(Config {
        tls,
        extended_headers: setup & 4 != 0,
    });
    let piece = usize::from(*cut) + 1;
    let mut at = 0;
    let mut end = 0;
    loop {
        let (used, step) = haggle.drive(&data[at..end], &TwoExports);
        at += used;
        assert!(
            haggle.held() <= 2 * OPTION_DATA_MAX as usize,
            "held {}",
            haggle.held()
        );
        match step {
            Step::NeedInput if end == data.len() => return,
            Step::NeedInput => {
                assert_eq!(at, end, "input was left over");
                end = data.len().min(end + piece);
            }
            Step::Send => {
                let output = haggle.take_output();
                assert!(!output.is_empty() && output.len() <= OUTPUT_MAX);
            }
            Step::StartTls => haggle.tls_established(),
            Step::Enter(session) => return serve(&session, &data[at..]),
            Step::Disconnect(_) => return,
            Step::LookUp { .. } | Step::List => unreachable!("drive answers these"),
        }
    }
}

/// The transmission phase: the first byte says what was negotiated.
pub fn requests(data: &[u8]) {
    let [setup, data @ ..] = data else { return };
    let mode = match setup & 3 {
        0 => ReplyMode::Simple,
        1 | 2 => ReplyMode::Structured,
        _ => ReplyMode::Extended,
    };
    let mut export = export(if setup & 4 != 0 { "strict" } else { "a" });
    export.flags.set(ExportFlags::WRITABLE, setup & 8 != 0);
    export.flags.set(ExportFlags::FAST_ZERO, setup & 16 != 0);
    let keep = usize::from(setup >> 5).min(export.contexts.len());
    let contexts = export.contexts[..keep].to_vec();
    serve(&Session::new(mode, "a".to_owned(), export, contexts), data);
}

fn serve(session: &Session, mut data: &[u8]) {
    let mut out = Vec::new();
    while let Ok(Some(request)) = session.parse(data) {
        data = &data[session.header_len()..];
        let skip = match session.check(&request, SIZE) {
            Ok(checked) => {
                assert!(checked.payload <= session.payload_max());
                let Some(payload) = usize::try_from(checked.payload)
                    .ok()
                    .and_then(|n| data.get(..n))
                else {
                    return;
                };
                perform(session, &request, checked, payload, &mut out);
                checked.payload
            }
            Err(Reject::Answer {
                errno,
                text,
                swallow,
            }) => {
                assert!(swallow <= SWALLOW_MAX);
                session.reply_to(&request).error(errno, text, &mut out);
                swallow
            }
            Err(Reject::Disconnect(_)) => return,
        };
        let Some(rest) = usize::try_from(skip).ok().and_then(|skip| data.get(skip..)) else {
            return;
        };
        data = rest;
        assert!(out.len() <= OUTPUT_MAX);
        out.clear();
    }
}

fn perform(
    session: &Session,
    request: &Request,
    checked: Checked,
    payload: &[u8],
    out: &mut Vec<u8>,
) {
    let Checked {
        operation,
        offset,
        length,
        ..
    } = checked;
    let to = session.reply_to(request);
    match operation {
        // Without a range, or with one that the payload has yet to tell.
        Operation::Flush | Operation::Disconnect | Operation::FilteredStatus { .. } => {}
        _ => assert!(offset <= SIZE && length <= SIZE - offset),
    }
    match operation {
        Operation::Read { df } if length > 0 => {
            let len = u32::try_from(length).expect("reads are bounded by the payload limit");
            if df || !to.hole(offset, len, true, out) {
                to.data(offset, len, true, out);
            }
        }
        Operation::BlockStatus { one, contexts } => {
            let asked = StatusAsked {
                one,
                requested: length,
                available: SIZE - offset,
                contexts: contexts.count(),
            };
            let mut left = contexts.count();
            assert!(left > 0 && length > 0);
            for context in session.contexts_in(contexts) {
                let mut status = StatusExtents::begin(to, context.id, asked, out);
                let step = u64::from(context.id) * 65_536 + offset % 4096;
                for n in 0..16 {
                    if !status.push(step * n, n / 2) {
                        break;
                    }
                }
                left -= 1;
                status.finish(left == 0);
            }
            assert_eq!(left, 0);
        }
        Operation::FilteredStatus { .. } => {
            let offered = session.flags();
            assert!(offered.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
            // What is waited for is a length and one id per context at most.
            assert!((12..=8 + 4 * session.contexts().len()).contains(&payload.len()));
            assert_eq!((length, payload.len() % 4), (0, 0));
            match session.check_status_payload(request, payload, SIZE) {
                Ok(checked) => perform_filtered(session, request, checked, payload, out),
                Err(Reject::Answer {
                    errno,
                    text,
                    swallow,
                }) => {
                    assert_eq!(swallow, 0, "it was read already");
                    to.error(errno, text, out);
                }
                Err(Reject::Disconnect(_)) => unreachable!("the payload was bounded before"),
            }
        }
        _ => to.done(out),
    }
}

/// The contexts that a payload chose are those that it names, and no others.
fn perform_filtered(
    session: &Session,
    request: &Request,
    checked: Checked,
    payload: &[u8],
    out: &mut Vec<u8>,
) {
    let Operation::BlockStatus { contexts, .. } = checked.operation else {
        unreachable!("a payload chooses contexts");
    };
    let (_, ids) = payload.split_at(8);
    assert_eq!(
        contexts.count() as usize * 4,
        ids.len(),
        "each of them once"
    );
    let named = |id: u32| ids.chunks(4).any(|bytes| bytes == id.to_be_bytes());
    for (n, context) in session.contexts().iter().enumerate() {
        assert_eq!(contexts.contains(n), named(context.id));
    }
    assert_eq!(checked.payload, 0);
    perform(session, request, checked, &[], out);
}

/// A server's side of a handshake, as our client hears it: the first byte cuts the rest into
/// pieces. What follows a successful one is taken for replies.
pub fn client_handshake(data: &[u8]) {
    let [setup, cut, data @ ..] = data else {
        return;
    };
    let name = if setup & 1 == 0 { "x" } else { "" };
    let mut handshake = match setup & 2 {
        0 => Handshake::new(name),
        _ => Handshake::encrypted(name),
    };
    let piece = usize::from(*cut) + 1;
    let (mut at, mut end) = (0, 0);
    loop {
        let (used, step) = handshake.drive(&data[at..end]);
        at += used;
        match step {
            handshake::Step::NeedInput if end == data.len() => {
                assert!(!handshake.ended("end").is_empty());
                return;
            }
            handshake::Step::NeedInput => {
                assert!(end - at <= handshake::REPLY_MAX as usize + 20, "it hoards");
                end = data.len().min(end + piece);
            }
            handshake::Step::Send => {
                let output = handshake.take_output();
                assert!(!output.is_empty() && output.len() <= OUTPUT_MAX);
            }
            handshake::Step::StartTls => {
                assert_eq!(at, end, "plaintext is left over");
                handshake.tls_established();
            }
            handshake::Step::Done(agreed) => {
                assert!(agreed.block_min.is_power_of_two());
                assert!(agreed.payload_max >= agreed.block_min);
                assert!(agreed.size.is_multiple_of(u64::from(agreed.block_min)));
                return replies(agreed.mode, &data[at..]);
            }
            handshake::Step::Fail(sentence) => {
                assert!(!sentence.is_empty() && sentence.len() < 1000);
                return;
            }
        }
    }
}

/// A server's replies, as our client hears them: the first byte says what was negotiated.
pub fn client_replies(data: &[u8]) {
    let [setup, data @ ..] = data else { return };
    let mode = match setup & 3 {
        0 => ReplyMode::Simple,
        1 | 2 => ReplyMode::Structured,
        _ => ReplyMode::Extended,
    };
    replies(mode, data);
}

/// Eight open requests; each read has a buffer that nothing may leave or fill half.
fn replies(mode: ReplyMode, data: &[u8]) {
    let mut receiver = Receiver::new(mode, Some(0));
    let commands = [0, 1, 3, 4, 6, 7, 0, 7].map(Command);
    let mut buffers: Vec<Vec<bool>> = Vec::new();
    for (n, command) in commands.into_iter().enumerate() {
        let open = Open {
            command,
            offset: n as u64 * 512,
            length: 2048,
        };
        assert!(receiver.begin(open).is_some_and(|(slot, _)| slot == n));
        buffers.push(vec![false; 2048]);
    }
    let piece = data.first().map_or(1, |n| usize::from(*n) + 1);
    let (mut at, mut end) = (0, 0);
    loop {
        let Ok((used, event)) = receiver.drive(&data[at..end]) else {
            return;
        };
        at += used;
        let mut put = |slot: usize, at: usize, len: usize| {
            for byte in &mut buffers[slot][at..at + len] {
                assert!(!*byte, "a byte came twice");
                *byte = true;
            }
        };
        match event {
            Some(Event::Data { slot, at, bytes }) => put(slot, at, bytes.len()),
            Some(Event::Zero { slot, at, len }) => put(slot, at, len),
            Some(Event::Done { slot, outcome }) => {
                assert!(slot < OPEN_MAX);
                if commands[slot] == Command::READ && outcome.is_ok() {
                    assert!(buffers[slot].iter().all(|it| *it), "a byte is missing");
                }
            }
            None if end == data.len() => return,
            None => {
                assert!(end - at <= 64, "it hoards");
                end = data.len().min(end + piece);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::haggle::testing::{Random, option};

    /// Plausible input: bytes of the right shape with damage, and noise.
    fn corpus(random: &mut Random) -> Vec<u8> {
        let mut data = vec![random.byte(), random.byte(), 0, 0, 0, random.byte() & 3];
        for _ in 0..random.below(6) {
            let id = random.below(13) as u32;
            let body: &[u8] = match random.below(6) {
                0 => b"",
                1 => b"\0\0\0\x01a\0\x01\0\x03",
                2 => b"\0\0\0\x06strict\0\x01\0\x03",
                3 => b"\0\0\0\x01a\0\0\0\x01\0\0\0\x0fbase:allocation",
                4 => b"\0\0\0\x01a\0\0\0\0",
                _ => b"a",
            };
            data.extend_from_slice(&option(id, body));
        }
        for _ in 0..random.below(8) {
            let magic: u32 = if random.below(2) == 0 {
                0x2560_9513
            } else {
                0x21e4_1c71
            };
            data.extend_from_slice(&magic.to_be_bytes());
            data.extend((0..random.below(48)).map(|n| if n > 2 { 0 } else { random.byte() & 31 }));
        }
        for _ in 0..random.below(3) {
            let at = random.below(data.len());
            data[at] = random.byte();
        }
        data
    }

    #[test]
    fn no_handshake_panics_or_hoards() {
        let mut random = Random::new(1);
        for _ in 0..30_000 {
            haggle(&corpus(&mut random));
        }
    }

    #[test]
    fn no_request_panics_or_hoards() {
        let mut random = Random::new(2);
        for _ in 0..60_000 {
            let mut data = vec![random.byte()];
            let extended = data[0] & 3 == 3;
            for _ in 0..random.below(6) {
                let request = Request {
                    flags: crate::nbd::wire::CommandFlags::from_bits_retain(
                        (random.byte() & random.byte() & 63).into(),
                    ),
                    command: crate::nbd::wire::Command(random.below(10) as u16),
                    cookie: 1,
                    offset: random.edge(),
                    length: random.edge(),
                };
                if extended {
                    data.extend_from_slice(&request.to_extended());
                } else {
                    data.extend_from_slice(&request.to_compact());
                }
                data.extend((0..random.below(24)).map(|n| if n == 5 { 2 } else { 0 }));
            }
            requests(&data);
        }
    }
}
