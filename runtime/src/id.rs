//! Container ids.
//!
//! An id comes from the caller and becomes a directory name, a cgroup name and part of socket paths. It is checked
//! once, here; every other module takes a [`ContainerId`] and checks nothing.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest id, in bytes: it is the name of a directory and of a cgroup (`NAME_MAX`).
pub const MAX_LENGTH: usize = 255;

/// Why a string is no container id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The empty string.
    #[error("invalid container ID format: the id is empty")]
    Empty,
    /// Longer than [`MAX_LENGTH`].
    #[error("invalid container ID format: {length} bytes, at most {MAX_LENGTH} are allowed")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// `.` or `..`, which name directories.
    #[error("invalid container ID format: {0:?} names a directory")]
    Dots(String),
    /// A character outside of the alphabet.
    #[error(
        "invalid container ID format: {character:?} in {id:?}: use letters, digits and `_+-.` only"
    )]
    Character {
        /// The id as given.
        id: String,
        /// The first character that is not allowed.
        character: char,
    },
}

/// An id that is a safe file name: 1 to 255 of `A-Za-z0-9_+-.`, neither `.` nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = IdError;

    fn from_str(id: &str) -> Result<Self, IdError> {
        if id.is_empty() {
            return Err(IdError::Empty);
        }
        if id.len() > MAX_LENGTH {
            return Err(IdError::TooLong { length: id.len() });
        }
        if id == "." || id == ".." {
            return Err(IdError::Dots(id.to_owned()));
        }
        match id
            .chars()
            .find(|c| !(c.is_ascii_alphanumeric() || "_+-.".contains(*c)))
        {
            Some(character) => Err(IdError::Character {
                id: id.to_owned(),
                character,
            }),
            None => Ok(Self(id.to_owned())),
        }
    }
}

impl TryFrom<String> for ContainerId {
    type Error = IdError;

    fn try_from(id: String) -> Result<Self, IdError> {
        id.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl AsRef<Path> for ContainerId {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_clients_use_are_accepted() {
        let docker = "f".repeat(64);
        for id in [
            "a",
            "test_1",
            "a.b-c+d",
            "-leading",
            "...",
            &docker,
            &"x".repeat(255),
        ] {
            assert_eq!(id.parse::<ContainerId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn ids_that_would_leave_the_directory_are_refused() {
        for id in ["../x", "a/b", "/", "a\0b", "a b", "ä", "~x"] {
            assert!(
                matches!(id.parse::<ContainerId>(), Err(IdError::Character { .. })),
                "{id:?}"
            );
        }
        assert_eq!("".parse::<ContainerId>(), Err(IdError::Empty));
        assert_eq!(".".parse::<ContainerId>(), Err(IdError::Dots(".".into())));
        assert_eq!("..".parse::<ContainerId>(), Err(IdError::Dots("..".into())));
        assert_eq!(
            "x".repeat(256).parse::<ContainerId>(),
            Err(IdError::TooLong { length: 256 })
        );
    }

    #[test]
    fn the_error_shows_the_character() {
        let error = "a/b".parse::<ContainerId>().unwrap_err().to_string();
        assert_eq!(
            error,
            "invalid container ID format: '/' in \"a/b\": use letters, digits and `_+-.` only"
        );
    }

    #[test]
    fn an_id_in_a_file_is_checked_too() {
        assert!(serde_json::from_str::<ContainerId>("\"../etc\"").is_err());
    }
}
