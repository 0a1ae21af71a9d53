//! Output: one object per line, ASCII only, ended by CR LF; or indented for people.

use std::io;

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

use super::float;

/// Spaces per level of indented output.
const INDENT: usize = 4;

/// `message` on one line, with its CR LF.
pub fn line(message: &impl Serialize) -> Vec<u8> {
    write(
        message,
        Style {
            indent: None,
            depth: 0,
        },
    )
}

/// `message` indented, every line with its CR LF (`pretty=on`).
pub fn pretty(message: &impl Serialize) -> Vec<u8> {
    write(
        message,
        Style {
            indent: Some(INDENT),
            depth: 0,
        },
    )
}

fn write(message: &impl Serialize, style: Style) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    // Messages have string keys only, and memory takes every byte: nothing here can fail.
    let _infallible = message.serialize(&mut Serializer::with_formatter(&mut out, style));
    out.extend_from_slice(b"\r\n");
    out
}

/// QEMU's style of JSON.
struct Style {
    indent: Option<usize>,
    depth: usize,
}

impl Style {
    /// Starts a line of indented output; separates with a space otherwise.
    fn separate<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(b",")?;
        }
        match self.indent {
            Some(indent) => write!(writer, "\r\n{:1$}", "", indent * self.depth),
            None if first => Ok(()),
            None => writer.write_all(b" "),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, mark: &[u8]) -> io::Result<()> {
        self.depth += 1;
        writer.write_all(mark)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, mark: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.indent.is_some() {
            self.separate(writer, true)?;
        }
        writer.write_all(mark)
    }
}

impl Formatter for Style {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float::to_text(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for character in fragment.chars() {
            if matches!(character, ' '..='~') {
                writer.write_all(&[character as u8])?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04X}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        let letter = match escape {
            CharEscape::Quote => b'"',
            CharEscape::ReverseSolidus => b'\\',
            CharEscape::Solidus => b'/',
            CharEscape::Backspace => b'b',
            CharEscape::FormFeed => b'f',
            CharEscape::LineFeed => b'n',
            CharEscape::CarriageReturn => b'r',
            CharEscape::Tab => b't',
            CharEscape::AsciiControl(byte) => return write!(writer, "\\u{byte:04X}"),
        };
        writer.write_all(&[b'\\', letter])
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_are_ascii() {
        let message =
            json!({"a": {}, "b": [1, "\u{e9}\u{1f600}\u{7f}\0/<>&'\"\\\u{8}\u{c}\n\r\t"]});
        let want = concat!(
            r#"{"a": {}, "b": [1, "\u00E9\uD83D\uDE00\u007F\u0000/<>&'\"\\\b\f\n\r\t"]}"#,
            "\r\n",
        );
        assert_eq!(text(line(&message)), want);
        assert_eq!(
            text(line(&json!([0.1, -1, u64::MAX]))),
            "[0.10000000000000001, -1, 18446744073709551615]\r\n"
        );
    }

    #[test]
    fn pretty_breaks_empty_brackets_too() {
        let message = json!({"id": {"b": {}, "c": [[], 1]}});
        let want = "{
    \"id\": {
        \"b\": {
        },
        \"c\": [
            [
            ],
            1
        ]
    }
}
";
        assert_eq!(text(pretty(&message)), want.replace('\n', "\r\n"));
    }
}
