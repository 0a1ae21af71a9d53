//! Jobs whose end is decided by the test.

use tokio::sync::oneshot;
use tokio::task::{LocalSet, yield_now};

use super::*;

fn options(auto_finalize: bool, auto_dismiss: bool) -> JobOptions {
    JobOptions {
        id: "j".into(),
        kind: JobType::Create,
        auto_finalize,
        auto_dismiss,
    }
}

struct Scene {
    daemon: Rc<Daemon>,
    end: Option<oneshot::Sender<Result<(), Error>>>,
}

impl Scene {
    fn start(options: JobOptions) -> Self {
        let (daemon, _events, _commands) = Daemon::new();
        let (end, ended) = oneshot::channel();
        let work = |handle: Handle| async move {
            handle.set_progress(1, 2);
            ended.await.unwrap()
        };
        daemon.jobs.start(&daemon, options, work).unwrap();
        Self {
            daemon,
            end: Some(end),
        }
    }

    async fn end(&mut self, outcome: Result<(), Error>) {
        self.end.take().unwrap().send(outcome).unwrap();
        settle().await;
    }

    fn state(&self) -> Option<(JobStatus, Option<String>)> {
        let info = self.daemon.jobs.query().into_iter().next()?;
        Some((info.status, info.error))
    }
}

async fn settle() {
    for _ in 0..4 {
        yield_now().await;
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    LocalSet::new().block_on(&runtime.unwrap(), test);
}

#[test]
fn a_job_waits_to_be_finalized_and_dismissed() {
    run(async {
        let mut scene = Scene::start(options(false, false));
        settle().await;
        let jobs = &scene.daemon.clone().jobs;
        assert_eq!(jobs.query()[0].total_progress, 2);
        assert!(jobs.finalize("j").is_err(), "it runs");
        scene.end(Ok(())).await;
        assert_eq!(scene.state(), Some((JobStatus::Pending, None)));
        jobs.finalize("j").unwrap();
        settle().await;
        assert_eq!(scene.state(), Some((JobStatus::Concluded, None)));
        jobs.dismiss(&scene.daemon, "j").unwrap();
        assert_eq!(scene.state(), None);
    });
}

#[test]
fn a_pending_job_can_be_cancelled_still() {
    run(async {
        let mut scene = Scene::start(options(false, false));
        scene.end(Ok(())).await;
        scene.daemon.jobs.cancel("j").unwrap();
        settle().await;
        let error = Some("Operation canceled".to_owned());
        assert_eq!(scene.state(), Some((JobStatus::Concluded, error)));
    });
}

#[test]
fn a_job_that_dismisses_itself_leaves_nothing() {
    run(async {
        let mut scene = Scene::start(options(true, true));
        scene.end(Err(Error::generic("no"))).await;
        assert_eq!(scene.state(), None);
        assert_eq!(
            scene.daemon.jobs.cancel("j").unwrap_err().desc,
            "Job not found"
        );
    });
}

#[test]
fn a_cancelled_job_never_succeeds() {
    run(async {
        let mut scene = Scene::start(options(true, false));
        scene.daemon.jobs.pause("j").unwrap();
        scene.daemon.jobs.cancel("j").unwrap();
        assert_eq!(
            scene.daemon.jobs.resume("j").unwrap_err().desc,
            "Can't resume a job that was not paused"
        );
        scene.end(Ok(())).await;
        let error = Some("Operation canceled".to_owned());
        assert_eq!(scene.state(), Some((JobStatus::Concluded, error)));
    });
}

#[test]
fn the_end_waits_for_jobs_at_work() {
    run(async {
        let mut scene = Scene::start(options(true, false));
        let daemon = scene.daemon.clone();
        let ending = tokio::task::spawn_local(async move { daemon.jobs.end_all(&daemon).await });
        settle().await;
        assert!(!ending.is_finished());
        scene.end(Ok(())).await;
        ending.await.unwrap();
        assert_eq!(scene.state(), None);
    });
}
