//! Images: nodes whose format a plugin understands.

use std::sync::Arc;

use outport_block::Node;
use outport_block::file::FileOptions;
use outport_block::format::{ChildKind, FormatFactory};
use outport_block::image::Image;
use outport_block::node::Kind;
use outport_plugin::WasmFormatFactory;
use outport_qmp::Error;
use outport_qmp::de::Mode;
use outport_qmp::types::block_core::{
    BlockdevDriverOptions, BlockdevOptions, BlockdevOptionsRaw, BlockdevRef, BlockdevRefOrNull,
    PluginDriverOptions,
};
use outport_qmp::types::qcow2::BlockdevOptionsQcow2;
use serde_json::{Map, Value};

use super::base::{Common, Inherited};
use super::children::{Children, Given, Wanted, image_path, shown};
use super::{Made, Opening, control_error, native};
use crate::graph::{Entry, Use, User};

/// Files that one image may have opened by name: a VMDK in pieces of 2 GiB has as many at 2 TiB.
const NAMED_FILES_MAX: usize = 1024;

/// Images named by images named by images: longer chains are an attack or a mistake.
const CHAIN_MAX: usize = 64;

/// The children that the operator named, and the options that are left.
struct Definition {
    factory: Arc<WasmFormatFactory>,
    file: BlockdevRef,
    backing: Option<BlockdevRefOrNull>,
    /// Further storage, by the plugin's name for it.
    storage: Vec<(String, BlockdevRef)>,
    options: Map<String, Value>,
}

impl Opening<'_> {
    /// `qcow2`.
    pub(super) async fn qcow2(
        &mut self,
        name: &str,
        qcow2: BlockdevOptionsQcow2,
        common: &Common,
    ) -> Result<Made, Error> {
        let mut options = match serde_json::to_value(&qcow2) {
            Ok(Value::Object(options)) => options,
            _ => Map::default(),
        };
        for child in ["file", "backing", "data-file"] {
            options.remove(child);
        }
        let data_file = qcow2.data_file.map(|child| ("data-file".to_owned(), child));
        let definition = Definition {
            factory: self.factory("qcow2")?,
            file: qcow2.file,
            backing: qcow2.backing,
            storage: data_file.into_iter().collect(),
            options,
        };
        self.image(name, definition, common).await
    }

    /// Any other format.
    pub(super) async fn plugin(
        &mut self,
        name: &str,
        mut plugin: PluginDriverOptions,
        common: &Common,
    ) -> Result<Made, Error> {
        let factory = self.factory(&plugin.driver)?;
        let file = plugin.take_child("file", self.mode)?;
        let file = file.ok_or_else(|| Error::missing("file"))?;
        let backing = plugin.take_backing(self.mode)?;
        let mut storage = Vec::new();
        if let Some(child) = plugin.take_child("data-file", self.mode)? {
            storage.push(("data-file".to_owned(), child));
        }
        let mut options = plugin.options;
        if self.mode == Mode::Keyval {
            super::typed::by_schema(&mut options, factory.options_schema().json());
        }
        let definition = Definition {
            factory,
            file,
            backing,
            storage,
            options,
        };
        self.image(name, definition, common).await
    }

    fn factory(&self, driver: &str) -> Result<Arc<WasmFormatFactory>, Error> {
        let registry = self.daemon.plugins.registry()?;
        registry
            .format(driver)
            .map_err(|error| Error::generic(error.to_string()))
    }

    /// Opens the children that were named, then the image, then what the image names and the
    /// policy grants.
    async fn image(
        &mut self,
        name: &str,
        definition: Definition,
        common: &Common,
    ) -> Result<Made, Error> {
        let Definition {
            factory,
            file,
            backing,
            storage,
            options,
        } = definition;
        let options = Value::Object(options);
        let checked = factory.options_schema().check(&options);
        checked.map_err(|error| Error::generic(error.to_string()))?;
        let writable = !common.read_only && (factory.writable() || !common.auto_read_only);
        let purpose = Use::Storage { writable };
        let inherited = Inherited {
            read_only: !writable,
            ..common.for_storage()
        };

        let primary = self.child(name, "file", file, inherited, purpose).await?;
        let mut given = Vec::new();
        match backing {
            None => {}
            Some(BlockdevRefOrNull::Null(())) => given.push(("backing".to_owned(), Given::None)),
            Some(BlockdevRefOrNull::Reference(node)) if node.is_empty() => {
                given.push(("backing".to_owned(), Given::None));
            }
            Some(backing) => {
                let child = match backing {
                    BlockdevRefOrNull::Definition(options) => BlockdevRef::Definition(options),
                    BlockdevRefOrNull::Reference(node) => BlockdevRef::Reference(node),
                    BlockdevRefOrNull::Null(()) => return Err(Error::missing("backing")),
                };
                if let BlockdevRef::Reference(child) = &child {
                    let parent = User::Node(name.to_owned());
                    let graph = self.daemon.graph.borrow();
                    graph.check_activity(&parent, child, "backing")?;
                }
                let inherited = common.for_backing();
                let node = self
                    .child(name, "backing", child, inherited, Use::Backing)
                    .await
                    .map_err(|error| {
                        Error::generic(format!("Could not open backing file: {}", error.desc))
                    })?;
                given.push(("backing".to_owned(), Given::Node(node)));
            }
        }
        for (id, child) in storage {
            let node = self
                .child(name, "data-file", child, inherited, purpose)
                .await?;
            given.push((id, Given::Node(node)));
        }
        let mut children = Children {
            node_name: name.to_owned(),
            image: image_path(&primary),
            policy: self.daemon.policy.borrow().clone(),
            given,
            wanted: None,
        };
        let mode = ImageMode {
            writable,
            active: common.active,
            unmap: common.unmap,
        };
        for _ in 0..=NAMED_FILES_MAX {
            let attempt = self.attempt(name, &factory, &options, mode, &primary, children);
            match attempt.await? {
                Attempt::Open(made) => return Ok(made),
                Attempt::Wants(mut back, wanted) => {
                    let id = wanted.id.clone();
                    let node = self
                        .granted(name, wanted, &inherited, common, purpose)
                        .await?;
                    back.given.push((id, Given::Node(node)));
                    children = *back;
                }
            }
        }
        Err(Error::generic(format!(
            "Node '{name}': the image names too many files"
        )))
    }

    /// Opens the image on an iothread: a slow file holds up nobody.
    async fn attempt(
        &self,
        name: &str,
        factory: &Arc<WasmFormatFactory>,
        options: &Value,
        mode: ImageMode,
        primary: &Arc<Node>,
        mut children: Children,
    ) -> Result<Attempt, Error> {
        let ImageMode {
            writable,
            active,
            unmap,
        } = mode;
        let events = self.daemon.events.sender();
        let (name, options) = (name.to_owned(), options.to_string());
        let (factory, primary) = (factory.clone(), primary.clone());
        let iothread = self.daemon.default_iothread()?;
        let opened = iothread.run(move || async move {
            let driver = factory.name().to_owned();
            let sink = Arc::new(move |event| events.image(event));
            let image = Image::open(
                &name,
                factory,
                options,
                writable && active,
                primary,
                &mut children,
                sink,
            )
            .await;
            let image = match (image, children.wanted.take()) {
                (Ok(image), _) => image,
                (Err(_), Some(wanted)) => return Ok(Attempt::Wants(Box::new(children), wanted)),
                (Err(error), None) => return Err(control_error(&error)),
            };
            let facts = match image
                .facts()
                .await
                .ok()
                .and_then(|f| serde_json::from_str(&f).ok())
            {
                Some(Value::Object(facts)) => facts,
                _ => Map::default(),
            };
            let kind = Kind::Image(Arc::new(image));
            let node = Node::with_discard(&name, &driver, !writable, unmap, kind);
            Ok(Attempt::Open(Made { node, facts }))
        });
        let gone = || Error::generic("The iothread that opens nodes is gone");
        opened.await.ok_or_else(gone)?
    }

    /// Opens a file that the image names and that the policy grants.
    async fn granted(
        &mut self,
        parent: &str,
        wanted: Wanted,
        inherited: &Inherited,
        common: &Common,
        storage: Use,
    ) -> Result<Arc<Node>, Error> {
        let backing = wanted.kind == ChildKind::Backing;
        let inherited = if backing {
            common.for_backing()
        } else {
            *inherited
        };
        if backing && self.names.len() > CHAIN_MAX {
            return Err(Error::generic(format!(
                "Node '{parent}': the backing chain is too long"
            )));
        }
        let mut options = FileOptions::new(&wanted.path);
        options.read_only = inherited.read_only;
        options.direct = inherited.direct;
        options.no_flush = inherited.no_flush;
        options.unmap = inherited.unmap;
        let file = self.reserve(None)?;
        let node = native::open_file(self.daemon, &file, "file", options).await?;
        let inside = node
            .host_file()
            .is_some_and(|opened| self.daemon.policy.borrow().covers_open(opened.as_fd()));
        if !inside {
            let path = shown(&wanted.path);
            return Err(Error::generic(format!(
                "Node '{parent}': '{path}' is not where it was"
            )));
        }
        self.daemon.graph.borrow_mut().insert(Entry {
            node: node.clone(),
            owned: false,
            facts: Map::default(),
            options: Vec::new(),
            detect_zeroes: common.detect_zeroes,
            direct: inherited.direct,
            no_flush: inherited.no_flush,
            force_share: inherited.force_share,
        });
        if !backing {
            let mut graph = self.daemon.graph.borrow_mut();
            graph.attach(User::Node(parent.to_owned()), &file, "data-file", storage)?;
            return Ok(node);
        }
        let driver = wanted.format.ok_or_else(|| {
            Error::generic(format!(
                "Node '{parent}': the image names the backing file '{}' without its format. Grant \
                 it with 'backing' in blockdev-add.",
                shown(&wanted.path)
            ))
        })?;
        let child = BlockdevRef::Definition(Box::new(backing_options(&driver, file)));
        self.child(parent, "backing", child, inherited, Use::Backing)
            .await
    }
}

/// What may be done to an image.
#[derive(Clone, Copy)]
struct ImageMode {
    writable: bool,
    active: bool,
    unmap: bool,
}

/// How one try to open an image ended.
enum Attempt {
    Open(Made),
    /// It needs this file first.
    Wants(Box<Children>, Wanted),
}

/// The definition of a backing node over a file that is open.
fn backing_options(driver: &str, file: String) -> BlockdevOptions {
    let file = BlockdevRef::Reference(file);
    let branch = match driver {
        "raw" => BlockdevDriverOptions::Raw(BlockdevOptionsRaw {
            file,
            offset: None,
            size: None,
        }),
        driver => {
            let mut options = Map::new();
            options.insert("file".into(), serde_json::json!(file));
            BlockdevDriverOptions::Plugin(PluginDriverOptions {
                driver: driver.to_owned(),
                options,
            })
        }
    };
    BlockdevOptions {
        node_name: None,
        discard: None,
        cache: None,
        active: None,
        read_only: None,
        auto_read_only: None,
        force_share: None,
        detect_zeroes: None,
        branch,
    }
}
