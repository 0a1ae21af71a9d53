//! Decisions from and to the types of `block::authz`. Pure.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outport_block::authz as seam;

use super::authz_policy::{Decision, Grant, Peer, Request, Transport};
use crate::limits::{MESSAGE_BYTES_MAX, sentence};

/// The facts as the contract has them, with the wall clock.
pub(crate) fn to_request(facts: &seam::Facts) -> Request {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Request {
        peer: to_peer(&facts.peer),
        export_name: facts.export_name.clone(),
        wants_write: facts.wants_write,
        now_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
    }
}

fn to_peer(peer: &seam::Peer) -> Peer {
    let tls = peer.tls.clone().unwrap_or_default();
    Peer {
        transport: match peer.transport {
            seam::Transport::NbdTcp => Transport::NbdTcp,
            seam::Transport::NbdUnix => Transport::NbdUnix,
            seam::Transport::VhostUserBlk => Transport::VhostUserBlk,
            seam::Transport::Fuse => Transport::Fuse,
        },
        identity: peer.identity.clone(),
        tls_issuer: tls.issuer,
        tls_fingerprint: tls.fingerprint,
        tls_san: tls.subject_alt_names,
        psk_user: tls.psk_user,
        address: peer.address.clone(),
        uid: peer.uid,
        gid: peer.gid,
        pid: peer.pid,
    }
}

/// A plugin's decision. 0 stands for "no limit" in the contract.
pub(crate) fn decision(decision: Decision) -> seam::Decision {
    match decision {
        Decision::Allow(Grant {
            read_only,
            ttl_ms,
            max_iops,
            max_bytes_per_sec,
        }) => seam::Decision::Allow(seam::Grant {
            read_only,
            expires_after: (ttl_ms > 0).then(|| Duration::from_millis(ttl_ms)),
            iops_max: NonZeroU32::new(max_iops),
            bytes_per_second_max: NonZeroU64::new(max_bytes_per_sec),
        }),
        Decision::Deny(reason) => seam::Decision::Deny(sentence(reason, MESSAGE_BYTES_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fact_crosses() {
        let facts = seam::Facts {
            peer: seam::Peer {
                transport: seam::Transport::NbdUnix,
                identity: "CN=a".into(),
                tls: Some(seam::TlsPeer {
                    issuer: Some("CN=ca".into()),
                    fingerprint: Some("00ff".into()),
                    subject_alt_names: vec!["URI:spiffe://a/b".into(), "DNS:c".into()],
                    psk_user: Some("alice".into()),
                }),
                address: Some("[::1]:5".into()),
                uid: Some(1),
                gid: Some(2),
                pid: Some(3),
            },
            export_name: Some("e".into()),
            wants_write: true,
        };
        let told = to_request(&facts);
        assert!(told.wants_write && told.now_ms > 0);
        assert_eq!(told.export_name.as_deref(), Some("e"));
        let peer = told.peer;
        assert!(matches!(peer.transport, Transport::NbdUnix));
        assert_eq!(peer.identity, "CN=a");
        assert_eq!(peer.tls_issuer.as_deref(), Some("CN=ca"));
        assert_eq!(peer.tls_fingerprint.as_deref(), Some("00ff"));
        assert_eq!(peer.tls_san, ["URI:spiffe://a/b", "DNS:c"]);
        assert_eq!(peer.psk_user.as_deref(), Some("alice"));
        assert_eq!(peer.address.as_deref(), Some("[::1]:5"));
        assert_eq!((peer.uid, peer.gid, peer.pid), (Some(1), Some(2), Some(3)));
        let none = to_request(&seam::Facts::default()).peer;
        assert!(none.tls_issuer.is_none() && none.tls_san.is_empty() && none.psk_user.is_none());
    }
}
