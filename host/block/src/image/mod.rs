//! A node whose format is understood by a plugin.
//!
//! Any iothread may use it; hits of the extent map take no lock. Everything
//! that needs the plugin goes through one async lock (`Image::plugin`), in
//! whose critical section the answer is verified, its transaction applied to
//! the overlay and the extent map changed, so that the three never disagree.
//!
//! ```text
//!   try_read / try_write --- map hit ---> child nodes (files)
//!          | miss                             ^         ^
//!   read / write --- plugin lock --- call --- verify   overlay --- flush
//! ```
//!
//! What changes an image runs as `engine::background::Finish`: a client that
//! goes away does not leave a plugin call, a reservation or a flush half done.
//!
//! Invariants: a mapping is in the map only if it was verified; what FLUSH
//! acknowledged is durable; freed space is reused only after its unmapping is
//! durable and everyone who might still use it has left (`gate`).

mod allocate;
mod ask;
mod codec;
mod copy_up;
mod discard;
mod fault;
mod files;
mod flush;
mod locks;
mod map;
mod open;
mod overlay;
mod persist;
mod read;
mod reopen;
mod resize;
mod room;
mod status;
#[cfg(test)]
mod tests;
mod turn;
mod verify;
mod write;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use tokio::sync::Mutex as AsyncMutex;

use crate::bitmap::NodeBitmaps;
use crate::format::{Format, FormatError, FormatFactory, Geometry, Grant, Placement, SlotRange};
use crate::gate::Gate;
use crate::node::Node;

pub use files::EventSink;
pub use open::{ChildSource, create};
pub use persist::CannotKeep;
pub use reopen::{Change, NewBacking};
pub(crate) use verify::fuzzing::verifier as fuzz_verifier;

use codec::DecodedCache;
use files::ImageFiles;
use flush::Flusher;
pub(crate) use locks::RangeLocks;
use map::ExtentMap;
use turn::Turn;
use verify::Verifier;

/// What an image tells the control plane.
#[derive(Clone, Debug)]
pub enum ImageEvent {
    /// Damage was found (QMP: BLOCK_IMAGE_CORRUPTED).
    Corrupted {
        /// Which node.
        node_name: String,
        /// What.
        message: String,
        /// Where, if known.
        offset: Option<u64>,
        /// How many bytes.
        size: Option<u64>,
        /// No more writes.
        fatal: bool,
    },
    /// The node changed to this state after plugin faults.
    State {
        /// Which node.
        node_name: String,
        /// Which state.
        state: ImageState,
    },
}

/// How much of an image can still be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Everything.
    Healthy,
    /// Reads only: a commit failed or damage was found.
    WritesRefused,
    /// Nothing: the plugin failed again.
    Failed,
}

/// What the plugin lock protects.
struct Plugin {
    /// `None`: it faulted, or a call of it was dropped; the next call makes a
    /// fresh one.
    instance: Option<Box<dyn Format>>,
    verifier: Verifier,
    /// Goes up with every fresh instance: older tokens mean nothing to it.
    generation: u64,
    /// Placements that were neither committed nor aborted.
    reserved: HashMap<u64, Placement>,
    /// Freed in the active generation of the overlay.
    freed: Vec<SlotRange>,
    /// Files to be cut.
    cuts: Vec<Cut>,
    faults: fault::Window,
    /// No call any more.
    closed: bool,
    /// Somebody else may be changing the image: what it looks like says nothing of the plugin.
    inactive: bool,
    /// What a fresh instance is opened with.
    options: String,
    grants: Vec<Grant>,
}

/// A file is to be cut when the mapping stage that asked for it is durable, but
/// not into what was placed there since.
#[derive(Clone, Copy, Debug)]
struct Cut {
    slot: u32,
    len: u64,
    /// Asked for in the generation that is being written out.
    sealed: bool,
}

/// A format node.
pub struct Image {
    factory: Arc<dyn FormatFactory>,
    writable: AtomicBool,
    files: Arc<ImageFiles>,
    backing: ArcSwapOption<Node>,
    /// As it was opened; length and granularities of zeroes and discards may change since.
    geometry: Geometry,
    size: AtomicU64,
    zero_granularity: AtomicU32,
    discard_granularity: AtomicU32,
    map: ExtentMap,
    plugin: AsyncMutex<Plugin>,
    turn: Turn,
    locks: RangeLocks,
    decoded: DecodedCache,
    /// One decoder per unit.
    decoding: RangeLocks,
    gate: Gate,
    flusher: Flusher,
    /// The node's, which the image keeps some of.
    bitmaps: Arc<NodeBitmaps>,
    /// Its file has, or may have, bitmaps.
    has_stored: AtomicBool,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("format", &self.factory.name())
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Guest-visible length in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Preferred I/O size.
    pub fn cluster_size(&self) -> u32 {
        self.geometry.cluster_size
    }

    /// Can it be written, as it was opened?
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Acquire)
    }

    /// What can still be used.
    pub fn state(&self) -> ImageState {
        self.files.state()
    }

    /// Storage children by slot; slot 0 is the image file.
    pub fn storage(&self) -> impl Iterator<Item = Arc<Node>> {
        self.files.nodes()
    }

    /// The backing node, if there is one.
    pub fn backing(&self) -> Option<Arc<Node>> {
        self.backing.load_full()
    }

    /// The format's factory.
    pub fn factory(&self) -> &Arc<dyn FormatFactory> {
        &self.factory
    }

    /// Format facts: a JSON object.
    ///
    /// # Errors
    /// The plugin's.
    pub async fn facts(&self) -> Result<String, FormatError> {
        let mut plugin = self.plugin.lock().await;
        self.call(&mut plugin, |f| f.facts()).await
    }
}
