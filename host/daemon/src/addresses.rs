//! Socket addresses as QMP and the command line spell them, as listeners take them.

use outport_export::nbd::Address;
use outport_qmp::types::sockets::{SocketAddress, SocketAddressBranch};

use crate::inherited::Inherited;

/// The address to listen on.
///
/// # Errors
/// A descriptor that is no socket of our parent, or a kind that is not served.
pub(crate) fn listen_on(
    address: SocketAddress,
    inherited: &mut Inherited,
) -> Result<Address, String> {
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
        SocketAddressBranch::Fd(fd) => Address::Fd(inherited.take_socket(&fd.str)?),
        SocketAddressBranch::Vsock(vsock) => {
            if vsock.cid.parse::<u32>().is_err() {
                return Err(format!("Failed to parse cid '{}'", vsock.cid));
            }
            if vsock.port.parse::<u32>().is_err() {
                return Err(format!("Failed to parse port '{}'", vsock.port));
            }
            return Err("socket family AF_VSOCK unsupported".into());
        }
    })
}
