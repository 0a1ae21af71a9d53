//! What one client may ask for: every bound of the protocol core, with its reason.
//!
//! Time and the number of connections are bounded by the I/O loop, which has the clock and the
//! listeners. Invariant: nothing a peer declares is allocated before it was held against these.

/// Data of one option that is buffered. The largest legitimate one names an export (4096 bytes)
/// and asks for a few contexts; a client with more gets `NBD_REP_ERR_TOO_BIG`.
pub const OPTION_DATA_MAX: u32 = 64 * 1024;

/// Option data that is read and thrown away in one handshake, unknown options included. The
/// protocol asks to skip what is not understood, but lets a server hang up on a denial of
/// service: no client needs more haggling than one default payload.
pub const SKIPPED_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// Options in one handshake. `qemu-nbd --list` asks two or three per export, so this leaves room
/// to list a thousand exports; the handshake's time limit is the tighter bound for most.
pub const OPTIONS_MAX: u32 = 4096;

/// Queries in one context option. Every query walks the export's contexts, and nobody has reason
/// to send more queries than contexts can be selected, several times over.
pub const QUERIES_MAX: usize = 128;

/// Contexts that one connection may select. Each costs a chunk in every status reply, and the
/// set has to fit a [`crate::nbd::session::ContextMask`].
pub const CONTEXTS_MAX: usize = 64;

/// Payload that every client may send or ask for: the protocol's default, below which a request
/// is never to be treated as an attack.
pub const PAYLOAD_DEFAULT: u32 = 32 * 1024 * 1024;

/// Payload of a refused request that is read and thrown away to stay in sync. Eight times the
/// default: a client that ignores the advertised maximum is answered, one that declares
/// gigabytes is cut off.
pub const SWALLOW_MAX: u64 = 256 * 1024 * 1024;

/// Extents in one status reply, over all its contexts: the protocol's advice per chunk, and at
/// 8 or 16 bytes each what one request may hold in memory.
pub const EXTENTS_MAX: usize = 1 << 20;

/// What a 32-bit extent is cut to when it is longer: the last multiple of the largest minimum
/// block size that fits.
pub const EXTENT_CLAMP: u64 = 0xffff_0000;
