//! Tokens to values: a stack of open brackets, so that depth costs heap and not stack.

use serde_json::{Map, Value};

use super::lexer::Token;
use super::literal::{self, Complaint};
use super::{MESSAGE_TOKENS_MAX, NESTING_MAX};

/// What a token led to.
#[derive(Debug)]
pub(super) enum Step {
    /// The value is not complete.
    More,
    /// A whole value.
    Done(Value),
    /// A syntax error; the rest of the message is swallowed.
    Syntax(Complaint),
    /// A limit; the rest of the message is swallowed.
    Limit(&'static str),
}

/// An open bracket and what stands in it so far.
#[derive(Debug)]
enum Frame {
    List(Vec<Value>),
    Object {
        members: Map<String, Value>,
        key: Option<String>,
    },
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Value,
    /// The first element of a list, or its end.
    ValueOrClose,
    Key,
    /// The first key of an object, or its end.
    KeyOrClose,
    Colon,
    CommaOrClose,
}

/// The parser of one message after the other.
#[derive(Debug)]
pub(super) struct Parser {
    frames: Vec<Frame>,
    expect: Expect,
    tokens: usize,
    swallowing: Option<Swallow>,
}

/// A message that is read only to find its end.
#[derive(Debug)]
struct Swallow {
    depth: u64,
    /// QEMU reports a damaged token where it stands and once more where the message ends.
    complain_at_end: bool,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self {
            frames: Vec::new(),
            expect: Expect::Value,
            tokens: 0,
            swallowing: None,
        }
    }

    /// Whether a message is open.
    pub(super) fn in_message(&self) -> bool {
        !self.frames.is_empty() || self.swallowing.is_some()
    }

    /// Whether tokens are only counted and their text is of no use.
    pub(super) fn swallowing(&self) -> bool {
        self.swallowing.is_some()
    }

    /// Forgets the message.
    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }

    /// Reads the message no further than to its end, because of a damaged token.
    pub(super) fn swallow(&mut self, complain_at_end: bool) {
        self.swallow_to(self.frames.len() as u64, complain_at_end);
    }

    fn swallow_to(&mut self, depth: u64, complain_at_end: bool) {
        self.reset();
        if depth > 0 {
            self.swallowing = Some(Swallow {
                depth,
                complain_at_end,
            });
        }
    }

    /// Takes a sound token.
    pub(super) fn step(&mut self, token: Token) -> Step {
        if self.swallowing.is_some() {
            return self.skip(&token);
        }
        self.tokens += 1;
        let mark = match token {
            Token::Mark(mark) => Some(mark),
            _ => None,
        };
        if self.tokens > MESSAGE_TOKENS_MAX {
            self.swallow_from(mark);
            return Step::Limit("JSON token count limit exceeded");
        }
        if matches!(mark, Some(b'{' | b'[')) && self.frames.len() == NESTING_MAX {
            self.swallow_from(mark);
            return Step::Limit("JSON nesting depth limit exceeded");
        }
        match self.take(token) {
            Ok(Some(value)) => {
                self.reset();
                Step::Done(value)
            }
            Ok(None) => Step::More,
            Err(complaint) => {
                self.swallow_from(mark);
                Step::Syntax(complaint)
            }
        }
    }

    /// Takes a token of a message that is swallowed.
    fn skip(&mut self, token: &Token) -> Step {
        let Some(swallow) = &mut self.swallowing else {
            return Step::More;
        };
        match token {
            Token::Mark(b'{' | b'[') => swallow.depth += 1,
            Token::Mark(b'}' | b']') => swallow.depth -= 1,
            _ => {}
        }
        if swallow.depth > 0 {
            return Step::More;
        }
        let complain = swallow.complain_at_end;
        self.reset();
        if complain {
            Step::Syntax("expecting value".into())
        } else {
            Step::More
        }
    }

    /// Swallows the message from a token on, which counts if it is a bracket.
    pub(super) fn swallow_from(&mut self, mark: Option<u8>) {
        let open = self.frames.len() as u64;
        let depth = match mark {
            Some(b'{' | b'[') => open + 1,
            Some(b'}' | b']') => open.saturating_sub(1),
            _ => open,
        };
        self.swallow_to(depth, false);
    }

    fn take(&mut self, token: Token) -> Result<Option<Value>, Complaint> {
        let expect = self.expect;
        match (expect, token) {
            (Expect::Value | Expect::ValueOrClose, Token::Mark(b'{')) => {
                self.frames.push(Frame::Object {
                    members: Map::new(),
                    key: None,
                });
                self.expect = Expect::KeyOrClose;
                Ok(None)
            }
            (Expect::Value | Expect::ValueOrClose, Token::Mark(b'[')) => {
                self.frames.push(Frame::List(Vec::new()));
                self.expect = Expect::ValueOrClose;
                Ok(None)
            }
            (Expect::ValueOrClose, Token::Mark(b']')) => self.close(),
            (Expect::Value | Expect::ValueOrClose, token) => self.place(scalar(token)?),
            (Expect::KeyOrClose, Token::Mark(b'}')) => self.close(),
            (Expect::Key | Expect::KeyOrClose, Token::Text(raw)) => self.key(&raw),
            (Expect::Key | Expect::KeyOrClose, _) => Err("expecting key".into()),
            (Expect::Colon, Token::Mark(b':')) => {
                self.expect = Expect::Value;
                Ok(None)
            }
            (Expect::Colon, _) => Err("expecting ':'".into()),
            (Expect::CommaOrClose, token) => self.comma_or_close(&token),
        }
    }

    fn key(&mut self, raw: &[u8]) -> Result<Option<Value>, Complaint> {
        let name = literal::string(raw)?;
        if let Some(Frame::Object { members, key }) = self.frames.last_mut() {
            if members.contains_key(&name) {
                return Err("duplicate key".into());
            }
            *key = Some(name);
        }
        self.expect = Expect::Colon;
        Ok(None)
    }

    fn comma_or_close(&mut self, token: &Token) -> Result<Option<Value>, Complaint> {
        match (self.frames.last(), token) {
            (Some(Frame::List(_)), Token::Mark(b',')) => {
                self.expect = Expect::Value;
                Ok(None)
            }
            (Some(Frame::List(_)), Token::Mark(b']')) => self.close(),
            (Some(Frame::List(_)), _) => Err("expected ',' or ']'".into()),
            (_, Token::Mark(b',')) => {
                self.expect = Expect::Key;
                Ok(None)
            }
            (_, Token::Mark(b'}')) => self.close(),
            _ => Err("expected ',' or '}'".into()),
        }
    }

    fn close(&mut self) -> Result<Option<Value>, Complaint> {
        match self.frames.pop() {
            Some(Frame::List(elements)) => self.place(Value::Array(elements)),
            Some(Frame::Object { members, .. }) => self.place(Value::Object(members)),
            None => Err("expecting value".into()),
        }
    }

    /// Puts a complete value where it belongs: in the innermost bracket, or out.
    fn place(&mut self, value: Value) -> Result<Option<Value>, Complaint> {
        self.expect = Expect::CommaOrClose;
        match self.frames.last_mut() {
            None => return Ok(Some(value)),
            Some(Frame::List(elements)) => elements.push(value),
            Some(Frame::Object { members, key }) => {
                members.insert(key.take().unwrap_or_default(), value);
            }
        }
        Ok(None)
    }
}

fn scalar(token: Token) -> Result<Value, Complaint> {
    match token {
        Token::Text(raw) => literal::string(&raw).map(Value::String),
        Token::Number(text) => literal::number(&text),
        Token::Keyword(word) => match word.as_str() {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            _ => Err(format!("invalid keyword '{word}'")),
        },
        _ => Err("expecting value".into()),
    }
}
