//! The `nbd` driver: an export of another server as a node.

use std::time::Duration;

use outport_block::Node;
use outport_block::node::Kind;
use outport_block::remote::RemoteNode;
use outport_export::nbd::client::{self, ClientOptions, ClientTls};
use outport_export::tls::Endpoint;
use outport_qmp::Error;
use outport_qmp::types::block_core::BlockdevOptionsNbd;
use outport_qmp::types::sockets::{SocketAddress, SocketAddressBranch};

use super::base::Common;
use super::{Made, Opening};
use crate::addresses;

/// Names may have this many bytes (NBD's limit for strings).
const NAME_BYTES_MAX: usize = 4096;

impl Opening<'_> {
    /// `nbd`.
    pub(super) async fn nbd(
        &mut self,
        name: &str,
        nbd: BlockdevOptionsNbd,
        common: &Common,
    ) -> Result<Made, Error> {
        let export = nbd.export.unwrap_or_default();
        if export.len() > NAME_BYTES_MAX {
            return Err(Error::generic("export name too long to send to server"));
        }
        if let Some(bitmap) = &nbd.x_dirty_bitmap {
            return Err(Error::generic(match bitmap.len() > NAME_BYTES_MAX {
                true => "x-dirty-bitmap query too long to send to server",
                false => "Parameter 'x-dirty-bitmap' is not supported",
            }));
        }
        let tls = self.nbd_tls(nbd.tls_creds.as_deref(), nbd.tls_hostname, &nbd.server)?;
        let server = addresses::connect_to(nbd.server, self.daemon);
        let seconds = |value: Option<u32>| Duration::from_secs(value.unwrap_or(0).into());
        let options = ClientOptions {
            server: server.map_err(Error::generic)?,
            export,
            reconnect_delay: seconds(nbd.reconnect_delay),
            open_timeout: seconds(nbd.open_timeout),
            tls,
        };
        let iothread = self.daemon.default_iothread()?;
        // A server that accepts and is silent has nothing to lose.
        let connected = client::connect(options, &iothread);
        let connected = self.daemon.unless_it_ends(connected).await?;
        let connected = connected.map_err(Error::generic)?;
        if connected.read_only && !common.read_only && !common.auto_read_only {
            return Err(Error::generic("Could not open image: Permission denied"));
        }
        let read_only = common.read_only || connected.read_only;
        let kind = Kind::Remote(RemoteNode::new(connected.remote));
        Ok(Node::with_discard(name, "nbd", read_only, common.unmap, kind).into())
    }

    /// What the connection is encrypted with; the server's name is that of the address if nobody
    /// says another.
    fn nbd_tls(
        &self,
        credentials: Option<&str>,
        hostname: Option<String>,
        server: &SocketAddress,
    ) -> Result<Option<ClientTls>, Error> {
        let Some(id) = credentials else {
            return Ok(None);
        };
        let credentials = self.daemon.objects.borrow().tls(id)?;
        if credentials.endpoint() != Endpoint::Client {
            let message = "Expected TLS credentials for a client endpoint";
            return Err(Error::generic(message));
        }
        let hostname = hostname.or_else(|| match &server.branch {
            SocketAddressBranch::Inet(inet) => Some(inet.host.clone()),
            SocketAddressBranch::Unix(_)
            | SocketAddressBranch::Vsock(_)
            | SocketAddressBranch::Fd(_) => None,
        });
        Ok(Some(ClientTls {
            credentials,
            hostname,
        }))
    }
}
