//! Sentences recorded from qemu-storage-daemon 10.0, which says the same as 11.1 here.

use serde_json::json;

use super::*;
use crate::commands::Command;
use crate::keyval;
use crate::types::block_core::*;
use crate::types::block_create::{BlockdevCreate, BlockdevCreateBranch};
use crate::types::block_export::*;
use crate::types::qom::ObjectOptions;

fn error(name: &str, arguments: Value) -> String {
    let Value::Object(arguments) = arguments else {
        panic!("arguments are an object")
    };
    match Command::from_request(name, &arguments) {
        Err(error) => error.desc,
        Ok(command) => panic!("{name} was accepted: {command:?}"),
    }
}

fn check(name: &str, cases: &[(Value, &str)]) {
    for (arguments, want) in cases {
        assert_eq!(error(name, arguments.clone()), *want, "{arguments}");
    }
}

#[test]
fn the_first_offence_in_schema_order_counts() {
    check(
        "block-export-add",
        &[
            (json!({"id": 5}), "Parameter 'type' is missing"),
            (
                json!({"type": "zzz"}),
                "Parameter 'type' does not accept value 'zzz'",
            ),
            (
                json!({"type": "nbd", "node-name": 5}),
                "Parameter 'id' is missing",
            ),
            (
                json!({"type": "nbd", "id": "e"}),
                "Parameter 'node-name' is missing",
            ),
            (
                json!({"type": "vhost-user-blk", "id": "e", "node-name": "x", "zz": 1}),
                "Parameter 'addr' is missing",
            ),
            (
                json!({"type": "fuse", "id": "e", "node-name": "x"}),
                "Parameter 'mountpoint' is missing",
            ),
        ],
    );
    let member = "Parameter 'addr.data.zz' is unexpected";
    let inner = json!({"addr": {"type": "unix", "data": {"path": "/x", "zz": 1}}, "zzz": 5});
    assert_eq!(error("nbd-server-start", inner), member);
}

#[test]
fn paths_lead_to_the_offence() {
    check(
        "nbd-server-start",
        &[
            (json!({}), "Parameter 'addr' is missing"),
            (json!({"addr": {}}), "Parameter 'addr.type' is missing"),
            (
                json!({"addr": {"type": "unix"}}),
                "Parameter 'addr.data' is missing",
            ),
            (
                json!({"addr": {"type": "unix", "data": {"path": 5}}}),
                "Invalid parameter type for 'addr.data.path', expected: string",
            ),
            (
                json!({"addr": {"type": "inet", "data": {"host": "x", "port": 10999}}}),
                "Invalid parameter type for 'addr.data.port', expected: string",
            ),
            (
                json!({"addr": {"type": "x"}}),
                "Parameter 'type' does not accept value 'x'",
            ),
            (
                json!({"addr": 5}),
                "Invalid parameter type for 'addr', expected: object",
            ),
            (
                json!({"addr": {"type": "unix", "data": {"path": "/x"}, "q": 1}, "zzz": 5}),
                "Parameter 'addr.q' is unexpected",
            ),
            (
                json!({"addr": {"type": "unix", "data": {"path": "/x", "tight": "yes"}}}),
                "Invalid parameter type for 'addr.data.tight', expected: boolean",
            ),
        ],
    );
}

#[test]
fn numbers_are_numbers_in_range() {
    let addr = json!({"type": "unix", "data": {"path": "/x"}});
    for (value, want) in [
        (json!("5"), "uint64"),
        (json!(5.5), "uint64"),
        (json!(true), "uint64"),
        (json!(null), "uint64"),
        (json!([]), "uint64"),
        (json!(-5), "uint32_t"),
        (json!(4_294_967_296_u64), "uint32_t"),
    ] {
        let arguments = json!({"addr": addr, "max-connections": value});
        let want = format!("Parameter 'max-connections' expects {want}");
        assert_eq!(error("nbd-server-start", arguments), want);
    }
    let inet = json!({"type": "inet", "data": {"host": "x", "port": "1", "to": 70000}});
    let want = "Parameter 'to' expects uint16_t";
    assert_eq!(error("nbd-server-start", json!({"addr": inet})), want);
    for size in [json!("x"), json!(1.5), json!(1e3), json!(1_u64 << 63)] {
        let want = "Invalid parameter type for 'size', expected: integer";
        assert_eq!(error("block_resize", json!({"size": size})), want);
    }
}

#[test]
fn lists_and_alternates_name_what_they_are() {
    let nbd = |bitmaps| json!({"type": "nbd", "id": "e", "node-name": "x", "bitmaps": bitmaps});
    check(
        "block-export-add",
        &[
            (
                nbd(json!("b")),
                "Invalid parameter type for 'bitmaps', expected: array",
            ),
            (
                nbd(json!([5])),
                "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
            ),
            (
                nbd(json!([{"node": "s"}])),
                "Parameter 'bitmaps[0].name' is missing",
            ),
            (
                nbd(json!(["a", {"node": "s", "name": "d", "e": 5}])),
                "Parameter 'bitmaps[1].e' is unexpected",
            ),
            (
                nbd(json!([{"node": 5}])),
                "Invalid parameter type for 'bitmaps[0].node', expected: string",
            ),
            (
                json!({"type": "nbd", "id": "e", "iothread": 5}),
                "Invalid parameter type for 'iothread', expected: BlockExportIothreads",
            ),
        ],
    );
    check(
        "blockdev-add",
        &[
            (
                json!({"driver": "qcow2", "file": 5}),
                "Invalid parameter type for 'file', expected: BlockdevRef",
            ),
            (
                json!({"driver": "qcow2", "file": {"driver": "raw", "file": null}}),
                "Invalid parameter type for 'file', expected: BlockdevRef",
            ),
            (
                json!({"driver": "qcow2", "file": "x", "backing": 5}),
                "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
            ),
            (
                json!({"driver": "qcow2", "file": "x", "overlap-check": "zz"}),
                "Parameter 'overlap-check' does not accept value 'zz'",
            ),
            (
                json!({"driver": "qcow2", "file": "x", "overlap-check": {"template": "zz"}}),
                "Parameter 'template' does not accept value 'zz'",
            ),
            (
                json!({"driver": "raw", "file": {}}),
                "Parameter 'file.driver' is missing",
            ),
            (
                json!({"driver": "raw", "file": {"driver": "null-co", "latency-ns": "5"}}),
                "Parameter 'file.latency-ns' expects uint64",
            ),
            (
                json!({"driver": "null-co", "cache": {"dirt": 1}}),
                "Parameter 'cache.dirt' is unexpected",
            ),
        ],
    );
}

#[test]
fn absent_and_null_differ() {
    let null = json!({"type": "nbd", "id": "e", "node-name": "x", "writable": null});
    let want = "Invalid parameter type for 'writable', expected: boolean";
    assert_eq!(error("block-export-add", null), want);
    let node = |backing| json!({"driver": "qcow2", "file": "f", "backing": backing});
    for (value, want) in [
        (json!({"driver": "qcow2", "file": "f"}), None),
        (node(json!(null)), Some(BlockdevRefOrNull::Null(()))),
        (
            node(json!("b")),
            Some(BlockdevRefOrNull::Reference("b".into())),
        ),
    ] {
        let node: BlockdevOptions = from_value(&value, Mode::Typed).unwrap();
        let BlockdevDriverOptions::Qcow2(qcow2) = node.branch else {
            panic!("not a qcow2 node")
        };
        assert_eq!(qcow2.backing, want);
    }
}

#[test]
fn other_drivers_keep_their_options() {
    let value = json!({
        "driver": "acme", "node-name": "n", "read-only": true,
        "file": {"driver": "file", "filename": "/x"}, "depth": [1, {"a": null}], "ratio": 0.5,
    });
    let node: BlockdevOptions = from_value(&value, Mode::Typed).unwrap();
    assert_eq!(serde_json::to_value(&node).unwrap(), value);
    assert_eq!((node.driver(), node.read_only), ("acme", Some(true)));
    let BlockdevDriverOptions::Plugin(mut plugin) = node.branch else {
        panic!("not a plugin")
    };
    let file = plugin.take_child("file", Mode::Typed).unwrap().unwrap();
    assert!(matches!(file, BlockdevRef::Definition(file) if file.driver() == "file"));
    assert_eq!(plugin.take_backing(Mode::Typed).unwrap(), None);
    assert_eq!(
        Value::Object(plugin.options),
        json!({"depth": [1, {"a": null}], "ratio": 0.5})
    );
}

#[test]
fn creation_reads_sizes() {
    let options = json!({"driver": "file", "filename": "x", "size": "1"});
    let want = "Parameter 'options.size' expects uint64";
    assert_eq!(
        error(
            "blockdev-create",
            json!({"job-id": "j", "options": options})
        ),
        want
    );
    let options = json!({"driver": "acme", "size": 5});
    let value = json!({"job-id": "j", "options": options});
    let create: BlockdevCreate = from_value(&value, Mode::Typed).unwrap();
    assert!(
        matches!(create.options.branch, BlockdevCreateBranch::Plugin(plugin)
        if plugin.options == *json!({"size": 5}).as_object().unwrap())
    );
}

#[test]
fn command_lines_have_sentences_of_their_own() {
    let node = |text| keyval::read::<BlockdevOptions>(text, Some("driver"));
    let export = |text| keyval::read::<BlockExportOptions>(text, Some("type"));
    let server = |text| keyval::read::<NbdServerOptions>(text, None);
    let errors = [
        (
            node("null-co,size=1G").err(),
            "Parameter 'size' expects integer",
        ),
        (
            node("null-co,latency-ns=1k").err(),
            "Parameter 'latency-ns' expects integer",
        ),
        (
            node("null-co,size=").err(),
            "Parameter 'size' expects integer",
        ),
        (
            node("null-co,read-zeroes=maybe").err(),
            "Parameter 'read-zeroes' expects 'on' or 'off'",
        ),
        (node("null-co,q=1").err(), "Parameter 'q' is unexpected"),
        (
            node("qcow2,file.0=5").err(),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (node("").err(), "Parameter 'driver' is missing"),
        (
            export("nbd,id.x=e").err(),
            "Parameters 'id.*' are unexpected",
        ),
        (
            export("nbd,id=e,node-name=x,bitmaps.0.x=b").err(),
            "Parameter 'bitmaps.0.node' is missing",
        ),
        (
            export("nbd,id=e,node-name=x,bitmaps=b").err(),
            "Invalid parameter type for 'bitmaps', expected: array",
        ),
        (
            server("max-connections=1").err(),
            "Parameter 'addr' is missing",
        ),
        (
            server("addr=5").err(),
            "Invalid parameter type for 'addr', expected: object",
        ),
        (
            server("addr.type=unix,addr.path=/x,max-connections=-1").err(),
            "Parameter 'max-connections' expects uint32_t",
        ),
        (
            server("addr.type=inet,addr.host=x,addr.port=1,addr.to=zz").err(),
            "Parameter 'addr.to' expects integer",
        ),
        (
            server("addr.type=unix,addr.path=/x,zz.a=5").err(),
            "Parameter 'zz' is unexpected",
        ),
    ];
    for (error, want) in errors {
        assert_eq!(error.unwrap().desc, want);
    }
}

#[test]
fn command_lines_read_strings_as_the_type_wants() {
    let text = "null-co,node-name=n,size=0x10,read-zeroes=y,cache.direct=on";
    let node: BlockdevOptions = keyval::read(text, Some("driver")).unwrap();
    let want = json!({
        "driver": "null-co", "node-name": "n", "size": 16, "read-zeroes": true,
        "cache": {"direct": true},
    });
    assert_eq!(serde_json::to_value(node).unwrap(), want);
    let text = "wasm-plugin,id=w,filename=a,,b.wasm,memory-max=64M";
    let object: ObjectOptions = keyval::read(text, Some("qom-type")).unwrap();
    let want = json!({
        "qom-type": "wasm-plugin", "id": "w", "filename": "a,b.wasm", "memory-max": 67_108_864,
    });
    assert_eq!(serde_json::to_value(object).unwrap(), want);
}

#[test]
fn nesting_of_nodes_is_bounded() {
    let mut node = json!({"driver": "null-co"});
    for _ in 0..=DEPTH_MAX {
        node = json!({"driver": "raw", "file": node});
    }
    assert_eq!(
        error("blockdev-add", node),
        "Parameter 'file' is nested too deeply"
    );
}
