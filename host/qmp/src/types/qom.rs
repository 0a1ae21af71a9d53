//! Objects (QEMU's `qom.json`).

use super::block_filter::ThrottleGroupProperties;
use super::plugin::WasmPluginProperties;

qapi! {
    /// Types of object that can be added.
    enum ObjectType {
        /// Who may: a list of rules.
        AuthzList = "authz-list",
        /// Who may: a list of rules in a file, as QOM spells the type.
        AuthzListFile = "authz-list-file",
        /// The same, as QAPI spells it.
        AuthzListfile = "authz-listfile",
        /// Who may: one identity.
        AuthzSimple = "authz-simple",
        /// Who may: what a plugin says (ours).
        AuthzWasm = "authz-wasm",
        /// A thread that serves requests.
        Iothread = "iothread",
        /// Limits that nodes share.
        ThrottleGroup = "throttle-group",
        /// A QMP monitor on a character device (since 11.1).
        MonitorQmp = "monitor-qmp",
        /// A password or a key.
        Secret = "secret",
        /// Anonymous TLS, which is refused.
        TlsCredsAnon = "tls-creds-anon",
        /// TLS with pre-shared keys.
        TlsCredsPsk = "tls-creds-psk",
        /// TLS with certificates.
        TlsCredsX509 = "tls-creds-x509",
        /// A sandboxed component (ours).
        WasmPlugin = "wasm-plugin",
    }

    /// Side of a TLS handshake.
    enum QCryptoTLSCredsEndpoint {
        /// The one that connects.
        Client = "client",
        /// The one that accepts.
        Server = "server",
    }

    /// The properties of TLS without identities.
    #[derive(Default)]
    struct TlsCredsAnonProperties {
        /// Whether the other side has to prove who it is; yes if absent.
        verify_peer: Option<bool> = "verify-peer",
        /// Where parameters lie.
        dir: Option<String>,
        /// Which side they are for; `client` if absent.
        endpoint: Option<QCryptoTLSCredsEndpoint>,
        /// What is offered, in GnuTLS' words.
        priority: Option<String>,
    }

    /// The properties of TLS with pre-shared keys.
    #[derive(Default)]
    struct TlsCredsPskProperties {
        /// Whether the other side has to prove who it is; keys always do.
        verify_peer: Option<bool> = "verify-peer",
        /// Where `keys.psk` lies.
        dir: Option<String>,
        /// Which side they are for; `client` if absent.
        endpoint: Option<QCryptoTLSCredsEndpoint>,
        /// What is offered, in GnuTLS' words.
        priority: Option<String>,
        /// Whose key a client shows; `qemu` if absent.
        username: Option<String>,
    }

    /// The properties of TLS with certificates.
    #[derive(Default)]
    struct TlsCredsX509Properties {
        /// Whether the other side has to prove who it is; yes if absent.
        verify_peer: Option<bool> = "verify-peer",
        /// Where the certificates and keys lie.
        dir: Option<String>,
        /// Which side they are for; `client` if absent.
        endpoint: Option<QCryptoTLSCredsEndpoint>,
        /// What is offered, in GnuTLS' words: versions are heeded.
        priority: Option<String>,
        /// Whether the own certificates are checked when the object is made; yes if absent.
        sanity_check: Option<bool> = "sanity-check",
        /// Secret with the password of the private keys.
        passwordid: Option<String>,
    }

    /// The properties of an iothread.
    #[derive(Default)]
    struct IothreadProperties {
        /// Requests submitted at once at most; 0: the daemon's choice.
        aio_max_batch: Option<i64> = "aio-max-batch",
        /// Threads that are kept for blocking work.
        thread_pool_min: Option<i64> = "thread-pool-min",
        /// Most threads for blocking work; 64 if absent.
        thread_pool_max: Option<i64> = "thread-pool-max",
        /// Longest spin before sleeping, in nanoseconds; 32768 if absent, 0: never spin.
        poll_max_ns: Option<i64> = "poll-max-ns",
        /// Factor by which the spin grows.
        poll_grow: Option<i64> = "poll-grow",
        /// Divisor by which the spin shrinks.
        poll_shrink: Option<i64> = "poll-shrink",
        /// Weight of the newest sample in the spin's adaption, 0 to 63 (since 11.1).
        poll_weight: Option<i64> = "poll-weight",
    }

    /// How a secret is spelled.
    enum QCryptoSecretFormat {
        /// As it is.
        Raw = "raw",
        /// In base64.
        Base64 = "base64",
    }

    /// The properties of a secret: either `data` or `file`.
    #[derive(Default)]
    struct SecretProperties {
        /// How it is spelled; `raw` if absent.
        format: Option<QCryptoSecretFormat>,
        /// Secret with the AES-256 key that this one is encrypted with.
        keyid: Option<String>,
        /// Base64 of the 16 bytes that the encryption started with.
        iv: Option<String>,
        /// The secret itself.
        data: Option<String>,
        /// Path of a file that holds it.
        file: Option<String>,
    }

    /// What a rule or a list says.
    enum QAuthZListPolicy {
        /// No.
        Deny = "deny",
        /// Yes.
        Allow = "allow",
    }

    /// How a rule compares.
    enum QAuthZListFormat {
        /// Byte by byte.
        Exact = "exact",
        /// With `*` and `?`.
        Glob = "glob",
    }

    /// A rule of a list.
    struct QAuthZListRule {
        /// Identity, or pattern of identities.
        r#match: String = "match",
        /// What it says.
        policy: QAuthZListPolicy,
        /// How it compares; `exact` if absent.
        format: Option<QAuthZListFormat>,
    }

    /// The properties of a list of rules: the first that matches decides.
    #[derive(Default)]
    struct AuthZListProperties {
        /// What it says if no rule matches; `deny` if absent.
        policy: Option<QAuthZListPolicy>,
        /// The rules.
        rules: Option<Vec<QAuthZListRule>>,
    }

    /// The properties of a list of rules in a file.
    struct AuthZListFileProperties {
        /// Path of a JSON file with the properties of a list.
        filename: String,
        /// Read it again when it changes; yes if absent.
        refresh: Option<bool>,
    }

    /// The properties of a list of one.
    struct AuthZSimpleProperties {
        /// Who may.
        identity: String,
    }

    /// The properties of a policy that a plugin brings (ours).
    struct AuthZWasmProperties {
        /// Id of the plugin object, or the name of the plugin.
        plugin: String,
        /// Configuration, checked by the plugin.
        config: Option<serde_json::Map<String, serde_json::Value>>,
        /// Files that the plugin may read: from the names that it uses to paths.
        files: Option<serde_json::Map<String, serde_json::Value>>,
        /// Whether its denials count; otherwise they are logged only. Yes if absent.
        enforce: Option<bool>,
    }

    /// What happens to a monitor when its client leaves.
    enum MonitorCloseAction {
        /// It waits for the next one.
        None = "none",
        /// It is deleted, and its character device.
        Delete = "delete",
    }

    /// The properties of a monitor.
    struct MonitorQmpProperties {
        /// Its character device.
        chardev: String,
        /// Answers are indented.
        pretty: Option<bool>,
        /// What happens when its client leaves; `none` if absent.
        close_action: Option<MonitorCloseAction> = "close-action",
    }

    /// An object to add: arguments of `object-add`.
    union ObjectOptions / #[doc = "Types of object, with their properties."] ObjectBranch
        on "qom-type": ObjectType {
        /// Id of the object.
        id: String,
    } {
        /// Who may: a list of rules.
        AuthzList(AuthZListProperties) = "authz-list",
        /// Who may: a list of rules in a file, as QOM spells the type.
        AuthzListFile(AuthZListFileProperties) = "authz-list-file",
        /// The same, as QAPI spells it.
        AuthzListfile(AuthZListFileProperties) = "authz-listfile",
        /// Who may: one identity.
        AuthzSimple(AuthZSimpleProperties) = "authz-simple",
        /// Who may: what a plugin says (ours).
        AuthzWasm(AuthZWasmProperties) = "authz-wasm",
        /// A thread that serves requests.
        Iothread(IothreadProperties) = "iothread",
        /// Limits that nodes share.
        ThrottleGroup(Box<ThrottleGroupProperties>) = "throttle-group",
        /// A QMP monitor on a character device.
        MonitorQmp(MonitorQmpProperties) = "monitor-qmp",
        /// A password or a key.
        Secret(SecretProperties) = "secret",
        /// Anonymous TLS, which is refused.
        TlsCredsAnon(TlsCredsAnonProperties) = "tls-creds-anon",
        /// TLS with pre-shared keys.
        TlsCredsPsk(TlsCredsPskProperties) = "tls-creds-psk",
        /// TLS with certificates.
        TlsCredsX509(TlsCredsX509Properties) = "tls-creds-x509",
        /// A sandboxed component (ours).
        WasmPlugin(WasmPluginProperties) = "wasm-plugin",
    }

    /// Arguments of `object-del`.
    struct ObjectDel {
        /// Id of the object.
        id: String,
    }

    /// Arguments of `qom-list`.
    struct QomList {
        /// A path in the object tree, e.g. `/objects`.
        path: String,
    }

    /// Arguments of `qom-get`.
    struct QomGet {
        /// A path in the object tree, or the unique end of one.
        path: String,
        /// Name of the property.
        property: String,
    }

    /// Arguments of `qom-set`.
    struct QomSet {
        /// A path in the object tree, or the unique end of one.
        path: String,
        /// Name of the property.
        property: String,
        /// Its new value.
        value: serde_json::Value,
    }

    /// Arguments of `qom-list-get` (since 10.1).
    struct QomListGet {
        /// Paths in the object tree.
        paths: Vec<String>,
    }

    /// An element of the properties that `qom-list-get` tells.
    struct ObjectPropertyValue {
        /// Name of the property.
        name: String,
        /// Its type.
        r#type: String = "type",
        /// Its value; absent if it cannot be read.
        value: Option<serde_json::Value>,
    }

    /// An element of `qom-list-get`: one for each path.
    struct ObjectPropertiesValues {
        /// All properties.
        properties: Vec<ObjectPropertyValue>,
    }

    /// Arguments of `qom-list-types`.
    #[derive(Default)]
    struct QomListTypes {
        /// Only types that are this one, or made from it.
        implements: Option<String>,
        /// Also types that no object has.
        r#abstract: Option<bool> = "abstract",
    }

    /// An element of `qom-list-types`.
    struct ObjectTypeInfo {
        /// Name of the type.
        name: String,
        /// No object has it.
        r#abstract: Option<bool> = "abstract",
        /// The type that it was made from.
        parent: Option<String>,
    }

    /// Arguments of `qom-list-properties`.
    struct QomListProperties {
        /// Name of a type.
        typename: String,
    }

    /// Arguments of `x-authz-check` (ours).
    struct AuthzCheck {
        /// Id of an authorization object.
        id: String,
        /// Who asks.
        identity: String,
    }

    /// Result of `x-authz-check` (ours).
    struct AuthzDecision {
        /// Whether the identity may.
        allowed: bool,
    }

    /// An element of `query-authz` (ours). Sums since the object was added.
    struct AuthzInfo {
        /// Id of the object.
        id: String,
        /// Its type.
        r#type: String = "type",
        /// Times that it allowed.
        allowed: u64,
        /// Times that it denied, those without effect included.
        denied: u64,
        /// Denials without effect, because the object is not enforced.
        unenforced: u64,
        /// How long all decisions took.
        total_time_ns: u64 = "total-time-ns",
        /// How long the longest took.
        max_time_ns: u64 = "max-time-ns",
        /// Whom it denied last, and why; for people.
        last_denial: Option<String> = "last-denial",
    }

    /// An element of `query-iothreads`, as the system emulator has it.
    struct IOThreadInfo {
        /// Id of the object.
        id: String,
        /// Its thread, as the system numbers it.
        thread_id: i64 = "thread-id",
        /// Longest spin before sleeping, in nanoseconds.
        poll_max_ns: i64 = "poll-max-ns",
        /// Factor by which the spin grows.
        poll_grow: i64 = "poll-grow",
        /// Divisor by which the spin shrinks.
        poll_shrink: i64 = "poll-shrink",
        /// Requests submitted at once at most.
        aio_max_batch: i64 = "aio-max-batch",
    }

    /// An element of `qom-list`.
    struct ObjectPropertyInfo {
        /// Name of the property.
        name: String,
        /// Its type; `child<T>` for an object below this one.
        r#type: String = "type",
        /// Text for people.
        description: Option<String>,
        /// The value that it has by default.
        default_value: Option<serde_json::Value> = "default-value",
    }
}
