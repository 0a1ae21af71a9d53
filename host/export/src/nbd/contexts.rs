//! Metadata contexts: which of an export's contexts a client's queries mean.
//!
//! Pure, control plane only. Invariant: a query selects each context at most once, and what a
//! query does not name exactly is selected only where the protocol allows wildcards.
//! NBD proto: "Metadata querying".

use super::exports::ContextInfo;
use super::limits::CONTEXTS_MAX;

/// What the client does with its queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKind {
    /// `NBD_OPT_LIST_META_CONTEXT`: no query means all, and `namespace:` is a wildcard.
    List,
    /// `NBD_OPT_SET_META_CONTEXT`: no query means none, and only exact names select.
    Set,
}

/// The queries select more contexts than a connection may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany;

/// The contexts that `queries` mean, in the export's order.
///
/// Unknown namespaces and unknown leaves match nothing, which is no error.
///
/// # Errors
/// More than [`CONTEXTS_MAX`] would be set.
pub fn select<'a>(
    kind: QueryKind,
    offered: &'a [ContextInfo],
    extended: bool,
    queries: &[String],
) -> Result<Vec<&'a ContextInfo>, TooMany> {
    let all = kind == QueryKind::List && queries.is_empty();
    let chosen: Vec<&ContextInfo> = offered
        .iter()
        .filter(|context| extended || !context.wide)
        .filter(|context| {
            all || queries
                .iter()
                .any(|query| matches(kind, &context.name, query))
        })
        .collect();
    match kind {
        QueryKind::Set if chosen.len() > CONTEXTS_MAX => Err(TooMany),
        _ => Ok(chosen),
    }
}

/// Whether one query means this context.
///
/// A query that ends in a colon lists what lies below it: `base:`, and likewise `qemu:` and
/// `qemu:dirty-bitmap:`, as QEMU has it.
fn matches(kind: QueryKind, context: &str, query: &str) -> bool {
    context == query
        || (kind == QueryKind::List && query.ends_with(':') && context.starts_with(query))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered() -> Vec<ContextInfo> {
        let names = [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:b0",
            "qemu:dirty-bitmap:b1",
            "x-wide:heat",
        ];
        (0u32..)
            .zip(names)
            .map(|(id, name)| ContextInfo {
                name: name.to_owned(),
                id,
                wide: name.starts_with("x-wide"),
            })
            .collect()
    }

    fn ids(kind: QueryKind, extended: bool, queries: &[&str]) -> Vec<u32> {
        let queries: Vec<String> = queries.iter().map(ToString::to_string).collect();
        let offered = offered();
        select(kind, &offered, extended, &queries)
            .unwrap()
            .iter()
            .map(|c| c.id)
            .collect()
    }

    #[test]
    fn zero_queries_list_all_and_set_none() {
        assert_eq!(ids(QueryKind::List, true, &[]), [0, 1, 2, 3, 4]);
        assert_eq!(ids(QueryKind::Set, true, &[]), [0u32; 0]);
    }

    /// Detail 6 of the list of details that servers get wrong.
    #[test]
    fn base_is_a_wildcard_in_list_only() {
        assert_eq!(ids(QueryKind::List, false, &["base:"]), [0]);
        assert_eq!(ids(QueryKind::Set, false, &["base:"]), [0u32; 0]);
        assert_eq!(ids(QueryKind::List, false, &["qemu:"]), [1, 2, 3]);
        assert_eq!(ids(QueryKind::List, false, &["qemu:dirty-bitmap:"]), [2, 3]);
        assert_eq!(
            ids(QueryKind::Set, false, &["qemu:dirty-bitmap:"]),
            [0u32; 0]
        );
        assert_eq!(ids(QueryKind::List, false, &["base", ":", ""]), [0u32; 0]);
    }

    #[test]
    fn unknown_namespaces_are_ignored_and_repeats_count_once() {
        let queries = [
            "acme:x",
            "base:allocation",
            "base:nothing",
            "base:allocation",
        ];
        assert_eq!(ids(QueryKind::Set, false, &queries), [0]);
    }

    #[test]
    fn wide_contexts_need_extended_headers() {
        assert_eq!(ids(QueryKind::Set, false, &["x-wide:heat"]), [0u32; 0]);
        assert_eq!(ids(QueryKind::Set, true, &["x-wide:heat"]), [4]);
    }

    #[test]
    fn more_contexts_than_a_mask_has_bits_are_refused() {
        let offered: Vec<ContextInfo> = (0..=64u32)
            .map(|id| ContextInfo {
                name: format!("x:{id}"),
                id,
                wide: false,
            })
            .collect();
        let queries: Vec<String> = offered.iter().map(|c| c.name.clone()).collect();
        assert_eq!(
            select(QueryKind::Set, &offered, false, &queries),
            Err(TooMany)
        );
        assert_eq!(
            select(QueryKind::Set, &offered, false, &queries[1..])
                .unwrap()
                .len(),
            64
        );
    }
}
