//! The flat options of `--chardev`: `socket,id=c,path=/run/x,server=on,wait=off`.
//!
//! Older than the schema language: no nesting, no JSON, and a name alone is a boolean. What the
//! options mean is decided by whoever takes them out; what is left over is an error.

use crate::error::{Error, is_identifier};
use crate::keyval::unescape;

/// Options that were parsed and not yet taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuOpts {
    options: Vec<(String, String)>,
    /// Deprecated spellings that were used, for the terminal.
    pub warnings: Vec<String>,
}

impl QemuOpts {
    /// Parses `text`; a first part without `=` is the value of `implied_key`.
    ///
    /// # Errors
    /// `Invalid parameter ''` for an option without a name.
    pub fn parse(text: &str, implied_key: Option<&str>) -> Result<Self, Error> {
        let mut opts = Self {
            options: Vec::new(),
            warnings: Vec::new(),
        };
        let mut rest = text;
        let mut implied_key = implied_key;
        while !rest.is_empty() {
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            let (name, implied_key) = (&rest[..end], implied_key.take());
            if rest[end..].starts_with('=') {
                if name.is_empty() {
                    return Err(Error::invalid_parameter(name));
                }
                let (value, after) = unescape(&rest[end + 1..]);
                opts.options.push((name.to_owned(), value));
                rest = after;
            } else if let Some(implied_key) = implied_key {
                let (value, after) = unescape(rest);
                opts.options.push((implied_key.to_owned(), value));
                rest = after;
            } else {
                opts.push_short_form(name);
                rest = rest.get(end + 1..).unwrap_or_default();
            }
        }
        Ok(opts)
    }

    /// A name alone means `on`, with `no` before it `off`.
    fn push_short_form(&mut self, name: &str) {
        let (option, value) = match name.strip_prefix("no") {
            Some(option) if !option.is_empty() => (option, "off"),
            _ => (name, "on"),
        };
        self.warnings.push(format!(
            "short-form boolean option '{name}' deprecated\nPlease use {option}={value} instead"
        ));
        self.options.push((option.to_owned(), value.to_owned()));
    }

    /// Takes `name` out; of several the last counts.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let value = self.options.iter().rev().find(|(option, _)| option == name);
        let value = value.map(|(_, value)| value.clone());
        self.options.retain(|(option, _)| option != name);
        value
    }

    /// Takes a boolean out; only `on` and `off` are booleans here.
    ///
    /// # Errors
    /// `Parameter 'x' expects 'on' or 'off'`.
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        match self.take(name).as_deref() {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(_) => Err(Error::expects(name, "'on' or 'off'")),
        }
    }

    /// Takes a number out.
    ///
    /// # Errors
    /// `Parameter 'x' expects a number`.
    pub fn take_number(&mut self, name: &str) -> Result<Option<u64>, Error> {
        let number = |text: String| text.parse().map_err(|_| Error::expects(name, "a number"));
        self.take(name).map(number).transpose()
    }

    /// Takes the `id` out.
    ///
    /// # Errors
    /// `Parameter 'id' expects an identifier`.
    pub fn take_id(&mut self) -> Result<Option<String>, Error> {
        match self.take("id") {
            Some(id) if !is_identifier(&id) => Err(Error::not_an_identifier("id")),
            id => Ok(id),
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// `Invalid parameter 'x'` for the first option that nobody took.
    pub fn finish(self) -> Result<(), Error> {
        match self.options.first() {
            Some((name, _)) => Err(Error::invalid_parameter(name)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chardev(text: &str) -> QemuOpts {
        QemuOpts::parse(text, Some("backend")).unwrap()
    }

    #[test]
    fn options_are_taken_by_name() {
        let mut opts = chardev("socket,id=c,path=/a,,b,server=on,wait=on,wait=off,reconnect-ms=5");
        assert_eq!(opts.take("backend").unwrap(), "socket");
        assert_eq!(opts.take_id().unwrap().unwrap(), "c");
        assert_eq!(opts.take("path").unwrap(), "/a,b");
        assert_eq!(opts.take_bool("server").unwrap(), Some(true));
        assert_eq!(opts.take_bool("wait").unwrap(), Some(false));
        assert_eq!(opts.take_number("reconnect-ms").unwrap(), Some(5));
        assert_eq!(opts.take("fd"), None);
        opts.finish().unwrap();
    }

    #[test]
    fn a_name_alone_is_a_deprecated_boolean() {
        let mut opts = chardev("socket,server,nowait");
        assert_eq!(opts.take_bool("server").unwrap(), Some(true));
        assert_eq!(opts.take_bool("wait").unwrap(), Some(false));
        let want = "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead";
        assert_eq!(opts.warnings[1], want);
    }

    #[test]
    fn mistakes_have_qemus_words() {
        assert_eq!(
            QemuOpts::parse("x,=c", Some("backend")).unwrap_err().desc,
            "Invalid parameter ''"
        );
        let mut opts = chardev("socket,id=1c,server=1,to=x,zz=1");
        let want = "Parameter 'server' expects 'on' or 'off'";
        assert_eq!(opts.take_bool("server").unwrap_err().desc, want);
        assert_eq!(
            opts.take_id().unwrap_err().desc,
            "Parameter 'id' expects an identifier"
        );
        assert_eq!(
            opts.take_number("to").unwrap_err().desc,
            "Parameter 'to' expects a number"
        );
        opts.take("backend");
        assert_eq!(opts.finish().unwrap_err().desc, "Invalid parameter 'zz'");
    }
}
