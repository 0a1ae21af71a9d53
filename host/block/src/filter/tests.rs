use std::sync::atomic::AtomicU64;

use super::*;
use crate::window::Window;

fn null(name: &str, len: u64) -> Arc<Node> {
    let kind = Kind::Null {
        size: AtomicU64::new(len),
        zeroes: true,
    };
    Node::new(name, "null-co", false, kind)
}

#[tokio::test]
async fn a_window_is_exchanged_when_the_last_request_has_left() {
    let debug = Blkdebug::new(
        null("a", 4096),
        blkdebug::Limits::default(),
        Vec::new(),
        Vec::new(),
    );
    debug.add_break(blkdebug::Event::READ_AIO, "held");
    let filter = Kind::Filter(Box::new(Filter::Blkdebug(debug)));
    let debugged = Node::new("b", "blkdebug", false, filter);
    let raw = Node::new("r", "raw", false, Kind::raw(debugged.clone(), 0, None));
    let reader = raw.clone();
    let held = tokio::spawn(async move { reader.read(0, Buf::zeroed(512)).await });
    let debug = debugged.blkdebug().unwrap();
    while debug.held().is_empty() {
        tokio::task::yield_now().await;
    }
    let Kind::Raw(window) = raw.kind() else {
        unreachable!("it is a raw node");
    };
    let old = window.exchange(Window {
        child: null("c", 8192),
        offset: 512,
        size: None,
    });
    // New requests take the new way at once.
    assert_eq!(raw.len_bytes(), 8192 - 512);
    assert_eq!(raw.try_read(0, &mut [1; 512]), Some(Ok(())));
    let left = tokio::spawn(old.left());
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    assert!(!left.is_finished(), "a request is still there");
    debug.resume(None);
    held.await.unwrap().unwrap();
    left.await.unwrap();
}

#[test]
fn only_images_that_are_written_move_their_bytes() {
    let raw = Node::new("r", "raw", false, Kind::raw(null("n", 512), 0, None));
    assert!(!raw.may_move());
}
