//! Exports and servers that go away under their clients, and clients under their server.

use std::io::Write;

use outport_tests::nbd::wire::{cmd, cmd_flag, opt, rep};
use outport_tests::nbd::{Haggle, Request};
use outport_tests::{Daemon, Server, TempImage, assert_same, eventually, qemu_img, try_run};
use serde_json::{Value, json};

use super::{Disk, MIB};

fn exports(disk: &mut Disk) -> usize {
    let list = disk.daemon.qmp.ok("query-block-exports", json!({}));
    list.as_array().map_or(0, Vec::len)
}

fn delete(disk: &mut Disk, mode: &str) -> Result<Value, outport_tests::QmpError> {
    disk.daemon
        .qmp
        .execute("block-export-del", json!({"id": "disk", "mode": mode}))
}

#[test]
fn hard_delete_cuts_an_attached_client() {
    let mut disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    client.read(0, 512).unwrap().unwrap();
    delete(&mut disk, "hard").unwrap();
    assert!(client.closed());
    let event = disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
    assert_eq!(event["data"], json!({"id": "disk"}));
    assert_eq!(exports(&mut disk), 0);
    assert!(
        disk.daemon.qmp.events("BLOCK_EXPORT_DELETED").is_empty(),
        "told twice"
    );
}

#[test]
fn safe_delete_waits_for_the_client_to_leave() {
    let mut disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    client.read(0, 512).unwrap().unwrap();
    let error = delete(&mut disk, "safe").unwrap_err();
    assert_eq!(error.desc, "export 'disk' still in use");
    assert!(client.read(0, 512).unwrap().is_ok(), "the client goes on");
    client.disconnect().unwrap();
    eventually("a safe delete succeeds after the client has left", || {
        delete(&mut disk, "safe").ok()
    });
    disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
}

#[test]
fn a_client_that_only_haggles_does_not_hold_the_export() {
    let mut disk = Disk::new();
    let mut haggle = disk.daemon.haggle();
    haggle.query(opt::INFO, "disk", &[]).unwrap().unwrap();
    delete(&mut disk, "safe").unwrap();
    disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
    let refused = haggle.query(opt::GO, "disk", &[]).unwrap().unwrap_err();
    assert_eq!(refused.kind, rep::ERR_UNKNOWN);
}

#[test]
fn a_deleted_export_can_be_added_again() {
    let mut disk = Disk::new();
    for _ in 0..20 {
        let mut client = disk.daemon.client("disk");
        client.write(0, &[3; 512]).unwrap().unwrap();
        delete(&mut disk, "hard").unwrap();
        disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
        disk.daemon.add_export("disk", true);
    }
    disk.still_serves();
}

#[test]
fn hard_delete_with_requests_in_flight_loses_no_acknowledged_write() {
    let mut disk = Disk::new();
    let mut client = disk.daemon.simple_client("disk");
    for at in 0..64 {
        let request = client.request(0, cmd::WRITE, at * 4096, 4096);
        client.send(&request, &[0xcd; 4096]).unwrap();
    }
    let acknowledged: Vec<u64> = (0..16).map(|_| client.any_outcome().unwrap().0).collect();
    delete(&mut disk, "hard").unwrap();
    disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
    disk.daemon.add_export("disk", true);
    let mut reader = disk.daemon.client("disk");
    let first = acknowledged.iter().min().copied().unwrap_or(0);
    for cookie in acknowledged {
        let offset = (cookie - first) * 4096;
        assert_eq!(
            reader.read(offset, 4096).unwrap(),
            Ok(vec![0xcd; 4096]),
            "at {offset}"
        );
    }
}

#[test]
fn server_stop_cuts_everyone_and_the_server_starts_again() {
    let mut disk = Disk::new();
    let address = disk.daemon.nbd().clone();
    let mut greeted = Haggle::greeted(&address).unwrap();
    let mut haggling = disk.daemon.haggle();
    haggling.send(opt::GO, &[0, 0]).unwrap();
    let mut half_an_option = disk.daemon.haggle();
    half_an_option.raw(b"IHAVEOPT\0\0\0").unwrap();
    let mut attached = disk.daemon.client("disk");
    let mut mute = disk.daemon.simple_client("disk");
    // QEMU 10.0 sometimes never answers nbd-server-stop then.
    if !disk.is_qsd() {
        flood_without_reading(&mut mute);
    }
    disk.daemon.qmp.ok("nbd-server-stop", json!({}));
    for haggle in [&mut greeted, &mut haggling, &mut half_an_option] {
        assert!(haggle.closed());
    }
    assert!(attached.closed() && mute.closed());
    assert_eq!(exports(&mut disk), 0, "stopping removes every NBD export");
    disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
    let (_, desc) = disk.daemon.qmp.err("nbd-server-stop", json!({}));
    assert_eq!(desc, "NBD server not running");
    let path = address.path().to_str().expect("temp paths are UTF-8");
    let address = json!({"type": "unix", "data": {"path": path}});
    disk.daemon
        .qmp
        .ok("nbd-server-start", json!({"addr": address}));
    disk.daemon.add_export("disk", true);
    disk.still_serves();
}

/// Asks for many times what socket buffers hold, and reads nothing.
fn flood_without_reading(client: &mut outport_tests::nbd::Client) {
    for cookie in 0..64 {
        let request = Request {
            cookie,
            len: MIB as u32,
            ..Request::default()
        };
        client
            .socket()
            .write_all(&request.bytes())
            .expect("requests fit into the socket");
    }
}

#[test]
fn a_client_that_never_reads_does_not_stop_others_or_the_daemon() {
    let disk = Disk::new();
    let mut mutes: Vec<_> = (0..8).map(|_| disk.daemon.simple_client("disk")).collect();
    mutes.iter_mut().for_each(flood_without_reading);
    disk.still_serves();
    let mut client = disk.daemon.client("disk");
    assert_eq!(client.write(0, &[1; 4096]).unwrap(), Ok(()));
    assert_eq!(client.flush().unwrap(), Ok(()));
    if disk.is_qsd() {
        // QEMU 10.0 does not answer `quit` then.
        return;
    }
    disk.daemon.stop();
}

#[test]
fn quit_with_clients_attached_ends_cleanly() {
    let disk = Disk::new();
    let _greeted = Haggle::greeted(disk.daemon.nbd()).unwrap();
    let mut attached = disk.daemon.client("disk");
    attached.read(0, 512).unwrap().unwrap();
    disk.daemon.stop();
    assert!(attached.closed());
}

#[test]
fn max_connections_gives_slots_back() {
    let builder = Daemon::builder(Server::under_test()).nbd_with("max-connections=2");
    let disk = Disk::served_by(builder.start());
    let first = disk.daemon.client("disk");
    let second = disk.daemon.client("disk");
    // The third is in the backlog: it is greeted as soon as a slot is free.
    let third = disk.daemon.nbd().connect().unwrap();
    drop((first, second));
    drop(third);
    for _ in 0..10 {
        disk.still_serves();
    }
}

#[test]
fn one_connection_at_most_is_not_multi_conn() {
    let builder = Daemon::builder(Server::under_test()).nbd_with("max-connections=1");
    let disk = Disk::served_by(builder.start());
    let client = disk.daemon.client("disk");
    assert!(
        !client
            .export
            .has(outport_tests::nbd::wire::flag::CAN_MULTI_CONN)
    );
}

#[test]
fn what_one_connection_flushes_survives_a_killed_daemon() {
    let image = TempImage::qcow2(4 * MIB as u64, "");
    let mut daemon = Daemon::start();
    daemon.serve("disk", &image);
    let (mut writer, mut flusher) = (daemon.client("disk"), daemon.simple_client("disk"));
    let mut wanted = vec![0; 4 * MIB];
    for at in (0..4 * MIB).step_by(192 << 10) {
        let data = outport_tests::pattern(8192, at as u64);
        assert_eq!(writer.write(at as u64, &data).unwrap(), Ok(()));
        wanted[at..at + 8192].copy_from_slice(&data);
    }
    assert_eq!(flusher.flush().unwrap(), Ok(()));
    drop(daemon); // kills
    no_corruption(&image);
    assert_same(
        &image.content(),
        &wanted,
        "after FLUSH on the other connection and SIGKILL",
    );
}

#[test]
fn what_is_written_with_fua_survives_a_killed_daemon() {
    let image = TempImage::qcow2(4 * MIB as u64, "");
    let mut daemon = Daemon::start();
    daemon.serve("disk", &image);
    let mut client = daemon.client("disk");
    let data = outport_tests::pattern(65536, 3);
    let offset = MIB as u64 + 4096;
    let got = client
        .command(cmd_flag::FUA, cmd::WRITE, offset, 65536, &data)
        .unwrap();
    assert_eq!(got, Ok(()));
    drop(daemon); // kills
    no_corruption(&image);
    let content = image.content();
    assert_same(
        &content[offset as usize..][..65536],
        &data,
        "after FUA and SIGKILL",
    );
}

/// Leaks are allowed after a kill; errors are not.
fn no_corruption(image: &TempImage) {
    let checked = try_run("qemu-img", &["check", "-f", "qcow2", image.str()]);
    assert!(
        matches!(checked.code, Some(0 | 3)),
        "{}{}",
        checked.out,
        checked.err
    );
    qemu_img(&["info", image.str()]);
}
