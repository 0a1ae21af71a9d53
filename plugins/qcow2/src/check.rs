//! Checking and repairing images. Placeholder.

use outport_sdk::{CheckReport, Error, Repair, Result, Txn};

use crate::image::Qcow2;

pub(crate) fn check_slice(
    _image: &mut Qcow2,
    _txn: &mut dyn Txn,
    _fix: Repair,
    _cursor: u64,
) -> Result<(CheckReport, Option<u64>)> {
    Err(Error::unsupported("Checking qcow2 images is not there yet"))
}
