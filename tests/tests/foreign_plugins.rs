//! Plugins in other languages than Rust: each example is built with its own tools, tested natively,
//! judged, and asked by the daemon.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::process::Command;

use outport_tests::nbd::wire::opt;
use outport_tests::{Daemon, Server, requires};
use serde_json::{Value, json};

/// A folder of its own with a copy of the example, beside links to what it refers to.
fn copy(example: &str) -> (tempfile::TempDir, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = tempfile::tempdir().unwrap();
    let copied = folder.path().join("examples").join(example);
    std::fs::create_dir_all(&copied).unwrap();
    for file in std::fs::read_dir(root.join("examples").join(example)).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), copied.join(file.file_name())).unwrap();
        }
    }
    for shared in ["sdk", "wit"] {
        let target = root.join(shared).canonicalize().unwrap();
        std::os::unix::fs::symlink(target, folder.path().join(shared)).unwrap();
    }
    (folder, copied)
}

/// Runs a shell line there, with this build's programs on the path.
fn shell(folder: &Path, line: &str) {
    let programs = Server::Outport.program();
    let programs = programs.parent().unwrap().display();
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .args(["-ec", line])
        .current_dir(folder)
        .env("PATH", format!("{programs}:{path}"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{line}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A daemon that asks the policy about `web-1` and `db`; whether this test's user may read and
/// write each.
fn verdicts(plugin: &Path, name: &str, policy: Value) -> Vec<Option<bool>> {
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    let file = json!({"qom-type": "wasm-plugin", "id": "p", "filename": plugin,
                      "allow-unpinned": true});
    daemon.qmp.ok("object-add", file);
    let mut object = json!({"qom-type": "authz-wasm", "id": "az", "plugin": name});
    let members = object.as_object_mut().unwrap();
    members.extend(policy.as_object().unwrap().clone());
    daemon.qmp.ok("object-add", object);
    let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
    daemon.qmp.ok("blockdev-add", node);
    let exports = ["web-1", "db"];
    for name in exports {
        let export = json!({"type": "nbd", "id": name, "node-name": "n", "name": name,
                            "writable": true, "authz": "az"});
        daemon.qmp.ok("block-export-add", export);
    }
    let ask = |name: &str| {
        let told = daemon.haggle().query(opt::GO, name, &[]).unwrap().ok()?;
        // NBD_FLAG_READ_ONLY is bit 1.
        Some(told.flags & 2 == 0)
    };
    let verdicts = exports.map(ask).to_vec();
    let totals = daemon.qmp.ok("query-authz", json!({}));
    assert_eq!(
        totals[0]["allowed"].as_u64().unwrap() + totals[0]["denied"].as_u64().unwrap(),
        2,
        "{totals}"
    );
    let plugins = daemon.qmp.ok("query-plugins", json!({}));
    let ours = plugins.as_array().unwrap().iter();
    assert!(
        ours.clone().any(|p| p["name"] == "p" && p["faults"] == 0),
        "{plugins}"
    );
    verdicts
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

#[test]
fn a_policy_in_c() {
    if !requires("clang") || !requires("wasm-ld") || !requires("make") {
        return;
    }
    let (_keep, folder) = copy("authz-uids-c");
    shell(
        &folder,
        "make test && make && outport plugin check authz-uids.wasm",
    );
    let plugin = folder.join("authz-uids.wasm");
    let uids = folder.join("uids");
    let ask = |content: String| {
        std::fs::write(&uids, content).unwrap();
        verdicts(&plugin, "authz-uids", json!({"files": {"uids": uids}}))
    };
    assert_eq!(ask(format!("{}\n", uid())), [Some(true), Some(true)]);
    assert_eq!(ask(format!("{} ro", uid())), [Some(false), Some(false)]);
    assert_eq!(ask("12345".into()), [None, None]);
    assert_eq!(ask("nonsense".into()), [None, None]);
}

#[test]
fn a_policy_in_javascript() {
    if !requires("npm") || !requires("node") {
        return;
    }
    let (_keep, folder) = copy("authz-teams-js");
    shell(&folder, "node --test");
    shell(
        &folder,
        "npm install --no-audit --no-fund --no-update-notifier && npm run build",
    );
    shell(&folder, "outport plugin check authz-teams.wasm");
    let plugin = folder.join("authz-teams.wasm");
    let teams = json!([{"uids": [uid()], "exports": ["web-"]},
                       {"units": ["Backup"], "exports": [""]}]);
    let config = json!({"config": {"teams": teams}});
    assert_eq!(verdicts(&plugin, "authz-teams", config), [Some(true), None]);
    let mine = json!([{"uids": [uid()], "exports": [""], "read-only": true}]);
    let config = json!({"config": {"teams": mine}});
    assert_eq!(
        verdicts(&plugin, "authz-teams", config),
        [Some(false), Some(false)]
    );
}
