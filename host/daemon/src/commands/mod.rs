//! The commands, one file for each file of QEMU's schema.
//!
//! Run by the dispatcher on the control thread. A command checks and reserves without waiting,
//! waits for what is slow, and then changes the state without waiting.

mod authz;
mod block_bitmap;
mod block_core;
mod block_create;
mod block_debug;
pub(crate) mod block_export;
mod char;
mod control;
mod export_fuse;
mod export_vhost_user;
mod fdset;
mod plugin;
mod qom;
mod qom_types;
mod stats;
mod transaction;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use outport_qmp::types::Empty;
use outport_qmp::types::block_bitmap::{
    BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapSha256,
};
use outport_qmp::types::block_core::{
    BlockResize, BlockSetWriteThreshold, BlockdevDel, BlockdevOptions, BlockdevReopen,
    BlockdevSetActive, BlockdevSetIothread, QueryBlock, QueryNamedBlockNodes,
};
use outport_qmp::types::block_create::BlockdevCreate;
use outport_qmp::types::block_debug::{
    BlkdebugBreak, BlkdebugInfo, BlkdebugRemoveBreak, BlkdebugResume, QueryBlkdebug,
};
use outport_qmp::types::block_export::{
    BlockExportDel, BlockExportInfo, BlockExportOptions, BlockExportStats, NbdServerAdd,
    NbdServerInfo, NbdServerRemove, NbdServerStart, NbdServerStop,
};
use outport_qmp::types::block_graph::XDbgBlockGraph;
use outport_qmp::types::block_info::{BlockDeviceInfo, BlockInfo};
use outport_qmp::types::block_stats::{BlockStats, QueryBlockstats};
use outport_qmp::types::char::{
    ChardevAdd, ChardevBackendInfo, ChardevInfo, ChardevRemove, ChardevReturn,
};
use outport_qmp::types::control::{
    AllowPaths, CommandInfo, ConfigCommand, QmpCapabilities, VersionInfo,
};
use outport_qmp::types::fdset::{AddFd, AddfdInfo, Closefd, FdsetInfo, Getfd, RemoveFd};
use outport_qmp::types::introspect::SchemaInfo;
use outport_qmp::types::job::{BlockJobInfo, JobId, JobInfo};
use outport_qmp::types::plugin::PluginInfo;
use outport_qmp::types::qom::*;
use outport_qmp::types::transaction::Transaction;
use outport_qmp::{Error, Handler};
use serde_json::Value;

use crate::activity;
use crate::daemon::Daemon;
use crate::descriptors::Arrived;
pub(crate) use control::version;

/// Carries commands out.
pub(crate) struct Control {
    pub(crate) daemon: Rc<Daemon>,
    /// Id of the monitor whose command this is.
    monitor: Option<Rc<str>>,
    /// What came with the command, if its monitor can bring descriptors.
    arrived: RefCell<Arrived>,
    quit: Rc<Cell<bool>>,
}

impl Control {
    pub(crate) fn new(daemon: Rc<Daemon>) -> Self {
        Self {
            daemon,
            monitor: None,
            arrived: RefCell::default(),
            quit: Rc::default(),
        }
    }

    /// The same for one command of a monitor.
    pub(crate) fn for_command(&self, monitor: Rc<str>, arrived: Arrived) -> Self {
        Self {
            daemon: self.daemon.clone(),
            monitor: Some(monitor),
            arrived: RefCell::new(arrived),
            quit: self.quit.clone(),
        }
    }

    /// The oldest descriptor that came over the monitor.
    fn take_arrived(&self) -> Result<std::os::fd::OwnedFd, Error> {
        let taken = self.arrived.borrow().take();
        taken.ok_or_else(|| Error::generic("No file descriptor supplied via SCM_RIGHTS"))
    }

    /// Whether `quit` was carried out: its answer is the last one.
    pub(crate) fn has_quit(&self) -> bool {
        self.quit.get()
    }
}

type Outcome<T> = Result<T, Error>;

impl Handler for Control {
    async fn qmp_capabilities(&self, _: QmpCapabilities) -> Outcome<Empty> {
        control::capabilities()
    }
    async fn query_version(&self, _: Empty) -> Outcome<VersionInfo> {
        Ok(version())
    }
    async fn query_commands(&self, _: Empty) -> Outcome<Vec<CommandInfo>> {
        Ok(outport_qmp::commands::command_list())
    }
    async fn query_qmp_schema(&self, _: Empty) -> Outcome<Vec<SchemaInfo>> {
        Ok(outport_qmp::commands::schema())
    }
    async fn x_outport_config(&self, _: Empty) -> Outcome<Vec<ConfigCommand>> {
        Ok(crate::config::dump(&self.daemon))
    }
    async fn x_allow_paths(&self, arguments: AllowPaths) -> Outcome<Empty> {
        let allowed = self.daemon.policy.borrow_mut().allow(&arguments.path);
        allowed.map(|()| Empty {}).map_err(Error::generic)
    }
    async fn quit(&self, _: Empty) -> Outcome<Empty> {
        self.daemon.wind_down().await;
        self.quit.set(true);
        Ok(Empty {})
    }

    async fn blockdev_add(&self, options: BlockdevOptions) -> Outcome<Empty> {
        block_core::add(&self.daemon, options).await
    }
    async fn blockdev_reopen(&self, arguments: BlockdevReopen) -> Outcome<Empty> {
        block_core::reopen(&self.daemon, arguments).await
    }
    async fn blockdev_set_active(&self, arguments: BlockdevSetActive) -> Outcome<Empty> {
        let BlockdevSetActive { node_name, active } = arguments;
        activity::set(&self.daemon, node_name.as_deref(), active)
            .await
            .map(|()| Empty {})
    }
    async fn block_set_write_threshold(&self, arguments: BlockSetWriteThreshold) -> Outcome<Empty> {
        block_core::set_write_threshold(&self.daemon, &arguments)
    }
    async fn blockdev_del(&self, arguments: BlockdevDel) -> Outcome<Empty> {
        block_core::delete(&self.daemon, arguments).await
    }
    async fn blockdev_create(&self, arguments: BlockdevCreate) -> Outcome<Empty> {
        block_create::create(&self.daemon, arguments)
    }
    async fn block_resize(&self, arguments: BlockResize) -> Outcome<Empty> {
        block_core::resize(&self.daemon, arguments).await
    }
    async fn query_named_block_nodes(
        &self,
        arguments: QueryNamedBlockNodes,
    ) -> Outcome<Vec<BlockDeviceInfo>> {
        Ok(block_core::query_nodes(&self.daemon, &arguments))
    }
    async fn x_blockdev_set_iothread(&self, arguments: BlockdevSetIothread) -> Outcome<Empty> {
        block_core::set_iothread(&self.daemon, arguments)
    }
    async fn x_debug_query_block_graph(&self, _: Empty) -> Outcome<XDbgBlockGraph> {
        Ok(self.daemon.graph.borrow().dump())
    }
    async fn query_block(&self, _: QueryBlock) -> Outcome<Vec<BlockInfo>> {
        Ok(Vec::new())
    }

    async fn block_dirty_bitmap_add(&self, arguments: BlockDirtyBitmapAdd) -> Outcome<Empty> {
        transaction::one(&self.daemon, block_bitmap::add(arguments)).await
    }
    async fn block_dirty_bitmap_remove(&self, arguments: BlockDirtyBitmap) -> Outcome<Empty> {
        transaction::one(&self.daemon, block_bitmap::remove(arguments)).await
    }
    async fn block_dirty_bitmap_clear(&self, arguments: BlockDirtyBitmap) -> Outcome<Empty> {
        transaction::one(&self.daemon, block_bitmap::clear(arguments)).await
    }
    async fn block_dirty_bitmap_enable(&self, arguments: BlockDirtyBitmap) -> Outcome<Empty> {
        transaction::one(&self.daemon, block_bitmap::enable(arguments)).await
    }
    async fn block_dirty_bitmap_disable(&self, arguments: BlockDirtyBitmap) -> Outcome<Empty> {
        transaction::one(&self.daemon, block_bitmap::disable(arguments)).await
    }
    async fn block_dirty_bitmap_merge(&self, arguments: BlockDirtyBitmapMerge) -> Outcome<Empty> {
        transaction::one(&self.daemon, block_bitmap::merge(arguments)).await
    }
    async fn x_debug_block_dirty_bitmap_sha256(
        &self,
        bitmap: BlockDirtyBitmap,
    ) -> Outcome<BlockDirtyBitmapSha256> {
        block_bitmap::sha256(&self.daemon, &bitmap)
    }

    async fn x_blkdebug_break(&self, arguments: BlkdebugBreak) -> Outcome<Empty> {
        block_debug::add_break(&self.daemon, &arguments)
    }
    async fn x_blkdebug_remove_break(&self, arguments: BlkdebugRemoveBreak) -> Outcome<Empty> {
        block_debug::remove_break(&self.daemon, &arguments)
    }
    async fn x_blkdebug_resume(&self, arguments: BlkdebugResume) -> Outcome<Empty> {
        block_debug::resume(&self.daemon, &arguments)
    }
    async fn x_query_blkdebug(&self, arguments: QueryBlkdebug) -> Outcome<BlkdebugInfo> {
        block_debug::query(&self.daemon, &arguments)
    }

    async fn nbd_server_start(&self, arguments: NbdServerStart) -> Outcome<Empty> {
        block_export::start_server(&self.daemon, arguments).await
    }
    async fn nbd_server_stop(&self, arguments: NbdServerStop) -> Outcome<Empty> {
        block_export::stop_server(&self.daemon, arguments).await
    }
    async fn query_nbd_servers(&self, _: Empty) -> Outcome<Vec<NbdServerInfo>> {
        Ok(self.daemon.nbd.query(&self.daemon))
    }
    async fn nbd_server_add(&self, arguments: NbdServerAdd) -> Outcome<Empty> {
        block_export::add_nbd(&self.daemon, arguments).await
    }
    async fn nbd_server_remove(&self, arguments: NbdServerRemove) -> Outcome<Empty> {
        block_export::remove_nbd(&self.daemon, &arguments).await
    }
    async fn block_export_add(&self, options: BlockExportOptions) -> Outcome<Empty> {
        block_export::add(&self.daemon, options).await
    }
    async fn block_export_del(&self, arguments: BlockExportDel) -> Outcome<Empty> {
        block_export::delete(&self.daemon, &arguments).await
    }
    async fn query_block_exports(&self, _: Empty) -> Outcome<Vec<BlockExportInfo>> {
        Ok(self.daemon.exports.query())
    }
    async fn query_export_stats(&self, _: Empty) -> Outcome<Vec<BlockExportStats>> {
        Ok(self.daemon.exports.query_stats())
    }
    async fn query_blockstats(&self, arguments: QueryBlockstats) -> Outcome<Vec<BlockStats>> {
        Ok(stats::query(&self.daemon, &arguments))
    }

    async fn getfd(&self, arguments: Getfd) -> Outcome<Empty> {
        fdset::get(self, &arguments)
    }
    async fn closefd(&self, arguments: Closefd) -> Outcome<Empty> {
        fdset::close(&self.daemon, &arguments)
    }
    async fn add_fd(&self, arguments: AddFd) -> Outcome<AddfdInfo> {
        fdset::add(self, arguments)
    }
    async fn remove_fd(&self, arguments: RemoveFd) -> Outcome<Empty> {
        fdset::remove(&self.daemon, &arguments)
    }
    async fn query_fdsets(&self, _: Empty) -> Outcome<Vec<FdsetInfo>> {
        Ok(self.daemon.descriptors.borrow().query())
    }

    async fn object_add(&self, options: ObjectOptions) -> Outcome<Empty> {
        crate::objects::add(&self.daemon, options)
            .await
            .map(|()| Empty {})
    }
    async fn object_del(&self, arguments: ObjectDel) -> Outcome<Empty> {
        let by = self.monitor.as_deref();
        crate::objects::delete(&self.daemon, &arguments.id, by).map(|()| Empty {})
    }
    async fn qom_list(&self, arguments: QomList) -> Outcome<Vec<ObjectPropertyInfo>> {
        qom::list(&self.daemon, &arguments.path)
    }
    async fn qom_get(&self, arguments: QomGet) -> Outcome<Value> {
        qom::get(&self.daemon, &arguments)
    }
    async fn qom_set(&self, arguments: QomSet) -> Outcome<Empty> {
        qom::set(&self.daemon, arguments).await
    }
    async fn qom_list_get(&self, arguments: QomListGet) -> Outcome<Vec<ObjectPropertiesValues>> {
        qom::list_get(&self.daemon, &arguments)
    }
    async fn qom_list_types(&self, arguments: QomListTypes) -> Outcome<Vec<ObjectTypeInfo>> {
        Ok(qom_types::list(&arguments))
    }
    async fn qom_list_properties(
        &self,
        arguments: QomListProperties,
    ) -> Outcome<Vec<ObjectPropertyInfo>> {
        qom_types::properties(&arguments.typename)
    }
    async fn query_iothreads(&self, _: Empty) -> Outcome<Vec<IOThreadInfo>> {
        Ok(qom::iothreads(&self.daemon))
    }
    async fn x_authz_check(&self, arguments: AuthzCheck) -> Outcome<AuthzDecision> {
        authz::check(&self.daemon, arguments).await
    }
    async fn query_authz(&self, _: Empty) -> Outcome<Vec<AuthzInfo>> {
        Ok(authz::query(&self.daemon))
    }
    async fn query_plugins(&self, _: Empty) -> Outcome<Vec<PluginInfo>> {
        plugin::query(&self.daemon)
    }

    async fn chardev_add(&self, arguments: ChardevAdd) -> Outcome<ChardevReturn> {
        char::add(&self.daemon, arguments).await
    }
    async fn chardev_remove(&self, arguments: ChardevRemove) -> Outcome<Empty> {
        char::remove(&self.daemon, &arguments)
    }
    async fn query_chardev(&self, _: Empty) -> Outcome<Vec<ChardevInfo>> {
        Ok(self.daemon.chardevs.borrow().query())
    }
    async fn query_chardev_backends(&self, _: Empty) -> Outcome<Vec<ChardevBackendInfo>> {
        Ok(char::backends())
    }

    async fn query_jobs(&self, _: Empty) -> Outcome<Vec<JobInfo>> {
        Ok(self.daemon.jobs.query())
    }
    async fn query_block_jobs(&self, _: Empty) -> Outcome<Vec<BlockJobInfo>> {
        Ok(Vec::new())
    }
    async fn job_cancel(&self, job: JobId) -> Outcome<Empty> {
        self.daemon.jobs.cancel(&job.id).map(|()| Empty {})
    }
    async fn job_pause(&self, job: JobId) -> Outcome<Empty> {
        self.daemon.jobs.pause(&job.id).map(|()| Empty {})
    }
    async fn job_resume(&self, job: JobId) -> Outcome<Empty> {
        self.daemon.jobs.resume(&job.id).map(|()| Empty {})
    }
    async fn job_complete(&self, job: JobId) -> Outcome<Empty> {
        self.daemon.jobs.complete(&job.id).map(|()| Empty {})
    }
    async fn job_finalize(&self, job: JobId) -> Outcome<Empty> {
        self.daemon.jobs.finalize(&job.id).map(|()| Empty {})
    }
    async fn job_dismiss(&self, job: JobId) -> Outcome<Empty> {
        let dismissed = self.daemon.jobs.dismiss(&self.daemon, &job.id);
        dismissed.map(|()| Empty {})
    }
    async fn transaction(&self, arguments: Transaction) -> Outcome<Empty> {
        transaction::run(&self.daemon, arguments).await
    }
}
