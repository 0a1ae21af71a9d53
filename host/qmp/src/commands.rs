//! The commands: one table that drives everything which knows them.
//!
//! A line gives the handler's method, the name on the wire, the argument type, the result type and
//! features. From it come [`Command`] (typed arguments), [`Handler`] (one method per command, typed
//! results), `query-commands` and `query-qmp-schema`. To add a command, add a line and a method.

use std::future::Future;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::de::{self, Mode};
use crate::error::Error;
use crate::introspect::Types;
use crate::types::Empty;
use crate::types::block_bitmap::{
    BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapSha256,
};
use crate::types::block_core::*;
use crate::types::block_create::BlockdevCreate;
use crate::types::block_debug::{
    BlkdebugBreak, BlkdebugInfo, BlkdebugRemoveBreak, BlkdebugResume, QueryBlkdebug,
};
use crate::types::block_export::*;
use crate::types::block_graph::XDbgBlockGraph;
use crate::types::block_info::{BlockDeviceInfo, BlockInfo};
use crate::types::block_stats::{BlockStats, QueryBlockstats};
use crate::types::char::*;
use crate::types::control::{AllowPaths, CommandInfo, ConfigCommand, QmpCapabilities, VersionInfo};
use crate::types::fdset::*;
use crate::types::introspect::SchemaInfo;
use crate::types::job::{BlockJobInfo, JobId, JobInfo};
use crate::types::plugin::PluginInfo;
use crate::types::qom::*;
use crate::types::transaction::Transaction;

macro_rules! commands {
    ($(
        $(#[$meta:meta])*
        $Name:ident $method:ident $wire:literal ($Arguments:ty) -> $Return:ty $([$feature:ident])?;
    )*) => {
        /// A command whose arguments were read: what is left to check is what it refers to.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Command {
            $($(#[$meta])* $Name($Arguments),)*
        }

        impl Command {
            /// Every command's name, in the order of the table.
            pub const NAMES: &'static [&'static str] = &[$($wire),*];

            /// Reads the command `name`.
            ///
            /// # Errors
            /// Class `CommandNotFound` for a name that no command has; otherwise the first
            /// offence of the arguments in schema order (spec 1.4).
            pub fn from_request(name: &str, arguments: &Map<String, Value>) -> Result<Self, Error> {
                match name {
                    $($wire => de::from_arguments(arguments, Mode::Typed).map(Self::$Name),)*
                    _ => Err(Error::unknown_command(name)),
                }
            }

            /// The command's name on the wire.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$Name(_) => $wire,)*
                }
            }

            /// The arguments as a client sends them.
            pub fn arguments(&self) -> Value {
                match self {
                    $(Self::$Name(arguments) => to_value(arguments),)*
                }
            }

            /// Runs the command and returns what its `return` holds.
            ///
            /// # Errors
            /// What the handler's method answers.
            pub async fn run<H: Handler>(self, handler: &H) -> Result<Value, Error> {
                match self {
                    $(Self::$Name(arguments) => {
                        handler.$method(arguments).await.map(|value| to_value(&value))
                    })*
                }
            }
        }

        /// What carries commands out: one method for each line of the table. Implementations write
        /// `async fn`; their futures need not be `Send`, as the control plane is one thread.
        pub trait Handler {
            $($(#[$meta])*
            fn $method(
                &self,
                arguments: $Arguments,
            ) -> impl Future<Output = Result<$Return, Error>>;)*
        }

        /// Only here to show that a handler is a list of methods and that results are typed: lists
        /// the commands and refuses all others.
        #[cfg(test)]
        struct Lists;

        #[cfg(test)]
        impl Handler for Lists {
            $(async fn $method(&self, _: $Arguments) -> Result<$Return, Error> {
                let list = (stringify!($method) == "query_commands").then(command_list);
                let list = list.ok_or_else(Error::no_such_job)?;
                de::from_value(&to_value(&list), Mode::Typed)
            })*
        }

        /// Enters all commands into the schema.
        fn describe(types: &mut Types) {
            $(types.command::<$Arguments, $Return>($wire, &[$(stringify!($feature))?]);)*
        }
    };
}

commands! {
    /// Ends negotiation. The session answers it before negotiation ended; after that it is an
    /// error, which [`crate::envelope::Session`] says.
    QmpCapabilities qmp_capabilities "qmp_capabilities" (QmpCapabilities) -> Empty;
    /// Says which QEMU's schema is spoken.
    QueryVersion query_version "query-version" (Empty) -> VersionInfo;
    /// Lists the commands.
    QueryCommands query_commands "query-commands" (Empty) -> Vec<CommandInfo>;
    /// Lists what the commands take and return.
    QueryQmpSchema query_qmp_schema "query-qmp-schema" (Empty) -> Vec<SchemaInfo>;
    /// Tells the commands that would make what there is now (ours).
    OutportConfig x_outport_config "x-outport-config" (Empty) -> Vec<ConfigCommand> [unstable];
    /// Lets images name files of a directory (ours).
    AllowPaths x_allow_paths "x-allow-paths" (AllowPaths) -> Empty [unstable];
    /// Ends the daemon.
    Quit quit "quit" (Empty) -> Empty;

    /// Adds a node.
    BlockdevAdd blockdev_add "blockdev-add" (BlockdevOptions) -> Empty;
    /// Gives nodes other options.
    BlockdevReopen blockdev_reopen "blockdev-reopen" (BlockdevReopen) -> Empty;
    /// Leaves nodes to somebody else, or takes them back.
    BlockdevSetActive blockdev_set_active "blockdev-set-active" (BlockdevSetActive) -> Empty;
    /// Tells the first write past some place in a node.
    BlockSetWriteThreshold block_set_write_threshold "block-set-write-threshold"
        (BlockSetWriteThreshold) -> Empty;
    /// Deletes a node.
    BlockdevDel blockdev_del "blockdev-del" (BlockdevDel) -> Empty;
    /// Creates an image, as a job.
    BlockdevCreate blockdev_create "blockdev-create" (BlockdevCreate) -> Empty;
    /// Changes the length of a node.
    BlockResize block_resize "block_resize" (BlockResize) -> Empty;
    /// Lists the nodes.
    QueryNamedBlockNodes query_named_block_nodes "query-named-block-nodes"
        (QueryNamedBlockNodes) -> Vec<BlockDeviceInfo>;
    /// Says what the nodes did, oldest first.
    QueryBlockstats query_blockstats "query-blockstats" (QueryBlockstats) -> Vec<BlockStats>;
    /// Moves nodes to an iothread: exports that name none are served there.
    BlockdevSetIothread x_blockdev_set_iothread "x-blockdev-set-iothread"
        (BlockdevSetIothread) -> Empty [unstable];
    /// Tells the graph of nodes.
    XDebugQueryBlockGraph x_debug_query_block_graph "x-debug-query-block-graph"
        (Empty) -> XDbgBlockGraph [unstable];
    /// Lists guest devices, of which there are none.
    QueryBlock query_block "query-block" (QueryBlock) -> Vec<BlockInfo>;

    /// Adds a dirty bitmap to a node.
    BlockDirtyBitmapAdd block_dirty_bitmap_add "block-dirty-bitmap-add"
        (BlockDirtyBitmapAdd) -> Empty;
    /// Removes a dirty bitmap.
    BlockDirtyBitmapRemove block_dirty_bitmap_remove "block-dirty-bitmap-remove"
        (BlockDirtyBitmap) -> Empty;
    /// Makes all of a bitmap clean.
    BlockDirtyBitmapClear block_dirty_bitmap_clear "block-dirty-bitmap-clear"
        (BlockDirtyBitmap) -> Empty;
    /// Lets a bitmap record writes.
    BlockDirtyBitmapEnable block_dirty_bitmap_enable "block-dirty-bitmap-enable"
        (BlockDirtyBitmap) -> Empty;
    /// Lets a bitmap record no writes.
    BlockDirtyBitmapDisable block_dirty_bitmap_disable "block-dirty-bitmap-disable"
        (BlockDirtyBitmap) -> Empty;
    /// Makes dirty what is dirty in others.
    BlockDirtyBitmapMerge block_dirty_bitmap_merge "block-dirty-bitmap-merge"
        (BlockDirtyBitmapMerge) -> Empty;
    /// Tells a digest of a bitmap's bits.
    BlockDirtyBitmapDigest x_debug_block_dirty_bitmap_sha256 "x-debug-block-dirty-bitmap-sha256"
        (BlockDirtyBitmap) -> BlockDirtyBitmapSha256 [unstable];

    /// Holds up the next request that comes to some place (ours).
    BlkdebugBreak x_blkdebug_break "x-blkdebug-break" (BlkdebugBreak) -> Empty [unstable];
    /// Takes such an order back (ours).
    BlkdebugRemoveBreak x_blkdebug_remove_break "x-blkdebug-remove-break"
        (BlkdebugRemoveBreak) -> Empty [unstable];
    /// Lets requests that are held up go on (ours).
    BlkdebugResume x_blkdebug_resume "x-blkdebug-resume" (BlkdebugResume) -> Empty [unstable];
    /// Says which requests are held up (ours).
    QueryBlkdebug x_query_blkdebug "x-query-blkdebug" (QueryBlkdebug) -> BlkdebugInfo [unstable];

    /// Starts the NBD server.
    NbdServerStart nbd_server_start "nbd-server-start" (NbdServerStart) -> Empty;
    /// Stops the NBD server and deletes its exports.
    NbdServerStop nbd_server_stop "nbd-server-stop" (NbdServerStop) -> Empty;
    /// Lists the NBD servers (ours).
    QueryNbdServers query_nbd_servers "query-nbd-servers" (Empty) -> Vec<NbdServerInfo>;
    /// Adds an NBD export.
    NbdServerAdd nbd_server_add "nbd-server-add" (NbdServerAdd) -> Empty [deprecated];
    /// Deletes an NBD export.
    NbdServerRemove nbd_server_remove "nbd-server-remove" (NbdServerRemove) -> Empty [deprecated];
    /// Adds an export.
    BlockExportAdd block_export_add "block-export-add" (BlockExportOptions) -> Empty;
    /// Deletes an export.
    BlockExportDel block_export_del "block-export-del" (BlockExportDel) -> Empty;
    /// Lists the exports, newest first.
    QueryBlockExports query_block_exports "query-block-exports" (Empty) -> Vec<BlockExportInfo>;
    /// Says what the exports did, newest first (ours).
    QueryExportStats query_export_stats "query-export-stats" (Empty) -> Vec<BlockExportStats>;

    /// Names a descriptor that came with the command.
    Getfd getfd "getfd" (Getfd) -> Empty;
    /// Closes a named descriptor.
    Closefd closefd "closefd" (Closefd) -> Empty;
    /// Adds a descriptor that came with the command to a set.
    AddFd add_fd "add-fd" (AddFd) -> AddfdInfo;
    /// Removes descriptors from a set.
    RemoveFd remove_fd "remove-fd" (RemoveFd) -> Empty;
    /// Lists the sets of descriptors.
    QueryFdsets query_fdsets "query-fdsets" (Empty) -> Vec<FdsetInfo>;

    /// Adds an object.
    ObjectAdd object_add "object-add" (ObjectOptions) -> Empty;
    /// Deletes an object.
    ObjectDel object_del "object-del" (ObjectDel) -> Empty;
    /// Lists the properties of an object.
    QomList qom_list "qom-list" (QomList) -> Vec<ObjectPropertyInfo>;
    /// Reads a property of an object.
    QomGet qom_get "qom-get" (QomGet) -> Value;
    /// Changes a property of an object.
    QomSet qom_set "qom-set" (QomSet) -> Empty;
    /// Reads all properties of several objects.
    QomListGet qom_list_get "qom-list-get" (QomListGet) -> Vec<ObjectPropertiesValues>;
    /// Lists the types of object.
    QomListTypes qom_list_types "qom-list-types" (QomListTypes) -> Vec<ObjectTypeInfo>;
    /// Lists the properties that objects of a type have.
    QomListProperties qom_list_properties "qom-list-properties"
        (QomListProperties) -> Vec<ObjectPropertyInfo>;
    /// Lists the iothreads.
    QueryIothreads query_iothreads "query-iothreads" (Empty) -> Vec<IOThreadInfo>;
    /// Says whether an authorization object lets somebody in (ours).
    AuthzCheck x_authz_check "x-authz-check" (AuthzCheck) -> AuthzDecision [unstable];
    /// Lists the authorization objects with what they decided (ours).
    QueryAuthz query_authz "query-authz" (Empty) -> Vec<AuthzInfo>;
    /// Lists plugins, bundled ones included (ours).
    QueryPlugins query_plugins "query-plugins" (Empty) -> Vec<PluginInfo>;

    /// Adds a character device.
    ChardevAdd chardev_add "chardev-add" (ChardevAdd) -> ChardevReturn;
    /// Removes a character device.
    ChardevRemove chardev_remove "chardev-remove" (ChardevRemove) -> Empty;
    /// Lists the character devices.
    QueryChardev query_chardev "query-chardev" (Empty) -> Vec<ChardevInfo>;
    /// Lists the kinds of character device.
    QueryChardevBackends query_chardev_backends "query-chardev-backends"
        (Empty) -> Vec<ChardevBackendInfo>;

    /// Lists the jobs.
    QueryJobs query_jobs "query-jobs" (Empty) -> Vec<JobInfo>;
    /// Lists the jobs on guest devices, of which there are none.
    QueryBlockJobs query_block_jobs "query-block-jobs" (Empty) -> Vec<BlockJobInfo>;
    /// Ends a job without success.
    JobCancel job_cancel "job-cancel" (JobId) -> Empty;
    /// Lets a job rest.
    JobPause job_pause "job-pause" (JobId) -> Empty;
    /// Lets a job go on.
    JobResume job_resume "job-resume" (JobId) -> Empty;
    /// Ends a job that is ready.
    JobComplete job_complete "job-complete" (JobId) -> Empty;
    /// Lets a job take effect.
    JobFinalize job_finalize "job-finalize" (JobId) -> Empty;
    /// Forgets a job that concluded.
    JobDismiss job_dismiss "job-dismiss" (JobId) -> Empty;
    /// Makes several changes, all or none.
    Transaction transaction "transaction" (Transaction) -> Empty;
}

/// The result of `query-commands`.
pub fn command_list() -> Vec<CommandInfo> {
    Command::NAMES
        .iter()
        .map(|name| CommandInfo {
            name: (*name).into(),
        })
        .collect()
}

/// The result of `query-qmp-schema`: commands, events, and the types they need.
pub fn schema() -> Vec<SchemaInfo> {
    let mut types = Types::default();
    describe(&mut types);
    crate::events::describe(&mut types);
    types.finish()
}

/// A protocol type as JSON. The types hold nothing that JSON cannot say (string keys, no foreign
/// `Serialize`), so the fallback is never taken.
fn to_value(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

#[cfg(test)]
mod tests;
