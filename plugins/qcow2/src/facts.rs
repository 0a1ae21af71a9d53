//! What `query-named-block-nodes` shows of the format.

use outport_sdk::{Error, Files, Result};
use serde_json::{Map, Value, json};

use crate::bitmaps::Entry;
use crate::header::{Compression, compatible, incompatible};
use crate::image::Qcow2;

impl Qcow2 {
    /// QEMU's `ImageInfoSpecificQCow2` as `format-specific`, and the format's
    /// part of `ImageInfo` beside it.
    pub(crate) fn facts_json(&self, files: &dyn Files) -> Result<String> {
        let header = &self.header;
        let mut data = Map::new();
        if header.version < 3 {
            data.insert("compat".into(), json!("0.10"));
        } else {
            let lazy = header.compatible & compatible::LAZY_REFCOUNTS != 0;
            data.insert("compat".into(), json!("1.1"));
            data.insert("lazy-refcounts".into(), json!(lazy));
            data.insert(
                "corrupt".into(),
                json!(header.incompatible & incompatible::CORRUPT != 0),
            );
            data.insert("extended-l2".into(), json!(header.extended_l2()));
            if header.has_data_file() {
                if let Some(name) = header.data_file_name() {
                    data.insert("data-file".into(), json!(name));
                }
                data.insert("data-file-raw".into(), json!(header.data_file_raw()));
            }
        }
        let bitmaps = self.bitmap_facts(files)?;
        if !bitmaps.is_empty() {
            data.insert("bitmaps".into(), Value::Array(bitmaps));
        }
        data.insert("refcount-bits".into(), json!(header.refcount_bits()));
        data.insert(
            "compression-type".into(),
            json!(match header.compression {
                Compression::Deflate => "zlib",
                Compression::Zstd => "zstd",
            }),
        );
        let mut facts = Map::new();
        facts.insert("virtual-size".into(), json!(header.size));
        facts.insert("cluster-size".into(), json!(header.cluster_size()));
        facts.insert(
            "dirty-flag".into(),
            json!(header.incompatible & incompatible::DIRTY != 0),
        );
        if let Some(name) = &header.backing_file {
            facts.insert("backing-filename".into(), json!(name));
            if let Some(format) = header.backing_format() {
                facts.insert("backing-filename-format".into(), json!(format));
            }
        }
        if !self.snapshots.is_empty() {
            let snapshots = serde_json::to_value(&self.snapshots)
                .map_err(|e| Error::io(format!("Snapshots cannot be listed: {e}")))?;
            facts.insert("snapshots".into(), snapshots);
        }
        facts.insert(
            "format-specific".into(),
            json!({ "type": "qcow2", "data": Value::Object(data) }),
        );
        Ok(Value::Object(facts).to_string())
    }

    /// The bitmaps as the image has them now.
    fn bitmap_facts(&self, files: &dyn Files) -> Result<Vec<Value>> {
        let fact = |entry: &Entry| {
            let mut flags = Vec::new();
            if entry.is_in_use() {
                flags.push("in-use");
            }
            if entry.is_auto() {
                flags.push("auto");
            }
            let name = entry.name()?;
            Some(json!({"name": name, "granularity": entry.granularity(), "flags": flags}))
        };
        let directory = self.bitmap_directory(files)?;
        Ok(directory.iter().filter_map(fact).collect())
    }
}
