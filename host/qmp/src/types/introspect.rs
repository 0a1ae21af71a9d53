//! The result of `query-qmp-schema` (QEMU's `introspect.json`).

use serde_json::Value;

qapi! {
    /// Kinds of entry.
    enum SchemaMetaType {
        /// A type that is not built from others.
        Builtin = "builtin",
        /// An enumeration.
        Enum = "enum",
        /// A list.
        Array = "array",
        /// An object.
        Object = "object",
        /// One of several JSON types.
        Alternate = "alternate",
        /// A command.
        Command = "command",
        /// An event.
        Event = "event",
    }

    /// JSON types of built-in types.
    enum JsonType {
        /// A string.
        String = "string",
        /// A number.
        Number = "number",
        /// A number without a fraction.
        Int = "int",
        /// A boolean.
        Boolean = "boolean",
        /// `null`.
        Null = "null",
        /// An object.
        Object = "object",
        /// A list.
        Array = "array",
        /// Anything.
        Value = "value",
    }

    /// An entry of the schema.
    union SchemaInfo / #[doc = "Kinds of entry, with their members."] SchemaInfoBranch
        on "meta-type": SchemaMetaType {
        /// Name of the command or event; of types a number without meaning.
        name: String,
        /// Special features, e.g. `deprecated`.
        features: Option<Vec<String>>,
    } {
        /// A type that is not built from others.
        Builtin(SchemaInfoBuiltin) = "builtin",
        /// An enumeration.
        Enum(SchemaInfoEnum) = "enum",
        /// A list.
        Array(SchemaInfoArray) = "array",
        /// An object.
        Object(SchemaInfoObject) = "object",
        /// One of several JSON types.
        Alternate(SchemaInfoAlternate) = "alternate",
        /// A command.
        Command(SchemaInfoCommand) = "command",
        /// An event.
        Event(SchemaInfoEvent) = "event",
    }

    /// A built-in type.
    struct SchemaInfoBuiltin {
        /// How it looks in JSON.
        json_type: JsonType = "json-type",
    }

    /// A value of an enumeration.
    struct SchemaInfoEnumMember {
        /// The value.
        name: String,
        /// Special features.
        features: Option<Vec<String>>,
    }

    /// An enumeration.
    struct SchemaInfoEnum {
        /// The values.
        members: Vec<SchemaInfoEnumMember>,
        /// Their names only.
        values: Vec<String> [deprecated],
    }

    /// A list.
    struct SchemaInfoArray {
        /// Type of the elements.
        element_type: String = "element-type",
    }

    /// A member of an object.
    struct SchemaInfoObjectMember {
        /// Its name.
        name: String,
        /// Its type.
        r#type: String = "type",
        /// Present if the member is optional; the value says nothing.
        default: Option<Value>,
        /// Special features.
        features: Option<Vec<String>>,
    }

    /// A case of a union.
    struct SchemaInfoObjectVariant {
        /// Value of the tag.
        case: String,
        /// Type of the further members.
        r#type: String = "type",
    }

    /// An object.
    struct SchemaInfoObject {
        /// Members that it always has.
        members: Vec<SchemaInfoObjectMember>,
        /// Member that decides on further ones.
        tag: Option<String>,
        /// Further members, by value of the tag.
        variants: Option<Vec<SchemaInfoObjectVariant>>,
    }

    /// A choice of an alternate.
    struct SchemaInfoAlternateMember {
        /// Its type.
        r#type: String = "type",
    }

    /// One of several JSON types.
    struct SchemaInfoAlternate {
        /// The choices.
        members: Vec<SchemaInfoAlternateMember>,
    }

    /// A command.
    struct SchemaInfoCommand {
        /// Type of the arguments.
        arg_type: String = "arg-type",
        /// Type of the result.
        ret_type: String = "ret-type",
        /// It may be sent with `exec-oob`.
        allow_oob: Option<bool> = "allow-oob",
    }

    /// An event.
    struct SchemaInfoEvent {
        /// Type of the data.
        arg_type: String = "arg-type",
    }
}
