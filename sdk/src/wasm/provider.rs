//! A provider of metadata contexts as a component (worlds `metadata-context`,
//! `metadata-context-rules`).

#![forbid(unsafe_code)]

use super::bindings::about::outport::plugin::{log, types};
use super::bindings::provider::exports::outport::plugin::context_provider as wit;
use super::bindings::provider::outport::plugin::node_view;
use super::bindings::rules::exports::outport::plugin::context_rules;
use super::export::About;
use super::image::{Instance, enter, keep, with};
use crate::{
    Alloc, AllocRun, ByteRange, ContextProvider, ContextRules, Info, Keep, LogLevel, NodeView,
    Result, Rule, Span, Status,
};
use std::marker::PhantomData;

type Answer<T> = std::result::Result<T, types::Error>;

/// World `metadata-context`, and `metadata-context-rules`.
#[derive(Debug)]
pub struct Describer<T>(PhantomData<T>);

struct Host;

impl NodeView for Host {
    fn size(&self) -> u64 {
        node_view::size()
    }

    fn allocation(&self, range: ByteRange, max_runs: u32) -> Result<Vec<AllocRun>> {
        let runs = node_view::allocation(range.into(), max_runs)?;
        let run = |run: node_view::AllocRun| AllocRun {
            len: run.len,
            state: match run.state {
                node_view::Alloc::Data => Alloc::Data,
                node_view::Alloc::Zero => Alloc::Zero,
                node_view::Alloc::Hole => Alloc::Hole,
                node_view::Alloc::Unknown => Alloc::Unknown,
            },
            depth: run.depth,
        };
        Ok(runs.into_iter().map(run).collect())
    }

    fn bitmap_names(&self) -> Vec<String> {
        node_view::bitmap_names()
    }

    fn bitmap_granularity(&self, name: &str) -> Result<u32> {
        Ok(node_view::bitmap_granularity(name)?)
    }

    fn bitmap_bits(&self, name: &str, range: ByteRange) -> Result<Vec<u8>> {
        Ok(node_view::bitmap_bits(name, range.into())?)
    }

    fn log(&self, level: LogLevel, message: &str) {
        log::log(level.into(), message);
    }
}

impl<T: ContextProvider> About for Describer<T> {
    fn info() -> Info {
        T::info()
    }
}

impl<T: ContextProvider + Instance> wit::Guest for Describer<T> {
    fn open(options: String) -> Answer<()> {
        enter();
        keep(T::open(&Host, &options)?, false)
    }

    fn contexts(query: String) -> Answer<Vec<wit::Context>> {
        let contexts = with(|provider: &mut T| provider.contexts(&Host))?;
        let meant = |name: &str| {
            query.is_empty() || name == query || (query.ends_with(':') && name.starts_with(&query))
        };
        let contexts = contexts.into_iter().filter(|context| meant(&context.name));
        Ok(contexts
            .map(|context| wit::Context {
                name: context.name,
                flags_are_64bit: context.wide,
                description: context.description,
            })
            .collect())
    }

    fn block_status(
        context: String,
        range: types::ByteRange,
        max_spans: u32,
    ) -> Answer<wit::Status> {
        let status = with(|provider: &mut T| {
            provider.block_status(&Host, &context, range.into(), max_spans)
        })?;
        Ok(status.into())
    }

    fn generation(context: String) -> u64 {
        with(|provider: &mut T| Ok(provider.generation(&context))).unwrap_or_default()
    }
}

impl<T: ContextRules + Instance> context_rules::Guest for Describer<T> {
    fn rule_of(context: String) -> Answer<Option<context_rules::Rule>> {
        let rule = with(|provider: &mut T| provider.rule(&context))?;
        Ok(rule.map(Into::into))
    }
}

impl From<Rule> for context_rules::Rule {
    fn from(rule: Rule) -> Self {
        match rule {
            Rule::Bitmap { name, clean, dirty } => {
                Self::Bitmap(context_rules::BitmapRule { name, clean, dirty })
            }
            Rule::AllocationDepth => Self::AllocationDepth,
        }
    }
}

impl From<Status> for wit::Status {
    fn from(status: Status) -> Self {
        let span = |Span { len, status }| wit::Span { len, status };
        Self {
            spans: status.spans.into_iter().map(span).collect(),
            cache: match status.keep {
                Keep::None => wit::CachePolicy::None,
                Keep::UntilWrite => wit::CachePolicy::UntilWrite,
                Keep::UntilGeneration(generation) => wit::CachePolicy::UntilGeneration(generation),
            },
        }
    }
}
