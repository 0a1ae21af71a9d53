//! The overlay without files.

use super::*;

fn none() -> BTreeMap<(u32, u64), Vec<u8>> {
    BTreeMap::new()
}

fn outs(o: &Overlay, stage: Stage) -> Vec<(u64, Vec<u8>)> {
    o.write_out(stage)
        .into_iter()
        .map(|w| (w.offset, w.data))
        .collect()
}

#[test]
fn reads_see_queued_bytes_and_only_those_sectors() {
    let mut o = Overlay::default();
    o.write(0, Stage::Prepare, 512, Bytes::Given(&[1; 512]), &none());
    let mut buf = vec![9; 2048];
    o.patch(0, 0, &mut buf);
    assert_eq!((buf[0], buf[512], buf[1023], buf[1024]), (9, 1, 1, 9));
    o.patch(1, 0, &mut buf[..512]);
    assert_eq!(buf[0], 9);
}

#[test]
fn partial_sectors_need_their_base() {
    let mut o = Overlay::default();
    let r = ByteRange::between(4096 + 8, 4096 + 16);
    assert_eq!(o.needs(0, r).collect::<Vec<_>>(), [4096]);
    assert_eq!(o.needs(0, ByteRange::between(4096, 8192)).count(), 0);
    let base = BTreeMap::from([((0, 4096), vec![7; 4096])]);
    o.write(0, Stage::Mapping, 4096 + 8, Bytes::Given(&[1; 8]), &base);
    assert_eq!(o.needs(0, r).count(), 0);
    o.seal();
    let w = outs(&o, Stage::Mapping);
    assert_eq!(w.len(), 1);
    assert_eq!(
        (w[0].0, w[0].1.len(), w[0].1[0], w[0].1[8]),
        (4096, 512, 7, 1)
    );
}

#[test]
fn prepare_is_written_without_the_mapping_of_the_same_sector() {
    let mut o = Overlay::default();
    o.write(0, Stage::Prepare, 0, Bytes::Zeroes(4096), &none());
    o.write(0, Stage::Mapping, 0, Bytes::Given(&[5; 8]), &none());
    o.write(0, Stage::Prepare, 8, Bytes::Given(&[6; 8]), &none());
    o.seal();
    let prepare = &outs(&o, Stage::Prepare)[0].1;
    assert_eq!((prepare[0], prepare[8]), (0, 6));
    let mapping = &outs(&o, Stage::Mapping)[0].1;
    assert_eq!((mapping[0], mapping[8]), (5, 6));
}

#[test]
fn a_new_generation_starts_from_the_sealed_one() {
    let mut o = Overlay::default();
    o.write(0, Stage::Mapping, 0, Bytes::Given(&[1; 512]), &none());
    o.seal();
    assert_eq!(o.needs(0, ByteRange::between(8, 16)).count(), 0);
    o.write(0, Stage::Mapping, 8, Bytes::Given(&[2; 8]), &none());
    let mut buf = [0; 512];
    o.patch(0, 0, &mut buf);
    assert_eq!((buf[0], buf[8], buf[16]), (1, 2, 1));
    o.retire();
    let mut buf = [9; 512];
    o.patch(0, 0, &mut buf);
    assert_eq!(
        (buf[0], buf[8]),
        (1, 2),
        "the page kept what the sealed one wrote"
    );
}

#[test]
fn a_failed_flush_is_written_again_before_what_came_since() {
    let mut o = Overlay::default();
    o.write(0, Stage::Mapping, 0, Bytes::Given(&[1; 512]), &none());
    o.seal();
    o.write(0, Stage::Mapping, 512, Bytes::Given(&[2; 512]), &none());
    assert!(o.is_sealed());
    assert_eq!(outs(&o, Stage::Mapping)[0].1, [1; 512]);
    o.retire();
    o.seal();
    let w = outs(&o, Stage::Mapping);
    assert_eq!((w[0].0, &w[0].1[..]), (512, &[2; 512][..]));
}

#[test]
fn a_sector_beside_one_that_was_written_whole_needs_its_base() {
    let mut o = Overlay::default();
    o.write(0, Stage::Prepare, 0, Bytes::Given(&[1; 512]), &none());
    o.write(0, Stage::Mapping, 0, Bytes::Given(&[2; 512]), &none());
    let part = ByteRange::between(512 + 8, 512 + 16);
    assert_eq!(o.needs(0, part).collect::<Vec<_>>(), [0]);
    let base = BTreeMap::from([((0, 0), vec![7; 4096])]);
    o.write(0, Stage::Prepare, 512 + 8, Bytes::Given(&[3; 8]), &base);
    o.seal();
    let prepare = &outs(&o, Stage::Prepare)[0].1;
    assert_eq!(
        (prepare[0], prepare[512], prepare[520], prepare[528]),
        (1, 7, 3, 7)
    );
}

#[test]
fn the_base_is_needed_again_when_the_sealed_sector_was_retired() {
    let mut o = Overlay::default();
    o.write(0, Stage::Mapping, 0, Bytes::Given(&[1; 512]), &none());
    o.seal();
    let part = ByteRange::between(8, 16);
    assert_eq!((o.needs(0, part).count(), o.retired()), (0, 0));
    o.retire();
    assert_eq!((o.needs(0, part).count(), o.retired()), (1, 1));
}

#[test]
fn forgotten_sectors_are_not_known_any_more() {
    let mut o = Overlay::default();
    o.write(0, Stage::Prepare, 0, Bytes::Given(&[1; 1024]), &none());
    o.forget(0, ByteRange::between(0, 512));
    assert_eq!(o.needs(0, ByteRange::between(8, 16)).count(), 1);
    assert_eq!(o.needs(0, ByteRange::between(520, 528)).count(), 0);
}
