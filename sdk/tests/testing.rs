//! The testing host, with a toy format that is sound, and with one mistake at a
//! time that it must find.

mod toy;

use outport_sdk::testing::model::{self, Op, Workload, random_ops};
use outport_sdk::testing::{MemoryHost, TestNode, codec, crash};
use outport_sdk::{ByteRange, Codec, CreatableFormat, Errno, Location, Result, WritableFormat};
use toy::{CLUSTER, SOUND, Toy};

/// Not a multiple of the cluster: the last one is cut.
const SIZE: u64 = 40 * CLUSTER - 1536;

fn created<const BUG: u8>() -> MemoryHost {
    let mut host = MemoryHost::new(vec![]);
    let made = Toy::<BUG>::create(&mut host, &SIZE.to_string());
    host.finish(made).expect("a toy can be made");
    host.barrier();
    host
}

fn workload(seed: u64, ops: usize) -> Vec<Op> {
    random_ops(&Workload {
        seed,
        ops,
        size: SIZE,
        cluster_size: CLUSTER,
        codec: Some(Codec::Deflate),
        resize_max: None,
    })
}

fn backing() -> Vec<u8> {
    (0..SIZE as u32 - 9000)
        .map(|i| (i / 512) as u8 | 1)
        .collect()
}

#[test]
fn random_operations_match_the_model() {
    for seed in 0..40 {
        let mut host = created::<SOUND>();
        if seed % 2 == 0 {
            host = host.with_backing(backing());
        }
        if seed % 3 == 0 {
            host = host.with_punch();
        }
        let mut node = TestNode::<Toy<SOUND>>::open(host, "{}").unwrap();
        if let Err(e) = model::run(&mut node, &workload(seed, 300)) {
            panic!("seed {seed}: {e}");
        }
    }
}

#[test]
fn a_crash_loses_nothing_that_was_flushed() {
    for seed in 0..4 {
        let host = created::<SOUND>().with_backing(backing());
        let report = crash::check::<Toy<SOUND>>(
            host,
            "{}",
            &workload(seed, 60),
            &crash::Config {
                seed,
                ..crash::Config::default()
            },
            None,
        )
        .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(report.prefixes > 50 && report.subsets > 100, "{report}");
    }
}

#[test]
fn the_oracle_is_asked_and_believed() {
    let mut asked = 0;
    let mut oracle = |host: &MemoryHost| {
        asked += 1;
        let head = host.disk(0).map(|disk| disk.read(0, 8)).unwrap_or_default();
        if head == b"TOYTOYTO" && asked < 20 {
            Ok(())
        } else {
            Err("no more".to_owned())
        }
    };
    let config = crash::Config {
        oracle_every: 2,
        ..crash::Config::default()
    };
    let ops = workload(7, 60);
    let failed =
        crash::check::<Toy<SOUND>>(created::<SOUND>(), "{}", &ops, &config, Some(&mut oracle));
    assert!(failed.unwrap_err().message.contains("no more"));
    assert_eq!(asked, 20);
}

fn crashes<const BUG: u8>() -> Result<crash::Report> {
    let ops = workload(3, 60);
    crash::check::<Toy<BUG>>(
        created::<BUG>(),
        "{}",
        &ops,
        &crash::Config::default(),
        None,
    )
}

#[test]
fn a_mapping_that_is_queued_too_early_is_found_by_a_crash() {
    // Without a power cut nothing is wrong with it ...
    let host = created::<{ toy::MAPPING_TOO_EARLY }>();
    let mut node = TestNode::<Toy<{ toy::MAPPING_TOO_EARLY }>>::open(host, "{}").unwrap();
    model::run(&mut node, &workload(3, 60)).unwrap();
    // ... with one, a mapping can be there before its payload.
    let found = crashes::<{ toy::MAPPING_TOO_EARLY }>().unwrap_err();
    assert!(found.message.contains("Power cut"), "{found}");
    println!("{found}");
}

#[test]
fn the_content_of_reused_space_does_not_show_up() {
    let mut node = TestNode::<Toy<SOUND>>::open(created::<SOUND>(), "{}").unwrap();
    node.write(0, &[0xaa; CLUSTER as usize]).unwrap();
    node.flush().unwrap();
    node.discard(0, CLUSTER).unwrap();
    let host = node.close().unwrap();
    let writes = vec![(CLUSTER, vec![0xbb; CLUSTER as usize])];
    let ops = [
        Op::Write {
            writes,
            split: false,
        },
        Op::Flush,
    ];
    let config = crash::Config::default();
    crash::check::<Toy<SOUND>>(host.clone(), "{}", &ops, &config, None).unwrap();
    let found = crash::check::<Toy<{ toy::MAPPING_TOO_EARLY }>>(host, "{}", &ops, &config, None);
    let found = found.unwrap_err().message;
    assert!(found.contains("reads 0xaa; flushed was 0x00"), "{found}");
}

#[test]
fn broken_contracts_are_found_without_a_power_cut() {
    fn found<const BUG: u8>(what: &str) {
        let mut node = TestNode::<Toy<BUG>>::open(created::<BUG>(), "{}").unwrap();
        let e = model::run(&mut node, &workload(3, 200)).unwrap_err();
        assert!(
            e.message.contains("Broken contract") && e.message.contains(what),
            "{e}"
        );
    }
    found::<{ toy::REUSE_TOO_EARLY }>("uses freed bytes");
    found::<{ toy::SHARES_SPACE }>("reserve");
    found::<{ toy::PLACES_ON_METADATA }>("metadata");
    found::<{ toy::COMMITS_ELSEWHERE }>("is not where the payload went");
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    let mut node = TestNode::<Toy<SOUND>>::open(created::<SOUND>(), "{}").unwrap();
    let data = vec![0x5a; CLUSTER as usize];
    node.write_compressed(CLUSTER, &data, Codec::Deflate)
        .unwrap();
    let coded = |node: &mut TestNode<Toy<SOUND>>| {
        let extents = node.extents().unwrap();
        extents
            .iter()
            .filter(|e| matches!(e.at, Location::Coded { .. }))
            .count()
    };
    assert_eq!(coded(&mut node), 1);
    assert_eq!(node.read(CLUSTER, data.len()).unwrap(), data);
    node.write(CLUSTER + 1, &[1]).unwrap();
    assert_eq!(coded(&mut node), 0);
    assert_eq!(node.read(CLUSTER, 3).unwrap(), [0x5a, 1, 0x5a]);
    assert!(codec::encode(Codec::Deflate, &data).len() < 100);
}

#[test]
fn zeroes_keep_to_the_granularity_and_edges_are_written() {
    let host = created::<SOUND>().with_backing(backing());
    let mut node = TestNode::<Toy<SOUND>>::open(host, "{}").unwrap();
    node.write_zeroes(100, 3 * CLUSTER, false).unwrap();
    let mut expected = backing()[..4 * CLUSTER as usize].to_vec();
    expected[100..100 + 3 * CLUSTER as usize].fill(0);
    assert_eq!(node.read(0, 4 * CLUSTER as usize).unwrap(), expected);
    let zero = node
        .extents()
        .unwrap()
        .iter()
        .filter(|e| e.at == Location::Zero)
        .count();
    assert_eq!(zero, 2);
}

#[test]
fn an_open_image_refuses_what_lies_outside() {
    let mut node = TestNode::<Toy<SOUND>>::open(created::<SOUND>(), "{}").unwrap();
    assert_eq!(
        node.write(SIZE - 1, &[1, 2]).unwrap_err().code,
        Errno::Einval
    );
    assert_eq!(node.read(u64::MAX, 2).unwrap_err().code, Errno::Einval);
    assert_eq!(node.discard(0, u64::MAX).unwrap_err().code, Errno::Einval);
    let asked = ByteRange::new(0, SIZE);
    assert_eq!(node.abort_write(asked), Ok(()));
}

#[test]
fn a_read_only_image_maps_nothing_in_place() {
    let mut node = TestNode::<Toy<SOUND>>::open(created::<SOUND>(), "{}").unwrap();
    node.write(0, &[1; 10]).unwrap();
    let host = node.close().unwrap();
    let mut node = TestNode::<Toy<SOUND>>::open_read_only(host, "{}").unwrap();
    // The toy does not care how it was opened; a real format must.
    assert!(node.read(0, 10).unwrap_err().message.contains("in place"));
}

#[test]
fn the_worlds_fit_the_traits() {
    fn creatable<T: CreatableFormat + WritableFormat>() {}
    creatable::<Toy<SOUND>>();
}
