//! Alternates: the JSON type of the value chooses the variant.

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, EnumAccess, IntoDeserializer, Unexpected, VariantAccess, Visitor,
};
use serde_json::Value;

use super::node::Node;
use crate::error::Error;

/// The variant name that stands for the JSON type of `value`.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "<null>",
        Value::Bool(_) => "<boolean>",
        Value::Number(_) => "<number>",
        Value::String(_) => "<string>",
        Value::Array(_) => "<array>",
        Value::Object(_) => "<object>",
    }
}

/// The chosen variant and the value that is its content.
pub(super) struct Choice<'v, 'p> {
    pub(super) kind: &'static str,
    pub(super) node: Node<'v, 'p>,
}

impl<'de, 'v, 'p> EnumAccess<'de> for Choice<'v, 'p> {
    type Error = Error;
    type Variant = Content<'v, 'p>;

    fn variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<(T::Value, Content<'v, 'p>), Error> {
        let kind: StrDeserializer<'_, Error> = self.kind.into_deserializer();
        Ok((seed.deserialize(kind)?, Content(self.node)))
    }
}

/// The content of an alternate's variant, which is always one value.
pub(super) struct Content<'v, 'p>(Node<'v, 'p>);

impl<'de> VariantAccess<'de> for Content<'_, '_> {
    type Error = Error;

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(self.0)
    }

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Error> {
        Err(serde::de::Error::invalid_type(
            Unexpected::TupleVariant,
            &visitor,
        ))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        Err(serde::de::Error::invalid_type(
            Unexpected::StructVariant,
            &visitor,
        ))
    }
}
