//! From the command line to a serving daemon, and to its end.
//!
//! The options are carried out in order, each seeing what the ones before it made; then monitors
//! are answered. Invariant: whatever way the daemon ends (quit, a signal, a bad option), exports
//! are closed before nodes, nodes are written back, and socket files and the PID file go.

use std::ffi::OsString;
use std::process::ExitCode;
use std::rc::Rc;

use tokio::task::LocalSet;

use crate::args::{self, Args, Parsed};
use crate::commands::Control;
use crate::daemon::Daemon;
use crate::daemonize::{self, Side};
use crate::monitor::Dispatcher;
use crate::pidfile::Pidfile;
use crate::plugin_check;
use crate::signals::Signals;
use crate::{PROGRAM, logging};

mod check;
mod config_file;
mod settings;

use settings::{Applied, Settings};

/// Runs the daemon with these arguments until it ends.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(code) = plugin_check::asked(&arguments) {
        return code;
    }
    let args = match args::parse(arguments) {
        Parsed::Run(args) => args,
        Parsed::Print(text) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Parsed::Fail(message) => return fail(&message),
    };
    if args.check_config {
        return match check::check(&args.settings) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("{message}");
                ExitCode::FAILURE
            }
        };
    }
    if args.daemonize {
        match daemonize::split() {
            Ok(Side::Parent(code)) => return code,
            Ok(Side::Child) => {}
            Err(error) => return fail(&format!("cannot daemonize: {error}")),
        }
    }
    logging::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    let code = LocalSet::new().block_on(&runtime, serve(args));
    // A thread may still wait for standard input, which may never come.
    runtime.shutdown_background();
    code
}

fn fail(message: &str) -> ExitCode {
    eprintln!("{PROGRAM}: {message}");
    ExitCode::FAILURE
}

/// The daemon's life on the control thread.
async fn serve(args: Args) -> ExitCode {
    let mut signals = match Signals::catch() {
        Ok(signals) => signals,
        Err(error) => return fail(&format!("cannot catch signals: {error}")),
    };
    let (daemon, events, commands) = Daemon::new();
    tokio::task::spawn_local(daemon.events.clone().forward(events));
    let control = Rc::new(Control::new(daemon.clone()));
    let mut dispatcher = Dispatcher::new(control, commands);

    let mut pidfile = None;
    let mut starting = Box::pin(start(&daemon, args, &mut pidfile));
    let started = tokio::select! {
        biased;
        started = &mut starting => Some(started),
        // A client that `wait=on` waits for may never come.
        signal = signals.next() => {
            tracing::info!(reason = signal, "the daemon ends");
            None
        }
    };
    let interrupted = started.is_none();
    let code = match started {
        Some(Ok(true)) => {
            let reason = tokio::select! {
                () = dispatcher.run() => "quit",
                signal = signals.next() => signal,
            };
            tracing::info!(reason, "the daemon ends");
            ExitCode::SUCCESS
        }
        Some(Ok(false)) | None => ExitCode::SUCCESS,
        Some(Err(message)) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    };
    let begun = async {
        match interrupted {
            true => _ = (&mut starting).await,
            false => dispatcher.go_on().await,
        }
    };
    let ended = tokio::select! {
        biased;
        () = end(&daemon, begun) => code,
        signal = signals.next() => {
            tracing::error!(signal, "ended before everything was written back");
            ExitCode::FAILURE
        }
    };
    drop(starting);
    drop(pidfile);
    ended
}

/// Carries the options out and starts the monitors. `false`: one of them was a question, which is
/// answered.
async fn start(
    daemon: &Rc<Daemon>,
    args: Args,
    pidfile: &mut Option<Pidfile>,
) -> Result<bool, String> {
    let mut settings = Settings::new(daemon.clone(), args.daemonize);
    for setting in &args.settings {
        daemon.goes_on()?;
        match settings.apply(setting).await {
            Ok(Applied::Done) => {}
            Ok(Applied::Print(text)) => {
                print!("{text}");
                return Ok(false);
            }
            Err(message) => return Err(args::complaint(Some(&setting.typed), &message)),
        }
    }
    daemon.goes_on()?;
    if let Some(path) = &args.pidfile {
        *pidfile = Some(Pidfile::create(path).map_err(|m| args::complaint(None, &m))?);
    }
    if args.daemonize {
        let ready = daemonize::ready();
        ready.map_err(|error| args::complaint(None, &format!("cannot daemonize: {error}")))?;
    }
    daemon.monitors.open();
    Ok(true)
}

/// Closes everything in order. What was begun goes on meanwhile: what must not stop half-way is
/// waited for.
async fn end(daemon: &Daemon, begun: impl Future<Output = ()>) {
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
