//! The models: small programs around production code, run in every order that the memory model
//! allows.
//!
//! `outport-loom` runs each with a bounded number of preemptions (a slice, below a second);
//! `outport-loom --full` without a bound. The lines are those of a test harness. Each
//! model was seen failing with the order that it is about made weaker.

mod map;
mod models;
mod sync;

#[path = "../../../host/block/src/engine/completion.rs"]
mod completion;
#[path = "../../../host/block/src/gate.rs"]
#[allow(dead_code, unreachable_pub, reason = "the models use a part of it")]
mod gate;
#[path = "../../../host/block/src/bitmap/marked.rs"]
#[allow(dead_code, reason = "the models use a part of it")]
mod marked;
#[path = "../../../host/block/src/tickets.rs"]
mod tickets;

use std::process::ExitCode;

/// Preemptions within one run: most mistakes need no more than two.
const SLICE: usize = 3;

fn main() -> ExitCode {
    let full = std::env::args().any(|argument| argument == "--full");
    let bound = (!full).then_some(SLICE);
    let wanted = std::env::args()
        .skip(1)
        .find(|argument| argument != "--full");
    let mut failed = 0;
    let mut passed = 0;
    for (name, model) in models::ALL {
        if wanted
            .as_deref()
            .is_some_and(|wanted| !name.contains(wanted))
        {
            continue;
        }
        let run = || {
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = bound;
            builder.check(*model);
        };
        if std::panic::catch_unwind(run).is_ok() {
            passed += 1;
            println!("test {name} ... ok");
        } else {
            failed += 1;
            println!("test {name} ... FAILED");
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored");
    ExitCode::from(u8::from(failed > 0))
}
