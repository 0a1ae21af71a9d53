//! The one image of this instance, and the panic hook.
//!
//! Each plugin has a place for its own type ([`Instance`], implemented by the
//! export macros). One place for `dyn Any` would do as well, but for the
//! `TypeId`s: they depend on where the sources lie, and equal sources must give
//! equal components.

#![forbid(unsafe_code)]

use super::bindings::about::outport::plugin::{log, types};
use std::cell::{Cell, RefCell};
use std::panic;
use std::thread::LocalKey;

thread_local! {
    static WRITABLE: Cell<bool> = const { Cell::new(false) };
    static HOOKED: Cell<bool> = const { Cell::new(false) };
}

/// A format or policy with a place for what it opened.
pub trait Instance: Sized + 'static {
    /// The place.
    fn place() -> &'static LocalKey<RefCell<Option<Self>>>;
}

/// Every exported call starts here: from now on a panic is logged before it
/// becomes a trap.
pub(super) fn enter() {
    if !HOOKED.replace(true) {
        panic::set_hook(Box::new(|what| {
            log::log(log::Level::Error, &what.to_string())
        }));
    }
}

/// Keep what `open` returned. What is open already stays.
pub(super) fn keep<T: Instance>(opened: T, writable: bool) -> Result<(), types::Error> {
    T::place().with_borrow_mut(|image| match image {
        Some(_) => Err(einval("This instance is open already")),
        None => {
            *image = Some(opened);
            WRITABLE.set(writable);
            Ok(())
        }
    })
}

/// Whether the image was opened writable.
pub(super) fn writable() -> bool {
    WRITABLE.get()
}

/// Run `call` on the open image.
pub(super) fn with<T: Instance, R>(
    call: impl FnOnce(&mut T) -> crate::Result<R>,
) -> Result<R, types::Error> {
    enter();
    T::place().with_borrow_mut(|image| match image {
        Some(image) => call(image).map_err(types::Error::from),
        None => Err(einval("This instance was not opened")),
    })
}

fn einval(message: &str) -> types::Error {
    types::Error {
        code: types::Errno::Einval,
        message: message.to_owned(),
    }
}
