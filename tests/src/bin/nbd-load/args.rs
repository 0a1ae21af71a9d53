//! The command line of `nbd-load`.

use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::time::Duration;

use outport_tests::load::{bytes, seconds};
use outport_tests::nbd::Address;
use outport_tests::nbd::wire::cmd;

/// What `--help` prints.
pub(crate) const USAGE: &str = "\
nbd-load: a load generator that leaves the NBD server as the bottleneck

  nbd-load (--unix PATH | --tcp HOST:PORT) [options]

  --tls-ca FILE         use TLS; the server is localhost of this authority (one connection)
  --export NAME         export to open (default: the empty name)
  --op OP               read | write | zero | trim | flush         (default read)
  --order ORDER         random | sequential | once                 (default random)
                        once: every block one time, shuffled; ends with the last one
  --bs BYTES            block size, with suffix k or M             (default 4k)
  --stride BYTES        distance between blocks                    (default: block size)
  --qd N                requests in flight per connection          (default 32)
  --connections N       connections                                (default 1)
  --threads N           client threads they are spread over        (default 1)
  --offset/--size BYTES part of the export to touch                (default: all of it)
  --seconds S           measured time                              (default 2)
  --ramp S              unmeasured time before it                  (default 0.2)
  --pid PID             server process: adds its CPU time per operation
  --recv-buffer BYTES   receive buffer of each connection          (default 256k)
  --simple              do not ask for structured replies
  --final-flush         send FLUSH at the end and tell how long it took
  --seed N              of offsets and payload                     (default 1)

Prints one JSON object.";

/// In which order blocks are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Uniform, with repetition.
    Random,
    /// Each connection walks its own part of the range, round and round.
    Sequential,
    /// Every block once, shuffled.
    Once,
}

/// Everything that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Args {
    pub(crate) address: Address,
    /// PEM of the authority; `None`: no TLS.
    pub(crate) authority: Option<Vec<u8>>,
    pub(crate) export: String,
    pub(crate) op: u16,
    pub(crate) order: Order,
    pub(crate) block_size: u32,
    pub(crate) stride: u64,
    pub(crate) depth: usize,
    pub(crate) connections: usize,
    pub(crate) threads: usize,
    pub(crate) offset: u64,
    pub(crate) size: Option<u64>,
    pub(crate) measured: Duration,
    pub(crate) ramp: Duration,
    pub(crate) pid: Option<i32>,
    pub(crate) recv_buffer: usize,
    pub(crate) simple: bool,
    pub(crate) final_flush: bool,
    pub(crate) seed: u64,
}

impl Args {
    /// Reads the command line.
    pub(crate) fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut args = Self {
            address: Address::Unix(PathBuf::new()),
            authority: None,
            export: String::new(),
            op: cmd::READ,
            order: Order::Random,
            block_size: 4096,
            stride: 0,
            depth: 32,
            connections: 1,
            threads: 1,
            offset: 0,
            size: None,
            measured: Duration::from_secs(2),
            ramp: Duration::from_millis(200),
            pid: None,
            recv_buffer: 256 << 10,
            simple: false,
            final_flush: false,
            seed: 1,
        };
        let mut words = words.peekable();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--simple" => args.simple = true,
                "--final-flush" => args.final_flush = true,
                "--help" | "-h" => return Err(USAGE.into()),
                _ => {
                    let value = words.next().ok_or(format!("{word} needs a value"))?;
                    args.set(&word, &value)
                        .map_err(|why| format!("{word} {value}: {why}"))?;
                }
            }
        }
        if args.address == Address::Unix(PathBuf::new()) {
            return Err("say where the server is: --unix PATH or --tcp HOST:PORT".into());
        }
        args.stride = args.stride.max(u64::from(args.block_size));
        args.threads = args.threads.clamp(1, args.connections);
        if args.order == Order::Once {
            args.ramp = Duration::ZERO;
        }
        Ok(args)
    }

    fn set(&mut self, word: &str, value: &str) -> Result<(), String> {
        match word {
            "--unix" => self.address = Address::Unix(value.into()),
            "--tcp" => {
                let found = value
                    .to_socket_addrs()
                    .map_err(|why| why.to_string())?
                    .next();
                self.address = Address::Tcp(found.ok_or("no such host")?);
            }
            "--tls-ca" => {
                let read = std::fs::read(value);
                self.authority = Some(read.map_err(|why| why.to_string())?);
            }
            "--export" => self.export = value.into(),
            "--op" => self.op = command(value)?,
            "--order" => self.order = order(value)?,
            "--bs" => self.block_size = bytes(value)? as u32,
            "--stride" => self.stride = bytes(value)?,
            "--qd" => self.depth = count(value)?,
            "--connections" => self.connections = count(value)?,
            "--threads" => self.threads = count(value)?,
            "--offset" => self.offset = bytes(value)?,
            "--size" => self.size = Some(bytes(value)?),
            "--seconds" => self.measured = seconds(value)?,
            "--ramp" => self.ramp = seconds(value)?,
            "--pid" => self.pid = Some(value.parse().map_err(|_| "not a process id")?),
            "--recv-buffer" => self.recv_buffer = bytes(value)?.max(4096) as usize,
            "--seed" => self.seed = bytes(value)?,
            _ => return Err("no such option".into()),
        }
        Ok(())
    }
}

fn command(value: &str) -> Result<u16, String> {
    Ok(match value {
        "read" => cmd::READ,
        "write" => cmd::WRITE,
        "zero" => cmd::WRITE_ZEROES,
        "trim" => cmd::TRIM,
        "flush" => cmd::FLUSH,
        _ => return Err("no such operation".into()),
    })
}

fn order(value: &str) -> Result<Order, String> {
    Ok(match value {
        "random" => Order::Random,
        "sequential" => Order::Sequential,
        "once" => Order::Once,
        _ => return Err("no such order".into()),
    })
}

fn count(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("not a positive number".into()),
    }
}
