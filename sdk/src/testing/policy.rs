//! A host for policies: files in memory, and a clock that stands where the test
//! puts it.

use crate::{ConfigFiles, Decision, Error, LogLevel, Policy, Request, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Granted files, by name, and what was logged.
#[derive(Debug, Default)]
pub struct MemoryConfig {
    files: BTreeMap<String, (u64, Vec<u8>)>,
    /// Lines that the policy logged.
    pub lines: RefCell<Vec<String>>,
}

impl MemoryConfig {
    /// Grant a file, or change it.
    pub fn put(&mut self, name: &str, content: impl Into<Vec<u8>>) {
        let generation = self.files.get(name).map_or(1, |(old, _)| old + 1);
        let file = (generation, content.into());
        self.files.insert(name.to_owned(), file);
    }

    /// Take a file away.
    pub fn remove(&mut self, name: &str) {
        self.files.remove(name);
    }

    fn file(&self, name: &str) -> Result<&(u64, Vec<u8>)> {
        let missing = || Error::new(crate::Errno::Eacces, format!("No file '{name}' is granted"));
        self.files.get(name).ok_or_else(missing)
    }
}

impl ConfigFiles for MemoryConfig {
    fn read(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.file(name)?.1.clone())
    }

    fn generation(&self, name: &str) -> Result<u64> {
        Ok(self.file(name)?.0)
    }

    fn log(&self, level: LogLevel, message: &str) {
        self.lines
            .borrow_mut()
            .push(format!("{level:?}: {message}"));
    }
}

/// One policy and its host, as the daemon has them.
#[derive(Debug)]
pub struct TestPolicy<T> {
    policy: T,
    /// What it may read.
    pub config: MemoryConfig,
}

impl<T: Policy> TestPolicy<T> {
    /// A policy with these options and no files.
    ///
    /// # Errors
    /// Its own.
    pub fn open(options: &str) -> Result<Self> {
        Self::open_with(MemoryConfig::default(), options)
    }

    /// A policy with these options and these files.
    ///
    /// # Errors
    /// Its own, or its schema is no JSON.
    pub fn open_with(config: MemoryConfig, options: &str) -> Result<Self> {
        let schema = T::info().options_schema;
        if !schema.is_empty() {
            serde_json::from_str::<serde_json::Value>(schema)
                .map_err(|e| Error::invalid(format!("The options schema: {e}")))?;
        }
        let policy = T::open(&config, options)?;
        Ok(Self { policy, config })
    }

    /// The decision as the daemon takes it: an error is a denial.
    pub fn decide(&mut self, request: &Request) -> Decision {
        let decision = self.policy.decide(&self.config, request);
        decision.unwrap_or_else(|error| Decision::Deny(error.message))
    }

    /// Is it admitted right after the TLS handshake?
    pub fn is_allowed(&mut self, identity: &str) -> bool {
        let allowed = self.policy.is_allowed(&self.config, identity);
        allowed.unwrap_or(false)
    }

    /// Other options.
    ///
    /// # Errors
    /// Its own; the old ones stay in force.
    pub fn reconfigure(&mut self, options: &str) -> Result<()> {
        self.policy.reconfigure(&self.config, options)
    }
}
