//! What a leaf finds in the map that it belongs to.

#[path = "../../../host/block/src/image/map/leaf.rs"]
#[allow(dead_code, reason = "the models use a part of it")]
mod leaf;

pub(crate) use leaf::Leaf;

/// As few as tell a torn look from a whole one.
const LEAF_UNITS: u64 = 2;

/// All entries of a leaf are equal in the model.
fn follower(entry: u64, _distance: usize, _unit: u64) -> u64 {
    entry
}
