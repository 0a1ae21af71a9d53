//! Random sparse images read as Android's own tools read them; damaged ones are
//! refused with words.

use format_android_sparse::Simg;
use outport_sdk::testing::{MemoryHost, Random, TestNode};
use outport_sdk::{Format, Location};
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

/// Run `tool` on `input`; what it wrote, or `None` where it is not installed.
fn tool(tool: &str, name: &str, input: &[u8]) -> Option<Vec<u8>> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (from, to) = (
        dir.join(format!("{name}.in")),
        dir.join(format!("{name}.out")),
    );
    fs::write(&from, input).unwrap();
    let _ = fs::remove_file(&to);
    match Command::new(tool).arg(&from).arg(&to).status() {
        Ok(status) => {
            assert!(status.success(), "{tool}: {status}");
            Some(fs::read(&to).unwrap())
        }
        Err(e) => {
            assert!(env::var_os("CI").is_none(), "{tool}: {e}");
            println!("skipped: {tool} is not installed (android-sdk-libsparse-utils)");
            None
        }
    }
}

fn content(image: &[u8]) -> outport_sdk::Result<Vec<u8>> {
    let mut node = TestNode::<Simg>::open_read_only(MemoryHost::new(image.to_vec()), "{}")?;
    if node.geometry().size > 1 << 24 {
        // A damaged count: nothing to compare, but every chunk is looked at.
        return node.extents().map(|_| Vec::new());
    }
    let all = node.read_all()?.to_vec();
    // Small reads see the same as one large one.
    for at in (0..all.len()).step_by(all.len() / 7 + 1) {
        let len = (all.len() - at).min(5000);
        assert_eq!(node.read(at as u64, len)?, all[at..at + len]);
    }
    Ok(all)
}

/// A well-formed image of all kinds of chunks.
fn sparse(random: &mut Random) -> Vec<u8> {
    let block_len = [512, 1024, 4096, 12288][random.below(4) as usize];
    let (mut chunks, mut blocks, mut body) = (0_u32, 0, Vec::new());
    for _ in 0..random.below(40) {
        // Of empty chunks, libsparse makes an output in a wrong order.
        let len = 1 + random.below(8) as u32;
        let (kind, len, data) = match random.below(5) {
            0 => (0xcac1_u16, len, random.bytes(len as usize * block_len)),
            1 => (0xcac2, len, random.bytes(4)),
            2 => (0xcac2, len, vec![0; 4]),
            3 => (0xcac3, len, vec![]),
            _ => (0xcac4, 0, vec![0; 4]),
        };
        body.extend([kind.to_le_bytes(), [0; 2]].concat());
        body.extend([len.to_le_bytes(), (data.len() as u32 + 12).to_le_bytes()].concat());
        body.extend(data);
        chunks += 1;
        blocks += len;
    }
    let mut image = 0xed26_ff3a_u32.to_le_bytes().to_vec();
    image.extend([1_u16, 0, 28, 12].iter().flat_map(|n| n.to_le_bytes()));
    image.extend(
        [block_len as u32, blocks, chunks, 0]
            .iter()
            .flat_map(|n| n.to_le_bytes()),
    );
    image.extend(body);
    image
}

#[test]
fn reads_what_simg2img_makes_of_it() {
    for seed in 0..60 {
        let image = sparse(&mut Random::new(seed));
        let ours = content(&image).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let Some(theirs) = tool("simg2img", "random", &image) else {
            return;
        };
        assert!(
            ours == theirs,
            "seed {seed}: {} and {} bytes",
            ours.len(),
            theirs.len()
        );
    }
}

#[test]
fn reads_what_img2simg_made() {
    let mut random = Random::new(99);
    for _ in 0..10 {
        let mut raw = Vec::new();
        for _ in 0..random.below(200) {
            match random.below(3) {
                0 => raw.extend(random.bytes(4096)),
                1 => raw.extend(random.bytes(4).repeat(1024)),
                _ => raw.extend([0; 4096]),
            }
        }
        let Some(image) = tool("img2simg", "raw", &raw) else {
            return;
        };
        assert!(content(&image).unwrap() == raw);
    }
}

#[test]
fn says_where_nothing_has_to_be_read() {
    let mut random = Random::new(5);
    let mut kinds = [0; 4];
    for _ in 0..30 {
        let host = MemoryHost::new(sparse(&mut random));
        let mut node = TestNode::<Simg>::open_read_only(host, "{}").unwrap();
        for extent in node.extents().unwrap() {
            kinds[match extent.at {
                Location::Raw {
                    in_place: false, ..
                } => 0,
                Location::Zero => 1,
                Location::Hole => 2,
                Location::Special(_) => 3,
                other => panic!("{other:?}"),
            }] += 1;
        }
    }
    assert!(kinds.iter().all(|n| *n > 20), "{kinds:?}");
}

#[test]
fn damaged_images_give_errors_and_never_panic() {
    let mut random = Random::new(7);
    let (mut refused, mut messages) = (0, std::collections::BTreeSet::new());
    for _ in 0..1000 {
        let mut image = sparse(&mut random);
        match random.below(4) {
            0 => image.truncate(random.below(image.len() as u64) as usize),
            1 => image[random.below(28) as usize] = random.next() as u8,
            _ => {
                let at = random.below(image.len() as u64) as usize;
                image[at] ^= 1 << random.below(8);
            }
        }
        if let Err(e) = content(&image) {
            assert!(!e.message.contains("Broken contract"), "{e}");
            messages.insert(
                e.message
                    .split([':', '0', '1', '2'])
                    .next()
                    .map(str::to_owned),
            );
            refused += 1;
        }
    }
    assert!(
        refused > 200 && messages.len() > 5,
        "{refused} {messages:?}"
    );
}

#[test]
fn is_recognised_by_its_magic_only() {
    assert_eq!(Simg::probe(&sparse(&mut Random::new(1)), 4096), 100);
    assert_eq!(Simg::probe(b"QFI\xfb", 4096), 0);
    assert_eq!(Simg::probe(&[], 0), 0);
}

#[test]
fn is_never_writable() {
    let host = MemoryHost::new(sparse(&mut Random::new(1)));
    assert!(Simg::open(&host, "{}", true).is_err());
}
