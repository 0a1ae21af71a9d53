//! `outport serve`: one image, one daemon, until Ctrl-C.
//!
//! ```text
//! plan     what to ask for: the daemon's options, the URI, what to tell people
//! run      starts the daemon, waits until its monitor answers (the export then exists),
//!          waits for a signal or for its end, passes SIGTERM on, reaps it
//! ```
//! The daemon is in a process group of its own, so that Ctrl-C reaches it once, through us. Its
//! standard input is a pipe that nobody writes to: if this program is killed, the pipe ends, and
//! the daemon closes the image as it does for a signal. Invariant: however often and by whatever
//! signal this program is told to stop, the daemon is told once. Only SIGQUIT (Ctrl-\\) during a
//! stop is handed on: it cuts the daemon's end short.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::ProgressBar;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Map, Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use crate::args::Serve;
use crate::client::Client;
use crate::{daemon, output};

pub(crate) mod plan;

use plan::Plan;

/// How often it is looked whether there is still something to do.
const OVER_POLL: Duration = Duration::from_millis(500);

/// How often the monitor is asked for while the daemon starts.
const START_POLL: Duration = Duration::from_millis(10);

pub(crate) fn run(args: &Serve) -> Result<ExitCode> {
    check_image(args)?;
    let program = daemon::find()?;
    // Its sockets are for this user only; gone with us.
    let folder = tempfile::Builder::new()
        .prefix("outport-")
        .tempdir()
        .context("Cannot make a folder for the sockets")?;
    let plan = Plan::new(args, folder.path())?;
    run_job(&plan, args.json, &program)
}

/// What a daemon is started for.
pub(crate) trait Job {
    /// The daemon's command line.
    fn options(&self) -> &[OsString];
    /// The socket of its monitor.
    fn monitor(&self) -> &Path;
    /// For programs, on one line; `pid` is the daemon's.
    fn facts(&self, pid: u32) -> Value;
    /// For people.
    fn greeting(&self) -> String;
    /// Did what it was started for end by itself? Asked now and then.
    fn is_over(&self) -> bool {
        false
    }
    /// The daemon has ended, perhaps without cleaning up.
    fn clean_up(&self) {}
}

/// Starts the daemon for it and stays until one of them is to end.
pub(crate) fn run_job(job: &impl Job, json: bool, program: &Path) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Cannot start")?;
    let ended = runtime.block_on(serve(job, json, program));
    job.clean_up();
    ended
}

/// Says what is wrong before a daemon is started for it.
fn check_image(args: &Serve) -> Result<()> {
    check_access(
        &args.image,
        !args.read_only,
        "To serve it without, add --read-only",
    )
}

/// The same; `advice` is for who cannot write.
pub(crate) fn check_access(image: &Path, write: bool, advice: &str) -> Result<()> {
    let shown = image.display();
    let metadata = fs::metadata(image).with_context(|| format!("Cannot open '{shown}'"))?;
    if metadata.is_dir() {
        bail!("'{shown}' is a directory: give the image in it");
    }
    if write {
        let writable = fs::OpenOptions::new().write(true).open(image);
        writable.map_err(|error| anyhow!("Cannot write to '{shown}': {error}. {advice}"))?;
    }
    Ok(())
}

/// Everything that ends a wait.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
    child: tokio::signal::unix::Signal,
}

/// Why a wait ended.
enum Woken {
    /// Someone wants us to stop.
    Stop,
    /// The same, by the signal that cuts a stop short.
    Cut,
    /// A child changed its state: see which.
    Child,
}

impl Signals {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).context("Cannot wait for signals");
        Ok(Self {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
            quit: on(SignalKind::quit())?,
            child: on(SignalKind::child())?,
        })
    }

    async fn next(&mut self) -> Woken {
        tokio::select! {
            _ = self.interrupt.recv() => Woken::Stop,
            _ = self.terminate.recv() => Woken::Stop,
            _ = self.hangup.recv() => Woken::Stop,
            _ = self.quit.recv() => Woken::Cut,
            _ = self.child.recv() => Woken::Child,
        }
    }
}

async fn serve(job: &impl Job, json: bool, program: &Path) -> Result<ExitCode> {
    // Before the daemon exists: none of them is lost.
    let mut signals = Signals::new()?;
    let mut command = Command::new(program);
    command
        .arg("--end-with-stdin")
        .args(job.options())
        .stdin(std::process::Stdio::piped());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command
        .spawn()
        .with_context(|| format!("Cannot start the daemon '{}'", program.display()))?;
    let mut child = Running(child);

    let spinner = ProgressBar::new_spinner().with_message("starting the daemon");
    spinner.enable_steady_tick(Duration::from_millis(100));
    let started = wait_for_start(&mut child, job.monitor(), &mut signals).await;
    spinner.finish_and_clear();
    match started {
        Ok(true) => {}
        Ok(false) => return child.stop(&mut signals).await,
        Err(error) => {
            // Its end is of no interest beside the first error.
            let _ = child.stop(&mut signals).await;
            return Err(error);
        }
    }
    if json {
        output::json_line(&job.facts(child.0.id()))?;
    } else {
        output::print(&job.greeting())?;
    }
    loop {
        let woken = tokio::select! {
            woken = signals.next() => woken,
            () = sleep(OVER_POLL) => match job.is_over() {
                true => Woken::Stop,
                false => continue,
            },
        };
        match woken {
            Woken::Stop | Woken::Cut => {
                if !json {
                    eprintln!("Stopping: requests finish, the image is flushed and closed");
                }
                return child.stop(&mut signals).await;
            }
            Woken::Child => {
                if let Some(status) = child.0.try_wait()? {
                    return ended(status);
                }
            }
        }
    }
}

/// Waits until the daemon's monitor answers and shows the export; false: someone said stop.
async fn wait_for_start(
    child: &mut Running,
    monitor: &Path,
    signals: &mut Signals,
) -> Result<bool> {
    loop {
        if let Some(status) = child.0.try_wait()? {
            match status.code() {
                Some(_) => bail!("Nothing was started: the reason is above"),
                None => bail!("The daemon ended with {status}"),
            }
        }
        if monitor.exists()
            && let Ok(mut client) = Client::connect(monitor)
        {
            let exports = client.call("query-block-exports", &Map::new())?;
            let ours = |export: &Value| export["id"] == json!(plan::EXPORT_ID);
            if !exports
                .as_array()
                .is_some_and(|exports| exports.iter().any(ours))
            {
                bail!("The daemon started, but without the export");
            }
            return Ok(true);
        }
        tokio::select! {
            woken = signals.next() => {
                if matches!(woken, Woken::Stop | Woken::Cut) {
                    return Ok(false);
                }
            }
            () = sleep(START_POLL) => {}
        }
    }
}

/// The daemon; it does not outlive an error on our side.
struct Running(Child);

impl Running {
    /// Ends it cleanly and waits for that, however often it is asked for.
    async fn stop(&mut self, signals: &mut Signals) -> Result<ExitCode> {
        self.signal(Signal::TERM);
        loop {
            if let Some(status) = self.0.try_wait()? {
                return ended(status);
            }
            match signals.next().await {
                Woken::Child => {}
                Woken::Cut => self.signal(Signal::QUIT),
                Woken::Stop => eprintln!(
                    "Still stopping. Ctrl-\\ stops at once, and loses what is not written yet"
                ),
            }
        }
    }

    /// Sends a signal unless it has been reaped.
    fn signal(&mut self, which: Signal) {
        if let Ok(None) = self.0.try_wait() {
            // It may end between the two; that is what the signal is for.
            let _ = kill_process(Pid::from_child(&self.0), which);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::TERM);
        // Reaped, or gone with an error that nothing can be done about.
        let _ = self.0.wait();
    }
}

/// The exit code for the way in which the daemon ended: its own, where it ended by itself.
fn ended(status: ExitStatus) -> Result<ExitCode> {
    match status.code().map(u8::try_from) {
        Some(Ok(0)) => Ok(ExitCode::SUCCESS),
        Some(Ok(code)) => {
            eprintln!("The daemon ended with {status}; the reason is above");
            Ok(ExitCode::from(code))
        }
        _ => bail!("The daemon ended with {status}"),
    }
}
