//! Objects: properties, secrets, authorization, and the tree that QOM shows, beside QSD's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::*;

fn add(more: Value) -> (&'static str, Value) {
    ("object-add", more)
}

fn set(path: &str, property: &str, value: Value) -> (&'static str, Value) {
    (
        "qom-set",
        json!({"path": path, "property": property, "value": value}),
    )
}

fn get(path: &str, property: &str) -> (&'static str, Value) {
    ("qom-get", json!({"path": path, "property": property}))
}

#[test]
fn iothreads_take_the_values_that_qsds_take() {
    let iothread = |more: Value| add(with(json!({"qom-type": "iothread", "id": "io"}), &more));
    compare(
        &[],
        &[
            iothread(json!({"poll-max-ns": -1})),
            iothread(json!({"poll-grow": -1})),
            iothread(json!({"aio-max-batch": -1, "poll-max-ns": -1})),
            iothread(json!({"thread-pool-min": 65})),
            iothread(json!({"thread-pool-max": 0})),
            iothread(json!({"thread-pool-max": 9_999_999_999_i64})),
            iothread(json!({"poll-max-ns": "5"})),
            iothread(json!({"zz": 5})),
            ("object-del", json!({"id": "io"})),
            iothread(json!({"poll-max-ns": i64::MAX})),
            iothread(json!({})),
            get("io", "poll-max-ns"),
            get("io", "aio-max-batch"),
            get("/objects/io", "thread-pool-max"),
            set("io", "poll-max-ns", json!(5)),
            set("io", "poll-max-ns", json!(-1)),
            set("io", "poll-max-ns", json!("5")),
            set("io", "poll-max-ns", json!(5.5)),
            set("io", "poll-max-ns", json!(null)),
            get("io", "poll-max-ns"),
            set("io", "type", json!("x")),
            set("io", "nosuch", json!(1)),
            get("io", "nosuch"),
            set("io", "aio-max-batch", json!(-1)),
            set("io", "thread-pool-min", json!(65)),
            ("object-del", json!({"id": "io"})),
            ("object-del", json!({"id": "io"})),
            ("object-add", json!({"qom-type": "iothread", "id": ""})),
            ("object-add", json!({"qom-type": "nosuch", "id": "x"})),
        ],
    );
}

#[test]
fn a_refused_change_changes_nothing() {
    let daemon = Daemon::start(&["--object", "iothread,id=io"]);
    let mut qmp = daemon.qmp();
    let change = json!({"path": "io", "property": "thread-pool-min", "value": 65});
    qmp.err("qom-set", change);
    let value = qmp.ok("qom-get", get("io", "thread-pool-min").1);
    assert_eq!(value, 0);
}

#[test]
fn threads_are_told_as_the_system_emulator_tells_them() {
    let daemon = Daemon::start(&["--object", "iothread,id=io,poll-max-ns=7,aio-max-batch=3"]);
    let threads = daemon.qmp().ok("query-iothreads", json!({}));
    let tid = threads[0]["thread-id"].as_i64().unwrap();
    assert!(std::path::Path::new(&format!("/proc/{}/task/{tid}", daemon.pid())).exists());
    let want = json!([{"id": "io", "thread-id": tid, "poll-max-ns": 7, "poll-grow": 2,
        "poll-shrink": 2, "aio-max-batch": 3}]);
    assert_eq!(threads, want);
}

#[test]
fn paths_lead_where_qsds_lead() {
    let list = |path: &str| ("qom-list", json!({"path": path}));
    compare(
        &[],
        &[
            add(json!({"qom-type": "authz-simple", "id": "as", "identity": "me"})),
            add(json!({"qom-type": "secret", "id": "s", "data": "x"})),
            list("/"),
            list(""),
            list("/chardevs"),
            list("chardevs"),
            list("/objects/as"),
            list("as"),
            list("s"),
            list("/objects//as/"),
            list("/x"),
            list("x"),
            list("/objects/x"),
            list("/objects/m"),
            list("m"),
            list("/backend"),
            get("/objects", "as"),
            get("/objects", "type"),
            get("/", "objects"),
            get("/x", "y"),
            get("/chardevs/m", "connected"),
            get("/chardevs/m", "addr"),
            set("/objects", "as", json!("x")),
            set("/x", "y", json!(1)),
        ],
    );
}

#[test]
fn types_are_named_as_qsd_names_them() {
    let properties = |name: &str| ("qom-list-properties", json!({"typename": name}));
    let mut commands: Vec<_> = [
        "authz",
        "authz-list",
        "authz-list-file",
        "authz-simple",
        "chardev",
        "chardev-socket",
        "container",
        "nosuch",
        "object",
        "secret",
        "secret_common",
        "user-creatable",
    ]
    .map(properties)
    .into();
    let types = |implements: &str| ("qom-list-types", json!({"implements": implements}));
    commands.push(types("nosuch"));
    compare(&[], &commands);

    // Whatever type there is in both has the same parent.
    let Some(theirs) = Daemon::qsd(&[]) else {
        return;
    };
    let all = json!({"abstract": true});
    let theirs = theirs.qmp().ok("qom-list-types", all.clone());
    let ours = Daemon::start(&[]).qmp().ok("qom-list-types", all);
    let newer = ["authz-wasm", "monitor", "monitor-qmp", "wasm-plugin"];
    for info in ours.as_array().unwrap() {
        let known = theirs.as_array().unwrap().contains(info);
        assert!(
            known || newer.contains(&info["name"].as_str().unwrap()),
            "{info}"
        );
    }
}

#[test]
fn throttle_groups_are_changed_as_qsds_are() {
    let limits =
        |limits: Value| add(json!({"qom-type": "throttle-group", "id": "tg", "limits": limits}));
    compare(
        &[],
        &[
            limits(json!({"iops-total": 5, "iops-read": 1})),
            limits(json!({"iops-total": 5})),
            get("tg", "limits"),
            get("tg", "x-iops-total"),
            set("tg", "limits", json!({"iops-total": 9, "bps-total": 4096})),
            get("tg", "limits"),
            set("tg", "limits", json!({"iops-total": 9, "iops-read": 1})),
            set("tg", "limits", json!({"zz": 1})),
            get("tg", "x-bps-total"),
            ("qom-list", json!({"path": "tg"})),
            ("object-del", json!({"id": "tg"})),
        ],
    );
}

#[test]
fn several_objects_are_read_at_once() {
    let daemon = Daemon::start(&["--object", "secret,id=s,data=x"]);
    let mut qmp = daemon.qmp();
    let all = qmp.ok(
        "qom-list-get",
        json!({"paths": ["s", "/objects/compat_monitor0"]}),
    );
    let values = all[0]["properties"].as_array().unwrap();
    assert!(
        values.contains(&json!({"name": "format", "type": "QCryptoSecretFormat",
        "value": "raw"}))
    );
    assert!(
        values.contains(&json!({"name": "data", "type": "string"})),
        "no value"
    );
    assert_eq!(all[1]["properties"][0]["value"], "monitor-qmp");
    assert_eq!(
        qmp.execute("qom-list-get", json!({"paths": ["/nosuch"]}))["error"]["class"],
        "DeviceNotFound"
    );
}

#[test]
fn authorization_is_changed_as_qsds_is() {
    let list = |more: Value| add(with(json!({"qom-type": "authz-list", "id": "al"}), &more));
    compare(
        &[],
        &[
            add(json!({"qom-type": "authz-simple", "id": "as"})),
            add(json!({"qom-type": "authz-simple", "id": "as", "identity": "me"})),
            get("as", "identity"),
            set("as", "identity", json!("you")),
            set("as", "identity", json!(5)),
            get("as", "identity"),
            list(json!({"rules": [{"match": "x"}]})),
            list(json!({"rules": [{"match": "x", "policy": "y"}]})),
            list(json!({"policy": "y"})),
            list(json!({})),
            get("al", "rules"),
            get("al", "policy"),
            set("al", "policy", json!("allow")),
            set("al", "policy", json!("zz")),
            get("al", "policy"),
            set(
                "al",
                "rules",
                json!([{"match": "a*", "policy": "deny", "format": "glob"}]),
            ),
            get("al", "rules"),
            set("al", "rules", json!([{"match": "x"}])),
            set(
                "al",
                "rules",
                json!([{"match": "x", "policy": "deny", "zz": 1}]),
            ),
            set("al", "rules", json!("x")),
            set("al", "rules", json!([])),
            get("al", "rules"),
            ("object-del", json!({"id": "al"})),
            ("object-del", json!({"id": "al"})),
        ],
    );
}

/// Whether the object lets the identity in.
#[track_caller]
fn allowed(qmp: &mut Qmp, id: &str, identity: &str) -> bool {
    let decision = qmp.ok("x-authz-check", json!({"id": id, "identity": identity}));
    decision["allowed"].as_bool().unwrap()
}

#[test]
fn rules_decide_and_change_while_the_daemon_runs() {
    let daemon = Daemon::start(&["--object", "authz-simple,id=as,identity=CN=me"]);
    let mut qmp = daemon.qmp();
    assert!(allowed(&mut qmp, "as", "CN=me") && !allowed(&mut qmp, "as", "CN=you"));
    let rules = json!([{"match": "CN=eve", "policy": "deny"},
        {"match": "CN=*", "policy": "allow", "format": "glob"}]);
    let list = json!({"qom-type": "authz-list", "id": "al", "rules": rules});
    qmp.ok("object-add", list);
    assert!(allowed(&mut qmp, "al", "CN=bob") && !allowed(&mut qmp, "al", "CN=eve"));
    qmp.ok("qom-set", set("al", "rules", json!([])).1);
    assert!(!allowed(&mut qmp, "al", "CN=bob"));
    let wrong = |qmp: &mut Qmp, id| qmp.err("x-authz-check", json!({"id": id, "identity": "x"}));
    assert_eq!(wrong(&mut qmp, "zz"), "Cannot find QAuthZ object ID zz");
    assert_eq!(
        wrong(&mut qmp, "compat_monitor0"),
        "Object 'compat_monitor0' is not a QAuthZ subclass"
    );
}

#[test]
fn a_list_in_a_file_is_read_again_and_denies_while_it_is_broken() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let path = daemon.text("rules.json");
    let object = json!({"qom-type": "authz-list-file", "id": "af", "filename": path});
    let missing = qmp.err("object-add", object.clone());
    assert!(
        missing.starts_with(&format!("Unable to read '{path}': ")),
        "{missing}"
    );
    std::fs::write(&path, "[]").unwrap();
    assert_eq!(
        qmp.err("object-add", object.clone()),
        format!("File '{path}' must contain a JSON object")
    );
    std::fs::write(&path, r#"{"policy": "zz"}"#).unwrap();
    assert_eq!(
        qmp.err("object-add", object.clone()),
        "Parameter 'policy' does not accept value 'zz'"
    );
    std::fs::write(&path, r#"{"rules": [{"match": "me", "policy": "allow"}]}"#).unwrap();
    qmp.ok("object-add", object);
    assert!(allowed(&mut qmp, "af", "me") && !allowed(&mut qmp, "af", "you"));

    std::fs::write(&path, "{").unwrap();
    eventually("a broken file denies", || !allowed(&mut qmp, "af", "me"));
    // As tools do it: a new file is renamed over it.
    std::fs::write(daemon.path("new"), r#"{"policy": "allow"}"#).unwrap();
    std::fs::rename(daemon.path("new"), &path).unwrap();
    eventually("the new file counts", || allowed(&mut qmp, "af", "you"));
    // Other files of the folder are none of its business.
    std::fs::write(daemon.path("other"), "{").unwrap();
    assert!(allowed(&mut qmp, "af", "you"));

    qmp.ok("qom-set", set("af", "refresh", json!(false)).1);
    std::fs::write(&path, "{").unwrap();
    assert!(allowed(&mut qmp, "af", "you"), "nobody watches");
    qmp.ok("object-del", json!({"id": "af"}));
    let relative = json!({"qom-type": "authz-listfile", "id": "af", "filename": "x"});
    assert_eq!(
        qmp.err("object-add", relative),
        "Filename must be an absolute path"
    );
}

const FOR_ME: &str = r#"{"rules": [{"match": "me", "policy": "allow"}]}"#;
const FOR_YOU: &str = r#"{"rules": [{"match": "you", "policy": "allow"}]}"#;

/// A daemon whose object `af` takes its rules from the file.
fn by_file(rules: &Path) -> (Daemon, Qmp) {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let object = json!({"qom-type": "authz-list-file", "id": "af", "filename": rules});
    qmp.ok("object-add", object);
    assert!(allowed(&mut qmp, "af", "me") && !allowed(&mut qmp, "af", "you"));
    (daemon, qmp)
}

#[test]
fn a_list_in_a_file_that_is_gone_denies_until_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let (rules, aside) = (folder.path().join("rules"), folder.path().join("aside"));
    std::fs::write(&rules, FOR_ME).unwrap();
    let (_daemon, mut qmp) = by_file(&rules);
    for _ in 0..2 {
        std::fs::remove_file(&rules).unwrap();
        eventually("without a file nobody gets in", || {
            !allowed(&mut qmp, "af", "me")
        });
        std::fs::write(&rules, FOR_ME).unwrap();
        eventually("it is back", || allowed(&mut qmp, "af", "me"));
        std::fs::rename(&rules, &aside).unwrap();
        eventually("it was moved away", || !allowed(&mut qmp, "af", "me"));
        std::fs::rename(&aside, &rules).unwrap();
        eventually("it was moved back", || allowed(&mut qmp, "af", "me"));
    }
}

#[test]
fn a_list_in_a_file_is_found_by_its_name_whatever_becomes_of_its_folder() {
    let root = tempfile::tempdir().unwrap();
    let (folder, aside) = (root.path().join("etc"), root.path().join("aside"));
    let rules = folder.join("rules");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(&rules, FOR_ME).unwrap();
    let (_daemon, mut qmp) = by_file(&rules);
    std::fs::rename(&folder, &aside).unwrap();
    eventually("the folder is gone", || !allowed(&mut qmp, "af", "me"));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(&rules, FOR_YOU).unwrap();
    eventually("there is a new one", || allowed(&mut qmp, "af", "you"));
    assert!(!allowed(&mut qmp, "af", "me"));
    // And what is done in the new one.
    std::fs::write(&rules, FOR_ME).unwrap();
    eventually("it is followed", || allowed(&mut qmp, "af", "me"));
    std::fs::remove_dir_all(&folder).unwrap();
    eventually("it is gone, too", || !allowed(&mut qmp, "af", "me"));
}

#[test]
fn a_list_in_a_file_is_followed_through_links() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    for (version, rules) in [("one", FOR_ME), ("two", FOR_YOU)] {
        std::fs::create_dir(at(version)).unwrap();
        std::fs::write(at(version).join("rules"), rules).unwrap();
    }
    let point = |link: &str, target: &str| {
        let _ = std::fs::remove_file(at("new"));
        symlink(target, at("new")).unwrap();
        std::fs::rename(at("new"), at(link)).unwrap();
    };
    // As volumes of Kubernetes are laid out and updated: rules -> ..data/rules, ..data -> one.
    symlink("..data/rules", at("rules")).unwrap();
    // And a folder that is a link, as deployments have it.
    for (filename, link) in [("rules", "..data"), ("current/rules", "current")] {
        point(link, "one");
        let (_daemon, mut qmp) = by_file(&at(filename));
        point(link, "two");
        eventually("the second version counts", || {
            allowed(&mut qmp, "af", "you") && !allowed(&mut qmp, "af", "me")
        });
        // What the links led to may change in place, where nothing of the name's own folder does.
        std::fs::write(at("two/rules"), "{").unwrap();
        eventually("it is broken", || !allowed(&mut qmp, "af", "you"));
        std::fs::write(at("two/rules"), FOR_YOU).unwrap();
        eventually("it is right again", || allowed(&mut qmp, "af", "you"));
        point(link, "nowhere");
        eventually("the link leads nowhere", || !allowed(&mut qmp, "af", "you"));
        point(link, "one");
        eventually("the first version again", || allowed(&mut qmp, "af", "me"));
    }
}

#[test]
fn secrets_are_refused_in_qsds_words() {
    let secret = |id: &str, more: Value| add(with(json!({"qom-type": "secret", "id": id}), &more));
    let key = "MDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDA=";
    let iv = "MDAwMDAwMDAwMDAwMDAwMA==";
    compare(
        &[],
        &[
            secret("a", json!({})),
            secret("a", json!({"data": "x", "file": "/x"})),
            secret("a", json!({"file": "/nonexistent"})),
            secret("a", json!({"file": "/tmp"})),
            secret("a", json!({"data": "%%%%", "format": "base64"})),
            secret("a", json!({"data": "x", "format": "zz"})),
            secret("a", json!({"data": "x", "keyid": "zz"})),
            secret("k", json!({"data": key, "format": "base64"})),
            secret("short", json!({"data": "short"})),
            secret("a", json!({"data": "x", "keyid": "short", "iv": iv})),
            secret("a", json!({"data": "x", "keyid": "k"})),
            secret("a", json!({"data": "x", "keyid": "k", "iv": "YWJj"})),
            secret("a", json!({"data": "x", "keyid": "k", "iv": iv})),
            secret(
                "a",
                json!({"data": "qqqqqqqqqqqqqqqq", "keyid": "k", "iv": iv}),
            ),
            secret(
                "a",
                json!({"data": "aGVs\nbG8=", "format": "base64", "iv": iv}),
            ),
            get("a", "format"),
            get("a", "iv"),
            get("a", "keyid"),
            get("a", "file"),
            ("object-del", json!({"id": "k"})),
        ],
    );
}

#[test]
fn a_secret_encrypted_with_another_is_decrypted() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    // The inner secret is a key itself, so that another one shows whether it came out right.
    let inner = "0123456789abcdef0123456789abcdef";
    let outer = "30".repeat(32);
    let iv = "30".repeat(16);
    let encrypt = |key: &str, text: &str| {
        let mut openssl = Command::new("openssl")
            .args(["enc", "-aes-256-cbc", "-a", "-A", "-K", key, "-iv", &iv])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        openssl
            .stdin
            .take()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        String::from_utf8(openssl.wait_with_output().unwrap().stdout).unwrap()
    };
    if !has("openssl") {
        return;
    }
    let iv64 = "MDAwMDAwMDAwMDAwMDAwMA==";
    qmp.ok(
        "object-add",
        json!({"qom-type": "secret", "id": "outer", "data": "0".repeat(32)}),
    );
    let encrypted = |id: &str, keyid: &str, data: String| {
        json!({"qom-type": "secret", "id": id, "keyid": keyid, "iv": iv64, "format": "base64",
            "data": data})
    };
    qmp.ok(
        "object-add",
        encrypted("inner", "outer", encrypt(&outer, inner)),
    );
    let inner_hex: String = inner.bytes().map(|byte| format!("{byte:02x}")).collect();
    qmp.ok(
        "object-add",
        encrypted("last", "inner", encrypt(&inner_hex, "password")),
    );
    let wrong = encrypted("wrong", "outer", encrypt(&inner_hex, "password"));
    let error = qmp.err("object-add", wrong);
    assert!(
        error.starts_with("Incorrect number of padding bytes"),
        "{error}"
    );
}

/// `O_NONBLOCK`: a pipe without a reader is not opened for writing.
const NONBLOCK: i32 = 0o4000;

#[test]
fn a_change_that_waits_does_not_overwrite_what_came_meanwhile() {
    let other = "socket,id=n,path={}/qmp2,server=on,wait=off";
    let daemon = Daemon::start(&["--chardev", other, "--monitor", "n"]);
    let mut slow = daemon.qmp();
    let mut other = Qmp::negotiated(&daemon.path("qmp2"));
    let list = daemon.text("rules.json");
    std::fs::write(&list, "{}").unwrap();
    let of_file = json!({"qom-type": "authz-list-file", "id": "a", "filename": list,
        "refresh": false});
    let replacement = json!({"qom-type": "authz-list", "id": "a", "policy": "allow"});
    // What happens to the object while a change of it reads its file, and what the change says.
    let cases = [
        ("replaced", "changed"),
        ("changed", "changed"),
        ("deleted", "not found"),
    ];
    for (case, want) in cases {
        slow.ok("object-add", of_file.clone());
        let pipe = daemon.text(case);
        make_pipe(&pipe);
        let (command, arguments) = set("a", "filename", json!(pipe));
        let change = json!({"execute": command, "arguments": arguments});
        slow.send(change.to_string().as_bytes());
        let mut file = None;
        eventually("the file is read", || {
            let opened = std::fs::File::options()
                .write(true)
                .custom_flags(NONBLOCK)
                .open(&pipe);
            file = opened.ok();
            file.is_some()
        });
        match case {
            "changed" => {
                let all = daemon.text("all.json");
                std::fs::write(&all, r#"{"policy": "allow"}"#).unwrap();
                let (command, arguments) = set("a", "filename", json!(all));
                other.ok(command, arguments);
            }
            _ => _ = other.ok("object-del", json!({"id": "a"})),
        }
        if case == "replaced" {
            other.ok("object-add", replacement.clone());
        }
        file.unwrap().write_all(b"{}").unwrap();
        let answer = slow.answer().unwrap();
        let said = answer["error"]["desc"].as_str().unwrap_or_default();
        assert!(said.contains(want), "{case}: {answer}");
        if case != "deleted" {
            assert!(
                allowed(&mut other, "a", "anybody"),
                "{case}: the last word counts"
            );
            let config = other.ok("x-outport-config", json!({})).to_string();
            assert!(!config.contains(&pipe), "{config}");
            other.ok("object-del", json!({"id": "a"}));
        }
    }
}
