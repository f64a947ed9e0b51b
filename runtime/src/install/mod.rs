//! `rt install`: makes a machine ready to run pods with `rt`.
//!
//! The administrator calls it, so the machine's files and its containerd are trusted.

mod containerd;
mod node;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Make the shim known to containerd, here or on the node that this container runs on
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Containerd(containerd::Containerd),
    Node(node::Node),
}

/// Why it could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// containerd does not say what its settings are.
    #[error("cannot get the settings of the containerd that is configured by {}: {reason}", config.display())]
    Settings {
        /// Its configuration.
        config: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A file operation failed.
    #[error("{operation} {}", path.display())]
    File {
        /// As a verb.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// containerd was not started again.
    #[error("`systemctl restart containerd` on the node: {0}")]
    Restart(String),
    /// The output could not be written.
    #[error("write the output")]
    Output(#[from] io::Error),
}

impl Args {
    /// Installs, and says what was done and what is left to do.
    ///
    /// # Errors
    /// containerd's version is not known, or a file could not be written.
    pub fn run(&self, out: &mut impl Write) -> Result<(), InstallError> {
        match &self.what {
            What::Containerd(containerd) => containerd.install(out).map(drop),
            What::Node(node) => node.install(out),
        }
    }
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::File {
        operation,
        path,
        source,
    }
}

/// Puts a file in another's place, which whoever uses that keeps.
fn replace(path: &Path, mode: u32, content: &mut impl Read) -> Result<(), InstallError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).map_err(file_error("create", dir))?;
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let written = File::create(&temporary).and_then(|mut file| {
        io::copy(content, &mut file)?;
        file.set_permissions(PermissionsExt::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        file_error("write", path)(source)
    })
}
