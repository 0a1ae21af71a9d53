//! Standard output: a reader that has gone away is no error.

use std::io::{self, Write};

use anyhow::Result;
use serde_json::Value;

/// Writes text as it is, at once.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// One line of JSON.
pub(crate) fn json_line(value: &Value) -> Result<()> {
    print(&format!("{value}\n"))
}

/// JSON for people.
pub(crate) fn json_pretty(value: &Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// Whether an error only says that nobody reads the output any more (`outport ... | head`).
pub(crate) fn reader_has_gone(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Columns under their titles, as wide as they need to be; numbers to the right.
pub(crate) fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let number = |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let widths: Vec<usize> = titles
        .iter()
        .enumerate()
        .map(|(at, title)| {
            let cells = rows.iter().map(|row| row[at].chars().count());
            cells.chain([title.len()]).max().unwrap_or(0)
        })
        .collect();
    let right: Vec<bool> = (0..titles.len())
        .map(|at| !rows.is_empty() && rows.iter().all(|row| number(&row[at])))
        .collect();
    let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
    let mut text = String::new();
    for row in [&titles].into_iter().chain(rows) {
        let cells = row.iter().enumerate().map(|(at, cell)| {
            let width = widths[at];
            if right[at] {
                format!("{cell:>width$}")
            } else {
                format!("{cell:width$}")
            }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_on_the_right() {
        let rows = [
            vec!["a".to_owned(), "7".to_owned()],
            vec!["bb".to_owned(), "1000".to_owned()],
        ];
        let text = table(&["NAME", "CALLS"], &rows);
        assert_eq!(text, "NAME  CALLS\na         7\nbb     1000\n");
    }

    #[test]
    fn an_empty_table_is_its_titles() {
        assert_eq!(table(&["ID", "TYPE"], &[]), "ID  TYPE\n");
    }
}
