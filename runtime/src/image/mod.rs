//! From an image to a bundle: OCI layouts and archives, and the archives of `docker save`.
//!
//! An image is hostile in every byte: its JSON, its digests, and above all the paths, links and sizes in its layers.
//! Nothing outside of the target is written or read whatever they say: names are resolved by the kernel, below a
//! descriptor of the root file system ([`root`]), sizes are bounded, and a failed unpacking leaves nothing behind.

mod budget;
pub mod cli;
mod config;
mod digest;
mod error;
mod layer;
mod layout;
mod manifest;
mod root;
mod source;
mod unpack;
mod users;

pub use error::Error;
pub use manifest::Platform;
pub use unpack::{Unpack, Unpacked};
