//! outport plugin.
