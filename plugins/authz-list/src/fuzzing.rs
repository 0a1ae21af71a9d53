//! Entry points for fuzzers: any bytes, no panic, and the answer of a slow and simple matcher.

use crate::{AuthzList, glob};
use outport_sdk::{ConfigFiles, Errno, Error, LogLevel, Policy as _, Result};

/// Longer ones make the simple matcher slow, not the other one.
const ORACLE_CHARS_MAX: usize = 200;

struct Nothing;

impl ConfigFiles for Nothing {
    fn read(&self, _name: &str) -> Result<Vec<u8>> {
        Err(Error::new(Errno::Eacces, "nothing is granted"))
    }

    fn generation(&self, _name: &str) -> Result<u64> {
        Err(Error::new(Errno::Eacces, "nothing is granted"))
    }

    fn log(&self, _level: LogLevel, _message: &str) {}
}

/// Options, and after the last line break an identity; then both as pattern and text.
pub fn rules(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (options, identity) = text.rsplit_once('\n').unwrap_or((&text, ""));
    if let Ok(mut list) = AuthzList::open(&Nothing, options) {
        let _ = list.is_allowed(&Nothing, identity);
    }
    let short = |text: &str| text.chars().take(ORACLE_CHARS_MAX).collect::<Vec<_>>();
    let (pattern, text) = (short(options), short(identity));
    let (as_pattern, as_text): (String, String) = (pattern.iter().collect(), text.iter().collect());
    assert_eq!(
        glob::matches(&as_pattern, &as_text),
        simple(&pattern, &text),
        "{as_pattern:?} {as_text:?}"
    );
}

/// Row by row: which prefixes of the text the pattern so far matches.
fn simple(pattern: &[char], text: &[char]) -> bool {
    let mut row = vec![false; text.len() + 1];
    row[0] = true;
    for one in pattern {
        let mut next = vec![false; text.len() + 1];
        for at in 0..=text.len() {
            next[at] = match one {
                '*' => row[at] || (at > 0 && next[at - 1]),
                '?' => at > 0 && row[at - 1],
                other => at > 0 && row[at - 1] && text[at - 1] == *other,
            };
        }
        row = next;
    }
    row[text.len()]
}
