//! The one error of a plugin: an errno that reaches the client, and a sentence
//! that reaches the operator.

use std::fmt;

/// What a client can be told (`types.wit`, `errno`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are POSIX's")]
pub enum Errno {
    Eperm,
    Enoent,
    Eio,
    Enomem,
    Eacces,
    Ebusy,
    Eexist,
    Einval,
    Efbig,
    Enospc,
    Erofs,
    Enotsup,
    Eoverflow,
    Ebadmsg,
    Eshutdown,
    Ecanceled,
}

/// A failure: `code` for the client, `message` (one sentence) for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What a client is told.
    pub code: Errno,
    /// What the operator reads in the log and over QMP.
    pub message: String,
}

/// The result of every plugin call.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with this code and sentence.
    pub fn new(code: Errno, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// The image does not follow its format.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Errno::Einval, message)
    }

    /// The image uses a feature that this plugin does not have.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Errno::Enotsup, message)
    }

    /// Reading or writing metadata failed, or its content is damaged.
    pub fn io(message: impl Into<String>) -> Self {
        Self::new(Errno::Eio, message)
    }
}

/// Return [`Error::invalid`] with this sentence, as `format!` makes it, unless the condition
/// holds: `ensure!(magic == MAGIC, "Not a disk of this kind: {magic:#x}");`
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($sentence:tt)+) => {
        if !$condition {
            return Err($crate::Error::invalid(format!($($sentence)+)));
        }
    };
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
