//! One value that is present, with the path that leads to it.

use serde::de::value::{StrDeserializer, U64Deserializer};
use serde::de::{DeserializeSeed, Deserializer, IntoDeserializer, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::Value;

use super::object::Object;
use super::path::Path;
use super::variant::{Choice, kind_of};
use super::{DEPTH_MAX, Mode};
use crate::error::Error;

/// A value to read, where it stands, and how its scalars are spelled.
#[derive(Clone, Copy)]
pub(super) struct Node<'v, 'p> {
    pub(super) value: &'v Value,
    pub(super) path: Path<'p>,
    pub(super) mode: Mode,
}

impl<'v, 'p> Node<'v, 'p> {
    pub(super) fn new(value: &'v Value, path: Path<'p>, mode: Mode) -> Self {
        Self { value, path, mode }
    }

    /// The object that this value has to be.
    fn object(&self) -> Result<Object<'v, 'p>, Error> {
        let Value::Object(members) = self.value else {
            return Err(self.invalid_type("object"));
        };
        if self.path.depth() > DEPTH_MAX {
            let leaf = self.path.leaf();
            return Err(Error::generic(format!(
                "Parameter '{leaf}' is nested too deeply"
            )));
        }
        Ok(Object::new(members, self.path, self.mode))
    }
}

/// Integers differ only in their width and in the C type that QEMU names.
macro_rules! integers {
    ($($method:ident $visit:ident $read:ident $c_type:literal)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit(self.narrow(self.$read()?, $c_type)?)
        })*
    };
}

impl<'de> Deserializer<'de> for Node<'_, '_> {
    type Error = Error;

    integers! {
        deserialize_i8 visit_i8 signed "int8_t"
        deserialize_i16 visit_i16 signed "int16_t"
        deserialize_i32 visit_i32 signed "int32_t"
        deserialize_i64 visit_i64 signed "int64_t"
        deserialize_u8 visit_u8 unsigned "uint8_t"
        deserialize_u16 visit_u16 unsigned "uint16_t"
        deserialize_u32 visit_u32 unsigned "uint32_t"
        deserialize_u64 visit_u64 unsigned "uint64_t"
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.boolean()?)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f64(self.number()?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Null => visitor.visit_unit(),
            _ => Err(self.invalid_type("null")),
        }
    }

    /// Present is present: an explicit `null` is a value, and mostly one of the wrong type.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        if name != crate::types::SIZE {
            return visitor.visit_newtype_struct(self);
        }
        let size: U64Deserializer<Error> = self.size()?.into_deserializer();
        visitor.visit_newtype_struct(size)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Array(elements) => visitor.visit_seq(Elements {
                node: &self,
                elements,
                next: 0,
            }),
            _ => Err(self.invalid_type("array")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.object()?.deserialize_struct(name, fields, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.object()?.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if variants
            .first()
            .is_some_and(|variant| variant.starts_with('<'))
        {
            let kind = kind_of(self.value);
            if !variants.contains(&kind) {
                return Err(Error::invalid_type(self.path.leaf(), name));
            }
            return visitor.visit_enum(Choice { kind, node: self });
        }
        let text = self.text()?;
        if !variants.contains(&text) {
            return Err(Error::bad_enum(self.path.leaf(), text));
        }
        let text: StrDeserializer<'_, Error> = text.into_deserializer();
        visitor.visit_enum(text)
    }

    /// A value without a declared type, copied as it is.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::String(text) => visitor.visit_str(text),
            Value::Array(elements) => visitor.visit_seq(Elements {
                node: &self,
                elements,
                next: 0,
            }),
            Value::Object(_) => self.object()?.deserialize_map(visitor),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(value), _) => visitor.visit_u64(value),
                (_, Some(value)) => visitor.visit_i64(value),
                _ => visitor.visit_f64(self.number()?),
            },
        }
    }

    forward_to_deserialize_any! {
        i128 u128 f32 char bytes byte_buf unit_struct tuple tuple_struct identifier ignored_any
    }
}

/// The elements of a list, in order.
struct Elements<'a, 'v, 'p> {
    node: &'a Node<'v, 'p>,
    elements: &'v [Value],
    next: usize,
}

impl<'de> SeqAccess<'de> for Elements<'_, '_, '_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let Some(value) = self.elements.get(self.next) else {
            return Ok(None);
        };
        let path = self.node.path.index(self.next);
        self.next += 1;
        seed.deserialize(Node::new(value, path, self.node.mode))
            .map(Some)
    }
}
