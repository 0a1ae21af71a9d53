//! Options, as a client meets them before any request.

use outport_tests::nbd::wire::{self, flag, info, opt, rep};
use outport_tests::{Daemon, Server, assert_same, requires};

use super::{Disk, MIB};

#[test]
fn the_greeting_is_fixed_newstyle_without_zeroes() {
    let disk = Disk::new();
    let wanted = wire::FIXED_NEWSTYLE | wire::NO_ZEROES;
    assert_eq!(u32::from(disk.daemon.haggle().server_flags), wanted);
}

#[test]
fn info_then_go_answers_the_same() {
    let disk = Disk::new();
    let wanted = [
        info::EXPORT,
        info::NAME,
        info::DESCRIPTION,
        info::BLOCK_SIZE,
        77,
    ];
    let mut haggle = disk.daemon.haggle();
    haggle.structured_replies().unwrap();
    let first = haggle.query(opt::INFO, "disk", &wanted).unwrap().unwrap();
    let second = haggle.query(opt::INFO, "disk", &wanted).unwrap().unwrap();
    let go = haggle.query(opt::GO, "disk", &wanted).unwrap().unwrap();
    assert_eq!((&first, &first), (&second, &go));
    assert_eq!(first.size, 4 * MIB as u64);
    assert_eq!(first.name.as_deref(), Some("disk"));
    let (least, preferred, most) = first.block_sizes.expect("it was asked for");
    assert!(least.is_power_of_two() && least <= 65536, "{least}");
    assert!(
        preferred.is_power_of_two() && preferred >= least.max(512),
        "{preferred}"
    );
    assert!(most >= preferred && (most >= 32 << 20), "{most}");
    assert!(first.has(
        flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_DF
            | flag::CAN_MULTI_CONN
            | flag::SEND_CACHE
    ));
}

/// What a server says to options that were negotiated already, or come too early: the kinds of its
/// replies, with their texts.
fn said_to_repetitions(disk: &Disk) -> Vec<(u32, String)> {
    let mut said = Vec::new();
    let asked = wire_meta("disk");
    for options in [
        &[opt::SET_META_CONTEXT][..],
        &[opt::STRUCTURED_REPLY, opt::STRUCTURED_REPLY],
        &[
            opt::EXTENDED_HEADERS,
            opt::EXTENDED_HEADERS,
            opt::STRUCTURED_REPLY,
        ],
        &[opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS],
        &[
            opt::STRUCTURED_REPLY,
            opt::SET_META_CONTEXT,
            opt::SET_META_CONTEXT,
        ],
        &[opt::STARTTLS, opt::STARTTLS],
    ] {
        let mut haggle = disk.daemon.haggle();
        for option in options {
            let data: &[u8] = match *option {
                opt::SET_META_CONTEXT => &asked,
                _ => &[],
            };
            let replies = haggle.ask(*option, data).expect("a reply");
            said.extend(replies.iter().map(|reply| (reply.kind, reply.text())));
        }
    }
    // With data that does not belong there.
    for option in [
        opt::LIST,
        opt::STARTTLS,
        opt::STRUCTURED_REPLY,
        opt::EXTENDED_HEADERS,
    ] {
        let replies = disk.daemon.haggle().ask(option, b"x").expect("a reply");
        said.extend(replies.iter().map(|reply| (reply.kind, reply.text())));
    }
    said
}

fn wire_meta(export: &str) -> Vec<u8> {
    outport_tests::nbd::meta_query(export, &["base:allocation"])
}

#[test]
fn options_are_negotiated_once_as_in_qsd() {
    if !requires("qemu-storage-daemon") {
        return;
    }
    let [theirs, ours] = [Server::Qsd, Server::Outport].map(|server| {
        let disk = Disk::served_by(Daemon::builder(server).nbd().start());
        said_to_repetitions(&disk)
    });
    assert_eq!(theirs, ours);
}

#[test]
fn texts_that_quote_names_fit_a_protocol_string() {
    const STRING_MAX: usize = 4096;
    let disk = Disk::new();
    for name in [
        "x".repeat(STRING_MAX),
        "\u{e9}".repeat(STRING_MAX / 2),
        "x".repeat(STRING_MAX + 1),
    ] {
        for option in [opt::INFO, opt::GO] {
            let mut haggle = disk.daemon.haggle();
            let reply = haggle.query(option, &name, &[]).unwrap().unwrap_err();
            assert!(reply.text().len() <= STRING_MAX, "{}", reply.text().len());
            assert!(!reply.text().contains('\u{fffd}'), "{}", reply.text());
            assert!(haggle.go("disk").is_ok());
        }
    }
}

#[test]
fn an_unknown_export_is_unknown_and_haggling_goes_on() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    for option in [opt::INFO, opt::GO] {
        let reply = haggle.query(option, "no such", &[]).unwrap().unwrap_err();
        assert_eq!(reply.kind, rep::ERR_UNKNOWN, "{}", reply.text());
    }
    assert!(haggle.go("disk").is_ok());
}

#[test]
fn unknown_options_are_unsupported_whatever_their_data() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    for (option, len) in [(12, 0), (99, 7), (0xffff_ffff, 4000)] {
        let got = haggle.verdict(option, &vec![0xee; len]).unwrap();
        assert_eq!(got, rep::ERR_UNSUP, "option {option} with {len} bytes");
    }
    assert!(haggle.go("disk").is_ok());
}

#[test]
fn list_names_every_export() {
    let mut disk = Disk::new();
    let other = outport_tests::TempImage::zeroes(MIB as u64);
    disk.daemon.serve("other", &other);
    let mut haggle = disk.daemon.haggle();
    let replies = haggle.ask(opt::LIST, &[]).unwrap();
    let mut names: Vec<String> = replies
        .iter()
        .filter(|reply| reply.kind == rep::SERVER)
        .map(|reply| String::from_utf8_lossy(&reply.data[4..]).into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["disk", "other"]);
    assert_eq!(
        haggle.verdict(opt::LIST, b"data").unwrap(),
        rep::ERR_INVALID
    );
}

#[test]
fn options_with_lengths_that_do_not_add_up_are_invalid() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    haggle.structured_replies().unwrap();
    let long_name = [&0xffff_fff0u32.to_be_bytes()[..], b"disk\0\0"].concat();
    let many_queries = [
        &4u32.to_be_bytes()[..],
        b"disk",
        &0xffff_ffffu32.to_be_bytes()[..],
    ]
    .concat();
    for (option, data) in [
        (opt::INFO, &long_name),
        (opt::GO, &long_name),
        (opt::SET_META_CONTEXT, &long_name),
        (opt::LIST_META_CONTEXT, &many_queries),
    ] {
        let got = haggle.verdict(option, data).unwrap();
        let fine = [rep::ERR_INVALID, rep::ERR_TOO_BIG].contains(&got);
        assert!(fine, "option {option}: {got:#x}");
    }
    assert!(haggle.go("disk").is_ok());
}

#[test]
fn starttls_without_tls_is_refused_and_haggling_goes_on() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    let got = haggle.verdict(opt::STARTTLS, &[]).unwrap();
    assert!([rep::ERR_POLICY, rep::ERR_UNSUP].contains(&got), "{got:#x}");
    assert!(haggle.go("disk").is_ok());
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    assert_eq!(haggle.verdict(opt::ABORT, &[]).unwrap(), rep::ACK);
    assert!(haggle.closed());
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let disk = Disk::new();
    let mut haggle = outport_tests::nbd::Haggle::greeted(disk.daemon.nbd()).unwrap();
    haggle.raw(&0x8000_0003u32.to_be_bytes()).unwrap();
    assert!(haggle.closed());
}

#[test]
fn a_bad_option_magic_harms_nobody_else() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    haggle.raw(&[0x55; 64]).unwrap();
    disk.still_serves();
}

#[test]
fn export_name_still_opens_an_export() {
    let disk = Disk::new();
    let mut client = disk.daemon.haggle().export_name("disk").unwrap();
    assert_eq!(client.export.size, 4 * MIB as u64);
    let read = client.read(0, 4096).unwrap().unwrap();
    assert_same(&read, &disk.content[..4096], "after EXPORT_NAME");
}

#[test]
fn export_name_of_nothing_ends_the_connection() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    haggle.send(opt::EXPORT_NAME, b"no such").unwrap();
    assert!(haggle.closed());
}

#[test]
fn setting_contexts_again_replaces_them_even_when_it_fails() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    haggle.structured_replies().unwrap();
    let set = |queries: &[&str], haggle: &mut outport_tests::nbd::Haggle| {
        haggle.meta_contexts(opt::SET_META_CONTEXT, "disk", queries)
    };
    assert_eq!(set(&["base:allocation"], &mut haggle).unwrap().len(), 1);
    assert!(
        set(&["acme:unknown", "nonsense"], &mut haggle)
            .unwrap()
            .is_empty()
    );
    let mut client = haggle.go("disk").unwrap();
    assert!(client.block_status(0, 0, 512).unwrap().is_err());
}

#[test]
fn listing_contexts_takes_wildcards_and_none() {
    let disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    haggle.structured_replies().unwrap();
    for queries in [&[][..], &["base:"][..], &["base:allocation", "acme:x"][..]] {
        let list = haggle
            .meta_contexts(opt::LIST_META_CONTEXT, "disk", queries)
            .unwrap();
        assert!(
            list.iter().any(|(_, name)| name == "base:allocation"),
            "{queries:?}: {list:?}"
        );
    }
    let set = haggle
        .meta_contexts(opt::SET_META_CONTEXT, "disk", &["base:"])
        .unwrap();
    assert!(set.is_empty(), "a wildcard sets nothing: {set:?}");
}
