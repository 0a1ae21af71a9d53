//! A disk as a plain vector, and random requests that keep it and an export in step.

use outport_tests::nbd::wire::{cmd, cmd_flag};
use outport_tests::nbd::{Client, Request};
use outport_tests::{Rng, assert_same};

/// Writes in flight at once; they never overlap, but share clusters.
const BATCH: usize = 8;

/// An export and what it must read as.
pub(crate) struct Model {
    client: Client,
    content: Vec<u8>,
    rng: Rng,
    name: String,
}

impl Model {
    /// An export whose content is known.
    pub(crate) fn new(client: Client, content: Vec<u8>, seed: u64, name: String) -> Self {
        Self {
            client,
            content,
            rng: Rng::new(seed),
            name,
        }
    }

    /// Sends `count` random requests and follows them.
    pub(crate) fn exercise(&mut self, count: usize) {
        for _ in 0..count {
            match self.rng.below(10) {
                0 => self.discard(),
                1 | 2 => self.zero(),
                3 => self.read_some(),
                4 => self.check(|client| client.flush(), "FLUSH"),
                5 | 6 => self.write_batch(),
                _ => self.write(),
            }
        }
    }

    /// Everything reads as the model says.
    pub(crate) fn verify(&mut self) {
        let read = read_all(&mut self.client, &self.name);
        assert_same(
            &read,
            &self.content,
            &format!("{}: over NBD, after writes", self.name),
        );
    }

    /// Says goodbye; what the image must hold from now on.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.client.disconnect().expect("a goodbye is heard");
        self.content
    }

    fn write(&mut self) {
        let (offset, len) = self.range();
        let data = self.rng.bytes(len);
        let flags = if self.rng.one_in(8) { cmd_flag::FUA } else { 0 };
        self.check(
            |client| client.command(flags, cmd::WRITE, offset as u64, len as u32, &data),
            "WRITE",
        );
        self.content[offset..offset + len].copy_from_slice(&data);
    }

    /// Neighbouring writes all at once: copy-on-write of one cluster must not lose another's.
    fn write_batch(&mut self) {
        let piece = 512 * self.rng.between(1, 16) as usize;
        let span = (2 * BATCH * piece).min(self.content.len());
        let start = self
            .rng
            .below(((self.content.len() - span) / 512 + 1) as u64) as usize
            * 512;
        let mut pieces: Vec<usize> = (0..span / piece).collect();
        self.rng.shuffle(&mut pieces);
        pieces.truncate(BATCH);
        let mut waiting: Vec<Request> = Vec::new();
        for at in pieces {
            let offset = start + at * piece;
            let data = self.rng.bytes(piece);
            let request = self
                .client
                .request(0, cmd::WRITE, offset as u64, piece as u32);
            self.client
                .send(&request, &data)
                .expect("the server takes requests");
            self.content[offset..offset + piece].copy_from_slice(&data);
            waiting.push(request);
        }
        while !waiting.is_empty() {
            let (cookie, result) = self
                .client
                .any_outcome()
                .expect("every request is answered");
            let at = waiting.iter().position(|request| request.cookie == cookie);
            let request = waiting.swap_remove(at.expect("the cookie is of one that waits"));
            assert_eq!(result, Ok(()), "{}: {request:?} in a batch", self.name);
        }
    }

    fn zero(&mut self) {
        let (offset, len) = self.range();
        let flags = *self.rng.pick(&[0, 0, cmd_flag::NO_HOLE, cmd_flag::FUA]);
        self.check(
            |client| client.command(flags, cmd::WRITE_ZEROES, offset as u64, len as u32, &[]),
            "WRITE_ZEROES",
        );
        self.content[offset..offset + len].fill(0);
    }

    /// A discarded byte reads as before, as zero, or as the backing file's; then it stays so.
    fn discard(&mut self) {
        let (offset, len) = self.range();
        self.check(
            |client| client.command(0, cmd::TRIM, offset as u64, len as u32, &[]),
            "TRIM",
        );
        let now = self
            .client
            .read(offset as u64, len as u32)
            .expect("it answers");
        let now = now.unwrap_or_else(|errno| panic!("{}: READ after TRIM: {errno}", self.name));
        self.content[offset..offset + len].copy_from_slice(&now);
    }

    fn read_some(&mut self) {
        let (offset, len) = self.range();
        let read = self
            .client
            .read(offset as u64, len as u32)
            .expect("it answers");
        let read = read.unwrap_or_else(|errno| panic!("{}: READ: error {errno}", self.name));
        let what = format!("{}: READ of {offset}+{len}", self.name);
        assert_same(&read, &self.content[offset..offset + len], &what);
    }

    /// A range of sectors: mostly small, sometimes over many clusters.
    fn range(&mut self) -> (usize, usize) {
        let sectors = (self.content.len() / 512) as u64;
        let most = if self.rng.one_in(4) { 2048 } else { 64 };
        let len = self.rng.between(1, most.min(sectors));
        let offset = self.rng.below(sectors - len + 1);
        (offset as usize * 512, len as usize * 512)
    }

    fn check(
        &mut self,
        request: impl FnOnce(&mut Client) -> std::io::Result<Result<(), u32>>,
        what: &str,
    ) {
        match request(&mut self.client) {
            Ok(Ok(())) => {}
            Ok(Err(errno)) => panic!("{}: {what}: error {errno}", self.name),
            Err(error) => panic!("{}: {what}: {error}", self.name),
        }
    }
}

/// Reads a whole export, a mebibyte at a time.
pub(crate) fn read_all(client: &mut Client, name: &str) -> Vec<u8> {
    let (size, mut content) = (client.export.size, Vec::new());
    while (content.len() as u64) < size {
        let offset = content.len() as u64;
        let len = (size - offset).min(1 << 20) as u32;
        match client.read(offset, len) {
            Ok(Ok(data)) => content.extend(data),
            other => panic!("{name}: READ of {offset}+{len}: {other:?}"),
        }
    }
    content
}
