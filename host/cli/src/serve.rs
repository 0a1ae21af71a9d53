//! `outport serve`: one image, one daemon, until Ctrl-C.
//!
//! ```text
//! plan     what to ask for: the daemon's options, the URI, what to tell people
//! run      starts the daemon, waits until its monitor answers (the export then exists),
//!          waits for a signal or for its end, passes SIGTERM on, reaps it
//! ```
//! The daemon is in a process group of its own, so that Ctrl-C reaches it once, through us.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::ProgressBar;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Map, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use crate::args::Serve;
use crate::client::Client;
use crate::{daemon, output};

mod plan;

use plan::Plan;

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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Cannot start")?;
    runtime.block_on(serve(args, &plan, &program))
}

/// Says what is wrong before a daemon is started for it.
fn check_image(args: &Serve) -> Result<()> {
    let shown = args.image.display();
    let metadata = fs::metadata(&args.image).with_context(|| format!("Cannot open '{shown}'"))?;
    if metadata.is_dir() {
        bail!("'{shown}' is a directory: give the image in it");
    }
    if !args.read_only {
        let writable = fs::OpenOptions::new().write(true).open(&args.image);
        writable.map_err(|error| {
            anyhow!("Cannot write to '{shown}': {error}. To serve it without, add --read-only")
        })?;
    }
    Ok(())
}

/// Everything that ends a wait.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    child: tokio::signal::unix::Signal,
}

/// Why a wait ended.
enum Woken {
    /// Someone wants us to stop.
    Stop,
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
            child: on(SignalKind::child())?,
        })
    }

    async fn next(&mut self) -> Woken {
        tokio::select! {
            _ = self.interrupt.recv() => Woken::Stop,
            _ = self.terminate.recv() => Woken::Stop,
            _ = self.hangup.recv() => Woken::Stop,
            _ = self.child.recv() => Woken::Child,
        }
    }
}

async fn serve(args: &Serve, plan: &Plan, program: &Path) -> Result<ExitCode> {
    // Before the daemon exists: none of them is lost.
    let mut signals = Signals::new()?;
    let mut command = Command::new(program);
    command
        .args(&plan.options)
        .stdin(std::process::Stdio::null());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command
        .spawn()
        .with_context(|| format!("Cannot start the daemon '{}'", program.display()))?;
    let mut child = Running(child);

    let spinner = ProgressBar::new_spinner().with_message("starting the daemon");
    spinner.enable_steady_tick(Duration::from_millis(100));
    let started = wait_for_start(&mut child, plan, &mut signals).await;
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
    if args.json {
        output::json_line(&plan.facts(child.0.id()))?;
    } else {
        output::print(&plan.greeting())?;
    }
    loop {
        match signals.next().await {
            Woken::Stop => {
                if !args.json {
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
async fn wait_for_start(child: &mut Running, plan: &Plan, signals: &mut Signals) -> Result<bool> {
    loop {
        if let Some(status) = child.0.try_wait()? {
            bail!("The daemon did not start ({status}); its message is above");
        }
        if plan.monitor.exists()
            && let Ok(mut client) = Client::connect(&plan.monitor)
        {
            let exports = client.call("query-block-exports", &Map::new())?;
            let ours = |export: &serde_json::Value| export["id"] == json!(plan::EXPORT_ID);
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
                if matches!(woken, Woken::Stop) {
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
    /// Ends it cleanly and waits for that; a second signal ends it at once.
    async fn stop(&mut self, signals: &mut Signals) -> Result<ExitCode> {
        self.signal(Signal::TERM);
        loop {
            if let Some(status) = self.0.try_wait()? {
                return ended(status);
            }
            if matches!(signals.next().await, Woken::Stop) {
                self.signal(Signal::KILL);
                self.0.wait()?;
                bail!("The daemon was killed before it had closed the image");
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

/// The exit code for the way in which the daemon ended.
fn ended(status: ExitStatus) -> Result<ExitCode> {
    if !status.success() {
        bail!("The daemon ended with {status}");
    }
    Ok(ExitCode::SUCCESS)
}
