//! The host's codecs, natively.

use crate::{Codec, Error, Result};
use flate2::Compression;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
use std::io::{Read, Write};

/// The stored form of `data`.
pub fn encode(codec: Codec, data: &[u8]) -> Vec<u8> {
    let level = Compression::default();
    let stored = match codec {
        Codec::Deflate => {
            let mut w = DeflateEncoder::new(Vec::new(), level);
            w.write_all(data).and_then(|()| w.finish())
        }
        Codec::Zlib => {
            let mut w = ZlibEncoder::new(Vec::new(), level);
            w.write_all(data).and_then(|()| w.finish())
        }
        Codec::Gzip => {
            let mut w = GzEncoder::new(Vec::new(), level);
            w.write_all(data).and_then(|()| w.finish())
        }
        Codec::Zstd => zstd::bulk::compress(data, 3),
    };
    stored.expect("a Vec takes every byte")
}

/// Exactly `unit_len` bytes from `stored`, which may run past the stream.
pub fn decode(codec: Codec, stored: &[u8], unit_len: u32) -> Result<Vec<u8>> {
    let mut unit = vec![0; unit_len as usize];
    let decoded = match codec {
        Codec::Deflate => DeflateDecoder::new(stored).read_exact(&mut unit),
        Codec::Zlib => ZlibDecoder::new(stored).read_exact(&mut unit),
        Codec::Gzip => MultiGzDecoder::new(stored).read_exact(&mut unit),
        Codec::Zstd => zstd::stream::read::Decoder::with_buffer(stored)
            .and_then(|decoder| decoder.single_frame().read_exact(&mut unit)),
    };
    decoded.map_err(|e| Error::io(format!("The compressed unit is damaged: {e}")))?;
    Ok(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_with_bytes_after_the_stream_and_refuses_damage() {
        let data: Vec<u8> = (0..65536_u32).map(|i| (i / 300) as u8).collect();
        for codec in [Codec::Deflate, Codec::Zlib, Codec::Gzip, Codec::Zstd] {
            let mut stored = encode(codec, &data);
            assert!(stored.len() < data.len());
            stored.extend([0xa5; 100]);
            assert_eq!(decode(codec, &stored, 65536).unwrap(), data, "{codec:?}");
            assert!(decode(codec, &stored[..20], 65536).is_err(), "{codec:?}");
        }
    }
}
