//! Policies: which rules count, how much, and what each lets pass. They are data: three are built in, and a user's own
//! file extends one.
//!
//! A policy's author is the administrator, who is trusted; the file is still checked, since a rule that was misspelt
//! would find nothing.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::rules::{self, Lists};
use crate::bundle::read_regular;

/// The policies that are built in, and their text.
const BUILT_IN: [(&str, &str); 3] = [
    ("baseline", include_str!("policies/baseline.toml")),
    ("restricted", include_str!("policies/restricted.toml")),
    ("rt-strict", include_str!("policies/rt-strict.toml")),
];

/// How many policies may extend one another.
const DEPTH_LIMIT: usize = 16;

/// How much a finding counts; the names are SARIF's levels.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The rule is not asked.
    Off,
    /// To know.
    Note,
    /// To look at.
    Warning,
    /// The bundle does not keep the policy.
    Error,
}

impl Severity {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// What a policy says of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// `None`: off.
    pub severity: Option<Severity>,
    /// What passes.
    pub allow: Vec<String>,
    /// What does not.
    pub forbid: Vec<String>,
    /// What must be.
    pub require: Vec<String>,
}

/// A policy with all that it extends.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Its name, or the path of its file.
    pub name: String,
    settings: BTreeMap<String, Setting>,
}

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It is neither built in nor a file.
    #[error("policy {name:?}: give baseline, restricted, rt-strict, or the path of a .toml file")]
    Unknown {
        /// As given.
        name: String,
    },
    /// Its file cannot be read.
    #[error("read the policy {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its file is no policy.
    #[error("policy {name}: {message}")]
    Invalid {
        /// The policy.
        name: String,
        /// The place and the reason.
        message: String,
    },
}

/// A policy's file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "description")]
    _description: Option<String>,
    extends: Option<String>,
    #[serde(default)]
    rules: BTreeMap<String, RuleEntry>,
}

/// `[rules.NAME]`; what is not given is as in the policy that is extended.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleEntry {
    severity: Option<Severity>,
    allow: Option<Vec<String>>,
    forbid: Option<Vec<String>>,
    require: Option<Vec<String>>,
}

impl Policy {
    /// A built-in policy by its name, or one in a file by its path. A relative path that a file extends counts from it.
    ///
    /// # Errors
    /// There is none, or it is wrong; the file and the rule are named.
    pub fn load(name: &str) -> Result<Self, PolicyError> {
        let mut settings = BTreeMap::new();
        let mut names = vec![name.to_owned()];
        let mut chain = Vec::new();
        while let Some(name) = names.pop() {
            if chain.len() == DEPTH_LIMIT {
                return Err(PolicyError::Invalid {
                    name,
                    message: "`extends` leads in a circle".to_owned(),
                });
            }
            let file = read(&name)?;
            if file.extends.is_none() && file.rules.is_empty() {
                return Err(PolicyError::Invalid {
                    name,
                    message: "it has no rules, and extends no policy that has some".to_owned(),
                });
            }
            if let Some(parent) = &file.extends {
                names.push(beside(&name, parent));
            }
            chain.push((name, file));
        }
        for (name, file) in chain.into_iter().rev() {
            for (rule, entry) in file.rules {
                apply(&mut settings, &name, &rule, entry)?;
            }
        }
        Ok(Self {
            name: name.to_owned(),
            settings,
        })
    }

    /// What it says of a rule; `None`: the rule is off.
    pub fn setting(&self, rule: &str) -> Option<(Severity, &Setting)> {
        let setting = self.settings.get(rule)?;
        let severity = setting.severity?;
        (severity != Severity::Off).then_some((severity, setting))
    }
}

fn is_path(name: &str) -> bool {
    name.contains('/') || Path::new(name).extension().is_some()
}

/// A policy's name as one beside it says it.
fn beside(name: &str, other: &str) -> String {
    let directory = Path::new(name).parent().filter(|_| is_path(name));
    match directory {
        Some(directory) if is_path(other) => directory.join(other).to_string_lossy().into_owned(),
        _ => other.to_owned(),
    }
}

fn read(name: &str) -> Result<File, PolicyError> {
    let built_in = BUILT_IN.iter().find(|(own, _)| *own == name);
    let text = match built_in {
        Some((_, text)) => (*text).to_owned(),
        None if is_path(name) => {
            let text = read_regular(Path::new(name)).and_then(|text| {
                let text = String::from_utf8(text);
                text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
            });
            text.map_err(|source| PolicyError::Read {
                path: PathBuf::from(name),
                source,
            })?
        }
        None => {
            return Err(PolicyError::Unknown {
                name: name.to_owned(),
            });
        }
    };
    toml::from_str(&text).map_err(|error| PolicyError::Invalid {
        name: name.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })
}

fn apply(
    settings: &mut BTreeMap<String, Setting>,
    policy: &str,
    rule: &str,
    entry: RuleEntry,
) -> Result<(), PolicyError> {
    let invalid = |message: String| PolicyError::Invalid {
        name: policy.to_owned(),
        message: format!("`rules.{rule}`: {message}"),
    };
    let Some(known) = rules::find(rule) else {
        let all: Vec<&str> = rules::ALL.iter().map(|rule| rule.id).collect();
        return Err(invalid(format!(
            "no such rule; there are {}",
            all.join(", ")
        )));
    };
    let setting = settings.entry(rule.to_owned()).or_default();
    setting.severity = entry.severity.or(setting.severity);
    let Lists {
        allow,
        forbid,
        require,
    } = known.lists;
    for (list, taken, given, place) in [
        ("allow", allow, entry.allow, &mut setting.allow),
        ("forbid", forbid, entry.forbid, &mut setting.forbid),
        ("require", require, entry.require, &mut setting.require),
    ] {
        let Some(given) = given else {
            continue;
        };
        if !taken {
            return Err(invalid(format!("it has no list `{list}`")));
        }
        *place = given;
    }
    (known.check)(setting).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("own.toml");
        std::fs::write(&path, text).unwrap();
        let error = Policy::load(path.to_str().unwrap()).unwrap_err();
        crate::error_chain(&error).replace(directory.path().to_str().unwrap(), "D")
    }

    #[test]
    fn every_built_in_policy_loads_and_says_something_of_every_rule() {
        for (name, _) in BUILT_IN {
            let policy = Policy::load(name).unwrap();
            for rule in &rules::ALL {
                assert!(policy.setting(rule.id).is_some(), "{name}: {}", rule.id);
            }
        }
    }

    #[test]
    fn each_built_in_policy_is_at_least_as_strict_as_the_one_before() {
        let policies = BUILT_IN.map(|(name, _)| Policy::load(name).unwrap());
        for pair in policies.windows(2) {
            for rule in &rules::ALL {
                let severity = |policy: &Policy| policy.setting(rule.id).unwrap().0;
                assert!(severity(&pair[0]) <= severity(&pair[1]), "{}", rule.id);
            }
        }
    }

    #[test]
    fn a_policy_extends_another_key_by_key() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
        };
        write(
            "one.toml",
            "extends = \"baseline\"\n[rules.hooks]\nseverity = \"off\"\n[rules.capabilities]\nallow = [\"CAP_KILL\"]\n",
        );
        write(
            "two.toml",
            "extends = \"./one.toml\"\n[rules.root-user]\nseverity = \"error\"\n",
        );
        let path = directory.path().join("two.toml");
        let policy = Policy::load(path.to_str().unwrap()).unwrap();
        assert!(policy.setting("hooks").is_none());
        let (severity, setting) = policy.setting("capabilities").unwrap();
        assert_eq!(severity, Severity::Error);
        assert_eq!(setting.allow, ["CAP_KILL"]);
        assert_eq!(policy.setting("root-user").unwrap().0, Severity::Error);
    }

    #[test]
    fn what_is_wrong_with_a_policy_is_named() {
        assert_eq!(
            crate::error_chain(&Policy::load("nothing").unwrap_err()),
            "policy \"nothing\": give baseline, restricted, rt-strict, or the path of a .toml file"
        );
        assert!(
            error_of("[rules.capabilites]\nseverity = \"error\"\n").starts_with(
                "policy D/own.toml: `rules.capabilites`: no such rule; there are specification, "
            )
        );
        assert_eq!(
            error_of("[rules.seccomp]\nallow = []\n"),
            "policy D/own.toml: `rules.seccomp`: it has no list `allow`"
        );
        assert_eq!(
            error_of("[rules.devices]\nallow = [\"tun\"]\n"),
            "policy D/own.toml: `rules.devices`: \"tun\" is not of the form \"c 1:3 rwm\""
        );
        assert_eq!(
            error_of("extends = \"own.toml\"\n"),
            "policy D/own.toml: `extends` leads in a circle"
        );
        assert!(error_of("rule = 1\n").contains("unknown field `rule`"));
        for (text, what) in [
            (
                "host-namespaces]\nforbid = [\"net\"]",
                "\"net\" is not a kind of namespace: pid, network",
            ),
            (
                "capabilities]\nallow = [\"SYS_ADMIN\"]",
                "\"SYS_ADMIN\" is not a capability",
            ),
            (
                "masked-paths]\nrequire = [\"proc/kcore\"]",
                "\"proc/kcore\" is not an absolute path",
            ),
            (
                "read-only-paths]\nrequire = [\"\"]",
                "\"\" is not an absolute path",
            ),
            (
                "host-paths]\nforbid = [\"etc\"]",
                "\"etc\" is neither absolute nor begins with **/",
            ),
            ("host-paths]\nallow = [\"/a/..\"]", "\"/a/..\" contains .."),
            (
                "runtime-sockets]\nforbid = [\"/run/x.sock\"]",
                "\"/run/x.sock\" is not the name of a socket",
            ),
            (
                "mount-types]\nforbid = [\"\"]",
                "\"\" is not a type of file system",
            ),
        ] {
            let error = error_of(&format!("[rules.{text}\n"));
            assert!(error.contains(what), "{error}");
        }
        assert_eq!(
            error_of("description = \"nothing\"\n"),
            "policy D/own.toml: it has no rules, and extends no policy that has some"
        );
    }

    #[test]
    fn a_policy_is_read_from_a_regular_file_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo.toml");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [path.to_str().unwrap(), "/dev/zero"] {
            let error = crate::error_chain(&Policy::load(path).unwrap_err());
            assert!(error.ends_with("not a regular file"), "{error}");
        }
    }
}
