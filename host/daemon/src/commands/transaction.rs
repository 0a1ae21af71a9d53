//! Several changes that happen all or not at all (`transaction.json`).
//!
//! Actions are prepared in order. If one of them fails, those before it are taken back, the last
//! first, and nothing has happened; otherwise all of them are committed. Nobody else runs in
//! between: preparing does not wait. What takes time is asked before, and done after.

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use outport_block::Node;
use outport_block::bitmap::Bits;
use outport_qmp::Error;
use outport_qmp::types::Empty;
use outport_qmp::types::transaction::{Transaction, TransactionAction, TransactionActionBranch};

use super::block_bitmap;
use crate::bitmaps;
use crate::daemon::Daemon;

/// One change on its way.
pub(super) trait Action {
    /// Asks whoever takes time to answer, before anything is prepared. What is not right shows
    /// when it is prepared.
    fn inquire<'a>(&'a mut self, daemon: &'a Daemon) -> LocalBoxFuture<'a, ()> {
        let _ = daemon;
        Box::pin(std::future::ready(()))
    }

    /// Checks and reserves, so that `commit` cannot fail.
    ///
    /// # Errors
    /// In QEMU's words; there is nothing to take back then.
    fn prepare(&mut self, daemon: &Daemon) -> Result<(), Error>;

    /// Makes the change, which was prepared.
    fn commit(self: Box<Self>, done: &mut Committed);

    /// Takes back what was prepared.
    fn abort(self: Box<Self>);
}

/// What is left to do when all actions were committed.
#[derive(Default)]
pub(super) struct Committed {
    /// Nodes whose writes are to mark other bitmaps.
    nodes: Vec<Arc<Node>>,
    /// Bits that get what is dirty in others, in order.
    pub(super) merges: Vec<(Arc<Bits>, Arc<Bits>)>,
    /// Nodes whose images are to forget bitmaps that were removed.
    pub(super) forgetting: Vec<Arc<Node>>,
}

impl Committed {
    /// Writes to this node are to mark its bitmaps as they are now.
    pub(super) fn touch(&mut self, node: &Arc<Node>) {
        if !self.nodes.iter().any(|it| Arc::ptr_eq(it, node)) {
            self.nodes.push(node.clone());
        }
    }

    fn take_effect(&self) {
        for node in &self.nodes {
            node.bitmaps().publish();
        }
        // Only now: what was taken from a bitmap holds the last of its writes.
        for (into, from) in &self.merges {
            into.merge(from);
        }
    }
}

/// The action that fails.
struct Abort;

impl Action for Abort {
    fn prepare(&mut self, _: &Daemon) -> Result<(), Error> {
        Err(Error::generic("Transaction aborted using Abort action"))
    }

    fn commit(self: Box<Self>, _: &mut Committed) {}

    fn abort(self: Box<Self>) {}
}

fn action(action: TransactionAction) -> Box<dyn Action> {
    use TransactionActionBranch as A;
    match action.branch {
        A::Abort(_) => Box::new(Abort),
        A::BlockDirtyBitmapAdd(it) => block_bitmap::add(it.data),
        A::BlockDirtyBitmapRemove(it) => block_bitmap::remove(it.data),
        A::BlockDirtyBitmapClear(it) => block_bitmap::clear(it.data),
        A::BlockDirtyBitmapEnable(it) => block_bitmap::enable(it.data),
        A::BlockDirtyBitmapDisable(it) => block_bitmap::disable(it.data),
        A::BlockDirtyBitmapMerge(it) => block_bitmap::merge(it.data),
    }
}

/// `transaction`. The completion mode concerns jobs, which no action starts so far.
pub(super) async fn run(daemon: &Daemon, arguments: Transaction) -> Result<Empty, Error> {
    carry_out(daemon, arguments.actions.into_iter().map(action).collect()).await
}

/// A command that is one action.
pub(super) async fn one(daemon: &Daemon, action: Box<dyn Action>) -> Result<Empty, Error> {
    carry_out(daemon, vec![action]).await
}

async fn carry_out(daemon: &Daemon, mut actions: Vec<Box<dyn Action>>) -> Result<Empty, Error> {
    let _whole = daemon.whole()?;
    for action in &mut actions {
        action.inquire(daemon).await;
    }
    let done = all_or_nothing(daemon, actions.into_iter())?;
    for node in &done.forgetting {
        bitmaps::forget_removed(daemon, node).await?;
    }
    Ok(Empty {})
}

fn all_or_nothing(
    daemon: &Daemon,
    actions: impl Iterator<Item = Box<dyn Action>>,
) -> Result<Committed, Error> {
    let mut prepared: Vec<Box<dyn Action>> = Vec::new();
    for mut action in actions {
        if let Err(error) = action.prepare(daemon) {
            while let Some(last) = prepared.pop() {
                last.abort();
            }
            return Err(error);
        }
        prepared.push(action);
    }
    let mut done = Committed::default();
    for action in prepared {
        action.commit(&mut done);
    }
    done.take_effect();
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    struct Told(u32, Rc<RefCell<Vec<String>>>);

    impl Told {
        fn tell(&self, what: &str) {
            self.1.borrow_mut().push(format!("{what} {}", self.0));
        }
    }

    impl Action for Told {
        fn prepare(&mut self, _: &Daemon) -> Result<(), Error> {
            self.tell("prepare");
            Ok(())
        }
        fn commit(self: Box<Self>, _: &mut Committed) {
            self.tell("commit");
        }
        fn abort(self: Box<Self>) {
            self.tell("abort");
        }
    }

    fn told(fails: bool) -> Vec<String> {
        let (daemon, _events, _commands) = Daemon::new();
        let log = Rc::new(RefCell::default());
        let mut actions: Vec<Box<dyn Action>> = vec![
            Box::new(Told(1, Rc::clone(&log))),
            Box::new(Told(2, Rc::clone(&log))),
        ];
        if fails {
            actions.push(Box::new(Abort));
            actions.push(Box::new(Told(3, Rc::clone(&log))));
        }
        let done = all_or_nothing(&daemon, actions.into_iter());
        assert_eq!(done.is_err(), fails);
        log.take()
    }

    #[test]
    fn actions_happen_all_or_not_at_all() {
        let done = ["prepare 1", "prepare 2", "commit 1", "commit 2"];
        assert_eq!(told(false), done);
        let undone = ["prepare 1", "prepare 2", "abort 2", "abort 1"];
        assert_eq!(told(true), undone);
    }
}
