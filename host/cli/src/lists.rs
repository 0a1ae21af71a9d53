//! Tables of what a daemon has.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::args::List;
use crate::client::Client;
use crate::output::{json_line, print, table};

/// Enough of a hash to recognise it in a table; `--json` has all of it.
const HASH_CHARS: usize = 16;

pub(crate) fn exports(list: &List) -> Result<ExitCode> {
    let titles = ["ID", "TYPE", "NODE", "STATE"];
    show(
        list,
        "query-block-exports",
        &Map::new(),
        &titles,
        |export| {
            let closing = export["shutting-down"] == true;
            let state = if closing { "shutting down" } else { "active" };
            vec![
                text(&export["id"]),
                text(&export["type"]),
                text(&export["node-name"]),
                state.into(),
            ]
        },
    )
}

pub(crate) fn nodes(list: &List) -> Result<ExitCode> {
    let titles = ["NODE", "DRIVER", "ACCESS", "BYTES", "FILE"];
    let flat = Map::from_iter([("flat".to_owned(), json!(true))]);
    show(list, "query-named-block-nodes", &flat, &titles, |node| {
        let access = if node["ro"] == true {
            "read-only"
        } else {
            "read-write"
        };
        vec![
            text(&node["node-name"]),
            text(&node["drv"]),
            access.into(),
            text(&node["image"]["virtual-size"]),
            text(&node["file"]),
        ]
    })
}

pub(crate) fn plugins(list: &List) -> Result<ExitCode> {
    let titles = [
        "PLUGIN", "KIND", "VERSION", "DRIVERS", "SHA256", "CALLS", "FAULTS",
    ];
    show(list, "query-plugins", &Map::new(), &titles, |plugin| {
        let drivers = plugin["drivers"].as_array().cloned().unwrap_or_default();
        let drivers = drivers.iter().map(text).collect::<Vec<_>>().join(",");
        vec![
            text(&plugin["name"]),
            text(&plugin["kind"]),
            text(&plugin["version"]),
            drivers,
            text(&plugin["sha256"]).chars().take(HASH_CHARS).collect(),
            text(&plugin["calls"]),
            text(&plugin["faults"]),
        ]
    })
}

/// Runs a query and prints its elements, a row each, or as they came.
fn show(
    list: &List,
    query: &str,
    arguments: &Map<String, Value>,
    titles: &[&str],
    row: impl Fn(&Value) -> Vec<String>,
) -> Result<ExitCode> {
    let answer = Client::connect(&list.socket)?.call(query, arguments)?;
    if list.json {
        json_line(&answer)?;
    } else {
        let rows: Vec<_> = answer.as_array().into_iter().flatten().map(row).collect();
        print(&table(titles, &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A scalar without quotes; nothing for what is absent.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
