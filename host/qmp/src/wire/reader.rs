//! The reader of one connection: lexer and parser, limits and recovery.

use std::fmt;

use serde_json::Value;

use super::MESSAGE_BYTES_MAX;
use super::lexer::{Lexer, Position, Token};
use super::parser::{Parser, Step};
use crate::error::Error;

/// What is wrong with the input. The text is for people: clients match the class at most.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ParseError {
    /// Line and column, each from 1 over the whole connection; limits have none.
    position: Option<(u64, u64)>,
    message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.position {
            write!(f, "{line}:{column}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl From<ParseError> for Error {
    fn from(error: ParseError) -> Self {
        Error::generic(error.to_string())
    }
}

impl ParseError {
    fn at(position: Position, complaint: &str) -> Self {
        let message = format!("JSON parse error, {complaint}");
        Self {
            position: Some((position.line, position.column)),
            message,
        }
    }

    /// QEMU quotes the bytes up to a NUL.
    fn stray(position: Position, bytes: &[u8]) -> Self {
        let shown = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Self::at(
            position,
            &format!("stray '{}'", String::from_utf8_lossy(shown)),
        )
    }
}

/// Reads the values of one connection.
#[derive(Debug)]
pub struct Reader {
    lexer: Lexer,
    parser: Parser,
    /// Bytes of tokens in the message so far.
    message_bytes: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader at the start of a connection.
    pub fn new() -> Self {
        Self {
            lexer: Lexer::new(),
            parser: Parser::new(),
            message_bytes: 0,
        }
    }

    /// Takes bytes as they arrive; returns the values and errors that they complete, in order.
    /// The caller bounds what is returned by how many bytes it feeds at a time.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Result<Value, ParseError>> {
        let mut out = Vec::new();
        for byte in bytes {
            loop {
                let room = self.room();
                let (token, used) = self.lexer.step(*byte, room);
                if let Some(token) = token {
                    out.extend(self.token(token));
                }
                if used {
                    break;
                }
            }
        }
        out
    }

    /// Ends the input: the scalar that it completes, or an error if it broke off.
    pub fn finish(&mut self) -> Option<Result<Value, ParseError>> {
        let broken = self.lexer.in_string() || self.parser.in_message();
        let last = self.lexer.end().and_then(|token| self.token(token));
        if last.is_some() || !(broken || self.parser.in_message()) {
            return last;
        }
        self.parser.reset();
        Some(Err(ParseError::at(
            self.lexer.position(),
            "premature end of input",
        )))
    }

    /// How many bytes the current token may have.
    fn room(&self) -> usize {
        MESSAGE_BYTES_MAX - self.message_bytes
    }

    fn token(&mut self, token: Token) -> Option<Result<Value, ParseError>> {
        let position = self.lexer.position();
        let outcome = match token {
            Token::Stray(bytes) => {
                self.parser.reset();
                Some(Err(ParseError::stray(position, &bytes)))
            }
            Token::TooLong => {
                self.message_bytes = MESSAGE_BYTES_MAX;
                let first = !self.parser.swallowing();
                if first {
                    self.parser.swallow_from(None);
                }
                first.then(|| Err(Self::size_limit()))
            }
            token => {
                // At least one byte each, so that marks count too. `step` kept to the room.
                let len = match &token {
                    Token::Text(bytes) => bytes.len() + 2,
                    Token::Number(text) | Token::Keyword(text) => text.len(),
                    _ => 1,
                };
                self.message_bytes = (self.message_bytes + len).min(MESSAGE_BYTES_MAX);
                self.step(token, position)
            }
        };
        if !self.parser.in_message() {
            self.message_bytes = 0;
        }
        outcome
    }

    fn step(&mut self, token: Token, position: Position) -> Option<Result<Value, ParseError>> {
        if self.message_bytes == MESSAGE_BYTES_MAX && !self.parser.swallowing() {
            self.parser.swallow_from(match token {
                Token::Mark(mark) => Some(mark),
                _ => None,
            });
            return Some(Err(Self::size_limit()));
        }
        match self.parser.step(token, position) {
            Step::More => None,
            Step::Done(value) => Some(Ok(value)),
            Step::Syntax(complaint, position) => Some(Err(ParseError::at(position, &complaint))),
            Step::Limit(message) => Some(Err(ParseError {
                position: None,
                message: message.into(),
            })),
        }
    }

    fn size_limit() -> ParseError {
        ParseError {
            position: None,
            message: "JSON token size limit exceeded".into(),
        }
    }
}

/// Reads text that has to be one value.
///
/// # Errors
/// The first error, or `Expecting at most one JSON value`; empty text breaks off at once.
pub fn parse_one(text: &[u8]) -> Result<Value, Error> {
    let mut reader = Reader::new();
    let mut values = reader.feed(text);
    values.extend(reader.finish());
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (Some(Ok(value)), None) => Ok(value),
        (Some(Err(error)), _) => Err(error.into()),
        (Some(Ok(_)), Some(_)) => Err(Error::generic("Expecting at most one JSON value")),
        (None, _) => Err(Error::generic("JSON parse error, premature end of input")),
    }
}

#[cfg(test)]
mod tests;
