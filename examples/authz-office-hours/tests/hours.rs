//! The policy, asked at chosen times.

use authz_office_hours::OfficeHours;
use outport_sdk::testing::TestPolicy;
use outport_sdk::{Decision, Narrowing, Request};

const HOUR_MS: u64 = 3_600_000;
/// Monday, the fifth of January 1970, at midnight.
const MONDAY: u64 = 4 * 24 * HOUR_MS;

fn office(more: &str) -> TestPolicy<OfficeHours> {
    let options = format!(r#"{{"from": "08:00", "to": "18:00"{more}}}"#);
    TestPolicy::open(&options).expect("the options are right")
}

fn at(policy: &mut TestPolicy<OfficeHours>, now_ms: u64) -> Decision {
    policy.decide(&Request {
        now_ms,
        wants_write: true,
        ..Request::default()
    })
}

#[test]
fn the_grant_ends_with_the_hours() {
    let left = |ttl_ms| {
        Decision::Allow(Narrowing {
            ttl_ms,
            ..Narrowing::default()
        })
    };
    let mut office = office("");
    assert_eq!(at(&mut office, MONDAY + 8 * HOUR_MS), left(10 * HOUR_MS));
    assert_eq!(at(&mut office, MONDAY + 18 * HOUR_MS - 1), left(1));
}

#[test]
fn at_other_times_nobody_writes() {
    let mut office = office("");
    let saturday = MONDAY + 5 * 24 * HOUR_MS;
    for now in [
        MONDAY,
        MONDAY + 8 * HOUR_MS - 1,
        MONDAY + 18 * HOUR_MS,
        saturday + 9 * HOUR_MS,
    ] {
        match at(&mut office, now) {
            Decision::Allow(grant) => {
                assert!(grant.read_only);
                assert!(
                    (1..=HOUR_MS / 4).contains(&grant.ttl_ms),
                    "and is asked again soon"
                );
            }
            Decision::Deny(reason) => panic!("{reason}"),
        }
    }
}

#[test]
fn the_operator_says_which_days_and_what_happens_outside() {
    let mut office = office(r#", "days": ["sat"], "outside": "deny", "utc-offset-minutes": 120"#);
    let saturday = MONDAY + 5 * 24 * HOUR_MS;
    assert!(matches!(
        at(&mut office, saturday + 6 * HOUR_MS),
        Decision::Allow(_)
    ));
    let closed = Decision::deny("It is not office hours");
    assert_eq!(at(&mut office, saturday + 16 * HOUR_MS), closed);
    assert_eq!(at(&mut office, MONDAY + 9 * HOUR_MS), closed);
}

#[test]
fn nonsense_is_refused_with_words() {
    for (options, said) in [
        (
            r#"{"from": "8", "to": "18:00"}"#,
            "'8' is no time of the day",
        ),
        (r#"{"from": "08:00", "to": "24:01"}"#, "'24:01' is no time"),
        (
            r#"{"from": "18:00", "to": "08:00"}"#,
            "end before they begin",
        ),
    ] {
        let error = TestPolicy::<OfficeHours>::open(options)
            .err()
            .expect("it is nonsense");
        assert!(error.message.contains(said), "{error}");
    }
    // Nobody is admitted by name alone.
    assert!(!office("").is_allowed("CN=anybody"));
}
