//! `outport:plugin/config-files`: the files that the operator granted by name.

use super::generated::outport::plugin::config_files;
use super::refuse;
use super::types::{Errno, Error};
use crate::limits::{
    CONFIG_FILE_BYTES_MAX, CONFIG_READS_PER_CALL_MAX, MESSAGE_BYTES_MAX, sentence,
};
use crate::store::HostState;

impl config_files::Host for HostState {
    fn read(&mut self, name: String) -> Result<Vec<u8>, Error> {
        let Some(left) = self.call.config_reads_left.checked_sub(1) else {
            return refuse(
                Errno::Enomem,
                format!("One call may read {CONFIG_READS_PER_CALL_MAX} configuration files"),
            );
        };
        self.call.config_reads_left = left;
        let bytes = self.granted.config.read(&name);
        let bytes = bytes.map_err(|e| failed(e, &name))?;
        if bytes.len() > CONFIG_FILE_BYTES_MAX {
            return refuse(
                Errno::Efbig,
                format!("A configuration file has at most {CONFIG_FILE_BYTES_MAX} bytes"),
            );
        }
        Ok(bytes)
    }

    fn generation(&mut self, name: String) -> Result<u64, Error> {
        let generation = self.granted.config.generation(&name);
        generation.map_err(|e| failed(e, &name))
    }
}

fn failed(e: outport_block::Errno, name: &str) -> Error {
    let name = sentence(name.to_owned(), MESSAGE_BYTES_MAX);
    Error {
        code: e.into(),
        message: format!("Configuration file '{name}': {e}"),
    }
}
