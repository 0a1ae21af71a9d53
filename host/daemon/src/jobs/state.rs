//! The states of a job, and what a client may ask for in each. Pure.
//!
//! ```text
//! created -- running -- waiting -- pending -- concluded -- null
//!              | |                                ^
//!           paused '--------- aborting -----------'
//! ready, standby: running and paused of a job that waits for job-complete
//! ```

use outport_qmp::Error;
use outport_qmp::types::job::JobStatus;

/// What a client asks of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Cancel,
    Pause,
    Resume,
    Complete,
    Finalize,
    Dismiss,
}

impl Verb {
    fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }

    fn is_accepted(self, status: JobStatus) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match self {
            Self::Cancel => matches!(
                status,
                Created | Running | Paused | Ready | Standby | Waiting | Pending
            ),
            Self::Pause | Self::Resume => {
                matches!(status, Created | Running | Paused | Ready | Standby)
            }
            Self::Complete => status == Ready,
            Self::Finalize => status == Pending,
            Self::Dismiss => status == Concluded,
        }
    }

    /// # Errors
    /// The job's state does not allow it.
    pub(super) fn check(self, id: &str, status: JobStatus) -> Result<(), Error> {
        match self.is_accepted(status) {
            true => Ok(()),
            false => Err(Error::generic(format!(
                "Job '{id}' in state '{status}' cannot accept command verb '{}'",
                self.as_str()
            ))),
        }
    }
}

/// Whether a job can go from one state right to the other.
pub(super) fn follows(from: JobStatus, to: JobStatus) -> bool {
    use JobStatus::{
        Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined,
        Waiting,
    };
    match from {
        Undefined => to == Created,
        Created => matches!(to, Running | Aborting | Null),
        Running => matches!(to, Paused | Ready | Waiting | Aborting),
        Paused => to == Running,
        Ready => matches!(to, Standby | Waiting | Aborting),
        Standby => to == Ready,
        Waiting => matches!(to, Pending | Aborting),
        Pending => matches!(to, Concluded | Aborting),
        Aborting => matches!(to, Aborting | Concluded),
        Concluded => to == Null,
        Null => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_are_refused_in_qemus_words() {
        assert_eq!(
            Verb::Cancel
                .check("c0", JobStatus::Concluded)
                .unwrap_err()
                .desc,
            "Job 'c0' in state 'concluded' cannot accept command verb 'cancel'"
        );
        assert!(Verb::Cancel.check("c0", JobStatus::Pending).is_ok());
        assert!(Verb::Complete.check("c0", JobStatus::Running).is_err());
        assert!(Verb::Dismiss.check("c0", JobStatus::Aborting).is_err());
    }

    #[test]
    fn nothing_follows_the_end() {
        assert!(follows(JobStatus::Concluded, JobStatus::Null));
        assert!(!follows(JobStatus::Null, JobStatus::Created));
        assert!(!follows(JobStatus::Running, JobStatus::Concluded));
    }
}
