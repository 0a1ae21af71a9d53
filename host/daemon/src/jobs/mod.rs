//! Jobs: work that goes on after its command was answered.
//!
//! ```text
//! created, running | answer | ... waiting, pending, concluded | job-dismiss | null
//!                             ... aborting, concluded (with an error)
//! ```
//!
//! Control plane. A job is a future with a [`Handle`] to tell its progress and to hear that it is
//! cancelled; everything that clients see of it is done here, the same for every kind. Invariants:
//! states follow each other as `state.rs` says, one event for each; a job that was cancelled before
//! it was pending never succeeds.

mod state;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outport_qmp::error::is_identifier;
use outport_qmp::events::JobStatusChange;
use outport_qmp::types::job::{JobInfo, JobStatus, JobType};
use outport_qmp::{Error, Event};
use tokio::sync::Notify;

use crate::daemon::Daemon;
use state::{Verb, follows};

/// How a job is started and ended.
#[derive(Debug, Clone)]
pub(crate) struct JobOptions {
    pub(crate) id: String,
    pub(crate) kind: JobType,
    /// It does not wait for `job-finalize`.
    pub(crate) auto_finalize: bool,
    /// It does not wait for `job-dismiss`.
    pub(crate) auto_dismiss: bool,
}

#[derive(Debug)]
struct Job {
    options: JobOptions,
    status: Cell<JobStatus>,
    /// `job-pause` was asked for. A job pauses where it can; creating an image has no such place.
    paused: Cell<bool>,
    finalized: Cell<bool>,
    cancelled: Arc<AtomicBool>,
    /// Work done and all work, in a unit of the job's own.
    progress: Cell<(i64, i64)>,
    error: RefCell<Option<String>>,
    /// Its state, or what was asked of it, is another.
    changed: Notify,
}

impl Job {
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.paused.set(false);
        self.changed.notify_waiters();
    }

    /// Waits until `done` holds, which is looked at after each change.
    async fn until(&self, done: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            if done(self) {
                return;
            }
            changed.await;
        }
    }
}

/// The job's own side.
#[derive(Debug, Clone)]
pub(crate) struct Handle(Rc<Job>);

impl Handle {
    /// Set when the job is cancelled, for whoever works for it on another thread.
    pub(crate) fn cancelled(&self) -> Arc<AtomicBool> {
        self.0.cancelled.clone()
    }

    /// Tells how far it is.
    pub(crate) fn set_progress(&self, current: i64, total: i64) {
        self.0.progress.set((current, total));
    }
}

/// All jobs, in the order in which they were started.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    list: RefCell<Vec<Rc<Job>>>,
}

impl Jobs {
    /// Starts a job that does what `work` returns.
    ///
    /// # Errors
    /// The id is no id, or taken.
    pub(crate) fn start<F>(
        &self,
        daemon: &Rc<Daemon>,
        options: JobOptions,
        work: impl FnOnce(Handle) -> F,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<(), Error>> + 'static,
    {
        let id = &options.id;
        if !is_identifier(id) {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.find(id).is_ok() {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        let job = Rc::new(Job {
            options,
            status: Cell::new(JobStatus::Undefined),
            paused: Cell::default(),
            finalized: Cell::default(),
            cancelled: Arc::default(),
            progress: Cell::new((0, 1)),
            error: RefCell::default(),
            changed: Notify::new(),
        });
        self.list.borrow_mut().push(job.clone());
        enter(daemon, &job, JobStatus::Created);
        enter(daemon, &job, JobStatus::Running);
        let work = work(Handle(job.clone()));
        let daemon = daemon.clone();
        tokio::task::spawn_local(async move {
            let outcome = work.await;
            daemon.jobs.conclude(&daemon, &job, outcome).await;
        });
        Ok(())
    }

    /// `job-cancel`. The job ends where it can.
    ///
    /// # Errors
    /// There is no such job, or it is over.
    pub(crate) fn cancel(&self, id: &str) -> Result<(), Error> {
        self.find_for(id, Verb::Cancel)?.cancel();
        Ok(())
    }

    /// `job-pause`.
    ///
    /// # Errors
    /// There is no such job, it is over, or it was asked to pause already.
    pub(crate) fn pause(&self, id: &str) -> Result<(), Error> {
        let job = self.find_for(id, Verb::Pause)?;
        match job.paused.replace(true) {
            true => Err(Error::generic("Job is already paused")),
            false => Ok(()),
        }
    }

    /// `job-resume`.
    ///
    /// # Errors
    /// There is no such job, or it was not asked to pause.
    pub(crate) fn resume(&self, id: &str) -> Result<(), Error> {
        let job = self.find(id)?;
        if !job.paused.get() {
            let message = "Can't resume a job that was not paused";
            return Err(Error::generic(message));
        }
        Verb::Resume.check(id, job.status.get())?;
        job.paused.set(false);
        job.changed.notify_waiters();
        Ok(())
    }

    /// `job-complete`.
    ///
    /// # Errors
    /// There is no such job, or it does not wait for that. No kind of job does so far.
    pub(crate) fn complete(&self, id: &str) -> Result<(), Error> {
        self.find_for(id, Verb::Complete).map(drop)
    }

    /// `job-finalize`.
    ///
    /// # Errors
    /// There is no such job, or it does not wait for that.
    pub(crate) fn finalize(&self, id: &str) -> Result<(), Error> {
        let job = self.find_for(id, Verb::Finalize)?;
        job.finalized.set(true);
        job.changed.notify_waiters();
        Ok(())
    }

    /// `job-dismiss`.
    ///
    /// # Errors
    /// There is no such job, or it is still at work.
    pub(crate) fn dismiss(&self, daemon: &Daemon, id: &str) -> Result<(), Error> {
        let job = self.find_for(id, Verb::Dismiss)?;
        self.forget(daemon, &job);
        Ok(())
    }

    /// Cancels all jobs, waits until they are over and forgets them, newest first; the daemon ends.
    pub(crate) async fn end_all(&self, daemon: &Daemon) {
        let jobs: Vec<_> = self.list.borrow().iter().rev().cloned().collect();
        for job in &jobs {
            if Verb::Cancel.check("", job.status.get()).is_ok() {
                job.cancel();
            }
        }
        for job in jobs {
            let is_over =
                |job: &Job| matches!(job.status.get(), JobStatus::Concluded | JobStatus::Null);
            job.until(is_over).await;
            if job.status.get() == JobStatus::Concluded {
                self.forget(daemon, &job);
            }
        }
    }

    /// `query-jobs`, newest first.
    pub(crate) fn query(&self) -> Vec<JobInfo> {
        let info = |job: &Rc<Job>| {
            let (current_progress, total_progress) = job.progress.get();
            JobInfo {
                id: job.options.id.clone(),
                r#type: job.options.kind,
                status: job.status.get(),
                current_progress,
                total_progress,
                error: job.error.borrow().clone(),
            }
        };
        self.list.borrow().iter().rev().map(info).collect()
    }

    fn find(&self, id: &str) -> Result<Rc<Job>, Error> {
        let list = self.list.borrow();
        let job = list.iter().find(|job| job.options.id == id);
        job.cloned().ok_or_else(Error::no_such_job)
    }

    fn find_for(&self, id: &str, verb: Verb) -> Result<Rc<Job>, Error> {
        let job = self.find(id)?;
        verb.check(id, job.status.get())?;
        Ok(job)
    }

    /// The work is done, or failed.
    async fn conclude(&self, daemon: &Daemon, job: &Rc<Job>, outcome: Result<(), Error>) {
        let outcome = match outcome {
            Ok(()) if !job.is_cancelled() => {
                enter(daemon, job, JobStatus::Waiting);
                enter(daemon, job, JobStatus::Pending);
                if !job.options.auto_finalize {
                    job.until(|job| job.finalized.get() || job.is_cancelled())
                        .await;
                }
                match job.options.auto_finalize || job.finalized.get() {
                    true => Ok(()),
                    false => Err(cancelled()),
                }
            }
            Err(error) if !job.is_cancelled() => Err(error),
            Ok(()) | Err(_) => Err(cancelled()),
        };
        if let Err(error) = outcome {
            *job.error.borrow_mut() = Some(error.desc);
            enter(daemon, job, JobStatus::Aborting);
        }
        enter(daemon, job, JobStatus::Concluded);
        if job.options.auto_dismiss {
            self.forget(daemon, job);
        }
    }

    fn forget(&self, daemon: &Daemon, job: &Rc<Job>) {
        enter(daemon, job, JobStatus::Null);
        self.list
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, job));
    }
}

fn cancelled() -> Error {
    Error::generic("Operation canceled")
}

fn enter(daemon: &Daemon, job: &Job, status: JobStatus) {
    let from = job.status.replace(status);
    debug_assert!(follows(from, status), "{from} -> {status}");
    let change = JobStatusChange {
        id: job.options.id.clone(),
        status,
    };
    daemon.events.emit(&Event::JobStatusChange(change));
    job.changed.notify_waiters();
}

#[cfg(test)]
mod tests;
