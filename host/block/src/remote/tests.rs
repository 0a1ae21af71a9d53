//! A server in memory that insists on its limits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::*;
use crate::Node;
use crate::node::Kind;

const MIN: u32 = 512;
const MAX: u32 = 2048;

#[derive(Debug)]
struct Memory(Mutex<Vec<u8>>);

/// Remembers the longest request.
#[derive(Debug, Default)]
struct Longest(AtomicUsize);

impl Remote for Longest {
    fn len_bytes(&self) -> u64 {
        1 << 30
    }
    fn limits(&self) -> RemoteLimits {
        RemoteLimits {
            block_min: 4096,
            preferred: 4096,
            transfer_max: 1 << 30,
            effect_max: 1 << 30,
        }
    }
    fn name(&self) -> String {
        "longest".to_owned()
    }
    fn read(&self, _offset: u64, into: Landing) {
        self.0.fetch_max(into.len(), Ordering::Relaxed);
        into.finish(Ok(()));
    }
    fn write(&self, _offset: u64, from: Payload, _fua: bool) -> NodeFuture<'_, ()> {
        self.0.fetch_max(from.len(), Ordering::Relaxed);
        Box::pin(std::future::ready(Ok(())))
    }
    fn flush(&self) -> NodeFuture<'_, ()> {
        unreachable!()
    }
    fn discard(&self, _: ByteRange) -> NodeFuture<'_, ()> {
        unreachable!()
    }
    fn zero(&self, _: ByteRange, _: bool, _: bool) -> NodeFuture<'_, ()> {
        unreachable!()
    }
    fn prefetch(&self, _: ByteRange) -> NodeFuture<'_, ()> {
        unreachable!()
    }
    fn status(&self, _: ByteRange) -> NodeFuture<'_, Status> {
        unreachable!()
    }
    fn close(&self) -> NodeFuture<'_, ()> {
        unreachable!()
    }
}

#[tokio::test]
async fn what_is_not_aligned_takes_little_memory() {
    let longest = Arc::new(Longest::default());
    let node = RemoteNode::new(longest.clone());
    let buf = Buf::zeroed(5 << 20);
    for offset in [1, 4095, 8191] {
        node.read(offset, buf.io()).await.unwrap();
        node.write(offset, buf.io(), false).await.unwrap();
    }
    assert!(longest.0.load(Ordering::Relaxed) as u64 <= BOUNCE_MAX);
}

impl Memory {
    fn check(&self, range: ByteRange) {
        assert!(range.end() <= self.len_bytes(), "{range:?}");
        assert!(
            !range.is_empty() && range.len() <= u64::from(MAX),
            "{range:?}"
        );
        assert!(
            (range.offset() | range.len()).is_multiple_of(u64::from(MIN)),
            "{range:?}"
        );
    }

    fn with<T>(&self, offset: u64, len: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
        self.check(ByteRange::new(offset, len as u64).unwrap());
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut bytes[offset as usize..offset as usize + len])
    }
}

impl Remote for Memory {
    fn len_bytes(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }
    fn limits(&self) -> RemoteLimits {
        RemoteLimits {
            block_min: MIN,
            preferred: 4096,
            transfer_max: MAX,
            effect_max: u64::from(MAX),
        }
    }
    fn name(&self) -> String {
        "memory".to_owned()
    }
    fn read(&self, offset: u64, mut into: Landing) {
        self.with(offset, into.len(), |bytes| into.put(0, bytes));
        into.finish(Ok(()));
    }
    fn write(&self, offset: u64, from: Payload, _fua: bool) -> NodeFuture<'_, ()> {
        let bytes = from.slices().collect::<Vec<_>>().concat();
        self.with(offset, bytes.len(), |to| to.copy_from_slice(&bytes));
        Box::pin(std::future::ready(Ok(())))
    }
    fn flush(&self) -> NodeFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn discard(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        self.zero(range, true, true)
    }
    fn zero(&self, range: ByteRange, _unmap: bool, _fast: bool) -> NodeFuture<'_, ()> {
        self.with(range.offset(), range.len() as usize, |to| to.fill(0));
        Box::pin(std::future::ready(Ok(())))
    }
    fn prefetch(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        self.check(range);
        Box::pin(std::future::ready(Ok(())))
    }
    fn status(&self, range: ByteRange) -> NodeFuture<'_, Status> {
        self.check(range);
        let status = Status {
            len: range.len(),
            data: true,
            zero: false,
            depth: 1,
        };
        Box::pin(std::future::ready(Ok(status)))
    }
    fn close(&self) -> NodeFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[tokio::test]
async fn any_request_becomes_requests_of_whole_blocks() {
    const LEN: usize = 16 << 10;
    let memory = Arc::new(Memory(Mutex::new(vec![7; LEN])));
    let kind = Kind::Remote(RemoteNode::new(memory.clone()));
    let node = Node::new("n", "nbd", false, kind);
    let mut model = vec![7; LEN];
    let mut seed = 1_u64;
    let mut below = move |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % end
    };
    for round in 0..2000 {
        let at = below(LEN);
        let len = 1 + below((LEN - at).min(7000));
        let range = ByteRange::new(at as u64, len as u64).unwrap();
        match round % 5 {
            0 | 1 => {
                let buf = Buf::from_slice(&vec![round as u8; len]);
                node.write(at as u64, &buf, false).await.unwrap();
                model[at..at + len].fill(round as u8);
            }
            2 => {
                node.write_zeroes(range, true).await.unwrap();
                model[at..at + len].fill(0);
            }
            3 => {
                let status = node.status(range).await.unwrap();
                assert!(status.len > 0 && status.len <= range.len());
                node.prefetch(range).await.unwrap();
            }
            _ => {
                let buf = node.read(at as u64, Buf::zeroed(len)).await.unwrap();
                assert_eq!(buf.as_slice(), &model[at..at + len]);
            }
        }
    }
    assert_eq!(*memory.0.lock().unwrap(), model);
}

#[tokio::test]
async fn past_the_end_are_zeroes_and_no_room() {
    let memory = Arc::new(Memory(Mutex::new(vec![7; 512])));
    let node = Node::new("n", "nbd", false, Kind::Remote(RemoteNode::new(memory)));
    let read = node.read(256, Buf::from_slice(&[1; 512])).await.unwrap();
    assert_eq!(read.as_slice(), [[7; 256], [0; 256]].concat());
    let wrote = node.write(256, &Buf::zeroed(512), false).await;
    assert_eq!(wrote, Err(Errno::NoSpc));
    let status = node.status(ByteRange::between(512, 1024)).await.unwrap();
    assert!(status.zero);
}
