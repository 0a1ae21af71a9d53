//! Tokens to values: a stack of open brackets, so that depth costs heap and not stack.

use serde_json::{Map, Value};

use super::lexer::{Position, Token};
use super::literal::{self, Complaint};
use super::{MESSAGE_TOKENS_MAX, NESTING_MAX};

/// What a token led to.
#[derive(Debug)]
pub(super) enum Step {
    /// The value is not complete.
    More,
    /// A whole value.
    Done(Value),
    /// The end of a message with a syntax error.
    Syntax(Complaint, Position),
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
    /// A message of which only the end is looked for.
    swallowing: Option<Swallow>,
}

#[derive(Debug)]
struct Swallow {
    depth: Depth,
    /// What to say at the end. As in QEMU, a stray byte before it takes the sentence away.
    complaint: Option<(Complaint, Position)>,
}

/// How many braces and brackets are open. A message ends where none is left, or with one too many
/// of either kind closed.
#[derive(Debug, Clone, Copy, Default)]
struct Depth {
    braces: i64,
    brackets: i64,
}

impl Depth {
    fn count(&mut self, mark: u8) {
        match mark {
            b'{' => self.braces += 1,
            b'}' => self.braces -= 1,
            b'[' => self.brackets += 1,
            b']' => self.brackets -= 1,
            _ => {}
        }
    }

    fn is_inside(self) -> bool {
        self.braces >= 0 && self.brackets >= 0 && self.braces + self.brackets > 0
    }
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

    /// Takes a sound token.
    pub(super) fn step(&mut self, token: Token, position: Position) -> Step {
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
                let Some(swallow) = &mut self.swallowing else {
                    return Step::Syntax(complaint, position);
                };
                swallow.complaint = Some((complaint, position));
                Step::More
            }
        }
    }

    /// Takes a token of a message that is swallowed.
    fn skip(&mut self, token: &Token) -> Step {
        let (Some(swallow), Token::Mark(mark)) = (&mut self.swallowing, token) else {
            return Step::More;
        };
        swallow.depth.count(*mark);
        if swallow.depth.is_inside() {
            return Step::More;
        }
        let complaint = swallow.complaint.take();
        self.reset();
        match complaint {
            Some((complaint, position)) => Step::Syntax(complaint, position),
            None => Step::More,
        }
    }

    /// Swallows the message from a token on, which counts if it is a bracket.
    pub(super) fn swallow_from(&mut self, mark: Option<u8>) {
        let mut depth = Depth::default();
        for frame in &self.frames {
            match frame {
                Frame::List(_) => depth.brackets += 1,
                Frame::Object { .. } => depth.braces += 1,
            }
        }
        if let Some(mark) = mark {
            depth.count(mark);
        }
        self.reset();
        self.swallowing = depth.is_inside().then_some(Swallow {
            depth,
            complaint: None,
        });
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
