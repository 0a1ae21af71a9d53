use std::sync::atomic::AtomicU64;

use outport_block::node::Kind;
use outport_qmp::types::block_core::BlockdevDetectZeroesOptions;

use super::*;

const EXPORT: Use = Use::Direct(Claim {
    required: Permissions::CONSISTENT_READ.or(Permissions::WRITE),
    shared: Permissions::ALL.without(Permissions::RESIZE),
});

fn with(names: &[&str]) -> Graph {
    let mut graph = Graph::default();
    for name in names {
        graph.reserve(name).unwrap();
        let kind = Kind::Null {
            size: AtomicU64::new(512),
            zeroes: true,
        };
        graph.insert(Entry {
            node: Node::new(name, "null-co", false, kind),
            owned: true,
            facts: serde_json::Map::default(),
            options: Vec::new(),
            detect_zeroes: BlockdevDetectZeroesOptions::Off,
            direct: false,
            no_flush: false,
            force_share: false,
        });
    }
    graph
}

fn node(name: &str) -> User {
    User::Node(name.into())
}

#[test]
fn names_are_checked_in_qemus_order() {
    let mut graph = with(&["a"]);
    let error = |graph: &mut Graph, name: &str| graph.reserve(name).unwrap_err().desc;
    assert_eq!(error(&mut graph, "1x"), "Invalid node-name: '1x'");
    assert_eq!(error(&mut graph, &"a".repeat(32)), "Node name too long");
    assert_eq!(error(&mut graph, "a"), "Duplicate nodes with node-name='a'");
    graph.reserve("b").unwrap();
    assert_eq!(error(&mut graph, "b"), "Duplicate nodes with node-name='b'");
    graph.release("b");
    graph.reserve("b").unwrap();
    assert!(graph.reserve_implicit().starts_with("#block1"));
}

#[test]
fn conflicts_are_told_as_qemu_tells_them() {
    let mut graph = with(&["f", "q", "q2"]);
    let storage = Use::Storage { writable: true };
    graph.attach(node("q"), "f", "file", storage).unwrap();
    assert_eq!(
        graph
            .attach(User::Block, "f", "root", EXPORT)
            .unwrap_err()
            .desc,
        "Permission conflict on node 'f': permissions 'write' are both required by an unnamed \
         block device (uses node 'f' as 'root' child) and unshared by node 'q' (uses node 'f' as \
         'file' child)."
    );
    assert_eq!(
        graph
            .attach(node("q2"), "f", "file", storage)
            .unwrap_err()
            .desc,
        "Permission conflict on node 'f': permissions 'write, resize' are both required by node \
         'q' (uses node 'f' as 'file' child) and unshared by node 'q2' (uses node 'f' as 'file' \
         child)."
    );
    // What failed left nothing behind.
    graph.attach(User::Block, "q", "root", EXPORT).unwrap();
    graph.attach(User::Block, "q", "root", EXPORT).unwrap();
}

#[test]
fn a_node_that_is_gone_or_going_is_not_used_any_more() {
    let mut graph = with(&["f"]);
    let refused = |graph: &mut Graph| {
        let used = graph.attach(node("q"), "f", "file", Use::Filter);
        used.unwrap_err().desc
    };
    graph.take("f").unwrap();
    let want = "Cannot find device='f' nor node-name='f'";
    assert_eq!(refused(&mut graph), want);
    graph.forget("f");
    assert_eq!(refused(&mut graph), want);
}

#[test]
fn a_conflict_deeper_down_is_found() {
    let mut graph = with(&["f", "q", "r"]);
    graph
        .attach(node("q"), "f", "file", Use::Storage { writable: true })
        .unwrap();
    graph.attach(node("r"), "f", "file", Use::Filter).unwrap();
    let error = graph
        .attach(User::Block, "r", "root", EXPORT)
        .unwrap_err()
        .desc;
    assert_eq!(
        error,
        "Permission conflict on node 'f': permissions 'write' are both required by node 'r' (uses \
         node 'f' as 'file' child) and unshared by node 'q' (uses node 'f' as 'file' child)."
    );
}

#[test]
fn only_what_nobody_uses_is_deletable() {
    let mut graph = with(&["f", "r"]);
    let error = |graph: &Graph, name: &str| graph.check_deletable(name).unwrap_err().desc;
    graph.attach(node("r"), "f", "file", Use::Filter).unwrap();
    let export = graph.attach(User::Block, "r", "root", EXPORT).unwrap();
    assert_eq!(
        error(&graph, "zz"),
        "Failed to find node with node-name='zz'"
    );
    assert_eq!(error(&graph, "f"), "Block device f is in use");
    assert_eq!(error(&graph, "r"), "Node r is in use");
    assert_eq!(graph.roots(), Vec::<String>::new());
    graph.detach(export);
    graph.check_deletable("r").unwrap();
    assert_eq!(graph.roots(), ["r"]);
    graph.take("r").unwrap();
    // While it is being closed its file stays in use.
    assert_eq!(error(&graph, "f"), "Block device f is in use");
    assert!(graph.forget("r").is_empty(), "f has an owner of its own");
    graph.check_deletable("f").unwrap();
}
