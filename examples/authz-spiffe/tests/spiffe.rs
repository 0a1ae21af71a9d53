//! The policy, asked with certificates that never existed.

use authz_spiffe::Spiffe;
use authz_spiffe::rules::Rules;
use outport_sdk::testing::{MemoryConfig, TestPolicy};
use outport_sdk::{Decision, Narrowing, Peer, Request};

const RULES: &str = "
# who                            exports   may
spiffe://acme.example/backup/*   *         read
spiffe://acme.example/vm/web     web-*     write
spiffe://acme.example/vm/batch   scratch   write iops=500  # be kind to others
";

fn policy() -> TestPolicy<Spiffe> {
    let mut config = MemoryConfig::default();
    config.put("rules", RULES);
    let options = r#"{"trust-domain": "acme.example"}"#;
    TestPolicy::open_with(config, options).expect("the rules are right")
}

fn request(names: &[&str], export: &str) -> Request {
    Request {
        peer: Peer {
            tls_san: names.iter().map(ToString::to_string).collect(),
            ..Peer::default()
        },
        export_name: Some(export.to_owned()),
        wants_write: true,
        now_ms: 0,
    }
}

fn reason(decision: Decision) -> String {
    match decision {
        Decision::Deny(reason) => reason,
        Decision::Allow(grant) => panic!("it was let in: {grant:?}"),
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let mut policy = policy();
    let mut ask = |id: &str, export: &str| {
        let uri = format!("URI:spiffe://acme.example/{id}");
        policy.decide(&request(&["DNS:host.acme.example", &uri], export))
    };
    assert_eq!(ask("backup/nightly", "anything"), Decision::read_only());
    assert_eq!(ask("vm/web", "web-7"), Decision::allow());
    let slow = Narrowing {
        max_iops: 500,
        ..Narrowing::default()
    };
    assert_eq!(ask("vm/batch", "scratch"), Decision::Allow(slow));
    assert_eq!(
        reason(ask("vm/web", "scratch")),
        "No rule lets 'spiffe://acme.example/vm/web' use 'scratch'"
    );
    assert!(reason(ask("vm/web2", "web-7")).starts_with("No rule"));
}

#[test]
fn only_one_uri_of_the_trust_domain_counts() {
    let mut policy = policy();
    let mut denied = |names: &[&str]| reason(policy.decide(&request(names, "web-1")));
    assert!(denied(&[]).starts_with("There is no certificate"));
    assert!(denied(&["DNS:spiffe://acme.example/vm/web"]).starts_with("There is no certificate"));
    let foreign = "URI:spiffe://acme.example.evil.test/vm/web";
    assert!(denied(&[foreign]).ends_with("is not of the trust domain"));
    let good = "URI:spiffe://acme.example/vm/web";
    assert!(denied(&[good, "URI:https://example.com"]).ends_with("several URIs"));
}

#[test]
fn a_changed_file_counts_at_once_and_a_broken_one_denies() {
    let mut policy = policy();
    let web = request(&["URI:spiffe://acme.example/vm/web"], "web-1");
    assert_eq!(policy.decide(&web), Decision::allow());
    policy
        .config
        .put("rules", "spiffe://acme.example/vm/web web-* read\n");
    assert_eq!(policy.decide(&web), Decision::read_only());
    policy
        .config
        .put("rules", "\nspiffe://acme.example/vm/web web-* all\n");
    let mistake = "Line 2: 'all' is neither read nor write";
    assert_eq!(reason(policy.decide(&web)), mistake);
    assert_eq!(*policy.config.lines.borrow(), [format!("Error: {mistake}")]);
    policy.config.remove("rules");
    assert_eq!(reason(policy.decide(&web)), "No file 'rules' is granted");
    policy.config.put("rules", RULES);
    assert_eq!(policy.decide(&web), Decision::allow());
}

#[test]
fn mistakes_are_named_with_their_line() {
    for (text, said) in [
        (
            "spiffe://a/b x",
            "Line 1: a rule is WHO EXPORTS read|write [iops=N]",
        ),
        (
            "https://a/b x read",
            "Line 1: 'https://a/b' is no SPIFFE id",
        ),
        (
            "# fine\n\nspiffe://a/*/b x read",
            "Line 3: 'spiffe://a/*/b': a star may only",
        ),
        (
            "spiffe://a/b x read iops=many",
            "Line 1: 'iops=many' is no limit",
        ),
        ("\u{ff}", "Line 1: a rule is"),
    ] {
        let mistake = Rules::parse(text.as_bytes()).expect_err("it has a mistake");
        assert!(mistake.starts_with(said), "{mistake}");
    }
    assert_eq!(
        Rules::parse(b"\xff"),
        Err("The rules are not UTF-8".to_owned())
    );
    assert_eq!(Rules::parse(b""), Ok(Rules::default()));
}
