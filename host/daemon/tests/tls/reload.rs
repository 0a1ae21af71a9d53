//! New certificates for a running server: by `qom-set`, or by an object that replaces another.

use serde_json::json;

use super::pki::{Issued, Profile, directory};
use super::support::has;
use super::{PYTHON, Served, World};

#[test]
fn certificates_are_replaced_while_clients_stay() {
    if !(has("nbdinfo") && has("nbdsh") && has(PYTHON)) {
        return;
    }
    let world = World::new();
    let mut served = Served::ours(&world);
    let mut stays = staying(&served, &world);
    // The authority changes: yesterday's clients are strangers to new connections.
    let other = Issued::root(&Profile::authority("other"));
    let server = other.issue(&Profile::server());
    directory(&world.path("server"), &other, Some(("server", &server)));
    std::fs::remove_file(world.path("server/ca-crl.pem")).unwrap();
    let client = other.issue(&Profile::client("good"));
    directory(&world.path("new"), &other, Some(("client", &client)));
    assert!(served.admits(&world, "good"), "nothing was loaded yet");
    let again = json!({"path": "/objects/tls0", "property": "dir",
        "value": world.path("server")});
    served.qmp.ok("qom-set", again.clone());
    assert!(served.admits(&world, "new"));
    assert!(!served.admits(&world, "good"));
    // What cannot be loaded changes nothing.
    std::fs::write(world.path("server/server-key.pem"), "junk").unwrap();
    assert!(served.qmp.err("qom-set", again).contains("Cannot load"));
    assert!(served.admits(&world, "new"));
    // An object of the same id takes the place of the one that was deleted.
    served.qmp.ok("object-del", json!({"id": "tls0"}));
    assert!(served.admits(&world, "new"), "the server keeps what it has");
    let back = world.authority.issue(&Profile::server());
    directory(
        &world.path("server"),
        &world.authority,
        Some(("server", &back)),
    );
    served
        .qmp
        .ok("object-add", world.object("tls0", "server", "server"));
    assert!(served.admits(&world, "good"));
    assert!(!served.admits(&world, "new"));
    // The client of the first certificates has been served all the time.
    stays.go_on();
}

/// libnbd with a connection, which reads when it is told to.
struct Staying(std::process::Child);

fn staying(served: &Served, world: &World) -> Staying {
    use std::process::{Command, Stdio};
    let uri = format!(
        "nbds://localhost:{}/x?tls-certificates={}",
        served.port,
        world.path("good").display()
    );
    let script = "import sys, nbd\nh = nbd.NBD()\nh.set_uri_allow_local_file(True)\n\
                  h.connect_uri(sys.argv[1])\nh.pread(512, 0)\nprint('in', flush=True)\n\
                  sys.stdin.readline()\nh.pread(65536, 0)\nprint('still', flush=True)";
    let mut child = Command::new(PYTHON)
        .args(["-c", script, &uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(line(&mut child), "in");
    Staying(child)
}

/// The next line, byte by byte: what follows stays for the next call.
fn line(child: &mut std::process::Child) -> String {
    use std::io::Read;
    let mut said = String::new();
    let mut byte = [0];
    while child.stdout.as_mut().unwrap().read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        said.push(char::from(byte[0]));
    }
    said
}

impl Staying {
    fn go_on(&mut self) {
        use std::io::Write;
        self.0.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        assert_eq!(line(&mut self.0), "still");
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Staying {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}
