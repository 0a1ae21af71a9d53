//! Workloads prove who they are by a SPIFFE id in their certificate; a file of the operator says
//! which exports they may read and write.
//!
//! ```text
//! object-add {"qom-type": "authz-wasm", "id": "az", "plugin": "authz-spiffe",
//!             "config": {"trust-domain": "acme.example"},
//!             "files": {"rules": "/etc/outport/spiffe.rules"}}
//! ```
//!
//! The file has one rule on each line; the first whose id and export both match decides:
//!
//! ```text
//! # WHO                                  EXPORTS   MAY
//! spiffe://acme.example/backup/*         *         read
//! spiffe://acme.example/vm/web           web-*     write
//! spiffe://acme.example/vm/batch         scratch   write iops=500
//! ```
//!
//! It is read again when it has changed. While it has a mistake, nobody gets in, and the log says
//! in which line.

#![forbid(unsafe_code)]

pub mod rules;

use outport_sdk::{
    ConfigFiles, Decision, Error, Info, LogLevel, Narrowing, Policy, Request, Result,
};
use rules::{Access, Rules};
use serde::Deserialize;

/// The name under which the operator grants the file.
const FILE: &str = "rules";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    trust_domain: String,
}

/// One trust domain and its rules.
#[derive(Debug)]
pub struct Spiffe {
    /// `spiffe://DOMAIN/`.
    prefix: String,
    generation: u64,
    rules: std::result::Result<Rules, String>,
}

impl Spiffe {
    /// The one SPIFFE id of the certificate (X509-SVID, section 2: exactly one URI).
    fn id<'a>(&self, names: &'a [String]) -> std::result::Result<&'a str, String> {
        let mut uris = names.iter().filter_map(|name| name.strip_prefix("URI:"));
        match (uris.next(), uris.next()) {
            (Some(id), None) if id.starts_with(&self.prefix) => Ok(id),
            (Some(id), None) => Err(format!("'{id}' is not of the trust domain")),
            (Some(_), Some(_)) => Err("The certificate has several URIs".to_owned()),
            (None, _) => Err("There is no certificate with a SPIFFE id".to_owned()),
        }
    }

    fn refresh(&mut self, files: &dyn ConfigFiles) -> Result<()> {
        let generation = files.generation(FILE)?;
        if generation != self.generation {
            let text = files.read(FILE)?;
            self.rules = Rules::parse(&text);
            self.generation = generation;
            if let Err(mistake) = &self.rules {
                files.log(LogLevel::Error, mistake);
            }
        }
        Ok(())
    }
}

impl Policy for Spiffe {
    fn info() -> Info {
        Info {
            name: "authz-spiffe",
            version: env!("CARGO_PKG_VERSION"),
            description: "Rules for SPIFFE ids, from a file",
            options_schema: include_str!("options.json"),
        }
    }

    fn open(files: &dyn ConfigFiles, options: &str) -> Result<Self> {
        let options: Options =
            serde_json::from_str(options).map_err(|e| Error::invalid(e.to_string()))?;
        let rules = Rules::parse(&files.read(FILE)?).map_err(Error::invalid)?;
        Ok(Self {
            prefix: format!("spiffe://{}/", options.trust_domain),
            // Whatever it is: the first decision looks again.
            generation: 0,
            rules: Ok(rules),
        })
    }

    fn decide(&mut self, files: &dyn ConfigFiles, request: &Request) -> Result<Decision> {
        self.refresh(files)?;
        let rules = match &self.rules {
            Ok(rules) => rules,
            Err(mistake) => return Ok(Decision::deny(mistake)),
        };
        let id = match self.id(&request.peer.tls_san) {
            Ok(id) => id,
            Err(reason) => return Ok(Decision::Deny(reason)),
        };
        let export = request.export_name.as_deref().unwrap_or_default();
        Ok(match rules.find(id, export) {
            Some(rule) => Decision::Allow(Narrowing {
                read_only: rule.access == Access::Read,
                max_iops: rule.iops_max,
                ..Narrowing::default()
            }),
            None => Decision::Deny(format!("No rule lets '{id}' use '{export}'")),
        })
    }
}

outport_sdk::export_policy!(Spiffe);
