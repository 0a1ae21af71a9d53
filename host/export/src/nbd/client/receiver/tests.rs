//! Servers that keep to the protocol, and servers that do not.

use super::*;
use crate::nbd::haggle::testing::Random;
use crate::nbd::reply::ReplyTo;
use crate::nbd::status::{StatusAsked, StatusExtents};
use crate::nbd::wire::{CommandFlags, Request};

const READ: Open = Open {
    command: Command::READ,
    offset: 4096,
    length: 1024,
};
const STATUS: Open = Open {
    command: Command::BLOCK_STATUS,
    offset: 0,
    length: 1 << 20,
};
const MODES: [ReplyMode; 3] = [
    ReplyMode::Simple,
    ReplyMode::Structured,
    ReplyMode::Extended,
];

/// Our own server's side of a request.
fn to(mode: ReplyMode, open: Open, cookie: u64) -> ReplyTo {
    let request = Request {
        flags: CommandFlags::empty(),
        command: open.command,
        cookie,
        offset: open.offset,
        length: open.length,
    };
    ReplyTo::new(mode, &request)
}

#[derive(Default, Debug, PartialEq, Eq)]
struct Seen {
    buf: Vec<u8>,
    outcome: Option<Result<Option<Extent>, u32>>,
}

/// One request, answered with these bytes in pieces.
fn answered(
    mode: ReplyMode,
    open: Open,
    piece: usize,
    write: impl Fn(ReplyTo, &mut Vec<u8>),
) -> Outcome<Seen> {
    let mut receiver = Receiver::new(mode, Some(0));
    let (slot, cookie) = receiver.begin(open).unwrap();
    let mut bytes = Vec::new();
    write(to(mode, open, cookie), &mut bytes);
    let mut seen = Seen {
        buf: vec![0xee; open.length.min(4096) as usize],
        outcome: None,
    };
    let mut at = 0;
    for end in (0..bytes.len()).step_by(piece).chain([bytes.len()]) {
        loop {
            let (used, event) = receiver.drive(&bytes[at..end])?;
            at += used;
            match event {
                None => break,
                Some(Event::Data { slot: s, at, bytes }) => {
                    assert_eq!(s, slot);
                    seen.buf[at..at + bytes.len()].copy_from_slice(bytes);
                }
                Some(Event::Zero { at, len, .. }) => seen.buf[at..at + len].fill(0),
                Some(Event::Done { outcome, .. }) => seen.outcome = Some(outcome),
            }
        }
    }
    assert_eq!(at, bytes.len(), "all was used");
    assert_eq!(receiver.open(), usize::from(seen.outcome.is_none()));
    Ok(seen)
}

#[test]
fn reads_are_put_together_in_every_mode_and_cut() {
    for mode in MODES {
        for piece in [1, 7, 100, 10_000] {
            let seen = answered(mode, READ, piece, |to, out| {
                to.data(4096, 1024, true, out);
                out.extend([7; 1024]);
            });
            let seen = seen.unwrap();
            assert_eq!(seen.buf, [7; 1024]);
            assert_eq!(seen.outcome, Some(Ok(None)));
        }
    }
    for mode in &MODES[1..] {
        let seen = answered(*mode, READ, 5, |to, out| {
            to.hole(4096 + 512, 512, false, out);
            to.data(4096, 512, false, out);
            out.extend([7; 512]);
            to.done(out);
        });
        assert_eq!(seen.unwrap().buf, [[7; 512], [0; 512]].concat());
    }
}

#[test]
fn errors_end_requests_in_every_mode() {
    for mode in MODES {
        let seen = answered(mode, READ, 9, |to, out| {
            to.error(crate::errno::NbdErrno::NoSpc, "no space", out);
        });
        assert_eq!(seen.unwrap().outcome, Some(Err(28)));
        let flush = Open {
            command: Command::FLUSH,
            offset: 0,
            length: 0,
        };
        let seen = answered(mode, flush, 9, |to, out| to.done(out));
        assert_eq!(seen.unwrap().outcome, Some(Ok(None)));
    }
}

#[test]
fn the_first_extent_counts() {
    for (mode, kind) in [(ReplyMode::Structured, 5_u16), (ReplyMode::Extended, 6)] {
        let seen = answered(mode, STATUS, 3, |to, out| {
            let asked = StatusAsked {
                one: false,
                requested: STATUS.length,
                available: 1 << 30,
                contexts: 1,
            };
            let mut extents = StatusExtents::begin(to, 0, asked, out);
            assert!(extents.push(65536, 3), "{kind}");
            extents.push(1 << 24, 0);
            extents.finish(true);
        });
        let extent = Extent {
            length: 65536,
            flags: 3,
        };
        assert_eq!(seen.unwrap().outcome, Some(Ok(Some(extent))));
    }
}

fn chunk(cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out
}

/// The sentence about a structured answer to one request.
fn offence(open: Open, chunks: &[(u16, u16, Vec<u8>)]) -> String {
    let mut receiver = Receiver::new(ReplyMode::Structured, Some(5));
    let (_, cookie) = receiver.begin(open).unwrap();
    let bytes: Vec<u8> = chunks
        .iter()
        .flat_map(|(flags, kind, payload)| chunk(cookie, *flags, *kind, payload))
        .collect();
    let mut at = 0;
    loop {
        match receiver.drive(&bytes[at..]) {
            Ok((used, Some(_))) => at += used,
            Ok((_, None)) => panic!("nothing wrong was found"),
            Err(Broken(sentence)) => return sentence,
        }
    }
}

fn data(offset: u64, len: usize) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &vec![1; len]].concat()
}

fn hole(offset: u64, len: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

#[test]
fn a_read_is_whole_and_inside_and_once() {
    let beyond = "Protocol error: server sent chunk exceeding requested region";
    assert_eq!(offence(READ, &[(1, 1, data(4095, 8))]), beyond);
    assert_eq!(offence(READ, &[(1, 1, data(4096, 1025))]), beyond);
    assert_eq!(offence(READ, &[(1, 2, hole(5120, 1))]), beyond);
    assert_eq!(offence(READ, &[(1, 2, hole(4096, u32::MAX))]), beyond);
    assert_eq!(offence(READ, &[(1, 2, hole(4096, 0))]), beyond);
    assert_eq!(offence(READ, &[(1, 1, data(u64::MAX, 8))]), beyond);
    assert_eq!(
        offence(READ, &[(0, 1, data(4096, 10)), (1, 2, hole(4105, 8))]),
        "Protocol error: server sent a part of a read twice"
    );
    assert_eq!(
        offence(READ, &[(0, 2, hole(4100, 8)), (1, 1, data(4096, 5))]),
        "Protocol error: server sent a part of a read twice"
    );
    assert_eq!(
        offence(READ, &[(1, 1, data(4096, 1023))]),
        "server left out a part of a read"
    );
    let dots: Vec<_> = (0..=PIECES_MAX as u64)
        .map(|n| (0, 2, hole(n * 2, 1)))
        .collect();
    let long = Open {
        offset: 0,
        length: 1 << 20,
        ..READ
    };
    assert_eq!(
        offence(long, &dots),
        "server answers a read in too many pieces"
    );
}

#[test]
fn chunks_have_the_length_of_their_kind() {
    for (open, kind, len) in [
        (READ, 1, 8),
        (READ, 2, 11),
        (READ, 2, 13),
        (STATUS, 5, 11),
        (STATUS, 1, 9),
        (READ, 5, 12),
    ] {
        let sentence = offence(open, &[(1, kind, vec![0; len])]);
        assert!(sentence.contains("invalid payload"), "{sentence}");
    }
    let sentence = offence(READ, &[(1, 77, vec![])]);
    assert_eq!(sentence, "unexpected chunk type 77 of 0 bytes");
    let sentence = offence(READ, &[(0, 0, vec![])]);
    assert!(sentence.contains("NBD_REPLY_TYPE_NONE"), "{sentence}");
    let sentence = offence(READ, &[(1, 0x8001, b"\0\0\0\x05\0\x02x".to_vec())]);
    assert!(sentence.contains("incorrect message size"), "{sentence}");
    let sentence = offence(READ, &[(1, 0x8001, b"\0\0\0\0\0\0".to_vec())]);
    assert!(sentence.contains("error = 0"), "{sentence}");
}

#[test]
fn a_status_is_for_what_was_asked() {
    let status = |id: u32, len: u32| {
        let words = [id, len, 0].map(u32::to_be_bytes);
        words.concat()
    };
    let sentence = offence(STATUS, &[(1, 5, status(6, 512))]);
    assert_eq!(
        sentence,
        "block status for a context that was not agreed on"
    );
    let sentence = offence(STATUS, &[(1, 5, status(5, 0))]);
    assert_eq!(
        sentence,
        "Protocol error: server sent status chunk with zero length"
    );
    let twice = [(0, 5, status(5, 512)), (1, 5, status(5, 512))];
    assert!(offence(STATUS, &twice).contains("second block status"));
    assert_eq!(
        offence(STATUS, &[(1, 0, vec![])]),
        "Server did not reply with any status extents"
    );
}

#[test]
fn replies_are_to_open_requests() {
    let mut receiver = Receiver::new(ReplyMode::Structured, None);
    let (_, cookie) = receiver.begin(READ).unwrap();
    let error = receiver.drive(&chunk(cookie + 1, 1, 0, b"")).unwrap_err();
    assert!(error.0.contains("unknown cookie"), "{error}");
    // The slot's new request is not the old one.
    let mut receiver = Receiver::new(ReplyMode::Simple, None);
    let flush = Open {
        command: Command::FLUSH,
        offset: 0,
        length: 0,
    };
    let (_, old) = receiver.begin(flush).unwrap();
    let reply = crate::nbd::wire::simple_reply(0, old);
    assert!(matches!(
        receiver.drive(&reply),
        Ok((16, Some(Event::Done { .. })))
    ));
    let (_, new) = receiver.begin(flush).unwrap();
    assert_ne!(old, new);
    assert!(receiver.drive(&reply).is_err());
    // A simple reply to a structured read.
    let mut receiver = Receiver::new(ReplyMode::Structured, None);
    let (_, cookie) = receiver.begin(READ).unwrap();
    let error = receiver
        .drive(&crate::nbd::wire::simple_reply(5, cookie))
        .unwrap_err();
    assert_eq!(
        error.0,
        "Protocol error: simple reply when structured reply chunk was expected"
    );
}

#[test]
fn so_many_requests_are_open_and_no_more() {
    let mut receiver = Receiver::new(ReplyMode::Simple, None);
    for _ in 0..OPEN_MAX {
        assert!(receiver.begin(READ).is_some());
    }
    assert_eq!(receiver.begin(READ), None);
}

#[test]
fn noise_neither_panics_nor_escapes_its_buffer() {
    let mut random = Random::new(11);
    for _ in 0..40_000 {
        let setup = random.byte();
        let mut data = vec![setup, random.byte()];
        for _ in 0..random.below(6) {
            let cookie = (1 + random.below(8) as u64) * OPEN_MAX as u64 + random.below(8) as u64;
            let kind = [0, 1, 2, 5, 6, 0x8001, 0x8002][random.below(7)];
            let payload = match random.below(4) {
                0 => hole(random.below(5000) as u64, random.below(3000) as u32),
                1 => data_near(&mut random),
                2 => [0, 1 << 16, 3].map(u32::to_be_bytes).concat(),
                _ => vec![0; random.below(24)],
            };
            data.extend(chunk(cookie, random.byte().into(), kind, &payload));
        }
        for _ in 0..random.below(3) {
            let at = random.below(data.len());
            data[at] = random.byte();
        }
        crate::nbd::fuzzing::client_replies(&data);
    }
}

fn data_near(random: &mut Random) -> Vec<u8> {
    data(random.below(3000) as u64, random.below(600))
}
