//! Every parser that reads what a stranger wrote.

use outport_fuzz::{Rng, run};

fn texts(list: &[&str]) -> Vec<Vec<u8>> {
    list.iter().map(|s| s.as_bytes().to_vec()).collect()
}

#[test]
fn qmp_json() {
    let seeds = texts(&[
        r#"{"execute":"qmp_capabilities"}"#,
        r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"d","file":{"driver":"file","filename":"\u00e9\ud83d\ude00"}},"id":[1,-2.5e3,null]}"#,
        "{'a':[true,false,{}]}\r\n123 \"x\\'\\\\\"",
        "\u{ff}[[[[{\"a\":18446744073709551615}]]]]",
    ]);
    run("qmp_json", &seeds, outport_qmp::fuzzing::json);
}

#[test]
fn qmp_keyval() {
    let seeds = texts(&[
        "driver=qcow2,file.driver=file,file.filename=/a,,b,node-name=n",
        "addr.type=inet,addr.host=::1,addr.port=10809,max-connections=0x10",
        "children.0.driver=null-co,children.1.driver=raw,size=1.5G",
        r#"{"driver":"null-co","size":1}"#,
    ]);
    run("qmp_keyval", &seeds, outport_qmp::fuzzing::keyval);
}

#[test]
fn qmp_arguments() {
    let seeds = texts(&[
        r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"n","writable":true,"iothread":["a"]}}"#,
        r#"{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"/p"}}}}"#,
        r#"{"execute":"object-add","arguments":{"qom-type":"wasm-plugin","id":"p","filename":"x","sha256":"00"}}"#,
    ]);
    run("qmp_arguments", &seeds, outport_qmp::fuzzing::arguments);
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

#[test]
fn nbd_haggle() {
    let mut hello = vec![0, 200];
    hello.extend_from_slice(&3u32.to_be_bytes());
    let script = |options: &[Vec<u8>]| [hello.clone(), options.concat()].concat();
    let go = option(7, b"\0\0\0\x01a\0\x01\0\x03");
    let contexts = option(10, b"\0\0\0\x01a\0\0\0\x01\0\0\0\x0fbase:allocation");
    let seeds = [
        script(&[option(8, b""), contexts.clone(), go.clone()]),
        script(&[option(3, b""), option(6, b"\0\0\0\0\0\0"), option(2, b"")]),
        script(&[option(5, b""), option(11, b""), contexts, go]),
        script(&[option(1, b"a")]),
    ];
    run("nbd_haggle", &seeds, outport_export::nbd::fuzzing::haggle);
}

#[test]
fn nbd_requests() {
    let request = |flags: u16, command: u16, offset: u64, len: u32| {
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&7u64.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out
    };
    let extended = |flags: u16, offset: u64, payload: &[u8]| {
        let mut out = 0x21e4_1c71u32.to_be_bytes().to_vec();
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&7u16.to_be_bytes());
        out.extend_from_slice(&7u64.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        out.extend_from_slice(payload);
        out
    };
    // Extended headers and three contexts; then lengths and ids.
    let chosen = [
        vec![3 | 8 | 3 << 5],
        extended(32, 0, b"\0\0\0\0\0\x10\0\0\0\0\0\x02"),
        extended(40, 4096, b"\0\0\0\0\0\0\x10\0\0\0\0\x01\0\0\0\0"),
        extended(32, 0, b"\0\0\0\0\0\0\x02\0\0\0\0\x09"),
        extended(32, 512, b"\0\0\0\0\0\x10\0\0\0\0\0\0"),
    ];
    let prefixed = |body: Vec<u8>| [vec![0, 3], body].concat();
    let seeds = [
        chosen.concat(),
        prefixed(
            [
                request(0, 0, 0, 4096),
                request(1, 1, 512, 4),
                b"data".to_vec(),
            ]
            .concat(),
        ),
        prefixed(
            [
                request(8, 7, 0, 65536),
                request(0, 3, 0, 0),
                request(0, 2, 0, 0),
            ]
            .concat(),
        ),
        prefixed([request(2, 6, 0, 1 << 20), request(0, 4, 4096, 4096)].concat()),
    ];
    run(
        "nbd_requests",
        &seeds,
        outport_export::nbd::fuzzing::requests,
    );
}

#[test]
fn fuse_requests() {
    // Header: length, opcode, unique, inode, who asks; then the body in the machine's byte order.
    let message = |opcode: u32, body: &[u64]| {
        let len = 40 + 8 * body.len() as u32;
        let mut bytes = [len.to_ne_bytes(), opcode.to_ne_bytes()].concat();
        bytes.extend([7_u64, 1, 0, 0].map(u64::to_ne_bytes).concat());
        bytes.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    };
    let seeds = [
        message(3, &[0, 0]),
        message(4, &[8, 1, 4096, 0, 0, 0, 0, 0, 0, 0, 0]),
        message(14, &[2]),
        message(15, &[1, 4096, 65536, 0, 0]),
        message(16, &[1, 512, 16, 0, 0, 1, 2]),
        message(18, &[1, 0, 0]),
        message(
            26,
            &[7 | 40 << 32, 65536 | u64::MAX << 32, 3, 0, 0, 0, 0, 0],
        ),
        message(43, &[1, 0, 4096, 3]),
        message(46, &[1, 0, 3]),
    ];
    run("fuse_requests", &seeds, |data| {
        let _is_a_request = outport_export::fuse::fuzz(data);
        // The length is checked first: noise would never come further.
        let mut data = data.to_vec();
        if data.len() >= 4 {
            let len = (data.len() as u32).to_ne_bytes();
            data[..4].copy_from_slice(&len);
            let _is_a_request = outport_export::fuse::fuzz(&data);
        }
    });
}

#[test]
fn extent_verifier() {
    // Every string of bytes is a conversation: noise is as good a seed as any.
    let mut rng = Rng::new(7);
    let seeds: Vec<Vec<u8>> = (1..=8)
        .map(|n| (0..n * 100).map(|_| rng.next() as u8).collect())
        .collect();
    run("extent_verifier", &seeds, outport_block::fuzzing::verifier);
}

#[test]
fn nbd_client_handshake() {
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out
    };
    let hello = b"\0\xc8NBDMAGICIHAVEOPT\0\x03".to_vec();
    let go = [
        reply(7, 3, b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0"),
        reply(7, 3, b"\0\0\0\0\0\0\0\x10\0\0\x05\xed"),
        reply(7, 1, b""),
    ]
    .concat();
    let context = [reply(10, 4, b"\0\0\0\0base:allocation"), reply(10, 1, b"")].concat();
    let unsupported = reply(11, 0x8000_0001, b"no");
    let seeds = [
        [
            hello.clone(),
            reply(11, 1, b""),
            context.clone(),
            go.clone(),
        ]
        .concat(),
        [
            hello.clone(),
            unsupported.clone(),
            reply(8, 1, b""),
            context,
            go,
        ]
        .concat(),
        [
            hello,
            unsupported,
            reply(8, 0x8000_0001, b""),
            reply(7, 0x8000_0001, b""),
            b"\0\0\0\0\0\x10\0\0\0\x01".to_vec(),
        ]
        .concat(),
    ];
    run(
        "nbd_client_handshake",
        &seeds,
        outport_export::nbd::fuzzing::client_handshake,
    );
}

#[test]
fn tls_certificate() {
    // A server's certificate with alternative names, and a name alone.
    let digits = "\
        3082018f30820136a003020102021456a6d3fe83af0b6a7f8eac7ffd5cf69c3c41e00f300a06082a8648\
        ce3d04030230143112301006035504030c09617574686f72697479301e170d3236313132333031333734\
        325a170d3336313132303031333734325a30143112301006035504030c096c6f63616c686f7374305930\
        1306072a8648ce3d020106082a8648ce3d030107034200044e8a1b9c2a5f034151fd8de403dc51cab4ca\
        cf3c09d5e771e191db18e8b1bd6b15a6637373563ae6c4fe05d82211f0b7a54b2baf5d8f4bac09ba90b0\
        38ad568fa3663064301d0603551d0e04160414c406c76cb9fd7d1417b5400b85c40a49c0776866301f06\
        03551d23041830168014a33fad5ffcb069ecab4fa7d08ee78d432454964430140603551d11040d300b82\
        096c6f63616c686f7374300c0603551d130101ff04023000300a06082a8648ce3d040302034700304402\
        20390c60fbdca00fbe08253e0d9cc6cb5979dd03158729c7cadaf6ab368f655f3902205a51b0cff361b7\
        426373ac0beec5ad0df51a72c994d08d2db0999d54d301c4b2";
    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    let certificate: Vec<u8> = (0..digits.len()).step_by(2).map(byte).collect();
    let name =
        b"\x31\x17\x30\x09\x06\x03\x55\x04\x03\x0c\x02a,\x30\x0a\x06\x03\x55\x04\x0a\x1e\x03\0a\0";
    let seeds = [certificate, name.to_vec()];
    run(
        "tls_certificate",
        &seeds,
        outport_export::tls::fuzzing::certificate,
    );
}

#[test]
fn tls_pem() {
    let block = |label: &str, digits: &str| {
        format!("-----BEGIN {label}-----\n{digits}\n-----END {label}-----\n")
    };
    let seeds = texts(&[
        &block("CERTIFICATE", "MBAwDqADAgECAgEBMAUGAyoDBA=="),
        &block("X509 CRL", "MAswCQIBATAEBgIqAw==").repeat(3),
        &block(
            "PRIVATE KEY",
            "MC4CAQAwBQYDK2VwBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        ),
        &block("ENCRYPTED PRIVATE KEY", "MBAwCwYJKoZIhvcNAQUNBAEA"),
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAA==\n\
         -----END RSA PRIVATE KEY-----",
    ]);
    run("tls_pem", &seeds, outport_export::tls::fuzzing::pem);
}

#[test]
fn tls_psk_file() {
    let seeds = texts(&[
        "alice:00112233445566778899aabbccddeeff\nqemu:ff\r\n#6d65:01\n",
        "junk\nalice:zz\n:00\n#:00\n#6:00\na:b:00\n",
        &format!("long:{}\n", "ab".repeat(300)),
    ]);
    run(
        "tls_psk_file",
        &seeds,
        outport_export::tls::fuzzing::psk_file,
    );
}

#[test]
fn tls_priority() {
    let seeds = texts(&[
        "NORMAL:-VERS-TLS1.3:+VERS-TLS-ALL:!VERS-ALL",
        "@QEMU,SYSTEM:%COMPAT:-KX-ALL",
        "\u{e9}VERS-TLS1.2,+VERS-TLS1.2::-",
    ]);
    run(
        "tls_priority",
        &seeds,
        outport_export::tls::fuzzing::priority,
    );
}

#[test]
fn nbd_client_replies() {
    // The first eight cookies: a sequence number times 128, plus the slot.
    let chunk = |n: u64, flags: u16, kind: u16, payload: &[u8]| {
        let mut out = 0x668e_33efu32.to_be_bytes().to_vec();
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(n * 128 + n - 1).to_be_bytes());
        out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        out.extend_from_slice(payload);
        out
    };
    let offset = |at: u64| at.to_be_bytes().to_vec();
    let seeds = [
        [
            vec![1],
            chunk(
                1,
                0,
                2,
                &[offset(0), 1024u32.to_be_bytes().to_vec()].concat(),
            ),
            chunk(1, 1, 1, &[offset(1024), vec![7; 1024]].concat()),
            chunk(6, 1, 5, &[0, 4096, 3].map(u32::to_be_bytes).concat()),
        ]
        .concat(),
        [
            vec![1],
            chunk(7, 0, 1, &[offset(3072), vec![7; 2048]].concat()),
            chunk(7, 1, 0, b""),
            chunk(2, 1, 0x8001, b"\0\0\0\x1c\0\x02no"),
        ]
        .concat(),
        [
            vec![0],
            b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x80".to_vec(),
            b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\x01\x01".to_vec(),
        ]
        .concat(),
    ];
    run(
        "nbd_client_replies",
        &seeds,
        outport_export::nbd::fuzzing::client_replies,
    );
}

/// Images that `qemu-img` made: the format's own corners.
fn images() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut out = Vec::new();
    for (n, options) in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "compat=0.10,cluster_size=1k",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on,cluster_size=512,compression_type=zstd",
    ]
    .iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{n}.qcow2"));
        let done = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", options])
            .arg(&path)
            .arg("64k")
            .status();
        let Ok(true) = done.map(|s| s.success()) else {
            eprintln!("SKIPPED seeds of qcow2: qemu-img is missing, 'make tools' installs it");
            continue;
        };
        let _ = std::process::Command::new("qemu-io")
            .args([
                "-f",
                "qcow2",
                "-c",
                "write -P 7 0 8k",
                "-c",
                "write -z 16k 4k",
            ])
            .arg(&path)
            .output();
        let _ = std::process::Command::new("qemu-img")
            .args(["bitmap", "--add", "-g", "512"])
            .arg(&path)
            .arg("one")
            .output();
        let bytes = std::fs::read(&path).expect("the image that was just made");
        // Where the metadata is; the fuzzer's time is not for payload.
        out.push(bytes[..bytes.len().min(64 << 10)].to_vec());
    }
    out
}

#[test]
fn qcow2_header() {
    run(
        "qcow2_header",
        &images(),
        outport_plugin_qcow2::fuzzing::header,
    );
}

#[test]
fn qcow2_bitmaps() {
    // Cluster size, count, and a directory of two bitmaps; headers with and without the extension.
    let entry = |name: &str, extra: usize| {
        let mut out = 0x5_0000_u64.to_be_bytes().to_vec();
        out.extend([0, 0, 0, 1, 0, 0, 0, 6, 1, 16, 0, name.len() as u8]);
        out.extend((extra as u32).to_be_bytes());
        out.resize(out.len() + extra, 9);
        out.extend(name.bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    };
    let mut seeds = images();
    seeds.push([vec![7, 2], entry("one", 0), entry("two", 12)].concat());
    run(
        "qcow2_bitmaps",
        &seeds,
        outport_plugin_qcow2::fuzzing::bitmaps,
    );
}

#[test]
fn qcow2_tables() {
    run(
        "qcow2_tables",
        &images(),
        outport_plugin_qcow2::fuzzing::tables,
    );
}

#[test]
fn qcow2_image() {
    run(
        "qcow2_image",
        &images(),
        outport_plugin_qcow2::fuzzing::image,
    );
}

#[test]
fn authz_rules() {
    let seeds = texts(&[
        "{\"policy\":\"allow\",\"rules\":[{\"match\":\"CN=*\",\"policy\":\"deny\",\"format\":\"glob\"}]}\nCN=a",
        "a*b?c**\naxbyc",
        "*?*?*\n\u{e9}\u{e9}",
        "C=DE,O=*,CN=?\nC=DE,O=Example\\, Inc.,CN=x",
    ]);
    run(
        "authz_rules",
        &seeds,
        outport_plugin_authz_list::fuzzing::rules,
    );
}

#[test]
fn vhost_user_message() {
    let message = |request: u32, payload: &[u8], fds: u8| {
        let words = [request, 9, payload.len() as u32];
        let mut out = words.map(u32::to_ne_bytes).concat();
        out.push(fds);
        out.extend_from_slice(payload);
        out
    };
    let seeds = [
        message(5, &[&[1, 0, 0, 0, 0, 0, 0, 0][..], &[7; 32]].concat(), 1),
        message(9, &[3; 40], 0),
        message(12, &[1, 1, 0, 0, 0, 0, 0, 0], 0),
        message(24, &[0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4], 0),
        message(32, &[1; 24], 1),
        message(37, &[0; 40], 1),
    ];
    run(
        "vhost_user_message",
        &seeds,
        outport_export::vhost_user::fuzzing::message,
    );
}

/// Guest memory with one read request in it, for a ring of this kind.
fn guest_memory(kind: u8) -> Vec<u8> {
    let packed = kind & 1 != 0;
    let mut memory = vec![0; 0x4000];
    let buffers: [(u64, u32, u16); 3] = [(0x2000, 16, 1), (0x3000, 512, 3), (0x2010, 1, 2)];
    for (n, (addr, len, flags)) in buffers.into_iter().enumerate() {
        let (third, fourth) = if packed {
            (5, flags | 1 << 7)
        } else {
            (flags, n as u16 + 1)
        };
        let at = n * 16;
        memory[at..at + 8].copy_from_slice(&addr.to_le_bytes());
        memory[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
        memory[at + 12..at + 14].copy_from_slice(&u16::to_le_bytes(third));
        memory[at + 14..at + 16].copy_from_slice(&u16::to_le_bytes(fourth));
    }
    if !packed {
        memory[0x102] = 1;
    }
    // Short enough that a change hits something.
    memory.truncate(0x1040);
    [vec![kind], memory].concat()
}

#[test]
fn vhost_user_ring() {
    let kinds = [0, 1, 6, 7, 8, 9, 0x11, 0x1f, 14, 15];
    let seeds = kinds.map(guest_memory);
    run(
        "vhost_user_ring",
        &seeds,
        outport_export::vhost_user::fuzzing::ring,
    );
}
