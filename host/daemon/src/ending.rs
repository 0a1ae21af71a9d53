//! The end of the daemon: its order, and what it comes to.
//!
//! ```text
//! quit, signal, end of stdin, bad option --> wind_down (exports, jobs) --> settled (commands)
//!     --> last words (monitors) --> close (nodes, parents first) --> Ending --> exit status
//! ```
//! Runs on the control thread. Invariant: an end that has begun goes on until everything is
//! written back, unless it is cut short by SIGQUIT; then it is told what was not.

use std::process::ExitCode;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::signals::Requests;

/// An end that takes longer than this says what it works at, and how to cut it short.
const TELL_AFTER: Duration = Duration::from_secs(5);

/// How the daemon ended. Each has an exit status of its own; the table is in
/// `ARCHITECTURE-daemon.md`, and in outportd(8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Everything is written back.
    Orderly,
    /// An option was wrong or could not be carried out; everything is written back.
    Refused,
    /// The daemon ended in order, but some nodes could not be written back.
    NotWrittenBack,
    /// SIGQUIT came while it ended: nodes that were not closed yet are not written back.
    CutShort,
}

impl From<Ending> for ExitCode {
    fn from(ending: Ending) -> Self {
        Self::from(match ending {
            Ending::Orderly => 0,
            Ending::Refused => 1,
            Ending::NotWrittenBack => 3,
            Ending::CutShort => 4,
        })
    }
}

/// Closes everything in order. What was begun goes on meanwhile: what must not stop half-way is
/// waited for. `otherwise` is what the end comes to unless it is cut short.
pub(crate) async fn end(
    daemon: &Daemon,
    begun: impl Future<Output = ()>,
    requests: &mut Requests,
    otherwise: Ending,
) -> Ending {
    requests.end_has_begun();
    tokio::select! {
        biased;
        () = in_order(daemon, begun) => in_the_end(daemon, otherwise),
        () = requests.cut_short() => {
            tracing::error!(
                not_written_back = %unfinished(daemon),
                "SIGQUIT has cut the end short"
            );
            Ending::CutShort
        }
        () = tell_when_it_takes_long(daemon) => otherwise,
    }
}

/// Everything is closed: was anything lost?
fn in_the_end(daemon: &Daemon, otherwise: Ending) -> Ending {
    let lost = daemon.lost.borrow();
    if lost.is_empty() {
        return otherwise;
    }
    tracing::error!(
        nodes = %lost.join(", "),
        "not everything was written back: see the errors of these nodes"
    );
    Ending::NotWrittenBack
}

async fn in_order(daemon: &Daemon, begun: impl Future<Output = ()>) {
    let closing = async {
        daemon.wind_down().await;
        daemon.settled().await;
        daemon.events.last_words().await;
        daemon.close().await;
    };
    let begun = async {
        begun.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        () = begun => {}
        () = closing => {}
    }
}

/// Never ends.
async fn tell_when_it_takes_long(daemon: &Daemon) {
    tokio::time::sleep(TELL_AFTER).await;
    tracing::warn!(
        not_closed_yet = %unfinished(daemon),
        "still ending; SIGQUIT ends the daemon at once, and what is not written back is lost"
    );
    std::future::pending::<()>().await;
}

/// Names of the nodes that are not closed, for people.
fn unfinished(daemon: &Daemon) -> String {
    let mut names = daemon.closing.borrow().clone();
    let graph = daemon.graph.borrow();
    names.extend(graph.newest_first().map(|it| it.node.name().to_owned()));
    match names.is_empty() {
        // A command holds what it opens before it is in the graph.
        true => "what is being opened or changed".to_owned(),
        false => names.join(", "),
    }
}
