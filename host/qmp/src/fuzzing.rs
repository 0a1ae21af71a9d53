//! Entry points for fuzzers: whatever the bytes, these return.

use serde_json::Value;

use crate::commands::Command;
use crate::de::Mode;
use crate::envelope::{Incoming, Session};
use crate::types::block_core::BlockdevOptions;
use crate::types::block_export::{BlockExportOptions, NbdServerOptions};
use crate::types::qom::ObjectOptions;
use crate::{de, keyval, qemu_opts, wire};

/// Reads a connection and writes back what was read. Values survive the round trip.
///
/// # Panics
/// If a value that was written reads back as another.
pub fn json(data: &[u8]) {
    let mut reader = wire::Reader::new();
    // Pieces of varying length, so that tokens are cut anywhere.
    let mut rest = data;
    let mut piece_len = 1;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(piece_len));
        reader
            .feed(piece)
            .iter()
            .flatten()
            .for_each(check_round_trip);
        rest = after;
        piece_len = piece_len % 7 + 1;
    }
    if let Some(Ok(value)) = reader.finish() {
        check_round_trip(&value);
    }
}

fn check_round_trip(value: &Value) {
    for bytes in [wire::line(value), wire::pretty(value)] {
        assert!(bytes.is_ascii() && bytes.ends_with(b"\r\n"));
        let back = wire::parse_one(&bytes);
        assert!(
            back.as_ref() == Ok(value) || has_float(value),
            "{value} became {back:?}"
        );
    }
}

/// `-0.0` is written as `-0`, as QEMU writes it, and that is an integer.
fn has_float(value: &Value) -> bool {
    match value {
        Value::Array(elements) => elements.iter().any(has_float),
        Value::Object(members) => members.values().any(has_float),
        _ => value.is_f64(),
    }
}

/// Reads options of a command line as everything that the command line defines.
pub fn keyval(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok((value, mode)) = keyval::parse(text, Some("driver")) {
        let _node = de::from_value::<BlockdevOptions>(&value, mode);
        let _export = de::from_value::<BlockExportOptions>(&value, mode);
        let _server = de::from_value::<NbdServerOptions>(&value, mode);
        let _object = de::from_value::<ObjectOptions>(&value, mode);
    }
    let _chardev = qemu_opts::QemuOpts::parse(text, Some("backend"));
}

/// Reads a connection and every command in it. What was read is sent as it would be by a client,
/// and reads back as the same command.
///
/// # Panics
/// If a command that was sent reads back as another.
pub fn arguments(data: &[u8]) {
    let mut session = Session::new(true);
    session.receive(serde_json::json!({"execute": "qmp_capabilities"}));
    for message in wire::Reader::new().feed(data).into_iter().flatten() {
        let Incoming::Run(request) = session.receive(message) else {
            continue;
        };
        let Ok(command) = Command::from_request(&request.name, &request.arguments) else {
            continue;
        };
        let Value::Object(sent) = command.arguments() else {
            continue;
        };
        let back = Command::from_request(command.name(), &sent);
        assert_eq!(back.as_ref(), Ok(&command));
        let _untyped = de::from_arguments::<BlockdevOptions>(&sent, Mode::Keyval);
    }
}

#[cfg(test)]
mod tests {
    /// Marsaglia's xorshift: enough randomness to mutate seeds, the same in each run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % bound as u64) as usize
        }
    }

    const PIECES: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"'",
        b"\\u",
        b"d83d",
        b"\xff",
        b"\xc0\x80",
        b"1e400",
        b"-",
        b"18446744073709551615",
        b"null",
        b"true",
        b"{\"driver\":\"raw\",\"file\":",
        b"\"type\":\"nbd\",",
        b"=",
        b".",
        b",,",
        b"0",
        b"file.",
        b"children.1=",
        b"=64k",
        b"\n",
    ];

    const SEEDS: &[&[u8]] = &[
        br#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"a","backing":null,
            "overlap-check":"all","file":{"driver":"file","filename":"/x","locking":"off"}}}"#,
        br#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"n",
            "bitmaps":["b",{"node":"n","name":"c"}],"iothread":["i","j"]}}"#,
        br#"{"execute":"nbd-server-start","arguments":{"addr":{"type":"inet","data":{"host":"h",
            "port":"1","to":5}},"max-connections":7}}"#,
        br#"{"execute":"blockdev-add","arguments":{"driver":"acme","node-name":"p","a":[1,{}]}}"#,
        br#"{"execute":"blockdev-create","arguments":{"job-id":"j","options":{"driver":"qcow2",
            "file":"f","size":1048576,"cluster-size":65536}}}"#,
        br#"{"execute":"object-add","arguments":{"qom-type":"wasm-plugin","id":"w","filename":"f",
            "memory-max":1}}"#,
        b"driver=qcow2,file.driver=file,file.filename=a,,b,children.0=x,children.1.y=z",
        b"socket,id=c,path=/run/x,server=on,wait=off,nodelay",
    ];

    #[test]
    fn mutated_seeds_neither_panic_nor_hang() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..3000 {
            let mut data = SEEDS[round % SEEDS.len()].to_vec();
            for _ in 0..random.below(6) {
                let at = random.below(data.len() + 1);
                match random.below(4) {
                    0 => data.truncate(at),
                    1 if at < data.len() => data[at] = random.below(256) as u8,
                    2 if at < data.len() => drop(data.remove(at)),
                    _ => {
                        let piece = PIECES[random.below(PIECES.len())];
                        data.splice(at..at, piece.iter().copied());
                    }
                }
            }
            super::json(&data);
            super::keyval(&data);
            super::arguments(&data);
        }
    }

    #[test]
    fn deep_nesting_fits_any_stack() {
        let depth = crate::wire::NESTING_MAX - 2;
        let open = b"{\"driver\":\"raw\",\"file\":".repeat(depth);
        let message = [
            b"{\"execute\":\"blockdev-add\",\"arguments\":".as_slice(),
            &open,
            b"1",
            &b"}".repeat(depth + 1),
        ]
        .concat();
        super::arguments(&message);
        super::json(&message);
        super::json(&b"[".repeat(1 << 16));
        let key = ["x.".repeat(5000).as_str(), "y=1"].concat();
        super::keyval(key.as_bytes());
    }
}
