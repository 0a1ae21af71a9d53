//! The handshake and TLS: what is refused before it, and what does not survive it.

use super::testing::*;
use super::*;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
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
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const TLS_REQD: u32 = 0x8000_0005;
const UNKNOWN: u32 = 0x8000_0006;

fn with(tls: TlsMode) -> Client {
    Client::greeted(Config {
        tls,
        extended_headers: true,
    })
}

fn encrypted(tls: TlsMode) -> Client {
    let mut client = with(tls);
    start_tls(&mut client);
    client
}

fn start_tls(client: &mut Client) {
    assert_eq!(client.kinds(STARTTLS, b""), [ACK]);
    assert!(client.wants_tls);
    client.haggle.tls_established();
}

#[test]
fn without_tls_starttls_is_a_matter_of_policy() {
    let mut client = with(TlsMode::None);
    assert_eq!(client.kinds(STARTTLS, b""), [POLICY]);
    assert_eq!(client.kinds(STARTTLS, b"x"), [INVALID]);
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
    assert!(!client.wants_tls);
}

#[test]
fn forced_tls_permits_starttls_and_abort_only() {
    let mut client = with(TlsMode::Forced);
    for id in [
        LIST, 4, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED, 99,
    ] {
        assert_eq!(client.kinds(id, b""), [TLS_REQD], "option {id}");
        assert_eq!(client.kinds(id, &info("a", &[])), [TLS_REQD], "option {id}");
    }
    assert_eq!(client.kinds(STARTTLS, b"x"), [INVALID]);
    start_tls(&mut client);
    assert_eq!(
        client.kinds(GO, &info("secret", &[])),
        [REP_INFO, REP_INFO, ACK]
    );
    assert_eq!(client.entered().mode(), ReplyMode::Simple);

    let mut client = with(TlsMode::Forced);
    assert_eq!(client.kinds(ABORT, b""), [ACK]);
    assert_eq!(client.left(), Disconnect::Aborted);
}

#[test]
fn forced_tls_hangs_up_on_export_name() {
    let mut client = with(TlsMode::Forced);
    client.send(&option(EXPORT_NAME, b"a"));
    assert_eq!(client.left(), Disconnect::ExportName("TLS is required"));
    assert!(client.received.is_empty());
}

#[test]
fn forced_tls_hangs_up_on_clients_without_fixed_newstyle() {
    for option_id in [EXPORT_NAME, STARTTLS, LIST] {
        let mut client = Client::connect(Config {
            tls: TlsMode::Forced,
            extended_headers: false,
        });
        client.send(&[0, 0, 0, 0]);
        client.send(&option(option_id, b""));
        assert!(matches!(client.end, Some(Err(_))));
        assert!(!client.wants_tls);
    }
}

#[test]
fn selective_tls_hides_and_guards_the_exports_that_need_it() {
    let mut client = with(TlsMode::Selective);
    assert_eq!(client.kinds(LIST, b""), [SERVER, SERVER, ACK]);
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
    for (id, data) in [
        (INFO, info("secret", &[])),
        (GO, info("secret", &[])),
        (LIST_META, queries("secret", &[])),
        (SET_META, queries("secret", &["base:allocation"])),
    ] {
        assert_eq!(client.kinds(id, &data), [TLS_REQD]);
    }
    assert_eq!(client.kinds(GO, &info("nope", &[])), [UNKNOWN]);
    assert_eq!(client.kinds(GO, &info("a", &[])), [REP_INFO, REP_INFO, ACK]);

    let mut client = with(TlsMode::Selective);
    client.send(&option(EXPORT_NAME, b"secret"));
    assert_eq!(client.left(), Disconnect::ExportName("TLS is required"));
}

#[test]
fn nothing_is_tls_required_once_tls_is_up() {
    for tls in [TlsMode::Forced, TlsMode::Selective] {
        let mut client = encrypted(tls);
        assert_eq!(client.kinds(LIST, b""), [SERVER, SERVER, SERVER, ACK]);
        assert_eq!(
            client.kinds(GO, &info("secret", &[])),
            [REP_INFO, REP_INFO, ACK]
        );
        let mut client = encrypted(tls);
        client.send(&option(EXPORT_NAME, b"secret"));
        assert_eq!(client.entered().export().name, "secret");
    }
}

#[test]
fn a_second_starttls_is_invalid() {
    let mut client = encrypted(TlsMode::Forced);
    assert_eq!(client.kinds(STARTTLS, b""), [INVALID]);
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
}

/// Detail 1, CVE-2021-3716: what a man in the middle negotiated in the clear must not count for
/// the client that talks TLS.
#[test]
fn cve_2021_3716_starttls_forgets_what_was_negotiated() {
    let mut client = with(TlsMode::Selective);
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
    assert_eq!(
        client.kinds(SET_META, &queries("a", &["base:allocation"])),
        [META, ACK]
    );
    start_tls(&mut client);
    assert_eq!(client.kinds(SET_META, &queries("a", &[])), [INVALID]);
    client.ask(GO, &info("a", &[]));
    let session = client.entered();
    assert_eq!(session.mode(), ReplyMode::Simple);
    assert!(session.contexts().is_empty());

    let mut client = with(TlsMode::Selective);
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
    assert_eq!(
        client.kinds(SET_META, &queries("a", &["base:allocation"])),
        [META, ACK]
    );
    start_tls(&mut client);
    assert_eq!(client.kinds(STRUCTURED, b""), [ACK]);
    client.ask(GO, &info("a", &[]));
    assert!(client.entered().contexts().is_empty());

    let mut client = with(TlsMode::Selective);
    assert_eq!(client.kinds(EXTENDED, b""), [ACK]);
    start_tls(&mut client);
    client.send(&option(EXPORT_NAME, b"a"));
    assert_eq!(client.entered().mode(), ReplyMode::Simple);
}

/// Detail 1, CVE-2021-3716: bytes in the clear behind STARTTLS are never taken for the client's.
#[test]
fn cve_2021_3716_plaintext_behind_starttls_ends_the_session() {
    let mut client = with(TlsMode::Selective);
    let starttls = option(STARTTLS, b"");
    let injected = [&starttls[..], &option(STRUCTURED, b"")].concat();
    assert_eq!(client.send(&injected), starttls.len());
    assert_eq!(client.left(), Disconnect::PlaintextBehindStartTls);
    assert!(!client.wants_tls);
    // Also when they trickle in while the caller is busy with TLS.
    let mut client = with(TlsMode::Forced);
    client.send(&starttls);
    assert!(client.wants_tls);
    client.send(b"I");
    assert_eq!(client.left(), Disconnect::PlaintextBehindStartTls);
    client.haggle.tls_established();
    assert_eq!(
        client.haggle.input(b"").1,
        Step::Disconnect(Disconnect::PlaintextBehindStartTls)
    );
}
