//! Which certificate a server shows, what its key may look like, and whom clients and servers
//! believe beside the plain cases of `main.rs`.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::json;

use super::node::{Kit, try_node};
use super::pki::{Profile, directory};
use super::support::{Daemon, eventually, has, with};
use super::{Served, World, free_port, gnutls_cli, psk, starttls};

/// qemu-img through an `nbd` node with these further options.
fn qemu_img(served: &Served, world: &World, client: &str, more: &str) -> bool {
    let object = format!(
        "tls-creds-x509,id=t,endpoint=client,sanity-check=off,dir={}",
        world.path(client).display()
    );
    let node = format!(
        "driver=nbd,port={},export=x,tls-creds=t,{more}",
        served.port
    );
    let info = Command::new("qemu-img")
        .args(["info", "--object", &object, "--image-opts", &node])
        .output();
    info.unwrap().status.success()
}

/// Whether qemu-nbd gets a list of exports.
fn qemu_nbd(served: &Served, world: &World, client: &str) -> bool {
    let object = format!(
        "tls-creds-x509,id=t,endpoint=client,dir={}",
        world.path(client).display()
    );
    let port = served.port.to_string();
    let list = Command::new("qemu-nbd")
        .args(["-L", "-b", "localhost", "-p", &port, "--tls-creds", "t"])
        .args(["--object", &object])
        .stderr(Stdio::null())
        .output();
    list.unwrap().status.success()
}

#[test]
fn every_client_finds_a_wrong_host_name() {
    if !(has("qemu-img") && has("nbdinfo") && has("gnutls-cli")) {
        return;
    }
    let world = World::new();
    world.server(
        "server",
        &Profile {
            hosts: vec!["other.example"],
            ..Profile::server()
        },
    );
    let served = Served::ours(&world);
    assert!(!served.admits(&world, "good"));
    assert!(!qemu_img(&served, &world, "good", "host=localhost"));
    let named = "host=localhost,tls-hostname=other.example";
    assert!(qemu_img(&served, &world, "good", named));
    assert!(!qemu_nbd(&served, &world, "good"));
    let said = gnutls_cli(&served, &world, "good", &[]);
    assert!(said.contains("does not match"), "{said}");
    let said = gnutls_cli(
        &served,
        &world,
        "good",
        &["--verify-hostname other.example"],
    );
    assert!(said.contains("The certificate is trusted"), "{said}");
}

#[test]
fn every_client_is_held_against_the_rule_for_its_name() {
    if !(has("qemu-img") && has("nbdinfo") && has("gnutls-cli")) {
        return;
    }
    let world = World::new();
    let az = ["--object", "authz-simple,id=az,identity=CN=good"];
    let served = Served::by(Daemon::start(&az), &world, json!({"tls-authz": "az"}));
    for (client, admitted) in [("good", true), ("bob", false), ("revoked", false)] {
        assert_eq!(served.admits(&world, client), admitted, "libnbd {client}");
        let host = "host=localhost";
        assert_eq!(
            qemu_img(&served, &world, client, host),
            admitted,
            "qemu-img {client}"
        );
        assert_eq!(
            qemu_nbd(&served, &world, client),
            admitted,
            "qemu-nbd {client}"
        );
    }
    // gnutls-cli speaks no NBD: it shakes hands, and hears the end if it is denied.
    for client in ["expired", "revoked", "strange"] {
        let said = gnutls_cli(&served, &world, client, &[]);
        assert!(said.contains("rror"), "{client}: {said}");
    }
    gnutls_cli(&served, &world, "bob", &[]);
    // The last one left when its own side was done.
    eventually("each denial is told", || {
        let denial = "TLS x509 authz check for CN=bob is denied";
        served.daemon.log().matches(denial).count() == 4
    });
}

#[test]
fn gnutls_own_client_shows_its_key() {
    if !(has("gnutls-cli") && has("psktool")) {
        return;
    }
    let world = World::new();
    psk::keys(&world);
    let daemon = Daemon::start(&[]);
    let port = psk::serve(&daemon, &world);
    let key = |folder: &str| {
        let text = fs::read_to_string(world.path(folder).join("keys.psk")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("alice:"));
        line.unwrap().to_owned()
    };
    for version in ["1.2", "1.3"] {
        for (folder, admitted) in [("own", true), ("other", false)] {
            let options = format!(
                "--pskusername alice --pskkey {} --priority \
                 NORMAL:-VERS-ALL:+VERS-TLS{version}:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK",
                key(folder)
            );
            let said = starttls(port, &options);
            let shaken = said.contains("PSK authentication");
            assert_eq!(shaken, admitted, "{version} {folder}: {said}");
        }
    }
}

#[test]
fn the_name_that_a_client_asks_for_chooses_among_identities() {
    if !has("gnutls-cli") {
        return;
    }
    let world = World::new();
    let folder = world.path("server");
    for (number, host) in [(0, "zero.example"), (1, "one.example")] {
        let own = world.authority.issue(&Profile {
            hosts: vec![host],
            ..Profile::server()
        });
        let file = |kind: &str| folder.join(format!("server-{kind}-{number}.pem"));
        fs::write(file("cert"), own.pem()).unwrap();
        fs::write(file("key"), own.key.serialize_pem()).unwrap();
    }
    let served = Served::ours(&world);
    // Each is shown under its own name; who asks for none of them gets the first.
    for (asked, shown) in [
        ("localhost", "localhost"),
        ("zero.example", "zero.example"),
        ("one.example", "one.example"),
        ("two.example", "localhost"),
    ] {
        let names = format!("--sni-hostname {asked} --verify-hostname {shown}");
        let said = gnutls_cli(&served, &world, "good", &[&names]);
        assert!(
            said.contains("The certificate is trusted"),
            "{asked}: {said}"
        );
    }
}

#[test]
fn an_encrypted_key_shakes_hands() {
    if !(has("openssl") && has("nbdinfo")) {
        return;
    }
    let world = World::new();
    let clear = world.path("clear.pem");
    let key = world.path("server/server-key.pem");
    fs::rename(&key, &clear).unwrap();
    let done = Command::new("openssl")
        .args(["pkcs8", "-topk8", "-passout", "pass:secret", "-in"])
        .arg(&clear)
        .arg("-out")
        .arg(&key)
        .output();
    assert!(done.unwrap().status.success());
    let secret = ["--object", "secret,id=s,data=secret"];
    let daemon = Daemon::start(&secret);
    let mut qmp = daemon.qmp();
    let object = world.object("tls1", "server", "server");
    qmp.ok("object-add", with(object, &json!({"passwordid": "s"})));
    let port = free_port();
    let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
    qmp.ok("blockdev-add", node);
    let address = json!({"type": "inet",
        "data": {"host": "localhost", "port": port.to_string(), "ipv6": false}});
    qmp.ok(
        "nbd-server-start",
        json!({"addr": address, "tls-creds": "tls1"}),
    );
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "x"});
    qmp.ok("block-export-add", export);
    let served = Served { daemon, qmp, port };
    assert!(served.admits(&world, "good"));
}

/// Adds a list of what the authority took back to a directory of credentials.
fn revoke(world: &World, folder: &str, serials: &[u32], until: &str) {
    let crl = world.authority.revoke(serials, until);
    fs::write(world.path(folder).join("ca-crl.pem"), crl).unwrap();
}

#[test]
fn a_list_that_expired_lets_nobody_in_unlike_qemu() {
    if !(has("nbdinfo") && has("qemu-storage-daemon")) {
        return;
    }
    let world = World::new();
    let mut ours = Served::ours(&world);
    assert!(ours.admits(&world, "good"));
    revoke(&world, "server", &[], "210101000000Z");
    let again = json!({"path": "/objects/tls0", "property": "dir", "value": world.path("server")});
    ours.qmp.ok("qom-set", again);
    assert!(!ours.admits(&world, "good"));
    let log = ours.daemon.log();
    assert!(log.contains("revocation list expired"), "{log}");
    // GnuTLS does not look at a list's dates.
    let theirs = Served::by(Daemon::qsd(&[]).unwrap(), &world, json!({}));
    assert!(theirs.admits(&world, "good"));
}

#[test]
fn a_client_that_is_revoked_stays_out_from_the_next_list_on() {
    if !has("nbdinfo") {
        return;
    }
    let world = World::new();
    let leaves = world.client("leaves", &Profile::client("leaves"));
    let mut served = Served::ours(&world);
    assert!(served.admits(&world, "leaves"));
    revoke(&world, "server", &[leaves.serial], "491231000000Z");
    assert!(served.admits(&world, "leaves"), "nothing was loaded yet");
    let again = json!({"path": "/objects/tls0", "property": "dir", "value": world.path("server")});
    served.qmp.ok("qom-set", again);
    assert!(!served.admits(&world, "leaves"));
    assert!(served.admits(&world, "good"));
}

#[test]
fn our_node_does_not_believe_a_revoked_server() {
    if !has("nbdkit") {
        return;
    }
    let world = World::new();
    let server = world.authority.issue(&Profile::server());
    directory(
        &world.path("taken-back"),
        &world.authority,
        Some(("server", &server)),
    );
    let certificates = |name: &str| format!("--tls-certificates={}", world.path(name).display());
    let kits = ["taken-back", "server"].map(|it| Kit::start(&["--tls=require", &certificates(it)]));
    revoke(&world, "good", &[server.serial], "491231000000Z");
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qmp.ok("object-add", world.object("good", "good", "client"));
    let tls = json!({"tls-creds": "good"});
    let tried = kits.each_ref().map(|it| try_node(&mut qmp, it.port, &tls));
    // QEMU's clients read no list.
    let refused = tried[0].as_ref().unwrap_err();
    assert!(refused.contains("revoked"), "{refused}");
    assert!(tried[1].is_ok(), "{tried:?}");
}

#[test]
fn files_that_are_no_regular_credentials_are_refused() {
    let world = World::new();
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    // Larger than any honest one: it is not read into memory.
    let path = world.path("server/ca-crl.pem");
    fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
    let said = qmp.err("object-add", world.object("t", "server", "server"));
    assert!(
        said.contains("ca-crl.pem") && said.contains("too large"),
        "{said}"
    );
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let said = qmp.err("object-add", world.object("t", "server", "server"));
    assert!(said.contains("ca-crl.pem"), "{said}");
}
