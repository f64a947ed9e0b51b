//! What can go wrong with a guest kernel, told to the person who can mend it.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the guest kernels: the operation, its object, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No guest kernel is installed at all.
    #[error(
        "there is no guest kernel in {}: build one with `make guest`, or take the distribution's with `rt guest import --kernel /boot/vmlinuz-...`",
        .root.display()
    )]
    NoGuest {
        /// Where guests are looked for.
        root: PathBuf,
    },
    /// The guest asked for by name is not installed.
    #[error(
        "there is no guest kernel '{name}' in {}: `rt guest list` shows what there is, `make guest` and `rt guest import` add one",
        .root.display()
    )]
    UnknownGuest {
        /// The name asked for.
        name: String,
        /// Where guests are looked for.
        root: PathBuf,
    },
    /// A guest of this name is there already.
    #[error(
        "guest kernel '{name}' exists already: remove it with `rt guest remove {name}`, or give another `--name`"
    )]
    Exists {
        /// The name.
        name: String,
    },
    /// The name cannot be that of a guest.
    #[error(
        "'{name}' cannot name a guest kernel: use up to 128 letters, digits and any of . _ + - and begin with a letter or digit"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// The directory is there, but a file of it is missing or unreadable.
    #[error("guest kernel in {} is damaged: {what}; import or build it again", .dir.display())]
    Damaged {
        /// The guest's directory.
        dir: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// `guest.json` does not parse.
    #[error("cannot parse {}", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The file given as a kernel is none that can be used.
    #[error("{} is not a usable kernel: {what}", .path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// The kernel image's payload does not unpack.
    #[error("cannot unpack the {format} payload of {}", .path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// The compression.
        format: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The module tree is not usable.
    #[error("module tree {}: {what}", .path.display())]
    Modules {
        /// The tree, as `/lib/modules/<release>`.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A driver without which a microVM does not work is neither built in nor a module.
    #[error(
        "driver {driver} is neither built into the kernel nor a module in {}: install the kernel's full module package, or choose another kernel",
        .path.display()
    )]
    MissingDriver {
        /// The driver's module name.
        driver: &'static str,
        /// The tree searched.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// Its object.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Ties an I/O error to the operation and the file it happened to.
    pub(super) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
