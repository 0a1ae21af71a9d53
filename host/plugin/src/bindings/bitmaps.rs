//! What formats say of the dirty bitmaps in their images, checked for being representable.

use outport_block::format::{KeptBitmap, STRETCH_BYTES, Stretch};

use super::Malformed;
use super::format_bitmaps::{Bitmap, Bits};
use crate::limits::BITMAP_NAME_BYTES_MAX;

/// A page of the list.
pub(crate) fn listed(list: Vec<Bitmap>) -> Result<Vec<KeptBitmap>, Malformed> {
    let one = |bitmap: Bitmap| {
        let name = &bitmap.name;
        if name.is_empty() || name.len() > BITMAP_NAME_BYTES_MAX {
            let message = format!("A bitmap's name of {} bytes", name.len());
            return Err(Malformed::answer(message));
        }
        let granularity = bitmap.granularity;
        if granularity < 512 || !granularity.is_power_of_two() {
            let message = format!("A bitmap of granularity {granularity}");
            return Err(Malformed::answer(message));
        }
        Ok(KeptBitmap {
            name: bitmap.name,
            granularity,
            enabled: bitmap.enabled,
            consistent: bitmap.consistent,
        })
    };
    list.into_iter().map(one).collect()
}

/// A stretch that was asked for from bit `from` on.
pub(crate) fn stretch(bits: Option<Bits>, from: u64) -> Result<Option<Stretch>, Malformed> {
    let Some(Bits { first, data }) = bits else {
        return Ok(None);
    };
    let end = first.checked_add(data.len() as u64 * 8);
    let fits = first.is_multiple_of(64) && end.is_some_and(|end| end > from);
    if !fits || data.is_empty() || data.len() > STRETCH_BYTES {
        let message = format!("{} bytes of bits from bit {first} on", data.len());
        return Err(Malformed::answer(message));
    }
    Ok(Some(Stretch { first, data }))
}

pub(crate) fn to_bitmap(bitmap: KeptBitmap) -> Bitmap {
    let KeptBitmap {
        name,
        granularity,
        enabled,
        consistent,
    } = bitmap;
    Bitmap {
        name,
        granularity,
        enabled,
        consistent,
    }
}

pub(crate) fn to_bits(bits: Stretch) -> Bits {
    let Stretch { first, data } = bits;
    Bits { first, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_begin_at_words_and_go_on() {
        let bits = |first, len| {
            let data = vec![1; len];
            stretch(Some(Bits { first, data }), 128).map_err(|e| e.message)
        };
        assert!(bits(128, 1).unwrap().is_some());
        assert!(bits(64, 9).unwrap().is_some());
        for (first, len) in [
            (129, 8),
            (64, 8),
            (128, 0),
            (u64::MAX - 63, 16),
            (128, STRETCH_BYTES + 1),
        ] {
            assert!(bits(first, len).unwrap_err().contains("of bits from"));
        }
    }
}
