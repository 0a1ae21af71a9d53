//! What each kind of plugin exports, looked up once per plugin and loaded once
//! per instance.

use wasmtime::Store;
use wasmtime::component::{Instance, InstancePre};

use crate::bindings::{
    authz_policy, context_provider, context_rules, format_bitmaps, format_create, format_reader,
    format_takeover, format_writer,
};
use crate::store::HostState;

/// A kind of plugin.
pub(crate) trait World: Sized + Send + Sync + 'static {
    /// The functions of one instance.
    type Guests: Send + Sync + 'static;

    /// Finds the exports of a component.
    fn link(pre: &InstancePre<HostState>) -> wasmtime::Result<Self>;

    /// The functions of `instance`.
    fn load(
        &self,
        store: &mut Store<HostState>,
        instance: &Instance,
    ) -> wasmtime::Result<Self::Guests>;
}

/// An image format: reader, and maybe writer, creator and bitmaps.
pub struct Formats {
    reader: format_reader::GuestIndices,
    pub(crate) writer: Option<format_writer::GuestIndices>,
    pub(crate) creator: Option<format_create::GuestIndices>,
    pub(crate) bitmaps: Option<format_bitmaps::GuestIndices>,
    takeover: Option<format_takeover::GuestIndices>,
}

/// The functions of an image format.
pub(crate) struct FormatGuests {
    pub(crate) reader: format_reader::Guest,
    pub(crate) writer: Option<format_writer::Guest>,
    pub(crate) creator: Option<format_create::Guest>,
    pub(crate) bitmaps: Option<format_bitmaps::Guest>,
    pub(crate) takeover: Option<format_takeover::Guest>,
}

impl World for Formats {
    type Guests = FormatGuests;

    fn link(pre: &InstancePre<HostState>) -> wasmtime::Result<Self> {
        Ok(Self {
            reader: format_reader::GuestIndices::new(pre)?,
            writer: format_writer::GuestIndices::new(pre).ok(),
            creator: format_create::GuestIndices::new(pre).ok(),
            bitmaps: format_bitmaps::GuestIndices::new(pre).ok(),
            takeover: format_takeover::GuestIndices::new(pre).ok(),
        })
    }

    fn load(
        &self,
        store: &mut Store<HostState>,
        instance: &Instance,
    ) -> wasmtime::Result<FormatGuests> {
        let reader = self.reader.load(&mut *store, instance)?;
        let writer = self
            .writer
            .as_ref()
            .map(|w| w.load(&mut *store, instance))
            .transpose()?;
        let creator = self
            .creator
            .as_ref()
            .map(|c| c.load(&mut *store, instance))
            .transpose()?;
        let bitmaps = self
            .bitmaps
            .as_ref()
            .map(|b| b.load(&mut *store, instance))
            .transpose()?;
        let takeover = self
            .takeover
            .as_ref()
            .map(|t| t.load(&mut *store, instance))
            .transpose()?;
        Ok(FormatGuests {
            reader,
            writer,
            creator,
            bitmaps,
            takeover,
        })
    }
}

/// An authorization policy.
pub struct Policies(authz_policy::GuestIndices);

impl World for Policies {
    type Guests = authz_policy::Guest;

    fn link(pre: &InstancePre<HostState>) -> wasmtime::Result<Self> {
        authz_policy::GuestIndices::new(pre).map(Self)
    }

    fn load(
        &self,
        store: &mut Store<HostState>,
        instance: &Instance,
    ) -> wasmtime::Result<authz_policy::Guest> {
        self.0.load(store, instance)
    }
}

/// A provider of metadata contexts, and maybe their rules.
pub struct Providers {
    provider: context_provider::GuestIndices,
    rules: Option<context_rules::GuestIndices>,
}

/// The functions of a provider.
pub(crate) struct ProviderGuests {
    pub(crate) provider: context_provider::Guest,
    pub(crate) rules: Option<context_rules::Guest>,
}

impl World for Providers {
    type Guests = ProviderGuests;

    fn link(pre: &InstancePre<HostState>) -> wasmtime::Result<Self> {
        Ok(Self {
            provider: context_provider::GuestIndices::new(pre)?,
            rules: context_rules::GuestIndices::new(pre).ok(),
        })
    }

    fn load(
        &self,
        store: &mut Store<HostState>,
        instance: &Instance,
    ) -> wasmtime::Result<ProviderGuests> {
        let provider = self.provider.load(&mut *store, instance)?;
        let rules = self
            .rules
            .as_ref()
            .map(|r| r.load(&mut *store, instance))
            .transpose()?;
        Ok(ProviderGuests { provider, rules })
    }
}
