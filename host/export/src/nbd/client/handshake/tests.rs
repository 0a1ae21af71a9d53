//! Scripted servers, byte by byte; the sentences are those of qemu-storage-daemon 10.0.

use super::*;
use crate::nbd::haggle::testing::Random;

const INFO: u32 = 3;
const ACK: u32 = 1;
const HELLO: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let words = [option, kind, len].map(u32::to_be_bytes).concat();
    [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &words, data].concat()
}

fn export(size: u64, flags: u16) -> Vec<u8> {
    let data = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    reply(7, INFO, &data)
}

fn sizes(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    let words = [min, preferred, max].map(u32::to_be_bytes).concat();
    reply(7, INFO, &[&[0, 3][..], &words].concat())
}

/// What comes of a server that answers each option with the bytes given for it, or says that it
/// does not know it. Everything is handed over in pieces of `piece` bytes.
fn meet(answers: &[(u32, Vec<u8>)], piece: usize) -> Result<Agreed, String> {
    let mut handshake = Handshake::new("x");
    let mut input = HELLO.to_vec();
    let mut at = 0;
    loop {
        let end = (at + piece).min(input.len());
        let (used, step) = handshake.drive(&input[at..end]);
        at += used;
        match step {
            Step::Done(agreed) => return Ok(agreed),
            Step::Fail(sentence) => return Err(sentence),
            Step::StartTls => return Err("TLS".to_owned()),
            Step::NeedInput if end == input.len() => return Err(handshake.ended("end")),
            Step::NeedInput => {
                // A larger piece: what is left over comes again with more behind it.
                let (used, step) = handshake.drive(&input[at..]);
                at += used;
                match step {
                    Step::Done(agreed) => return Ok(agreed),
                    Step::Fail(sentence) => return Err(sentence),
                    Step::NeedInput => return Err(handshake.ended("end")),
                    Step::StartTls => return Err("TLS".to_owned()),
                    Step::Send => answer(&mut handshake, answers, &mut input),
                }
            }
            Step::Send => answer(&mut handshake, answers, &mut input),
        }
    }
}

fn answer(handshake: &mut Handshake, answers: &[(u32, Vec<u8>)], input: &mut Vec<u8>) {
    let mut sent = &handshake.take_output()[..];
    if !sent.starts_with(b"IHAVEOPT") {
        sent = &sent[4..];
    }
    while !sent.is_empty() {
        assert_eq!(&sent[..8], b"IHAVEOPT");
        let id = number(&sent[8..12]) as u32;
        let len = number(&sent[12..16]) as usize;
        sent = &sent[16 + len..];
        match answers.iter().find(|(option, _)| *option == id) {
            Some((_, bytes)) => input.extend_from_slice(bytes),
            None => input.extend(reply(id, 0x8000_0001, b"unknown")),
        }
    }
}

fn refused(answers: &[(u32, Vec<u8>)]) -> String {
    meet(answers, 4096).unwrap_err()
}

fn context(id: u32, name: &str) -> Vec<u8> {
    reply(10, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
}

fn go(parts: &[Vec<u8>]) -> Vec<(u32, Vec<u8>)> {
    vec![(7, parts.concat())]
}

#[test]
fn the_most_that_both_have_is_agreed_on() {
    let script = |extended: bool| {
        let mut answers = vec![
            (8, reply(8, ACK, b"")),
            (10, [context(7, ALLOCATION), reply(10, ACK, b"")].concat()),
            (
                7,
                [
                    sizes(512, 4096, 1 << 20),
                    export(1 << 20, 0x7f),
                    reply(7, ACK, b""),
                ]
                .concat(),
            ),
        ];
        if extended {
            answers.push((11, reply(11, ACK, b"")));
        }
        answers
    };
    for piece in [1, 3, 20, 4096] {
        let agreed = meet(&script(true), piece).unwrap();
        assert_eq!(agreed.mode, ReplyMode::Extended);
        assert_eq!(agreed.allocation, Some(7));
        assert_eq!((agreed.block_min, agreed.payload_max), (512, 1 << 20));
        let agreed = meet(&script(false), piece).unwrap();
        assert_eq!(agreed.mode, ReplyMode::Structured);
        let agreed = meet(&script(false)[2..], piece).unwrap();
        assert_eq!((agreed.mode, agreed.allocation), (ReplyMode::Simple, None));
        assert_eq!(agreed.size, 1 << 20);
    }
}

#[test]
fn a_server_without_go_is_asked_the_old_way() {
    let data = [&4096_u64.to_be_bytes()[..], &3_u16.to_be_bytes()].concat();
    let agreed = meet(&[(1, data)], 4096).unwrap();
    assert_eq!(agreed.size, 4096);
    assert!(agreed.flags.contains(TransmissionFlags::READ_ONLY));
}

#[test]
fn the_oldest_servers_have_one_export() {
    let mut bytes = b"NBDMAGIC".to_vec();
    bytes.extend(OLDSTYLE_MAGIC.to_be_bytes());
    bytes.extend(4096_u64.to_be_bytes());
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend([0; 124]);
    let (used, step) = Handshake::new("").drive(&bytes);
    assert_eq!(used, bytes.len());
    assert!(matches!(step, Step::Done(Agreed { size: 4096, .. })));
    let (_, step) = Handshake::new("x").drive(&bytes);
    let sentence = "Server does not support non-empty export names";
    assert_eq!(step, Step::Fail(sentence.to_owned()));
}

#[test]
fn refusals_have_qemus_words() {
    let error = |n: u32| refused(&go(&[reply(7, 0x8000_0000 + n, b"because")]));
    assert_eq!(error(2), "Denied by server for option 7 (go)");
    assert_eq!(error(3), "Invalid parameters for option 7 (go)");
    assert_eq!(error(4), "Server lacks support for option 7 (go)");
    assert_eq!(error(5), "TLS negotiation required before option 7 (go)");
    assert_eq!(error(6), "Requested export not available");
    assert_eq!(error(7), "Server shutting down before option 7 (go)");
    assert_eq!(
        error(8),
        "Server requires INFO_BLOCK_SIZE for option 7 (go)"
    );
    assert_eq!(error(9), "Unknown error code when asking for option 7 (go)");
}

#[test]
fn malformed_replies_have_qemus_words() {
    let first = |bytes: &[u8]| refused(&[(11, bytes.to_vec())]);
    assert_eq!(first(&[b'x'; 20]), "Unexpected option reply magic");
    assert_eq!(
        first(&reply(3, 1, b"")),
        "Unexpected option type 3 (list), expected 11 (extended headers)"
    );
    assert_eq!(
        first(&reply(11, 2, b"")),
        "Server answered option 11 (extended headers) with unexpected reply 2 (server)"
    );
    assert_eq!(
        first(&reply(11, 1, b"abc")),
        "Option 11 ('extended headers') response length is 3 (it should be zero)"
    );
    let mut long = reply(11, 0x8000_0001, b"");
    long[16..].copy_from_slice(&0x7fff_ffff_u32.to_be_bytes());
    assert_eq!(
        first(&long),
        "server error 2147483649 (unsupported) message is too long"
    );
    let ack = reply(7, ACK, b"");
    assert_eq!(
        refused(&go(std::slice::from_ref(&ack))),
        "broken server omitted NBD_INFO_EXPORT"
    );
    assert_eq!(
        refused(&go(&[export(1 << 20, 0), ack.clone()])),
        "broken server omitted NBD_INFO_EXPORT"
    );
    assert_eq!(
        refused(&go(&[reply(7, 3, b"\0")])),
        "NBD_REP_INFO length 1 is too short"
    );
    assert_eq!(
        refused(&go(&[reply(7, 3, b"\0\0abc")])),
        "remaining export info len 3 is unexpected size"
    );
    assert_eq!(
        refused(&go(&[reply(7, 2, b"")])),
        "unexpected reply type 2 (server), expected 3 (info)"
    );
}

#[test]
fn block_sizes_are_checked_in_qemus_words() {
    let ack = reply(7, ACK, b"");
    let with = |min, preferred, max, size| {
        refused(&go(&[
            sizes(min, preferred, max),
            export(size, 1),
            ack.clone(),
        ]))
    };
    assert_eq!(
        with(0, 4096, 1 << 25, 1 << 20),
        "server minimum block size 0 is not a power of two"
    );
    assert_eq!(
        with(3, 4096, 1 << 25, 1 << 20),
        "server minimum block size 3 is not a power of two"
    );
    assert_eq!(
        with(1, 3, 1 << 25, 1 << 20),
        "server preferred block size 3 is not valid"
    );
    assert_eq!(
        with(4096, 4096, 512, 1 << 20),
        "server maximum block size 512 is not valid"
    );
    assert_eq!(
        with(4096, 4096, 1 << 25, 1000),
        "export size 1000 is not multiple of minimum block size 4096"
    );
    assert!(with(1, 4096, 1 << 25, u64::MAX).ends_with("is too large"));
    assert!(with(1 << 20, 1 << 20, 1 << 25, 1 << 20).ends_with("is too large"));
}

#[test]
fn contexts_are_checked_in_qemus_words() {
    let ack = reply(10, ACK, b"");
    let with = |parts: &[Vec<u8>]| refused(&[(8, reply(8, ACK, b"")), (10, parts.concat())]);
    assert_eq!(
        with(&[context(7, "qemu:foo"), ack.clone()]),
        "Failed to negotiate meta context 'base:allocation', server answered with different \
         context 'qemu:foo'"
    );
    assert_eq!(
        with(&[reply(10, 4, b"ab"), ack.clone()]),
        "Failed to negotiate meta context, server answered with unexpected length 2"
    );
    let twice = [context(7, ALLOCATION), context(8, ALLOCATION), ack];
    assert_eq!(with(&twice), "Server answered with more than one context");
}

#[test]
fn a_server_that_talks_without_end_is_left() {
    let more: Vec<_> = (0..INFOS_MAX + 1).map(|_| export(512, 1)).collect();
    assert_eq!(refused(&go(&more)), "server sends information without end");
}

#[test]
fn an_end_says_where_it_was() {
    for (len, what) in [
        (0, "initial magic"),
        (8, "server magic"),
        (16, "server flags"),
    ] {
        let mut handshake = Handshake::new("x");
        assert_eq!(handshake.drive(&HELLO[..len]), (len, Step::NeedInput));
        assert_eq!(
            handshake.ended("it ended"),
            format!("Failed to read {what}: it ended")
        );
    }
    let (_, step) = Handshake::new("x").drive(b"HTTP/1.0");
    let sentence = "Bad initial magic received: 0x485454502f312e30";
    assert_eq!(step, Step::Fail(sentence.to_owned()));
    let (_, step) = Handshake::new("x").drive(b"NBDMAGIC12345678");
    let sentence = "Bad server magic received: 0x3132333435363738";
    assert_eq!(step, Step::Fail(sentence.to_owned()));
}

#[test]
fn our_own_server_and_client_agree() {
    use crate::nbd::haggle::testing::Disks;
    use crate::nbd::haggle::{self, Config, Haggle};
    for extended_headers in [true, false] {
        let mut server = Haggle::new(Config {
            extended_headers,
            ..Config::default()
        });
        let mut client = Handshake::new("a");
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        let agreed = loop {
            let (used, step) = client.drive(&to_client);
            to_client.drain(..used);
            match step {
                Step::Send => to_server.extend(client.take_output()),
                Step::Done(agreed) => break agreed,
                Step::StartTls => panic!("nobody asked for TLS"),
                Step::Fail(sentence) => panic!("{sentence}"),
                Step::NeedInput => {}
            }
            let (used, step) = server.drive(&to_server, &Disks);
            to_server.drain(..used);
            if let haggle::Step::Send | haggle::Step::Enter(_) = step {
                to_client.extend(server.take_output());
            }
        };
        assert_eq!(agreed.mode == ReplyMode::Extended, extended_headers);
        assert_eq!((agreed.size, agreed.allocation), (1 << 20, Some(0)));
        assert_eq!(agreed.block_min, 512);
    }
}

#[test]
fn noise_neither_panics_nor_hoards() {
    let mut random = Random::new(7);
    for _ in 0..20_000 {
        let mut data = vec![random.byte(), random.byte()];
        data.extend_from_slice(HELLO);
        for _ in 0..random.below(8) {
            let option = [11, 8, 10, 7, 1][random.below(5)];
            let kind = [1, 3, 4, 0x8000_0001, 0x8000_0006][random.below(5)];
            let body: &[u8] = [
                &b""[..],
                b"\0\0\0\0\0\0\0\x10\0\0\0\x01",
                b"\0\x03\0\0\x02\0\0\0\x10\0\0\x10\0\0",
                b"\0\0\0\x07base:allocation",
            ][random.below(4)];
            data.extend(reply(option, kind, body));
        }
        for _ in 0..random.below(4) {
            let at = random.below(data.len());
            data[at] = random.byte();
        }
        crate::nbd::fuzzing::client_handshake(&data);
    }
}

/// Drives an encrypting client against a server that greets, answers STARTTLS so, and has said
/// more already.
fn starts_tls(greeting: &[u8], answer: &[u8], more: &[u8]) -> Step {
    let mut handshake = Handshake::encrypted("x");
    let input = [greeting, answer, more].concat();
    let mut at = 0;
    loop {
        let (used, step) = handshake.drive(&input[at..]);
        at += used;
        match step {
            Step::Send => drop(handshake.take_output()),
            step => return step,
        }
    }
}

#[test]
fn nothing_but_starttls_is_said_in_the_clear() {
    let mut handshake = Handshake::encrypted("x");
    assert_eq!(handshake.drive(HELLO).1, Step::Send);
    let said = handshake.take_output();
    assert_eq!(&said[4..], b"IHAVEOPT\0\0\0\x05\0\0\0\0");
    assert_eq!(handshake.drive(&reply(5, ACK, b"")).1, Step::StartTls);
    handshake.tls_established();
    assert_eq!(handshake.drive(b"").1, Step::Send);
    let said = handshake.take_output();
    assert_eq!(&said[..12], b"IHAVEOPT\0\0\0\x0b");
}

#[test]
fn a_server_without_tls_is_left() {
    let fail = |sentence: &str| Step::Fail(sentence.to_owned());
    assert_eq!(
        starts_tls(HELLO, &reply(5, 0x8000_0002, b""), b""),
        fail("Denied by server for option 5 (starttls)")
    );
    assert_eq!(
        starts_tls(b"NBDMAGICIHAVEOPT\0\0", b"", b""),
        fail("Server does not support STARTTLS")
    );
    assert_eq!(
        starts_tls(HELLO, &reply(5, ACK, b""), &export(1 << 20, 1)),
        fail("Server sent plaintext behind STARTTLS")
    );
}
