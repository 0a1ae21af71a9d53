//! What a plugin says of the image as a whole.

use crate::ByteRange;
use crate::format::{Child, ChildKind, Fault, Geometry};

use super::super::map::SLOTS_MAX;
use super::bad;

/// Children that an image may ask for.
const CHILDREN_MAX: usize = SLOTS_MAX as usize - 1;

/// The largest block that a format allocates at once (VHDX).
const CLUSTER_MAX: u32 = 256 << 20;

/// The largest unit of mapping.
const UNIT_MAX: u32 = 2 << 20;

/// Is this geometry one that the host can serve?
pub(crate) fn geometry(g: &Geometry) -> Result<(), Fault> {
    let power = |n: u32, max: u32| n.is_power_of_two() && (512..=max).contains(&n);
    let optional = |n: u32| n == 0 || (n.is_power_of_two() && n >= g.unit);
    if g.size > ByteRange::END_MAX - (2 * u64::from(CLUSTER_MAX)) {
        return Err(bad(format!("the size {} is too large", g.size)));
    }
    if !power(g.unit, UNIT_MAX) || !power(g.cluster_size, CLUSTER_MAX) || g.cluster_size < g.unit {
        return Err(bad(format!(
            "unit {} and cluster size {} are not powers of two from 512 to 2 MiB and 256 MiB",
            g.unit, g.cluster_size
        )));
    }
    if !optional(g.zero_granularity) || !optional(g.discard_granularity) {
        return Err(bad(
            "a zero or discard granularity is no power of two".to_owned()
        ));
    }
    Ok(())
}

/// Are these children ones that the host can grant?
pub(crate) fn children(list: &[Child]) -> Result<(), Fault> {
    if list.len() > CHILDREN_MAX {
        return Err(bad(format!(
            "{} children, at most {CHILDREN_MAX} are possible",
            list.len()
        )));
    }
    let backings = list.iter().filter(|c| c.kind == ChildKind::Backing);
    if backings.count() > 1 {
        return Err(bad("more than one backing child".to_owned()));
    }
    for (i, child) in list.iter().enumerate() {
        if list[..i].iter().any(|c| c.id == child.id) {
            return Err(bad(format!("two children are called '{}'", child.id)));
        }
    }
    Ok(())
}
