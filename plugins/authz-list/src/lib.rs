//! QEMU's `authz-simple`, `authz-list` and `authz-list-file`: rules that compare an identity.
//!
//! Rules are tried in order, the first that matches decides, else the list's own policy, which is
//! to deny. The daemon makes a list of one rule for `authz-simple`, and reads and watches the file
//! of `authz-list-file`; what is decided is decided here.

#![forbid(unsafe_code)]

pub mod fuzzing;
mod glob;

use outport_sdk::{ConfigFiles, Decision, Error, Info, Policy, Request, Result};
use serde::Deserialize;

/// What a rule or a list says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    #[default]
    Deny,
    Allow,
}

/// How a rule compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Comparison {
    #[default]
    Exact,
    Glob,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    r#match: String,
    policy: Verdict,
    #[serde(default)]
    format: Comparison,
}

/// A list of rules.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthzList {
    #[serde(default)]
    policy: Verdict,
    #[serde(default)]
    rules: Vec<Rule>,
}

impl AuthzList {
    /// The verdict, and whose it is.
    fn verdict(&self, identity: &str) -> (Verdict, String) {
        let found = self.rules.iter().position(|rule| rule.matches(identity));
        match found.and_then(|at| Some((at, self.rules.get(at)?))) {
            Some((at, rule)) => (rule.policy, format!("rule {} ('{}')", at + 1, rule.r#match)),
            None => (self.policy, "the list, as no rule matches,".to_owned()),
        }
    }
}

impl Rule {
    fn matches(&self, identity: &str) -> bool {
        match self.format {
            Comparison::Exact => self.r#match == identity,
            Comparison::Glob => glob::matches(&self.r#match, identity),
        }
    }
}

impl Policy for AuthzList {
    fn info() -> Info {
        Info {
            name: "authz-list",
            version: env!("CARGO_PKG_VERSION"),
            description: "QEMU's authz-simple, authz-list and authz-list-file",
            options_schema: include_str!("options.json"),
        }
    }

    fn open(_files: &dyn ConfigFiles, options: &str) -> Result<Self> {
        serde_json::from_str(options).map_err(|e| Error::invalid(format!("The rules: {e}")))
    }

    fn decide(&mut self, _files: &dyn ConfigFiles, request: &Request) -> Result<Decision> {
        let identity = &request.peer.identity;
        Ok(match self.verdict(identity) {
            (Verdict::Allow, _) => Decision::allow(),
            (Verdict::Deny, whose) => Decision::Deny(format!("{whose} denies '{identity}'")),
        })
    }

    fn is_allowed(&mut self, _files: &dyn ConfigFiles, identity: &str) -> Result<bool> {
        Ok(self.verdict(identity).0 == Verdict::Allow)
    }
}

outport_sdk::export_policy!(AuthzList);

#[cfg(test)]
mod tests {
    use super::*;
    use outport_sdk::Peer;
    use outport_sdk::testing::TestPolicy;

    fn list(options: &str) -> TestPolicy<AuthzList> {
        TestPolicy::open(options).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let mut list = list(
            r#"{"rules": [
                {"match": "CN=eve", "policy": "deny"},
                {"match": "CN=*", "policy": "allow", "format": "glob"},
                {"match": "CN=bob", "policy": "deny", "format": "exact"}
            ]}"#,
        );
        assert!(!list.is_allowed("CN=eve"));
        assert!(list.is_allowed("CN=bob"));
        assert!(!list.is_allowed("O=bob"), "deny is the default");
    }

    #[test]
    fn the_reason_names_the_rule() {
        let request = |identity: &str| Request {
            peer: Peer {
                identity: identity.to_owned(),
                ..Peer::default()
            },
            ..Request::default()
        };
        let mut list = list(r#"{"policy": "allow", "rules": [{"match": "x", "policy": "deny"}]}"#);
        assert_eq!(list.decide(&request("")), Decision::allow());
        assert_eq!(
            list.decide(&request("x")),
            Decision::deny("rule 1 ('x') denies 'x'")
        );
        assert!(list.reconfigure(r#"{"policy": "maybe"}"#).is_err());
        assert!(list.is_allowed("y"), "the old rules stay");
        list.reconfigure("{}").unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            list.decide(&request("y")),
            Decision::deny("the list, as no rule matches, denies 'y'")
        );
    }
}
