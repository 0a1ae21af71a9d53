//! The handshake without TLS, as clients see it.

use super::testing::*;
use super::*;
use crate::nbd::limits::QUERIES_MAX;
use crate::nbd::wire::TransmissionFlags as T;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const PEEK: u32 = 4;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const LIST_META: u32 = 9;
const SET_META: u32 = 10;
const EXTENDED: u32 = 11;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const META: u32 = 4;
const UNSUP: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const SHUTDOWN: u32 = 0x8000_0007;
const BLOCK_SIZE_REQD: u32 = 0x8000_0008;
const TOO_BIG: u32 = 0x8000_0009;
const EXT_HEADER_REQD: u32 = 0x8000_000a;

fn plain() -> Client {
    Client::greeted(Config::default())
}

fn structured() -> Client {
    let mut client = plain();
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
    client
}

fn extended() -> Client {
    let mut client = Client::greeted(Config {
        extended_headers: true,
        ..Config::default()
    });
    assert_eq!(client.kinds(EXTENDED, b""), [ACK]);
    client
}

fn context_names(session: &Session) -> Vec<&str> {
    session
        .contexts()
        .iter()
        .map(|context| context.name.as_str())
        .collect()
}

// === Greeting ===

#[test]
fn the_greeting_is_written_byte_for_byte() {
    let mut client = Client::connect(Config::default());
    assert_eq!(client.send(&[]), 0);
    assert_eq!(client.received, b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn unknown_client_flags_end_the_session() {
    for flags in [4u32, 0x8000_0003, u32::MAX] {
        let mut client = Client::connect(Config::default());
        client.send(&flags.to_be_bytes());
        assert_eq!(client.left(), Disconnect::ClientFlags(flags));
    }
}

#[test]
fn bad_option_magic_ends_the_session() {
    let mut client = plain();
    client.send(b"IHAVEOPX\0\0\0\x03\0\0\0\0");
    assert_eq!(client.left(), Disconnect::OptionMagic);
    assert!(client.received.is_empty());
}

#[test]
fn without_fixed_newstyle_only_export_name_exists() {
    let mut client = Client::connect(Config::default());
    client.send(&[0, 0, 0, 2]);
    client.send(&option(LIST, b""));
    assert_eq!(client.left(), Disconnect::NotFixedNewstyle(LIST));
    let mut client = Client::connect(Config::default());
    client.send(&[0, 0, 0, 2]);
    client.send(&option(EXPORT_NAME, b"a"));
    assert_eq!(client.entered().mode(), ReplyMode::Simple);
}

// === EXPORT_NAME, ABORT, LIST ===

#[test]
fn export_name_pads_unless_the_client_waived_it() {
    let flags = Session::offered_flags(ReplyMode::Simple, &disk("a"), false);
    let answer = [&(1u64 << 20).to_be_bytes()[..], &flags.bits().to_be_bytes()].concat();
    for (client_flags, padding) in [(3, 0), (1, 124), (0, 124)] {
        let mut client = Client::connect(Config::default());
        client.send(&[0, 0, 0, client_flags]);
        client.received.clear();
        client.send(&option(EXPORT_NAME, b""));
        assert_eq!(client.received, [&answer[..], &vec![0; padding]].concat());
        assert_eq!(client.entered().export().name, "a");
    }
}

#[test]
fn export_name_of_an_unknown_export_hangs_up_without_a_word() {
    let mut client = plain();
    client.send(&option(EXPORT_NAME, b"nope"));
    assert_eq!(client.left(), Disconnect::ExportName("not present"));
    assert!(client.received.is_empty());
}

/// CVE-2017-15118: an export name of more than 4096 bytes overran a buffer.
#[test]
fn cve_2017_15118_a_long_export_name_is_never_received() {
    let mut client = plain();
    let used = client.send(&option(EXPORT_NAME, &[b'x'; 4097]));
    assert_eq!(used, 16);
    assert_eq!(
        client.left(),
        Disconnect::ExportName("the name is too long")
    );
    let mut client = plain();
    let long = "x".repeat(4097);
    assert_eq!(client.kinds(GO, &info(&long, &[])), [INVALID]);
    assert_eq!(client.kinds(GO, &info(&long[1..], &[])), [UNKNOWN]);
    let mut client = structured();
    assert_eq!(client.kinds(SET_META, &queries(&long, &[])), [INVALID]);
    assert_eq!(client.kinds(SET_META, &queries("a", &[&long])), [INVALID]);
}

#[test]
fn an_error_text_with_a_long_name_is_still_a_protocol_string() {
    let replies = plain().ask(INFO, &info(&"\u{e4}".repeat(2048), &[]));
    assert_eq!(replies[0].kind, UNKNOWN);
    assert!(replies[0].data.len() <= 4096 && std::str::from_utf8(&replies[0].data).is_ok());
}

#[test]
fn abort_is_acknowledged_whatever_it_carries() {
    for data in [&b""[..], b"good bye"] {
        let mut client = plain();
        assert_eq!(client.kinds(ABORT, data), [ACK]);
        assert_eq!(client.left(), Disconnect::Aborted);
    }
}

#[test]
fn list_names_and_describes_every_export() {
    let replies = plain().ask(LIST, b"");
    assert_eq!(
        replies.iter().map(|r| r.kind).collect::<Vec<_>>(),
        [SERVER, SERVER, SERVER, ACK]
    );
    assert_eq!(replies[0].data, b"\0\0\0\x01athe disk a");
    assert_eq!(plain().kinds(LIST, b"x"), [INVALID]);
}

// === INFO, GO ===

#[test]
fn go_answers_byte_for_byte_and_enters() {
    let mut client = structured();
    let replies = client.ask(GO, &info("a", &[3, 1, 2, 77]));
    let flags = disk("a").transmission_flags() | T::SEND_DF;
    assert_eq!(
        replies[0].data,
        [&b"\0\0\0\0\0\0\0\x10\0\0"[..], &flags.bits().to_be_bytes()].concat()
    );
    assert_eq!(replies[1].data, b"\0\x01a");
    assert_eq!(replies[2].data, b"\0\x02the disk a");
    assert_eq!(replies[3].data, b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0");
    let kinds: Vec<u32> = replies.iter().map(|reply| reply.kind).collect();
    assert_eq!(kinds, [REP_INFO, REP_INFO, REP_INFO, REP_INFO, ACK]);
    let session = client.entered();
    assert_eq!(session.mode(), ReplyMode::Structured);
    assert_eq!(session.flags(), flags);
}

#[test]
fn requests_behind_go_are_left_to_the_session() {
    let mut client = plain();
    let go = option(GO, &info("a", &[]));
    let used = client.send(&[&go[..], b"\x25\x60\x95\x13..."].concat());
    assert_eq!(used, go.len());
    client.entered();
}

/// Detail 12: INFO then GO with the same arguments answers the same.
#[test]
fn info_then_go_answer_the_same() {
    for name in ["a", "", "nope", "blocky"] {
        for ids in [&[][..], &[3], &[1, 2, 3]] {
            let mut client = structured();
            client.ask(SET_META, &queries(name, &["base:allocation"]));
            let mut told = client.ask(INFO, &info(name, ids));
            assert!(client.end.is_none());
            told.iter_mut().for_each(|reply| reply.option = GO);
            assert_eq!(told, client.ask(GO, &info(name, ids)));
        }
    }
}

#[test]
fn the_canonical_name_is_told_for_the_default_export() {
    let replies = plain().ask(INFO, &info("", &[1]));
    assert!(replies.iter().any(|reply| reply.data == b"\0\x01a"));
}

#[test]
fn who_does_not_ask_for_block_sizes_is_promised_a_minimum_of_one() {
    let replies = plain().ask(INFO, &info("a", &[]));
    assert_eq!(replies[1].data, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
}

#[test]
fn an_export_that_needs_block_sizes_refuses_clients_that_do_not_ask() {
    let mut client = plain();
    assert_eq!(client.kinds(GO, &info("blocky", &[1])), [BLOCK_SIZE_REQD]);
    assert_eq!(
        client.kinds(GO, &info("blocky", &[3])),
        [REP_INFO, REP_INFO, ACK]
    );
    let mut client = plain();
    client.send(&option(EXPORT_NAME, b"blocky"));
    assert_eq!(
        client.left(),
        Disconnect::ExportName("the client cannot learn the block size")
    );
}

#[test]
fn malformed_go_is_invalid_and_the_haggling_goes_on() {
    let mut client = plain();
    for data in [
        &b""[..],
        b"\0\0\0\x05a\0\0",
        b"\0\0\0\x01a\0\x02\0\x01",
        b"\0\0\0\x01a\0\0x",
    ] {
        assert_eq!(client.kinds(GO, data), [INVALID]);
    }
    assert_eq!(client.kinds(GO, &info("a", &[])), [REP_INFO, REP_INFO, ACK]);
}

#[test]
fn the_callers_answers_reach_the_client() {
    let denied = Lookup::Denied("not on Sundays".to_owned());
    for (lookup, kind) in [
        (denied, POLICY),
        (Lookup::ShuttingDown, SHUTDOWN),
        (Lookup::Unknown, UNKNOWN),
    ] {
        let mut client = plain();
        let (_, step) = client.haggle.input(&option(GO, &info("x", &[])));
        assert_eq!(
            step,
            Step::LookUp {
                name: "x".to_owned(),
                purpose: Purpose::Go
            }
        );
        // Asking again does not lose the question.
        assert_eq!(client.haggle.input(b"").1, step);
        client.haggle.found(lookup.clone());
        assert_eq!(replies(&client.haggle.take_output())[0].kind, kind);
        let (_, step) = client.haggle.input(&option(EXPORT_NAME, b"x"));
        assert_eq!(
            step,
            Step::LookUp {
                name: "x".to_owned(),
                purpose: Purpose::ExportName
            }
        );
        client.haggle.found(lookup);
        assert!(matches!(client.haggle.input(b"").1, Step::Disconnect(_)));
    }
}

#[test]
fn answers_that_were_not_asked_for_change_nothing() {
    let mut client = plain();
    client.haggle.found(Lookup::Unknown);
    client.haggle.list(&Disks);
    client.haggle.tls_established();
    assert!(client.haggle.take_output().is_empty());
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
}

// === Metadata contexts ===

#[test]
fn contexts_need_structured_replies() {
    assert_eq!(plain().kinds(LIST_META, &queries("a", &[])), [INVALID]);
    assert_eq!(
        plain().kinds(SET_META, &queries("a", &["base:allocation"])),
        [INVALID]
    );
}

#[test]
fn list_meta_context_tells_id_zero_for_all() {
    let mut client = structured();
    let replies = client.ask(LIST_META, &queries("a", &[]));
    assert_eq!(replies[0].data, b"\0\0\0\0base:allocation");
    assert_eq!(replies[1].data, b"\0\0\0\0qemu:allocation-depth");
    assert_eq!(replies.len(), 4);
    assert_eq!(
        client.kinds(LIST_META, &queries("a", &["base:"])),
        [META, ACK]
    );
    assert_eq!(client.kinds(LIST_META, &queries("nope", &[])), [UNKNOWN]);
}

#[test]
fn set_meta_context_tells_unique_ids() {
    let mut client = structured();
    let all = [
        "qemu:dirty-bitmap:b0",
        "acme:unknown",
        "base:allocation",
        "base:allocation",
    ];
    let replies = client.ask(SET_META, &queries("a", &all));
    assert_eq!(replies[0].data, b"\0\0\0\0base:allocation");
    assert_eq!(replies[1].data, b"\0\0\0\x02qemu:dirty-bitmap:b0");
    assert_eq!(replies[2].kind, ACK);
    client.ask(GO, &info("a", &[]));
    assert_eq!(
        context_names(&client.entered()),
        ["base:allocation", "qemu:dirty-bitmap:b0"]
    );
}

/// Detail 6: no query selects nothing, and a wildcard is no name.
#[test]
fn set_meta_context_knows_no_wildcard() {
    for names in [&[][..], &["base:"], &["qemu:"], &["other:x"]] {
        let mut client = structured();
        client.ask(SET_META, &queries("a", &["base:allocation"]));
        assert_eq!(client.kinds(SET_META, &queries("a", names)), [ACK]);
        client.ask(GO, &info("a", &[]));
        assert!(client.entered().contexts().is_empty());
    }
}

/// Detail 6: SET_META_CONTEXT replaces the old set even when it fails.
#[test]
fn set_meta_context_forgets_the_old_set_even_when_it_fails() {
    let too_many = ["x"; QUERIES_MAX + 1];
    let oversize = vec![0; 100_000];
    for (data, error) in [
        (queries("nope", &["base:allocation"]), UNKNOWN),
        (b"\0\0\0\x01".to_vec(), INVALID),
        (queries("a", &["\0"]), INVALID),
        (queries("a", &too_many), TOO_BIG),
        (oversize, TOO_BIG),
    ] {
        let mut client = structured();
        client.ask(SET_META, &queries("a", &["base:allocation"]));
        assert_eq!(client.kinds(SET_META, &data), [error]);
        client.ask(GO, &info("a", &[]));
        assert!(client.entered().contexts().is_empty());
    }
}

/// Detail 6: the set counts only for the export name that GO uses.
#[test]
fn contexts_bind_to_the_name_that_go_uses() {
    for (set, go, kept) in [("a", "a", 1), ("b", "a", 0), ("a", "", 0), ("", "", 1)] {
        let mut client = structured();
        client.ask(SET_META, &queries(set, &["base:allocation"]));
        client.ask(INFO, &info("b", &[]));
        client.ask(LIST_META, &queries("b", &[]));
        client.ask(GO, &info(go, &[]));
        assert_eq!(client.entered().contexts().len(), kept);
    }
}

#[test]
fn contexts_that_the_export_lost_meanwhile_are_dropped() {
    let mut client = structured();
    client.ask(
        SET_META,
        &queries("a", &["base:allocation", "qemu:dirty-bitmap:b0"]),
    );
    let mut export = disk("a");
    export.contexts.pop();
    client.haggle.input(&option(GO, &info("a", &[])));
    client.haggle.found(Lookup::Found(Box::new(export)));
    client.send(b"");
    assert_eq!(context_names(&client.entered()), ["base:allocation"]);
}

#[test]
fn list_meta_context_leaves_the_set_alone() {
    let mut client = structured();
    client.ask(SET_META, &queries("a", &["base:allocation"]));
    client.ask(LIST_META, &queries("a", &["qemu:"]));
    client.ask(GO, &info("a", &[]));
    assert_eq!(context_names(&client.entered()), ["base:allocation"]);
}

// === Structured replies and extended headers ===

#[test]
fn options_without_data_refuse_data() {
    let mut client = Client::greeted(Config {
        extended_headers: true,
        ..Config::default()
    });
    assert_eq!(client.kinds(STRUCTURED, b"x"), [INVALID]);
    assert_eq!(client.kinds(EXTENDED, b"x"), [INVALID]);
    client.ask(GO, &info("a", &[]));
    assert_eq!(client.entered().mode(), ReplyMode::Simple);
}

#[test]
fn extended_headers_are_unknown_unless_configured() {
    assert_eq!(plain().kinds(EXTENDED, b""), [UNSUP]);
    assert_eq!(structured().kinds(EXTENDED, b""), [UNSUP]);
}

#[test]
fn extended_headers_take_precedence_and_demand_go() {
    let mut client = extended();
    assert_eq!(client.kinds(STRUCTURED, b""), [EXT_HEADER_REQD]);
    assert_eq!(
        client.kinds(SET_META, &queries("a", &["base:allocation"])),
        [META, ACK]
    );
    let replies = client.ask(GO, &info("a", &[]));
    let told = u16::from_be_bytes(replies[0].data[10..].try_into().unwrap());
    assert!(T::from_bits_retain(told).contains(T::BLOCK_STATUS_PAYLOAD | T::SEND_DF));
    assert_eq!(client.entered().mode(), ReplyMode::Extended);

    let mut client = extended();
    client.send(&option(EXPORT_NAME, b"a"));
    assert_eq!(
        client.left(),
        Disconnect::ExportName("extended headers need NBD_OPT_GO")
    );
}

#[test]
fn status_payload_is_offered_only_with_contexts() {
    let mut client = extended();
    client.ask(SET_META, &queries("b", &["base:allocation"]));
    let replies = client.ask(INFO, &info("a", &[]));
    let told = u16::from_be_bytes(replies[0].data[10..].try_into().unwrap());
    let told = T::from_bits_retain(told);
    assert!(
        told.contains(T::BLOCK_STATUS_PAYLOAD),
        "contexts may follow"
    );
    client.ask(GO, &info("a", &[]));
    assert!(!client.entered().flags().contains(T::BLOCK_STATUS_PAYLOAD));
}

// === Bounds ===

#[test]
fn unknown_options_are_skipped_and_answered() {
    let mut client = plain();
    for (id, data) in [
        (PEEK, &b""[..]),
        (0, b"x"),
        (99, &[7; 70_000]),
        (u32::MAX, b"IHAVEOPT"),
    ] {
        assert_eq!(client.kinds(id, data), [UNSUP]);
    }
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
}

#[test]
fn skipped_data_is_never_held() {
    let mut client = plain();
    client.send(&[b"IHAVEOPT\0\0\0\x63", &(1u32 << 24).to_be_bytes()[..]].concat());
    for _ in 0..1 << 8 {
        client.send(&[0; 1 << 16]);
        assert!(client.haggle.held() <= 64);
    }
    assert_eq!(replies(&client.received)[0].kind, UNSUP);
}

/// Detail 12: an option of 4 GiB - 1 is an attack, known or not, at once or in parts.
#[test]
fn too_much_option_data_hangs_up_without_allocating() {
    for id in [LIST, GO, SET_META, STRUCTURED, 99] {
        let mut client = plain();
        client.send(&[b"IHAVEOPT", &id.to_be_bytes()[..], &[0xff; 4]].concat());
        assert_eq!(client.left(), Disconnect::TooMuchData);
        assert!(client.haggle.held() <= 64);
    }
    let mut client = plain();
    while client.end.is_none() {
        assert_eq!(
            client.kinds(99, &[0; 1 << 20]).len(),
            usize::from(client.end.is_none())
        );
    }
    assert_eq!(client.left(), Disconnect::TooMuchData);
}

#[test]
fn an_oversize_known_option_is_too_big_and_skipped() {
    let mut client = structured();
    for id in [INFO, GO, LIST_META, SET_META] {
        assert_eq!(client.kinds(id, &[0; 70_000]), [TOO_BIG]);
    }
    assert_eq!(
        client.kinds(INFO, &info("a", &[])),
        [REP_INFO, REP_INFO, ACK]
    );
}

#[test]
fn a_client_that_haggles_forever_is_cut_off() {
    let mut client = plain();
    for _ in 0..OPTIONS_MAX {
        assert_eq!(client.kinds(99, b""), [UNSUP]);
    }
    client.send(&option(99, b""));
    assert_eq!(client.left(), Disconnect::TooManyOptions);
}

#[test]
fn a_client_that_does_not_read_is_not_answered_twice() {
    let mut haggle = Haggle::new(Config::default());
    let greeting = haggle.out.len();
    let flood = [&[0, 0, 0, 3][..], &option(LIST, b"").repeat(1000)].concat();
    for _ in 0..10 {
        assert_eq!(haggle.drive(&flood, &Disks), (0, Step::Send));
    }
    assert_eq!(haggle.out.len(), greeting);
    let _ = haggle.take_output();
    let (used, step) = haggle.drive(&flood, &Disks);
    assert_eq!((used, step), (20, Step::Send));
}

/// CVE-2019-14850: the back-end was opened as soon as a client connected, so that a port scan
/// cost as much as a login. Here an export is looked up when it is named, once per option.
#[test]
fn cve_2019_14850_no_export_is_looked_up_before_it_is_named() {
    let mut haggle = Haggle::new(Config::default());
    let mut asked = Vec::new();
    let script = [
        &[0, 0, 0, 3][..],
        &option(STRUCTURED, b""),
        &option(99, b"a"),
        &option(GO, b"malformed"),
        &option(LIST_META, b"malformed"),
        &option(INFO, &info("a", &[])),
    ]
    .concat();
    let mut at = 0;
    while at < script.len() {
        let (used, step) = haggle.input(&script[at..]);
        at += used;
        match step {
            Step::Send => drop(haggle.take_output()),
            step => asked.push((at, step)),
        }
    }
    let step = Step::LookUp {
        name: "a".to_owned(),
        purpose: Purpose::Info,
    };
    assert_eq!(asked, [(script.len(), step)]);
}

/// CVE-2019-14851: options in an unusual order made an assertion fail. Every option may follow
/// every other two.
#[test]
fn cve_2019_14851_options_in_any_order_have_answers() {
    let every = [
        (LIST, vec![]),
        (PEEK, vec![]),
        (5, vec![]),
        (INFO, info("a", &[3])),
        (INFO, info("nope", &[])),
        (GO, info("blocky", &[])),
        (STRUCTURED, vec![]),
        (LIST_META, queries("b", &[])),
        (SET_META, queries("a", &["base:allocation"])),
        (EXTENDED, vec![]),
        (99, vec![1]),
    ];
    for first in &every {
        for second in &every {
            for third in &every {
                let config = Config {
                    extended_headers: true,
                    ..Config::default()
                };
                let mut client = Client::greeted(config);
                for (id, data) in [first, second, third] {
                    assert!(!client.kinds(*id, data).is_empty());
                    assert!(client.end.is_none());
                }
                assert_eq!(client.kinds(GO, &info("a", &[])), [REP_INFO, REP_INFO, ACK]);
            }
        }
    }
}

#[test]
fn after_the_end_there_is_nothing() {
    let mut client = plain();
    client.ask(GO, &info("a", &[]));
    assert!(matches!(client.end, Some(Ok(_))));
    assert_eq!(
        client.haggle.input(b"more"),
        (0, Step::Disconnect(Disconnect::Over))
    );
}

// === Splitting ===

/// However the input is cut, the same bytes are answered by the same bytes.
#[test]
fn random_cuts_change_nothing() {
    let mut script = vec![0, 0, 0, 3];
    for (id, data) in [
        (STRUCTURED, vec![]),
        (99, vec![5; 300]),
        (LIST, vec![]),
        (SET_META, queries("a", &["base:allocation", "x:y"])),
        (LIST_META, queries("a", &["qemu:"])),
        (INFO, info("nope", &[1])),
        (GO, vec![0; 9]),
        (INFO, info("a", &[1, 2, 3])),
        (GO, info("a", &[3])),
    ] {
        script.extend(option(id, &data));
    }
    let end = script.len();
    script.extend_from_slice(&[0x25, 0x60, 0x95, 0x13]);
    let mut whole = Client::connect(Config::default());
    assert_eq!(whole.send(&script), end);
    let mut random = Random::new(3);
    for round in 0..500 {
        let mut client = Client::connect(Config::default());
        let mut at = 0;
        while client.end.is_none() {
            let piece = if round == 0 { 1 } else { 1 + random.below(40) };
            let upto = script.len().min(at + piece);
            at += client.send(&script[at..upto]);
        }
        assert_eq!(at, end);
        assert_eq!(client.received, whole.received);
        assert_eq!(client.end, whole.end);
    }
}
