//! Descriptors that come over a monitor's socket (QEMU's `misc.json`); QSD does not have these.

qapi! {
    /// Arguments of `getfd`.
    struct Getfd {
        /// The name by which commands refer to the descriptor.
        fdname: String,
    }

    /// Arguments of `closefd`.
    struct Closefd {
        /// The descriptor's name.
        fdname: String,
    }

    /// Arguments of `add-fd`.
    #[derive(Default)]
    struct AddFd {
        /// The set to add it to; a new one if absent.
        fdset_id: Option<i64> = "fdset-id",
        /// Text for people.
        opaque: Option<String>,
    }

    /// The result of `add-fd`.
    struct AddfdInfo {
        /// The set.
        fdset_id: i64 = "fdset-id",
        /// The descriptor's number in the daemon.
        fd: i64,
    }

    /// Arguments of `remove-fd`.
    struct RemoveFd {
        /// The set.
        fdset_id: i64 = "fdset-id",
        /// The descriptor's number; all of the set if absent.
        fd: Option<i64>,
    }

    /// A descriptor of a set.
    struct FdsetFdInfo {
        /// Its number in the daemon.
        fd: i64,
        /// Text for people.
        opaque: Option<String>,
    }

    /// An element of `query-fdsets`.
    struct FdsetInfo {
        /// The set.
        fdset_id: i64 = "fdset-id",
        /// Its descriptors.
        fds: Vec<FdsetFdInfo>,
    }
}
