//! Logging: structured lines to standard error, chosen by the environment.

use tracing_subscriber::EnvFilter;

/// Variables that say what is logged, the first that is set counts.
const VARIABLES: [&str; 2] = ["OUTPORTD_LOG", "RUST_LOG"];

/// What is logged if nobody says so.
const DEFAULT: &str = "warn";

/// Starts logging. A second call in one process changes nothing.
pub(crate) fn start() {
    let chosen = VARIABLES.iter().find_map(|name| std::env::var(name).ok());
    let filter = EnvFilter::try_new(chosen.as_deref().unwrap_or(DEFAULT));
    let _already_started = tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| EnvFilter::new(DEFAULT)))
        .with_writer(std::io::stderr)
        // Told with `eprintln!`, which panics where standard error is a pipe or a terminal that
        // nobody reads any more: a log line must not end the daemon.
        .log_internal_errors(false)
        .with_ansi(false)
        .try_init();
}
