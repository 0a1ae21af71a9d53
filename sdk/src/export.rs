//! The macros that turn a plugin's type into a component. On a native target they
//! expand to nothing, so that one source is tested and shipped.

/// Make the component of a read-only format (world `format-ro`):
/// `outport_sdk::export_format_ro!(Simg);`
#[cfg(target_arch = "wasm32")]
#[macro_export]
macro_rules! export_format_ro {
    ($format:ty) => {
        $crate::export_fragments!(ReadOnly<$format>, about, reader);
    };
}

/// Make the component of a writable format (world `format`).
#[cfg(target_arch = "wasm32")]
#[macro_export]
macro_rules! export_format {
    ($format:ty) => {
        $crate::export_fragments!(Writable<$format>, about, reader, writer, takeover);
    };
}

/// Make the component of a format that can also create images (world
/// `format-full`); `bitmaps`: and whose images keep dirty bitmaps (world
/// `format-full-bitmaps`).
#[cfg(target_arch = "wasm32")]
#[macro_export]
macro_rules! export_format_full {
    ($format:ty) => {
        $crate::export_fragments!(Writable<$format>, about, reader, writer, takeover, creator);
    };
    ($format:ty, bitmaps) => {
        $crate::export_fragments!(
            Writable<$format>,
            about,
            reader,
            writer,
            takeover,
            creator,
            bitmaps
        );
    };
}

/// Make the component of a policy (world `authz`):
/// `outport_sdk::export_policy!(OfficeHours);`
#[cfg(target_arch = "wasm32")]
#[macro_export]
macro_rules! export_policy {
    ($policy:ty) => {
        $crate::export_fragments!(Decider<$policy>, about, policy);
    };
}

/// Make the component of a provider of metadata contexts (world
/// `metadata-context`): `outport_sdk::export_contexts!(Heatmap);` With `rules`:
/// of one that also says what its contexts mean (world `metadata-context-rules`).
#[cfg(target_arch = "wasm32")]
#[macro_export]
macro_rules! export_contexts {
    ($provider:ty) => {
        $crate::export_fragments!(Describer<$provider>, about, provider);
    };
    ($provider:ty, rules) => {
        $crate::export_fragments!(Describer<$provider>, about, provider, rules);
    };
}

/// A world is one adapter exported through some fragments of the contract.
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
#[macro_export]
macro_rules! export_fragments {
    ($adapter:ident<$format:ty>, $($fragment:ident),+) => {
        const _: () = {
            use ::std::{cell::RefCell, thread::LocalKey};
            ::std::thread_local! {
                static IMAGE: RefCell<Option<$format>> = const { RefCell::new(None) };
            }
            impl $crate::wasm::Instance for $format {
                fn place() -> &'static LocalKey<RefCell<Option<Self>>> {
                    &IMAGE
                }
            }
            type Exported = $crate::wasm::$adapter<$format>;
            $($crate::wasm::bindings::$fragment::export!(
                Exported with_types_in $crate::wasm::bindings::$fragment
            );)+
        };
    };
}

/// Make the component of a read-only format (world `format-ro`):
/// `outport_sdk::export_format_ro!(Simg);`
#[cfg(not(target_arch = "wasm32"))]
#[macro_export]
macro_rules! export_format_ro {
    ($format:ty) => {};
}

/// Make the component of a writable format (world `format`).
#[cfg(not(target_arch = "wasm32"))]
#[macro_export]
macro_rules! export_format {
    ($format:ty) => {};
}

/// Make the component of a format that can also create images (world
/// `format-full`); `bitmaps`: and whose images keep dirty bitmaps (world
/// `format-full-bitmaps`).
#[cfg(not(target_arch = "wasm32"))]
#[macro_export]
macro_rules! export_format_full {
    ($format:ty $(, bitmaps)?) => {};
}

/// Make the component of a policy (world `authz`):
/// `outport_sdk::export_policy!(OfficeHours);`
#[cfg(not(target_arch = "wasm32"))]
#[macro_export]
macro_rules! export_policy {
    ($policy:ty) => {};
}

/// Make the component of a provider of metadata contexts (world
/// `metadata-context`): `outport_sdk::export_contexts!(Heatmap);` With `rules`:
/// of one that also says what its contexts mean (world `metadata-context-rules`).
#[cfg(not(target_arch = "wasm32"))]
#[macro_export]
macro_rules! export_contexts {
    ($provider:ty $(, rules)?) => {};
}
