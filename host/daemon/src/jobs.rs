//! Jobs: work that goes on after its command was answered.
//!
//! ```text
//! created, running | answer | ... waiting, pending, concluded | job-dismiss | null
//!                             ... aborting, concluded (with an error)
//! ```
//!
//! Control plane. The only kind is `create`; it finalizes by itself and stays until it is
//! dismissed.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;

use outport_qmp::error::is_identifier;
use outport_qmp::events::JobStatusChange;
use outport_qmp::types::job::{JobInfo, JobStatus, JobType};
use outport_qmp::{Error, Event};

use crate::daemon::Daemon;

struct Job {
    id: String,
    status: JobStatus,
    error: Option<String>,
}

/// All jobs, in the order in which they were started.
#[derive(Default)]
pub(crate) struct Jobs {
    list: RefCell<Vec<Job>>,
}

impl Jobs {
    /// Starts a job that does `work`.
    ///
    /// # Errors
    /// The id is no id, or taken.
    pub(crate) fn start(
        &self,
        daemon: &Rc<Daemon>,
        id: String,
        work: impl Future<Output = Result<(), Error>> + 'static,
    ) -> Result<(), Error> {
        if !is_identifier(&id) {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.list.borrow().iter().any(|job| job.id == id) {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        let job = Job {
            id: id.clone(),
            status: JobStatus::Undefined,
            error: None,
        };
        self.list.borrow_mut().push(job);
        self.enter(daemon, &id, JobStatus::Created);
        self.enter(daemon, &id, JobStatus::Running);
        let daemon = daemon.clone();
        tokio::task::spawn_local(async move {
            let outcome = work.await;
            daemon.jobs.conclude(&daemon, &id, outcome);
        });
        Ok(())
    }

    /// `job-dismiss`.
    ///
    /// # Errors
    /// There is no such job, or it is still at work.
    pub(crate) fn dismiss(&self, daemon: &Daemon, id: &str) -> Result<(), Error> {
        let list = self.list.borrow();
        let job = list
            .iter()
            .find(|job| job.id == id)
            .ok_or_else(Error::no_such_job)?;
        let status = job.status;
        drop(list);
        if status != JobStatus::Concluded {
            return Err(Error::generic(format!(
                "Job '{id}' in state '{status}' cannot accept command verb 'dismiss'"
            )));
        }
        self.enter(daemon, id, JobStatus::Null);
        self.list.borrow_mut().retain(|job| job.id != id);
        Ok(())
    }

    /// Forgets what concluded, newest first; the daemon ends.
    pub(crate) fn forget_all(&self, daemon: &Daemon) {
        let list = self.list.borrow();
        let concluded = list
            .iter()
            .rev()
            .filter(|job| job.status == JobStatus::Concluded);
        let ids: Vec<_> = concluded.map(|job| job.id.clone()).collect();
        drop(list);
        for id in ids {
            self.enter(daemon, &id, JobStatus::Null);
            self.list.borrow_mut().retain(|job| job.id != id);
        }
    }

    /// `query-jobs`, newest first.
    pub(crate) fn query(&self) -> Vec<JobInfo> {
        let info = |job: &Job| JobInfo {
            id: job.id.clone(),
            r#type: JobType::Create,
            status: job.status,
            current_progress: i64::from(job.status == JobStatus::Concluded),
            total_progress: 1,
            error: job.error.clone(),
        };
        self.list.borrow().iter().rev().map(info).collect()
    }

    fn conclude(&self, daemon: &Daemon, id: &str, outcome: Result<(), Error>) {
        match outcome {
            Ok(()) => {
                self.enter(daemon, id, JobStatus::Waiting);
                self.enter(daemon, id, JobStatus::Pending);
            }
            Err(error) => {
                if let Some(job) = self.list.borrow_mut().iter_mut().find(|job| job.id == id) {
                    job.error = Some(error.desc);
                }
                self.enter(daemon, id, JobStatus::Aborting);
            }
        }
        self.enter(daemon, id, JobStatus::Concluded);
    }

    fn enter(&self, daemon: &Daemon, id: &str, status: JobStatus) {
        if let Some(job) = self.list.borrow_mut().iter_mut().find(|job| job.id == id) {
            job.status = status;
        }
        let change = JobStatusChange {
            id: id.to_owned(),
            status,
        };
        daemon.events.emit(&Event::JobStatusChange(change));
    }
}
