//! The contract in fragments, each exporting what no other does. The macros of
//! [`crate::export`] put them together: `format-ro` is about and reader,
//! `format` is also writer and takeover, `format-full` also creator, `format-full-bitmaps`
//! also bitmaps; `authz` is about and policy, `metadata-context` about and provider,
//! `metadata-context-rules` also rules. `wit-component` joins their
//! type sections into exactly that world. So each `Guest` trait exists once.

/// `meta`, and what every plugin has: the log and the shared types.
pub mod about {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world about {
                import outport:plugin/types@0.1.0;
                import outport:plugin/log@0.1.0;
                export outport:plugin/meta@0.1.0;
            }
        ",
        world: "outport:sdk/about",
        pub_export_macro: true,
        generate_all,
    });
}

/// `format-reader`, and the imports of a read-only format.
pub mod reader {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world reader {
                import outport:plugin/files@0.1.0;
                import outport:plugin/health@0.1.0;
                export outport:plugin/format-reader@0.1.0;
            }
        ",
        world: "outport:sdk/reader",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
        },
        generate_all,
    });
}

/// `format-writer`, and the transaction.
pub mod writer {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world writer {
                import outport:plugin/txn@0.1.0;
                export outport:plugin/format-writer@0.1.0;
            }
        ",
        world: "outport:sdk/writer",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
            "outport:plugin/extents@0.1.0": crate::wasm::bindings::reader::outport::plugin::extents,
        },
        generate_all,
    });
}

/// `format-create`.
pub mod creator {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world creator {
                export outport:plugin/format-create@0.1.0;
            }
        ",
        world: "outport:sdk/creator",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
        },
        generate_all,
    });
}

/// `format-takeover`.
pub mod takeover {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world takeover {
                export outport:plugin/format-takeover@0.1.0;
            }
        ",
        world: "outport:sdk/takeover",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
        },
        generate_all,
    });
}

/// `format-bitmaps`.
pub mod bitmaps {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world bitmaps {
                export outport:plugin/format-bitmaps@0.1.0;
            }
        ",
        world: "outport:sdk/bitmaps",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
        },
        generate_all,
    });
}

/// `authz-policy`, and the files of a policy.
pub mod policy {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world policy {
                import outport:plugin/config-files@0.1.0;
                export outport:plugin/authz-policy@0.1.0;
            }
        ",
        world: "outport:sdk/policy",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
        },
        generate_all,
    });
}

/// `context-provider`, and the view of a node.
pub mod provider {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world provider {
                import outport:plugin/node-view@0.1.0;
                export outport:plugin/context-provider@0.1.0;
            }
        ",
        world: "outport:sdk/provider",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
        },
        generate_all,
    });
}

/// `context-rules`.
pub mod rules {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world rules {
                export outport:plugin/context-rules@0.1.0;
            }
        ",
        world: "outport:sdk/rules",
        pub_export_macro: true,
        with: {
            "outport:plugin/types@0.1.0": crate::wasm::bindings::about::outport::plugin::types,
        },
        generate_all,
    });
}
