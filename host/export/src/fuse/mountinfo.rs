//! `/proc/self/mountinfo`: what is mounted where (proc(5)).
//!
//! Pure. Invariant: a line that cannot be understood is left out; nothing here panics.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// `major:minor` of its file system.
    pub(super) device: (u32, u32),
    pub(super) target: PathBuf,
    /// Type of the file system, with its subtype.
    pub(super) kind: String,
}

/// All mounts, the newest of a place last.
pub(super) fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|byte| *byte == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let target = unescaped(fields.nth(1)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Entry {
        device: (major.parse().ok()?, minor.parse().ok()?),
        target: PathBuf::from(OsString::from_vec(target)),
        kind: String::from_utf8(unescaped(kind)).ok()?,
    })
}

/// Spaces and the like are written in octal.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = |digits: &[u8]| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        };
        match (*first, after.get(..3).and_then(octal)) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_device_place_and_type() {
        let text = b"27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            42 27 0:39 / /tmp/a\\040file rw,nosuid - fuse.outport outport rw,user_id=0\n\
            nonsense\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].kind, "ext4");
        let fuse = Entry {
            device: (0, 39),
            target: PathBuf::from("/tmp/a file"),
            kind: "fuse.outport".to_owned(),
        };
        assert_eq!(mounts[1], fuse);
    }

    #[test]
    fn odd_bytes_are_kept() {
        assert_eq!(unescaped(b"a\\134b\\9\\"), b"a\\b\\9\\");
    }
}
