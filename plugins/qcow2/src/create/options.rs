//! The creation options: JSON in QEMU's names, and QEMU's constraints in
//! QEMU's sentences.

use outport_sdk::{Errno, Error, Result};
use serde_json::{Map, Value};

use crate::header::{
    BACKING_NAME_MAX, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, EXTENDED_CLUSTER_BITS_MIN,
};

pub(super) const SCHEMA: &str = include_str!("options.json");

/// How much of the image exists from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preallocation {
    /// No guest cluster.
    Off,
    /// All tables, and file length for the data.
    Metadata,
    /// The same, and the file system keeps space.
    Falloc,
    /// The same, with zeroes written.
    Full,
}

/// Creation options that passed every check.
#[derive(Clone, Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "they are QEMU's options, one by one"
)]
pub(super) struct Options {
    /// Of the header: 2 or 3.
    pub(super) version: u32,
    pub(super) size: u64,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) lazy_refcounts: bool,
    pub(super) extended_l2: bool,
    pub(super) zstd: bool,
    pub(super) preallocation: Preallocation,
    pub(super) backing_file: Option<String>,
    pub(super) backing_fmt: Option<String>,
    pub(super) data_file: Option<String>,
    pub(super) data_file_raw: bool,
}

impl Options {
    /// From a JSON object that (as the host has checked) fits the schema.
    pub(super) fn parse(json: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(json)
            .map_err(|e| Error::invalid(format!("The creation options are no JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(Error::invalid("The creation options must be a JSON object"));
        };
        let mut fields = Fields(map);
        if fields.0.remove("encrypt").is_some_and(|v| !v.is_null()) {
            return Err(Error::unsupported(
                "Encrypted images are not supported: leave out 'encrypt'",
            ));
        }
        let version = fields.choice("version", &[("v3", 3), ("v2", 2)])?;
        let size = fields
            .integer("size")?
            .ok_or_else(|| Error::invalid("Parameter 'size' is missing"))?;
        let cluster_size = fields.integer("cluster-size")?.unwrap_or(65536);
        let refcount_bits = fields.integer("refcount-bits")?.unwrap_or(16);
        let options = Self {
            version,
            size,
            cluster_bits: cluster_bits(cluster_size)?,
            refcount_order: refcount_order(refcount_bits)?,
            lazy_refcounts: fields.boolean("lazy-refcounts")?,
            extended_l2: fields.boolean("extended-l2")?,
            zstd: fields.choice("compression-type", &[("zlib", false), ("zstd", true)])?,
            preallocation: fields.choice(
                "preallocation",
                &[
                    ("off", Preallocation::Off),
                    ("metadata", Preallocation::Metadata),
                    ("falloc", Preallocation::Falloc),
                    ("full", Preallocation::Full),
                ],
            )?,
            backing_file: fields
                .string("backing-file")?
                .filter(|name| !name.is_empty()),
            backing_fmt: fields.string("backing-fmt")?,
            data_file: fields.string("data-file")?.filter(|name| !name.is_empty()),
            data_file_raw: fields.boolean("data-file-raw")?,
        };
        if let Some(name) = fields.0.keys().next() {
            return Err(Error::invalid(format!("Parameter '{name}' is unexpected")));
        }
        options.validate()?;
        Ok(options)
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// What holds for a measured image too.
    fn validate(&self) -> Result<()> {
        if self.version < 3 {
            self.validate_version_2()?;
        }
        if self.extended_l2 && self.cluster_bits < EXTENDED_CLUSTER_BITS_MIN {
            return refuse(format!(
                "Extended L2 entries are only supported with cluster sizes of at least \
                 {} bytes",
                1_u64 << EXTENDED_CLUSTER_BITS_MIN
            ));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return refuse("data-file-raw requires data-file");
        }
        if self.backing_fmt.is_some() && self.backing_file.is_none() {
            return refuse("Backing format cannot be used without backing file");
        }
        let Some(name) = &self.backing_file else {
            return Ok(());
        };
        if self.data_file_raw {
            return refuse("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.preallocation != Preallocation::Off && !self.extended_l2 {
            return refuse(
                "Backing file and preallocation can only be used at the same time if \
                 extended_l2 is on",
            );
        }
        if name.len() > BACKING_NAME_MAX as usize {
            return refuse(format!(
                "Backing file name is longer than {BACKING_NAME_MAX} bytes"
            ));
        }
        Ok(())
    }

    fn validate_version_2(&self) -> Result<()> {
        if self.extended_l2 {
            return refuse(
                "Extended L2 entries are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if self.lazy_refcounts {
            return refuse(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if self.refcount_order != 4 {
            return refuse(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if self.data_file.is_some() {
            return refuse(
                "External data files are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if self.zstd {
            return refuse(
                "Non-zlib compression type is only supported with compatibility level 1.1 and \
                 above (use version=v3 or greater)",
            );
        }
        Ok(())
    }

    /// What only creation asks for.
    pub(super) fn validate_for_creation(&self) -> Result<()> {
        if !self.size.is_multiple_of(512) {
            return refuse("Image size must be a multiple of 512 bytes");
        }
        Ok(())
    }
}

fn cluster_bits(size: u64) -> Result<u32> {
    let bits = size.trailing_zeros();
    if !size.is_power_of_two() || !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
        return refuse("Cluster size must be a power of two between 512 and 2048k");
    }
    Ok(bits)
}

fn refcount_order(bits: u64) -> Result<u32> {
    if !bits.is_power_of_two() || bits > 64 {
        return refuse("Refcount width must be a power of two and may not exceed 64 bits");
    }
    Ok(bits.trailing_zeros())
}

fn refuse<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(Errno::Einval, message))
}

/// The members that were not taken yet.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    fn integer(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(number) => Ok(Some(number)),
            None => refuse(format!("Parameter '{name}' expects uint64")),
        }
    }

    fn boolean(&mut self, name: &str) -> Result<bool> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(_) => refuse(format!(
                "Invalid parameter type for '{name}', expected: boolean"
            )),
        }
    }

    fn string(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => refuse(format!(
                "Invalid parameter type for '{name}', expected: string"
            )),
        }
    }

    /// One of `choices`; the first is the default.
    fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<T> {
        let given = self.string(name)?;
        let found = match &given {
            None => choices.first(),
            Some(given) => choices.iter().find(|(choice, _)| choice == given),
        };
        match found {
            Some((_, value)) => Ok(*value),
            None => refuse(format!(
                "Parameter '{name}' does not accept value '{}'",
                given.unwrap_or_default()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(json: &str) -> String {
        Options::parse(json)
            .and_then(|o| o.validate_for_creation())
            .unwrap_err()
            .message
    }

    #[test]
    fn schema_names_every_option() {
        let schema: Value = serde_json::from_str(SCHEMA).unwrap();
        let properties = schema["properties"].as_object().unwrap();
        for name in properties.keys() {
            let unexpected = format!("Parameter '{name}' is unexpected");
            let parsed = Options::parse(&format!("{{\"size\":512,\"{name}\":null}}"));
            assert_ne!(parsed.err().map(|e| e.message), Some(unexpected));
        }
        assert_eq!(properties.len(), 13);
    }

    #[test]
    fn refuses_in_the_sentences_of_qemu() {
        for (json, sentence) in [
            (
                r#"{"size":1000}"#,
                "Image size must be a multiple of 512 bytes",
            ),
            (r#"{}"#, "Parameter 'size' is missing"),
            (r#"{"size":"x"}"#, "Parameter 'size' expects uint64"),
            (r#"{"size":512,"foo":1}"#, "Parameter 'foo' is unexpected"),
            (
                r#"{"size":512,"version":"v4"}"#,
                "Parameter 'version' does not accept value 'v4'",
            ),
            (
                r#"{"size":512,"lazy-refcounts":1}"#,
                "Invalid parameter type for 'lazy-refcounts', expected: boolean",
            ),
            (
                r#"{"size":512,"cluster-size":1000}"#,
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                r#"{"size":512,"backing-fmt":"raw"}"#,
                "Backing format cannot be used without backing file",
            ),
            (
                r#"{"size":512,"data-file-raw":true}"#,
                "data-file-raw requires data-file",
            ),
        ] {
            assert_eq!(refusal(json), sentence);
        }
        assert!(refusal(r#"{"size":512,"encrypt":{}}"#).contains("Encrypted"));
    }
}
