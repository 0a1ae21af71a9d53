//! Which format an image has: told, or read off its name, never off its content.

use std::path::Path;

use anyhow::{Result, bail};

/// A format and how it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// The driver.
    pub(crate) driver: String,
    /// Why this one, for people.
    pub(crate) because: &'static str,
}

/// The extensions that decide, and what they stand for.
const EXTENSIONS: [(&str, &str); 3] = [("qcow2", "qcow2"), ("raw", "raw"), ("img", "raw")];

/// The format that was asked for, or that the extension names.
pub(crate) fn choose(image: &Path, told: Option<&str>) -> Result<Format> {
    if let Some(driver) = told {
        return Ok(Format {
            driver: driver.to_owned(),
            because: "as told",
        });
    }
    let extension = image
        .extension()
        .and_then(|it| it.to_str())
        .unwrap_or_default();
    let known = EXTENSIONS
        .iter()
        .find(|(name, _)| extension.eq_ignore_ascii_case(name));
    let Some((_, driver)) = known else {
        bail!(
            "What format has '{}'? Say it with --format, e.g. --format raw. The content is not \
             asked: whoever can write a raw disk can make it look like a format that names other \
             files of this machine",
            image.display()
        );
    };
    Ok(Format {
        driver: (*driver).to_owned(),
        because: "by its extension",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_name(name: &str) -> Option<String> {
        choose(Path::new(name), None)
            .ok()
            .map(|format| format.driver)
    }

    #[test]
    fn three_extensions_decide() {
        assert_eq!(by_name("a.qcow2").as_deref(), Some("qcow2"));
        assert_eq!(by_name("a.RAW").as_deref(), Some("raw"));
        assert_eq!(by_name("dir.d/a.img").as_deref(), Some("raw"));
    }

    #[test]
    fn anything_else_has_to_be_told() {
        for name in ["a", "a.vmdk", "a.qcow2.bak", "qcow2"] {
            assert_eq!(by_name(name), None, "{name}");
        }
        let error = choose(Path::new("a.vmdk"), None).unwrap_err().to_string();
        assert!(
            error.contains("'a.vmdk'") && error.contains("--format"),
            "{error}"
        );
    }

    #[test]
    fn what_was_told_wins() {
        let told = choose(Path::new("a.qcow2"), Some("raw")).unwrap();
        assert_eq!((told.driver.as_str(), told.because), ("raw", "as told"));
    }
}
