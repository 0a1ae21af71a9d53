//! The JSON reader on damaged input: the bytes of the situations, changed a little, to both.
//!
//! Each input ends with the byte that makes a reader start afresh, then a question that both must
//! answer. Up to the first parse error the answers have to be the same, class by class; a reader
//! that accepts what the other refuses differs there. After it the versions recover differently:
//! 11.x swallows the message up to its end, 10.0 goes on in the middle of it, so only that both
//! are heard again is asked for. `FUZZ_SECONDS` and `FUZZ_SEED` are those of tests/fuzz.

use std::time::{Duration, Instant};

use outport_tests::{Rng, Server, requires};
use serde_json::{Value, json};

use crate::peer::Peer;
use crate::situation::{Action, Situation};
use crate::transcript::exchange;

/// Inputs that are tried however short the time is.
const ROUNDS_MIN: u64 = 2500;

/// Longer bytes of a situation are about limits.
const SEED_BYTES_MAX: usize = 400;

/// What parsers get wrong.
const PIECES: [&[u8]; 23] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\"",
    b"'",
    b"\\",
    b"\\u",
    b"\\ud83d",
    b"\xff",
    b"\xc0\x80",
    b"\x00",
    b"\xf4\x90",
    b"-",
    b"0",
    b"18446744073709551616",
    b"null",
    b"true",
    b".",
    b"e",
    b"\n",
];

/// Bytes and harmless commands of all situations.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let harmless = |name: &str| name.starts_with("query-") || name == "block-export-del";
    for step in crate::situations().into_iter().flat_map(|it| it.steps) {
        match step.action {
            Action::Bytes { bytes, .. } => seeds.push(bytes),
            Action::Command {
                name, arguments, ..
            } if harmless(&name) => {
                let mut message = json!({"execute": name, "id": {"a": [1, -2.5e3, "x\n\u{e9}"]}});
                if let Some(arguments) = arguments {
                    message["arguments"] = arguments;
                }
                seeds.push(message.to_string().into_bytes());
            }
            _ => {}
        }
    }
    let quits = |seed: &Vec<u8>| seed.windows(4).any(|word| word == b"quit");
    // An argument that 10.0 has not, see differences.toml.
    let newer = |seed: &Vec<u8>| {
        let has = |word: &[u8]| seed.windows(word.len()).any(|it| it == word);
        has(b"query-block\"") && has(b"flat")
    };
    seeds.retain(|seed| seed.len() <= SEED_BYTES_MAX && !quits(seed) && !newer(seed));
    seeds
}

fn mutated(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = rng.pick(seeds).clone();
    for _ in 0..rng.below(5) {
        let at = rng.below(data.len() as u64 + 1) as usize;
        match rng.below(6) {
            0 => data.truncate(at),
            1 if at < data.len() => data[at] ^= 1 << rng.below(8),
            2 if at < data.len() => data[at] = rng.next_u64() as u8,
            3 if at < data.len() => drop(data.remove(at)),
            4 => drop(data.splice(at..at, rng.pick(seeds).iter().copied())),
            _ => drop(data.splice(at..at, rng.pick(&PIECES).iter().copied())),
        }
    }
    data
}

/// Whether a number may be beyond all floats: QEMU takes it, and answers `inf`, which is no JSON.
fn overflows(data: &[u8]) -> bool {
    let exponent = |bytes: &[u8]| {
        let digits = bytes[1..].iter().skip_while(|byte| **byte == b'+');
        bytes[0].eq_ignore_ascii_case(&b'e') && digits.take(3).all(u8::is_ascii_digit)
    };
    data.windows(5).any(exponent)
}

/// What came back, as far as versions agree on it: classes up to the first parse error.
fn verdicts(answers: &Value) -> Vec<String> {
    let mut verdicts = Vec::new();
    for answer in answers.as_array().unwrap() {
        let desc = answer["error"]["desc"].as_str().unwrap_or_default();
        let position = |c: char| c.is_ascii_digit() || c == ':' || c == ' ';
        if desc.trim_start_matches(position).starts_with("JSON ") {
            verdicts.push("parse error".into());
            break;
        }
        let class = answer["error"]["class"].as_str().unwrap_or("return");
        verdicts.push(format!("{class} {}", answer["id"]));
    }
    verdicts
}

#[test]
fn damaged_input_is_refused_alike() {
    if !requires("qemu-storage-daemon") {
        return;
    }
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    let seed = number("FUZZ_SEED").unwrap_or(1);
    let until = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(1));
    let mut rng = Rng::new(seed);
    let seeds = seeds();
    let nothing = Situation::default();
    let [mut theirs, mut ours] =
        [Server::Qsd, Server::Outport].map(|server| Peer::start(&nothing, server, |_| {}));
    let (mut rounds, mut refused) = (0, 0);
    while rounds < ROUNDS_MIN || Instant::now() < until {
        let mut data = mutated(&mut rng, &seeds);
        data.extend(b"\n\xff");
        if overflows(&data) {
            continue;
        }
        let shown = String::from_utf8_lossy(&data).into_owned();
        // Shown when one of them hangs or dies.
        let [their, our] =
            [&mut theirs, &mut ours].map(|peer| verdicts(&exchange(peer, "a", &data)));
        assert_eq!(
            our, their,
            "ours and QSD's, FUZZ_SEED={seed} round {rounds}: {shown:?}"
        );
        refused += u64::from(their.len() < 2);
        rounds += 1;
    }
    println!(
        "{rounds} inputs, {} of them with something in them that is heard",
        rounds - refused
    );
}
