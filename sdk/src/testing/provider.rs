//! A host for context providers: a node of which a test says what is allocated
//! and what is dirty.

use crate::{
    AllocRun, ByteRange, Context, ContextProvider, Errno, Error, LogLevel, NodeView, Result, Span,
};
use std::collections::BTreeMap;

/// A node in words.
#[derive(Clone, Debug, Default)]
pub struct TestView {
    /// Its length in bytes.
    pub size: u64,
    /// What is allocated, from the start.
    pub runs: Vec<AllocRun>,
    bitmaps: BTreeMap<String, (u32, Vec<bool>)>,
}

impl TestView {
    /// A node of this length with nothing known about it.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            ..Self::default()
        }
    }

    /// Add a bitmap without dirty granules.
    pub fn add_bitmap(&mut self, name: &str, granularity: u32) {
        let granules = self.size.div_ceil(u64::from(granularity));
        let granules = usize::try_from(granules).unwrap_or(usize::MAX);
        self.bitmaps
            .insert(name.to_owned(), (granularity, vec![false; granules]));
    }

    /// Make the granules of a range dirty.
    ///
    /// # Panics
    /// There is no such bitmap: a mistake in the test.
    pub fn mark(&mut self, name: &str, range: ByteRange) {
        let (granularity, granules) = self.bitmaps.get_mut(name).expect("the bitmap was added");
        let granularity = u64::from(*granularity);
        for (at, dirty) in (0..).zip(granules.iter_mut()) {
            *dirty |= at * granularity < range.end() && (at + 1) * granularity > range.offset;
        }
    }

    fn bitmap(&self, name: &str) -> Result<&(u32, Vec<bool>)> {
        let missing = || Error::new(Errno::Enoent, format!("There is no bitmap '{name}'"));
        self.bitmaps.get(name).ok_or_else(missing)
    }
}

impl NodeView for TestView {
    fn size(&self) -> u64 {
        self.size
    }

    fn allocation(&self, range: ByteRange, max_runs: u32) -> Result<Vec<AllocRun>> {
        let mut found = Vec::new();
        let mut at = 0;
        for run in &self.runs {
            let (start, end) = (at.max(range.offset), (at + run.len).min(range.end()));
            at += run.len;
            if start < end && found.len() < max_runs as usize {
                let len = end - start;
                found.push(AllocRun { len, ..*run });
            }
        }
        Ok(found)
    }

    fn bitmap_names(&self) -> Vec<String> {
        self.bitmaps.keys().cloned().collect()
    }

    fn bitmap_granularity(&self, name: &str) -> Result<u32> {
        Ok(self.bitmap(name)?.0)
    }

    fn bitmap_bits(&self, name: &str, range: ByteRange) -> Result<Vec<u8>> {
        let (granularity, granules) = self.bitmap(name)?;
        let granularity = u64::from(*granularity);
        let (first, last) = (
            range.offset / granularity,
            range.end().div_ceil(granularity),
        );
        let mut bits = vec![0; (last - first).div_ceil(8) as usize];
        let dirty = (0..).zip(granules).filter(|(_, dirty)| **dirty);
        for (at, _) in dirty.filter(|(at, _)| (first..last).contains(at)) {
            bits[((at - first) / 8) as usize] |= 1 << ((at - first) % 8);
        }
        Ok(bits)
    }

    fn log(&self, level: LogLevel, message: &str) {
        println!("{level:?}: {message}");
    }
}

/// One provider and the node that it sees, as the daemon has them.
#[derive(Debug)]
pub struct TestProvider<T> {
    provider: T,
    /// What it sees.
    pub view: TestView,
}

impl<T: ContextProvider> TestProvider<T> {
    /// A provider with these options for this node.
    ///
    /// # Errors
    /// Its own, or its schema is no JSON.
    pub fn open(view: TestView, options: &str) -> Result<Self> {
        let schema = T::info().options_schema;
        if !schema.is_empty() {
            serde_json::from_str::<serde_json::Value>(schema)
                .map_err(|e| Error::invalid(format!("The options schema: {e}")))?;
        }
        let provider = T::open(&view, options)?;
        Ok(Self { provider, view })
    }

    /// The contexts on offer, with names as the daemon takes them.
    ///
    /// # Errors
    /// Its own, or a name is not `NAMESPACE:LEAF`.
    pub fn contexts(&mut self) -> Result<Vec<Context>> {
        let contexts = self.provider.contexts(&self.view)?;
        for context in &contexts {
            let parts = context.name.split_once(':');
            let fits = parts.is_some_and(|(space, leaf)| !space.is_empty() && !leaf.is_empty());
            crate::ensure!(fits, "'{}' is not NAMESPACE:LEAF", context.name);
        }
        Ok(contexts)
    }

    /// All of a range, asked for as a client does that takes `max_spans` at a
    /// time; each answer is judged as the daemon does.
    ///
    /// # Errors
    /// Its own, or an answer outside the contract.
    pub fn status(&mut self, context: &str, range: ByteRange, max_spans: u32) -> Result<Vec<Span>> {
        let mut all: Vec<Span> = Vec::new();
        let mut at = range.offset;
        while at < range.end() {
            let rest = ByteRange::new(at, range.end() - at);
            let status = self
                .provider
                .block_status(&self.view, context, rest, max_spans)?;
            let spans = &status.spans;
            crate::ensure!(!spans.is_empty(), "A status without spans");
            crate::ensure!(
                spans.len() <= max_spans as usize,
                "More spans than asked for"
            );
            for span in spans {
                crate::ensure!(span.len > 0, "An empty span");
                crate::ensure!(at < range.end(), "A span past the range");
                let len = span.len.min(range.end() - at);
                at += span.len;
                match all.last_mut() {
                    Some(last) if last.status == span.status => last.len += len,
                    _ => all.push(Span { len, ..*span }),
                }
            }
        }
        Ok(all)
    }
}
