//! Host files against real ones, buffered and direct.
