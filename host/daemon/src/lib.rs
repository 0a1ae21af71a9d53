//! outport daemon.
