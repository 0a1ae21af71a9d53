//! The one macro that defines the types of the protocol.
//!
//! It writes, for each type, the serde side (see the conventions in [`crate::de`]) and the
//! [`Schema`](crate::introspect::Schema) side, so that `query-qmp-schema` cannot say anything else
//! than what is accepted. Four forms, named as QEMU's schema language names them:
//!
//! ```text
//! struct Name { field: Type, other_field: Option<Type> = "other-field" [unstable], }
//! enum Name { Variant = "wire", }
//! alternate Name { Variant(Type) = "<string>", }
//! union Name / Branch on "tag": TagEnum { shared fields } { Variant(Type) = "case", }
//! ```
//!
//! A union becomes a struct of the shared fields with a `branch`; its cases have the variant names
//! of the tag's enum. `open enum` and `else Variant(Type)` admit further values: the names of
//! plugin drivers.

/// The name of a field on the wire: the literal if there is one.
macro_rules! wire_name {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $wire:literal) => {
        $wire
    };
}

/// Defines protocol types; see the module documentation.
macro_rules! qapi {
    () => {};

    (
        $(#[$meta:meta])*
        struct $Name:ident {
            $($(#[$field_meta:meta])*
            $field:ident: $ty:ty $(= $wire:literal)? $([$feature:ident])?),* $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub struct $Name {
            $($(#[$field_meta])*
            $(#[serde(rename = $wire)])?
            #[serde(skip_serializing_if = "crate::introspect::Schema::is_absent")]
            pub $field: $ty,)*
        }

        impl $crate::introspect::Schema for $Name {
            fn describe(types: &mut $crate::introspect::Types) -> String {
                types.object(stringify!($Name), |types| {
                    let _ = &types;
                    vec![$(types.member::<$ty>(
                        wire_name!($field $($wire)?),
                        &[$(stringify!($feature))?],
                    ),)*]
                })
            }
        }

        qapi! { $($rest)* }
    };

    (
        $(#[$meta:meta])*
        enum $Name:ident {
            $($(#[$variant_meta:meta])* $Variant:ident = $wire:literal),* $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
        )]
        pub enum $Name {
            $($(#[$variant_meta])* #[serde(rename = $wire)] $Variant,)*
        }

        impl $Name {
            /// The value's name on the wire.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$Variant => $wire,)*
                }
            }
        }

        impl std::fmt::Display for $Name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl $crate::introspect::Schema for $Name {
            fn describe(types: &mut $crate::introspect::Types) -> String {
                types.enumeration(stringify!($Name), &[$($wire),*])
            }
        }

        qapi! { $($rest)* }
    };

    (
        $(#[$meta:meta])*
        open enum $Name:ident {
            $($(#[$variant_meta:meta])* $Variant:ident = $wire:literal),* ;
            $(#[$other_meta:meta])* else $Other:ident $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub enum $Name {
            $($(#[$variant_meta])* $Variant,)*
            $(#[$other_meta])*
            $Other(String),
        }

        impl $Name {
            /// The names of all values but the open one.
            pub const NAMES: &'static [&'static str] = &[$($wire),*];

            /// The value's name on the wire.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$Variant => $wire,)*
                    Self::$Other(name) => name,
                }
            }
        }

        impl std::fmt::Display for $Name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $Name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $Name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Ok(match text.as_str() {
                    $($wire => Self::$Variant,)*
                    _ => Self::$Other(text),
                })
            }
        }

        impl $crate::introspect::Schema for $Name {
            fn describe(types: &mut $crate::introspect::Types) -> String {
                types.enumeration(stringify!($Name), &[$($wire),*])
            }
        }

        qapi! { $($rest)* }
    };

    (
        $(#[$meta:meta])*
        alternate $Name:ident {
            $($(#[$variant_meta:meta])* $Variant:ident($ty:ty) = $kind:literal),* $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
        pub enum $Name {
            $($(#[$variant_meta])* #[serde(rename = $kind)] $Variant($ty),)*
        }

        impl serde::Serialize for $Name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $(Self::$Variant(value) => value.serialize(serializer),)*
                }
            }
        }

        impl $crate::introspect::Schema for $Name {
            fn describe(types: &mut $crate::introspect::Types) -> String {
                types.alternate(stringify!($Name), |types| {
                    vec![$(<$ty as $crate::introspect::Schema>::describe(types)),*]
                })
            }
        }

        qapi! { $($rest)* }
    };

    (
        $(#[$meta:meta])*
        union $Name:ident / $(#[$branch_meta:meta])* $Branch:ident on $tag:literal: $Tag:ident {
            $($(#[$field_meta:meta])*
            $field:ident: $ty:ty $(= $wire:literal)? $([$feature:ident])?),* $(,)?
        } {
            $($(#[$variant_meta:meta])* $Variant:ident($case_ty:ty) = $case:literal),*
            $(; $(#[$other_meta:meta])* else $Other:ident($Else:ty))? $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
        pub struct $Name {
            $($(#[$field_meta])*
            $(#[serde(rename = $wire)])?
            #[serde(skip_serializing_if = "crate::introspect::Schema::is_absent")]
            pub $field: $ty,)*
            #[doc = concat!("What `", $tag, "` chose, with the members that only this case has.")]
            #[serde(flatten)]
            pub branch: $Branch,
        }

        $(#[$branch_meta])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
        #[serde(tag = $tag)]
        pub enum $Branch {
            $($(#[$variant_meta])* #[serde(rename = $case)] $Variant($case_ty),)*
            $($(#[$other_meta])* #[serde(untagged)] $Other($Else),)?
        }

        impl $Branch {
            #[doc = concat!("The value of `", $tag, "` that chose it.")]
            pub fn tag(&self) -> &str {
                match self {
                    $(Self::$Variant(_) => $case,)*
                    $(Self::$Other(other) => other.tag(),)?
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $Name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct InOrder;

                impl<'de> serde::de::Visitor<'de> for InOrder {
                    type Value = $Name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str(stringify!($Name))
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(
                        self,
                        mut members: A,
                    ) -> Result<$Name, A::Error> {
                        let tag: $Tag = $crate::de::next_member(&mut members)?;
                        $(let $field: $ty = $crate::de::next_member(&mut members)?;)*
                        let branch = match tag {
                            $($Tag::$Variant => {
                                $Branch::$Variant($crate::de::next_member(&mut members)?)
                            })*
                            $($Tag::$Other(name) => {
                                let members = $crate::de::next_member(&mut members)?;
                                $Branch::$Other(<$Else>::new(name, members))
                            })?
                        };
                        Ok($Name { $($field,)* branch })
                    }
                }

                const FIELDS: &[&str] = &[
                    $tag,
                    $(wire_name!($field $($wire)?),)*
                    $crate::de::REST,
                ];
                deserializer.deserialize_struct(stringify!($Name), FIELDS, InOrder)
            }
        }

        impl $crate::introspect::Schema for $Name {
            fn describe(types: &mut $crate::introspect::Types) -> String {
                types.union(
                    stringify!($Name),
                    $tag,
                    |types| vec![
                        types.member::<$Tag>($tag, &[]),
                        $(types.member::<$ty>(
                            wire_name!($field $($wire)?),
                            &[$(stringify!($feature))?],
                        ),)*
                    ],
                    |types| vec![
                        $(($case, <$case_ty as $crate::introspect::Schema>::describe(types)),)*
                    ],
                )
            }
        }

        qapi! { $($rest)* }
    };
}
