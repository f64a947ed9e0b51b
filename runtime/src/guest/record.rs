//! `guest.json`: what a guest directory says of itself.

use serde::{Deserialize, Serialize};

/// How a guest kernel came to be.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Built from source with our configuration (`make guest`).
    Built,
    /// Taken from a distribution (`rt guest import`).
    Imported,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Built => "built",
            Self::Imported => "imported",
        })
    }
}

/// The content of `guest.json`. Fields that this version does not know are kept out of the way.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Record {
    /// The guest's name, equal to that of its directory.
    pub name: String,
    /// How it came to be.
    pub kind: Kind,
    /// What `uname -r` prints in the guest.
    pub kernel_release: String,
    /// When it was made, in seconds since the epoch.
    pub created: u64,
    /// Whether `modules.cpio` belongs to it.
    #[serde(default)]
    pub modules: bool,
    /// The drivers a microVM may use that this kernel has, built in or packed, by module name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drivers: Vec<String>,
    /// The file the kernel was taken from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}
