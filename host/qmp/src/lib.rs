//! outport qmp.
