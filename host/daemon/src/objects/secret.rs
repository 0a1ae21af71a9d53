//! Secrets: passwords and keys, in the clear or encrypted with another secret.
//!
//! The bytes are read once, when the object is made, and stay in the daemon: no command tells
//! them. Invariant: an object of this type holds a secret that could be decoded and decrypted.

use std::fmt;
use std::rc::Rc;

use aes::Aes256;
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use cbc::cipher::block_padding::NoPadding;
use cbc::cipher::{BlockModeDecrypt, KeyIvInit};
use outport_qmp::Error;
use outport_qmp::types::qom::{QCryptoSecretFormat, SecretProperties};

use crate::daemon::Daemon;

/// Bytes of an AES-256 key.
const KEY_BYTES: usize = 32;

/// Bytes of an AES block, and of what the encryption starts with.
const BLOCK_BYTES: usize = 16;

/// Base64 with or without its padding. (QEMU drops an unpadded end without a word.)
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes.
#[derive(Clone)]
pub(super) struct Secret(Rc<[u8]>);

/// Logs show that there is one, and no more.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Reads, decrypts and decodes it.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) async fn load(
        daemon: &Daemon,
        properties: &SecretProperties,
    ) -> Result<Self, Error> {
        let content = match (&properties.data, &properties.file) {
            (Some(_), Some(_)) => {
                return Err(Error::generic("'file' and 'data' are mutually exclusive"));
            }
            (Some(data), None) => data.clone().into_bytes(),
            (None, Some(file)) => read(file.clone()).await?,
            (None, None) => {
                return Err(Error::generic("Either 'file' or 'data' must be provided"));
            }
        };
        let bytes = match properties.format {
            Some(QCryptoSecretFormat::Base64) => decode(&content)?,
            Some(QCryptoSecretFormat::Raw) | None => content,
        };
        let bytes = match &properties.keyid {
            Some(keyid) => {
                let key = daemon.objects.borrow().secret(keyid)?;
                decrypt(&key, properties.iv.as_deref(), bytes)?
            }
            None => bytes,
        };
        Ok(Self(bytes.into()))
    }

    pub(super) fn bytes(&self) -> Rc<[u8]> {
        self.0.clone()
    }
}

/// A file as it is, its last line end included.
async fn read(path: String) -> Result<Vec<u8>, Error> {
    let reading = path.clone();
    let read = tokio::task::spawn_blocking(move || std::fs::read(reading)).await;
    let reason = match read {
        Ok(Ok(content)) => return Ok(content),
        Ok(Err(error)) => error,
        Err(error) => return Err(Error::generic(error.to_string())),
    };
    Err(Error::generic(format!(
        "Unable to read {path}: {}",
        unread(&path, &reason)
    )))
}

/// Why a file could not be read, as GLib says it.
pub(super) fn unread(path: &str, error: &std::io::Error) -> String {
    let what = match error.kind() {
        std::io::ErrorKind::IsADirectory => "Error reading",
        _ => "Failed to open",
    };
    let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
    format!("{what} file \u{201c}{path}\u{201d}: {reason}")
}

fn decode(text: &[u8]) -> Result<Vec<u8>, Error> {
    let lines = text.iter().copied().filter(|byte| *byte != b'\n');
    let joined: Vec<u8> = lines.collect();
    let decoded = BASE64.decode(joined);
    decoded.map_err(|_| Error::generic("Base64 data contains invalid characters"))
}

/// AES-256 in CBC mode with PKCS#7 padding.
fn decrypt(key: &[u8], iv: Option<&str>, mut bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
    let key: &[u8; KEY_BYTES] = key
        .try_into()
        .map_err(|_| Error::generic("Key should be 32 bytes in length"))?;
    let iv = iv.ok_or_else(|| Error::generic("IV is required to decrypt secret"))?;
    let iv = decode(iv.as_bytes())?;
    let iv: &[u8; BLOCK_BYTES] = iv
        .as_slice()
        .try_into()
        .map_err(|_| Error::generic(format!("IV should be 16 bytes in length not {}", iv.len())))?;
    let len = bytes.len();
    let uneven = || Error::generic(format!("Length {len} must be a multiple of block size 16"));
    if !len.is_multiple_of(BLOCK_BYTES) {
        return Err(uneven());
    }
    let decryptor = cbc::Decryptor::<Aes256>::new(key.into(), iv.into());
    let clear = decryptor.decrypt_padded::<NoPadding>(&mut bytes);
    let clear = clear.map_err(|_| uneven())?;
    let padding = clear.last().map_or(0, |last| usize::from(*last));
    let kept = clear.len().checked_sub(padding);
    match kept {
        Some(kept) if (1..=BLOCK_BYTES).contains(&padding) => Ok(clear[..kept].to_vec()),
        _ => Err(Error::generic(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_may_lack_its_padding_and_have_lines() {
        assert_eq!(decode(b"aGVs\nbG8=").unwrap(), b"hello");
        assert_eq!(decode(b"aGVsbG8").unwrap(), b"hello");
        assert_eq!(decode(b"").unwrap(), b"");
        let error = decode(b"%%%%").unwrap_err();
        assert_eq!(error.desc, "Base64 data contains invalid characters");
    }

    #[test]
    fn what_openssl_encrypts_is_decrypted() {
        // openssl enc -aes-256-cbc -K 30..30 -iv 30..30, of "the password".
        let key = [0x30; 32];
        let iv = "MDAwMDAwMDAwMDAwMDAwMA==";
        let cipher = decode(CIPHER.as_bytes()).unwrap();
        assert_eq!(decrypt(&key, Some(iv), cipher).unwrap(), b"the password");
    }

    const CIPHER: &str = "PesjxT50c3tI0n88CPZCjA==";

    #[test]
    fn mistakes_have_qemus_words() {
        let error = |key: &[u8], iv, len| decrypt(key, iv, vec![b'q'; len]).unwrap_err().desc;
        assert_eq!(
            error(b"short", None, 16),
            "Key should be 32 bytes in length"
        );
        let key = [7; 32];
        assert_eq!(error(&key, None, 16), "IV is required to decrypt secret");
        let iv = Some("YWJj");
        assert_eq!(error(&key, iv, 16), "IV should be 16 bytes in length not 3");
        let iv = Some("MDAwMDAwMDAwMDAwMDAwMA==");
        assert_eq!(
            error(&key, iv, 3),
            "Length 3 must be a multiple of block size 16"
        );
        let wrong = error(&key, iv, 16);
        assert!(
            wrong.starts_with("Incorrect number of padding bytes ("),
            "{wrong}"
        );
    }
}
