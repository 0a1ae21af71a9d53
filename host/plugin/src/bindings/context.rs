//! What a context provider says, checked for being representable. Pure.

use outport_block::ByteRange;
use outport_block::metacontext::ContextExtent;
use outport_block::rule::Rule;

use super::Malformed;
use super::context_provider::{CachePolicy, Context, Status};
use super::context_rules;
use crate::answers::Validity;
use crate::limits::{NAME_BYTES_MAX, VIEW_RUNS_MAX};

/// Namespaces that only the host and its bundled plugins describe.
const RESERVED: [&str; 2] = ["base", "qemu"];

/// A context on offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    pub(crate) name: String,
    pub(crate) wide: bool,
    /// Said by a call of its own.
    pub(crate) rule: Option<Rule>,
}

/// The contexts of a provider: each once, each in a namespace of its own, but for the one of the
/// host's that it was asked for.
pub(crate) fn offered(
    listed: Vec<Context>,
    contexts_max: usize,
    asked_for: Option<&str>,
) -> Result<Vec<Offered>, Malformed> {
    if listed.len() > contexts_max {
        let count = listed.len();
        return Err(Malformed::answer(format!("{count} contexts")));
    }
    let mut offered: Vec<Offered> = Vec::new();
    for context in listed {
        let name = context.name;
        let (namespace, leaf) = name.split_once(':').unwrap_or_default();
        let plain = !name.contains(char::is_control) && name.len() <= NAME_BYTES_MAX;
        if namespace.is_empty() || leaf.is_empty() || !plain {
            let name: String = name.chars().take(64).collect();
            let name = name.escape_debug();
            return Err(Malformed::answer(format!(
                "The context name '{name}' is not NAMESPACE:LEAF"
            )));
        }
        if RESERVED.contains(&namespace) && asked_for != Some(name.as_str()) {
            return Err(Malformed::answer(format!(
                "The namespace of the context '{name}' is not a plugin's"
            )));
        }
        if offered.iter().any(|other| other.name == name) {
            return Err(Malformed::answer(format!("The context '{name}' twice")));
        }
        offered.push(Offered {
            name,
            wide: context.flags_are_64bit,
            rule: None,
        });
    }
    Ok(offered)
}

/// A rule in the host's words.
pub(crate) fn rule(rule: context_rules::Rule) -> Rule {
    match rule {
        context_rules::Rule::Bitmap(it) => Rule::Bitmap {
            name: it.name,
            clean: it.clean,
            dirty: it.dirty,
        },
        context_rules::Rule::AllocationDepth => Rule::AllocationDepth,
    }
}

/// A block status: at least one span, none empty, no more than asked for, without overflow.
pub(crate) fn status(
    status: Status,
    range: ByteRange,
    extents_max: usize,
    wide: bool,
) -> Result<(Vec<ContextExtent>, Validity), Malformed> {
    let bad = |what: &str| Err(Malformed::answer(what));
    let spans = status.spans;
    if spans.is_empty() {
        return bad("A status without spans");
    }
    if spans.len() > extents_max.min(VIEW_RUNS_MAX) {
        return bad("More spans than asked for");
    }
    let mut end = range.offset();
    let mut extents = Vec::with_capacity(spans.len());
    for span in spans {
        if span.len == 0 {
            return bad("An empty span");
        }
        if end >= range.end() {
            return bad("A span past the range");
        }
        end = match end.checked_add(span.len) {
            Some(end) => end,
            None => return bad("A span that ends past 2^64"),
        };
        if !wide && u32::try_from(span.status).is_err() {
            return bad("A status of more than 32 bits");
        }
        extents.push(ContextExtent {
            len: span.len,
            flags: span.status,
        });
    }
    let validity = match status.cache {
        CachePolicy::UntilGeneration(generation) => Validity::Generation(generation),
        CachePolicy::None => Validity::Now,
        CachePolicy::UntilWrite => Validity::Write,
    };
    Ok((extents, validity))
}

#[cfg(test)]
mod tests {
    use super::super::context_provider::Span;
    use super::*;

    fn listed(names: &[&str]) -> Result<Vec<Offered>, String> {
        let context = |name: &&str| Context {
            name: (*name).to_owned(),
            flags_are_64bit: false,
            description: String::new(),
        };
        offered(names.iter().map(context).collect(), 3, None).map_err(|e| e.message)
    }

    #[test]
    fn names_are_in_a_namespace_of_their_own() {
        assert_eq!(listed(&["x-heat:a", "x-heat:b"]).unwrap().len(), 2);
        for (names, said) in [
            (&["heat"][..], "is not NAMESPACE:LEAF"),
            (&["x:"], "is not NAMESPACE:LEAF"),
            (&["x:a\n"], "'x:a\\n' is not NAMESPACE:LEAF"),
            (&["base:allocation"], "is not a plugin's"),
            (&["qemu:dirty-bitmap:b"], "is not a plugin's"),
            (&["x:a", "x:a"], "twice"),
            (&["x:a", "x:b", "x:c", "x:d"], "4 contexts"),
        ] {
            let problem = listed(names).unwrap_err();
            assert!(problem.contains(said), "{problem}");
        }
    }

    fn told(spans: &[(u64, u64)], wide: bool) -> Result<usize, String> {
        let spans = spans.iter().map(|&(len, status)| Span { len, status });
        let answer = Status {
            spans: spans.collect(),
            cache: CachePolicy::UntilWrite,
        };
        let checked = status(answer, ByteRange::between(100, 200), 3, wide);
        checked
            .map(|(extents, _)| extents.len())
            .map_err(|e| e.message)
    }

    #[test]
    fn spans_are_checked() {
        assert_eq!(told(&[(50, 1), (500, 2)], false), Ok(2));
        assert_eq!(told(&[(50, u64::MAX)], true), Ok(1));
        for (spans, said) in [
            (&[][..], "without spans"),
            (&[(1, 0), (1, 1), (1, 0), (1, 1)], "More spans"),
            (&[(1, 0), (0, 1)], "An empty span"),
            (&[(100, 0), (1, 1)], "past the range"),
            (&[(u64::MAX, 0)], "past 2^64"),
            (&[(1, 1 << 32)], "more than 32 bits"),
        ] {
            let problem = told(spans, false).unwrap_err();
            assert!(problem.contains(said), "{problem}");
        }
    }
}
