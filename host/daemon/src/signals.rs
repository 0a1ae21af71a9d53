//! Who asks the daemon to end, and how: signals, and the end of standard input.
//!
//! Caught from before the first option is carried out until the process is gone. Invariant: no
//! request of the same kind, however often and however fast it comes, makes an end less orderly.
//! Wrappers send one request twice within milliseconds (GNU `timeout` signals its child and then
//! the child's group), and impatient people press Ctrl-C again. Only [`Request::Cut`] is told
//! apart, and only once the end goes on for a while ([`CUT_AFTER`]).
//!
//! SIGPIPE is ignored by Rust's runtime already. Signals that report a fault of the program
//! (SIGSEGV, SIGABRT and the like) are left alone.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use rustix::process::Signal as Signo;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// A SIGQUIT cuts an end short that goes on for so long. Before that it is taken for a copy of the
/// request that began the end: wrappers send copies within milliseconds.
pub(crate) const CUT_AFTER: Duration = Duration::from_secs(1);

/// The signal that cuts an end short (Ctrl-\ on a terminal). No wrapper sends it by itself.
const CUT: (Signo, &str) = (Signo::QUIT, "SIGQUIT");

/// Signals that ask for the end. Those after SIGTERM would end the process too, at once, and take
/// along what is not written back: what they ask for is given in an orderly way.
const END: [(Signo, &str); 9] = [
    (Signo::INT, "SIGINT"),
    (Signo::HUP, "SIGHUP"),
    (Signo::TERM, "SIGTERM"),
    (Signo::USR2, "SIGUSR2"),
    (Signo::STKFLT, "SIGSTKFLT"),
    (Signo::XCPU, "SIGXCPU"),
    (Signo::VTALARM, "SIGVTALRM"),
    (Signo::PROF, "SIGPROF"),
    (Signo::POWER, "SIGPWR"),
];

/// Real-time signals: they ask for the end, too. The C library keeps the two before them.
const REAL_TIME: RangeInclusive<i32> = 34..=64;

/// Signals that change nothing, where the system would end the process. qemu-storage-daemon lives
/// through the first three. A write past the limit on the size of files (SIGXFSZ) fails with EFBIG.
const NOTHING: [Signo; 4] = [Signo::USR1, Signo::ALARM, Signo::IO, Signo::XFSZ];

/// A request that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// End in an orderly way. The name is for the log.
    End(&'static str),
    /// The same, unless an end goes on already: then end without writing back.
    Cut,
}

impl Request {
    /// What asked, for the log.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::End(name) => name,
            Self::Cut => CUT.1,
        }
    }
}

/// All the requests. Dropped at the end of the process only.
#[derive(Debug)]
pub(crate) struct Requests {
    /// Holds little: a signal that was not taken yet is not caught twice, and who takes them runs
    /// on the same thread.
    arrived: mpsc::UnboundedReceiver<Request>,
    /// When the end began.
    ending: Option<Instant>,
    /// One task for each source.
    _sources: JoinSet<()>,
}

impl Requests {
    /// Catches them from now on. `stdin`: the end of standard input asks for the end, too.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn catch(stdin: bool) -> std::io::Result<Self> {
        let (sender, arrived) = mpsc::unbounded_channel();
        let mut sources = JoinSet::new();
        let mut hand_on = |number, request: Option<Request>| {
            let caught = signal(SignalKind::from_raw(number))?;
            sources.spawn_local(pass_on(caught, request, sender.clone()));
            std::io::Result::Ok(())
        };
        hand_on(CUT.0.as_raw(), Some(Request::Cut))?;
        for (signo, name) in END {
            hand_on(signo.as_raw(), Some(Request::End(name)))?;
        }
        for number in REAL_TIME {
            hand_on(number, Some(Request::End("a real-time signal")))?;
        }
        for signo in NOTHING {
            hand_on(signo.as_raw(), None)?;
        }
        if stdin {
            sources.spawn_local(until_the_end_of_stdin(sender));
        }
        Ok(Self {
            arrived,
            ending: None,
            _sources: sources,
        })
    }

    /// The end has begun: from now on SIGQUIT can cut it short.
    pub(crate) fn end_has_begun(&mut self) {
        self.ending.get_or_insert_with(Instant::now);
    }

    /// The next one's name. Of many at once at least one arrives. Nothing is lost if this is
    /// dropped.
    pub(crate) async fn next(&mut self) -> &'static str {
        self.arrive().await.name()
    }

    /// Waits until somebody cuts the end short. Whatever else comes is told and changes nothing.
    pub(crate) async fn cut_short(&mut self) {
        loop {
            let request = self.arrive().await;
            let long_enough = self
                .ending
                .is_some_and(|since| since.elapsed() >= CUT_AFTER);
            match request {
                Request::Cut if long_enough => return,
                Request::Cut => tracing::warn!(
                    "ending already; SIGQUIT after {} s of that ends the daemon at once",
                    CUT_AFTER.as_secs()
                ),
                Request::End(signal) => tracing::info!(signal, "ending already"),
            }
        }
    }

    async fn arrive(&mut self) -> Request {
        match self.arrived.recv().await {
            Some(request) => request,
            // Every source has ended, which only happens with the runtime.
            None => std::future::pending().await,
        }
    }
}

async fn pass_on(
    mut caught: Signal,
    request: Option<Request>,
    requests: mpsc::UnboundedSender<Request>,
) {
    while caught.recv().await.is_some() {
        if let Some(request) = request
            && requests.send(request).is_err()
        {
            return;
        }
    }
}

/// What comes over standard input is dropped.
async fn until_the_end_of_stdin(requests: mpsc::UnboundedSender<Request>) {
    let mut stdin = tokio::io::stdin();
    let mut dropped = [0; 512];
    // An error is an end: a terminal that was closed says EIO.
    while matches!(stdin.read(&mut dropped).await, Ok(1..)) {}
    let _daemon_is_gone = requests.send(Request::End("the end of standard input"));
}
