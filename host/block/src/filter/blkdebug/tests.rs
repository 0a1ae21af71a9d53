use std::sync::atomic::AtomicU64;

use super::*;
use crate::filter::Filter;
use crate::node::{Ask, Front, Kind, Segment};

fn null() -> Arc<Node> {
    let kind = Kind::Null {
        size: AtomicU64::new(1 << 20),
        zeroes: true,
    };
    Node::new("n", "null-co", false, kind)
}

fn over(child: Arc<Node>, debug: impl FnOnce(Arc<Node>) -> Blkdebug) -> Arc<Node> {
    let filter = Filter::Blkdebug(debug(child));
    Node::new("b", "blkdebug", false, Kind::Filter(Box::new(filter)))
}

fn debug(node: &Node) -> &Blkdebug {
    node.blkdebug().unwrap()
}

#[tokio::test]
async fn without_rules_nothing_is_in_the_way() {
    let node = over(null(), |child| {
        Blkdebug::new(child, Limits::default(), Vec::new(), Vec::new())
    });
    let range = ByteRange::between(0, 512);
    assert_eq!(node.try_read(0, &mut [1; 512]), Some(Ok(())));
    assert_eq!(node.front(range, Ask::Memory), Front::zero(512));
    assert!(matches!(node.segment(range), Segment::Zero { len: 512 }));
    debug(&node).add_break(Event::PWRITEV, "t");
    assert_eq!(node.try_read(0, &mut [1; 512]), None);
    assert_eq!(node.front(range, Ask::Memory), Front::data(512));
    assert_eq!(debug(&node).remove_breaks("t"), 1);
    assert_eq!(node.try_read(0, &mut [1; 512]), Some(Ok(())));
}

#[tokio::test]
async fn requests_are_held_until_they_are_resumed() {
    let node = over(null(), |child| {
        Blkdebug::new(child, Limits::default(), Vec::new(), Vec::new())
    });
    let raw = Node::new("r", "raw", false, Kind::raw(node.clone(), 0, None));
    for (event, tag) in [
        (Event::READ_AIO, "read"),
        (Event::WRITE_AIO, "write"),
        (Event::FLUSH_TO_DISK, "flush"),
        (Event::PWRITEV_ZERO, "zero"),
    ] {
        debug(&node).add_break(event, tag);
        let (user, buf) = (raw.clone(), crate::Buf::zeroed(512));
        let request = tokio::spawn(async move {
            match event {
                Event::READ_AIO => user.read(0, buf).await.map(|_| ()),
                Event::WRITE_AIO => user.write(0, &buf, false).await,
                Event::FLUSH_TO_DISK => user.flush().await,
                _ => user.write_zeroes(ByteRange::between(0, 512), true).await,
            }
        });
        while debug(&node).held().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(debug(&node).held(), [tag]);
        // Others pass: a break holds one request.
        raw.read(0, crate::Buf::zeroed(512)).await.unwrap();
        assert_eq!(debug(&node).resume(Some("other")), 0);
        assert!(!request.is_finished());
        assert_eq!(debug(&node).resume(Some(tag)), 1);
        request.await.unwrap().unwrap();
    }
    debug(&node).add_break(Event::READ_AIO, "last");
    let request = tokio::spawn(async move { raw.read(0, crate::Buf::zeroed(512)).await });
    while debug(&node).held().is_empty() {
        tokio::task::yield_now().await;
    }
    debug(&node).release();
    request.await.unwrap().unwrap();
    debug(&node).add_break(Event::READ_AIO, "too late");
    assert_eq!(node.try_read(0, &mut [1; 512]), Some(Ok(())));
}

#[tokio::test]
async fn errors_come_where_the_rules_say() {
    let rule = InjectError {
        event: Event::NONE,
        state: 0,
        iotype: Some(IoType::Read),
        errno: Some(Errno::NoSpc),
        sector: Some(8),
        once: false,
        immediately: false,
    };
    let limits = Limits {
        max_transfer: 4096,
        ..Limits::default()
    };
    let node = over(null(), |child| {
        Blkdebug::new(child, limits, Vec::new(), vec![rule])
    });
    let read = |offset, len| {
        let node = node.clone();
        async move { node.read(offset, crate::Buf::zeroed(len)).await.map(|_| ()) }
    };
    assert_eq!(read(0, 4096).await, Ok(()));
    assert_eq!(read(0, 8192).await, Err(Errno::NoSpc), "its second piece");
    assert_eq!(read(4096, 512).await, Err(Errno::NoSpc));
    assert_eq!(
        node.write(4096, &crate::Buf::zeroed(512), false).await,
        Ok(())
    );
    assert_eq!(node.flush().await, Ok(()));
}
