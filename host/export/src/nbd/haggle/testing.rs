//! Test doubles shared by the tests of the protocol core.

use super::{Config, Disconnect, Haggle, Step};
use crate::nbd::exports::{BlockSizes, ContextInfo, ExportFlags, ExportInfo, Exports};
use crate::nbd::session::Session;

/// A deterministic source of noise (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A number near one of the edges that matter.
    pub(crate) fn edge(&mut self) -> u64 {
        let edges = [
            0,
            512,
            4096,
            1 << 20,
            1 << 25,
            1 << 28,
            1 << 32,
            1 << 63,
            u64::MAX,
        ];
        let edge: u64 = edges[self.below(edges.len())];
        let near = self.below(5) as u64;
        if self.below(2) == 0 {
            edge.saturating_sub(near)
        } else {
            edge.saturating_add(near)
        }
    }
}

/// One option as a client sends it.
pub(crate) fn option(id: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [b"IHAVEOPT", &id.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

/// A string behind its length.
pub(crate) fn counted(text: &str) -> Vec<u8> {
    [
        &u32::try_from(text.len()).unwrap().to_be_bytes()[..],
        text.as_bytes(),
    ]
    .concat()
}

/// The data of INFO and GO.
pub(crate) fn info(name: &str, ids: &[u16]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend_from_slice(&u16::try_from(ids.len()).unwrap().to_be_bytes());
    data.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query)));
    data
}

/// The export that most tests use.
pub(crate) fn disk(name: &str) -> ExportInfo {
    let contexts = [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:b0",
    ];
    ExportInfo {
        name: name.to_owned(),
        description: format!("the disk {name}"),
        size: 1 << 20,
        flags: ExportFlags::all(),
        block_sizes: BlockSizes {
            minimum: 512,
            ..BlockSizes::default()
        },
        contexts: (0u32..)
            .zip(contexts)
            .map(|(id, name)| ContextInfo {
                name: name.to_owned(),
                id,
                wide: false,
            })
            .collect(),
        ..ExportInfo::default()
    }
}

/// Exports `a` (also the default), `b`, `secret` (TLS only) and `blocky` (block size required).
pub(crate) struct Disks;

impl Exports for Disks {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        match name {
            "" | "a" => Some(disk("a")),
            "b" => Some(disk("b")),
            "secret" => Some(ExportInfo {
                tls_only: true,
                ..disk("secret")
            }),
            "blocky" => Some(ExportInfo {
                block_size_required: true,
                ..disk("blocky")
            }),
            _ => None,
        }
    }

    fn list(&self, visit: &mut dyn FnMut(&ExportInfo)) {
        for name in ["a", "b", "secret"] {
            visit(&self.find(name).unwrap());
        }
    }
}

/// One reply to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) option: u32,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// Cuts a stream of option replies.
pub(crate) fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    while !bytes.is_empty() {
        assert_eq!(bytes[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        let end = 20 + word(&bytes[16..20]) as usize;
        let (option, kind) = (word(&bytes[8..12]), word(&bytes[12..16]));
        replies.push(Reply {
            option,
            kind,
            data: bytes[20..end].to_vec(),
        });
        bytes = &bytes[end..];
    }
    replies
}

/// A client whose server is a [`Haggle`] over [`Disks`].
pub(crate) struct Client {
    pub(crate) haggle: Haggle,
    /// Everything that the server sent and the test did not look at yet.
    pub(crate) received: Vec<u8>,
    pub(crate) end: Option<Result<Box<Session>, Disconnect>>,
    pub(crate) wants_tls: bool,
}

impl Client {
    /// A connection on which no byte has been sent yet.
    pub(crate) fn connect(config: Config) -> Client {
        let haggle = Haggle::new(config);
        Client {
            haggle,
            received: Vec::new(),
            end: None,
            wants_tls: false,
        }
    }

    /// A client that greeted back, with fixed newstyle and without zeroes.
    pub(crate) fn greeted(config: Config) -> Client {
        let mut client = Client::connect(config);
        assert_eq!(client.send(&[0, 0, 0, 3]), 4);
        client.received.clear();
        client
    }

    /// Sends bytes; answers how many the handshake consumed.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> usize {
        let mut used = 0;
        loop {
            let (consumed, step) = self.haggle.drive(&bytes[used..], &Disks);
            used += consumed;
            match step {
                Step::NeedInput => break,
                Step::Send => self.received.extend(self.haggle.take_output()),
                Step::StartTls => {
                    self.wants_tls = true;
                    break;
                }
                Step::Enter(session) => {
                    self.end = Some(Ok(session));
                    break;
                }
                Step::Disconnect(reason) => {
                    self.end = Some(Err(reason));
                    break;
                }
                Step::LookUp { .. } | Step::List => unreachable!(),
            }
        }
        used
    }

    /// Sends an option and returns the replies to it.
    pub(crate) fn ask(&mut self, id: u32, data: &[u8]) -> Vec<Reply> {
        self.send(&option(id, data));
        let replies = replies(&std::mem::take(&mut self.received));
        assert!(replies.iter().all(|reply| reply.option == id));
        replies
    }

    /// Sends an option and returns the types of the replies to it.
    pub(crate) fn kinds(&mut self, id: u32, data: &[u8]) -> Vec<u32> {
        self.ask(id, data).iter().map(|reply| reply.kind).collect()
    }

    pub(crate) fn entered(self) -> Session {
        *self.end.unwrap().unwrap()
    }

    pub(crate) fn left(&self) -> Disconnect {
        match &self.end {
            Some(Err(reason)) => *reason,
            other => panic!("not disconnected: {other:?}"),
        }
    }
}
