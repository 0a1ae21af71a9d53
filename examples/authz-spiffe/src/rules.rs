//! The operator's file. Pure: bytes to rules, or to a sentence that names the line.

/// Rules that are read. Far more than anybody can oversee.
const RULES_MAX: usize = 10_000;

/// What a workload may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Read and write.
    Write,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    who: String,
    exports: String,
    /// What it grants.
    pub access: Access,
    /// Requests per second; 0: no limit.
    pub iops_max: u32,
}

/// All lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules(Vec<Rule>);

impl Rules {
    /// Reads the file.
    ///
    /// # Errors
    /// The first mistake and its line.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let text = str::from_utf8(text).map_err(|_| "The rules are not UTF-8".to_owned())?;
        let mut rules = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            if rules.len() == RULES_MAX {
                return Err(format!("There are more than {RULES_MAX} rules"));
            }
            let rule = Rule::parse(line).map_err(|what| format!("Line {}: {what}", at + 1))?;
            rules.push(rule);
        }
        Ok(Self(rules))
    }

    /// The first rule for this workload and this export.
    pub fn find(&self, id: &str, export: &str) -> Option<&Rule> {
        let mut rules = self.0.iter();
        rules.find(|rule| matches(&rule.who, id) && matches(&rule.exports, export))
    }
}

impl Rule {
    fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let (Some(who), Some(exports), Some(may)) = (words.next(), words.next(), words.next())
        else {
            return Err("a rule is WHO EXPORTS read|write [iops=N]".to_owned());
        };
        if !who.starts_with("spiffe://") {
            return Err(format!("'{who}' is no SPIFFE id"));
        }
        for pattern in [who, exports] {
            if pattern.trim_end_matches('*').contains('*') {
                return Err(format!("'{pattern}': a star may only stand at the end"));
            }
        }
        let access = match may {
            "read" => Access::Read,
            "write" => Access::Write,
            other => return Err(format!("'{other}' is neither read nor write")),
        };
        let mut iops_max = 0;
        for word in words {
            let value = word.strip_prefix("iops=").and_then(|n| n.parse().ok());
            iops_max = value.ok_or_else(|| format!("'{word}' is no limit such as iops=100"))?;
        }
        Ok(Self {
            who: who.to_owned(),
            exports: exports.to_owned(),
            access,
            iops_max,
        })
    }
}

/// A star at the end is any rest.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => text.starts_with(start.trim_end_matches('*')),
        None => pattern == text,
    }
}
