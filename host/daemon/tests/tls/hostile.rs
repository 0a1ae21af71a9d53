//! Clients that mean no good, before, in and after their TLS handshake; others are served
//! meanwhile.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use serde_json::json;

use super::support::{DEADLINE, Daemon, eventually, has};
use super::{Served, World};

const HELLO: &[u8] = b"\0\0\0\x03";
const STARTTLS: &[u8] = b"IHAVEOPT\0\0\0\x05\0\0\0\0";
const LIST: &[u8] = b"IHAVEOPT\0\0\0\x03\0\0\0\0";

/// Clients that stop in their handshake.
const HALF_OPEN: usize = 10_000;

/// What each of them may cost.
const HALF_OPEN_KIB: u64 = 24;

/// Connects and reads the greeting.
fn greeted(served: &Served) -> TcpStream {
    let mut stream = TcpStream::connect(("localhost", served.port)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream
}

/// One reply's type and text.
fn reply(stream: &mut TcpStream) -> (u32, String) {
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut data = vec![0; word(16) as usize];
    stream.read_exact(&mut data).unwrap();
    (word(12), String::from_utf8_lossy(&data).into_owned())
}

/// Whether the server hangs up, after whatever it says before.
fn hangs_up(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn starttls_injection_ends_the_connection() {
    let world = World::new();
    let served = Served::ours(&world);
    let mut stream = greeted(&served);
    stream.write_all(&[HELLO, STARTTLS, LIST].concat()).unwrap();
    assert!(hangs_up(&mut stream));
    // Behind the acknowledgement: no TLS record, and nobody takes it for an option.
    let mut stream = greeted(&served);
    stream.write_all(&[HELLO, STARTTLS].concat()).unwrap();
    assert_eq!(reply(&mut stream), (1, String::new()));
    stream.write_all(&LIST.repeat(100)).unwrap();
    assert!(hangs_up(&mut stream));
    assert!(served.admits(&world, "good"));
}

#[test]
fn nothing_is_done_in_the_clear() {
    let world = World::new();
    let served = Served::ours(&world);
    let mut stream = greeted(&served);
    stream.write_all(HELLO).unwrap();
    for option in [3, 6, 7, 8, 9, 10, 11, 99_u32] {
        let words = [option, 0].map(u32::to_be_bytes).concat();
        stream
            .write_all(&[&b"IHAVEOPT"[..], &words].concat())
            .unwrap();
        let text = format!("Option 0x{option:x} not permitted before TLS");
        assert_eq!(reply(&mut stream), (0x8000_0005, text));
    }
    // EXPORT_NAME has no other answer.
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x01x").unwrap();
    assert!(hangs_up(&mut stream));
}

#[test]
fn a_slow_handshake_is_cut_off_and_others_are_served_meanwhile() {
    let world = World::new();
    let more = json!({"handshake-max-seconds": 3, "max-connections": 8});
    let served = Served::by(Daemon::start(&[]), &world, more);
    let mut slow = greeted(&served);
    slow.write_all(&[HELLO, STARTTLS].concat()).unwrap();
    assert_eq!(reply(&mut slow).0, 1);
    // The beginning of a record that never ends.
    slow.write_all(b"\x16\x03\x01\x40\x00\x01").unwrap();
    assert!(served.admits(&world, "good"));
    assert!(hangs_up(&mut slow));
    assert!(served.admits(&world, "good"));
}

#[test]
fn junk_for_a_handshake_ends_the_connection() {
    let world = World::new();
    let served = Served::ours(&world);
    let records: [&[u8]; 5] = [
        // Application data, an alert, an oversized record, an empty one, another version.
        b"\x17\x03\x03\0\x05hello",
        b"\x15\x03\x03\0\x02\x02\x28",
        b"\x16\x03\x03\xff\xff",
        b"\x16\x03\x03\0\0",
        b"\x16\x02\0\0\x05hello",
    ];
    for record in records {
        let mut stream = greeted(&served);
        stream.write_all(&[HELLO, STARTTLS].concat()).unwrap();
        assert_eq!(reply(&mut stream).0, 1);
        stream.write_all(record).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(hangs_up(&mut stream), "{record:?}");
    }
    assert!(served.admits(&world, "good"));
}

/// A port for clients that begin with TLS: STARTTLS is said for them.
fn without_starttls(served: &Served) -> u16 {
    let listener = TcpListener::bind(("localhost", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut server = greeted(served);
    server.write_all(&[HELLO, STARTTLS].concat()).unwrap();
    assert_eq!(reply(&mut server).0, 1);
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let (mut to, mut from) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        let up = std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Write);
        });
        let _ = std::io::copy(&mut server, &mut client);
        let _ = client.shutdown(std::net::Shutdown::Both);
        up.join().unwrap();
    });
    port
}

#[test]
fn renegotiation_is_refused() {
    if !has("gnutls-cli") {
        return;
    }
    let world = World::new();
    let served = Served::ours(&world);
    let port = without_starttls(&served).to_string();
    let file = |name: &str| world.path("good").join(name);
    let said = Command::new("timeout")
        .args([
            "20",
            "gnutls-cli",
            "--rehandshake",
            "--priority",
            "NORMAL:-VERS-TLS1.3",
            "-p",
        ])
        .arg(port)
        .args(["--x509cafile".as_ref(), file("ca-cert.pem").as_os_str()])
        .args([
            "--x509certfile".as_ref(),
            file("client-cert.pem").as_os_str(),
        ])
        .args(["--x509keyfile".as_ref(), file("client-key.pem").as_os_str()])
        .arg("localhost")
        .output();
    let said = said.unwrap();
    let said = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    assert!(said.contains("(TLS1.2-X.509)"), "{said}");
    assert!(said.contains("ReHandshake has failed"), "{said}");
    assert!(served.admits(&world, "good"));
}

#[test]
fn ten_thousand_half_open_handshakes_leave_others_alone() {
    // Two sides of each connection are in two processes; the limit is inherited.
    let limit = rustix::process::Rlimit {
        current: Some(HALF_OPEN as u64 + 500),
        maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
    };
    let raised = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    raised.expect("the system allows ten thousand descriptors");
    let world = World::new();
    let more = json!({"handshake-max-seconds": 0, "max-connections": 0});
    let mut served = Served::by(Daemon::start(&[]), &world, more);
    let before = resident_kib(served.daemon.pid());
    let mut half_open = Vec::with_capacity(HALF_OPEN);
    for number in 0..HALF_OPEN {
        let mut stream = greeted(&served);
        stream.write_all(&[HELLO, STARTTLS].concat()).unwrap();
        assert_eq!(reply(&mut stream).0, 1);
        stream.write_all(b"\x16\x03\x01\x02\x00\x01").unwrap();
        half_open.push(stream);
        if number % 2_500 == 0 {
            assert!(served.admits(&world, "good"), "with {number}");
        }
    }
    assert!(served.admits(&world, "good"));
    let mut connections = || {
        let servers = served.qmp.ok("query-nbd-servers", json!({}));
        servers[0]["connections"].clone()
    };
    eventually("only they are left", || connections() == HALF_OPEN);
    let cost = (resident_kib(served.daemon.pid()) - before) / HALF_OPEN as u64;
    assert!(cost <= HALF_OPEN_KIB, "{cost} KiB each");
    drop(half_open);
    eventually("all are gone", || connections() == 0);
}

fn resident_kib(pid: u32) -> u64 {
    let status = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(status).unwrap();
    let line = status.lines().find(|it| it.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
