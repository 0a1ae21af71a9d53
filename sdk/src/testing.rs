//! A host in memory, and the crash checker.
