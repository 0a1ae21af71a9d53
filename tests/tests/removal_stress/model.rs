//! What the daemon must answer.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::load::Load;

type Answer = Result<(), String>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Active,
    /// It was told to go; its event has not come.
    Leaving,
}

#[derive(Clone, Debug)]
pub(crate) struct Export {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) iothread: Option<String>,
    pub(crate) phase: Phase,
    /// Clients that are attached.
    pub(crate) users: usize,
}

/// All there is.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) nodes: BTreeSet<String>,
    pub(crate) iothreads: BTreeSet<String>,
    pub(crate) exports: BTreeMap<String, Export>,
    pub(crate) serving: bool,
    /// Ids, oldest first.
    order: Vec<String>,
    pub(crate) added: u64,
    pub(crate) deleted: u64,
    /// Clients that were here.
    pub(crate) loads: Vec<Load>,
}

fn refuse(sentence: String) -> Answer {
    Err(sentence)
}

impl Model {
    // === what commands must answer ===

    pub(crate) fn add_node(&self, name: &str) -> Answer {
        match self.nodes.contains(name) {
            true => refuse(format!("Duplicate nodes with node-name='{name}'")),
            false => Ok(()),
        }
    }

    pub(crate) fn delete_node(&self, name: &str) -> Answer {
        if !self.nodes.contains(name) {
            return refuse(format!("Failed to find node with node-name='{name}'"));
        }
        match self.exports.values().any(|export| export.node == name) {
            true => refuse(format!("Node {name} is in use")),
            false => Ok(()),
        }
    }

    pub(crate) fn add_iothread(&self, id: &str) -> Answer {
        match self.iothreads.contains(id) {
            true => refuse(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )),
            false => Ok(()),
        }
    }

    pub(crate) fn delete_iothread(&self, id: &str) -> Answer {
        if !self.iothreads.contains(id) {
            return refuse(format!("object '{id}' not found"));
        }
        let used = |export: &Export| export.iothread.as_deref() == Some(id);
        match self.exports.values().any(used) {
            true => refuse(format!("object '{id}' is in use, can not be deleted")),
            false => Ok(()),
        }
    }

    pub(crate) fn start_server(&self) -> Answer {
        match self.serving {
            true => refuse("NBD server already running".into()),
            false => Ok(()),
        }
    }

    pub(crate) fn stop_server(&self) -> Answer {
        match self.serving {
            true => Ok(()),
            false => refuse("NBD server not running".into()),
        }
    }

    pub(crate) fn add_export(&self, id: &str, export: &Export) -> Answer {
        if self.exports.contains_key(id) {
            return refuse(format!("Block export id '{id}' is already in use"));
        }
        if !self.nodes.contains(&export.node) {
            let node = &export.node;
            return refuse(format!("Cannot find device='' nor node-name='{node}'"));
        }
        if let Some(id) = export
            .iothread
            .as_ref()
            .filter(|id| !self.iothreads.contains(*id))
        {
            return refuse(format!("iothread \"{id}\" not found"));
        }
        if !self.serving {
            return refuse("NBD server not running".into());
        }
        match self.named(&export.name) {
            Some(_) => {
                let name = &export.name;
                refuse(format!("NBD server already has export named '{name}'"))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn delete_export(&self, id: &str, hard: bool) -> Answer {
        match self.exports.get(id) {
            None => refuse(format!("Export '{id}' is not found")),
            Some(export) if export.phase == Phase::Leaving => {
                refuse(format!("Export '{id}' is already shutting down"))
            }
            Some(export) if export.users > 0 && !hard => {
                refuse(format!("export '{id}' still in use"))
            }
            Some(_) => Ok(()),
        }
    }

    /// The export that clients find under a name; the name is free as soon as it leaves.
    pub(crate) fn named(&self, name: &str) -> Option<String> {
        let active = |export: &Export| export.phase == Phase::Active && export.name == name;
        let mut exports = self.exports.iter();
        exports
            .find(|(_, export)| active(export))
            .map(|(id, _)| id.clone())
    }

    /// `query-block-exports`.
    pub(crate) fn listing(&self) -> Vec<Value> {
        let ids = self.order.iter().rev();
        let listed = ids.map(|id| {
            let export = &self.exports[id];
            json!({"id": id, "type": "nbd", "node-name": export.node,
                "shutting-down": export.phase == Phase::Leaving})
        });
        listed.collect()
    }

    // === what has happened ===

    pub(crate) fn active(&self) -> Vec<String> {
        let active = self
            .exports
            .iter()
            .filter(|(_, it)| it.phase == Phase::Active);
        active.map(|(id, _)| id.clone()).collect()
    }

    pub(crate) fn add(&mut self, id: String, export: Export) {
        self.added += 1;
        self.order.push(id.clone());
        assert!(self.exports.insert(id, export).is_none());
    }

    pub(crate) fn leave(&mut self, ids: &[String]) {
        for id in ids {
            self.exports.get_mut(id).unwrap().phase = Phase::Leaving;
        }
    }

    /// Each event ends one export that was leaving.
    pub(crate) fn apply(&mut self, events: &[Value]) {
        for event in events {
            assert_eq!(event["event"], "BLOCK_EXPORT_DELETED", "{event}");
            let id = event["data"]["id"].as_str().unwrap();
            let gone = self.exports.remove(id);
            let phase = gone.map(|export| export.phase);
            assert_eq!(
                phase,
                Some(Phase::Leaving),
                "{event} for an export that stays"
            );
            self.order.retain(|other| other != id);
            self.deleted += 1;
        }
    }
}
