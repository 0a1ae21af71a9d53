//! The oracle: the same mistakes to qemu-storage-daemon and to this crate, the same sentences back.
//!
//! Needs `qemu-storage-daemon` on the path and says so if it is missing. Where QEMU 10 differs from
//! 11.1, which is the target, the difference is listed here.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command as Process, Stdio};

use outport_qmp::Command;
use outport_qmp::commands::schema;
use outport_qmp::wire::Reader;
use serde_json::{Map, Value, json};

/// Sends `requests` to a QSD of its own; returns one answer for each. `None`: there is no QSD.
fn ask(requests: &[Value]) -> Option<Vec<Value>> {
    let mut qsd = match Process::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=c", "--monitor", "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
    {
        Ok(qsd) => qsd,
        Err(error) => {
            eprintln!("SKIPPED: cannot run qemu-storage-daemon: {error}");
            return None;
        }
    };
    let mut stdin = qsd.stdin.take().unwrap();
    let mut lines = format!("{}\n", json!({"execute": "qmp_capabilities"}));
    requests
        .iter()
        .for_each(|request| lines.push_str(&format!("{request}\n")));
    lines.push_str("{\"execute\": \"quit\"}\n");
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = qsd.wait_with_output().unwrap().stdout;
    writer.join().unwrap().unwrap();
    let answers = Reader::new().feed(&output).into_iter().map(Result::unwrap);
    let answers: Vec<_> = answers
        .filter(|it| it.get("return").is_some() || it.get("error").is_some())
        .collect();
    assert_eq!(
        answers.len(),
        requests.len() + 2,
        "the answers to negotiation and quit as well"
    );
    Some(answers[1..=requests.len()].to_vec())
}

/// Requests that the schema accepts and whose execution fails or leaves nothing behind.
fn seeds() -> Vec<(&'static str, Value)> {
    let inet = json!({"type": "inet", "data": {"host": "256.0.0.1", "port": "x", "to": 9}});
    let unix = json!({"type": "unix", "data": {"path": "/nonexistent/s", "tight": true}});
    vec![
        (
            "nbd-server-start",
            json!({"addr": unix, "max-connections": 1, "tls-creds": "t"}),
        ),
        (
            "nbd-server-start",
            json!({"addr": inet, "handshake-max-seconds": 1, "tls-authz": "a"}),
        ),
        (
            "nbd-server-add",
            json!({"device": "x", "name": "n", "writable": true, "bitmap": "b"}),
        ),
        ("nbd-server-remove", json!({"name": "x", "mode": "hard"})),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "x", "name": "n", "writable": true,
                "bitmaps": ["b", {"node": "n", "name": "c"}], "allocation-depth": false}),
        ),
        (
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": "e", "node-name": "x", "num-queues": 1,
                "logical-block-size": 512, "addr": {"type": "unix", "path": "/nonexistent/s"}}),
        ),
        (
            "block-export-add",
            json!({"type": "fuse", "id": "e", "node-name": "x", "mountpoint": "/nonexistent/m",
                "growable": true, "allow-other": "auto", "writethrough": true}),
        ),
        ("block-export-del", json!({"id": "x", "mode": "safe"})),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "n", "discard": "unmap", "read-only": true,
                "cache": {"direct": true, "no-flush": false}, "backing": null,
                "overlap-check": {"template": "all", "main-header": true}, "cache-size": 5,
                "encrypt": {"format": "luks", "key-secret": "s"},
                "file": {"driver": "file", "filename": "/nonexistent/f", "aio": "threads",
                    "locking": "off", "aio-max-batch": 1}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "nbd", "node-name": "n", "export": "e", "reconnect-delay": 1,
                "open-timeout": 0, "tls-creds": "t", "tls-hostname": "h", "x-dirty-bitmap": "b",
                "server": {"type": "unix", "path": "/nonexistent/s", "abstract": false}}),
        ),
        ("query-blockstats", json!({"query-nodes": true})),
        (
            "blockdev-add",
            json!({"driver": "raw", "file": "nosuch", "offset": 1, "size": 2}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-aio", "size": 1, "latency-ns": 2}),
        ),
        ("blockdev-del", json!({"node-name": "x"})),
        (
            "blockdev-create",
            json!({"job-id": "1", "options": {"driver": "qcow2", "file": "x", "size": 1,
                "version": "v3", "compression-type": "zlib", "backing-fmt": "raw"}}),
        ),
        (
            "blockdev-create",
            json!({"job-id": "1", "options": {"driver": "file", "filename": "/nonexistent/f",
                "size": 1, "preallocation": "off", "nocow": true}}),
        ),
        ("block_resize", json!({"node-name": "x", "size": 512})),
        (
            "object-add",
            json!({"qom-type": "iothread", "id": "1", "poll-max-ns": 1}),
        ),
        ("object-del", json!({"id": "x"})),
        ("qom-list", json!({"path": "/x"})),
        ("job-dismiss", json!({"id": "x"})),
        ("query-named-block-nodes", json!({"flat": true})),
        ("query-version", json!({})),
    ]
}

/// `value` with one mistake, in all ways: each member once missing, once of each wrong type, and
/// an unknown member in each object.
fn mistakes(value: &Value) -> Vec<Value> {
    let mut out = Vec::new();
    match value {
        Value::Object(members) => {
            let with = |change: &dyn Fn(&mut Map<String, Value>)| {
                let mut members = members.clone();
                change(&mut members);
                Value::Object(members)
            };
            out.push(with(&|members| {
                drop(members.insert("zz-unknown".into(), json!(1)));
            }));
            for (name, inner) in members {
                out.push(with(&|members| _ = members.remove(name)));
                for changed in mistakes(inner) {
                    out.push(with(&|members| {
                        drop(members.insert(name.clone(), changed.clone()));
                    }));
                }
            }
        }
        Value::Array(elements) => {
            for (index, inner) in elements.iter().enumerate() {
                for changed in mistakes(inner) {
                    let mut elements = elements.clone();
                    elements[index] = changed;
                    out.push(Value::Array(elements));
                }
            }
        }
        _ => {}
    }
    out.extend([
        json!(null),
        json!(true),
        json!(7.5),
        json!(-1),
        json!(1_u64 << 63),
    ]);
    out.extend([json!("zz-word"), json!(["zz"]), json!({"zz": 1})]);
    out
}

/// Whether `desc` is a sentence about the schema, which must then be ours as well. A driver that
/// QEMU does not have may be a plugin's.
fn is_about_the_schema(desc: &str) -> bool {
    let endings = [
        "is missing",
        "is unexpected",
        "uint64",
        "uint32_t",
        "uint16_t",
    ];
    let names_a_driver = ["'driver'", "'backing-fmt'"]
        .iter()
        .any(|name| desc.starts_with(&format!("Parameter {name}")));
    desc.starts_with("Invalid parameter type for")
        || desc.contains("does not accept value") && !names_a_driver
        || desc.starts_with("Parameter '") && endings.iter().any(|end| desc.ends_with(end))
}

#[test]
fn mistakes_are_reported_in_qsds_words() {
    let mut requests = Vec::new();
    for (name, arguments) in seeds() {
        for arguments in std::iter::once(arguments.clone()).chain(mistakes(&arguments)) {
            if arguments.is_object() {
                requests.push(json!({"execute": name, "arguments": arguments}));
            }
        }
    }
    let Some(answers) = ask(&requests) else {
        return;
    };
    let mut differences = Vec::new();
    for (request, answer) in requests.iter().zip(answers) {
        let name = request["execute"].as_str().unwrap();
        let ours = Command::from_request(name, request["arguments"].as_object().unwrap());
        let theirs = answer["error"]["desc"].as_str().unwrap_or_default();
        let same = match &ours {
            Ok(_) => !is_about_the_schema(theirs),
            Err(error) => error.desc == theirs,
        };
        if !same {
            differences.push(format!("{request}\n  ours {ours:?}\n  QSD  {theirs}"));
        }
    }
    println!("{} requests compared", requests.len());
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// A schema by name, as either side prints it.
fn by_name(entries: Value) -> BTreeMap<String, Value> {
    let Value::Array(entries) = entries else {
        panic!("a schema is a list")
    };
    entries
        .into_iter()
        .map(|entry| (entry["name"].as_str().unwrap().into(), entry))
        .collect()
}

/// What may differ: members newer than 10.0, ours, and what we do not offer.
const KNOWN: &[&str] = &[
    "block-export-add.iothread type",
    "block-export-add.authz only here",
    "block-export-add/fuse.passthrough only here",
    "block-export-add/nbd.discard-after-read only here",
    "block-export-add/nbd.max-connections only here",
    "block-export-add/nbd.metadata-contexts only here",
    "block-export-add/nbd.restrict-reads only here",
    "block-export-add/nbd.server only here",
    "block-export-add/vhost-user-blk.queue-size only here",
    "block-export-add/vhost-user-blk.serial only here",
    "nbd-server-start.authz only here",
    "nbd-server-start.id only here",
    "nbd-server-start.strict-authz only here",
    "nbd-server-stop.id only here",
    "query-blockstats[].driver-specific only there",
    "query-blockstats[].stats.timed_stats[].avg_rd_queue_depth only there",
    "query-blockstats[].stats.timed_stats[].avg_wr_queue_depth only there",
    "query-blockstats[].stats.timed_stats[].avg_zone_append_queue_depth only there",
    "keep-alive-count only here",
    "keep-alive-idle only here",
    "keep-alive-interval only here",
    "iothread.poll-weight only here",
    "query-named-block-nodes[].children only here",
    "query-named-block-nodes[].node-name optional",
    "query-named-block-nodes[].image.limits only here",
    "image.snapshots only there",
    "group only there",
    "iops_size only there",
    "_max only there",
    "_max_length only there",
    "encrypt only there",
    "io-status only there",
    "query-block.flat only here",
    "inserted.children only here",
    "inserted.node-name optional",
    "inserted.image.limits only here",
    "/luks.cipher-alg only there",
    "/luks.cipher-mode only there",
    "/luks.ivgen-alg only there",
    "/luks.ivgen-hash-alg only there",
    "/luks.hash-alg only there",
    "/luks.iter-time only there",
];

/// Compares two types and what they are made of.
struct Comparison {
    ours: BTreeMap<String, Value>,
    theirs: BTreeMap<String, Value>,
    seen: Vec<(String, String)>,
    differences: Vec<String>,
}

impl Comparison {
    fn note(&mut self, difference: String) {
        if !KNOWN.iter().any(|known| difference.ends_with(known)) {
            self.differences.push(difference);
        }
    }

    fn compare(&mut self, path: &str, ours: &Value, theirs: &Value) {
        let (ours, theirs) = (ours.as_str().unwrap(), theirs.as_str().unwrap());
        let pair = (ours.to_owned(), theirs.to_owned());
        if self.seen.contains(&pair) {
            return;
        }
        self.seen.push(pair);
        let (ours, theirs) = (self.ours[ours].clone(), self.theirs[theirs].clone());
        if ours["meta-type"] != theirs["meta-type"] {
            return self.note(format!("{path} type"));
        }
        match ours["meta-type"].as_str().unwrap() {
            "builtin" if ours["json-type"] != theirs["json-type"] => {
                self.note(format!("{path} type"));
            }
            "array" => {
                let path = format!("{path}[]");
                self.compare(&path, &ours["element-type"], &theirs["element-type"]);
            }
            "alternate" => {
                let count = |entry: &Value| entry["members"].as_array().unwrap().len();
                if count(&ours) != count(&theirs) {
                    self.note(format!("{path} type"));
                }
            }
            "object" => self.compare_members(path, &ours, &theirs),
            _ => {}
        }
    }

    fn compare_members(&mut self, path: &str, ours: &Value, theirs: &Value) {
        let list = |value: &Value, list: &str, key: &str| -> BTreeMap<String, Value> {
            let elements = value[list].as_array().cloned().unwrap_or_default();
            elements
                .into_iter()
                .map(|it| (it[key].as_str().unwrap().into(), it))
                .collect()
        };
        let mut theirs_left = list(theirs, "members", "name");
        for (name, member) in list(ours, "members", "name") {
            let path = format!("{path}.{name}");
            let Some(their) = theirs_left.remove(&name) else {
                self.note(format!("{path} only here"));
                continue;
            };
            if member.get("default").is_some() != their.get("default").is_some() {
                self.note(format!("{path} optional"));
            }
            self.compare(&path, &member["type"], &their["type"]);
        }
        theirs_left
            .keys()
            .for_each(|name| self.note(format!("{path}.{name} only there")));
        let their_cases = list(theirs, "variants", "case");
        for (case, variant) in list(ours, "variants", "case") {
            // A case that QEMU does not have is ours.
            if let Some(their) = their_cases.get(&case) {
                self.compare(&format!("{path}/{case}"), &variant["type"], &their["type"]);
            }
        }
    }
}

#[test]
fn members_are_qsds() {
    let Some(answers) = ask(&[json!({"execute": "query-qmp-schema"})]) else {
        return;
    };
    let mut comparison = Comparison {
        ours: by_name(serde_json::to_value(schema()).unwrap()),
        theirs: by_name(answers[0]["return"].clone()),
        seen: Vec::new(),
        differences: Vec::new(),
    };
    for (name, entry) in comparison.ours.clone() {
        let Some(their) = comparison.theirs.get(&name).cloned() else {
            continue;
        };
        if entry["meta-type"] == "command" || entry["meta-type"] == "event" {
            comparison.compare(&name, &entry["arg-type"], &their["arg-type"]);
            assert_eq!(entry.get("features"), their.get("features"), "{name}");
        }
        if entry["meta-type"] == "command" {
            comparison.compare(&name, &entry["ret-type"], &their["ret-type"]);
        }
    }
    assert!(
        comparison.differences.is_empty(),
        "{}",
        comparison.differences.join("\n")
    );
}
