//! What users of a node may do, and what they let others do to it.
//!
//! Pure. A user of a node *requires* some permissions and *shares* some with the other users; two
//! users conflict if one requires what the other does not share. The words are QEMU's, because
//! clients read them.

use outport_block::file::Permissions as LockPermissions;

/// A set of permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Permissions(u8);

impl Permissions {
    pub(crate) const NONE: Self = Self(0);
    /// What is read is what was written.
    pub(crate) const CONSISTENT_READ: Self = Self(1);
    pub(crate) const WRITE: Self = Self(2);
    /// Writing what is there already.
    pub(crate) const WRITE_UNCHANGED: Self = Self(4);
    pub(crate) const RESIZE: Self = Self(8);
    pub(crate) const ALL: Self = Self(15);

    const NAMES: [(Self, &'static str); 4] = [
        (Self::CONSISTENT_READ, "consistent read"),
        (Self::WRITE, "write"),
        (Self::WRITE_UNCHANGED, "write unchanged"),
        (Self::RESIZE, "resize"),
    ];

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// In the block layer's form, for image locks.
    pub(crate) fn as_lock(self) -> LockPermissions {
        let pairs = [
            (Self::CONSISTENT_READ, LockPermissions::CONSISTENT_READ),
            (Self::WRITE, LockPermissions::WRITE),
            (Self::WRITE_UNCHANGED, LockPermissions::WRITE_UNCHANGED),
            (Self::RESIZE, LockPermissions::RESIZE),
        ];
        let held = pairs
            .into_iter()
            .filter(|(one, _)| !self.and(*one).is_empty());
        held.fold(LockPermissions::NONE, |all, (_, lock)| all.union(lock))
    }

    /// `write, resize`.
    pub(crate) fn names(self) -> String {
        let names = Self::NAMES
            .iter()
            .filter(|(one, _)| !self.and(*one).is_empty());
        names.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }
}

/// What one user of a node requires, and what it shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) required: Permissions,
    pub(crate) shared: Permissions,
}

impl Claim {
    /// The claim of nobody.
    pub(crate) const NONE: Self = Self {
        required: Permissions::NONE,
        shared: Permissions::ALL,
    };

    /// What is left of it while the node above is inactive.
    pub(crate) const fn idle(self) -> Self {
        Self {
            required: self.required.and(Permissions::CONSISTENT_READ),
            shared: Permissions::ALL,
        }
    }

    /// Both claims at once.
    pub(crate) const fn with(self, other: Self) -> Self {
        Self {
            required: self.required.or(other.required),
            shared: self.shared.and(other.shared),
        }
    }
}

/// Whether one of these users requires what another one does not share. Takes one look at each, as
/// a node may have thousands of users.
pub(super) fn conflicts(claims: impl Iterator<Item = Claim>) -> bool {
    let (mut required, mut unshared) = (Permissions::NONE, Permissions::NONE);
    for claim in claims {
        let refused = Permissions::ALL.without(claim.shared);
        let met = claim.required.and(unshared).or(refused.and(required));
        if !met.is_empty() {
            return true;
        }
        required = required.or(claim.required);
        unshared = unshared.or(refused);
    }
    false
}

/// How a user's claim comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// An export or a command: as it says.
    Direct(Claim),
    /// An export: as it says, and nothing of a node that is inactive.
    Export {
        claim: Claim,
        /// It puts up with the node becoming inactive.
        allow_inactive: bool,
    },
    /// A format keeps its metadata there: nobody else may change it.
    Storage { writable: bool },
    /// A `raw` node or a filter: what its own users do.
    Filter,
    /// A filter that writes what it reads: content stays as it is.
    Copy,
    /// The same, but an operator changed what it claims.
    Debug {
        take: Permissions,
        unshare: Permissions,
    },
    /// A `raw` node with a fixed place: its storage must keep its length.
    Window,
    /// A backing node: it is only read, and others may change it if the users above allow that.
    Backing,
}

impl Use {
    /// The claim on the child, if the claims on the parent add up to `above`.
    pub(crate) const fn claim(self, above: Claim) -> Claim {
        let read = Permissions::CONSISTENT_READ;
        let change = Permissions::WRITE.or(Permissions::RESIZE);
        let filter = Claim {
            required: above.required,
            shared: above.shared.or(Permissions::WRITE_UNCHANGED),
        };
        match self {
            Self::Direct(claim) | Self::Export { claim, .. } => claim,
            Self::Filter => filter,
            Self::Copy => Claim {
                required: filter.required.or(Permissions::WRITE_UNCHANGED),
                ..filter
            },
            Self::Debug { take, unshare } => Claim {
                required: filter.required.or(take),
                shared: filter.shared.without(unshare),
            },
            Self::Window => Claim {
                shared: filter.shared.without(Permissions::RESIZE),
                ..filter
            },
            Self::Storage { writable } => Claim {
                required: match writable {
                    true => filter.required.or(read).or(change),
                    false => filter.required.or(read),
                },
                shared: filter.shared.without(change),
            },
            Self::Backing => Claim {
                required: above.required.and(read),
                shared: match above.shared.and(Permissions::WRITE).is_empty() {
                    true => read.or(Permissions::WRITE_UNCHANGED),
                    false => Permissions::ALL,
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_keeps_others_from_changing_its_file() {
        let claim = Use::Storage { writable: true }.claim(Claim::NONE);
        assert_eq!(claim.required.names(), "consistent read, write, resize");
        assert_eq!(claim.shared.names(), "consistent read, write unchanged");
    }

    #[test]
    fn users_conflict_as_they_do_in_pairs() {
        let claims: Vec<Claim> = (0..16)
            .flat_map(|bits| (0..4).map(move |two| (bits, two)))
            .map(|(bits, two)| Claim {
                required: Permissions(two | (bits & 1) << 3),
                shared: Permissions(bits),
            })
            .collect();
        for (at, one) in claims.iter().enumerate() {
            for (beside, two) in claims.iter().enumerate() {
                for three in &claims {
                    let all = [*one, *two, *three];
                    let pair = |a: usize, b: usize| {
                        a != b && !all[a].required.without(all[b].shared).is_empty()
                    };
                    let slow = (0..3).any(|a| (0..3).any(|b| pair(a, b)));
                    assert_eq!(conflicts(all.into_iter()), slow, "{at} {beside} {three:?}");
                }
            }
        }
    }

    #[test]
    fn raw_passes_on_what_is_done_to_it() {
        let export = Claim {
            required: Permissions::CONSISTENT_READ.or(Permissions::WRITE),
            shared: Permissions::ALL.without(Permissions::RESIZE),
        };
        assert_eq!(Use::Filter.claim(export), export);
        assert_eq!(Use::Filter.claim(Claim::NONE), Claim::NONE);
        assert_eq!(
            Use::Window.claim(Claim::NONE).shared.names(),
            export.shared.names()
        );
        assert_eq!(
            Use::Backing.claim(export).required,
            Permissions::CONSISTENT_READ
        );
    }
}
