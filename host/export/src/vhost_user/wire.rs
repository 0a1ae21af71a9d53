//! The messages of the vhost-user protocol: bytes to requests, replies to bytes.
//!
//! Pure; fuzzed. Names and numbers are those of the protocol's document ("Message specification");
//! the request numbers and feature bits come from the `vhost` crate. Invariant: what parses has
//! exactly the payload that its request has, and no more descriptors than it may carry.

use vhost::vhost_user::message::FrontendReq;

use super::limits::{PAYLOAD_MAX, REGIONS_PER_TABLE};

/// Bytes of a header.
pub(super) const HEADER: usize = 12;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Bit of the payload of kick, call and error: there is no descriptor.
const NO_FD: u64 = 1 << 8;

/// A header that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) request: u32,
    pub(super) need_reply: bool,
    pub(super) size: usize,
}

/// Why a stream of messages cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadHeader {
    #[error("a message of version {0}")]
    Version(u32),
    #[error("a reply to nothing")]
    Reply,
    #[error("a message of {0} bytes")]
    Size(u32),
}

impl Header {
    /// Check a header.
    ///
    /// # Errors
    /// Nothing that follows it could be understood.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Result<Self, BadHeader> {
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let (request, flags, size) = (word(0), word(4), word(8));
        if flags & VERSION_MASK != VERSION {
            return Err(BadHeader::Version(flags & VERSION_MASK));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(BadHeader::Reply);
        }
        match usize::try_from(size) {
            Ok(size) if size <= PAYLOAD_MAX => Ok(Self {
                request,
                need_reply: flags & FLAG_NEED_REPLY != 0,
                size,
            }),
            _ => Err(BadHeader::Size(size)),
        }
    }
}

/// A region of guest memory, as it travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RegionInfo {
    /// Guest physical address.
    pub(super) guest: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Address in the front-end.
    pub(super) user: u64,
    /// Where it begins in its file.
    pub(super) offset: u64,
}

/// Where the parts of a ring are, in the front-end's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RingAddress {
    pub(super) index: u32,
    /// Changes of the used ring are logged, from `log` on.
    pub(super) is_logged: bool,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    pub(super) log: u64,
}

/// An area of a file that is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Inflight {
    pub(super) size: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
}

/// A request of the front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionInfo>),
    SetLogBase {
        size: u64,
        offset: u64,
    },
    SetLogFd,
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr(RingAddress),
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    /// The second member tells whether there is a descriptor.
    SetVringKick(u8, bool),
    SetVringCall(u8, bool),
    SetVringErr(u8, bool),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        size: u32,
    },
    SetConfig {
        offset: u32,
        bytes: Vec<u8>,
    },
    GetInflightFd(Inflight),
    SetInflightFd(Inflight),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionInfo),
    RemMemReg(RegionInfo),
}

/// Why a message was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadMessage {
    #[error("unknown request {0}")]
    Unknown(u32),
    #[error("a payload that request {0} does not have")]
    Payload(u32),
    #[error("request {request} with {fds} descriptors")]
    Descriptors { request: u32, fds: usize },
}

/// Reads numbers off a payload; `None` past its end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u64(&mut self) -> Option<u64> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(u64::from_ne_bytes(*head))
    }

    fn u32(&mut self) -> Option<u32> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(u32::from_ne_bytes(*head))
    }

    fn u16(&mut self) -> Option<u16> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(u16::from_ne_bytes(*head))
    }

    fn region(&mut self) -> Option<RegionInfo> {
        Some(RegionInfo {
            guest: self.u64()?,
            size: self.u64()?,
            user: self.u64()?,
            offset: self.u64()?,
        })
    }

    fn table(&mut self) -> Option<Vec<RegionInfo>> {
        let count = usize::try_from(self.u32()?).ok()?;
        let _padding = self.u32()?;
        if count > REGIONS_PER_TABLE {
            return None;
        }
        (0..count).map(|_| self.region()).collect()
    }

    fn ring_address(&mut self) -> Option<RingAddress> {
        let index = self.u32()?;
        let flags = self.u32()?;
        Some(RingAddress {
            index,
            is_logged: flags & 1 != 0,
            descriptors: self.u64()?,
            used: self.u64()?,
            available: self.u64()?,
            log: self.u64()?,
        })
    }

    /// The structure is padded to eight bytes, and not everyone sends the padding.
    fn inflight(&mut self) -> Option<Inflight> {
        let inflight = Inflight {
            size: self.u64()?,
            offset: self.u64()?,
            queues: self.u16()?,
            queue_size: self.u16()?,
        };
        if !self.0.is_empty() {
            self.u32()?;
        }
        Some(inflight)
    }
}

/// Parse a payload. `fds` is the number of descriptors that came with it.
///
/// # Errors
/// It is not understood; the next message can be read all the same.
pub(super) fn parse(header: Header, payload: &[u8], fds: usize) -> Result<Request, BadMessage> {
    let bad = || BadMessage::Payload(header.request);
    let code = FrontendReq::try_from(header.request);
    let code = code.map_err(|_| BadMessage::Unknown(header.request))?;
    let mut fields = Fields(payload);
    let request = fields.request(code).ok_or_else(bad)?;
    let request = request.ok_or(BadMessage::Unknown(header.request))?;
    if !fields.0.is_empty() {
        return Err(bad());
    }
    let wanted = match &request {
        Request::SetMemTable(regions) => regions.len(),
        Request::SetVringKick(_, fd)
        | Request::SetVringCall(_, fd)
        | Request::SetVringErr(_, fd) => usize::from(*fd),
        Request::SetLogBase { .. }
        | Request::SetLogFd
        | Request::SetBackendReqFd
        | Request::SetInflightFd(_)
        | Request::AddMemReg(_) => 1,
        // Some front-ends send the descriptor along.
        Request::RemMemReg(_) => fds.min(1),
        _ => 0,
    };
    if fds != wanted {
        return Err(BadMessage::Descriptors {
            request: header.request,
            fds,
        });
    }
    Ok(request)
}

impl Fields<'_> {
    /// `None`: the payload is too short; `Some(None)`: not a request that is served.
    fn request(&mut self, code: FrontendReq) -> Option<Option<Request>> {
        use FrontendReq as Code;
        Some(Some(match code {
            Code::GET_FEATURES => Request::GetFeatures,
            Code::SET_FEATURES => Request::SetFeatures(self.u64()?),
            Code::SET_OWNER => Request::SetOwner,
            Code::RESET_OWNER => Request::ResetOwner,
            Code::SET_MEM_TABLE => Request::SetMemTable(self.table()?),
            Code::SET_LOG_BASE => Request::SetLogBase {
                size: self.u64()?,
                offset: self.u64()?,
            },
            Code::SET_LOG_FD => Request::SetLogFd,
            Code::SET_VRING_NUM => Request::SetVringNum {
                index: self.u32()?,
                num: self.u32()?,
            },
            Code::SET_VRING_ADDR => Request::SetVringAddr(self.ring_address()?),
            Code::SET_VRING_BASE => Request::SetVringBase {
                index: self.u32()?,
                base: self.u32()?,
            },
            Code::GET_VRING_BASE => {
                let index = self.u32()?;
                self.u32()?;
                Request::GetVringBase { index }
            }
            Code::SET_VRING_KICK => {
                let (index, fd) = self.ring_fd()?;
                Request::SetVringKick(index, fd)
            }
            Code::SET_VRING_CALL => {
                let (index, fd) = self.ring_fd()?;
                Request::SetVringCall(index, fd)
            }
            Code::SET_VRING_ERR => {
                let (index, fd) = self.ring_fd()?;
                Request::SetVringErr(index, fd)
            }
            Code::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
            Code::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(self.u64()?),
            Code::GET_QUEUE_NUM => Request::GetQueueNum,
            Code::SET_VRING_ENABLE => Request::SetVringEnable {
                index: self.u32()?,
                enable: match self.u32()? {
                    0 => false,
                    1 => true,
                    _ => return None,
                },
            },
            Code::SET_BACKEND_REQ_FD => Request::SetBackendReqFd,
            Code::GET_CONFIG => {
                let (offset, size) = (self.u32()?, self.u32()?);
                let _flags = self.u32()?;
                // The front-end sends as many bytes as it wants back.
                self.rest(size)?;
                Request::GetConfig { offset, size }
            }
            Code::SET_CONFIG => {
                let (offset, size) = (self.u32()?, self.u32()?);
                let _flags = self.u32()?;
                let bytes = self.rest(size)?.to_vec();
                Request::SetConfig { offset, bytes }
            }
            Code::GET_INFLIGHT_FD => Request::GetInflightFd(self.inflight()?),
            Code::SET_INFLIGHT_FD => Request::SetInflightFd(self.inflight()?),
            Code::RESET_DEVICE => Request::ResetDevice,
            Code::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
            Code::ADD_MEM_REG => {
                let _padding = self.u64()?;
                Request::AddMemReg(self.region()?)
            }
            Code::REM_MEM_REG => {
                let _padding = self.u64()?;
                Request::RemMemReg(self.region()?)
            }
            _ => return Some(None),
        }))
    }

    fn ring_fd(&mut self) -> Option<(u8, bool)> {
        let value = self.u64()?;
        let index = u8::try_from(value & !NO_FD).ok()?;
        Some((index, value & NO_FD == 0))
    }

    fn rest(&mut self, size: u32) -> Option<&[u8]> {
        let bytes = self.0;
        self.0 = &[];
        (bytes.len() == usize::try_from(size).ok()?).then_some(bytes)
    }
}

fn header(request: u32, flags: u32, size: usize) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&request.to_ne_bytes());
    bytes[4..8].copy_from_slice(&(VERSION | flags).to_ne_bytes());
    // A reply is never longer than the message that it answers.
    bytes[8..].copy_from_slice(&u32::try_from(size).unwrap_or(0).to_ne_bytes());
    bytes
}

/// A reply with this payload.
pub(super) fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(request, FLAG_REPLY, payload.len()).to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// A reply of one number.
pub(super) fn reply_u64(request: u32, value: u64) -> Vec<u8> {
    reply(request, &value.to_ne_bytes())
}

/// A message of ours without payload that wants no answer.
pub(super) fn notice(request: u32) -> [u8; HEADER] {
    header(request, 0, 0)
}

/// The payload that answers GET_CONFIG; empty `bytes` are an error.
pub(super) fn config_payload(offset: u32, size: u32, bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(12 + bytes.len());
    if bytes.is_empty() {
        return payload;
    }
    payload.extend_from_slice(&offset.to_ne_bytes());
    payload.extend_from_slice(&size.to_ne_bytes());
    payload.extend_from_slice(&0_u32.to_ne_bytes());
    payload.extend_from_slice(bytes);
    payload
}

/// The payload that answers GET_INFLIGHT_FD.
pub(super) fn inflight_payload(inflight: Inflight) -> Vec<u8> {
    let mut payload = Vec::with_capacity(24);
    payload.extend_from_slice(&inflight.size.to_ne_bytes());
    payload.extend_from_slice(&inflight.offset.to_ne_bytes());
    payload.extend_from_slice(&inflight.queues.to_ne_bytes());
    payload.extend_from_slice(&inflight.queue_size.to_ne_bytes());
    payload.extend_from_slice(&[0; 4]);
    payload
}

/// The payload that answers GET_VRING_BASE.
pub(super) fn base_payload(index: u32, base: u32) -> [u8; 8] {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&index.to_ne_bytes());
    payload[4..].copy_from_slice(&base.to_ne_bytes());
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: FrontendReq, payload: &[u8], fds: usize) -> Result<Request, BadMessage> {
        let bytes = header(request.into(), FLAG_NEED_REPLY, payload.len());
        let header = Header::parse(&bytes).unwrap();
        assert!(header.need_reply);
        parse(header, payload, fds)
    }

    #[test]
    fn headers_are_checked() {
        let bytes = |flags: u32, size: u32| {
            let mut bytes = header(1, 0, 0);
            bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
            bytes[8..].copy_from_slice(&size.to_ne_bytes());
            Header::parse(&bytes)
        };
        assert!(bytes(1, 4096).is_ok());
        assert_eq!(bytes(1, 4097), Err(BadHeader::Size(4097)));
        assert_eq!(bytes(0, 0), Err(BadHeader::Version(0)));
        assert_eq!(bytes(5, 0), Err(BadHeader::Reply));
    }

    #[test]
    fn a_payload_fits_its_request() {
        use FrontendReq as Code;
        let number = 7_u64.to_ne_bytes();
        assert_eq!(
            message(Code::SET_FEATURES, &number, 0),
            Ok(Request::SetFeatures(7))
        );
        for (code, payload, fds) in [
            (Code::SET_FEATURES, &number[..7], 0),
            (Code::GET_FEATURES, &number[..], 0),
            (Code::SET_FEATURES, &number[..], 1),
            (Code::SET_VRING_KICK, &number[..], 0),
            (Code::SET_MEM_TABLE, &[9, 0, 0, 0, 0, 0, 0, 0], 0),
            (Code::GET_CONFIG, &[0; 13], 0),
            (Code::NET_SET_MTU, &number[..], 0),
        ] {
            message(code, payload, fds).unwrap_err();
        }
        let no_fd = (NO_FD | 3).to_ne_bytes();
        assert_eq!(
            message(Code::SET_VRING_KICK, &no_fd, 0),
            Ok(Request::SetVringKick(3, false))
        );
    }
}
