//! Extended headers, byte by byte: long effects, 64-bit extents, status of chosen contexts.
//!
//! Debian 12's libnbd has no extended headers, QEMU's server does: the same bytes to both.

use std::io::{Read, Write};

use outport_tests::nbd::Socket;
use outport_tests::nbd::wire::{EXT_CHUNK_MAGIC, EXT_REQUEST_MAGIC, cmd, cmd_flag, opt};
use outport_tests::{Daemon, Server, requires};
use serde_json::json;

const CONTEXTS: [&str; 3] = [
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:b",
];

/// Longer than 32 bits can say.
const SIZE: u64 = 3 << 40;

/// One reply: the chunks' kinds and what they hold.
type Reply = Vec<(u16, Vec<u8>)>;

fn request(socket: &mut Socket, flags: u16, kind: u16, at: u64, len: u64, payload: &[u8]) -> Reply {
    let mut bytes = EXT_REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(77_u64.to_be_bytes());
    bytes.extend(at.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(payload);
    socket.write_all(&bytes).unwrap();
    let mut reply = Vec::new();
    loop {
        let mut head = [0; 32];
        socket.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], EXT_CHUNK_MAGIC.to_be_bytes());
        assert_eq!(head[8..16], 77_u64.to_be_bytes());
        assert_eq!(head[16..24], at.to_be_bytes(), "the offset comes back");
        let len = u64::from_be_bytes(head[24..].try_into().unwrap());
        let mut data = vec![0; len as usize];
        socket.read_exact(&mut data).unwrap();
        let word = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let (flags, kind) = (word(4), word(6));
        if kind & 1 << 15 != 0 {
            // The words are each server's own.
            data.truncate(4);
        }
        reply.push((kind, data));
        if flags & 1 == 1 {
            return reply;
        }
    }
}

fn status_payload(len: u64, ids: &[u32]) -> Vec<u8> {
    let ids = ids.iter().flat_map(|id| id.to_be_bytes());
    len.to_be_bytes().into_iter().chain(ids).collect()
}

/// What a server answers to all requests.
fn conversation(server: Server) -> Vec<Reply> {
    let mut daemon = Daemon::builder(server).nbd().start();
    let node = json!({
        "driver": "null-co", "node-name": "n", "size": SIZE, "read-zeroes": true,
    });
    daemon.qmp.ok("blockdev-add", node);
    let bitmap = json!({"node": "n", "name": "b", "granularity": 1 << 20});
    daemon.qmp.ok("block-dirty-bitmap-add", bitmap);
    let members = json!({"writable": true, "bitmaps": ["b"], "allocation-depth": true});
    daemon.add_export_with("n", members);
    let mut haggle = daemon.haggle();
    assert!(haggle.extended_headers().unwrap());
    let set = haggle.meta_contexts(opt::SET_META_CONTEXT, "n", &CONTEXTS);
    let ids: Vec<u32> = set.unwrap().into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, [0, 1, 2]);
    let mut socket = haggle.go("n").unwrap().into_socket();
    let mut all = Vec::new();
    let mut ask = |flags, kind, at, len, payload: &[u8]| {
        all.push(request(&mut socket, flags, kind, at, len, payload));
    };
    let status = cmd::BLOCK_STATUS;
    let chosen = cmd_flag::PAYLOAD_LEN;
    // Effects of more than 4 GiB, and what they leave.
    ask(0, cmd::WRITE_ZEROES, 1 << 30, 5 << 30, &[]);
    ask(0, status, 0, SIZE, &[]);
    ask(cmd_flag::REQ_ONE, status, 0, SIZE, &[]);
    // Writes say that they have a payload.
    ask(chosen, cmd::WRITE, 1 << 41, 512, &[1; 512]);
    ask(0, status, 1 << 41, 1 << 40, &[]);
    // Some of the contexts, in whatever order they are named.
    for ids in [&[2][..], &[1, 2], &[2, 0]] {
        let payload = status_payload(SIZE, ids);
        ask(chosen, status, 0, payload.len() as u64, &payload);
    }
    // Refused, and the stream goes on: an id that was never given or comes twice, past the end, an
    // odd payload, a long one.
    for payload in [
        status_payload(512, &[9]),
        status_payload(SIZE + 512, &[2]),
        status_payload(512, &[]),
        status_payload(512, &[1, 1]),
        status_payload(512, &[0, 1, 2, 2]),
        status_payload(0, &[1]),
        [&status_payload(512, &[1])[..], b"\0"].concat(),
        vec![0; 7],
        vec![0; 64 << 10],
    ] {
        ask(chosen, status, 0, payload.len() as u64, &payload);
    }
    ask(0, cmd::WRITE_ZEROES, SIZE - 512, 1024, &[]);
    ask(cmd_flag::REQ_ONE, status, 0, 1 << 20, &[]);
    all
}

#[test]
fn extended_headers_are_answered_as_qemu_answers_them() {
    if !requires("qemu-storage-daemon") {
        return;
    }
    let [theirs, ours] = [Server::Qsd, Server::Outport].map(conversation);
    for (n, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        // QEMU says EINVAL wherever we say what the protocol has for it (spec nbd.md).
        let refused = |reply: &Reply| reply[0].0 & 1 << 15 != 0;
        if refused(theirs) {
            assert!(refused(ours), "request {n}: {ours:?}");
        } else {
            assert_eq!(theirs, ours, "request {n}");
        }
    }
    assert_eq!(theirs.len(), ours.len());
}
