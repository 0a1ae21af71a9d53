//! Background jobs (QEMU's `job.json`).

qapi! {
    /// Kinds of job that the daemon runs.
    enum JobType {
        /// Creating an image.
        Create = "create",
    }

    /// States of a job, in the order in which it can pass through them.
    enum JobStatus {
        /// Never seen by clients.
        Undefined = "undefined",
        /// Not started.
        Created = "created",
        /// At work.
        Running = "running",
        /// Paused while running.
        Paused = "paused",
        /// Waiting for the command to complete.
        Ready = "ready",
        /// Paused while ready.
        Standby = "standby",
        /// Waiting for other jobs of its transaction.
        Waiting = "waiting",
        /// Waiting for the command to finalize.
        Pending = "pending",
        /// Cleaning up after a failure.
        Aborting = "aborting",
        /// Over, waiting to be dismissed.
        Concluded = "concluded",
        /// Gone.
        Null = "null",
    }

    /// An element of `query-jobs`.
    struct JobInfo {
        /// Id of the job.
        id: String,
        /// Its kind.
        r#type: JobType = "type",
        /// Its state.
        status: JobStatus,
        /// Work done, in a unit of the job's own.
        current_progress: i64 = "current-progress",
        /// All work, in the same unit.
        total_progress: i64 = "total-progress",
        /// Why it failed.
        error: Option<String>,
    }

    /// Arguments of the commands that ask something of a job.
    struct JobId {
        /// Id of the job.
        id: String,
    }

    /// An element of `query-block-jobs`, which tells of jobs on guest devices.
    struct BlockJobInfo {
        /// Its kind.
        r#type: JobType = "type",
        /// The device, or the job's id.
        device: String,
        /// All work.
        len: i64,
        /// Work done.
        offset: i64,
        /// Whether it is at work.
        busy: bool,
        /// Whether it is paused.
        paused: bool,
        /// Bytes a second at most; 0: no limit.
        speed: i64,
        /// Whether `job-complete` makes it complete.
        ready: bool,
        /// Its state.
        status: JobStatus,
        /// It does not wait for `job-finalize`.
        auto_finalize: bool = "auto-finalize",
        /// It does not wait for `job-dismiss`.
        auto_dismiss: bool = "auto-dismiss",
        /// Why it failed.
        error: Option<String>,
    }
}
