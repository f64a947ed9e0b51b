//! What can go wrong with an image, told to the person who has it.

use std::io;
use std::path::{Path, PathBuf};

/// An error of unpacking an image: the operation, its object, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was given is not an image that can be read.
    #[error("{} is not an image: {what}", .path.display())]
    NotAnImage {
        /// What was given.
        path: PathBuf,
        /// Why, and what would be.
        what: String,
    },
    /// The image lacks a file that it refers to.
    #[error("the image has no {name}: it is incomplete")]
    Missing {
        /// The file, as its place in the layout.
        name: String,
    },
    /// A JSON document of the image does not parse.
    #[error("cannot parse the image's {name}")]
    Json {
        /// The document.
        name: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The image's description contradicts itself or asks for what is not supported.
    #[error("the image's {name} {what}")]
    Invalid {
        /// The document or blob.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The choice of `--tag` and `--platform` does not leave exactly one image.
    #[error("{what}; there are: {available}")]
    Choice {
        /// What was asked.
        what: String,
        /// What there is.
        available: String,
    },
    /// A blob's content is not what its digest says.
    #[error("blob {expected} is damaged: its content is {actual}; fetch the image again")]
    Digest {
        /// The digest that the image gives.
        expected: String,
        /// The digest of the content.
        actual: String,
    },
    /// A layer's entry cannot be unpacked, or must not be.
    #[error("layer {layer}, entry {entry:?}: {what}")]
    Entry {
        /// The layer's number, from 1.
        layer: usize,
        /// The entry's path.
        entry: String,
        /// What is wrong with it.
        what: String,
    },
    /// A system call failed on a layer's entry.
    #[error("layer {layer}, entry {entry:?}: cannot {action}")]
    EntryIo {
        /// The layer's number, from 1.
        layer: usize,
        /// The entry's path.
        entry: String,
        /// The operation.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer cannot be read.
    #[error("cannot read layer {layer}")]
    Layer {
        /// The layer's number, from 1.
        layer: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image is larger than allowed.
    #[error(
        "layer {layer} unpacks to more than {limit}; if the image is trusted, raise `--max-size`"
    )]
    TooLarge {
        /// The layer's number, from 1.
        layer: usize,
        /// The limit.
        limit: String,
    },
    /// The image's user is not in its user database.
    #[error("the image runs as {kind} '{name}', which is not in its {file}")]
    NoSuchUser {
        /// `user` or `group`.
        kind: &'static str,
        /// The name.
        name: String,
        /// The database.
        file: &'static str,
    },
    /// The bundle's directory is there already.
    #[error("{} exists already: name a directory that does not", .path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// The caller cannot make files of other owners.
    #[error(
        "unpacking an image needs root: its files have owners, devices and capabilities of their own"
    )]
    NotRoot,
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
