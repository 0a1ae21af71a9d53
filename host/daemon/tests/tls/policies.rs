//! What TLS proved reaches the policies: names of workloads, users of keys, and whether anybody
//! was asked at all.

use std::process::Command;

use serde_json::{Value, json};

use super::pki::Profile;
use super::support::{Daemon, OUTPORTD, has};
use super::{PYTHON, Served, World, psk};

/// Tells what libnbd may do with an export: `null` if it is not let in.
const VISIT: &str = r#"
import json, sys, nbd
uri, name = sys.argv[1:]
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.set_opt_mode(True)
h.connect_uri(uri)
listed = []
h.opt_list(lambda found, description: listed.append(found))
def tried(what):
    try:
        what()
        return True
    except nbd.Error:
        return False
h.set_export_name(name)
told = {"listed": sorted(listed), "enters": tried(h.opt_go)}
if told["enters"]:
    told["read-only"] = h.is_read_only()
    told["reads"] = tried(lambda: h.pread(512, 0))
    h.set_strict_mode(0)
    told["writes"] = tried(lambda: h.pwrite(b"x" * 512, 0))
print(json.dumps(told))
"#;

fn visit(served: &Served, world: &World, client: &str, export: &str) -> Value {
    let uri = format!(
        "nbds://localhost:{}/?tls-certificates={}",
        served.port,
        world.path(client).display()
    );
    let said = Command::new("timeout")
        .args(["20", PYTHON, "-c", VISIT, &uri, export])
        .output()
        .unwrap();
    assert!(said.status.success(), "{client}: {said:?}");
    serde_json::from_slice(&said.stdout).unwrap()
}

fn build_spiffe(daemon: &Daemon) -> String {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/authz-spiffe");
    let plugin = daemon.text("spiffe.wasm");
    let builder = std::path::Path::new(OUTPORTD).with_file_name("outport-plugin-build");
    let built = Command::new(builder)
        .args([example, "-o", &plugin])
        .output();
    let built = built.unwrap();
    assert!(built.status.success(), "{built:?}");
    plugin
}

const RULES: &str = "\
    # WHO                                  EXPORTS   MAY\n\
    spiffe://acme.example/backup/*         *         read\n\
    spiffe://acme.example/vm/web           web-*     write\n";

#[test]
fn workloads_may_what_the_operator_s_file_says() {
    if !has(PYTHON) {
        return;
    }
    let world = World::new();
    // One distinguished name for all: only the alternative names tell them apart.
    for (client, uris) in [
        ("web", vec!["spiffe://acme.example/vm/web"]),
        ("backup", vec!["spiffe://acme.example/backup/nightly"]),
        ("batch", vec!["spiffe://acme.example/vm/batch"]),
        ("foreign", vec!["spiffe://evil.example/vm/web"]),
        ("nameless", vec![]),
        (
            "two",
            vec![
                "spiffe://acme.example/vm/web",
                "spiffe://acme.example/backup/x",
            ],
        ),
    ] {
        let profile = Profile {
            uris,
            ..Profile::client("workload")
        };
        world.client(client, &profile);
    }
    let mut served = Served::ours(&world);
    let daemon = &served.daemon;
    let (plugin, rules) = (build_spiffe(daemon), daemon.text("rules"));
    std::fs::write(&rules, RULES).unwrap();
    for object in [
        json!({"qom-type": "wasm-plugin", "id": "p", "filename": plugin, "allow-unpinned": true}),
        json!({"qom-type": "authz-wasm", "id": "az", "plugin": "p",
            "config": {"trust-domain": "acme.example"}, "files": {"rules": rules}}),
    ] {
        served.qmp.ok("object-add", object);
    }
    served.qmp.ok("block-export-del", json!({"id": "e"}));
    for name in ["web-1", "db"] {
        let export = json!({"type": "nbd", "id": name, "node-name": "n", "name": name,
            "writable": true, "authz": "az"});
        served.qmp.ok("block-export-add", export);
    }
    let denied = |listed: &[&str]| json!({"listed": listed, "enters": false});
    let enters = |listed: &[&str], writes: bool| {
        json!({"listed": listed, "enters": true, "read-only": !writes, "reads": true,
            "writes": writes})
    };
    let cases = [
        ("web", "web-1", enters(&["web-1"], true)),
        ("web", "db", denied(&["web-1"])),
        ("backup", "web-1", enters(&["db", "web-1"], false)),
        ("backup", "db", enters(&["db", "web-1"], false)),
        ("batch", "web-1", denied(&[])),
        ("foreign", "web-1", denied(&[])),
        ("nameless", "db", denied(&[])),
        ("two", "web-1", denied(&[])),
    ];
    for (client, export, wanted) in cases {
        assert_eq!(
            visit(&served, &world, client, export),
            wanted,
            "{client} at {export}"
        );
    }
    let totals = served.qmp.ok("query-authz", json!({}))[0].clone();
    let denial = totals["last-denial"].as_str().unwrap();
    let names = " identity='CN=workload' san='URI:spiffe://acme.example/vm/web'";
    assert!(
        denial.contains(names) && denial.contains("several URIs"),
        "{denial}"
    );
    let log = served.daemon.log();
    let line = log.lines().find(|it| it.contains("access denied")).unwrap();
    assert!(
        line.contains("san='URI:spiffe://acme.example/vm/web' fingerprint="),
        "{line}"
    );
    // The next decision is made by the file as it is then; one with a mistake lets nobody in.
    std::fs::write(&rules, "spiffe://acme.example/vm/batch db write\n").unwrap();
    assert_eq!(visit(&served, &world, "batch", "db"), enters(&["db"], true));
    assert_eq!(visit(&served, &world, "web", "web-1"), denied(&[]));
    std::fs::write(&rules, "nonsense\n").unwrap();
    assert_eq!(visit(&served, &world, "batch", "db"), denied(&[]));
}

#[test]
fn who_knows_a_key_is_told_by_name() {
    if !(has("psktool") && has("nbdinfo")) {
        return;
    }
    let world = World::new();
    psk::keys(&world);
    let daemon = Daemon::start(&[]);
    let port = psk::serve(&daemon, &world);
    let mut qmp = daemon.qmp();
    let simple = json!({"qom-type": "authz-simple", "id": "az", "identity": "somebody"});
    qmp.ok("object-add", simple);
    let export = json!({"type": "nbd", "id": "y", "node-name": "n", "name": "y", "authz": "az"});
    qmp.ok("block-export-add", export);
    let uri = format!(
        "nbds://alice@localhost:{port}/y?tls-psk-file={}",
        world.path("own").join("keys.psk").display()
    );
    let info = Command::new("timeout")
        .args(["20", "nbdinfo", "--size", &uri])
        .output();
    assert!(!info.unwrap().status.success());
    let totals = qmp.ok("query-authz", json!({}))[0].clone();
    let denial = totals["last-denial"].as_str().unwrap();
    assert!(denial.contains(" psk-user='alice' at 'y': "), "{denial}");
}

#[test]
fn a_strict_server_wants_somebody_to_be_asked() {
    if !has("nbdinfo") {
        return;
    }
    let world = World::new();
    let strict = json!({"strict-authz": true});
    let served = Served::by(Daemon::start(&[]), &world, strict);
    // A good certificate alone is no policy.
    assert!(!served.admits(&world, "good"));
    let log = served.daemon.log();
    assert!(
        log.contains("strict-authz: no policy is configured"),
        "{log}"
    );
    let strict = json!({"strict-authz": true, "tls-authz": "az"});
    let az = ["--object", "authz-simple,id=az,identity=CN=good"];
    let mut served = Served::by(Daemon::start(&az), &world, strict);
    assert!(served.admits(&world, "good"));
    assert!(!served.admits(&world, "bob"));
    // Who need not prove a name is not asked, and so nobody was.
    let change = json!({"path": "/objects/tls0", "property": "verify-peer", "value": false});
    served.qmp.ok("qom-set", change);
    assert!(!served.admits(&world, "nobody"));
}
