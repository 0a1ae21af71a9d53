//! What a process costs, read from `/proc`.

use std::fs;
use std::time::Duration;

/// Ticks per second in `/proc/PID/stat`: fixed by Linux's interface with user space.
const USER_HZ: u64 = 100;

/// A moment's figures of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcStats {
    /// Resident memory.
    pub rss_kib: u64,
    /// Resident memory that belongs to no file: heap and stacks.
    pub anon_kib: u64,
    /// Open file descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// CPU time of all threads, user and system.
    pub cpu: Duration,
}

/// Reads the figures of `pid`; panics when it is gone.
pub fn proc_stats(pid: u32) -> ProcStats {
    let read = |name: &str| {
        fs::read_to_string(format!("/proc/{pid}/{name}"))
            .unwrap_or_else(|error| panic!("/proc/{pid}/{name}: {error}"))
    };
    let status = read("status");
    let field = |name: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    };
    // The command name may hold spaces; utime and stime are the 12th and 13th after it.
    let stat = read("stat");
    let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|n| n.parse::<u64>().ok())
        .sum();
    ProcStats {
        rss_kib: field("VmRSS:"),
        anon_kib: field("RssAnon:"),
        fds: fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
        threads: field("Threads:") as usize,
        cpu: Duration::from_millis(ticks * (1000 / USER_HZ)),
    }
}
