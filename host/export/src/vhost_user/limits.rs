//! What a front-end may make us hold.

/// `num-queues` if nobody says otherwise, as QEMU's.
pub const QUEUES_DEFAULT: u16 = 1;

/// A message names its queue in eight bits.
pub(super) const QUEUES_REACHABLE: u16 = 256;

/// The largest ring that the virtio specification allows.
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// Payload of one message: the longest of them is a table of [`REGIONS_PER_TABLE`].
pub(super) const PAYLOAD_MAX: usize = 4096;

/// Regions, and so descriptors, of one message: the document names 8, front-ends send up to 32.
pub(super) const REGIONS_PER_TABLE: usize = 32;

/// Regions altogether: what the protocol's document calls the limit of x86 machines.
pub(super) const REGIONS_MAX: usize = 509;

/// Segments of one request that guests are told of: QEMU's, for queues of 128.
pub(super) const SEGMENTS_MAX: u32 = 126;

/// Descriptors of one chain, indirect ones included: a guest that ignores the limit above may
/// still ask for more. As many vectors as the kernel takes.
pub(super) const CHAIN_MAX: usize = 1024;

/// Requests of one data thread that wait for something. More are left in their rings.
pub(super) const IN_FLIGHT_MAX: usize = 4096;

/// Bytes of their payloads, as for an NBD client. Many requests may name the same guest memory,
/// and whatever cannot transfer to and from it holds as much of ours. The last one goes beyond.
pub(super) const IN_FLIGHT_BYTES_MAX: u64 = 64 << 20;

/// Bytes of one read or write: nothing larger is transferred by one call of the kernel.
pub(super) const REQUEST_BYTES_MAX: u64 = 1 << 30;

/// Segments of one discard or write-zeroes request.
pub(super) const DISCARD_SEGMENTS_MAX: u32 = 64;

/// Sectors of one segment of those: 2 GiB, so that a guest trims a large disk in few requests and
/// none of them keeps a worker for long.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;

/// Bytes of the log of dirty pages: a guest of 8 TiB.
pub(super) const LOG_BYTES_MAX: u64 = 256 << 20;

/// Bytes of an inflight region: 256 queues of the largest size, packed.
pub(super) const INFLIGHT_BYTES_MAX: u64 = 512 << 20;
