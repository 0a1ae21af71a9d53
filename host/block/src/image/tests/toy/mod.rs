//! A toy image format: the block layer's test double of a writable plugin.
//!
//! ```text
//!   sector 0 header | table: 8 bytes per guest cluster | counts: 1 byte per
//!   file cluster | data clusters
//! ```
//!
//! An entry is 0 (nothing), [`ZERO`], an offset (data), `offset | ZERO` (zeroes
//! whose space is kept) or `offset | PACKED` (compressed). Counts go up in the
//! prepare stage, the table changes in the mapping stage, counts go down when
//! space comes back. [`Faults`] makes it lie, trap, hang or break that order.

mod calls;
mod faults;
mod layout;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::super::files::EventSink;
use super::super::open::{ChildSource, create};
use super::super::{Image, ImageEvent};
use crate::format::{
    Child, Fault, FaultKind, Format, FormatError, FormatFactory, FormatFiles, FormatFuture,
    Placement, TxnLog,
};
use crate::node::{Kind, Node};
use crate::{Errno, Result};

pub(super) use faults::{Act, Bug, Call, Faults};
pub(super) use layout::{Header, PACKED, ZERO};

/// Makes toys, and counts what became of them.
#[derive(Default)]
pub(super) struct ToyFactory {
    pub(super) faults: Arc<Faults>,
    pub(super) instances: AtomicUsize,
    pub(super) reported: std::sync::Mutex<Vec<Fault>>,
}

impl FormatFactory for ToyFactory {
    fn name(&self) -> &str {
        "toy"
    }

    fn writable(&self) -> bool {
        true
    }

    fn instantiate(&self, files: Arc<dyn FormatFiles>) -> FormatFuture<'_, Box<dyn Format>> {
        self.instances.fetch_add(1, Ordering::Relaxed);
        let toy = Toy {
            files,
            faults: self.faults.clone(),
            state: State::default(),
            header: Header::default(),
            writable: false,
            has_backing: false,
        };
        Box::pin(async move { Ok(Box::new(toy) as Box<dyn Format>) })
    }

    fn report_fault(&self, _: &str, fault: &Fault) {
        self.reported.lock().unwrap().push(fault.clone());
    }
}

/// One open image.
struct Toy {
    files: Arc<dyn FormatFiles>,
    faults: Arc<Faults>,
    header: Header,
    writable: bool,
    has_backing: bool,
    state: State,
}

/// What calls change.
#[derive(Default)]
struct State {
    /// Per file cluster.
    counts: Vec<u8>,
    reserved: HashMap<u64, Placement>,
    packed: HashMap<u64, bool>,
    next_token: u64,
    /// Stretches put away, by bitmap.
    staged: HashMap<String, usize>,
}

fn refused(code: Errno) -> FormatError {
    FormatError::Refused {
        code,
        message: code.to_string(),
    }
}

fn trap() -> FormatError {
    FormatError::Fault(Fault {
        kind: FaultKind::Trap,
        message: "a planted trap".to_owned(),
    })
}

/// Grants the backing node, if there is one.
pub(super) struct Grants(pub(super) Option<Arc<Node>>);

impl ChildSource for Grants {
    fn child(&mut self, child: &Child) -> Result<Option<Arc<Node>>> {
        assert_eq!(child.id, "backing");
        Ok(self.0.clone())
    }
}

/// What the image told.
#[derive(Clone, Default)]
pub(super) struct Told(Arc<std::sync::Mutex<Vec<ImageEvent>>>);

impl Told {
    fn sink(&self) -> EventSink {
        let told = self.0.clone();
        Arc::new(move |event| told.lock().unwrap().push(event))
    }

    pub(super) fn all(&self) -> Vec<ImageEvent> {
        self.0.lock().unwrap().clone()
    }
}

/// A new image in `file`: `options` is `bits,size,capacity`.
pub(super) async fn create_toy(file: &Arc<Node>, bits: u32, size: u64, capacity: u64) {
    let factory: Arc<dyn FormatFactory> = Arc::new(ToyFactory::default());
    let options = format!("{bits},{size},{capacity}");
    create(
        &factory,
        &options,
        file.clone(),
        Vec::new(),
        &AtomicBool::new(false),
    )
    .await
    .unwrap();
}

/// A node over the image in `file`.
pub(super) async fn open_toy(
    factory: &Arc<ToyFactory>,
    file: &Arc<Node>,
    backing: Option<Arc<Node>>,
    told: &Told,
) -> Result<Arc<Node>> {
    let image = Image::open(
        "toy0",
        factory.clone(),
        if backing.is_some() { "backing" } else { "" }.to_owned(),
        !file.is_read_only(),
        file.clone(),
        &mut Grants(backing),
        told.sink(),
    )
    .await?;
    let read_only = file.is_read_only();
    let kind = Kind::Image(Arc::new(image));
    Ok(Node::new("toy0", "toy", read_only, kind))
}

/// Everything queued by one call.
type Txn = TxnLog;
