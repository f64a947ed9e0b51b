//! Guest kernels: what a microVM boots, how one is taken from a distribution, and which one is used.
//!
//! A guest is a directory that the host's administrator made, by `make guest` or `rt guest import`. Its files are
//! trusted as the runtime's own binary is. What `import` reads (a kernel image, a module tree) comes from the same
//! hand, but is parsed with checked arithmetic and bounded sizes: a truncated file is a common accident.

mod bzimage;
pub mod cli;
mod cpio;
mod elf;
mod error;
mod import;
pub mod initramfs;
mod modules;
mod record;
mod store;

pub use error::Error;
pub use import::{Import, Imported};
pub use record::{Kind, Record};
pub use store::{DEFAULT_ROOT, Guest, Listed, RECORD as RECORD_FILE, Store};
