//! Socket addresses as QMP and the command line spell them, as listeners take them.

use std::sync::Mutex;

use outport_export::nbd::Address;
use outport_export::nbd::client::ServerAddress;
use outport_qmp::types::sockets::{
    InetSocketAddress, SocketAddress, SocketAddressBranch, VsockSocketAddress,
};

use crate::daemon::Daemon;

/// The address to listen on.
///
/// # Errors
/// A descriptor that is no socket that was passed, or a kind that is not served.
pub(crate) fn listen_on(address: SocketAddress, daemon: &Daemon) -> Result<Address, String> {
    Ok(match address.branch {
        SocketAddressBranch::Inet(inet) => Address::Inet {
            host: inet.host,
            port: inet.port,
            to: inet.to,
            ipv4: inet.ipv4,
            ipv6: inet.ipv6,
        },
        SocketAddressBranch::Unix(unix) => Address::Unix {
            path: unix.path.into(),
            is_abstract: unix.r#abstract.unwrap_or(false),
            tight: unix.tight.unwrap_or(true),
        },
        SocketAddressBranch::Fd(fd) => Address::Fd(daemon.take_socket(&fd.str)?),
        SocketAddressBranch::Vsock(vsock) => return Err(no_vsock(&vsock)),
    })
}

/// Where to connect to.
///
/// # Errors
/// As [`listen_on`].
pub(crate) fn connect_to(address: SocketAddress, daemon: &Daemon) -> Result<ServerAddress, String> {
    Ok(match address.branch {
        SocketAddressBranch::Inet(inet) => ServerAddress::Inet {
            host: inet.host,
            port: inet.port,
            ipv4: inet.ipv4,
            ipv6: inet.ipv6,
            keep_alive: inet.keep_alive.unwrap_or(false),
        },
        SocketAddressBranch::Unix(unix) => ServerAddress::Unix {
            path: unix.path.into(),
            is_abstract: unix.r#abstract.unwrap_or(false),
            tight: unix.tight.unwrap_or(true),
        },
        SocketAddressBranch::Fd(fd) => {
            ServerAddress::Fd(Mutex::new(Some(daemon.take_socket(&fd.str)?)))
        }
        SocketAddressBranch::Vsock(vsock) => return Err(no_vsock(&vsock)),
    })
}

/// Host and port, and no more said.
pub(crate) fn plain_inet(host: String, port: String) -> InetSocketAddress {
    InetSocketAddress {
        host,
        port,
        numeric: None,
        to: None,
        ipv4: None,
        ipv6: None,
        keep_alive: None,
        keep_alive_count: None,
        keep_alive_idle: None,
        keep_alive_interval: None,
        mptcp: None,
    }
}

fn no_vsock(vsock: &VsockSocketAddress) -> String {
    if vsock.cid.parse::<u32>().is_err() {
        return format!("Failed to parse cid '{}'", vsock.cid);
    }
    if vsock.port.parse::<u32>().is_err() {
        return format!("Failed to parse port '{}'", vsock.port);
    }
    "socket family AF_VSOCK unsupported".into()
}
