//! Configuration files: what a daemon tells of itself makes an equal one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use support::*;

/// A daemon with nothing but a configuration file.
struct Loaded(Child);

impl Loaded {
    fn start(config: &Path) -> Self {
        let config = config.to_str().unwrap();
        let child = Command::new(OUTPORTD)
            .args(["--config", config])
            .env("OUTPORTD_CACHE_DIR", "")
            .stdin(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Standard error, and whether it succeeded.
fn run(arguments: &[&str]) -> (String, bool) {
    let output = Command::new("timeout")
        .args(["-k", "1", "60", OUTPORTD])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    (text, output.status.success())
}

/// What a client can ask of a daemon, but for numbers that no two have in common.
fn state(qmp: &mut Qmp) -> Vec<Value> {
    let mut nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let is_named = |node: &Value| !node["node-name"].as_str().unwrap().starts_with('#');
    let nodes = nodes.as_array_mut().unwrap();
    nodes.retain(is_named);
    nodes.sort_by_key(|node| node["node-name"].to_string());
    nodes
        .iter_mut()
        .for_each(|node| _ = node.as_object_mut().unwrap().remove("children"));
    let mut state = vec![json!(nodes)];
    for (command, arguments) in [
        ("query-block-exports", json!({})),
        (
            "qom-list-get",
            json!({"paths": ["/objects", "/objects/io", "/objects/al", "/objects/s",
            "/objects/compat_monitor0"]}),
        ),
        ("query-chardev", json!({})),
        ("x-outport-config", json!({})),
    ] {
        state.push(qmp.ok(command, arguments));
    }
    state
}

#[test]
fn a_dump_loads_back_equal() {
    let mut daemon = Daemon::start(&[
        "--object",
        "iothread,id=io,poll-max-ns=7",
        "--blockdev",
        "null-co,node-name=n,size=1048576",
        "--nbd-server",
        "addr.type=unix,addr.path={}/nbd,max-connections=3",
    ]);
    file(&daemon.path("disk"), 1 << 20);
    std::fs::write(daemon.path("password"), "secret").unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", &daemon.text("image"), "1M"]);
    let mut qmp = daemon.qmp();
    let rules = json!([{"match": "a*", "policy": "allow", "format": "glob"}]);
    let qcow2 = json!({"driver": "qcow2", "node-name": "q",
        "file": {"driver": "file", "node-name": "qf", "filename": daemon.text("image")}});
    for (command, arguments) in [
        ("object-add", json!({"qom-type": "authz-list", "id": "al"})),
        (
            "qom-set",
            json!({"path": "al", "property": "rules", "value": rules}),
        ),
        (
            "object-add",
            json!({"qom-type": "secret", "id": "s", "file": daemon.text("password")}),
        ),
        ("blockdev-add", qcow2),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "r", "file": "n"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "gone"}),
        ),
        ("blockdev-del", json!({"node-name": "gone"})),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "q", "name": "one",
            "writable": true, "iothread": "io"}),
        ),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "d", "node-name": "r"}),
        ),
        ("block-export-del", json!({"id": "d"})),
        ("x-allow-paths", json!({"path": daemon.text("")})),
    ] {
        qmp.ok(command, arguments);
    }
    let before = state(&mut qmp);
    assert!(before[4].as_array().unwrap().len() >= 9, "{}", before[4]);
    let config = daemon.path("config.json");
    std::fs::write(&config, before[4].to_string()).unwrap();
    qmp.ok("quit", json!({}));
    assert!(daemon.wait().success());

    let (said, right) = run(&["--check-config", "--config", config.to_str().unwrap()]);
    assert!(right && said.is_empty(), "{said}");
    assert!(!daemon.path("nbd").exists(), "a check makes nothing");
    let _loaded = Loaded::start(&config);
    let mut qmp = daemon.qmp();
    assert_eq!(state(&mut qmp), before);
    assert!(
        Nbd::enter(&daemon.path("nbd"), "one").is_some(),
        "it serves"
    );
    qmp.ok("quit", json!({}));
}

#[test]
fn secrets_are_never_in_a_dump() {
    let daemon = Daemon::start(&["--object", "secret,id=s,data=hunter2"]);
    let dump = daemon.qmp().ok("x-outport-config", json!({})).to_string();
    assert!(
        dump.contains("\"secret\"") && !dump.contains("hunter2"),
        "{dump}"
    );
}

#[test]
fn mistakes_are_found_without_any_effect() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let socket = format!("addr.type=unix,addr.path={}", path("nbd"));
    let config = path("config");
    let checked = |arguments: &[&str]| run(&[&["--check-config"], arguments].concat());
    let good: &[&str] = &[
        "--object",
        "iothread,id=io",
        "--blockdev",
        "null-co,node-name=n",
        "--nbd-server",
        &socket,
        "--export",
        "nbd,id=e,node-name=n,iothread=io",
        "--chardev",
        &format!("socket,id=c,path={},server=on", path("qmp")),
        "--monitor",
        "c",
    ];
    assert_eq!(checked(good), (String::new(), true));
    for (wrong, want) in [
        (
            &["--blockdev", "null-co"][..],
            "'node-name' must be specified for the root node",
        ),
        (
            &["--blockdev", "null-co,node-name=n,zz=1"],
            "Parameter 'zz' is unexpected",
        ),
        (
            &["--blockdev", "blkdebug,node-name=d,image=zz"],
            "Cannot find device='zz' nor node-name='zz'",
        ),
        (
            &[
                "--blockdev",
                "vendor,node-name=v,file.driver=raw,file.file=zz",
            ],
            "Cannot find device='zz' nor node-name='zz'",
        ),
        (
            &["--blockdev", "raw,node-name=r,file=zz"],
            "Cannot find device='zz' nor node-name='zz'",
        ),
        (
            &[
                "--blockdev",
                "null-co,node-name=n",
                "--blockdev",
                "null-co,node-name=n",
            ],
            "Duplicate nodes with node-name='n'",
        ),
        (
            &[
                "--blockdev",
                "null-co,node-name=n",
                "--export",
                "nbd,id=e,node-name=n",
            ],
            "NBD server not running",
        ),
        (&["--monitor", "zz"], "chardev \"zz\" not found"),
        (
            &["--config", "/nonexistent"],
            "Could not open '/nonexistent': No such file or directory",
        ),
        (&["pos"], "Unexpected argument"),
    ] {
        let (said, right) = checked(wrong);
        assert!(
            !right && said.ends_with(&format!(": {want}\n")),
            "{wrong:?}: {said}"
        );
    }
    for (text, want) in [
        ("{}", "The file must contain a JSON list of commands"),
        (
            r#"[{"execute": "nosuch"}]"#,
            "Command 1, nosuch: The command nosuch has not been found",
        ),
        (
            r#"[{"execute": "query-version"}, {"execute": "blockdev-del", "arguments": {}}]"#,
            "Command 2, blockdev-del: Parameter 'node-name' is missing",
        ),
    ] {
        std::fs::write(&config, text).unwrap();
        for arguments in [
            &["--check-config", "--config", &config][..],
            &["--config", &config],
        ] {
            let (said, right) = run(arguments);
            assert!(!right && said.ends_with(&format!(": {want}\n")), "{said}");
        }
    }
    assert!(!Path::new(&path("nbd")).exists() && !Path::new(&path("qmp")).exists());
}
