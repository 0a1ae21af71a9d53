//! [`WasmContextOnDemand`]: a context of the host's own namespace, which a bundled plugin brings.
//!
//! Most clients never ask for it, so its instance is made by the first that does, on that client's
//! iothread. Invariant: it has the name that it was asked for, and no other.

use std::fmt;
use std::sync::Arc;

use outport_block::metacontext::{ContextExtent, ContextProvider};
use outport_block::node::NodeFuture;
use outport_block::view::NodeView;
use outport_block::{ByteRange, Errno};
use tokio::sync::OnceCell;

use crate::provider::{WasmContext, WasmProviderFactory};

impl WasmProviderFactory {
    /// The context `name` of the host's own namespace, of an instance with these options that is
    /// made when somebody asks first.
    #[must_use]
    pub fn on_demand(
        self: &Arc<Self>,
        id: &str,
        name: &str,
        options: String,
        view: Arc<dyn NodeView>,
    ) -> WasmContextOnDemand {
        WasmContextOnDemand {
            factory: Arc::clone(self),
            export: id.to_owned(),
            name: name.to_owned(),
            options,
            view,
            opened: OnceCell::new(),
        }
    }
}

/// A context whose instance is made when somebody asks first: most clients never do.
pub struct WasmContextOnDemand {
    factory: Arc<WasmProviderFactory>,
    export: String,
    name: String,
    options: String,
    view: Arc<dyn NodeView>,
    opened: OnceCell<Arc<WasmContext>>,
}

impl WasmContextOnDemand {
    async fn open(&self) -> Result<Arc<WasmContext>, Errno> {
        let (factory, name) = (&self.factory, Some(self.name.as_str()));
        let opened = factory.open_as(&self.export, &self.options, self.view.clone(), name);
        let opened = opened.await.map_err(|error| {
            tracing::warn!(export = self.export, context = self.name, %error, "no context");
            error.errno()
        })?;
        let found = opened.into_iter().find(|it| it.name() == self.name);
        found.ok_or(Errno::Io)
    }
}

impl ContextProvider for WasmContextOnDemand {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_offered(&self) -> bool {
        self.opened.get().is_none_or(|context| context.is_offered())
    }

    fn extents(&self, range: ByteRange, extents_max: usize) -> NodeFuture<'_, Vec<ContextExtent>> {
        Box::pin(async move {
            let context = self.opened.get_or_try_init(|| self.open()).await?;
            context.extents(range, extents_max).await
        })
    }
}

impl fmt::Debug for WasmContextOnDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WasmContextOnDemand")
            .field("name", &self.name)
            .field("export", &self.export)
            .finish_non_exhaustive()
    }
}
