//! What a session was granted, for as long as it lasts, and keeping to it.
//!
//! ```text
//! control plane: keep() --asks again in time--> Lease --ended()----> connection: hang up
//!                                                 \---limits()----> connection: Pace
//! ```
//!
//! The session's thread owns the [`Lease`] and its [`Pace`]; a task of the control plane holds it
//! weakly and ends with it. Invariant: a grant that was not renewed in time has ended.

use std::num::{NonZeroU32, NonZeroU64};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use outport_block::authz::{Decision, Facts, Grant};
use tokio::sync::watch;

use crate::access::{Access, Occasion};

/// A grant lasts at least so long: a policy that says a millisecond would be asked all day.
const RENEWAL_MIN: Duration = Duration::from_millis(100);

/// What a session may take at once after a pause: enough for one batch of replies.
const BURST: Duration = Duration::from_millis(50);

/// What one session was granted.
#[derive(Debug)]
pub struct Lease {
    /// It was told that it may write.
    writable: bool,
    /// 0: no limit.
    iops_max: AtomicU32,
    /// 0: no limit.
    bytes_per_second_max: AtomicU64,
    ended: watch::Sender<bool>,
}

impl Lease {
    /// A session begins under this grant; `facts` are those that it was granted for. Call inside a
    /// tokio runtime of the control plane, which will ask `access` again in time.
    #[must_use]
    pub fn begin(access: Access, facts: Facts, grant: Grant) -> Arc<Self> {
        let (ended, lost) = watch::channel(false);
        let lease = Arc::new(Self {
            writable: facts.wants_write && !grant.read_only,
            iops_max: AtomicU32::default(),
            bytes_per_second_max: AtomicU64::default(),
            ended,
        });
        lease.limit(grant);
        if let Some(after) = grant.expires_after {
            tokio::spawn(keep(access, facts, Arc::downgrade(&lease), lost, after));
        }
        lease
    }

    /// May the session write?
    #[must_use]
    pub const fn may_write(&self) -> bool {
        self.writable
    }

    /// Resolves when the session is to end.
    pub async fn ended(&self) {
        // The sender is ours: there is no error to wait for.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    fn limit(&self, grant: Grant) {
        let iops = grant.iops_max.map_or(0, NonZeroU32::get);
        let bytes = grant.bytes_per_second_max.map_or(0, NonZeroU64::get);
        self.iops_max.store(iops, Ordering::Relaxed);
        self.bytes_per_second_max.store(bytes, Ordering::Relaxed);
    }

    /// The decision was made again: when to ask next, if the session goes on.
    fn renew(&self, decision: Decision) -> Option<Duration> {
        let reason = match decision {
            // A client cannot be told in the middle of a session that it may no longer write.
            Decision::Allow(grant) if self.writable && grant.read_only => {
                "the grant is read-only now".to_owned()
            }
            Decision::Allow(grant) => {
                self.limit(grant);
                return grant.expires_after;
            }
            Decision::Deny(reason) => reason,
        };
        tracing::info!(reason, "a session's grant has ended");
        self.ended.send_replace(true);
        None
    }
}

/// Task: asks again in time for as long as the session lasts.
async fn keep(
    access: Access,
    facts: Facts,
    lease: Weak<Lease>,
    mut lost: watch::Receiver<bool>,
    mut after: Duration,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(after.max(RENEWAL_MIN)) => {}
            // The session is over: there is no sender any more.
            _ = lost.changed() => return,
        }
        let decision = access.decide(&facts, Occasion::Entry).await;
        let Some(lease) = lease.upgrade() else { return };
        match lease.renew(decision) {
            Some(next) => after = next,
            None => return,
        }
    }
}

/// When a session may begin its next request: one point in time for each limit, at which all that
/// it took is paid for.
#[derive(Debug)]
pub struct Pace {
    operations: Instant,
    bytes: Instant,
}

impl Pace {
    /// Nothing is owed.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self {
            operations: now,
            bytes: now,
        }
    }

    /// Takes one request of `length` bytes.
    ///
    /// # Errors
    /// It is too early, and nothing was taken: when to try again.
    pub fn admit(&mut self, lease: &Lease, now: Instant, length: u64) -> Result<(), Instant> {
        let iops = lease.iops_max.load(Ordering::Relaxed);
        let rate = lease.bytes_per_second_max.load(Ordering::Relaxed);
        let early = |paid: Instant, limited: bool| limited && paid > now + BURST;
        if early(self.operations, iops > 0) {
            return Err(self.operations - BURST);
        }
        if early(self.bytes, rate > 0) {
            return Err(self.bytes - BURST);
        }
        if iops > 0 {
            self.operations = self.operations.max(now) + cost(1, u64::from(iops));
        }
        if rate > 0 {
            self.bytes = self.bytes.max(now) + cost(length, rate);
        }
        Ok(())
    }
}

/// The time that `amount` takes at `rate` per second; an hour at most, which is for ever here.
fn cost(amount: u64, rate: u64) -> Duration {
    let ns = u128::from(amount) * 1_000_000_000 / u128::from(rate.max(1));
    let hour = Duration::from_secs(3600);
    u64::try_from(ns).map_or(hour, |ns| Duration::from_nanos(ns).min(hour))
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::sync::Mutex;

    use outport_block::authz::{Deciding, Policy};

    use super::*;
    use crate::access::Policies;

    fn lease(iops: u32, bytes: u64) -> Lease {
        let (ended, _) = watch::channel(false);
        let lease = Lease {
            writable: false,
            iops_max: AtomicU32::default(),
            bytes_per_second_max: AtomicU64::default(),
            ended,
        };
        lease.limit(Grant {
            iops_max: NonZeroU32::new(iops),
            bytes_per_second_max: NonZeroU64::new(bytes),
            ..Grant::default()
        });
        lease
    }

    /// Requests of `length` bytes that begin within the first `seconds`.
    fn taken(lease: &Lease, length: u64, seconds: u64) -> u64 {
        let start = Instant::now();
        let (mut pace, mut now, mut count) = (Pace::new(start), start, 0);
        while now < start + Duration::from_secs(seconds) {
            match pace.admit(lease, now, length) {
                Ok(()) => count += 1,
                Err(later) => {
                    assert!(later > now, "it would spin");
                    now = later;
                }
            }
        }
        count
    }

    #[test]
    fn the_limits_hold_over_time() {
        assert!((1000..1060).contains(&taken(&lease(100, 0), 4096, 10)));
        assert!((100..110).contains(&taken(&lease(0, 40960), 4096, 10)));
        // The tighter one counts.
        assert!((100..110).contains(&taken(&lease(100, 40960), 4096, 10)));
        // What is larger than a second's worth passes, and is paid for afterwards.
        assert_eq!(taken(&lease(0, 1000), 5000, 10), 3);
    }

    /// Answers with what is left in its list, then denies.
    #[derive(Debug)]
    struct Script(Mutex<Vec<Grant>>);

    impl Policy for Script {
        fn is_allowed<'a>(&'a self, facts: &'a Facts) -> Deciding<'a> {
            self.decide(facts)
        }

        fn decide<'a>(&'a self, _: &'a Facts) -> Deciding<'a> {
            let next = self.0.lock().unwrap().pop();
            let decision = next.map_or(Decision::Deny("over".into()), Decision::Allow);
            Box::pin(ready(decision))
        }
    }

    async fn ends(first: Grant, then: Vec<Grant>, wants_write: bool) -> (Arc<Lease>, u64) {
        let policies = Policies::default();
        policies.set("p", Arc::new(Script(Mutex::new(then))), true);
        let facts = Facts {
            export_name: Some("e".into()),
            wants_write,
            ..Facts::default()
        };
        let access = Access::new(&policies, Some("p".into()), false);
        let lease = Lease::begin(access, facts, first);
        lease.ended().await;
        let totals = policies.totals("p").unwrap();
        (lease, totals.allowed + totals.denied)
    }

    #[tokio::test]
    async fn an_expired_grant_is_asked_again_until_it_is_denied() {
        let short = Grant {
            expires_after: Some(Duration::from_millis(1)),
            iops_max: NonZeroU32::new(9),
            ..Grant::default()
        };
        let (lease, asked) = ends(short, vec![short, short], true).await;
        assert_eq!(asked, 3);
        assert_eq!(lease.iops_max.load(Ordering::Relaxed), 9);
    }

    #[tokio::test]
    async fn a_session_that_may_no_longer_write_ends() {
        let short = Grant {
            expires_after: Some(Duration::from_millis(1)),
            ..Grant::default()
        };
        let reader = Grant {
            read_only: true,
            ..short
        };
        assert_eq!(ends(short, vec![reader], true).await.1, 1);
        // Who never could write goes on until the denial.
        assert_eq!(ends(reader, vec![reader], true).await.1, 2);
    }

    #[tokio::test]
    async fn the_task_ends_with_the_session() {
        let day = Grant {
            expires_after: Some(Duration::from_secs(86400)),
            ..Grant::default()
        };
        let lease = Lease::begin(Access::default(), Facts::default(), day);
        let before = tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks();
        drop(lease);
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        let after = tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks();
        assert_eq!((before, after), (1, 0));
    }
}
