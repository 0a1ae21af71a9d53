//! TLS with pre-shared keys, by the system's OpenSSL 3.
//!
//! rustls has no external pre-shared keys. The library is not needed to build: it is loaded when
//! the first object asks for it, and stays. Everything `unsafe` about that is in this file; what it
//! offers is safe. A [`Connection`] works on memory: bytes in, bytes out, like rustls.
//!
//! Invariants: a `Connection` is used by one thread at a time and owns its `SSL`, whose two BIOs it
//! owns too; its [`Context`], with the keys that the callbacks read, outlives it.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::fmt;
use std::io::{self, IoSlice, Write};
use std::ptr;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use libloading::Library;

use super::credentials::Endpoint;
use super::priority::Versions;
use super::psk::Keys;
use super::session::{Failure, Plain};

/// The library, by the name that its interface has.
const LIBRARY: &str = "libssl.so.3";

/// Suites of TLS 1.2: forward secrecy first, authenticated encryption where there is some. TLS 1.3
/// has only good ones.
const SUITES: &CStr = c"kECDHEPSK+CHACHA20:kECDHEPSK+AES:kPSK+AESGCM:kPSK+CHACHA20:!eNULL";

/// Encrypted bytes that are taken from the library at once.
const OUTGOING: usize = 68 << 10;

// Of OpenSSL 3's headers.
const CTRL_SESS_CACHE_MODE: c_int = 44;
const CTRL_MIN_PROTO_VERSION: c_int = 123;
const CTRL_MAX_PROTO_VERSION: c_int = 124;
const ERROR_WANT_READ: c_int = 2;
const ERROR_ZERO_RETURN: c_int = 6;
const OP_NO_TICKET: u64 = 1 << 14;
const OP_NO_RENEGOTIATION: u64 = 1 << 30;
/// Where an application keeps its own pointer.
const APP_DATA: c_int = 0;

#[repr(C)]
struct Method(());
#[repr(C)]
struct Ctx(());
#[repr(C)]
struct Ssl(());
#[repr(C)]
struct Bio(());
#[repr(C)]
struct BioMethod(());

type ServerCallback = unsafe extern "C" fn(*mut Ssl, *const c_char, *mut u8, c_uint) -> c_uint;
type ClientCallback =
    unsafe extern "C" fn(*mut Ssl, *const c_char, *mut c_char, c_uint, *mut u8, c_uint) -> c_uint;

/// Declares the functions that are used, and how they are found.
macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        struct Api {
            $($field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            // After the functions that it holds.
            _library: Library,
        }

        impl Api {
            fn find(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of OpenSSL 3's headers, which the library's name
                // promises to keep; the library stays as long as the pointers.
                unsafe {
                    Ok(Self {
                        $($field: {
                            type Function = unsafe extern "C" fn($($argument),*) $(-> $result)?;
                            *library.get::<Function>(concat!($name, "\0"))?
                        },)*
                        _library: library,
                    })
                }
            }
        }
    };
}

functions! {
    method = "TLS_method": fn() -> *const Method;
    ctx_new = "SSL_CTX_new": fn(*const Method) -> *mut Ctx;
    ctx_free = "SSL_CTX_free": fn(*mut Ctx);
    ctx_ctrl = "SSL_CTX_ctrl": fn(*mut Ctx, c_int, c_long, *mut c_void) -> c_long;
    ctx_set_options = "SSL_CTX_set_options": fn(*mut Ctx, u64) -> u64;
    ctx_set_num_tickets = "SSL_CTX_set_num_tickets": fn(*mut Ctx, usize) -> c_int;
    ctx_set_cipher_list = "SSL_CTX_set_cipher_list": fn(*mut Ctx, *const c_char) -> c_int;
    ctx_set_psk_server_callback =
        "SSL_CTX_set_psk_server_callback": fn(*mut Ctx, Option<ServerCallback>);
    ctx_set_psk_client_callback =
        "SSL_CTX_set_psk_client_callback": fn(*mut Ctx, Option<ClientCallback>);
    ssl_new = "SSL_new": fn(*mut Ctx) -> *mut Ssl;
    ssl_free = "SSL_free": fn(*mut Ssl);
    ssl_set_bio = "SSL_set_bio": fn(*mut Ssl, *mut Bio, *mut Bio);
    ssl_set_ex_data = "SSL_set_ex_data": fn(*mut Ssl, c_int, *mut c_void) -> c_int;
    ssl_get_ex_data = "SSL_get_ex_data": fn(*const Ssl, c_int) -> *mut c_void;
    ssl_set_accept_state = "SSL_set_accept_state": fn(*mut Ssl);
    ssl_set_connect_state = "SSL_set_connect_state": fn(*mut Ssl);
    ssl_do_handshake = "SSL_do_handshake": fn(*mut Ssl) -> c_int;
    ssl_is_init_finished = "SSL_is_init_finished": fn(*const Ssl) -> c_int;
    ssl_read = "SSL_read_ex": fn(*mut Ssl, *mut c_void, usize, *mut usize) -> c_int;
    ssl_write = "SSL_write_ex": fn(*mut Ssl, *const c_void, usize, *mut usize) -> c_int;
    ssl_shutdown = "SSL_shutdown": fn(*mut Ssl) -> c_int;
    ssl_get_error = "SSL_get_error": fn(*const Ssl, c_int) -> c_int;
    bio_new = "BIO_new": fn(*const BioMethod) -> *mut Bio;
    bio_s_mem = "BIO_s_mem": fn() -> *const BioMethod;
    bio_free = "BIO_free": fn(*mut Bio) -> c_int;
    bio_read = "BIO_read": fn(*mut Bio, *mut c_void, c_int) -> c_int;
    bio_write = "BIO_write": fn(*mut Bio, *const c_void, c_int) -> c_int;
    bio_pending = "BIO_ctrl_pending": fn(*mut Bio) -> usize;
    err_clear = "ERR_clear_error": fn();
    err_get = "ERR_get_error": fn() -> c_ulong;
    err_string = "ERR_error_string_n": fn(c_ulong, *mut c_char, usize);
}

/// The library, loaded at most once and never let go.
fn api() -> Result<&'static Api, String> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    let loaded = API.get_or_init(|| {
        let missing = |e: libloading::Error| {
            format!("TLS with pre-shared keys needs OpenSSL 3, and {LIBRARY} cannot be loaded: {e}")
        };
        // SAFETY: the initializers of the system's own OpenSSL are made to be run at any time.
        let library = unsafe { Library::new(LIBRARY) }.map_err(missing)?;
        Api::find(library).map_err(missing)
    });
    loaded.as_ref().map_err(Clone::clone)
}

/// What connections are made from.
pub(super) struct Context {
    api: &'static Api,
    ctx: *mut Ctx,
    keys: Keys,
    endpoint: Endpoint,
}

// SAFETY: an `SSL_CTX` may be used from any thread once it is set up, and it is not changed after
// `Context::new`; the keys are only read.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was made by `ctx_new` and is freed once.
        unsafe { (self.api.ctx_free)(self.ctx) }
    }
}

impl Context {
    /// # Errors
    /// The library is not there, or does not want to.
    pub(super) fn new(
        keys: Keys,
        endpoint: Endpoint,
        versions: Versions,
    ) -> Result<Arc<Self>, String> {
        let api = api()?;
        // SAFETY: no arguments but the library's own method.
        let ctx = unsafe { (api.ctx_new)((api.method)()) };
        if ctx.is_null() {
            return Err(reason(api));
        }
        let context = Self {
            api,
            ctx,
            keys,
            endpoint,
        };
        let numbers = versions
            .iter()
            .map(|it| c_long::from(u16::from(it.version)));
        let (oldest, newest) = (numbers.clone().min(), numbers.max());
        // SAFETY: `ctx` is alive and not shared yet; strings are literals; the callbacks have the
        // library's types.
        let done = unsafe {
            let ctrl = |what, value| (api.ctx_ctrl)(ctx, what, value, ptr::null_mut());
            ctrl(CTRL_SESS_CACHE_MODE, 0);
            (api.ctx_set_options)(ctx, OP_NO_TICKET | OP_NO_RENEGOTIATION);
            (api.ctx_set_num_tickets)(ctx, 0);
            match endpoint {
                Endpoint::Server => (api.ctx_set_psk_server_callback)(ctx, Some(on_server)),
                Endpoint::Client => (api.ctx_set_psk_client_callback)(ctx, Some(on_client)),
            }
            (api.ctx_set_cipher_list)(ctx, SUITES.as_ptr()) == 1
                && ctrl(CTRL_MIN_PROTO_VERSION, oldest.unwrap_or(0)) == 1
                && ctrl(CTRL_MAX_PROTO_VERSION, newest.unwrap_or(0)) == 1
        };
        match done {
            true => Ok(Arc::new(context)),
            false => Err(reason(api)),
        }
    }

    pub(super) fn endpoint(&self) -> Endpoint {
        self.endpoint
    }
}

/// The oldest error of this thread, in the library's words.
fn reason(api: &Api) -> String {
    let mut text = [0_u8; 256];
    // SAFETY: the buffer is as long as it is said to be.
    unsafe {
        match (api.err_get)() {
            0 => return "OpenSSL does not say why".to_owned(),
            code => (api.err_string)(code, text.as_mut_ptr().cast(), text.len()),
        }
    }
    let text = CStr::from_bytes_until_nul(&text).unwrap_or_default();
    let text = text.to_string_lossy();
    // error:CODE:LIBRARY:FUNCTION:REASON
    text.splitn(5, ':').last().unwrap_or(&text).to_owned()
}

/// What the callbacks of one connection know and learn.
struct Told {
    context: Arc<Context>,
    /// Whose key was taken.
    user: RefCell<Option<String>>,
}

/// What belongs to this connection; `None` before it was set.
///
/// # Safety
/// `ssl` is an `SSL` of [`Connection::new`], in a call of that connection.
unsafe fn told<'a>(ssl: *mut Ssl) -> Option<&'a Told> {
    let api = api().ok()?;
    // SAFETY: the pointer was put there by `Connection::new` and lives as long as the connection,
    // which nobody else uses during its call.
    unsafe { (api.ssl_get_ex_data)(ssl, APP_DATA).cast::<Told>().as_ref() }
}

/// A client names itself: its key.
unsafe extern "C" fn on_server(
    ssl: *mut Ssl,
    identity: *const c_char,
    key: *mut u8,
    room: c_uint,
) -> c_uint {
    // SAFETY: the library calls this for a connection of ours.
    let Some(told) = (unsafe { told(ssl) }) else {
        return 0;
    };
    if identity.is_null() {
        return 0;
    }
    // SAFETY: a string of the library's that ends with NUL.
    let user = unsafe { CStr::from_ptr(identity) };
    let Some(found) = told.context.keys.get(user.to_bytes()) else {
        return 0;
    };
    if found.len() > room as usize {
        return 0;
    }
    // SAFETY: there is room for as many bytes, and the two do not overlap.
    unsafe { ptr::copy_nonoverlapping(found.as_ptr(), key, found.len()) };
    *told.user.borrow_mut() = Some(user.to_string_lossy().into_owned());
    found.len() as c_uint
}

/// A server asks who we are: the only user of the keys, and their key.
unsafe extern "C" fn on_client(
    ssl: *mut Ssl,
    _hint: *const c_char,
    identity: *mut c_char,
    identity_room: c_uint,
    key: *mut u8,
    room: c_uint,
) -> c_uint {
    // SAFETY: the library calls this for a connection of ours.
    let Some(told) = (unsafe { told(ssl) }) else {
        return 0;
    };
    let Some((user, found)) = told.context.keys.only() else {
        return 0;
    };
    let Ok(user) = CString::new(user) else {
        return 0;
    };
    let user = user.as_bytes_with_nul();
    if user.len() > identity_room as usize || found.len() > room as usize {
        return 0;
    }
    // SAFETY: there is room for as many bytes in both, and they do not overlap.
    unsafe {
        ptr::copy_nonoverlapping(user.as_ptr(), identity.cast(), user.len());
        ptr::copy_nonoverlapping(found.as_ptr(), key, found.len());
    }
    found.len() as c_uint
}

/// One side of a connection.
pub(super) struct Connection {
    ssl: *mut Ssl,
    /// What came from the network; belongs to `ssl`.
    from: *mut Bio,
    /// What goes to it; belongs to `ssl`.
    to: *mut Bio,
    /// The callbacks have its address. Not a `Box`, which says that nobody else has it: moving
    /// one would make their pointer invalid. Never cloned.
    told: Rc<Told>,
    clear: Vec<u8>,
    outgoing: Vec<u8>,
    sent: usize,
}

// SAFETY: an `SSL` may move between threads as long as one at a time uses it, which its owner, who
// needs `&mut`, sees to; `&Connection` only reads. The only `Rc` of `told` moves with it.
unsafe impl Send for Connection {}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: it was made by `ssl_new`, is freed once, and its BIOs with it.
        unsafe { (self.api().ssl_free)(self.ssl) }
    }
}

impl Connection {
    /// # Errors
    /// The library is out of memory.
    pub(super) fn new(context: Arc<Context>) -> Result<Self, String> {
        let api = context.api;
        let endpoint = context.endpoint;
        // SAFETY: the context is alive; what could not be made is not used, and freed.
        let (ssl, from, to) = unsafe {
            let ssl = (api.ssl_new)(context.ctx);
            let from = (api.bio_new)((api.bio_s_mem)());
            let to = (api.bio_new)((api.bio_s_mem)());
            if ssl.is_null() || from.is_null() || to.is_null() {
                // Freeing nothing is nothing.
                (api.ssl_free)(ssl);
                (api.bio_free)(from);
                (api.bio_free)(to);
                return Err(reason(api));
            }
            (api.ssl_set_bio)(ssl, from, to);
            (ssl, from, to)
        };
        let connection = Self {
            ssl,
            from,
            to,
            told: Rc::new(Told {
                context,
                user: RefCell::default(),
            }),
            clear: Vec::new(),
            outgoing: Vec::new(),
            sent: 0,
        };
        let told = Rc::as_ptr(&connection.told).cast_mut();
        // SAFETY: `ssl` is alive; what the pointer is of stays where it is until `ssl` is freed,
        // and is only read through it.
        unsafe {
            (api.ssl_set_ex_data)(ssl, APP_DATA, told.cast());
            match endpoint {
                Endpoint::Server => (api.ssl_set_accept_state)(ssl),
                Endpoint::Client => (api.ssl_set_connect_state)(ssl),
            }
        }
        Ok(connection)
    }

    fn api(&self) -> &'static Api {
        self.told.context.api
    }

    /// What a call that returned `code` means; `None`: it needs more from the network.
    fn failure(&self, code: c_int) -> Option<Failure> {
        // SAFETY: `ssl` is alive, and this thread made the call just now.
        match unsafe { (self.api().ssl_get_error)(self.ssl, code) } {
            ERROR_WANT_READ => None,
            ERROR_ZERO_RETURN => Some(Failure::new("the other side said goodbye")),
            _ => Some(Failure::new(&reason(self.api()))),
        }
    }

    pub(super) fn is_handshaking(&self) -> bool {
        // SAFETY: `ssl` is alive.
        unsafe { (self.api().ssl_is_init_finished)(self.ssl) == 0 }
    }

    /// Goes on with the handshake.
    pub(super) fn shake(&mut self) -> Result<(), Failure> {
        // SAFETY: `ssl` is alive.
        let code = unsafe {
            (self.api().err_clear)();
            (self.api().ssl_do_handshake)(self.ssl)
        };
        if code == 1 {
            return Ok(());
        }
        self.failure(code).map_or(Ok(()), Err)
    }

    /// Takes bytes from the network; all of them.
    pub(super) fn received(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let len = c_int::try_from(bytes.len()).map_err(|_| Failure::new("too much at once"))?;
        // SAFETY: the BIO is alive, the slice as long as it is said to be.
        let taken = unsafe { (self.api().bio_write)(self.from, bytes.as_ptr().cast(), len) };
        match taken == len {
            true => Ok(()),
            false => Err(Failure::new(&reason(self.api()))),
        }
    }

    /// Plaintext that came.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<Plain, Failure> {
        let mut len = 0;
        // SAFETY: `ssl` is alive, the slice as long as it is said to be.
        let code = unsafe {
            (self.api().err_clear)();
            let into_ptr = into.as_mut_ptr().cast();
            (self.api().ssl_read)(self.ssl, into_ptr, into.len(), &raw mut len)
        };
        if code == 1 {
            return Ok(Plain::Bytes(len));
        }
        // SAFETY: as above.
        if unsafe { (self.api().ssl_get_error)(self.ssl, code) } == ERROR_ZERO_RETURN {
            return Ok(Plain::End);
        }
        self.failure(code).map_or(Ok(Plain::Nothing), Err)
    }

    /// Takes plaintext, all pieces as one.
    pub(super) fn write(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize, Failure> {
        self.clear.clear();
        for piece in pieces {
            self.clear.extend_from_slice(piece);
        }
        if self.clear.is_empty() {
            return Ok(0);
        }
        let mut len = 0;
        // SAFETY: `ssl` is alive, the vector as long as it is said to be.
        let code = unsafe {
            (self.api().err_clear)();
            let from = self.clear.as_ptr().cast();
            (self.api().ssl_write)(self.ssl, from, self.clear.len(), &raw mut len)
        };
        if code == 1 {
            return Ok(len);
        }
        Err(self
            .failure(code)
            .unwrap_or_else(|| Failure::new("TLS cannot be written to")))
    }

    fn pending(&self) -> usize {
        // SAFETY: the BIO is alive.
        unsafe { (self.api().bio_pending)(self.to) }
    }

    pub(super) fn wants_send(&self) -> bool {
        self.sent < self.outgoing.len() || self.pending() > 0
    }

    /// Gives the network one piece.
    pub(super) fn send(&mut self, to: &mut dyn Write) -> io::Result<usize> {
        if self.sent == self.outgoing.len() {
            self.sent = 0;
            let room = self.pending().min(OUTGOING);
            self.outgoing.resize(room, 0);
            // SAFETY: the BIO is alive, the vector as long as it is said to be.
            let len = unsafe {
                let room = room as c_int;
                (self.api().bio_read)(self.to, self.outgoing.as_mut_ptr().cast(), room)
            };
            self.outgoing.truncate(usize::try_from(len).unwrap_or(0));
        }
        let sent = to.write(&self.outgoing[self.sent..])?;
        self.sent += sent;
        Ok(sent)
    }

    pub(super) fn say_goodbye(&mut self) {
        if !self.is_handshaking() {
            // SAFETY: `ssl` is alive; it only writes into its BIO.
            unsafe {
                (self.api().err_clear)();
                (self.api().ssl_shutdown)(self.ssl);
            }
        }
    }

    /// Whose key a client showed to know.
    pub(super) fn user(&self) -> Option<String> {
        self.told.user.borrow().clone()
    }
}
