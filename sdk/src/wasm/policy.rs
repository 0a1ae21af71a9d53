//! A policy as a component (world `authz`).

#![forbid(unsafe_code)]

use super::bindings::about::outport::plugin::{log, types};
use super::bindings::policy::exports::outport::plugin::authz_policy as wit;
use super::bindings::policy::outport::plugin::config_files;
use super::export::About;
use super::image::{Instance, enter, keep, with};
use crate::{
    ConfigFiles, Decision, Info, LogLevel, Narrowing, Peer, Policy, Request, Result, Transport,
};
use std::marker::PhantomData;

type Answer<T> = std::result::Result<T, types::Error>;

/// World `authz`.
#[derive(Debug)]
pub struct Decider<T>(PhantomData<T>);

struct Host;

impl ConfigFiles for Host {
    fn read(&self, name: &str) -> Result<Vec<u8>> {
        Ok(config_files::read(name)?)
    }

    fn generation(&self, name: &str) -> Result<u64> {
        Ok(config_files::generation(name)?)
    }

    fn log(&self, level: LogLevel, message: &str) {
        log::log(level.into(), message);
    }
}

impl<T: Policy> About for Decider<T> {
    fn info() -> Info {
        T::info()
    }
}

impl<T: Policy + Instance> wit::Guest for Decider<T> {
    fn open(options: String) -> Answer<()> {
        enter();
        keep(T::open(&Host, &options)?, false)
    }

    fn is_allowed(identity: String) -> Answer<bool> {
        with(|policy: &mut T| policy.is_allowed(&Host, &identity))
    }

    fn decide(request: wit::Request) -> Answer<wit::Decision> {
        let decision = with(|policy: &mut T| policy.decide(&Host, &request.into()))?;
        Ok(decision.into())
    }

    fn reconfigure(options: String) -> Answer<()> {
        with(|policy: &mut T| policy.reconfigure(&Host, &options))
    }
}

impl From<wit::Request> for Request {
    fn from(request: wit::Request) -> Self {
        let peer = request.peer;
        Self {
            peer: Peer {
                transport: match peer.transport {
                    wit::Transport::NbdTcp => Transport::NbdTcp,
                    wit::Transport::NbdUnix => Transport::NbdUnix,
                    wit::Transport::VhostUserBlk => Transport::VhostUserBlk,
                    wit::Transport::Fuse => Transport::Fuse,
                    wit::Transport::Qmp => Transport::Qmp,
                },
                identity: peer.identity,
                tls_issuer: peer.tls_issuer,
                tls_fingerprint: peer.tls_fingerprint,
                tls_san: peer.tls_san,
                psk_user: peer.psk_user,
                address: peer.address,
                uid: peer.uid,
                gid: peer.gid,
                pid: peer.pid,
            },
            export_name: request.export_name,
            wants_write: request.wants_write,
            now_ms: request.now_ms,
        }
    }
}

impl From<Decision> for wit::Decision {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Allow(Narrowing {
                read_only,
                ttl_ms,
                max_iops,
                max_bytes_per_sec,
            }) => Self::Allow(wit::Grant {
                read_only,
                ttl_ms,
                max_iops,
                max_bytes_per_sec,
            }),
            Decision::Deny(reason) => Self::Deny(reason),
        }
    }
}
