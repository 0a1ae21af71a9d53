use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use serde_json::json;

use super::*;
use crate::types::introspect::{SchemaInfoBranch, SchemaInfoObject};

/// The schema as a client probes it.
struct Probe(BTreeMap<String, SchemaInfoBranch>);

impl Probe {
    fn new() -> Self {
        Self(
            schema()
                .into_iter()
                .map(|entry| (entry.name, entry.branch))
                .collect(),
        )
    }

    fn arguments(&self, command: &str) -> &SchemaInfoObject {
        match &self.0[command] {
            SchemaInfoBranch::Command(command) => self.object(&command.arg_type),
            other => panic!("{command} is {other:?}"),
        }
    }

    fn object(&self, name: &str) -> &SchemaInfoObject {
        match &self.0[name] {
            SchemaInfoBranch::Object(object) => object,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn case(&self, command: &str, case: &str) -> &SchemaInfoObject {
        let variants = self.arguments(command).variants.as_ref().unwrap();
        let variant = variants
            .iter()
            .find(|variant| variant.case == case)
            .unwrap();
        self.object(&variant.r#type)
    }
}

fn names(object: &SchemaInfoObject) -> String {
    let name = |member: &crate::types::introspect::SchemaInfoObjectMember| match member.default {
        Some(_) => format!("{}?", member.name),
        None => member.name.clone(),
    };
    object
        .members
        .iter()
        .map(name)
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn members_are_qemus() {
    let probe = Probe::new();
    let commands = [
        (
            "block-export-add",
            "type id fixed-iothread? iothread? node-name writable? writethrough? allow-inactive? \
             authz?",
        ),
        (
            "nbd-server-start",
            "handshake-max-seconds? tls-creds? tls-authz? max-connections? addr id? authz? \
             strict-authz?",
        ),
        (
            "nbd-server-add",
            "name? description? device writable? bitmap?",
        ),
        ("block_resize", "device? node-name? size"),
        ("object-add", "qom-type id"),
        ("quit", ""),
    ];
    for (command, want) in commands {
        assert_eq!(names(probe.arguments(command)), want, "{command}");
    }
    let file = "filename pr-manager? locking? aio? aio-max-batch? drop-cache? \
                x-check-cache-dropped?";
    assert_eq!(names(probe.case("blockdev-add", "file")), file);
    assert_eq!(
        names(probe.case("blockdev-add", "null-co")),
        "size? latency-ns? read-zeroes?"
    );
    for (driver, want) in [
        ("throttle", "throttle-group file"),
        ("compress", "file"),
        ("copy-on-read", "file bottom?"),
        (
            "blkdebug",
            "image config? align? max-transfer? opt-write-zero? max-write-zero? opt-discard? \
             max-discard? inject-error? set-state? take-child-perms? unshare-child-perms?",
        ),
    ] {
        assert_eq!(names(probe.case("blockdev-add", driver)), want);
    }
    let vhost = "addr logical-block-size? num-queues? queue-size? serial?";
    assert_eq!(
        names(probe.case("block-export-add", "vhost-user-blk")),
        vhost
    );
    let nbd = probe.case("block-export-add", "nbd");
    assert!(nbd.members.iter().any(|member| member.name == "bitmaps"));
}

#[test]
fn every_type_that_is_named_is_described_once() {
    let entries = schema();
    let mut described = BTreeSet::new();
    for entry in &entries {
        assert!(
            described.insert(entry.name.as_str()),
            "{} is there twice",
            entry.name
        );
    }
    let mut named = BTreeSet::new();
    for entry in &entries {
        match &entry.branch {
            SchemaInfoBranch::Command(it) => {
                named.extend([it.arg_type.as_str(), it.ret_type.as_str()]);
            }
            SchemaInfoBranch::Event(it) => drop(named.insert(&it.arg_type)),
            SchemaInfoBranch::Array(it) => drop(named.insert(&it.element_type)),
            SchemaInfoBranch::Alternate(it) => {
                named.extend(it.members.iter().map(|member| member.r#type.as_str()));
            }
            SchemaInfoBranch::Object(it) => {
                named.extend(it.members.iter().map(|member| member.r#type.as_str()));
                let variants = it.variants.iter().flatten();
                named.extend(variants.map(|variant| variant.r#type.as_str()));
            }
            SchemaInfoBranch::Builtin(_) | SchemaInfoBranch::Enum(_) => {}
        }
    }
    assert_eq!(
        named.difference(&described).collect::<Vec<_>>(),
        Vec::<&&str>::new()
    );
}

#[test]
fn schema_is_what_qemus_is_made_of() {
    let schema = serde_json::to_value(schema()).unwrap();
    let entries = schema.as_array().unwrap();
    let find = |name: &str| entries.iter().find(|entry| entry["name"] == name).unwrap();
    let remove = find("nbd-server-remove");
    assert_eq!(remove["meta-type"], "command");
    assert_eq!(remove["features"], json!(["deprecated"]));
    assert_eq!(
        find("str"),
        &json!({"name": "str", "meta-type": "builtin", "json-type": "string"})
    );
    let arguments = find(find("job-dismiss")["arg-type"].as_str().unwrap());
    let want = json!([{"name": "id", "type": "str"}]);
    assert_eq!(
        (&arguments["meta-type"], &arguments["members"]),
        (&json!("object"), &want)
    );
}

#[test]
fn unknown_commands_are_not_found() {
    let error = Command::from_request("query-nope", &Map::new()).unwrap_err();
    assert_eq!(
        error,
        Error::command_not_found("The command query-nope has not been found")
    );
    assert!(
        command_list()
            .iter()
            .any(|command| command.name == "query-plugins")
    );
}

#[test]
fn requests_survive_the_round_trip() {
    let arguments = json!({"id": "e", "mode": "hard"});
    let command =
        Command::from_request("block-export-del", arguments.as_object().unwrap()).unwrap();
    assert_eq!(
        (command.name(), command.arguments()),
        ("block-export-del", arguments)
    );
}

#[test]
fn handlers_answer_with_json() {
    let run = |name: &str, arguments: Value| {
        let command = Command::from_request(name, arguments.as_object().unwrap()).unwrap();
        let mut context = Context::from_waker(Waker::noop());
        match pin!(command.run(&Lists)).poll(&mut context) {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => panic!("nothing here waits"),
        }
    };
    let list = to_value(&command_list());
    assert_eq!(run("query-commands", json!({})), Ok(list.clone()));
    assert_eq!(list[1], json!({"name": "query-version"}));
    assert_eq!(
        run("job-dismiss", json!({"id": "j"})),
        Err(Error::no_such_job())
    );
}
