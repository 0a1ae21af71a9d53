//! Servers that break the protocol, and servers that fail requests: nobody else notices.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use outport_tests::nbd::wire::opt;
use outport_tests::{Daemon, Server, eventually, requires};
use serde_json::{Value, json};

use super::peer::Peer;
use super::through;

/// A server that shakes hands properly, and answers its first request of this kind with `lie`,
/// which is told the cookie.
fn liar(daemon: &Daemon, kind: u16, lie: impl Fn(u64) -> Vec<u8> + Send + 'static) -> Value {
    let path = daemon.path("liar.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // The client hangs up when it has seen enough.
            let _ = stream.and_then(|stream| serve(stream, kind, &lie));
        }
    });
    json!({"type": "unix", "path": path})
}

/// Shakes hands, and answers requests of this kind; the others wait.
pub(crate) fn serve(
    mut stream: UnixStream,
    kind: u16,
    lie: &dyn Fn(u64) -> Vec<u8>,
) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])?;
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let words = [option, kind, data.len() as u32].map(u32::to_be_bytes);
        [
            &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
            &words.concat(),
            data,
        ]
        .concat()
    };
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let mut data = vec![0; word(12) as usize];
        stream.read_exact(&mut data)?;
        let option = word(8);
        match option {
            8 => stream.write_all(&reply(8, 1, b""))?,
            10 => {
                stream.write_all(&reply(10, 4, b"\0\0\0\0base:allocation"))?;
                stream.write_all(&reply(10, 1, b""))?;
            }
            7 => {
                // 1 MiB; flags, flush, FUA, trim, zeroes.
                stream.write_all(&reply(7, 3, b"\0\0\0\0\0\0\0\x10\0\0\0\x6d"))?;
                stream.write_all(&reply(7, 1, b""))?;
                break;
            }
            other => stream.write_all(&reply(other, 0x8000_0001, b""))?,
        }
    }
    loop {
        let mut request = [0; 28];
        stream.read_exact(&mut request)?;
        let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
        if u16::from_be_bytes([request[6], request[7]]) == kind {
            stream.write_all(&lie(cookie))?;
        }
    }
}

fn chunk(cookie: u64, flags: u16, kind: u16, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x668e_33ef_u32.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(len.to_be_bytes());
    out.extend(payload);
    out
}

#[test]
fn a_lie_ends_the_connection_in_words_and_nothing_else() {
    let at = |offset: u64| offset.to_be_bytes().to_vec();
    type Lie = Box<dyn Fn(u64) -> Vec<u8> + Send>;
    let lies: Vec<(u16, &str, Lie)> = vec![
        (
            0,
            "Unexpected magic",
            Box::new(|_| b"HTTP/1.0 400".to_vec()),
        ),
        (
            0,
            "unknown cookie",
            Box::new(|cookie| chunk(cookie ^ 1 << 40, 1, 0, 0, b"")),
        ),
        (
            0,
            "exceeding requested region",
            Box::new(move |cookie| chunk(cookie, 1, 1, 0xffff_ffff, &at(0))),
        ),
        (
            0,
            "simple reply when structured",
            Box::new(|cookie| {
                let words = [0x6744_6698_u32, 5].map(u32::to_be_bytes).concat();
                [words, cookie.to_be_bytes().to_vec()].concat()
            }),
        ),
        (
            0,
            "left out a part",
            Box::new(|cookie| chunk(cookie, 1, 0, 0, b"")),
        ),
        (
            7,
            "invalid payload",
            Box::new(|cookie| chunk(cookie, 1, 5, 0xffff_fff0, &[0; 12])),
        ),
        (
            7,
            "zero length",
            Box::new(|cookie| chunk(cookie, 1, 5, 12, &[0; 12])),
        ),
    ];
    for (kind, words, lie) in lies {
        let mut daemon = Daemon::builder(Server::Outport).nbd().start();
        let server = liar(&daemon, kind, lie);
        let node = json!({"driver": "nbd", "node-name": "disk", "server": server,
            "reconnect-delay": 60});
        daemon.qmp.ok("blockdev-add", node);
        daemon.qmp.ok(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "other"}),
        );
        daemon.add_export("disk", true);
        daemon.add_export("other", true);
        let mut neighbour = daemon.client("other");
        let mut haggle = daemon.haggle();
        haggle.structured_replies().unwrap();
        let contexts = haggle.meta_contexts(opt::SET_META_CONTEXT, "disk", &["base:allocation"]);
        assert_eq!(contexts.unwrap().len(), 1);
        let mut client = haggle.go("disk").unwrap();
        match kind {
            0 => assert_eq!(client.read(0, 4096).unwrap(), Err(5), "{words}"),
            _ => assert!(client.block_status(0, 0, 4096).unwrap().is_err(), "{words}"),
        }
        eventually(words, || daemon.stderr().contains(words).then_some(()));
        assert_eq!(client.write(0, &[0; 512]).unwrap(), Err(5), "for good");
        assert!(neighbour.read(0, 4096).unwrap().is_ok());
        drop(client);
        daemon
            .qmp
            .ok("block-export-del", json!({"id": "disk", "mode": "hard"}));
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
        daemon.qmp.ok("blockdev-del", json!({"node-name": "disk"}));
        daemon.stop();
    }
}

#[test]
fn a_failed_request_fails_alone() {
    if !requires("nbdkit") {
        return;
    }
    let peer = Peer::nbdkit(&[
        "--filter=error",
        "memory",
        "1M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
    ]);
    let daemon = through(&peer, json!({}));
    let mut client = daemon.client("disk");
    assert_eq!(client.write(0, &[1; 512]).unwrap(), Err(28));
    assert_eq!(client.read(0, 512).unwrap(), Ok(vec![0; 512]));
    assert_eq!(client.write(0, &[1; 512]).unwrap(), Err(28));
    client.flush().unwrap().unwrap();
}
