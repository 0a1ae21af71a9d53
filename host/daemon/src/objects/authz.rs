//! Authorization objects: whether an identity may.
//!
//! Asked where a client shows who it is. Rules are tried in order, the first that matches decides;
//! whatever is wrong with an object, nobody gets in (spec 5.3).

use std::rc::Rc;

use outport_qmp::Error;
use outport_qmp::types::qom::{
    AuthZListFileProperties, AuthZListProperties, AuthZSimpleProperties, QAuthZListFormat,
    QAuthZListPolicy, QAuthZListRule,
};

use super::authz_file::FileList;

/// One object.
#[derive(Debug, Clone)]
pub(super) enum Authz {
    Simple(String),
    List(AuthZListProperties),
    File(Rc<FileList>),
}

impl Authz {
    pub(super) fn simple(properties: &AuthZSimpleProperties) -> Self {
        Self::Simple(properties.identity.clone())
    }

    pub(super) fn list(properties: &AuthZListProperties) -> Self {
        Self::List(properties.clone())
    }

    /// Rules in a file, watched if asked for.
    ///
    /// # Errors
    /// The file does not hold rules, or cannot be watched.
    pub(super) async fn file(properties: &AuthZListFileProperties) -> Result<Self, Error> {
        FileList::open(properties).await.map(Self::File)
    }

    /// Whether `identity` may.
    pub(super) fn allows(&self, identity: &str) -> bool {
        match self {
            Self::Simple(only) => only == identity,
            Self::List(list) => decide(list, identity),
            Self::File(file) => file.allows(identity),
        }
    }
}

/// What a list says of `identity`.
pub(super) fn decide(list: &AuthZListProperties, identity: &str) -> bool {
    let rules = list.rules.as_deref().unwrap_or_default();
    let policy = match rules.iter().find(|rule| matches(rule, identity)) {
        Some(rule) => rule.policy,
        None => list.policy.unwrap_or(QAuthZListPolicy::Deny),
    };
    policy == QAuthZListPolicy::Allow
}

fn matches(rule: &QAuthZListRule, identity: &str) -> bool {
    match rule.format {
        Some(QAuthZListFormat::Glob) => glob(&rule.r#match, identity),
        Some(QAuthZListFormat::Exact) | None => rule.r#match == identity,
    }
}

/// `*` is any run of characters, `?` is one; everything else is itself. Linear in memory, and in
/// time the product of both lengths at worst.
fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut next) = (0, 0);
    // Where to go on if what follows the last `*` does not match.
    let mut star = None;
    while next < text.len() {
        match pattern.get(at) {
            Some('*') => {
                at += 1;
                star = Some((at, next));
            }
            Some(&one) if one == '?' || one == text[next] => {
                at += 1;
                next += 1;
            }
            _ => match &mut star {
                Some((after, from)) => {
                    *from += 1;
                    (at, next) = (*after, *from);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|rest| *rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pattern: &str, policy: QAuthZListPolicy, format: QAuthZListFormat) -> QAuthZListRule {
        QAuthZListRule {
            r#match: pattern.into(),
            policy,
            format: Some(format),
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        use QAuthZListFormat::{Exact, Glob};
        use QAuthZListPolicy::{Allow, Deny};
        let list = AuthZListProperties {
            policy: None,
            rules: Some(vec![
                rule("CN=eve", Deny, Exact),
                rule("CN=*", Allow, Glob),
                rule("CN=bob", Deny, Exact),
            ]),
        };
        assert!(!decide(&list, "CN=eve"));
        assert!(decide(&list, "CN=bob"));
        assert!(!decide(&list, "O=bob"), "deny is the default");
        assert!(!decide(&AuthZListProperties::default(), ""));
    }

    #[test]
    fn stars_and_question_marks_are_all_that_is_special() {
        for (pattern, text) in [
            ("", ""),
            ("*", ""),
            ("*", "a,b/c"),
            ("a*c", "abbc"),
            ("a*b*c", "a-b-b-c"),
            ("?", "\u{e9}"),
            ("[a]", "[a]"),
            ("**x", "yx"),
        ] {
            assert!(glob(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("?", ""),
            ("a*c", "abcd"),
            ("A", "a"),
            ("[ab]", "a"),
        ] {
            assert!(!glob(pattern, text), "{pattern} {text}");
        }
        let slow = "a*".repeat(1000) + "b";
        assert!(!glob(&slow, &"a".repeat(5000)));
    }
}
