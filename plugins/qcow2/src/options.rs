//! The options of an open image: QEMU's names, as far as they concern the
//! format.

use outport_sdk::{Error, Result};
use serde::Deserialize;

use crate::pages::{CAPACITY_DEFAULT, CAPACITY_MAX, CAPACITY_MIN};

/// JSON Schema of the options.
pub(crate) const SCHEMA: &str = include_str!("options.json");

/// As the operator gave them.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Given {
    lazy_refcounts: Option<bool>,
    #[serde(rename = "pass-discard-request")]
    _pass_discard_request: Option<bool>,
    #[serde(rename = "pass-discard-snapshot")]
    _pass_discard_snapshot: Option<bool>,
    #[serde(rename = "pass-discard-other")]
    _pass_discard_other: Option<bool>,
    #[serde(rename = "overlap-check")]
    _overlap_check: Option<serde_json::Value>,
    cache_size: Option<u64>,
    l2_cache_size: Option<u64>,
    #[serde(rename = "l2-cache-entry-size")]
    _l2_cache_entry_size: Option<u64>,
    #[serde(rename = "refcount-cache-size")]
    _refcount_cache_size: Option<u64>,
    #[serde(rename = "cache-clean-interval")]
    _cache_clean_interval: Option<u64>,
    discard_no_unref: Option<bool>,
}

/// What the plugin makes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Asked for on the command line; `None`: as the image has it.
    pub(crate) lazy_refcounts: Option<bool>,
    /// Guest discards keep the host cluster.
    pub(crate) discard_no_unref: bool,
    /// Metadata pages in memory.
    pub(crate) cache_pages: usize,
}

impl Options {
    pub(crate) fn parse(json: &str) -> Result<Self> {
        let given: Given = if json.trim().is_empty() {
            Given::default()
        } else {
            serde_json::from_str(json)
                .map_err(|e| Error::invalid(format!("Invalid qcow2 options: {e}")))?
        };
        let cache_pages = match given.l2_cache_size.or(given.cache_size) {
            Some(bytes) => usize::try_from(bytes / 4096).unwrap_or(CAPACITY_MAX),
            None => CAPACITY_DEFAULT,
        };
        Ok(Self {
            lazy_refcounts: given.lazy_refcounts,
            discard_no_unref: given.discard_no_unref.unwrap_or(false),
            cache_pages: cache_pages.clamp(CAPACITY_MIN, CAPACITY_MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_of_the_schema_is_accepted_and_no_other() {
        let schema: serde_json::Value = serde_json::from_str(SCHEMA).unwrap();
        for (name, property) in schema["properties"].as_object().unwrap() {
            let value = match property["type"].as_str() {
                Some("boolean") => "true",
                Some("integer") => "1048576",
                _ => "\"none\"",
            };
            Options::parse(&format!("{{\"{name}\": {value}}}")).unwrap();
        }
        assert!(Options::parse("{\"compact\": true}").is_err());
        assert_eq!(Options::parse("").unwrap(), Options::parse("{}").unwrap());
        assert_eq!(
            Options::parse("{\"cache-size\": 1}").unwrap().cache_pages,
            CAPACITY_MIN
        );
    }
}
