//! Objects: members in declared order, absent ones included, and nothing undeclared.

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IntoDeserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

use super::node::Node;
use super::path::Path;
use super::{Mode, REST};
use crate::error::Error;

/// An object to read; as the branch of a union it leaves the members in `taken` alone.
#[derive(Clone, Copy)]
pub(super) struct Object<'v, 'p> {
    members: &'v Map<String, Value>,
    taken: &'static [&'static str],
    path: Path<'p>,
    mode: Mode,
}

impl<'v, 'p> Object<'v, 'p> {
    pub(super) fn new(members: &'v Map<String, Value>, path: Path<'p>, mode: Mode) -> Self {
        Self {
            members,
            taken: &[],
            path,
            mode,
        }
    }

    /// Fails if a member is neither among `fields` nor taken by the union around this branch.
    fn refuse_undeclared(&self, fields: &[&str]) -> Result<(), Error> {
        let declared = |name: &str| fields.contains(&name) || self.taken.contains(&name);
        match self.members.keys().find(|name| !declared(name)) {
            Some(name) => Err(Error::unexpected(&self.path.member(name).full(self.mode))),
            None => Ok(()),
        }
    }
}

impl<'de> Deserializer<'de> for Object<'_, '_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let value = visitor.visit_map(Declared {
            object: &self,
            fields,
            next: 0,
        })?;
        if fields.last() != Some(&REST) {
            self.refuse_undeclared(fields)?;
        }
        Ok(value)
    }

    /// All members that are left, in no declared order: options that only a plugin knows.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let left = self
            .members
            .iter()
            .filter(|(name, _)| !self.taken.contains(&name.as_str()));
        visitor.visit_map(Remaining {
            members: left,
            path: &self.path,
            mode: self.mode,
            held: None,
        })
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_map(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct enum identifier ignored_any
    }
}

/// The members of a type, one for each of its fields.
struct Declared<'a, 'v, 'p> {
    object: &'a Object<'v, 'p>,
    fields: &'static [&'static str],
    next: usize,
}

impl<'de> MapAccess<'de> for Declared<'_, '_, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some(name) = self.fields.get(self.next) else {
            return Ok(None);
        };
        let name: StrDeserializer<'_, Error> = (*name).into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let object = self.object;
        let name = self.fields.get(self.next).copied().unwrap_or_default();
        if name == REST {
            let taken = &self.fields[..self.next];
            self.next += 1;
            return seed.deserialize(Object { taken, ..*object });
        }
        self.next += 1;
        let path = object.path.member(name);
        match object.members.get(name) {
            Some(value) => seed.deserialize(Node::new(value, path, object.mode)),
            None => seed.deserialize(Absent {
                path,
                mode: object.mode,
            }),
        }
    }
}

/// A declared member that the object does not have: `None`, or an error if it is mandatory.
struct Absent<'p> {
    path: Path<'p>,
    mode: Mode,
}

impl<'de> Deserializer<'de> for Absent<'_> {
    type Error = Error;

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_none()
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::missing(&self.path.full(self.mode)))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// Members without a declaration.
struct Remaining<'a, 'v, I> {
    members: I,
    path: &'a Path<'a>,
    mode: Mode,
    held: Option<(&'v str, &'v Value)>,
}

impl<'de, 'v, I> MapAccess<'de> for Remaining<'_, 'v, I>
where
    I: Iterator<Item = (&'v String, &'v Value)>,
{
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        self.held = self
            .members
            .next()
            .map(|(name, value)| (name.as_str(), value));
        let Some((name, _)) = self.held else {
            return Ok(None);
        };
        let name: StrDeserializer<'_, Error> = name.into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let (name, value) = self
            .held
            .ok_or_else(|| Error::custom("a value without its key"))?;
        seed.deserialize(Node::new(value, self.path.member(name), self.mode))
    }
}
