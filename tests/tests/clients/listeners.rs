//! Every kind of listener: TCP of both versions, abstract unix sockets, inherited descriptors.

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;

use outport_tests::nbd::Address;
use outport_tests::{Daemon, Server, assert_same, qemu_img, requires, run};

use super::{EXPORTS, SIZE, Served};

/// Every client that understands the address reads both exports through it.
fn everyone_reads_through(served: Served) {
    let copy = served.daemon.path("copy.raw");
    let copy_str = copy.to_str().expect("temp paths are UTF-8");
    for export in EXPORTS {
        let mut client = served.daemon.client(export);
        let read = client
            .read(0, SIZE as u32)
            .expect("it answers")
            .expect("it reads");
        assert_same(&read, &served.content, export);
        client.disconnect().expect("a goodbye is heard");
        if requires("qemu-img") {
            let options = qemu_options(served.daemon.nbd(), export);
            qemu_img(&["convert", "--image-opts", "-O", "raw", &options, copy_str]);
            let read = fs::read(&copy).expect("qemu-img wrote it");
            assert_same(&read, &served.content, export);
        }
        // libnbd's URIs cannot name an abstract socket.
        if !matches!(served.daemon.nbd(), Address::Abstract(_)) && requires("nbdcopy") {
            run("nbdcopy", &[&served.daemon.uri(export), copy_str]);
            let read = fs::read(&copy).expect("nbdcopy wrote it");
            assert_same(&read, &served.content, export);
        }
    }
    served.ends_unchanged();
}

fn qemu_options(address: &Address, export: &str) -> String {
    let server = match address {
        Address::Unix(path) => format!("server.type=unix,server.path={}", path.display()),
        Address::Abstract(name) => {
            format!("server.type=unix,server.path={name},server.abstract=on")
        }
        Address::Tcp(at) => {
            format!(
                "server.type=inet,server.host={},server.port={}",
                at.ip(),
                at.port()
            )
        }
    };
    format!("driver=nbd,export={export},{server}")
}

#[test]
fn clients_read_over_tcp_version_4() {
    let address = Address::free_tcp(Ipv4Addr::LOCALHOST).expect("IPv4 loopback exists");
    let builder = Daemon::builder(Server::under_test());
    everyone_reads_through(Served::on(builder.nbd_at(address.clone(), "")));
}

#[test]
fn clients_read_over_tcp_version_6() {
    let Ok(address) = Address::free_tcp(Ipv6Addr::LOCALHOST) else {
        eprintln!("SKIPPED: this machine has no IPv6 loopback");
        return;
    };
    let builder = Daemon::builder(Server::under_test());
    everyone_reads_through(Served::on(builder.nbd_at(address, "")));
}

#[test]
fn clients_read_over_an_abstract_unix_socket() {
    let name = format!("outport-test-{}", std::process::id());
    let builder = Daemon::builder(Server::under_test());
    everyone_reads_through(Served::on(builder.nbd_at(Address::Abstract(name), "")));
}

#[test]
fn clients_read_over_an_inherited_unix_listener() {
    let builder = Daemon::builder(Server::under_test());
    let path = builder.path("inherited.sock");
    let listener = UnixListener::bind(&path).expect("the temp folder is writable");
    everyone_reads_through(Served::on(builder.nbd_on_fd(listener, Address::Unix(path))));
}

#[test]
fn clients_read_over_an_inherited_tcp_listener() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("IPv4 loopback exists");
    let address = Address::Tcp(
        listener
            .local_addr()
            .expect("a bound socket has an address"),
    );
    let builder = Daemon::builder(Server::under_test());
    everyone_reads_through(Served::on(builder.nbd_on_fd(listener, address)));
}

#[test]
fn the_nbd_crate_reads_over_tcp() {
    let address = Address::free_tcp(Ipv4Addr::LOCALHOST).expect("IPv4 loopback exists");
    let Address::Tcp(at) = address else {
        unreachable!("it was asked for TCP")
    };
    let served = Served::on(Daemon::builder(Server::under_test()).nbd_at(address, ""));
    let mut stream = TcpStream::connect(at).expect("it listens");
    let told = nbd::client::handshake(&mut stream, b"raw").expect("it serves");
    let mut read = vec![0; SIZE];
    let mut client = nbd::client::NbdClient::new(&mut stream, &told);
    client.read_exact(&mut read).expect("it reads");
    assert_same(&read, &served.content, "raw");
    drop(stream);
    served.ends_unchanged();
}
