//! Which requests are allowed, and what the others are told.

use super::*;
use crate::nbd::exports::{BlockSizes, ExportFlags};
use crate::nbd::haggle::testing::disk;
use crate::nbd::limits::SWALLOW_MAX;
use crate::nbd::wire::CommandFlags as F;
use outport_block::Errno;

const SIZE: u64 = 1 << 20;
const MIB: u64 = 1 << 20;
const NONE: F = F::empty();

fn session_of(mode: ReplyMode, export: ExportInfo) -> Session {
    let contexts = export.contexts[..2].to_vec();
    Session::new(mode, "a".to_owned(), export, contexts)
}

fn simple() -> Session {
    session_of(ReplyMode::Simple, disk("a"))
}

fn structured() -> Session {
    session_of(ReplyMode::Structured, disk("a"))
}

fn extended() -> Session {
    session_of(ReplyMode::Extended, disk("a"))
}

fn read_only() -> Session {
    let export = ExportInfo {
        flags: !ExportFlags::WRITABLE,
        ..disk("a")
    };
    session_of(ReplyMode::Structured, export)
}

fn request(command: Command, flags: F, offset: u64, length: u64) -> Request {
    Request {
        flags,
        command,
        cookie: 1,
        offset,
        length,
    }
}

/// The operation that a request comes to, or its error and the bytes swallowed.
fn check(
    session: &Session,
    command: Command,
    flags: F,
    offset: u64,
    length: u64,
) -> Result<Operation, (NbdErrno, u64)> {
    match session.check(&request(command, flags, offset, length), SIZE) {
        Ok(checked) => {
            assert_eq!((checked.offset, checked.length), (offset, length));
            let payload = if command == Command::WRITE { length } else { 0 };
            assert_eq!(checked.payload, payload);
            Ok(checked.operation)
        }
        Err(Reject::Answer {
            errno,
            swallow,
            text,
        }) => {
            assert!(!text.is_empty());
            Err((errno, swallow))
        }
        Err(Reject::Disconnect(_)) => panic!("disconnected"),
    }
}

#[test]
fn legal_requests_become_operations() {
    let session = structured();
    let ok =
        |command, flags, offset, length| check(&session, command, flags, offset, length).unwrap();
    assert_eq!(
        ok(Command::READ, NONE, 0, SIZE),
        Operation::Read { df: false }
    );
    assert_eq!(ok(Command::READ, F::DF, 1, 1), Operation::Read { df: true });
    assert_eq!(
        ok(Command::READ, NONE, SIZE, 0),
        Operation::Read { df: false }
    );
    assert_eq!(
        ok(Command::WRITE, F::FUA, 0, SIZE),
        Operation::Write { fua: true }
    );
    assert_eq!(ok(Command::FLUSH, NONE, 0, 0), Operation::Flush);
    assert_eq!(
        ok(Command::TRIM, F::FUA, 0, SIZE),
        Operation::Trim { fua: true }
    );
    assert_eq!(ok(Command::CACHE, NONE, 0, SIZE), Operation::Cache);
    assert_eq!(
        ok(
            Command::WRITE_ZEROES,
            F::FUA | F::NO_HOLE | F::FAST_ZERO,
            0,
            SIZE
        ),
        Operation::WriteZeroes {
            fua: true,
            no_hole: true,
            fast: true
        }
    );
    let contexts = ContextMask(3);
    assert_eq!(
        ok(Command::BLOCK_STATUS, F::REQ_ONE, 0, SIZE),
        Operation::BlockStatus {
            one: true,
            contexts
        }
    );
    assert_eq!(session.contexts_in(contexts).count(), 2);
}

#[test]
fn fua_is_tolerated_on_every_command() {
    let session = structured();
    for command in 0..8 {
        let length = if command == Command::FLUSH.0 { 0 } else { 512 };
        assert!(
            check_any(&session, Command(command), F::FUA, 0, length).is_ok(),
            "{command}"
        );
    }
}

fn check_any(s: &Session, c: Command, f: F, o: u64, l: u64) -> Result<Checked, Reject> {
    s.check(&request(c, f, o, l), SIZE)
}

/// Detail 2: a flag that this connection was not offered is EINVAL, and so is one that means
/// nothing for the command.
#[test]
fn flags_that_were_not_offered_are_einval() {
    let plain = ExportInfo {
        flags: ExportFlags::WRITABLE | ExportFlags::WRITE_ZEROES,
        ..disk("a")
    };
    let plain = session_of(ReplyMode::Structured, plain);
    for (session, command, flags) in [
        (&simple(), Command::READ, F::DF),
        (&plain, Command::WRITE_ZEROES, F::FAST_ZERO),
        (&structured(), Command::READ, F::NO_HOLE),
        (&structured(), Command::READ, F::REQ_ONE),
        (&structured(), Command::WRITE_ZEROES, F::DF),
        (&structured(), Command::TRIM, F::FAST_ZERO),
        (&structured(), Command::BLOCK_STATUS, F::DF),
        (&structured(), Command::BLOCK_STATUS, F::PAYLOAD_LEN),
        (&structured(), Command::READ, F::PAYLOAD_LEN),
        (&structured(), Command::READ, F::from_bits_retain(0x40)),
        (&structured(), Command::CACHE, F::from_bits_retain(0x8001)),
    ] {
        assert_eq!(
            check(session, command, flags, 0, 512),
            Err((NbdErrno::Inval, 0))
        );
    }
    // Detail 3: the payload is accounted for all the same.
    for flags in [
        F::DF,
        F::NO_HOLE,
        F::PAYLOAD_LEN,
        F::from_bits_retain(0x4000),
    ] {
        let refused = check(&structured(), Command::WRITE, flags, 0, 512);
        assert_eq!(refused, Err((NbdErrno::Inval, 512)));
    }
    let flush = check(&structured(), Command::FLUSH, F::REQ_ONE, 0, 0);
    assert_eq!(flush, Err((NbdErrno::Inval, 0)));
}

#[test]
fn unknown_and_unoffered_commands_are_einval() {
    let bare = session_of(
        ReplyMode::Structured,
        ExportInfo {
            flags: ExportFlags::WRITABLE,
            ..disk("a")
        },
    );
    for command in [Command::TRIM, Command::CACHE, Command::WRITE_ZEROES] {
        assert_eq!(
            check(&bare, command, NONE, 0, 512),
            Err((NbdErrno::Inval, 0))
        );
    }
    for command in [Command::RESIZE, Command(9), Command(u16::MAX)] {
        assert_eq!(
            check(&bare, command, NONE, 0, 512),
            Err((NbdErrno::Inval, 0))
        );
    }
}

/// Detail 5: ENOSPC, EINVAL or EPERM by command.
#[test]
fn past_the_end_is_enospc_for_writes_and_einval_for_the_rest() {
    let session = structured();
    for (offset, length) in [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE + 1, 0),
        (u64::MAX, 512),
        (1, SIZE),
    ] {
        let err = |command| check(&session, command, NONE, offset, length).unwrap_err();
        assert_eq!(err(Command::WRITE), (NbdErrno::NoSpc, length));
        assert_eq!(err(Command::WRITE_ZEROES), (NbdErrno::NoSpc, 0));
        for command in [
            Command::READ,
            Command::TRIM,
            Command::CACHE,
            Command::BLOCK_STATUS,
        ] {
            assert_eq!(err(command), (NbdErrno::Inval, 0));
        }
    }
}

#[test]
fn an_export_that_shrank_is_checked_at_its_size_of_now() {
    let read = request(Command::READ, NONE, 4096, 512);
    assert!(structured().check(&read, SIZE).is_ok());
    assert!(structured().check(&read, 4096).is_err());
}

#[test]
fn writing_to_a_read_only_export_is_eperm_and_stays_in_sync() {
    let session = read_only();
    assert_eq!(
        check(&session, Command::WRITE, NONE, 0, 512),
        Err((NbdErrno::Perm, 512))
    );
    assert_eq!(
        check(&session, Command::TRIM, NONE, 0, 512),
        Err((NbdErrno::Perm, 0))
    );
    assert_eq!(
        check(&session, Command::WRITE_ZEROES, NONE, 0, 512),
        Err((NbdErrno::Perm, 0))
    );
    assert_eq!(
        check(&session, Command::FLUSH, NONE, 0, 0),
        Ok(Operation::Flush)
    );
    assert_eq!(
        check(&session, Command::CACHE, NONE, 0, 512),
        Ok(Operation::Cache)
    );
}

/// Detail 3, and QSD's flaw: a WRITE of more than 32 MiB dropped the connection.
#[test]
fn a_large_write_is_answered_and_only_an_absurd_one_disconnects() {
    let size = 1 << 40;
    let session = structured();
    let write = |length| session.check(&request(Command::WRITE, NONE, 0, length), size);
    assert_eq!(write(32 * MIB).unwrap().payload, 32 * MIB);
    for length in [32 * MIB + 1, SWALLOW_MAX] {
        let Err(Reject::Answer { errno, swallow, .. }) = write(length) else {
            panic!()
        };
        assert_eq!((errno, swallow), (NbdErrno::Inval, length));
    }
    assert_eq!(
        write(SWALLOW_MAX + 1),
        Err(Reject::Disconnect(SWALLOW_MAX + 1))
    );
    assert_eq!(
        write(u32::MAX.into()),
        Err(Reject::Disconnect(u32::MAX.into()))
    );
}

#[test]
fn payloads_of_32_mib_are_accepted_whatever_the_export_prefers() {
    let block_sizes = BlockSizes {
        payload_max: 4096,
        ..BlockSizes::default()
    };
    let session = session_of(
        ReplyMode::Simple,
        ExportInfo {
            block_sizes,
            ..disk("a")
        },
    );
    let write = request(Command::WRITE, NONE, 0, 32 * MIB);
    assert!(session.check(&write, 1 << 40).is_ok());
}

#[test]
fn a_read_beyond_the_maximum_is_refused_not_allocated() {
    let session = structured();
    let read =
        |flags, length| match session.check(&request(Command::READ, flags, 0, length), 1 << 40) {
            Err(Reject::Answer {
                errno, swallow: 0, ..
            }) => errno,
            other => panic!("{other:?}"),
        };
    assert_eq!(read(NONE, 32 * MIB + 1), NbdErrno::Inval);
    assert_eq!(read(NONE, 4_294_966_784), NbdErrno::Inval);
    assert_eq!(read(F::DF, 32 * MIB + 1), NbdErrno::Overflow);
    assert!(
        session
            .check(&request(Command::READ, F::DF, 0, 65_536), SIZE)
            .is_ok()
    );
}

/// Detail 2: a request that a client can send is answered, never asserted away.
#[test]
fn every_header_has_an_answer() {
    let edges = [
        0,
        1,
        SIZE,
        32 * MIB + 1,
        u64::from(u32::MAX),
        1 << 63,
        u64::MAX,
    ];
    for session in [simple(), structured(), read_only(), extended()] {
        for command in 0..=9 {
            for bits in (0..=127).chain([0x8000, u16::MAX]) {
                for offset in edges {
                    for length in edges {
                        let flags = F::from_bits_retain(bits);
                        if let Ok(checked) =
                            check_any(&session, Command(command), flags, offset, length)
                        {
                            let ranged = command != Command::DISC.0;
                            assert!(!ranged || checked.length <= SIZE.saturating_sub(offset));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn ranges_of_nothing_succeed_except_for_status() {
    let session = structured();
    for command in [
        Command::READ,
        Command::WRITE,
        Command::TRIM,
        Command::WRITE_ZEROES,
    ] {
        assert!(check(&session, command, NONE, 0, 0).is_ok());
        assert!(check(&session, command, NONE, SIZE, 0).is_ok());
    }
    assert_eq!(
        check(&session, Command::BLOCK_STATUS, NONE, 0, 0),
        Err((NbdErrno::Inval, 0))
    );
}

#[test]
fn flush_takes_no_range() {
    for (offset, length) in [(1, 0), (0, 1)] {
        let flush = check(&structured(), Command::FLUSH, NONE, offset, length);
        assert_eq!(flush, Err((NbdErrno::Inval, 0)));
    }
}

#[test]
fn a_client_may_always_leave() {
    for session in [simple(), structured(), read_only(), extended()] {
        let disc = check_any(&session, Command::DISC, F::all(), u64::MAX, u64::MAX).unwrap();
        assert_eq!((disc.operation, disc.payload), (Operation::Disconnect, 0));
    }
}

#[test]
fn block_status_needs_contexts() {
    let session = Session::new(ReplyMode::Structured, String::new(), disk("a"), Vec::new());
    assert_eq!(
        check(&session, Command::BLOCK_STATUS, NONE, 0, 512),
        Err((NbdErrno::Inval, 0))
    );
    assert_eq!(
        check(&simple(), Command::BLOCK_STATUS, NONE, 0, 512),
        Err((NbdErrno::Inval, 0))
    );
}

#[test]
fn alignment_is_enforced_only_where_the_export_insists() {
    assert!(check(&structured(), Command::READ, NONE, 1, 1).is_ok());
    let export = ExportInfo {
        block_size_required: true,
        ..disk("a")
    };
    let session = session_of(ReplyMode::Structured, export);
    for (offset, length) in [(1, 512), (512, 1), (256, 256)] {
        assert_eq!(
            check(&session, Command::READ, NONE, offset, length),
            Err((NbdErrno::Inval, 0))
        );
        let write = check(&session, Command::WRITE, NONE, offset, length);
        assert_eq!(write, Err((NbdErrno::Inval, length)));
    }
    assert!(check(&session, Command::READ, NONE, 512, 1024).is_ok());
}

// === Extended headers ===

/// Detail 8.
#[test]
fn extended_requests_have_64_bit_effects() {
    let session = extended();
    assert_eq!(session.header_len(), 32);
    let zero = request(Command::WRITE_ZEROES, NONE, 0, 5 << 32);
    assert_eq!(session.parse(&zero.to_extended()), Ok(Some(zero)));
    assert_eq!(session.check(&zero, 1 << 40).unwrap().length, 5 << 32);
    assert!(session.parse(&zero.to_extended()[..31]).unwrap().is_none());
    assert!(session.parse(&[0; 32]).is_err());
}

#[test]
fn an_unexpected_payload_is_swallowed() {
    for command in [
        Command::READ,
        Command::TRIM,
        Command::FLUSH,
        Command::RESIZE,
        Command(77),
    ] {
        let refused = check(&extended(), command, F::PAYLOAD_LEN, 0, 4096);
        assert_eq!(refused, Err((NbdErrno::Inval, 4096)));
    }
    let too_much = check_any(&extended(), Command::READ, F::PAYLOAD_LEN, 0, 32 * MIB + 1);
    assert_eq!(too_much, Err(Reject::Disconnect(32 * MIB + 1)));
    // Without extended headers the flag says nothing about payload.
    assert_eq!(
        check(&structured(), Command::READ, F::PAYLOAD_LEN, 0, 4096),
        Err((NbdErrno::Inval, 0))
    );
}

#[test]
fn an_extended_write_has_its_payload_with_and_without_the_flag() {
    for flags in [NONE, F::PAYLOAD_LEN] {
        let write = check_any(&extended(), Command::WRITE, flags, 0, 512).unwrap();
        assert_eq!(write.payload, 512);
    }
}

#[test]
fn a_status_payload_picks_contexts_and_range() {
    let session = extended();
    let status = request(Command::BLOCK_STATUS, F::PAYLOAD_LEN | F::REQ_ONE, 512, 12);
    let checked = session.check(&status, SIZE).unwrap();
    assert_eq!(checked.operation, Operation::FilteredStatus { one: true });
    assert_eq!(checked.payload, 12);
    let payload = b"\0\0\0\0\0\0\x10\0\0\0\0\x01";
    let checked = session
        .check_status_payload(&status, payload, SIZE)
        .unwrap();
    assert_eq!(
        (checked.offset, checked.length, checked.payload),
        (512, 4096, 0)
    );
    let contexts = ContextMask(2);
    assert_eq!(
        checked.operation,
        Operation::BlockStatus {
            one: true,
            contexts
        }
    );
    let names: Vec<&str> = session
        .contexts_in(contexts)
        .map(|c| c.name.as_str())
        .collect();
    assert_eq!(names, ["qemu:allocation-depth"]);
}

#[test]
fn a_malformed_status_payload_is_einval() {
    let session = extended();
    for length in [0, 8, 11, 13, 20] {
        let refused = check(&session, Command::BLOCK_STATUS, F::PAYLOAD_LEN, 0, length);
        assert_eq!(refused, Err((NbdErrno::Inval, length)));
    }
    let status = request(Command::BLOCK_STATUS, F::PAYLOAD_LEN, 0, 12);
    for payload in [
        &b""[..],
        b"\0\0\0\0\0\0\x10\0",
        b"\0\0\0\0\0\0\x10\0\0\0\0\x02",
        b"\0\0\0\0\0\0\x10\0\0\0\0\x01\0",
        b"\0\0\0\0\0\0\0\0\0\0\0\x01",
        b"\0\0\0\0\0\x10\0\x01\0\0\0\x01",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\x01",
    ] {
        let Err(Reject::Answer { errno, swallow, .. }) =
            session.check_status_payload(&status, payload, SIZE)
        else {
            panic!("accepted {payload:?}")
        };
        assert_eq!((errno, swallow), (NbdErrno::Inval, 0));
    }
}

// === Errors of the block layer ===

#[test]
fn enotsup_and_eoverflow_exist_only_where_the_protocol_has_them() {
    let zeroes = |fast| Operation::WriteZeroes {
        fua: false,
        no_hole: false,
        fast,
    };
    assert_eq!(zeroes(true).wire_errno(Errno::NotSup), NbdErrno::NotSup);
    assert_eq!(zeroes(true).wire_errno(Errno::Overflow), NbdErrno::NotSup);
    assert_eq!(zeroes(false).wire_errno(Errno::NotSup), NbdErrno::Inval);
    assert_eq!(
        zeroes(false).wire_errno(Errno::Overflow),
        NbdErrno::Overflow
    );
    assert_eq!(
        Operation::Read { df: true }.wire_errno(Errno::Overflow),
        NbdErrno::Overflow
    );
    assert_eq!(
        Operation::Read { df: false }.wire_errno(Errno::Overflow),
        NbdErrno::Inval
    );
    assert_eq!(
        Operation::Write { fua: false }.wire_errno(Errno::FBig),
        NbdErrno::NoSpc
    );
    assert_eq!(Operation::Flush.wire_errno(Errno::NotSup), NbdErrno::Inval);
}
