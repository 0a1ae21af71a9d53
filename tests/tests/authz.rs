//! Authorization of clients by policies: who enters, what they see, what they may, how long.
//!
//! The policy is the guest `obeys`: it does what a file says, so that a test can change its mind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::time::{Duration, Instant};

use outport_test_guests as guests;
use outport_tests::nbd::wire::{opt, rep};
use outport_tests::vhost_user::{FrontEnd, features, request};
use outport_tests::{Daemon, Server, TempImage, assert_same, can_mount, eventually};
use serde_json::{Value, json};

/// `NBD_EPERM`.
const EPERM: u32 = 1;

/// A daemon with exports `a` and `b` that asks `az` about `b`.
struct Guarded {
    daemon: Daemon,
}

impl Guarded {
    fn start(plugin: &[u8], rules: &str) -> Self {
        let mut daemon = Daemon::builder(Server::Outport).nbd().start();
        let path = daemon.path("policy.wasm");
        std::fs::write(&path, plugin).unwrap();
        std::fs::write(daemon.path("rules"), rules).unwrap();
        let (path, rules) = (path.to_str().unwrap(), daemon.path("rules"));
        for object in [
            json!({"qom-type": "wasm-plugin", "id": "p", "filename": path,
                   "allow-unpinned": true, "call-time-max-ms": 30, "memory-max": 4 << 20}),
            json!({"qom-type": "authz-wasm", "id": "az", "plugin": "p",
                   "files": {"rules": rules}}),
        ] {
            daemon.qmp.ok("object-add", object);
        }
        let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20,
                          "read-zeroes": true});
        daemon.qmp.ok("blockdev-add", node);
        let mut guarded = Self { daemon };
        guarded.export("a", json!({}));
        guarded.export("b", json!({"authz": "az"}));
        guarded
    }

    fn export(&mut self, name: &str, more: Value) {
        let mut export = json!({"type": "nbd", "id": name, "node-name": "n", "name": name,
                                "writable": true});
        let members = export.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        self.daemon.qmp.ok("block-export-add", export);
    }

    fn say(&self, rules: &str) {
        // By renaming, as editors do: another file, whatever the clock says.
        let new = self.daemon.path("rules.new");
        std::fs::write(&new, rules).unwrap();
        std::fs::rename(new, self.daemon.path("rules")).unwrap();
    }

    /// Why GO was refused; `None`: it was not.
    fn refusal(&self, export: &str) -> Option<u32> {
        let mut haggle = self.daemon.haggle();
        haggle
            .query(opt::GO, export, &[])
            .unwrap()
            .err()
            .map(|reply| reply.kind)
    }

    fn listed(&self) -> Vec<String> {
        let replies = self.daemon.haggle().ask(opt::LIST, &[]).unwrap();
        let servers = replies.iter().filter(|reply| reply.kind == rep::SERVER);
        let name = |data: &[u8]| String::from_utf8(data[4..].to_vec()).unwrap();
        servers.map(|reply| name(&reply.data)).collect()
    }

    fn totals(&mut self) -> Value {
        self.daemon.qmp.ok("query-authz", json!({}))[0].clone()
    }
}

#[test]
fn a_denied_export_is_neither_listed_nor_known() {
    let mut guarded = Guarded::start(&guests::obeys(), "no");
    assert_eq!(guarded.listed(), ["a"]);
    assert_eq!(guarded.refusal("b"), Some(rep::ERR_UNKNOWN));
    assert_eq!(guarded.refusal("b"), guarded.refusal("nosuch"));
    assert_eq!(guarded.refusal("a"), None, "nobody is asked about this one");
    // The next decision knows of the change.
    guarded.say("allow");
    assert_eq!(guarded.refusal("b"), None);
    assert_eq!(guarded.listed(), ["a", "b"]);
    let totals = guarded.totals();
    assert_eq!(
        (&totals["id"], &totals["type"]),
        (&json!("az"), &json!("authz-wasm"))
    );
    assert_eq!(
        (&totals["allowed"], &totals["denied"]),
        (&json!(2), &json!(3)),
        "{totals}"
    );
    let denial = totals["last-denial"].as_str().unwrap();
    assert!(denial.starts_with("nbd-unix uid="), "{denial}");
    assert!(denial.ends_with("at 'b': told to"), "{denial}");
    let log = guarded.daemon.stderr();
    assert!(log.contains("access denied"), "{log}");
}

#[test]
fn a_grant_may_be_read_only() {
    let guarded = Guarded::start(&guests::obeys(), "read");
    let mut reader = guarded.daemon.client("b");
    assert_eq!(reader.write(0, &[0; 512]).unwrap(), Err(EPERM));
    assert!(reader.read(0, 512).unwrap().is_ok());
    guarded.say("allow");
    let mut writer = guarded.daemon.client("b");
    assert_eq!(writer.write(0, &[0; 512]).unwrap(), Ok(()));
    assert_eq!(reader.write(0, &[0; 512]).unwrap(), Err(EPERM), "told once");
}

#[test]
fn a_reader_gives_nothing_up() {
    let mut guarded = Guarded::start(&guests::obeys(), "read");
    let image = TempImage::random(1 << 20, 8);
    let content = image.content();
    guarded.daemon.add_node("disk", &image);
    let export = json!({"node-name": "disk", "authz": "az", "discard-after-read": true});
    guarded.export("c", export);
    let mut reader = guarded.daemon.client("c");
    for round in ["the first read", "the second read"] {
        let got = reader.read(0, 1 << 16).unwrap().unwrap();
        assert_same(&got, &content[..1 << 16], round);
    }
    // Who may write gives up what it reads.
    guarded.say("allow");
    let mut writer = guarded.daemon.client("c");
    let got = writer.read(0, 1 << 16).unwrap().unwrap();
    assert_same(&got, &content[..1 << 16], "the writer's read");
    assert_eq!(reader.read(0, 1 << 16).unwrap(), Ok(vec![0; 1 << 16]));
}

#[test]
fn programs_that_open_a_file_are_asked_for_too() {
    if !can_mount() {
        return;
    }
    let mut guarded = Guarded::start(&guests::obeys(), "no");
    let path = guarded.daemon.path("file");
    std::fs::write(&path, "").unwrap();
    let export = json!({"type": "fuse", "id": "file", "node-name": "n", "mountpoint": path,
        "writable": true, "authz": "az"});
    guarded.daemon.qmp.ok("block-export-add", export);
    let refusal = |write: bool| {
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .write(write)
            .open(&path);
        opened.err().map(|error| error.kind())
    };
    let denied = Some(std::io::ErrorKind::PermissionDenied);
    assert_eq!((refusal(false), refusal(true)), (denied, denied));
    guarded.say("read");
    assert_eq!((refusal(false), refusal(true)), (None, denied));
    guarded.say("allow");
    assert_eq!((refusal(false), refusal(true)), (None, None));
}

#[test]
fn truncating_is_writing_however_a_file_is_opened() {
    if !can_mount() {
        return;
    }
    let mut guarded = Guarded::start(&guests::obeys(), "read");
    let below = guarded.daemon.path("disk");
    let content = vec![0x5a; 8192];
    std::fs::write(&below, &content).unwrap();
    let node = json!({"driver": "file", "node-name": "disk", "filename": below});
    guarded.daemon.qmp.ok("blockdev-add", node);
    let path = guarded.daemon.path("file");
    std::fs::write(&path, "").unwrap();
    let export = json!({"type": "fuse", "id": "file", "node-name": "disk", "mountpoint": path,
        "writable": true, "growable": true, "authz": "az"});
    guarded.daemon.qmp.ok("block-export-add", export);
    let mut reader = std::fs::File::open(&path).unwrap();
    // truncate(2): no descriptor is opened for it.
    let truncated = || {
        let mut perl = std::process::Command::new("perl");
        let script = "truncate($ARGV[0], 0) or exit($!{EACCES} ? 7 : 8)";
        let status = perl.args(["-e", script]).arg(&path).status().unwrap();
        status.code().unwrap()
    };
    let opened = |flags: i32| {
        let mut options = std::fs::OpenOptions::new();
        let opened = options.read(true).custom_flags(flags).open(&path);
        opened.err().map(|error| error.kind())
    };
    let mode = |mode: u32| {
        let set = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode));
        set.err().map(|error| error.kind())
    };
    let denied = Some(std::io::ErrorKind::PermissionDenied);
    for rules in ["read", "no"] {
        guarded.say(rules);
        assert_eq!(truncated(), 7, "{rules}");
        assert_eq!(opened(libc::O_TRUNC), denied, "{rules}");
        assert_eq!(mode(0o400), denied, "{rules}");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read(&below).unwrap(), content, "{rules}");
    }
    guarded.say("allow");
    let writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    assert_eq!((mode(0o400), mode(0o600)), (None, None));
    guarded.say("no");
    writer.set_len(4096).unwrap();
    assert_eq!(
        std::fs::metadata(&below).unwrap().len(),
        4096,
        "it was granted"
    );
    guarded.say("allow");
    assert_eq!(truncated(), 0);
    assert_eq!(std::fs::metadata(&below).unwrap().len(), 0);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    assert_eq!(opened(libc::O_TRUNC), None);
}

#[test]
fn front_ends_of_disks_are_asked_for_too() {
    let mut guarded = Guarded::start(&guests::obeys(), "no");
    let path = guarded.daemon.path("blk.sock");
    let address = json!({"type": "unix", "path": path});
    let export = json!({"type": "vhost-user-blk", "id": "disk", "node-name": "n",
        "writable": true, "authz": "az", "addr": address});
    guarded.daemon.qmp.ok("block-export-add", export);
    // The features that are offered to one that enters.
    let offered = || {
        let mut front_end = FrontEnd::connect(&path).unwrap();
        let sent = front_end.send(request::GET_FEATURES, 1, &[], &[]);
        let reply = sent.and_then(|()| front_end.receive()).ok()?;
        let bytes = reply.payload.try_into().unwrap();
        Some(u64::from_ne_bytes(bytes))
    };
    assert_eq!(offered(), None);
    guarded.say("read");
    let writes = features::DISCARD | features::WRITE_ZEROES;
    let read = offered().unwrap();
    assert_eq!(read & (features::RO | writes), features::RO);
    guarded.say("allow");
    let all = offered().unwrap();
    assert_eq!(
        all & (features::RO | features::WRITE_ZEROES),
        features::WRITE_ZEROES
    );
    // What a ring cannot do is not promised.
    guarded.say("limited");
    assert_eq!(offered(), None);
    let totals = guarded.totals();
    let denial = totals["last-denial"].as_str().unwrap();
    assert!(denial.contains("vhost-user"), "{denial}");
}

#[test]
fn a_grant_may_limit_the_rate() {
    let guarded = Guarded::start(&guests::obeys(), "limited");
    let mut client = guarded.daemon.client("b");
    let started = Instant::now();
    for _ in 0..11 {
        assert!(client.read(0, 512).unwrap().is_ok());
    }
    // Twenty a second, less the burst of one: at least half of the time that it should take.
    assert!(started.elapsed() > Duration::from_millis(200));
    client.disconnect().unwrap();
}

#[test]
fn an_expired_grant_is_asked_for_again() {
    let mut guarded = Guarded::start(&guests::obeys(), "ttl");
    let mut client = guarded.daemon.client("b");
    let mut asked = || guarded.totals()["allowed"].as_u64().unwrap();
    eventually("the grant is renewed", || (asked() >= 3).then_some(()));
    assert!(
        client.read(0, 512).unwrap().is_ok(),
        "and the session goes on"
    );
    guarded.say("no longer");
    assert!(client.closed(), "until it is denied");
    assert_eq!(guarded.refusal("b"), Some(rep::ERR_UNKNOWN));
    // What can no longer write must come again to be told so.
    guarded.say("ttl");
    let mut writer = guarded.daemon.client("b");
    guarded.say("read");
    assert!(writer.closed());
}

#[test]
fn a_broken_policy_denies_and_others_are_served_meanwhile() {
    for (plugin, fault) in [
        (guests::policy_traps(), "trap"),
        (guests::policy_spins(), "deadline"),
        (guests::policy_hogs(), "memory"),
        (guests::policy_lies(), "bad-answer"),
    ] {
        let mut guarded = Guarded::start(&plugin, "");
        assert_eq!(guarded.refusal("b"), Some(rep::ERR_UNKNOWN), "{fault}");
        assert_eq!(guarded.refusal("a"), None, "{fault}");
        assert_eq!(guarded.listed(), ["a"], "{fault}");
        let events = eventually("the fault is told", || {
            let events = guarded.daemon.qmp.events("OUTPORT_PLUGIN_FAULT");
            (!events.is_empty()).then_some(events)
        });
        let event = &events[0];
        let told = (&event["data"]["fault"], &event["data"]["object"]);
        assert_eq!(told, (&json!(fault), &json!("az")), "{event}");
        let plugins = guarded.daemon.qmp.ok("query-plugins", json!({}));
        let ours = plugins
            .as_array()
            .unwrap()
            .iter()
            .find(|p| p["name"] == "p");
        let ours = ours.unwrap();
        assert_eq!(ours["kind"], "authz");
        // One, or two if the list was asked for after the pause.
        assert!(ours["faults"].as_u64() >= Some(1), "{ours}");
        assert_eq!(guarded.totals()["denied"], 2, "{fault}");
        let log = guarded.daemon.stderr();
        for line in ["a broken policy denies everybody", "access denied"] {
            assert!(log.contains(line), "{fault}: {log}");
        }
    }
}

#[test]
fn a_policy_that_answers_with_an_error_denies_and_is_not_broken() {
    let mut guarded = Guarded::start(&guests::policy_errs(), "");
    assert_eq!(guarded.refusal("b"), Some(rep::ERR_UNKNOWN));
    assert_eq!(guarded.listed(), ["a"]);
    let totals = guarded.totals();
    assert_eq!(totals["denied"], 2);
    let denial = totals["last-denial"].as_str().unwrap();
    assert!(denial.ends_with("at 'b': busy"), "{denial}");
    assert!(guarded.daemon.qmp.events("OUTPORT_PLUGIN_FAULT").is_empty());
}

#[test]
fn a_policy_that_broke_is_loaded_anew_and_asked_again() {
    let mut guarded = Guarded::start(&guests::obeys(), "x: trap");
    assert_eq!(guarded.refusal("b"), Some(rep::ERR_UNKNOWN));
    guarded.say("allow");
    // Its pause is over some time; until then it is not even asked.
    eventually("it is asked again", || {
        guarded.refusal("b").is_none().then_some(())
    });
    let plugins = guarded.daemon.qmp.ok("query-plugins", json!({}));
    let mut plugins = plugins.as_array().unwrap().iter();
    let ours = plugins.find(|p| p["name"] == "p").unwrap();
    assert_eq!(ours["faults"], 1, "{ours}");
}

#[test]
fn a_grant_that_cannot_be_renewed_ends() {
    let guarded = Guarded::start(&guests::obeys(), "ttl");
    let mut client = guarded.daemon.client("b");
    let mut unlimited = guarded.daemon.client("a");
    assert!(client.read(0, 512).unwrap().is_ok());
    guarded.say("x: trap");
    assert!(client.closed(), "who cannot be asked for has no grant");
    assert!(unlimited.read(0, 512).unwrap().is_ok());
}

#[test]
fn a_policy_on_trial_is_only_logged() {
    let mut guarded = Guarded::start(&guests::obeys(), "no");
    let enforce = json!({"path": "/objects/az", "property": "enforce", "value": false});
    guarded.daemon.qmp.ok("qom-set", enforce);
    assert_eq!(guarded.refusal("b"), None);
    let totals = guarded.totals();
    assert_eq!(
        (&totals["denied"], &totals["unenforced"]),
        (&json!(1), &json!(1))
    );
    let log = guarded.daemon.stderr();
    assert!(log.contains("access would be denied"), "{log}");
    let enforce = json!({"path": "/objects/az", "property": "enforce", "value": true});
    guarded.daemon.qmp.ok("qom-set", enforce);
    assert_eq!(guarded.refusal("b"), Some(rep::ERR_UNKNOWN));
}

#[test]
fn what_an_object_is_called_counts_when_it_is_asked() {
    let mut guarded = Guarded::start(&guests::obeys(), "allow");
    guarded.daemon.qmp.ok("object-del", json!({"id": "az"}));
    assert_eq!(
        guarded.refusal("b"),
        Some(rep::ERR_UNKNOWN),
        "it is missing"
    );
    let simple = json!({"qom-type": "authz-simple", "id": "az", "identity": ""});
    guarded.daemon.qmp.ok("object-add", simple);
    assert_eq!(
        guarded.refusal("b"),
        None,
        "who has no name is admitted by that"
    );
    let identity = json!({"path": "/objects/az", "property": "identity", "value": "CN=a"});
    guarded.daemon.qmp.ok("qom-set", identity);
    assert_eq!(guarded.refusal("b"), Some(rep::ERR_UNKNOWN));
}

#[test]
fn a_server_asks_about_all_of_its_exports_and_strict_ones_deny_unasked() {
    let mut guarded = Guarded::start(&guests::obeys(), "read");
    for (id, more) in [
        ("all", json!({"authz": "az"})),
        ("strict", json!({"strict-authz": true})),
    ] {
        let path = guarded.daemon.path(id);
        let mut server = json!({"id": id, "addr": {"type": "unix", "data": {"path": path}}});
        let members = server.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        guarded.daemon.qmp.ok("nbd-server-start", server);
    }
    guarded.export("c", json!({"server": "all"}));
    guarded.export("d", json!({"server": "strict"}));
    guarded.export("e", json!({"server": "strict", "authz": "az"}));
    let kind = |server: &str, export: &str| {
        let address = outport_tests::nbd::Address::Unix(guarded.daemon.path(server));
        let mut haggle = outport_tests::nbd::Haggle::connect(&address).unwrap();
        haggle
            .query(opt::GO, export, &[])
            .unwrap()
            .map(|told| told.flags & 2)
    };
    // NBD_FLAG_READ_ONLY is bit 1.
    assert_eq!(kind("all", "c").unwrap(), 2);
    assert_eq!(kind("strict", "d").unwrap_err().kind, rep::ERR_UNKNOWN);
    assert_eq!(kind("strict", "e").unwrap(), 2);
}
