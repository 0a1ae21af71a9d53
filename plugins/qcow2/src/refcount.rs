//! Entries of refcount blocks: one number of 1 to 64 bits for each host cluster
//! (qcow2.rst: Host cluster management).

/// The largest count that `1 << order` bits hold.
pub(crate) const fn max(order: u32) -> u64 {
    if order >= 6 {
        u64::MAX
    } else {
        (1 << (1 << order)) - 1
    }
}

/// Entries in `bytes` bytes of a block.
pub(crate) const fn entries_in(bytes: u64, order: u32) -> u64 {
    (bytes * 8) >> order
}

/// Entry `index` of `block`; 0 past its end.
pub(crate) fn get(block: &[u8], index: usize, order: u32) -> u64 {
    if order < 3 {
        let per_byte = 3 - order;
        let byte = block.get(index >> per_byte).copied().unwrap_or(0);
        let shift = (index & ((1 << per_byte) - 1)) << order;
        return u64::from(byte) >> shift & max(order);
    }
    let len = 1 << (order - 3);
    let bytes = block
        .get(index * len..(index + 1) * len)
        .unwrap_or_default();
    bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// Set entry `index`; the caller keeps `value <= max(order)`. Nothing happens
/// past the end of `block`.
pub(crate) fn set(block: &mut [u8], index: usize, order: u32, value: u64) {
    if order < 3 {
        let per_byte = 3 - order;
        if let Some(byte) = block.get_mut(index >> per_byte) {
            let shift = (index & ((1 << per_byte) - 1)) << order;
            *byte &= !((max(order) as u8) << shift);
            *byte |= (value as u8) << shift;
        }
        return;
    }
    let len = 1 << (order - 3);
    if let Some(bytes) = block.get_mut(index * len..(index + 1) * len) {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0xff; 64];
            let entries = entries_in(64, order) as usize;
            for i in 0..entries {
                assert_eq!(get(&block, i, order), max(order));
                set(&mut block, i, order, (i as u64 * 7 + 1) & max(order));
            }
            for i in 0..entries {
                assert_eq!(
                    get(&block, i, order),
                    (i as u64 * 7 + 1) & max(order),
                    "order {order}"
                );
            }
            assert_eq!(get(&block, entries, order), 0);
            set(&mut block, entries, order, 1);
        }
    }

    #[test]
    fn narrow_entries_start_at_the_low_bit() {
        let mut block = [0; 1];
        set(&mut block, 0, 0, 1);
        set(&mut block, 3, 0, 1);
        assert_eq!(block, [0b1001]);
        let mut block = [0; 2];
        set(&mut block, 1, 2, 0xa);
        assert_eq!(block, [0xa0, 0]);
    }
}
