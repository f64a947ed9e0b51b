//! `/etc/rt/config.toml`: what the host's administrator decides.
//!
//! The file is trusted (root writes it); errors name the file and the key. A missing file at the default place means
//! the defaults; one named by `--config` must be there.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::isolation::{ISOLATION_ANNOTATION, Model};

/// Where the configuration is unless `--config` names another file.
pub const DEFAULT_PATH: &str = "/etc/rt/config.toml";

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is no TOML, has a wrong type or an unknown key.
    #[error("configuration {}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and reason.
        message: String,
    },
}

/// The configuration with every default filled in.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The model of bundles that do not say one; none: the binary's name decides, else `container`.
    pub isolation: Option<Model>,
    /// The annotations that count. A bundle's other annotations are carried, never obeyed.
    pub annotations: Vec<String>,
    /// The microVM model's settings.
    pub microvm: MicrovmConfig,
}

/// `[microvm]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MicrovmConfig {
    /// The directory of guests, one directory each.
    pub guests: PathBuf,
    /// The name of the guest to boot; none: the only one there is, or `default`.
    pub guest: Option<String>,
    /// The directory of templates: a microVM that boots as one of them did goes on from it instead.
    pub templates: PathBuf,
    /// The agent's binary; none: `rt-agent` beside `rt`.
    pub agent: Option<PathBuf>,
    /// Virtual CPUs where the bundle does not say.
    pub vcpus: u32,
    /// Guest memory in MiB where the bundle does not say.
    pub memory_mib: u64,
    /// How long a guest may take from its first instruction to its agent's first word, in seconds.
    pub boot_limit_seconds: u16,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            isolation: None,
            annotations: vec![ISOLATION_ANNOTATION.to_owned()],
            microvm: MicrovmConfig::default(),
        }
    }
}

impl Default for MicrovmConfig {
    fn default() -> Self {
        Self {
            guests: PathBuf::from("/var/lib/rt/guests"),
            guest: None,
            templates: PathBuf::from("/var/lib/rt/templates"),
            agent: None,
            vcpus: 1,
            memory_mib: 256,
            boot_limit_seconds: 60,
        }
    }
}

impl MicrovmConfig {
    /// [`MicrovmConfig::boot_limit_seconds`], at least one.
    pub fn boot_limit(&self) -> Duration {
        Duration::from_secs(self.boot_limit_seconds.max(1).into())
    }
}

impl Config {
    /// Reads `path`, or the default place if none is given.
    ///
    /// # Errors
    /// The file is not readable (a missing one at the default place is no error) or does not hold a configuration.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(file) {
            Ok(text) => Self::parse(file, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_none() => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read {
                path: file.to_owned(),
                source,
            }),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let message = error.to_string().trim_end().to_owned();
            ConfigError::Parse {
                path: path.to_owned(),
                message,
            }
        })
    }

    /// Whether the administrator lets `annotation` have a meaning.
    pub fn allows_annotation(&self, annotation: &str) -> bool {
        self.annotations.iter().any(|allowed| allowed == annotation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/etc/rt/config.toml"), text)
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert!(Config::default().allows_annotation("dev.rt.isolation"));
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(
            "isolation = \"microvm\"\nannotations = []\n[microvm]\nguests = \"/g\"\nguest = \"own\"\n\
             agent = \"/a\"\nvcpus = 2\nmemory_mib = 512\n",
        )
        .unwrap();
        assert_eq!(config.isolation, Some(Model::Microvm));
        assert!(!config.allows_annotation("dev.rt.isolation"));
        assert_eq!(config.microvm.guest.as_deref(), Some("own"));
        assert_eq!((config.microvm.vcpus, config.microvm.memory_mib), (2, 512));
    }

    #[test]
    fn errors_name_the_file_the_line_and_the_key() {
        let message = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(
            message("isolation = \"vm\""),
            "configuration /etc/rt/config.toml: TOML parse error at line 1, column 13\n  |\n1 | isolation = \"vm\"\n  |             \
             ^^^^\nunknown variant `vm`, expected `container` or `microvm`"
        );
        assert!(message("[microvm]\nvcpu = 1").contains("unknown field `vcpu`, expected one of"));
        assert!(message("[microvm]\nvcpus = \"1\"").contains("line 2, column 9"));
    }

    #[test]
    fn a_named_file_must_be_there() {
        let error = Config::load(Some(Path::new("/nonexistent/rt.toml"))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "read the configuration /nonexistent/rt.toml"
        );
    }
}
