//! The shape of read replies.

use outport_tests::assert_same;
use outport_tests::nbd::wire::{chunk, cmd, cmd_flag, errno};

use super::{Disk, MIB};

#[test]
fn structured_and_simple_reads_give_the_same_bytes() {
    let disk = Disk::new();
    let mut structured = disk.daemon.client("disk");
    let mut simple = disk.daemon.simple_client("disk");
    for (offset, len) in [
        (0, 512),
        (511, 3),
        (1, 4095),
        (MIB - 7, 65543),
        (0, 4 * MIB),
    ] {
        for client in [&mut structured, &mut simple] {
            let read = client.read(offset as u64, len as u32).unwrap().unwrap();
            let what = format!("{offset}+{len}, structured {}", client.structured());
            assert_same(&read, &disk.content[offset..offset + len], &what);
        }
    }
}

#[test]
fn a_hole_travels_without_its_zeroes() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    let request = client.request(0, cmd::READ, 2 * MIB as u64, MIB as u32);
    client.send(&request, &[]).unwrap();
    let chunks = client.chunks().unwrap();
    let payload: usize = chunks.iter().map(|chunk| chunk.data.len()).sum();
    assert!(payload < 4096, "{payload} bytes for a hole");
    assert!(chunks.iter().any(|chunk| chunk.kind == chunk::OFFSET_HOLE));
}

#[test]
fn df_gives_one_content_chunk() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    for (offset, len) in [
        (0, 65536),
        (2 * MIB - 32768, 65536),
        (MIB, 2 * MIB),
        (2 * MIB, MIB),
    ] {
        let request = client.request(cmd_flag::DF, cmd::READ, offset as u64, len as u32);
        client.send(&request, &[]).unwrap();
        let chunks = client.chunks().unwrap();
        if len > 65536 && chunks[0].error() == Some(errno::OVERFLOW) {
            continue;
        }
        let content = chunks.iter().filter(|chunk| chunk.kind != chunk::NONE);
        assert_eq!(content.count(), 1, "{offset}+{len}");
        if chunks[0].kind == chunk::OFFSET_DATA {
            assert_same(
                &chunks[0].data[8..],
                &disk.content[offset..offset + len],
                "with DF",
            );
        }
    }
}

#[test]
fn an_error_of_a_structured_read_is_a_chunk() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    // `chunks` fails on a simple reply.
    let past_the_end = client.request(0, cmd::READ, 4 * MIB as u64, 512);
    let bad_flag = client.request(1 << 12, cmd::READ, 0, 512);
    for request in [past_the_end, bad_flag] {
        client.send(&request, &[]).unwrap();
        let chunks = client.chunks().unwrap();
        assert_eq!(
            chunks.last().and_then(|chunk| chunk.error()),
            Some(errno::INVAL)
        );
        assert_eq!(chunks.last().unwrap().cookie, request.cookie);
    }
}

#[test]
fn a_read_sees_a_write_of_another_connection() {
    let disk = Disk::new();
    let (mut writer, mut reader) = (
        disk.daemon.client("disk"),
        disk.daemon.simple_client("disk"),
    );
    for round in 1..=50u8 {
        let offset = 2 * MIB as u64 + u64::from(round) * 4096;
        assert_eq!(writer.write(offset, &[round; 4096]).unwrap(), Ok(()));
        assert_eq!(reader.read(offset, 4096).unwrap(), Ok(vec![round; 4096]));
    }
}
