use std::sync::atomic::AtomicU64;

use super::*;
use crate::Buf;
use crate::filter::{Blkdebug, Filter};
use crate::node::Kind;

/// Nobody goes twice within this test.
fn slow() -> Limits {
    let mut limits = Limits::default();
    limits.iops.total = Rate {
        average: 1,
        max: 1,
        burst_length: 1,
    };
    // A large request fills the bucket for longer than any test runs.
    limits.iops_size = 1;
    limits
}

fn null() -> Arc<Node> {
    let kind = Kind::Null {
        size: AtomicU64::new(1 << 30),
        zeroes: true,
    };
    Node::new("n", "null-co", false, kind)
}

fn over(group: &Arc<ThrottleGroup>) -> (Arc<Node>, Arc<Throttle>) {
    over_child(null(), group)
}

fn over_child(child: Arc<Node>, group: &Arc<ThrottleGroup>) -> (Arc<Node>, Arc<Throttle>) {
    let throttle = Throttle::new(child, group.clone());
    let filter = Box::new(Filter::Throttle(throttle.clone()));
    let node = Node::new("t", "throttle", false, Kind::Filter(filter));
    (node, throttle)
}

fn queued(group: &ThrottleGroup) -> usize {
    let state = group.state();
    let queues = [&state.reads, &state.writes];
    let lines = queues.iter().flat_map(|queue| queue.0.iter());
    lines.map(|(_, line)| line.len()).sum()
}

async fn until(mut condition: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never happened");
}

fn read(node: &Arc<Node>) -> tokio::task::JoinHandle<()> {
    let node = node.clone();
    tokio::spawn(async move {
        node.read(0, Buf::zeroed(4096)).await.unwrap();
    })
}

#[tokio::test]
async fn limits_hold_requests_up_and_may_be_lifted() {
    let group = ThrottleGroup::new("g", Limits::default());
    let (node, _) = over(&group);
    assert_eq!(node.try_read(0, &mut [1; 512]), Some(Ok(())));
    group.set_limits(slow());
    assert_eq!(node.try_read(0, &mut [1; 512]), None);
    assert_eq!(node.try_write(0, &[1; 512]), None);
    read(&node).await.unwrap();
    let waiting: Vec<_> = (0..3).map(|_| read(&node)).collect();
    until(|| queued(&group) == 3).await;
    // Flushes and questions do not wait.
    node.flush().await.unwrap();
    node.status(ByteRange::between(0, 512)).await.unwrap();
    // One of them gives up.
    waiting[1].abort();
    group.set_limits(Limits::default());
    for (number, request) in waiting.into_iter().enumerate() {
        assert_eq!(request.await.is_ok(), number != 1);
    }
    until(|| !group.state().pumping).await;
}

#[tokio::test]
async fn a_drain_lets_one_node_go_and_nobody_else() {
    let group = ThrottleGroup::new("g", slow());
    let (node, throttle) = over(&group);
    let (other, _) = over(&group);
    read(&node).await.unwrap();
    let (mine, theirs) = (read(&node), read(&other));
    until(|| queued(&group) == 2).await;
    let drain = throttle.drain();
    mine.await.unwrap();
    read(&node).await.unwrap();
    assert!(!theirs.is_finished());
    drop(drain);
    let again = read(&node);
    until(|| queued(&group) == 2).await;
    group.set_limits(Limits::default());
    theirs.await.unwrap();
    again.await.unwrap();
}

#[tokio::test]
async fn nodes_take_turns_and_requests_of_a_node_keep_their_order() {
    let mut queue = Queue::default();
    let mut told = Vec::new();
    for (node, bytes) in [(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)] {
        let (go, wait) = oneshot::channel();
        queue.push(node, Waiting { bytes, go });
        told.push(wait);
    }
    // The second of node 1 gave up.
    drop(told.remove(1));
    let order = std::iter::from_fn(|| queue.pop()).map(|next| next.bytes);
    assert_eq!(order.collect::<Vec<_>>(), [10, 20, 30, 12, 21]);
}

#[tokio::test]
async fn limited_requests_end_on_their_own() {
    let mut limits = Limits::default();
    limits.iops.write.average = 1000;
    let group = ThrottleGroup::new("g", limits);
    let (node, _) = over(&group);
    let writes = (0..300).map(|_| {
        let node = node.clone();
        async move { node.write(0, &Buf::zeroed(512), false).await }
    });
    for result in futures_util::future::join_all(writes).await {
        result.unwrap();
    }
}

#[tokio::test]
async fn zeroes_that_have_to_be_written_are_counted_once() {
    let group = ThrottleGroup::new("g", slow());
    let limits = crate::filter::blkdebug::Limits {
        opt_write_zero: 4096,
        ..Default::default()
    };
    let debug = Blkdebug::new(null(), limits, Vec::new(), Vec::new());
    let kind = Kind::Filter(Box::new(Filter::Blkdebug(debug)));
    let child = Node::new("d", "blkdebug", false, kind);
    let part = ByteRange::between(0, 512);
    assert_eq!(child.zero_fast(part, false).await, Err(Errno::NotSup));
    let (node, _) = over_child(child, &group);
    let zeroes = tokio::spawn(async move { node.write_zeroes(part, false).await });
    until(|| zeroes.is_finished()).await;
    zeroes.await.unwrap().unwrap();
}
