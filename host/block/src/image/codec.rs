//! Native decoding and encoding of compressed units, and a small cache of
//! decoded ones.
//!
//! Any iothread; the cache is locked for a lookup or an insert only. A stored
//! unit may be followed by bytes that do not belong to it.

use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::bufread::{DeflateDecoder, GzDecoder, ZlibDecoder};

use crate::Errno;
use crate::format::{Codec, Coded};

/// Decoded bytes kept per node: a few of the largest units, many usual ones.
const CACHE_BYTES: usize = 8 << 20;

/// Readers of qcow2 images inflate with a window of 4 KiB: farther matches are errors to them.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Decode `stored` into exactly `unit_len` bytes.
pub(crate) fn decode(codec: Codec, stored: &[u8], unit_len: usize) -> Result<Vec<u8>, Errno> {
    let mut out = vec![0; unit_len];
    let result = match codec {
        Codec::Deflate => DeflateDecoder::new(stored).read_exact(&mut out),
        Codec::Zlib => ZlibDecoder::new(stored).read_exact(&mut out),
        Codec::Gzip => GzDecoder::new(stored).read_exact(&mut out),
        Codec::Zstd => zstd::stream::read::Decoder::with_buffer(stored)
            .and_then(|mut d| d.read_exact(&mut out)),
    };
    result.map(|()| out).map_err(|_| Errno::Io)
}

/// Encode a unit; `None` if the result would not be smaller than `len_max`.
pub(crate) fn encode(codec: Codec, unit: &[u8], len_max: usize) -> Option<Vec<u8>> {
    use flate2::bufread::{GzEncoder, ZlibEncoder};
    use flate2::{Compress, Compression, FlushCompress, Status};
    let mut out = Vec::with_capacity(unit.len() / 2);
    let level = Compression::default();
    let done = match codec {
        Codec::Deflate => {
            // More than the unit itself is not wanted, so there is no need to grow.
            out.reserve(len_max);
            let mut deflate = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS);
            match deflate.compress_vec(unit, &mut out, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => Ok(out.len()),
                _ => return None,
            }
        }
        Codec::Zlib => ZlibEncoder::new(unit, level).read_to_end(&mut out),
        Codec::Gzip => GzEncoder::new(unit, level).read_to_end(&mut out),
        Codec::Zstd => zstd::stream::read::Encoder::with_buffer(unit, 0)
            .and_then(|mut e| e.read_to_end(&mut out)),
    };
    done.ok().filter(|_| out.len() < len_max).map(|_| out)
}

/// Decoded units, oldest first out.
#[derive(Debug, Default)]
struct Units {
    by_key: HashMap<Coded, Arc<Vec<u8>>>,
    by_age: VecDeque<Coded>,
    bytes: usize,
}

/// The decoded units of one image.
#[derive(Debug, Default)]
pub(crate) struct DecodedCache(Mutex<Units>);

impl DecodedCache {
    fn units(&self) -> std::sync::MutexGuard<'_, Units> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The unit, if it is here.
    pub(crate) fn get(&self, unit: &Coded) -> Option<Arc<Vec<u8>>> {
        self.units().by_key.get(unit).cloned()
    }

    /// Remember a unit.
    pub(crate) fn put(&self, unit: Coded, data: Arc<Vec<u8>>) {
        let mut units = self.units();
        units.bytes += data.len();
        if let Some(old) = units.by_key.insert(unit, data) {
            units.bytes -= old.len();
        } else {
            units.by_age.push_back(unit);
        }
        while units.bytes > CACHE_BYTES && units.by_age.len() > 1 {
            let old = units.by_age.pop_front();
            if let Some(old) = old.and_then(|key| units.by_key.remove(&key)) {
                units.bytes -= old.len();
            }
        }
    }

    /// Stored bytes were freed or rewritten.
    pub(crate) fn clear(&self) {
        *self.units() = Units::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_codec_round_trips_with_bytes_behind_it() {
        let unit: Vec<u8> = (0..65536u32).map(|i| (i / 100) as u8).collect();
        for codec in [Codec::Deflate, Codec::Zlib, Codec::Gzip, Codec::Zstd] {
            let mut stored = encode(codec, &unit, unit.len()).unwrap();
            stored.extend_from_slice(&[0xa5; 100]);
            assert_eq!(
                decode(codec, &stored, unit.len()).unwrap(),
                unit,
                "{codec:?}"
            );
        }
    }

    #[test]
    fn the_cache_forgets_the_oldest_and_stays_within_its_bytes() {
        let cache = DecodedCache::default();
        let unit = |n: u64| Coded {
            slot: 0,
            offset: n,
            stored_len: 1,
            codec: Codec::Zstd,
            unit_offset: n << 20,
            unit_len: 1 << 20,
        };
        for n in 0..20 {
            cache.put(unit(n), Arc::new(vec![0; 1 << 20]));
            cache.put(unit(n), Arc::new(vec![0; 1 << 20]));
        }
        assert!(cache.get(&unit(11)).is_none());
        assert!((12..20).all(|n| cache.get(&unit(n)).is_some()));
        assert!(cache.units().bytes <= CACHE_BYTES);
    }

    #[test]
    fn damaged_and_short_units_are_errors() {
        assert_eq!(decode(Codec::Deflate, &[0xff; 40], 512), Err(Errno::Io));
        let stored = encode(Codec::Zstd, &[1; 512], 512).unwrap();
        assert_eq!(decode(Codec::Zstd, &stored, 1024), Err(Errno::Io));
    }
}
