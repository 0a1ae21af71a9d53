//! Character devices (QEMU's `char.json`).

use super::sockets::SocketAddressLegacy;

qapi! {
    /// An element of `query-chardev`.
    struct ChardevInfo {
        /// Id of the device.
        label: String,
        /// What it is connected to, for people.
        filename: String,
        /// Whether somebody uses it.
        frontend_open: bool = "frontend-open",
    }

    /// An element of `query-chardev-backends`.
    struct ChardevBackendInfo {
        /// Name of the kind.
        name: String,
    }

    /// Kinds of device that the daemon has.
    enum ChardevBackendKind {
        /// Connected to nothing.
        Null = "null",
        /// A socket.
        Socket = "socket",
        /// Standard input and output.
        Stdio = "stdio",
    }

    /// What all devices have.
    #[derive(Default)]
    struct ChardevCommon {
        /// File to write a copy to.
        logfile: Option<String>,
        /// The copy is added to what the file holds.
        logappend: Option<bool>,
    }

    /// A socket.
    struct ChardevSocket {
        /// File to write a copy to.
        logfile: Option<String>,
        /// The copy is added to what the file holds.
        logappend: Option<bool>,
        /// Where to listen, or to connect to.
        addr: SocketAddressLegacy,
        /// Id of the TLS credentials.
        tls_creds: Option<String> = "tls-creds",
        /// Id of the authorization object that is asked about clients.
        tls_authz: Option<String> = "tls-authz",
        /// Clients connect to it; yes if absent.
        server: Option<bool>,
        /// Wait for the first client; no if absent.
        wait: Option<bool>,
        /// Send at once.
        nodelay: Option<bool>,
        /// Speak telnet.
        telnet: Option<bool>,
        /// Speak tn3270.
        tn3270: Option<bool>,
        /// Speak websocket.
        websocket: Option<bool>,
        /// Seconds before connecting again.
        reconnect: Option<i64> [deprecated],
        /// Milliseconds before connecting again.
        reconnect_ms: Option<i64> = "reconnect-ms",
    }

    /// Standard input and output.
    #[derive(Default)]
    struct ChardevStdio {
        /// File to write a copy to.
        logfile: Option<String>,
        /// The copy is added to what the file holds.
        logappend: Option<bool>,
        /// Keys can send signals.
        signal: Option<bool>,
    }

    /// A device without a connection, under `data`.
    struct ChardevCommonWrapper {
        /// Its options.
        data: ChardevCommon,
    }

    /// A socket under `data`.
    struct ChardevSocketWrapper {
        /// Its options.
        data: ChardevSocket,
    }

    /// Standard input and output under `data`.
    struct ChardevStdioWrapper {
        /// Their options.
        data: ChardevStdio,
    }

    /// A device to make.
    union ChardevBackend / #[doc = "Kinds of device, with their options."] ChardevBackendBranch
        on "type": ChardevBackendKind {} {
        /// Connected to nothing.
        Null(ChardevCommonWrapper) = "null",
        /// A socket.
        Socket(Box<ChardevSocketWrapper>) = "socket",
        /// Standard input and output.
        Stdio(ChardevStdioWrapper) = "stdio",
    }

    /// Arguments of `chardev-add`.
    struct ChardevAdd {
        /// Id of the device.
        id: String,
        /// The device.
        backend: ChardevBackend,
    }

    /// Result of `chardev-add`.
    #[derive(Default)]
    struct ChardevReturn {
        /// Name of the terminal that was made; never there.
        pty: Option<String>,
    }

    /// Arguments of `chardev-remove`.
    struct ChardevRemove {
        /// Id of the device.
        id: String,
    }
}
