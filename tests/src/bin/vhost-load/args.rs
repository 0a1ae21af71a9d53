//! The command line of `vhost-load`.

use std::path::PathBuf;
use std::time::Duration;

use outport_tests::load::{bytes, seconds};

/// What `--help` prints.
pub(crate) const USAGE: &str = "\
vhost-load: a load generator and verifier for vhost-user-blk

  vhost-load --unix PATH [options]

  --op OP          read | write | verify                 (default read)
  --order ORDER    random | sequential                   (default random)
  --bs BYTES       block size, with suffix k or M        (default 4k)
  --qd N           requests in flight per queue          (default 32)
  --queues N       queues, each with a thread            (default 1)
  --size BYTES     part of the disk to touch             (default: all of it)
  --seconds S      measured time                         (default 2)
  --ramp S         unmeasured time before it             (default 0.2)
  --pid PID        server process: adds its CPU time per operation
  --poll           look for completions instead of waiting for calls
  --packed         packed rings
  --no-event-idx   do not negotiate EVENT_IDX
  --seed N         of offsets and payload                (default 1)

Prints one JSON object.";

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    /// Write all blocks in random order, then read them back.
    Verify,
}

/// Everything that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Args {
    pub(crate) socket: PathBuf,
    pub(crate) op: Op,
    pub(crate) sequential: bool,
    pub(crate) block_size: usize,
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    pub(crate) size: Option<u64>,
    pub(crate) measured: Duration,
    pub(crate) ramp: Duration,
    pub(crate) pid: Option<i32>,
    pub(crate) poll: bool,
    pub(crate) packed: bool,
    pub(crate) event_idx: bool,
    pub(crate) seed: u64,
}

impl Args {
    /// Reads the command line.
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut args = Self {
            socket: PathBuf::new(),
            op: Op::Read,
            sequential: false,
            block_size: 4096,
            depth: 32,
            queues: 1,
            size: None,
            measured: Duration::from_secs(2),
            ramp: Duration::from_millis(200),
            pid: None,
            poll: false,
            packed: false,
            event_idx: true,
            seed: 1,
        };
        while let Some(word) = words.next() {
            match word.as_str() {
                "--poll" => args.poll = true,
                "--packed" => args.packed = true,
                "--no-event-idx" => args.event_idx = false,
                "--help" | "-h" => return Err(USAGE.into()),
                _ => {
                    let value = words.next().ok_or(format!("{word} needs a value"))?;
                    args.set(&word, &value)
                        .map_err(|why| format!("{word} {value}: {why}"))?;
                }
            }
        }
        if args.socket.as_os_str().is_empty() {
            return Err("say where the export is: --unix PATH".into());
        }
        Ok(args)
    }

    fn set(&mut self, word: &str, value: &str) -> Result<(), String> {
        match word {
            "--unix" => self.socket = value.into(),
            "--op" => {
                self.op = match value {
                    "read" => Op::Read,
                    "write" => Op::Write,
                    "verify" => Op::Verify,
                    _ => return Err("no such operation".into()),
                }
            }
            "--order" => self.sequential = value == "sequential",
            "--bs" => self.block_size = bytes(value)? as usize,
            "--qd" => self.depth = (bytes(value)? as usize).clamp(1, 1024),
            "--queues" => self.queues = (bytes(value)? as usize).max(1),
            "--size" => self.size = Some(bytes(value)?),
            "--seconds" => self.measured = seconds(value)?,
            "--ramp" => self.ramp = seconds(value)?,
            "--pid" => self.pid = Some(value.parse().map_err(|_| "not a process id")?),
            "--seed" => self.seed = bytes(value)?,
            _ => return Err("no such option".into()),
        }
        Ok(())
    }
}
