//! `outport events` and `outport jobs`: what goes on in a daemon, as it goes on.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::args::{Events, Jobs};
use crate::client::Client;
use crate::monitor::Session;
use crate::output::{json_line, print, table};

/// How often jobs are asked how far they are.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// Prints events until the daemon ends, or there were as many as wanted.
pub(crate) fn events(events: &Events) -> Result<ExitCode> {
    let (_stream, mut messages) = Client::connect(&events.socket)?.into_halves();
    let mut left = events.count;
    while left != Some(0) {
        let Some(message) = messages.next()? else {
            break;
        };
        if message.get("event").is_some() {
            print(&Session::event(&message, events.json))?;
            left = left.map(|left| left - 1);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists jobs, or follows them until none is at work any more.
pub(crate) fn jobs(jobs: &Jobs) -> Result<ExitCode> {
    let mut client = Client::connect(&jobs.socket)?;
    if jobs.follow {
        return follow(&mut client, jobs.json);
    }
    let list = client.call("query-jobs", &Map::new())?;
    if jobs.json {
        json_line(&list)?;
    } else {
        let rows: Vec<_> = list.as_array().into_iter().flatten().map(row).collect();
        let titles = ["ID", "TYPE", "STATUS", "DONE", "ERROR"];
        print(&table(&titles, &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(job: &Value) -> Vec<String> {
    let text = |name: &str| job[name].as_str().unwrap_or_default().to_owned();
    vec![
        text("id"),
        text("type"),
        text("status"),
        percent(job),
        text("error"),
    ]
}

/// Follows all jobs; fails if one of them did.
fn follow(client: &mut Client, json: bool) -> Result<ExitCode> {
    let mut screen: Box<dyn Screen> = match json || !std::io::stdout().is_terminal() {
        true => Box::new(Lines {
            json,
            last: BTreeMap::new(),
        }),
        false => Box::new(Bars {
            all: MultiProgress::new(),
            bars: BTreeMap::new(),
        }),
    };
    let mut failed = false;
    loop {
        let list = client.call("query-jobs", &Map::new())?;
        let jobs: Vec<_> = list.as_array().into_iter().flatten().cloned().collect();
        screen.show(&jobs)?;
        failed |= jobs.iter().any(|job| job.get("error").is_some());
        let over = |job: &Value| job["status"] == "concluded" || job["status"] == "null";
        if jobs.iter().all(over) {
            break;
        }
        thread::sleep(ASK_EVERY);
    }
    screen.end();
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn progress(job: &Value) -> (u64, u64) {
    let number = |name: &str| job[name].as_u64().unwrap_or(0);
    (number("current-progress"), number("total-progress"))
}

fn percent(job: &Value) -> String {
    match progress(job) {
        (_, 0) => "0 %".to_owned(),
        (current, total) => format!("{} %", u128::from(current) * 100 / u128::from(total)),
    }
}

/// Where the jobs are shown.
trait Screen {
    fn show(&mut self, jobs: &[Value]) -> Result<()>;
    fn end(&mut self) {}
}

/// A line for each change.
struct Lines {
    json: bool,
    last: BTreeMap<String, String>,
}

impl Screen for Lines {
    fn show(&mut self, jobs: &[Value]) -> Result<()> {
        for job in jobs {
            let line = match self.json {
                true => job.to_string(),
                false => row(job).join(" ").trim_end().to_owned(),
            };
            let id = job["id"].to_string();
            if self.last.get(&id) != Some(&line) {
                print(&format!("{line}\n"))?;
                self.last.insert(id, line);
            }
        }
        Ok(())
    }
}

/// A bar for each job.
struct Bars {
    all: MultiProgress,
    bars: BTreeMap<String, ProgressBar>,
}

impl Screen for Bars {
    fn show(&mut self, jobs: &[Value]) -> Result<()> {
        for job in jobs {
            let id = job["id"].as_str().unwrap_or_default().to_owned();
            let bar = self.bars.entry(id.clone()).or_insert_with(|| {
                let style =
                    ProgressStyle::with_template("{prefix:16} [{wide_bar}] {percent:>3} % {msg}");
                let bar = self.all.add(ProgressBar::new(1));
                bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                    .with_prefix(id)
            });
            let (current, total) = progress(job);
            bar.set_length(total.max(1));
            bar.set_position(current);
            let status = job["status"].as_str().unwrap_or_default();
            bar.set_message(match job["error"].as_str() {
                Some(error) => format!("{status}: {error}"),
                None => status.to_owned(),
            });
        }
        Ok(())
    }

    fn end(&mut self) {
        self.bars.values().for_each(ProgressBar::abandon);
    }
}
