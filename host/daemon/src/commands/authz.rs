//! Asking authorization objects, and what they answered so far (ours).

use std::time::Duration;

use outport_block::authz::{Decision, Facts, Peer};
use outport_export::access::Occasion;
use outport_qmp::Error;
use outport_qmp::types::qom::{AuthzCheck, AuthzDecision, AuthzInfo};

use crate::daemon::Daemon;

/// `x-authz-check`: QEMU's question, asked by hand.
pub(super) async fn check(daemon: &Daemon, arguments: AuthzCheck) -> Result<AuthzDecision, Error> {
    let AuthzCheck { id, identity } = arguments;
    daemon.objects.borrow().is_policy(&id)?;
    let facts = Facts {
        peer: Peer {
            identity,
            ..Peer::default()
        },
        ..Facts::default()
    };
    let decision = daemon.policies.ask(&id, &facts, Occasion::Look).await;
    Ok(AuthzDecision {
        allowed: matches!(decision, Decision::Allow(_)),
    })
}

/// `query-authz`, in the order in which the objects were added.
pub(super) fn query(daemon: &Daemon) -> Vec<AuthzInfo> {
    let objects = daemon.objects.borrow();
    let told = objects.types().filter_map(|(id, kind)| {
        let totals = daemon.policies.totals(id)?;
        Some(AuthzInfo {
            id: id.to_owned(),
            r#type: kind.to_owned(),
            allowed: totals.allowed,
            denied: totals.denied,
            unenforced: totals.unenforced,
            total_time_ns: nanoseconds(totals.total),
            max_time_ns: nanoseconds(totals.max),
            last_denial: totals.last_denial,
        })
    });
    told.collect()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
