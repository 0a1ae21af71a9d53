//! The control path's error: a kind to match on and a sentence to show.

use std::fmt;

/// What sort of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file or node is not there.
    NotFound,
    /// Someone else holds it, or permissions conflict.
    InUse,
    /// An argument is wrong.
    Invalid,
    /// The image or the host lacks the feature.
    Unsupported,
    /// The image is damaged.
    Corrupt,
    /// A plugin broke its contract.
    Plugin,
    /// Anything else the system reported.
    Io,
}

/// A failed control operation. The message is complete: it names the thing and,
/// where there is one, the next step. QEMU's sentence where QEMU has one.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of this kind with this sentence.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// What caused it, for logs.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What sort of failure.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_ref()
            .map(|s| s.as_ref() as &(dyn std::error::Error + 'static))
    }
}

/// The result of a control operation.
pub type Result<T> = std::result::Result<T, Error>;
