//! What went wrong in a call, in words.
//!
//! Pure, apart from asking the store's state which limit was hit. A fault's
//! message holds what the plugin logged last and the innermost functions of the
//! trap, and nothing from the image that the plugin did not say itself.

use std::fmt::Write as _;

use outport_block::Errno;
use outport_block::format::{Fault, FaultKind, FormatError};
use wasmtime::{Trap, WasmBacktrace};

use crate::bindings::Malformed;
use crate::limits::{MESSAGE_BYTES_MAX, sentence};
use crate::store::HostState;

/// Functions named in a fault's message.
const FRAMES_MAX: usize = 4;

/// Frames that are looked at for them.
const FRAMES_SEEN: usize = 24;

/// The failure of `call` ("resolve", "instantiate", ...).
pub(crate) fn failed(call: &str, error: &wasmtime::Error, state: &HostState) -> FormatError {
    let of_the_host = |e: &(dyn std::error::Error + 'static)| {
        e.is::<std::io::Error>() || e.is::<rustix::io::Errno>() || e.is::<wasmtime::OutOfMemory>()
    };
    if state.limiter.refused.is_none() && error.chain().any(of_the_host) {
        // No memory for a stack or an instance: nothing that the plugin did.
        let message = format!("The host cannot run the plugin ({call}): {}", root(error));
        return FormatError::Refused {
            code: Errno::NoMem,
            message,
        };
    }
    FormatError::Fault(classify(call, error, state))
}

fn classify(call: &str, error: &wasmtime::Error, state: &HostState) -> Fault {
    let trap = error.downcast_ref::<Trap>();
    let (kind, mut message) = if state.call.deadline_hit {
        (
            FaultKind::Deadline,
            format!("{call} ran longer than call-time-max-ms allows"),
        )
    } else if let Some(limit) = state.limiter.refused {
        (
            FaultKind::Memory,
            format!("{call} needs more memory than {limit} allows"),
        )
    } else if let Some(trap) = trap {
        (FaultKind::Trap, format!("{call} trapped: {trap}"))
    } else {
        // Not a trap: the canonical ABI refused what the plugin handed over.
        (FaultKind::BadAnswer, format!("{call}: {}", root(error)))
    };
    if let Some(said) = &state.call.last_error {
        let _ = write!(message, ". The plugin said: {said}");
    }
    if let Some(trace) = error.downcast_ref::<WasmBacktrace>() {
        functions(trace, &mut message);
    }
    Fault {
        kind,
        message: sentence(message, 2 * MESSAGE_BYTES_MAX),
    }
}

/// The answer of `call` is outside the contract.
pub(crate) fn malformed(call: &str, what: Malformed) -> FormatError {
    let message = sentence(format!("{call}: {}", what.message), MESSAGE_BYTES_MAX);
    FormatError::Fault(Fault {
        kind: what.kind,
        message,
    })
}

fn root(error: &wasmtime::Error) -> String {
    error.root_cause().to_string()
}

/// " [in a < b < c]": innermost first, without the panic machinery.
fn functions(trace: &WasmBacktrace, message: &mut String) {
    let names = trace.frames().iter().take(FRAMES_SEEN).filter_map(|frame| {
        let name = format!("{:#}", rustc_demangle::demangle(frame.func_name()?));
        let machinery = [
            "core::panicking",
            "std::panicking",
            "rust_panic",
            "__rust",
            "abort",
        ];
        let dull = machinery.iter().any(|m| name.contains(m));
        (!dull).then_some(name)
    });
    let mut sep = " [in ";
    for name in names.take(FRAMES_MAX) {
        let _ = write!(message, "{sep}{name}");
        sep = " < ";
    }
    if sep == " < " {
        message.push(']');
    }
}
