//! Iothreads: one thread each, with the properties that QEMU's have.
//!
//! The thread is the block layer's. Its properties are checked, kept, told and changed at run
//! time.

use outport_block::IoThread;
use outport_block::engine::polling::IoLimits;
use outport_qmp::Error;
use outport_qmp::types::qom::IothreadProperties;

/// Most threads that an iothread keeps for blocking work, if nobody says otherwise.
pub(super) const THREAD_POOL_MAX: i64 = 64;

/// How long an iothread polls, if nobody says otherwise.
const POLL_MAX_NS: u64 = 32768;

/// How its window grows and shrinks then.
const POLL_FACTOR: u64 = 2;

/// Weights of polling are shifts of a 64-bit number.
const POLL_WEIGHT_MAX: i64 = 63;

/// A running thread.
#[derive(Debug, Clone)]
pub(crate) struct Thread {
    pub(crate) iothread: IoThread,
    /// As the system numbers it.
    pub(crate) id: i64,
}

impl Thread {
    /// Starts it.
    ///
    /// # Errors
    /// A property that cannot be, or no thread to be had.
    pub(super) async fn start(id: &str, properties: &IothreadProperties) -> Result<Self, Error> {
        check(properties)?;
        let failed =
            |reason: String| Error::generic(format!("Could not start iothread '{id}': {reason}"));
        let iothread = IoThread::start(id).map_err(|error| failed(error.to_string()))?;
        iothread.set_limits(limits(properties));
        let tid = || async { rustix::thread::gettid().as_raw_nonzero().get() };
        let tid = iothread.run(tid).await;
        let tid = tid.ok_or_else(|| failed("it ended at once".into()))?;
        Ok(Self {
            iothread,
            id: i64::from(tid),
        })
    }
}

/// What the engine makes of the properties.
pub(super) fn limits(properties: &IothreadProperties) -> IoLimits {
    let number = |value: Option<i64>, default: u64| {
        value.map_or(default, |value| u64::try_from(value).unwrap_or(0))
    };
    IoLimits {
        poll_max_ns: number(properties.poll_max_ns, POLL_MAX_NS),
        poll_grow: number(properties.poll_grow, POLL_FACTOR),
        poll_shrink: number(properties.poll_shrink, POLL_FACTOR),
        batch_max: number(properties.aio_max_batch, 0),
    }
}

/// # Errors
/// QEMU's sentence for the first property that cannot be.
pub(super) fn check(properties: &IothreadProperties) -> Result<(), Error> {
    for (name, value, max) in [
        ("aio-max-batch", properties.aio_max_batch, i64::MAX),
        ("thread-pool-min", properties.thread_pool_min, i64::MAX),
        ("thread-pool-max", properties.thread_pool_max, i64::MAX),
        ("poll-max-ns", properties.poll_max_ns, i64::MAX),
        ("poll-grow", properties.poll_grow, i64::MAX),
        ("poll-shrink", properties.poll_shrink, i64::MAX),
        ("poll-weight", properties.poll_weight, POLL_WEIGHT_MAX),
    ] {
        if value.is_some_and(|value| !(0..=max).contains(&value)) {
            let message = format!("{name} value must be in range [0, {max}]");
            return Err(Error::generic(message));
        }
    }
    let min = properties.thread_pool_min.unwrap_or(0);
    let max = properties.thread_pool_max.unwrap_or(THREAD_POOL_MAX);
    if max == 0 || min > max || max > i64::from(i32::MAX) {
        return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_reach_the_engine() {
        let told = limits(&IothreadProperties::default());
        assert_eq!((told.poll_max_ns, told.poll_grow), (32768, 2));
        let told = limits(&IothreadProperties {
            poll_max_ns: Some(0),
            aio_max_batch: Some(7),
            ..IothreadProperties::default()
        });
        assert_eq!((told.poll_max_ns, told.batch_max), (0, 7));
    }

    #[test]
    fn iothread_properties_have_qemus_limits() {
        let error = |properties| check(&properties).unwrap_err().desc;
        assert_eq!(
            error(IothreadProperties {
                poll_max_ns: Some(-1),
                ..IothreadProperties::default()
            }),
            "poll-max-ns value must be in range [0, 9223372036854775807]"
        );
        assert_eq!(
            error(IothreadProperties {
                poll_weight: Some(64),
                ..IothreadProperties::default()
            }),
            "poll-weight value must be in range [0, 63]"
        );
        for (min, max) in [
            (Some(65), None),
            (None, Some(0)),
            (None, Some(9_999_999_999)),
        ] {
            assert_eq!(
                error(IothreadProperties {
                    thread_pool_min: min,
                    thread_pool_max: max,
                    ..IothreadProperties::default()
                }),
                "bad thread-pool-min/thread-pool-max values"
            );
        }
    }
}
