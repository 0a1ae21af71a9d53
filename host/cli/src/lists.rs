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
    let mut client = Client::connect(&list.socket)?;
    let exports = client.call("query-block-exports", &Map::new())?;
    if list.json {
        json_line(&exports)?;
        return Ok(ExitCode::SUCCESS);
    }
    // qemu-storage-daemon keeps no such figures: then their columns stay empty.
    let figures = client
        .call("query-export-stats", &Map::new())
        .unwrap_or_default();
    let row = |export: &Value| {
        let mut all = figures.as_array().into_iter().flatten();
        let figures = all.find(|it| it["id"] == export["id"]);
        let figure = |name: &str| figures.map(|it| text(&it[name])).unwrap_or_default();
        let closing = export["shutting-down"] == true;
        let state = if closing { "shutting down" } else { "active" };
        vec![
            text(&export["id"]),
            text(&export["type"]),
            text(&export["node-name"]),
            state.into(),
            figure("clients"),
            figure("rd-bytes"),
            figure("wr-bytes"),
            figure("errors"),
        ]
    };
    let rows: Vec<_> = exports.as_array().into_iter().flatten().map(row).collect();
    let titles = [
        "ID", "TYPE", "NODE", "STATE", "CLIENTS", "READ", "WRITTEN", "ERRORS",
    ];
    print(&table(&titles, &rows))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn nodes(list: &List) -> Result<ExitCode> {
    let titles = ["NODE", "DRIVER", "ACCESS", "BYTES", "CHILDREN", "FILE"];
    let flat = Map::from_iter([("flat".to_owned(), json!(true))]);
    show(list, "query-named-block-nodes", &flat, &titles, |node| {
        let access = if node["ro"] == true {
            "read-only"
        } else {
            "read-write"
        };
        let child = |it: &Value| format!("{}={}", text(&it["child"]), text(&it["node-name"]));
        let children = node["children"].as_array().into_iter().flatten();
        vec![
            text(&node["node-name"]),
            text(&node["drv"]),
            access.into(),
            text(&node["image"]["virtual-size"]),
            children.map(child).collect::<Vec<_>>().join(","),
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
