//! TLS: other people's clients and servers against ours, and ours against theirs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../support/mod.rs"]
mod support;

mod hostile;
mod identities;
mod names;
mod node;
mod pki;
mod policies;
mod psk;
mod reload;
mod words;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use pki::{Issued, Profile, directory};
use serde_json::json;
use support::{Daemon, Qmp, eventually, has};
use tempfile::TempDir;

/// The distribution's, which sees the distribution's modules.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// Directories of credentials of one authority, and of a stranger.
pub(crate) struct World {
    folder: TempDir,
    pub(crate) authority: Issued,
    pub(crate) stranger: Issued,
}

impl World {
    pub(crate) fn new() -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
            authority: Issued::root(&Profile::authority("authority")),
            stranger: Issued::root(&Profile::authority("stranger")),
        };
        let server = world.authority.issue(&Profile::server());
        directory(
            &world.path("server"),
            &world.authority,
            Some(("server", &server)),
        );
        world.client("good", &Profile::client("good"));
        world.client("bob", &Profile::client("bob"));
        world.client("expired", &Profile::client("good").expired());
        let revoked = world.client("revoked", &Profile::client("good"));
        let crl = world.authority.revoke(&[revoked.serial], "491231000000Z");
        std::fs::write(world.path("server/ca-crl.pem"), crl).unwrap();
        let strange = world.stranger.issue(&Profile::client("good"));
        let strange = Some(("client", &strange));
        directory(&world.path("strange"), &world.authority, strange);
        directory(&world.path("nobody"), &world.authority, None);
        directory(&world.path("distrusting"), &world.stranger, strange);
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn client(&self, name: &str, profile: &Profile) -> Issued {
        let issued = self.authority.issue(profile);
        directory(&self.path(name), &self.authority, Some(("client", &issued)));
        issued
    }

    pub(crate) fn server(&self, name: &str, profile: &Profile) {
        let issued = self.authority.issue(profile);
        directory(&self.path(name), &self.authority, Some(("server", &issued)));
    }

    /// Arguments of `object-add`.
    pub(crate) fn object(&self, id: &str, name: &str, endpoint: &str) -> serde_json::Value {
        json!({"qom-type": "tls-creds-x509", "id": id, "dir": self.path(name),
            "endpoint": endpoint, "sanity-check": false})
    }
}

/// A TCP port that nobody has now, and that is nobody's own end of a connection before it is used:
/// those are above 32768.
pub(crate) fn free_port() -> u16 {
    static TRIED: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id() as u16 % 10_000;
    loop {
        let port = 12_000 + (first + TRIED.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Serves a null node as `x` over TLS on a port of its own.
pub(crate) struct Served {
    pub(crate) daemon: Daemon,
    pub(crate) qmp: Qmp,
    pub(crate) port: u16,
}

impl Served {
    pub(crate) fn by(daemon: Daemon, world: &World, more: serde_json::Value) -> Self {
        let mut qmp = daemon.qmp();
        let port = free_port();
        qmp.ok(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n", "size": 1 << 20, "read-zeroes": true}),
        );
        qmp.ok("object-add", world.object("tls0", "server", "server"));
        let start = json!({"addr": {"type": "inet",
            "data": {"host": "localhost", "port": port.to_string(), "ipv6": false}},
            "tls-creds": "tls0"});
        qmp.ok("nbd-server-start", support::with(start, &more));
        qmp.ok(
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "n", "name": "x"}),
        );
        Self { daemon, qmp, port }
    }

    pub(crate) fn ours(world: &World) -> Self {
        Self::by(Daemon::start(&[]), world, json!({}))
    }

    /// Whether nbdinfo gets in with these credentials.
    pub(crate) fn admits(&self, world: &World, client: &str) -> bool {
        self.admits_as(world, client, "localhost")
    }

    pub(crate) fn admits_as(&self, world: &World, client: &str, host: &str) -> bool {
        let folder = world.path(client);
        let uri = format!(
            "nbds://{host}:{}/x?tls-certificates={}",
            self.port,
            folder.display()
        );
        let info = Command::new("timeout")
            .args(["20", "nbdinfo", "--size", &uri])
            .stderr(Stdio::null())
            .output();
        let info = info.unwrap();
        info.status.success() && info.stdout == b"1048576\n"
    }
}

const CLIENTS: [(&str, bool); 6] = [
    ("good", true),
    ("expired", false),
    ("strange", false),
    ("revoked", false),
    ("nobody", false),
    ("distrusting", false),
];

#[test]
fn libnbd_is_served_if_its_certificate_is_good() {
    if !has("nbdinfo") {
        return;
    }
    let world = World::new();
    let served = Served::ours(&world);
    for (client, admitted) in CLIENTS {
        assert_eq!(served.admits(&world, client), admitted, "{client}");
    }
    assert!(
        !served.admits_as(&world, "good", "127.0.0.1"),
        "wrong host name"
    );
    assert!(served.admits(&world, "good"));
    let log = served.daemon.log();
    assert!(log.contains("TLS client refused"), "{log}");
}

#[test]
fn qemus_clients_are_served_if_their_certificate_is_good() {
    if !has("qemu-img") {
        return;
    }
    let world = World::new();
    let served = Served::ours(&world);
    for (client, admitted) in CLIENTS {
        for priority in [
            "NORMAL",
            "NORMAL:-VERS-TLS1.3",
            "NORMAL:-VERS-ALL:+VERS-TLS1.3",
        ] {
            let object = format!(
                "tls-creds-x509,id=t,endpoint=client,priority={priority},sanity-check=off,dir={}",
                world.path(client).display()
            );
            let node = format!(
                "driver=nbd,host=localhost,port={},export=x,tls-creds=t",
                served.port
            );
            let info = Command::new("qemu-img")
                .args(["info", "--object", &object, "--image-opts", &node])
                .output();
            let info = info.unwrap();
            assert_eq!(
                info.status.success(),
                admitted,
                "{client} {priority}: {info:?}"
            );
        }
    }
    let object = format!(
        "tls-creds-x509,id=t,endpoint=client,dir={}",
        world.path("good").display()
    );
    let port = served.port.to_string();
    let list = Command::new("qemu-nbd")
        .args(["-L", "-b", "localhost", "-p", &port, "--tls-creds", "t"])
        .args(["--object", &object])
        .output();
    let list = list.unwrap();
    assert!(list.status.success(), "{list:?}");
    assert!(String::from_utf8_lossy(&list.stdout).contains("export: 'x'"));
}

#[test]
fn policies_are_asked_for_the_name_in_the_certificates_order() {
    if !has("nbdinfo") {
        return;
    }
    let world = World::new();
    let more = json!({"tls-authz": "az"});
    let mut served = Served::by(Daemon::start(&[]), &world, more);
    // There is no such object: nobody gets in.
    assert!(!served.admits(&world, "good"));
    let simple = json!({"qom-type": "authz-simple", "id": "az", "identity": "CN=good"});
    served.qmp.ok("object-add", simple);
    assert!(served.admits(&world, "good"));
    assert!(!served.admits(&world, "bob"));
    let change = json!({"path": "/objects/az", "property": "identity", "value": "CN=bob"});
    served.qmp.ok("qom-set", change);
    assert!(!served.admits(&world, "good"));
    assert!(served.admits(&world, "bob"));
    let log = served.daemon.log();
    assert!(
        log.contains("TLS x509 authz check for CN=good is denied"),
        "{log}"
    );
}

#[test]
fn who_need_not_prove_who_it_is_is_not_asked() {
    if !has("nbdinfo") {
        return;
    }
    let world = World::new();
    let daemon = Daemon::start(&[]);
    let mut served = Served::by(daemon, &world, json!({"tls-authz": "nosuch"}));
    assert!(!served.admits(&world, "nobody"));
    let change = json!({"path": "/objects/tls0", "property": "verify-peer", "value": false});
    served.qmp.ok("qom-set", change);
    assert!(served.admits(&world, "nobody"));
}

/// Bytes that [`copy_there_and_back`] needs.
pub(crate) const COPIED: usize = 4 << 20;

/// nbdcopy writes to an export and reads it, in requests of each of the sizes.
#[track_caller]
pub(crate) fn copy_there_and_back(world: &World, uri: &str, sizes: &[&str]) {
    let content: Vec<u8> = (0..COPIED as u32)
        .map(|n| (n ^ n >> 9 ^ n >> 17) as u8)
        .collect();
    let [from, back] = ["from", "back"].map(|name| world.path(name));
    std::fs::write(&from, &content).unwrap();
    let files = [&from, &back].map(|file| file.to_str().unwrap());
    for size in sizes {
        let _old = std::fs::remove_file(&back);
        for (source, target) in [(files[0], uri), (uri, files[1])] {
            let copied = Command::new("timeout")
                .args(["60", "nbdcopy", "--request-size", size, source, target])
                .status();
            assert!(copied.unwrap().success(), "{size} {source} {target}");
        }
        assert!(std::fs::read(&back).unwrap() == content, "{size} {uri}");
    }
}

#[test]
fn bytes_arrive_as_they_were_sent() {
    if !(has("nbdcopy") && has("qemu-img")) {
        return;
    }
    let world = World::new();
    let mut served = Served::ours(&world);
    std::fs::write(world.path("raw"), vec![0; COPIED]).unwrap();
    support::qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        world.path("q").to_str().unwrap(),
        "4M",
    ]);
    for (id, driver, file) in [("raw", "raw", "raw"), ("q", "qcow2", "q")] {
        let node = json!({"driver": driver, "node-name": id,
            "file": {"driver": "file", "filename": world.path(file)}});
        served.qmp.ok("blockdev-add", node);
        let export = json!({"type": "nbd", "id": id, "node-name": id, "writable": true});
        served.qmp.ok("block-export-add", export);
        let uri = format!(
            "nbds://localhost:{}/{id}?tls-certificates={}",
            served.port,
            world.path("good").display()
        );
        // Small and large requests, read and written.
        copy_there_and_back(&world, &uri, &["4096", "65536", "1048576"]);
    }
}

/// gnutls-cli with a client's certificate; what it said.
pub(crate) fn gnutls_cli(served: &Served, world: &World, client: &str, more: &[&str]) -> String {
    let folder = world.path(client);
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let options = format!(
        "--x509cafile {} --x509certfile {} --x509keyfile {} {}",
        file("ca-cert.pem"),
        file("client-cert.pem"),
        file("client-key.pem"),
        more.join(" ")
    );
    starttls(served.port, &options)
}

/// gnutls-cli with these options, which speaks TLS after the bytes of its input; what it said.
pub(crate) fn starttls(port: u16, options: &str) -> String {
    let line = format!("exec timeout 60 gnutls-cli --starttls -p {port} {options} localhost 2>&1");
    let mut child = Command::new("sh")
        .args(["-c", &line])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    // Fixed newstyle without zeroes, STARTTLS. It shows the server's acknowledgement, and begins
    // TLS when the input ends.
    stdin
        .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0")
        .unwrap();
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !said.ends_with(b"\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0")
        && stdout.read(&mut byte).unwrap() == 1
    {
        said.push(byte[0]);
    }
    drop(stdin);
    stdout.read_to_end(&mut said).unwrap();
    child.wait().unwrap();
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn gnutls_own_client_shakes_hands() {
    if !has("gnutls-cli") {
        return;
    }
    let world = World::new();
    let served = Served::ours(&world);
    for version in ["1.2", "1.3"] {
        let priority = format!("--priority NORMAL:-VERS-ALL:+VERS-TLS{version}");
        let said = gnutls_cli(&served, &world, "good", &[&priority]);
        let wanted = format!("(TLS{version}-X.509)");
        assert!(
            said.contains("The certificate is trusted") && said.contains(&wanted),
            "{said}"
        );
        let said = gnutls_cli(&served, &world, "strange", &[&priority]);
        assert!(said.contains("rror"), "{said}");
    }
    // Older versions are not spoken.
    let said = gnutls_cli(
        &served,
        &world,
        "good",
        &["--priority NORMAL:-VERS-ALL:+VERS-TLS1.1"],
    );
    assert!(!said.contains("Handshake was completed"), "{said}");
    eventually("nobody is left", || {
        served.daemon.log().contains("TLS client refused")
    });
}
