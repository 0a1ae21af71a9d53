//! The provider trait: `metactx.wit` in Rust words. A provider tells NBD clients
//! something about ranges of an export, by what the host lets it see of them;
//! never by their bytes.

use crate::{ByteRange, Info, LogLevel, Result};

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the contract's")]
pub enum Alloc {
    Data,
    Zero,
    Hole,
    Unknown,
}

/// Bytes that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocRun {
    /// How many.
    pub len: u64,
    /// What they are.
    pub state: Alloc,
    /// The image of the chain that has them: 1 is the top one, 0 none.
    pub depth: u32,
}

/// The node of the export, seen from outside.
pub trait NodeView {
    /// Its length in bytes.
    fn size(&self) -> u64;

    /// What is allocated: runs from the start of `range`, at most `max_runs`.
    fn allocation(&self, range: ByteRange, max_runs: u32) -> Result<Vec<AllocRun>>;

    /// Its dirty bitmaps.
    fn bitmap_names(&self) -> Vec<String>;

    /// Bytes for each bit of a bitmap.
    fn bitmap_granularity(&self, name: &str) -> Result<u32>;

    /// The bits for `range`, lowest bit of the first byte first. Bits begin at
    /// the granule that holds the start of the range.
    fn bitmap_bits(&self, name: &str, range: ByteRange) -> Result<Vec<u8>>;

    /// One log line; the host adds plugin and export.
    fn log(&self, level: LogLevel, message: &str);
}

/// A context on offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// `NAMESPACE:LEAF`, in a namespace of the vendor's own: `x-acme:heat`.
    pub name: String,
    /// Its status needs 64 bits: only clients with extended headers get it.
    pub wide: bool,
    /// For humans.
    pub description: String,
}

/// Bytes of which the same is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// How many; at least one.
    pub len: u64,
    /// What the context's documentation says of this number.
    pub status: u64,
}

/// How long the host may keep an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// For this request.
    None,
    /// Until the range is written to.
    UntilWrite,
    /// While [`ContextProvider::generation`] says this number.
    UntilGeneration(u64),
}

/// An answer: spans without gaps from the start of the range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// At least one. The last one may reach past the range.
    pub spans: Vec<Span>,
    /// How long it holds.
    pub keep: Keep,
}

impl Status {
    /// Spans from runs of equal neighbours, as many as `max_spans`: what comes
    /// after them is asked for again.
    pub fn collect(runs: impl IntoIterator<Item = Span>, max_spans: u32, keep: Keep) -> Self {
        let mut spans: Vec<Span> = Vec::new();
        for run in runs {
            let full = spans.len() == max_spans as usize;
            match spans.last_mut() {
                Some(last) if last.status == run.status => last.len += run.len,
                _ if full => break,
                _ => spans.push(run),
            }
        }
        Self { spans, keep }
    }
}

/// A provider of metadata contexts: an instance serves one export.
pub trait ContextProvider: Sized {
    /// Who the plugin is.
    fn info() -> Info;

    /// Begin with these options: a JSON object that fits the schema.
    fn open(view: &dyn NodeView, options: &str) -> Result<Self>;

    /// The contexts on offer. Asked once.
    fn contexts(&mut self, view: &dyn NodeView) -> Result<Vec<Context>>;

    /// What is to be told of `range`, which is inside the export, in at most
    /// `max_spans` spans.
    fn block_status(
        &mut self,
        view: &dyn NodeView,
        context: &str,
        range: ByteRange,
        max_spans: u32,
    ) -> Result<Status>;

    /// Answers that hold [`Keep::UntilGeneration`] hold while this number stays.
    fn generation(&mut self, context: &str) -> u64 {
        let _ = context;
        0
    }
}

/// What a context says, in terms of what the host knows of the node (`rules.wit`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// What is dirty in a bitmap.
    Bitmap {
        /// One that [`NodeView::bitmap_names`] has.
        name: String,
        /// The status of bytes whose granule is clean.
        clean: u64,
        /// The status of bytes whose granule is dirty.
        dirty: u64,
    },
    /// The status is [`AllocRun::depth`].
    AllocationDepth,
}

/// A provider that can say of its contexts what they mean, so that the host
/// answers clients by itself. [`ContextProvider::block_status`] still does, for
/// contexts without a rule and for older hosts.
pub trait ContextRules: ContextProvider {
    /// The rule of one of [`ContextProvider::contexts`]. Asked once.
    fn rule(&mut self, context: &str) -> Result<Option<Rule>>;
}
