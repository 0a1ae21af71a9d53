//! Negotiation, version and command listing (QEMU's `control.json`).

qapi! {
    /// What a client may switch on while it negotiates.
    enum QmpCapability {
        /// Commands that overtake others, sent with `exec-oob`.
        Oob = "oob",
    }

    /// Arguments of `qmp_capabilities`.
    #[derive(Default)]
    struct QmpCapabilities {
        /// Capabilities to switch on; none if absent.
        enable: Option<Vec<QmpCapability>>,
    }

    /// The QEMU release whose schema is spoken, by which management software gates features.
    struct VersionTriple {
        /// Major release number.
        major: i64,
        /// Minor release number.
        minor: i64,
        /// Patch level.
        micro: i64,
    }

    /// Result of `query-version`, and part of the greeting.
    struct VersionInfo {
        /// The QEMU release whose schema is spoken.
        qemu: VersionTriple,
        /// The implementation and its own version.
        package: String,
    }

    /// An element of `x-outport-config` (ours): a command that makes a part of the daemon's state.
    struct ConfigCommand {
        /// The command.
        execute: String,
        /// Its arguments.
        arguments: serde_json::Value,
    }

    /// Arguments of `x-allow-paths` (ours).
    struct AllowPaths {
        /// A directory whose files images may name.
        path: String,
    }

    /// An element of `query-commands`.
    struct CommandInfo {
        /// The command's name.
        name: String,
    }
}

impl VersionInfo {
    /// The version to answer: QEMU 11.1, whose export schema this crate follows (spec 7).
    ///
    /// `package` names the implementation, e.g. `outport 0.1.0`.
    pub fn with_package(package: impl Into<String>) -> Self {
        let qemu = VersionTriple {
            major: 11,
            minor: 1,
            micro: 3,
        };
        Self {
            qemu,
            package: package.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_gates_what_we_speak() {
        let version = serde_json::to_value(VersionInfo::with_package("outport 0.1.0")).unwrap();
        assert_eq!(version["qemu"]["major"], 11);
        assert_eq!(version["qemu"]["minor"], 1);
        assert_eq!(version["package"], "outport 0.1.0");
    }
}
