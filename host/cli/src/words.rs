//! A line of commands, cut into words: at spaces that no quote and no bracket holds.

use anyhow::{Result, bail};

/// The words of a line. Quotes around a whole value are taken off; JSON keeps its own.
pub(crate) fn split(line: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut depth = 0_usize;
    let mut escaped = false;
    for c in line.chars() {
        if let Some(open) = quote {
            // Within JSON every character stays; elsewhere the quotes only hold words together.
            let ends = c == open && !escaped;
            escaped = c == '\\' && !escaped;
            if depth > 0 || !ends {
                word.push(c);
            }
            quote = if ends { None } else { Some(open) };
            continue;
        }
        match c {
            '"' | '\'' => {
                quote = Some(c);
                if depth > 0 {
                    word.push(c);
                }
                continue;
            }
            '{' | '[' => depth += 1,
            '}' | ']' => depth = depth.saturating_sub(1),
            c if c.is_whitespace() && depth == 0 => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            _ => {}
        }
        word.push(c);
    }
    if quote.is_some() || depth > 0 {
        bail!("The line ends inside of quotes or brackets");
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_separate_and_quotes_hold() {
        assert_eq!(split("a  b=c\td").unwrap(), ["a", "b=c", "d"]);
        assert_eq!(
            split("a name='x y' \"p q\"").unwrap(),
            ["a", "name=x y", "p q"]
        );
        assert_eq!(split("   ").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn json_stays_whole() {
        let words = split(r#"cmd {"a": "b c", "d": [1, 2], "q": "\"}"}"#).unwrap();
        assert_eq!(words, ["cmd", r#"{"a": "b c", "d": [1, 2], "q": "\"}"}"#]);
    }

    #[test]
    fn what_is_open_at_the_end_is_refused() {
        assert!(split("a 'b").is_err());
        assert!(split("a {\"b\": 1").is_err());
    }
}
