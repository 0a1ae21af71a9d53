//! Socket addresses (QEMU's `sockets.json`).
//!
//! `nbd-server-start` wraps an address in `data` for historical reasons ([`SocketAddressLegacy`]);
//! everything newer, and the command line, uses the flat [`SocketAddress`].

qapi! {
    /// The kinds of address.
    enum SocketAddressType {
        /// TCP over IPv4 or IPv6.
        Inet = "inet",
        /// A Unix socket.
        Unix = "unix",
        /// A host-guest socket.
        Vsock = "vsock",
        /// A socket that the daemon inherited or was passed.
        Fd = "fd",
    }

    /// A TCP address.
    struct InetSocketAddress {
        /// Host name or address; empty is every address.
        host: String,
        /// Port number or service name. A string, also in JSON.
        port: String,
        /// The host is an address and must not be resolved.
        numeric: Option<bool>,
        /// Try the ports from `port` up to this one.
        to: Option<u16>,
        /// Use IPv4; with `ipv6` absent or false, only IPv4.
        ipv4: Option<bool>,
        /// Use IPv6; with `ipv4` absent or false, only IPv6.
        ipv6: Option<bool>,
        /// Send keep-alive probes.
        keep_alive: Option<bool> = "keep-alive",
        /// Probes without an answer before the connection is dead (since 10.1).
        keep_alive_count: Option<u32> = "keep-alive-count",
        /// Seconds without traffic before the first probe (since 10.1).
        keep_alive_idle: Option<u32> = "keep-alive-idle",
        /// Seconds between probes (since 10.1).
        keep_alive_interval: Option<u32> = "keep-alive-interval",
        /// Use multipath TCP.
        mptcp: Option<bool>,
    }

    /// The address of a Unix socket.
    struct UnixSocketAddress {
        /// Path of the socket file, or the abstract name.
        path: String,
        /// The name is in the abstract namespace.
        r#abstract: Option<bool> = "abstract",
        /// The abstract name ends with its last byte rather than being padded with NUL.
        tight: Option<bool>,
    }

    /// The address of a host-guest socket. Both members are strings, also in JSON.
    struct VsockSocketAddress {
        /// Context id of the host or guest.
        cid: String,
        /// Port number.
        port: String,
    }

    /// A socket that is open already.
    struct FdSocketAddress {
        /// A number, or the name given to `getfd`.
        str: String,
    }

    /// A socket address with its members beside `type`.
    union SocketAddress / #[doc = "The kinds of [`SocketAddress`]."] SocketAddressBranch
        on "type": SocketAddressType {} {
        /// TCP.
        Inet(InetSocketAddress) = "inet",
        /// A Unix socket.
        Unix(UnixSocketAddress) = "unix",
        /// A host-guest socket.
        Vsock(VsockSocketAddress) = "vsock",
        /// A socket that is open already.
        Fd(FdSocketAddress) = "fd",
    }

    /// A TCP address under `data`.
    struct InetSocketAddressWrapper {
        /// The address.
        data: InetSocketAddress,
    }

    /// The address of a Unix socket under `data`.
    struct UnixSocketAddressWrapper {
        /// The address.
        data: UnixSocketAddress,
    }

    /// The address of a host-guest socket under `data`.
    struct VsockSocketAddressWrapper {
        /// The address.
        data: VsockSocketAddress,
    }

    /// An open socket under `data`.
    struct FdSocketAddressWrapper {
        /// The socket.
        data: FdSocketAddress,
    }

    /// A socket address with its members under `data`.
    union SocketAddressLegacy /
        #[doc = "The kinds of [`SocketAddressLegacy`]."] SocketAddressLegacyBranch
        on "type": SocketAddressType {} {
        /// TCP.
        Inet(InetSocketAddressWrapper) = "inet",
        /// A Unix socket.
        Unix(UnixSocketAddressWrapper) = "unix",
        /// A host-guest socket.
        Vsock(VsockSocketAddressWrapper) = "vsock",
        /// A socket that is open already.
        Fd(FdSocketAddressWrapper) = "fd",
    }
}

impl From<SocketAddressLegacy> for SocketAddress {
    fn from(legacy: SocketAddressLegacy) -> Self {
        use SocketAddressBranch as Flat;
        use SocketAddressLegacyBranch as Legacy;
        let branch = match legacy.branch {
            Legacy::Inet(wrapper) => Flat::Inet(wrapper.data),
            Legacy::Unix(wrapper) => Flat::Unix(wrapper.data),
            Legacy::Vsock(wrapper) => Flat::Vsock(wrapper.data),
            Legacy::Fd(wrapper) => Flat::Fd(wrapper.data),
        };
        Self { branch }
    }
}

impl From<SocketAddress> for SocketAddressLegacy {
    fn from(flat: SocketAddress) -> Self {
        use SocketAddressBranch as Flat;
        use SocketAddressLegacyBranch as Legacy;
        let branch = match flat.branch {
            Flat::Inet(data) => Legacy::Inet(InetSocketAddressWrapper { data }),
            Flat::Unix(data) => Legacy::Unix(UnixSocketAddressWrapper { data }),
            Flat::Vsock(data) => Legacy::Vsock(VsockSocketAddressWrapper { data }),
            Flat::Fd(data) => Legacy::Fd(FdSocketAddressWrapper { data }),
        };
        Self { branch }
    }
}

impl SocketAddress {
    /// The address of a Unix socket file.
    pub fn unix(path: impl Into<String>) -> Self {
        let address = UnixSocketAddress {
            path: path.into(),
            r#abstract: None,
            tight: None,
        };
        Self {
            branch: SocketAddressBranch::Unix(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn legacy_addresses_become_flat() {
        let legacy = json!({"type": "unix", "data": {"path": "/s", "abstract": false}});
        let legacy: SocketAddressLegacy =
            crate::de::from_value(&legacy, crate::de::Mode::Typed).unwrap();
        let flat = serde_json::to_value(SocketAddress::from(legacy)).unwrap();
        assert_eq!(
            flat,
            json!({"type": "unix", "path": "/s", "abstract": false})
        );
        let back = SocketAddressLegacy::from(SocketAddress::unix("/s"));
        let back = serde_json::to_value(back).unwrap();
        assert_eq!(back, json!({"type": "unix", "data": {"path": "/s"}}));
        let made = serde_json::to_value(SocketAddress::unix("/s")).unwrap();
        assert_eq!(made, json!({"type": "unix", "path": "/s"}));
    }
}
