//! Exports, nodes, iothreads and servers come and go at random while clients write.
//!
//! A model says what each command must answer. The one thing that it cannot know is when an export
//! that was told to go has gone: between the command and its event the id may be taken or free, and
//! the model takes either, but never a success that the event should have come before. Events are
//! counted: one for each export that was added, none else. What clients were told is written is in
//! the files at the end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod load;
mod model;

use std::collections::BTreeMap;

use outport_tests::{Daemon, Rng, Server, TempImage, eventually};
use serde_json::{Value, json};

use load::Load;
use model::{Export, Model, Phase};

/// Few enough names that most commands meet something.
const NODES: u64 = 4;
const EXPORTS: u64 = 6;
const IOTHREADS: u64 = 3;

/// Operations of one run.
const OPERATIONS: u64 = 15_000;

/// Length of the images: room for every client that ever attaches to write somewhere of its own.
const IMAGE_BYTES: u64 = 1 << 30;

struct Stress {
    daemon: Daemon,
    model: Model,
    images: Vec<TempImage>,
    loads: BTreeMap<String, Vec<Load>>,
    sessions: u64,
    rng: Rng,
    /// What was done, for a failure to tell.
    last: String,
}

#[test]
fn everything_comes_and_goes_under_load() {
    let seed = std::env::var("OUTPORT_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or(3);
    println!("OUTPORT_TEST_SEED={seed}");
    let mut stress = Stress {
        daemon: Daemon::builder(Server::Outport).start(),
        model: Model::default(),
        images: (0..NODES).map(|_| TempImage::zeroes(IMAGE_BYTES)).collect(),
        loads: BTreeMap::new(),
        sessions: 0,
        rng: Rng::new(seed),
        last: String::new(),
    };
    let mut done = BTreeMap::<&str, u64>::new();
    for _ in 0..OPERATIONS {
        let name = stress.step();
        *done.entry(name).or_default() += 1;
    }
    println!("{done:?}, {} clients", stress.sessions);
    stress.end();
}

impl Stress {
    /// One operation; its name.
    fn step(&mut self) -> &'static str {
        match self.rng.below(20) {
            0..=2 => self.add_node(),
            3 => self.delete_node(),
            4 => self.add_iothread(),
            5 => self.delete_iothread(),
            6..=7 => self.start_server(),
            8 if self.rng.one_in(6) => self.stop_server(),
            8..=11 => self.add_export(),
            12..=14 => self.delete_export(),
            15..=17 => self.attach(),
            18 => self.detach(),
            _ => self.list(),
        }
    }

    /// Runs a command and applies the events that came before its answer.
    ///
    /// `leaves` is what a success sends away: its event may stand before the answer.
    fn run(&mut self, command: &str, arguments: Value, leaves: &[String]) -> Result<(), String> {
        self.last = format!("{command} {arguments}");
        let outcome = self.daemon.qmp.execute(command, arguments);
        if outcome.is_ok() {
            self.model.leave(leaves);
        }
        let events = self.daemon.qmp.take_events();
        self.model.apply(&events);
        outcome.map(drop).map_err(|error| error.desc)
    }

    /// Asserts what came of a command. While exports are going it may be either.
    #[track_caller]
    fn expect(&mut self, got: Result<(), String>, wanted: [Result<(), String>; 2]) -> bool {
        assert!(
            wanted.contains(&got),
            "{}: {got:?}, not {wanted:?}",
            self.last
        );
        got.is_ok()
    }

    fn add_node(&mut self) -> &'static str {
        let at = self.rng.below(NODES);
        let name = format!("n{at}");
        let file = json!({"driver": "file", "filename": self.images[at as usize].str()});
        let arguments = json!({"driver": "raw", "node-name": name, "file": file});
        let wanted = self.model.add_node(&name);
        let got = self.run("blockdev-add", arguments, &[]);
        if self.expect(got, [wanted.clone(), wanted]) {
            self.model.nodes.insert(name);
        }
        "blockdev-add"
    }

    fn delete_node(&mut self) -> &'static str {
        let name = format!("n{}", self.rng.below(NODES));
        let before = self.model.delete_node(&name);
        let got = self.run("blockdev-del", json!({"node-name": name}), &[]);
        let after = self.model.delete_node(&name);
        if self.expect(got, [before, after]) {
            self.model.nodes.remove(&name);
        }
        "blockdev-del"
    }

    fn add_iothread(&mut self) -> &'static str {
        let id = format!("io{}", self.rng.below(IOTHREADS));
        let wanted = self.model.add_iothread(&id);
        let got = self.run("object-add", json!({"qom-type": "iothread", "id": id}), &[]);
        if self.expect(got, [wanted.clone(), wanted]) {
            self.model.iothreads.insert(id);
        }
        "object-add"
    }

    fn delete_iothread(&mut self) -> &'static str {
        let id = format!("io{}", self.rng.below(IOTHREADS));
        let before = self.model.delete_iothread(&id);
        let got = self.run("object-del", json!({"id": id}), &[]);
        let after = self.model.delete_iothread(&id);
        if self.expect(got, [before, after]) {
            self.model.iothreads.remove(&id);
        }
        "object-del"
    }

    fn start_server(&mut self) -> &'static str {
        let path = self.daemon.path("nbd.sock");
        let addr = json!({"type": "unix", "data": {"path": path}});
        let wanted = self.model.start_server();
        let got = self.run("nbd-server-start", json!({"addr": addr}), &[]);
        if self.expect(got, [wanted.clone(), wanted]) {
            self.model.serving = true;
        }
        "nbd-server-start"
    }

    fn stop_server(&mut self) -> &'static str {
        let wanted = self.model.stop_server();
        let all = self.model.active();
        if wanted.is_ok() {
            all.iter().for_each(|id| self.cut(id));
        }
        let got = self.run("nbd-server-stop", json!({}), &all);
        if self.expect(got, [wanted.clone(), wanted]) {
            self.model.serving = false;
            assert!(
                self.model.exports.is_empty(),
                "an event came late: {:?}",
                self.model
            );
        }
        "nbd-server-stop"
    }

    fn add_export(&mut self) -> &'static str {
        let id = format!("e{}", self.rng.below(EXPORTS));
        let export = Export {
            node: format!("n{}", self.rng.below(NODES)),
            name: format!("x{}", self.rng.below(EXPORTS)),
            iothread: (!self.rng.one_in(3)).then(|| format!("io{}", self.rng.below(IOTHREADS))),
            phase: Phase::Active,
            users: 0,
        };
        let mut arguments = json!({"type": "nbd", "id": id, "node-name": export.node,
            "name": export.name, "writable": true});
        if let Some(iothread) = &export.iothread {
            arguments["iothread"] = json!(iothread);
        }
        let before = self.model.add_export(&id, &export);
        let got = self.run("block-export-add", arguments, &[]);
        let after = self.model.add_export(&id, &export);
        if self.expect(got, [before, after]) {
            self.model.add(id, export);
        }
        "block-export-add"
    }

    fn delete_export(&mut self) -> &'static str {
        let id = format!("e{}", self.rng.below(EXPORTS));
        let hard = self.rng.one_in(2);
        let mode = if hard { "hard" } else { "safe" };
        let before = self.model.delete_export(&id, hard);
        if hard && before.is_ok() {
            self.cut(&id);
        }
        let arguments = json!({"id": id, "mode": mode});
        let users = self
            .model
            .exports
            .get(&id)
            .is_some_and(|export| export.users > 0);
        let leaves = [id.clone()];
        let mut got = self.run("block-export-del", arguments.clone(), &leaves);
        if !hard && !users && before.is_ok() {
            // A client that has said goodbye is noticed a moment later.
            eventually("the client's leaving is noticed", || {
                if got == Err(format!("export '{id}' still in use")) {
                    got = self.run("block-export-del", arguments.clone(), &leaves);
                }
                got.is_ok().then_some(())
            });
        }
        let after = match self.model.exports.contains_key(&id) {
            true => before.clone(),
            false => self.model.delete_export(&id, hard),
        };
        self.expect(got, [before, after]);
        "block-export-del"
    }

    /// Clients of the export are going to lose their connections.
    fn cut(&mut self, id: &str) {
        for load in self.loads.remove(id).unwrap_or_default() {
            load.cut();
            self.model.loads.push(load);
        }
    }

    fn attach(&mut self) -> &'static str {
        let name = format!("x{}", self.rng.below(EXPORTS));
        let path = self.daemon.path("nbd.sock");
        self.last = format!("attaching to {name}");
        let load = Load::attach(&path, &name, self.sessions);
        let id = self.model.named(&name);
        assert_eq!(
            load.is_some(),
            id.is_some(),
            "{}: {:?}",
            self.last,
            self.model
        );
        if let (Some(load), Some(id)) = (load, id) {
            self.sessions += 1;
            let export = self.model.exports.get_mut(&id).unwrap();
            export.users += 1;
            let node = export.node.clone();
            self.loads.entry(id).or_default().push(load.on(node));
        }
        "attach"
    }

    fn detach(&mut self) -> &'static str {
        let ids: Vec<_> = self.loads.keys().cloned().collect();
        if ids.is_empty() {
            return "no client";
        }
        let id = self.rng.pick(&ids).clone();
        let loads = self.loads.get_mut(&id).unwrap();
        let load = loads.swap_remove(self.rng.below(loads.len() as u64) as usize);
        if loads.is_empty() {
            self.loads.remove(&id);
        }
        self.model.exports.get_mut(&id).unwrap().users -= 1;
        self.model.loads.push(load.leave());
        "detach"
    }

    /// The daemon's lists are the model's, newest exports first.
    fn list(&mut self) -> &'static str {
        let listed = self.daemon.qmp.ok("query-block-exports", json!({}));
        let events = self.daemon.qmp.take_events();
        let before = self.model.listing();
        self.model.apply(&events);
        let going = |it: &Value| it["shutting-down"] == true;
        let stays: Vec<_> = listed
            .as_array()
            .unwrap()
            .iter()
            .filter(|it| !going(it))
            .collect();
        let active: Vec<_> = before.iter().filter(|it| !going(it)).collect();
        assert_eq!(stays, active);
        for leaving in listed.as_array().unwrap().iter().filter(|it| going(it)) {
            assert!(before.contains(leaving), "{leaving} in {before:?}");
        }
        let nodes = self
            .daemon
            .qmp
            .ok("query-named-block-nodes", json!({"flat": true}));
        let raw = nodes
            .as_array()
            .unwrap()
            .iter()
            .filter(|node| node["drv"] == "raw");
        let mut names: Vec<_> = raw
            .map(|node| node["node-name"].as_str().unwrap())
            .collect();
        names.sort_unstable();
        assert_eq!(
            names,
            self.model
                .nodes
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>()
        );
        "query"
    }

    /// Stops the daemon, and looks for everything that clients were told is written.
    fn end(mut self) {
        let ids: Vec<_> = self.loads.keys().cloned().collect();
        ids.iter().for_each(|id| self.cut(id));
        self.model.leave(&self.model.active());
        self.daemon.qmp.ok("quit", json!({}));
        let events = self.daemon.qmp.take_events();
        self.model.apply(&events);
        assert!(
            self.model.exports.is_empty(),
            "no event: {:?}",
            self.model.exports
        );
        assert_eq!(self.model.added, self.model.deleted);
        assert!(self.daemon.wait().success(), "{}", self.daemon.stderr());
        let mut acknowledged = 0;
        for load in std::mem::take(&mut self.model.loads) {
            let at: usize = load.node()[1..].parse().unwrap();
            acknowledged += load.check(self.images[at].path());
        }
        println!(
            "{} exports, {acknowledged} writes acknowledged",
            self.model.added
        );
        assert!(acknowledged > 1000, "the clients wrote too little");
    }
}
