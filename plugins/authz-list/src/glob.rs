//! QEMU's patterns: `*` is any run of characters, `?` is one, everything else is itself.

/// Linear in memory, and in time the product of both lengths at worst.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
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
    use super::matches;

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
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("?", ""),
            ("a*c", "abcd"),
            ("A", "a"),
            ("[ab]", "a"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
        let slow = "a*".repeat(1000) + "b";
        assert!(!matches(&slow, &"a".repeat(5000)));
    }
}
