//! One client that writes until it leaves or is cut off, and remembers what it was told.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use outport_tests::nbd::{Address, Client, Haggle};

/// Where a client writes: this many blocks that nobody else touches.
const BLOCKS: u64 = 8;
const BLOCK_BYTES: u64 = 4096;

/// What became of a block: the last number sent, and the last one acknowledged.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    sent: u64,
    acknowledged: u64,
}

/// A client, at work or not any more.
#[derive(Debug)]
pub(crate) struct Load {
    session: u64,
    node: String,
    leave: Arc<AtomicBool>,
    cut: Arc<AtomicBool>,
    thread: JoinHandle<(Vec<Written>, u64)>,
}

impl Load {
    /// Attaches to an export; nothing if the server refuses or there is none.
    pub(crate) fn attach(socket: &Path, export: &str, session: u64) -> Option<Self> {
        let address = Address::Unix(socket.to_owned());
        let client = Haggle::connect(&address)
            .and_then(|haggle| haggle.go(export))
            .ok()?;
        let (leave, cut) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let (leaves, is_cut) = (leave.clone(), cut.clone());
        let thread = std::thread::spawn(move || write_on(client, session, &leaves, &is_cut));
        let node = String::new();
        Some(Self {
            session,
            node,
            leave,
            cut,
            thread,
        })
    }

    /// On which node it writes.
    pub(crate) fn on(self, node: String) -> Self {
        Self { node, ..self }
    }

    pub(crate) fn node(&self) -> &str {
        &self.node
    }

    /// From now on a lost connection is no error.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    /// Lets it say goodbye, and waits for that.
    pub(crate) fn leave(self) -> Self {
        self.leave.store(true, Ordering::SeqCst);
        while !self.thread.is_finished() {
            std::thread::yield_now();
        }
        self
    }

    /// Looks into the file: nothing acknowledged is lost. How many writes were acknowledged.
    pub(crate) fn check(self, image: &Path) -> u64 {
        self.leave.store(true, Ordering::SeqCst);
        let (written, count) = self.thread.join().unwrap();
        let file = std::fs::File::open(image).unwrap();
        for (at, block) in written.iter().enumerate() {
            let mut bytes = [0; BLOCK_BYTES as usize];
            file.read_exact_at(&mut bytes, place(self.session, at as u64))
                .unwrap();
            let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let whole = bytes.chunks(8).all(|chunk| chunk == &bytes[..8]);
            let expected = block.acknowledged..=block.sent;
            let (node, session) = (&self.node, self.session);
            assert!(
                whole && expected.contains(&stamp),
                "{node}, client {session}, block {at}: {stamp} is not in {expected:?}"
            );
        }
        count
    }
}

fn place(session: u64, block: u64) -> u64 {
    (session * BLOCKS + block) * BLOCK_BYTES
}

/// Writes rising numbers, and reads now and then what it wrote.
fn write_on(
    mut client: Client,
    session: u64,
    leave: &AtomicBool,
    cut: &AtomicBool,
) -> (Vec<Written>, u64) {
    let mut written = vec![Written::default(); BLOCKS as usize];
    let mut number = 0;
    while !leave.load(Ordering::SeqCst) {
        number += 1;
        let at = number % BLOCKS;
        let block = &mut written[at as usize];
        block.sent = number;
        let data = number.to_le_bytes().repeat(BLOCK_BYTES as usize / 8);
        let done = client.write(place(session, at), &data).and_then(|outcome| {
            outcome.expect("a write succeeds while the export is there");
            block.acknowledged = number;
            if number % 5 == 0 {
                let read = client.read(place(session, at), BLOCK_BYTES as u32)?;
                assert_eq!(read.expect("it reads"), data, "its own write");
            }
            Ok(())
        });
        if let Err(error) = done {
            // The control thread says so before the daemon does it.
            assert!(
                cut.load(Ordering::SeqCst),
                "client {session} was cut off: {error}"
            );
            return (written, number);
        }
    }
    if let Err(error) = client.disconnect() {
        assert!(
            cut.load(Ordering::SeqCst),
            "client {session}, goodbye: {error}"
        );
    }
    (written, number)
}
