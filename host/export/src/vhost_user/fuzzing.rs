//! Entry points for fuzzers: bytes in, nothing out, no panic, bounded memory.
//!
//! Not used by the server. The assertions are promises of this module.

use std::sync::Arc;

use super::limits::CHAIN_MAX;
use super::memory::{Gather, Memory};
use super::request::{self, Device, Operation};
use super::ring::{Chain, Ring, Setup};
use super::wire::{self, HEADER, Header, RingAddress};

/// Guest memory: rings first, then what they point to.
const BASE: u64 = 0x1000;
const LEN: usize = 0x4000;
const SIZE: u16 = 16;
const INFLIGHT: u64 = BASE + 0x3800;

/// A message: header, payload, and a byte that counts its descriptors.
pub fn message(data: &[u8]) {
    let Some((header, rest)) = data.split_first_chunk::<HEADER>() else {
        return;
    };
    let (Ok(header), Some((fds, payload))) = (Header::parse(header), rest.split_first()) else {
        return;
    };
    let payload = payload.get(..header.size).unwrap_or(payload);
    let _ = wire::parse(header, payload, usize::from(*fds % 40));
}

/// Guest memory that holds a ring, an inflight region and whatever else; the first byte says which
/// kind of ring. Everything that is available is taken and given back, twice over.
pub fn ring(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let Some(memory) = Memory::anonymous(BASE, LEN) else {
        return;
    };
    let len = data.len().min(LEN);
    memory.store(BASE, &data[..len]);
    let memory = Arc::new(memory);
    let setup = Setup {
        size: SIZE,
        address: RingAddress {
            index: 0,
            is_logged: kind & 32 != 0,
            descriptors: BASE,
            available: BASE + 0x100,
            used: BASE + 0x180,
            log: BASE,
        },
        base: if kind & 16 != 0 { 0x8000_8000 } else { 0 },
        resumed: kind & 64 != 0,
        packed: kind & 1 != 0,
        event_idx: kind & 2 != 0,
        indirect: kind & 4 != 0,
    };
    let inflight = (kind & 8 != 0)
        .then(|| memory.area(INFLIGHT, 0x800))
        .flatten();
    let Ok(mut ring) = Ring::start(&setup, &memory, inflight) else {
        return;
    };
    let device = Device {
        size: 1 << 20,
        block_size: 512,
        writable: true,
    };
    let (mut chain, mut payload) = (Chain::default(), Gather::new(memory.clone()));
    for _ in 0..2 {
        let mut taken = Vec::new();
        while taken.len() < 2 * usize::from(SIZE) {
            let Ok(Some(one)) = ring.take(&memory, &mut chain) else {
                break;
            };
            assert!(chain.segments().len() <= CHAIN_MAX);
            if let Ok(request) = request::parse(&chain, &device, &memory, &mut payload) {
                check(&request.operation, &device, payload.len());
                assert!(memory.holds(request.status), "an answer has its place");
            }
            taken.push(one);
        }
        for one in taken {
            ring.give(one, 1);
        }
        ring.publish(None);
        assert_eq!(ring.unpublished(), 0);
        ring.want_kicks(true, None);
        let _ = (ring.has_more(), ring.base());
        ring.want_kicks(false, None);
    }
    ring.retire();
}

fn check(operation: &Operation, device: &Device, len: u64) {
    match operation {
        Operation::Read(offset) | Operation::Write(offset) => {
            assert!(len > 0 && offset + len <= device.size, "inside the disk");
        }
        Operation::Discard(pieces) | Operation::WriteZeroes(pieces) => {
            assert!(!pieces.is_empty());
            assert!(pieces.iter().all(|it| it.range.end() <= device.size));
        }
        Operation::Flush | Operation::GetId | Operation::Fail(_) => {}
    }
}
