//! Where in the arguments a value stands, as QEMU's sentences name it.

use super::Mode;

/// A linked list from a value up to the root; it lives on the stack of the deserializer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Path<'p> {
    parent: Option<&'p Path<'p>>,
    step: Step<'p>,
    depth: usize,
}

#[derive(Debug, Clone, Copy)]
enum Step<'p> {
    Root,
    Member(&'p str),
    Index(usize),
}

impl<'p> Path<'p> {
    pub(super) const ROOT: Path<'static> = Path {
        parent: None,
        step: Step::Root,
        depth: 0,
    };

    pub(super) fn member(&'p self, name: &'p str) -> Path<'p> {
        Path {
            parent: Some(self),
            step: Step::Member(name),
            depth: self.depth + 1,
        }
    }

    pub(super) fn index(&'p self, index: usize) -> Path<'p> {
        Path {
            parent: Some(self),
            step: Step::Index(index),
            depth: self.depth + 1,
        }
    }

    /// How many steps lead here from the root.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// The whole path: `a.b[0].c` for JSON, `a.b.0.c` for key=value options, which is how the
    /// person who wrote them spelled it.
    pub(super) fn full(&self, mode: Mode) -> String {
        let mut text = match self.parent {
            Some(parent) => parent.full(mode),
            None => String::new(),
        };
        match self.step {
            Step::Root => {}
            Step::Member(name) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(name);
            }
            Step::Index(index) if mode == Mode::Keyval => text.push_str(&format!(".{index}")),
            Step::Index(index) => text.push_str(&format!("[{index}]")),
        }
        text
    }

    /// The last member name. QEMU gives list elements no name and prints that as `null`.
    pub(super) fn leaf(&self) -> &'p str {
        match self.step {
            Step::Member(name) => name,
            Step::Root | Step::Index(_) => "null",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_spells_list_elements_its_own_way() {
        let a = Path::ROOT.member("a");
        let element = a.index(3);
        let leaf = element.member("c");
        assert_eq!(leaf.full(Mode::Typed), "a[3].c");
        assert_eq!(leaf.full(Mode::Keyval), "a.3.c");
        assert_eq!(leaf.leaf(), "c");
        assert_eq!(element.leaf(), "null");
    }
}
