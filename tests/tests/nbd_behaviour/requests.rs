//! Every request is answered, with the right error number, and the stream stays in sync.

use std::io::Write;

use outport_tests::assert_same;
use outport_tests::nbd::wire::{cmd, cmd_flag, errno, flag};
use outport_tests::nbd::{Client, Request};

use super::{Disk, MIB};

const SIZE: u64 = 4 * MIB as u64;

/// QEMU's server says EINVAL to whatever it refuses before dispatch.
fn refusal(disk: &Disk, wanted: u32) -> u32 {
    if disk.is_qsd() { errno::INVAL } else { wanted }
}

/// The connection is usable: the next read is answered, with the right bytes.
fn in_sync(client: &mut Client, disk: &Disk) {
    let read = client
        .read(512, 512)
        .expect("it answers")
        .expect("it reads");
    assert_same(&read, &disk.content[512..1024], "the read after");
}

#[test]
fn ranges_past_the_end_are_refused_by_command() {
    let disk = Disk::new();
    let no_space = refusal(&disk, errno::NOSPC);
    for structured in [true, false] {
        let mut client = if structured {
            disk.daemon.client("disk")
        } else {
            disk.daemon.simple_client("disk")
        };
        for offset in [SIZE, SIZE - 512, 1 << 40, u64::MAX - 511] {
            let what = format!("at {offset}, structured {structured}");
            assert_eq!(
                client.read(offset, 1024).unwrap(),
                Err(errno::INVAL),
                "READ {what}"
            );
            let payload = [1; 1024];
            assert_eq!(
                client.write(offset, &payload).unwrap(),
                Err(no_space),
                "WRITE {what}"
            );
            for (kind, wanted) in [
                (cmd::WRITE_ZEROES, no_space),
                (cmd::TRIM, errno::INVAL),
                (cmd::CACHE, errno::INVAL),
            ] {
                let got = client.command(0, kind, offset, 1024, &[]).unwrap();
                assert_eq!(got, Err(wanted), "command {kind} {what}");
            }
            in_sync(&mut client, &disk);
        }
    }
    let Disk {
        daemon,
        image,
        content,
    } = disk;
    daemon.stop();
    assert_same(&image.content(), &content, "nothing was written");
}

#[test]
fn the_last_sector_is_inside() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    assert_eq!(client.write(SIZE - 512, &[7; 512]).unwrap(), Ok(()));
    assert_eq!(client.read(SIZE - 512, 512).unwrap(), Ok(vec![7; 512]));
}

#[test]
fn a_read_only_export_refuses_writes_and_stays_in_sync() {
    let disk = Disk::read_only();
    let not_permitted = refusal(&disk, errno::PERM);
    let mut client = disk.daemon.client("disk");
    assert!(client.export.has(flag::READ_ONLY));
    assert_eq!(
        client.write(0, &[1; 4096]).unwrap(),
        Err(not_permitted),
        "WRITE"
    );
    for kind in [cmd::WRITE_ZEROES, cmd::TRIM] {
        let got = client.command(0, kind, 0, 4096, &[]).unwrap();
        assert_eq!(got, Err(not_permitted), "command {kind}");
    }
    in_sync(&mut client, &disk);
    assert_eq!(client.flush().unwrap(), Ok(()));
}

#[test]
fn unknown_commands_and_flags_are_invalid() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    for kind in [8, 9, 100, 0xffff] {
        let got = client.command(0, kind, 0, 512, &[]).unwrap();
        assert_eq!(got, Err(errno::INVAL), "command {kind}");
        in_sync(&mut client, &disk);
    }
    for bit in 6..16 {
        let got = client
            .command(1 << bit, cmd::WRITE, 0, 512, &[1; 512])
            .unwrap();
        assert_eq!(got, Err(errno::INVAL), "WRITE with flag {bit}");
        let got = client.read_with(1 << bit, 0, 512).unwrap();
        assert_eq!(got, Err(errno::INVAL), "READ with flag {bit}");
        in_sync(&mut client, &disk);
    }
}

#[test]
fn flags_of_other_commands_are_invalid() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    for (flags, kind) in [
        (cmd_flag::NO_HOLE, cmd::TRIM),
        (cmd_flag::FAST_ZERO, cmd::TRIM),
        (cmd_flag::DF, cmd::WRITE_ZEROES),
        (cmd_flag::REQ_ONE, cmd::CACHE),
    ] {
        let got = client.command(flags, kind, 0, 512, &[]).unwrap();
        assert_eq!(got, Err(errno::INVAL), "flags {flags:#x} on command {kind}");
        in_sync(&mut client, &disk);
    }
}

#[test]
fn df_without_structured_replies_is_invalid() {
    let disk = Disk::new();
    let mut client = disk.daemon.simple_client("disk");
    assert!(
        !client.export.has(flag::SEND_DF),
        "DF is advertised without structured replies"
    );
    assert_eq!(
        client.read_with(cmd_flag::DF, 0, 512).unwrap(),
        Err(errno::INVAL)
    );
    in_sync(&mut client, &disk);
}

#[test]
fn fua_is_taken_with_every_command() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    assert!(client.export.has(flag::SEND_FUA));
    let fua = cmd_flag::FUA;
    assert_eq!(
        client
            .command(fua, cmd::WRITE, 0, 4096, &[5; 4096])
            .unwrap(),
        Ok(())
    );
    assert_eq!(
        client
            .command(fua, cmd::WRITE_ZEROES, 4096, 4096, &[])
            .unwrap(),
        Ok(())
    );
    assert_eq!(
        client.command(fua, cmd::TRIM, 8192, 4096, &[]).unwrap(),
        Ok(())
    );
    // NBD proto: FUA is without meaning on a read, but a server takes it.
    assert_eq!(client.read_with(fua, 0, 4096).unwrap(), Ok(vec![5; 4096]));
    assert_eq!(client.read(4096, 4096).unwrap(), Ok(vec![0; 4096]));
}

#[test]
fn zeroes_read_as_zeroes_whatever_the_flags() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    for (at, flags) in [
        0,
        cmd_flag::NO_HOLE,
        cmd_flag::FUA,
        cmd_flag::NO_HOLE | cmd_flag::FUA,
    ]
    .into_iter()
    .enumerate()
    {
        let offset = ((at * 128) << 10) as u64 + 512;
        assert_eq!(
            client
                .command(flags, cmd::WRITE_ZEROES, offset, 65536, &[])
                .unwrap(),
            Ok(())
        );
        assert_eq!(
            client.read(offset, 65536).unwrap(),
            Ok(vec![0; 65536]),
            "flags {flags:#x}"
        );
        let before = client.read(offset - 512, 512).unwrap().unwrap();
        assert_same(
            &before,
            &disk.content[offset as usize - 512..][..512],
            "the sector before",
        );
    }
}

#[test]
fn fast_zero_works_or_says_that_it_is_not_supported() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    if !client.export.has(flag::SEND_FAST_ZERO) {
        return;
    }
    let got = client
        .command(cmd_flag::FAST_ZERO, cmd::WRITE_ZEROES, 0, 65536, &[])
        .unwrap();
    let read = client.read(0, 65536).unwrap().unwrap();
    match got {
        Ok(()) => assert_same(&read, &vec![0; 65536], "after FAST_ZERO"),
        Err(errno::NOTSUP) => assert_same(&read, &disk.content[..65536], "after ENOTSUP"),
        Err(other) => panic!("FAST_ZERO: error {other}"),
    }
}

#[test]
fn a_write_of_32_mib_works() {
    let mut disk = Disk::new();
    let image = outport_tests::TempImage::zeroes(40 << 20);
    disk.daemon.serve("large", &image);
    let mut client = disk.daemon.client("large");
    let payload = outport_tests::pattern(32 << 20, 5);
    assert_eq!(client.write(4 << 20, &payload).unwrap(), Ok(()));
    let read = client.read(4 << 20, 32 << 20).unwrap().unwrap();
    assert_same(&read, &payload, "32 MiB back");
}

#[test]
fn a_larger_write_is_answered_and_does_not_cut_the_connection() {
    let mut disk = Disk::new();
    if disk.is_qsd() {
        // QEMU drops the connection: the flaw that this test is about.
        return;
    }
    let image = outport_tests::TempImage::zeroes(80 << 20);
    disk.daemon.serve("large", &image);
    for len in [(32 << 20) + 512, 64 << 20] {
        let mut client = disk.daemon.client("large");
        let got = client.write(0, &vec![1; len]).expect("it is answered");
        assert!(
            matches!(got, Ok(()) | Err(errno::INVAL | errno::OVERFLOW)),
            "{len}: {got:?}"
        );
        let read = client.read(70 << 20, 512).expect("it answers on");
        assert_eq!(read, Ok(vec![0; 512]), "after {len} bytes");
    }
}

#[test]
fn large_requests_without_payload_work() {
    let mut disk = Disk::new();
    let image = outport_tests::TempImage::zeroes(3 << 30);
    disk.daemon.serve("huge", &image);
    let mut client = disk.daemon.client("huge");
    let len = (2u32 << 30) + 512;
    for kind in [cmd::WRITE_ZEROES, cmd::TRIM] {
        assert_eq!(
            client.command(0, kind, 0, len, &[]).unwrap(),
            Ok(()),
            "command {kind}"
        );
    }
}

#[test]
fn every_cookie_comes_back() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    for cookie in [0, 1, u64::MAX, 0x2560_9513_2560_9513, 0x8000_0000_0000_0000] {
        let request = Request {
            kind: cmd::FLUSH,
            cookie,
            ..Request::default()
        };
        client.send(&request, &[]).unwrap();
        assert_eq!(client.outcome(&request).unwrap(), Ok(()));
    }
}

#[test]
fn a_hundred_requests_in_one_send_are_all_answered() {
    let disk = Disk::new();
    let mut client = disk.daemon.simple_client("disk");
    let mut message = Vec::new();
    for cookie in 0..100 {
        let request = Request {
            kind: cmd::CACHE,
            cookie,
            len: 4096,
            ..Request::default()
        };
        message.extend(request.bytes());
    }
    client.socket().write_all(&message).unwrap();
    let mut cookies: Vec<u64> = (0..100).map(|_| client.any_outcome().unwrap().0).collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..100));
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    let request = client.request(0, cmd::WRITE, 1024, 600);
    for byte in request.bytes() {
        client.socket().write_all(&[byte]).unwrap();
    }
    for piece in [9; 600].chunks(7) {
        client.socket().write_all(piece).unwrap();
    }
    assert_eq!(client.outcome(&request).unwrap(), Ok(()));
    assert_eq!(client.read(1024, 600).unwrap(), Ok(vec![9; 600]));
}

#[test]
fn bad_magic_ends_that_connection_and_no_other() {
    let disk = Disk::new();
    let mut bystander = disk.daemon.client("disk");
    for magic in [0u32, 0x2560_9514, 0x21e4_1c71, u32::MAX] {
        let mut client = disk.daemon.client("disk");
        let mut bytes = client.request(0, cmd::READ, 0, 512).bytes();
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        client.socket().write_all(&bytes).unwrap();
        assert!(client.closed(), "magic {magic:#x}");
    }
    in_sync(&mut bystander, &disk);
}

#[test]
fn disc_lets_what_is_in_flight_finish() {
    let disk = Disk::new();
    let mut client = disk.daemon.simple_client("disk");
    let requests: Vec<Request> = (0..8)
        .map(|at| client.request(0, cmd::WRITE, at * 4096, 4096))
        .collect();
    for (at, request) in requests.iter().enumerate() {
        client.send(request, &[at as u8 + 1; 4096]).unwrap();
    }
    client.disconnect().unwrap();
    let mut reader = disk.daemon.client("disk");
    for at in 0..8 {
        let read = reader.read(at * 4096, 4096).unwrap();
        assert_eq!(read, Ok(vec![at as u8 + 1; 4096]), "write {at}");
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_payload_harms_nobody() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    let request = client.request(0, cmd::WRITE, 0, 65536);
    client.send(&request, &[1; 1000]).unwrap();
    drop(client);
    disk.still_serves();
    let read = disk
        .daemon
        .client("disk")
        .read(4096, 4096)
        .unwrap()
        .unwrap();
    assert_same(&read, &disk.content[4096..8192], "beyond what was sent");
}
