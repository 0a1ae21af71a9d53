//! Bytes to tokens. Knows positions and where a damaged token ends, nothing of grammar.

use super::literal::is_number;

/// Where a token starts. Both count from 1, over the whole connection; columns count bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) line: u64,
    pub(super) column: u64,
}

/// A token, or what stands in the place of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// One of `{ } [ ] , :`.
    Mark(u8),
    /// What stands between the quotes, escapes and all.
    Text(Vec<u8>),
    /// A number by JSON's grammar.
    Number(String),
    /// Lower-case letters.
    Keyword(String),
    /// Bytes that start no token, or end one too early. The message is over with them.
    Stray(Vec<u8>),
    /// A token for which there was no room; its bytes are gone.
    TooLong,
}

#[derive(Debug)]
enum State {
    Between,
    Keyword,
    Number(Number),
    Quoted {
        quote: u8,
        escaped: bool,
    },
    /// After a stray byte, up to a mark or the end of the line: one mistake is reported once.
    Recovering,
}

/// How far a number has come.
#[derive(Clone, Copy, Debug)]
enum Number {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    E,
    Sign,
    Exponent,
}

/// The lexer of one connection.
#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    /// Bytes of the current token.
    held: Vec<u8>,
    /// The current token outgrew its room.
    overlong: bool,
    start: Position,
    here: Position,
}

impl Lexer {
    pub(super) fn new() -> Self {
        let start = Position { line: 1, column: 1 };
        Self {
            state: State::Between,
            held: Vec::new(),
            overlong: false,
            start,
            here: start,
        }
    }

    /// Where the last token started.
    pub(super) fn position(&self) -> Position {
        self.start
    }

    /// Takes a byte. `room` is how many bytes the token may have. Returns the token that ended,
    /// and whether the byte was used up; if not, it has to be offered again.
    pub(super) fn step(&mut self, byte: u8, room: usize) -> (Option<Token>, bool) {
        let (token, used) = match self.state {
            State::Between => (self.begin(byte), true),
            State::Keyword if byte.is_ascii_lowercase() => (self.hold(byte, room), true),
            State::Keyword => (self.end_word(), false),
            State::Number(number) => self.number(number, byte, room),
            State::Quoted { quote, escaped } => (self.quoted(byte, quote, escaped, room), true),
            State::Recovering => {
                let go_on = !is_mark(byte) && !ends_recovery(byte);
                if !go_on {
                    self.state = State::Between;
                }
                (None, go_on)
            }
        };
        if used {
            self.advance(byte);
        }
        (token, used)
    }

    /// No more bytes: the word that they end, if any.
    pub(super) fn end(&mut self) -> Option<Token> {
        match self.state {
            State::Keyword | State::Number(_) => self.end_word(),
            _ => None,
        }
    }

    /// Whether a string is open.
    pub(super) fn in_string(&self) -> bool {
        matches!(self.state, State::Quoted { .. })
    }

    fn advance(&mut self, byte: u8) {
        if byte == b'\n' {
            self.here = Position {
                line: self.here.line + 1,
                column: 1,
            };
        } else {
            self.here.column += 1;
        }
    }

    fn begin(&mut self, byte: u8) -> Option<Token> {
        if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
            return None;
        }
        self.start = self.here;
        self.held.clear();
        self.overlong = false;
        match byte {
            _ if is_mark(byte) => return Some(Token::Mark(byte)),
            b'"' | b'\'' => {
                self.state = State::Quoted {
                    quote: byte,
                    escaped: false,
                }
            }
            b'-' | b'0'..=b'9' | b'a'..=b'z' => {
                self.held.push(byte);
                self.state = match byte {
                    b'-' => State::Number(Number::Minus),
                    b'0' => State::Number(Number::Zero),
                    b'1'..=b'9' => State::Number(Number::Whole),
                    _ => State::Keyword,
                };
            }
            _ => return Some(self.stray(vec![byte])),
        }
        None
    }

    /// Adds a byte to the token, or drops all of it once there is no room.
    fn hold(&mut self, byte: u8, room: usize) -> Option<Token> {
        if self.overlong {
            return None;
        }
        if self.held.len() < room {
            self.held.push(byte);
            return None;
        }
        self.overlong = true;
        self.held = Vec::new();
        Some(Token::TooLong)
    }

    /// A byte after part of a number. One that cannot follow belongs to what is stray.
    fn number(&mut self, number: Number, byte: u8, room: usize) -> (Option<Token>, bool) {
        match number.then(byte) {
            Some(Some(next)) => {
                self.state = State::Number(next);
                (self.hold(byte, room), true)
            }
            Some(None) => (self.end_word(), false),
            None => {
                let mut text = std::mem::take(&mut self.held);
                text.push(byte);
                (Some(self.stray(text)), true)
            }
        }
    }

    fn end_word(&mut self) -> Option<Token> {
        self.state = State::Between;
        if self.overlong {
            return None;
        }
        let word = std::mem::take(&mut self.held);
        Some(match String::from_utf8(word) {
            Ok(word) if is_number(&word) => Token::Number(word),
            Ok(word) if word.starts_with(|first: char| first.is_ascii_lowercase()) => {
                Token::Keyword(word)
            }
            Ok(word) => self.stray(word.into_bytes()),
            Err(error) => self.stray(error.into_bytes()),
        })
    }

    fn stray(&mut self, bytes: Vec<u8>) -> Token {
        self.state = State::Recovering;
        Token::Stray(bytes)
    }

    fn quoted(&mut self, byte: u8, quote: u8, escaped: bool, room: usize) -> Option<Token> {
        if !(0x20..0xfe).contains(&byte) {
            let mut text = vec![quote];
            text.append(&mut self.held);
            text.push(byte);
            return Some(self.stray(text));
        }
        if byte == quote && !escaped {
            self.state = State::Between;
            let text = std::mem::take(&mut self.held);
            return (!self.overlong).then_some(Token::Text(text));
        }
        self.state = State::Quoted {
            quote,
            escaped: byte == b'\\' && !escaped,
        };
        self.hold(byte, room)
    }
}

impl Number {
    /// What it is with one more byte: longer, or, with `Some(None)`, complete without it.
    fn then(self, byte: u8) -> Option<Option<Self>> {
        let more = match (self, byte) {
            (Self::Minus, b'0') => Self::Zero,
            (Self::Minus | Self::Whole, b'0'..=b'9') => Self::Whole,
            (Self::Zero, b'0'..=b'9') => return None,
            (Self::Zero | Self::Whole, b'.') => Self::Point,
            (Self::Point | Self::Fraction, b'0'..=b'9') => Self::Fraction,
            (Self::Zero | Self::Whole | Self::Fraction, b'e' | b'E') => Self::E,
            (Self::E, b'+' | b'-') => Self::Sign,
            (Self::E | Self::Sign | Self::Exponent, b'0'..=b'9') => Self::Exponent,
            (Self::Zero | Self::Whole | Self::Fraction | Self::Exponent, _) => return Some(None),
            _ => return None,
        };
        Some(Some(more))
    }
}

fn is_mark(byte: u8) -> bool {
    b"{}[],:".contains(&byte)
}

/// Line ends, and bytes that no message contains: a client sends them for a clean reader.
fn ends_recovery(byte: u8) -> bool {
    byte >= 0xfe || byte < 0x20 && byte != b'\t'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(bytes: &[u8]) -> Vec<Token> {
        let mut lexer = Lexer::new();
        let mut tokens = Vec::new();
        for byte in bytes {
            loop {
                let (token, used) = lexer.step(*byte, 8);
                tokens.extend(token);
                if used {
                    break;
                }
            }
        }
        tokens.extend(lexer.end());
        tokens
    }

    #[test]
    fn words_end_at_marks() {
        let want = [
            Token::Mark(b'['),
            Token::Number("-1.5e3".into()),
            Token::Mark(b','),
            Token::Keyword("true".into()),
            Token::Mark(b']'),
        ];
        assert_eq!(tokens(b"[-1.5e3,true ]"), want);
    }

    #[test]
    fn numbers_and_keywords_end_where_their_grammar_ends() {
        let number = |text: &str| Token::Number(text.into());
        let want = [
            number("0"),
            Token::Keyword("x".into()),
            number("10"),
            number("-2"),
        ];
        assert_eq!(tokens(b"0x10-2"), want);
        let want = [
            Token::Keyword("tru".into()),
            number("1"),
            Token::Stray(b".".to_vec()),
        ];
        assert_eq!(tokens(b"tru1.5e3"[..4].as_ref()), want[..2]);
        assert_eq!(tokens(b"tru.5")[1..], want[2..]);
    }

    #[test]
    fn both_quotes_quote() {
        let want = [
            Token::Text(b"a\"\\'".to_vec()),
            Token::Text(b"'\\\"".to_vec()),
        ];
        assert_eq!(tokens(br#"'a"\'' "'\"""#), want);
    }

    #[test]
    fn a_stray_byte_is_reported_once() {
        assert_eq!(tokens(b"@@ @@"), [Token::Stray(b"@".to_vec())]);
        assert_eq!(
            tokens(b"01 x]"),
            [Token::Stray(b"01".to_vec()), Token::Mark(b']')]
        );
        assert_eq!(
            tokens(b"[1.]]"),
            [
                Token::Mark(b'['),
                Token::Stray(b"1.]".to_vec()),
                Token::Mark(b']')
            ]
        );
        assert_eq!(tokens(b"'a\tb'"), [Token::Stray(b"'a\t".to_vec())]);
    }

    #[test]
    fn a_mistake_ends_with_its_line() {
        let stray = |bytes: &[u8]| Token::Stray(bytes.to_vec());
        let next = Token::Keyword("b".into());
        for (bytes, want) in [
            (&b"\"a\nx\nb "[..], &b"\"a\n"[..]),
            (b"@ x\rb ", b"@"),
            (b"1.\nb\nb ", b"1.\n"),
        ] {
            assert_eq!(tokens(bytes), [stray(want), next.clone()]);
        }
        // Bytes that no message contains: everything before the next line is dropped.
        assert_eq!(tokens(b"'a\xffb\nb "), [stray(b"'a\xff"), next]);
        assert_eq!(tokens(b"@\x01"), [stray(b"@"), stray(&[1])]);
    }

    #[test]
    fn a_long_token_is_dropped_not_kept() {
        assert_eq!(
            tokens(b"'123456789' 1"),
            [Token::TooLong, Token::Number("1".into())]
        );
    }
}
