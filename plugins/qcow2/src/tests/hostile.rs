//! Mutated images: errors, never a panic, never memory without bound.

use outport_sdk::{
    ByteRange, CreatableFormat, DiscardKind, Format, Grant, Granted, WritableFormat, WriteIntent,
    WriteKind,
};

use super::Host;
use crate::fuzzing;
use crate::image::Qcow2;

/// A small image with data, zeroes and compressed clusters.
fn image(options: &str) -> Vec<u8> {
    let mut host = Host::new(vec![Vec::new()]);
    host.call(|txn| Qcow2::create(txn, options)).unwrap();
    let (mut image, children) = Qcow2::open(&host, "{}", true).unwrap();
    let grants: Vec<Grant> = children
        .into_iter()
        .map(|c| Grant {
            id: c.id,
            what: Granted::None,
        })
        .collect();
    let geometry = host
        .call(|txn| image.activate_writable(txn, &grants))
        .unwrap();
    let cluster = u64::from(geometry.cluster_size);
    let intent = |i: u64, kind| WriteIntent {
        range: ByteRange::new(i * cluster, cluster),
        kind,
        stored_len: 200,
    };
    let intents = [
        intent(0, WriteKind::Data),
        intent(1, WriteKind::Compressed),
        intent(2, WriteKind::Compressed),
        intent(5, WriteKind::Data),
    ];
    let placements = host.call(|txn| image.prepare_write(txn, &intents)).unwrap();
    for p in &placements {
        host.payload(p.slot, p.offset, &vec![5; p.covers.len as usize]);
    }
    let tokens: Vec<u64> = placements.iter().map(|p| p.token).collect();
    host.call(|txn| image.commit_write(txn, &tokens)).unwrap();
    let range = ByteRange::new(5 * cluster, cluster);
    host.call(|txn| image.discard(txn, range, DiscardKind::ZeroKeep))
        .unwrap();
    host.call(|txn| image.close(txn)).unwrap();
    host.files.remove(0)
}

fn images() -> Vec<Vec<u8>> {
    [
        r#"{"size": 1048576, "cluster-size": 512}"#,
        r#"{"size": 1048576, "cluster-size": 4096, "refcount-bits": 1}"#,
        r#"{"size": 4194304, "cluster-size": 16384, "extended-l2": true}"#,
    ]
    .map(image)
    .to_vec()
}

#[test]
fn mutated_images_are_refused_in_words() {
    let interesting = [0_u8, 1, 2, 3, 0x7f, 0x80, 0xfe, 0xff];
    let mut state = 1_u64;
    let mut random = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    for valid in images() {
        fuzzing::image(&valid);
        fuzzing::header(&valid);
        fuzzing::tables(&valid[..valid.len().min(4096)]);
        // Where there is something to break: the header, and bytes in use.
        let used: Vec<usize> = (0..valid.len())
            .filter(|at| *at < 112 || valid[*at] != 0 && valid[*at] != 5)
            .collect();
        for round in 0..600 {
            let mut bytes = valid.clone();
            for _ in 0..=random() % 3 {
                let near = used[random() as usize % used.len()] + (random() % 8) as usize;
                let at = near.min(bytes.len() - 1);
                bytes[at] = if round % 2 == 0 {
                    interesting[random() as usize % interesting.len()]
                } else {
                    bytes[at] ^ 1 << (random() % 8)
                };
            }
            if random() % 16 == 0 {
                bytes.truncate(random() as usize % bytes.len());
            }
            fuzzing::image(&bytes);
        }
    }
}
