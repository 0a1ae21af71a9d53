//! `query-qmp-schema`: what the daemon accepts, told from the types that accept it.
//!
//! Every protocol type implements [`Schema`] through the macro that defines it. Clients probe by
//! member names (`block-export-add`, then its arguments, then the case `nbd`, then `bitmaps`), so
//! those equal QEMU's. Type names are masked by numbers, as QEMU masks them: they are no interface.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::types::Size;
use crate::types::introspect::*;

/// A type that can describe itself to `query-qmp-schema`.
pub trait Schema {
    /// Whether an object may lack a member of this type.
    const OPTIONAL: bool = false;

    /// Enters the type, and those it is made of, into `types`; returns its name there.
    fn describe(types: &mut Types) -> String;

    /// Whether a member with this value is left out of the output.
    fn is_absent(&self) -> bool {
        false
    }
}

/// The descriptions collected so far.
#[derive(Debug, Default)]
pub struct Types {
    entries: Vec<SchemaInfo>,
    /// The masked name of each named type; entered before its members, so that cycles end.
    names: HashMap<String, String>,
}

impl Types {
    /// A type that the protocol does not build from others.
    pub fn builtin(&mut self, name: &str, json_type: JsonType) -> String {
        if self.names.insert(name.into(), name.into()).is_none() {
            self.push(
                name,
                SchemaInfoBranch::Builtin(SchemaInfoBuiltin { json_type }),
            );
        }
        name.into()
    }

    /// A list of `element`, which is a name that [`Schema::describe`] returned.
    pub fn array(&mut self, element: String) -> String {
        let name = format!("[{element}]");
        if self.names.insert(name.clone(), name.clone()).is_none() {
            let array = SchemaInfoArray {
                element_type: element,
            };
            self.push(&name, SchemaInfoBranch::Array(array));
        }
        name
    }

    /// An object without variants.
    pub fn object(
        &mut self,
        rust_name: &str,
        members: impl FnOnce(&mut Self) -> Vec<SchemaInfoObjectMember>,
    ) -> String {
        self.define(rust_name, |types| {
            let members = members(types);
            SchemaInfoBranch::Object(SchemaInfoObject {
                members,
                tag: None,
                variants: None,
            })
        })
    }

    /// An object whose further members depend on the value of `tag`.
    pub fn union(
        &mut self,
        rust_name: &str,
        tag: &str,
        members: impl FnOnce(&mut Self) -> Vec<SchemaInfoObjectMember>,
        cases: impl FnOnce(&mut Self) -> Vec<(&'static str, String)>,
    ) -> String {
        self.define(rust_name, |types| {
            let members = members(types);
            let variant = |(case, r#type): (&str, _)| SchemaInfoObjectVariant {
                case: case.into(),
                r#type,
            };
            let variants = Some(cases(types).into_iter().map(variant).collect());
            SchemaInfoBranch::Object(SchemaInfoObject {
                members,
                tag: Some(tag.into()),
                variants,
            })
        })
    }

    /// An enumeration.
    pub fn enumeration(&mut self, rust_name: &str, values: &[&str]) -> String {
        self.define(rust_name, |_| {
            let member = |name: &&str| SchemaInfoEnumMember {
                name: (*name).into(),
                features: None,
            };
            SchemaInfoBranch::Enum(SchemaInfoEnum {
                members: values.iter().map(member).collect(),
                values: values.iter().map(|name| (*name).into()).collect(),
            })
        })
    }

    /// A value that has one of several JSON types.
    pub fn alternate(
        &mut self,
        rust_name: &str,
        members: impl FnOnce(&mut Self) -> Vec<String>,
    ) -> String {
        self.define(rust_name, |types| {
            let member = |r#type| SchemaInfoAlternateMember { r#type };
            let members = members(types).into_iter().map(member).collect();
            SchemaInfoBranch::Alternate(SchemaInfoAlternate { members })
        })
    }

    /// A member of an object.
    pub fn member<T: Schema>(&mut self, name: &str, features: &[&str]) -> SchemaInfoObjectMember {
        SchemaInfoObjectMember {
            name: name.into(),
            r#type: T::describe(self),
            default: T::OPTIONAL.then_some(Value::Null),
            features: list(features),
        }
    }

    /// A command; `ok` is the type of its `return`.
    pub fn command<Arguments: Schema, Return: Schema>(&mut self, name: &str, features: &[&str]) {
        let arg_type = Arguments::describe(self);
        let ret_type = Return::describe(self);
        let command = SchemaInfoCommand {
            arg_type,
            ret_type,
            allow_oob: None,
        };
        let branch = SchemaInfoBranch::Command(command);
        self.entries.push(SchemaInfo {
            name: name.into(),
            features: list(features),
            branch,
        });
    }

    /// An event; `Data` is the type of its `data`.
    pub fn event<Data: Schema>(&mut self, name: &str) {
        let arg_type = Data::describe(self);
        self.push(name, SchemaInfoBranch::Event(SchemaInfoEvent { arg_type }));
    }

    /// Everything that was described: commands and events, then the types they need.
    pub fn finish(self) -> Vec<SchemaInfo> {
        let mut entries = self.entries;
        entries.sort_by_key(|entry| match entry.branch {
            SchemaInfoBranch::Command(_) => 0,
            SchemaInfoBranch::Event(_) => 1,
            _ => 2,
        });
        entries
    }

    fn define(
        &mut self,
        rust_name: &str,
        describe: impl FnOnce(&mut Self) -> SchemaInfoBranch,
    ) -> String {
        if let Some(name) = self.names.get(rust_name) {
            return name.clone();
        }
        let name = self.names.len().to_string();
        self.names.insert(rust_name.into(), name.clone());
        let branch = describe(self);
        self.push(&name, branch);
        name
    }

    fn push(&mut self, name: &str, branch: SchemaInfoBranch) {
        self.entries.push(SchemaInfo {
            name: name.into(),
            features: None,
            branch,
        });
    }
}

fn list(features: &[&str]) -> Option<Vec<String>> {
    let owned = || features.iter().map(|feature| (*feature).into()).collect();
    (!features.is_empty()).then(owned)
}

macro_rules! builtins {
    ($($ty:ty: $name:literal $json:ident,)*) => {
        $(impl Schema for $ty {
            fn describe(types: &mut Types) -> String {
                types.builtin($name, JsonType::$json)
            }
        })*
    };
}

builtins! {
    bool: "bool" Boolean,
    String: "str" String,
    f64: "number" Number,
    i32: "int" Int,
    i64: "int" Int,
    u8: "int" Int,
    u16: "int" Int,
    u32: "int" Int,
    u64: "int" Int,
    Size: "int" Int,
    (): "null" Null,
    Value: "any" Value,
    Map<String, Value>: "any" Value,
}

impl<T: Schema> Schema for Option<T> {
    const OPTIONAL: bool = true;

    fn describe(types: &mut Types) -> String {
        T::describe(types)
    }

    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

impl<T: Schema> Schema for Vec<T> {
    fn describe(types: &mut Types) -> String {
        let element = T::describe(types);
        types.array(element)
    }
}

impl<T: Schema> Schema for Box<T> {
    fn describe(types: &mut Types) -> String {
        T::describe(types)
    }
}
