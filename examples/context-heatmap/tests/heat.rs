//! The provider over a node in words.

use context_heatmap::Heatmap;
use outport_sdk::testing::{TestProvider, TestView};
use outport_sdk::{ByteRange, Span};

const SIZE: u64 = 1 << 20;

fn heat(view: TestView) -> TestProvider<Heatmap> {
    TestProvider::open(view, "{}").expect("it takes no options")
}

fn spans(provider: &mut TestProvider<Heatmap>, range: ByteRange, max: u32) -> Vec<(u64, u64)> {
    let told = provider
        .status("x-heat:age", range, max)
        .expect("it answers");
    told.iter()
        .map(|Span { len, status }| (*len, *status))
        .collect()
}

#[test]
fn the_newest_write_counts() {
    let mut view = TestView::new(SIZE);
    // Ten is newer than nine, whatever their letters say.
    for name in ["heat-9", "heat-10", "heat-x", "other"] {
        view.add_bitmap(name, 65536);
    }
    view.mark("heat-9", ByteRange::new(0, 3 * 65536));
    view.mark("heat-10", ByteRange::new(65536, 1));
    view.mark("heat-x", ByteRange::new(0, SIZE));
    view.mark("other", ByteRange::new(0, SIZE));
    let mut provider = heat(view);
    assert_eq!(provider.contexts().expect("one")[0].name, "x-heat:age");
    let whole = ByteRange::new(0, SIZE);
    let told = [(65536, 2), (65536, 1), (65536, 2), (SIZE - 3 * 65536, 0)];
    for max in [1, 2, 100] {
        assert_eq!(spans(&mut provider, whole, max), told);
    }
    // Not from a granule's start, and not to its end.
    let part = ByteRange::new(65536 + 10, 65536);
    assert_eq!(spans(&mut provider, part, 100), [(65526, 1), (10, 2)]);
}

#[test]
fn bitmaps_may_have_different_granules() {
    let mut view = TestView::new(SIZE);
    view.add_bitmap("heat-1", 65536);
    view.add_bitmap("heat-2", 4096);
    view.mark("heat-1", ByteRange::new(0, 1));
    view.mark("heat-2", ByteRange::new(8192, 4096));
    let told = spans(&mut heat(view), ByteRange::new(0, 131_072), 100);
    assert_eq!(told, [(8192, 2), (4096, 1), (53_248, 2), (65536, 0)]);
}

#[test]
fn without_bitmaps_everything_is_cold() {
    let mut provider = heat(TestView::new(SIZE));
    assert_eq!(
        spans(&mut provider, ByteRange::new(7, 1000), 1),
        [(1000, 0)]
    );
}
