//! Who may use an export: the policies by name, and the one place where they are asked.
//!
//! ```text
//! nbd-server-start authz=a --\
//! block-export-add authz=b ----> Access --decide(facts)--> Policies --> a, then b --> Decision
//! ```
//!
//! Control plane. [`Policies`] is shared by the objects that fill it and the front-ends that ask;
//! the lock is held for a lookup only. Invariants: a name is resolved each time it is asked, so an
//! object can be replaced under a running server; a name that leads nowhere denies.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use outport_block::authz::{Decision, Facts, Grant, Policy};

/// A policy, and what it decided so far.
#[derive(Debug)]
struct Entry {
    policy: Arc<dyn Policy>,
    /// Denials count. Otherwise they are only told.
    enforced: bool,
    counts: Arc<Counts>,
}

/// Relaxed atomics: a scrape stops nobody.
#[derive(Debug, Default)]
struct Counts {
    allowed: AtomicU64,
    denied: AtomicU64,
    unenforced: AtomicU64,
    ns_total: AtomicU64,
    ns_max: AtomicU64,
    last_denial: Mutex<Option<String>>,
}

/// What a policy decided, for `query-authz`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyTotals {
    /// Times that it allowed.
    pub allowed: u64,
    /// Times that it denied, those without effect included.
    pub denied: u64,
    /// Denials without effect, because it is not enforced.
    pub unenforced: u64,
    /// Time in all decisions.
    pub total: Duration,
    /// The longest one.
    pub max: Duration,
    /// Why it denied last, and whom.
    pub last_denial: Option<String>,
}

/// All policies, by the id of their object.
#[derive(Clone, Debug, Default)]
pub struct Policies(Arc<RwLock<BTreeMap<String, Arc<Entry>>>>);

/// What a question is for; it decides how loudly the answer is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// The peer wants in.
    Entry,
    /// It looks at what there is.
    Look,
}

impl Policies {
    /// Adds a policy, or puts it in the place of the one with this id, whose counts go on.
    pub fn set(&self, id: &str, policy: Arc<dyn Policy>, enforced: bool) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let counts = all.get(id).map(|old| old.counts.clone());
        let entry = Entry {
            policy,
            enforced,
            counts: counts.unwrap_or_default(),
        };
        all.insert(id.to_owned(), Arc::new(entry));
    }

    /// Removes a policy; who names it is denied from now on.
    pub fn remove(&self, id: &str) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.remove(id);
    }

    /// What the policy of this id decided so far.
    #[must_use]
    pub fn totals(&self, id: &str) -> Option<PolicyTotals> {
        let counts = self.get(id)?.counts.clone();
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let last_denial = counts.last_denial.lock();
        Some(PolicyTotals {
            allowed: read(&counts.allowed),
            denied: read(&counts.denied),
            unenforced: read(&counts.unenforced),
            total: Duration::from_nanos(read(&counts.ns_total)),
            max: Duration::from_nanos(read(&counts.ns_max)),
            last_denial: last_denial.unwrap_or_else(PoisonError::into_inner).clone(),
        })
    }

    fn get(&self, id: &str) -> Option<Arc<Entry>> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        all.get(id).cloned()
    }

    /// What the policy of this id says of these facts.
    pub async fn ask(&self, id: &str, facts: &Facts, occasion: Occasion) -> Decision {
        let Some(entry) = self.get(id) else {
            let reason = format!("Cannot find QAuthZ object ID {id}");
            tracing::warn!(peer = %facts.peer, reason, "access denied");
            return Decision::Deny(reason);
        };
        let started = Instant::now();
        let decision = match &facts.export_name {
            Some(_) => entry.policy.decide(facts).await,
            None => entry.policy.is_allowed(facts).await,
        };
        entry.counts.decided(&decision, facts, started.elapsed());
        tell(id, facts, &decision, entry.enforced, occasion);
        if entry.enforced {
            return decision;
        }
        if let Decision::Deny(_) = decision {
            entry.counts.unenforced.fetch_add(1, Ordering::Relaxed);
        }
        Decision::Allow(Grant::default())
    }
}

impl Counts {
    fn decided(&self, decision: &Decision, facts: &Facts, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.ns_total.fetch_add(ns, Ordering::Relaxed);
        self.ns_max.fetch_max(ns, Ordering::Relaxed);
        match decision {
            Decision::Allow(_) => drop(self.allowed.fetch_add(1, Ordering::Relaxed)),
            Decision::Deny(reason) => {
                self.denied.fetch_add(1, Ordering::Relaxed);
                let export = facts.export_name.as_deref().unwrap_or("-");
                let text = format!("{} at '{export}': {reason}", facts.peer);
                let mut last = self
                    .last_denial
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *last = Some(text);
            }
        }
    }
}

/// One line for each decision; looking around is not worth more than a debug line.
fn tell(policy: &str, facts: &Facts, decision: &Decision, enforced: bool, occasion: Occasion) {
    let (peer, export) = (&facts.peer, facts.export_name.as_deref());
    let tls = peer.tls.as_ref();
    let fingerprint = tls.and_then(|tls| tls.fingerprint.as_deref());
    match (decision, occasion) {
        (Decision::Allow(grant), Occasion::Entry) => {
            tracing::info!(policy, %peer, fingerprint, export, ?grant, "access granted");
        }
        (Decision::Deny(reason), Occasion::Entry) if enforced => {
            tracing::warn!(policy, %peer, fingerprint, export, reason, "access denied");
        }
        (Decision::Deny(reason), Occasion::Entry) => {
            tracing::warn!(policy, %peer, export, reason, "access would be denied");
        }
        (_, Occasion::Look) => tracing::debug!(policy, %peer, export, ?decision, "asked"),
    }
}

/// Who is asked about the peers of one server or one export.
#[derive(Clone, Debug, Default)]
pub struct Access {
    policies: Policies,
    /// Ids, in the order in which they are asked.
    asked: Vec<String>,
    strict: bool,
}

impl Access {
    /// Asks the policy of this id, if one is named. `strict`: nobody gets in unless somebody was
    /// asked.
    #[must_use]
    pub fn new(policies: &Policies, policy: Option<String>, strict: bool) -> Self {
        Self {
            policies: policies.clone(),
            asked: policy.into_iter().collect(),
            strict,
        }
    }

    /// Both are asked.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let asked = self.asked.iter().chain(&other.asked).cloned();
        Self {
            policies: self.policies.clone(),
            asked: asked.collect(),
            strict: self.strict || other.strict,
        }
    }

    /// For a peer whose identity a policy admitted already: that is enough for the strict.
    #[must_use]
    pub fn answered(self) -> Self {
        Self {
            strict: false,
            ..self
        }
    }

    /// Everybody gets in, and nobody is asked.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.asked.is_empty() && !self.strict
    }

    /// Whether, and how, this peer may use this export. The first denial counts; grants narrow one
    /// another.
    pub async fn decide(&self, facts: &Facts, occasion: Occasion) -> Decision {
        if self.asked.is_empty() && self.strict {
            let reason = "strict-authz: no policy is configured".to_owned();
            tracing::warn!(peer = %facts.peer, reason, "access denied");
            return Decision::Deny(reason);
        }
        let mut granted = Grant::default();
        for id in &self.asked {
            match self.policies.ask(id, facts, occasion).await {
                Decision::Allow(grant) => granted = granted.and(grant),
                denied @ Decision::Deny(_) => return denied,
            }
        }
        Decision::Allow(granted)
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::num::NonZeroU32;

    use outport_block::authz::Deciding;

    use super::*;

    #[derive(Debug)]
    struct Fixed(Decision);

    impl Policy for Fixed {
        fn is_allowed<'a>(&'a self, _: &'a Facts) -> Deciding<'a> {
            Box::pin(ready(Decision::Deny("not asked".into())))
        }

        fn decide<'a>(&'a self, _: &'a Facts) -> Deciding<'a> {
            Box::pin(ready(self.0.clone()))
        }
    }

    fn policies() -> Policies {
        let policies = Policies::default();
        let slow = Grant {
            iops_max: NonZeroU32::new(5),
            ..Grant::default()
        };
        let reader = Grant {
            read_only: true,
            ..Grant::default()
        };
        for (id, decision) in [
            ("slow", Decision::Allow(slow)),
            ("reader", Decision::Allow(reader)),
            ("no", Decision::Deny("never".into())),
        ] {
            policies.set(id, Arc::new(Fixed(decision)), true);
        }
        policies
    }

    fn facts() -> Facts {
        Facts {
            export_name: Some("disk".into()),
            ..Facts::default()
        }
    }

    async fn ask(policies: &Policies, ids: &[&str], strict: bool) -> Decision {
        let none = Access::new(policies, None, strict);
        let one = |id: &&str| Access::new(policies, Some((*id).to_owned()), false);
        let access = ids.iter().map(one).fold(none, |all, one| all.and(&one));
        access.decide(&facts(), Occasion::Entry).await
    }

    #[tokio::test]
    async fn every_policy_is_asked_and_narrows() {
        let both = Grant {
            read_only: true,
            iops_max: NonZeroU32::new(5),
            ..Grant::default()
        };
        let policies = policies();
        assert_eq!(
            ask(&policies, &["slow", "reader"], false).await,
            Decision::Allow(both)
        );
        let denied = ask(&policies, &["slow", "no", "reader"], false).await;
        assert_eq!(denied, Decision::Deny("never".into()));
    }

    #[tokio::test]
    async fn what_cannot_be_asked_denies() {
        let policies = policies();
        let missing = ask(&policies, &["gone"], false).await;
        assert_eq!(
            missing,
            Decision::Deny("Cannot find QAuthZ object ID gone".into())
        );
        policies.remove("slow");
        assert!(matches!(
            ask(&policies, &["slow"], false).await,
            Decision::Deny(_)
        ));
        assert!(matches!(ask(&policies, &[], true).await, Decision::Deny(_)));
        let open = Decision::Allow(Grant::default());
        let strict = Access::new(&policies, None, true);
        assert!(strict.clone().answered().is_open() && !strict.is_open());
        assert_eq!(ask(&policies, &[], false).await, open);
        assert!(Access::default().is_open());
    }

    #[tokio::test]
    async fn a_policy_on_trial_is_counted_and_without_effect() {
        let policies = policies();
        policies.set("no", Arc::new(Fixed(Decision::Deny("never".into()))), false);
        let open = Decision::Allow(Grant::default());
        assert_eq!(ask(&policies, &["no"], false).await, open);
        let totals = policies.totals("no").unwrap();
        assert_eq!(
            (totals.allowed, totals.denied, totals.unenforced),
            (0, 1, 1)
        );
        let last = totals.last_denial.unwrap();
        assert_eq!(last, "nbd-tcp at 'disk': never");
    }
}
