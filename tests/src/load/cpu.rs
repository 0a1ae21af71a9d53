//! CPU clocks of this thread and of another process, in nanoseconds.
//!
//! `/proc/PID/stat` counts in ticks of 10 ms and `/proc/PID/task` forgets threads that have ended;
//! the process's CPU clock has neither fault.

use std::time::Duration;

/// CPU time that all threads of a process have used, ended ones too.
pub(super) fn of_process(pid: i32) -> Option<Duration> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the pointer is to a live local.
    if unsafe { libc::clock_getcpuclockid(pid, &mut clock) } != 0 {
        return None;
    }
    read(clock)
}

/// CPU time that the calling thread has used.
pub(super) fn of_this_thread() -> Duration {
    read(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or_default()
}

fn read(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a live local.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return None;
    }
    Some(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}
