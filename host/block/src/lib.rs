//! outport block.
