//! Three fragments, each exporting what no other does. The macros of
//! [`crate::export`] put them together: `format-ro` is the reader, `format` is
//! reader and writer, `format-full` all three; `wit-component` joins their type
//! sections into exactly that world. So each `Guest` trait exists once.

/// `meta`, `format-reader`, and the imports of a read-only format.
pub mod reader {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "
            package outport:sdk;
            world reader {
                include outport:plugin/format-ro@0.1.0;
            }
        ",
        world: "outport:sdk/reader",
        pub_export_macro: true,
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
            "outport:plugin/types@0.1.0": crate::wasm::bindings::reader::outport::plugin::types,
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
            "outport:plugin/types@0.1.0": crate::wasm::bindings::reader::outport::plugin::types,
        },
        generate_all,
    });
}
