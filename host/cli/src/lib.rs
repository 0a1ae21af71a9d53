//! outport cli.
