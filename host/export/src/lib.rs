//! outport export.
