//! The one image of this instance, and the panic hook.

#![forbid(unsafe_code)]

use super::bindings::reader::outport::plugin::{log, types};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic;

thread_local! {
    static IMAGE: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
    static WRITABLE: Cell<bool> = const { Cell::new(false) };
    static HOOKED: Cell<bool> = const { Cell::new(false) };
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

/// Keep what `open` returned. An image that is open already stays.
pub(super) fn keep<T: 'static>(opened: T, writable: bool) -> Result<(), types::Error> {
    IMAGE.with_borrow_mut(|image| match image {
        Some(_) => Err(einval("This instance has an image already")),
        None => {
            *image = Some(Box::new(opened));
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
pub(super) fn with<T: 'static, R>(
    call: impl FnOnce(&mut T) -> crate::Result<R>,
) -> Result<R, types::Error> {
    enter();
    IMAGE.with_borrow_mut(
        |image| match image.as_mut().and_then(|i| i.downcast_mut()) {
            Some(image) => call(image).map_err(types::Error::from),
            None => Err(einval("No image is open in this instance")),
        },
    )
}

fn einval(message: &str) -> types::Error {
    types::Error {
        code: types::Errno::Einval,
        message: message.to_owned(),
    }
}
