//! `rt install node`: from a container that sees a node's root directory, makes the node run pods with `rt`.
//!
//! A DaemonSet's pods call it, from an image that has what is to be installed. The node's root becomes this process's, so
//! that the node's links lead where they do there, and its containerd says what its settings are. What the image has is
//! open by then.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::containerd::{Containerd, Sandboxer};
use super::{InstallError, file_error, replace};
use crate::guest;

/// The programs, beside this one.
const PROGRAMS: [&str; 3] = ["rt", "rt-agent", "containerd-shim-rt-v2"];

/// Other names of programs, which select the microVM model.
const LINKS: [(&str, &str); 2] = [
    ("rt-microvm", "rt"),
    ("containerd-shim-rt-microvm-v2", "containerd-shim-rt-v2"),
];

/// Where the programs of the node are, containerd and systemctl among them.
const NODE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Install this rt, its guest kernels and its handlers on the node whose root directory is mounted here
#[derive(Debug, clap::Args)]
pub(super) struct Node {
    /// The node's root directory
    #[arg(long, value_name = "DIR", default_value = "/host")]
    host: PathBuf,
    /// Where the node gets the programs: must be on the PATH of its containerd
    #[arg(long, value_name = "DIR", default_value = "/usr/local/bin")]
    bin: PathBuf,
    /// Who makes a pod's sandbox: containerd from its pause image, or (containerd 2) the shim, without an image
    #[arg(long, value_enum, default_value_t)]
    sandboxer: Sandboxer,
    /// Have the node's systemd start containerd again if something has changed
    #[arg(long)]
    restart: bool,
}

/// A file of the image, for the node.
struct Copy {
    content: File,
    to: PathBuf,
    mode: u32,
}

impl Node {
    /// Installs, and says what was done.
    ///
    /// # Errors
    /// A file could not be read or written, the node is none, or its containerd does not say what its settings are.
    pub(super) fn install(&self, out: &mut impl Write) -> Result<(), InstallError> {
        let mut copies = self.programs()?;
        copies.extend(guests(Path::new(guest::DEFAULT_ROOT))?);
        nix::unistd::chroot(&self.host)
            .and_then(|()| nix::unistd::chdir("/"))
            .map_err(|errno| file_error("enter", &self.host)(errno.into()))?;
        for mut copy in copies {
            replace(&copy.to, copy.mode, &mut copy.content)?;
            writeln!(out, "wrote {}", copy.to.display())?;
        }
        for (name, target) in LINKS {
            let link = self.bin.join(name);
            match symlink(target, &link) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => made.map_err(file_error("make the link", &link))?,
            }
        }
        let changed = Containerd::of_node(self.sandboxer, NODE_PATH).install(out)?;
        if changed && self.restart {
            restart()?;
            writeln!(out, "restarted containerd")?;
        }
        Ok(())
    }

    fn programs(&self) -> Result<Vec<Copy>, InstallError> {
        let own = std::env::current_exe().map_err(file_error("find", Path::new("rt")))?;
        PROGRAMS
            .into_iter()
            .map(|name| {
                let from = own.with_file_name(name);
                Ok(Copy {
                    content: File::open(&from).map_err(file_error("open", &from))?,
                    to: self.bin.join(name),
                    mode: 0o755,
                })
            })
            .collect()
    }
}

/// The files of the guests in `root`. Of each, the record is the last: without it there is no guest.
fn guests(root: &Path) -> Result<Vec<Copy>, InstallError> {
    let mut copies = Vec::new();
    for guest in entries(root)? {
        let mut files = entries(&guest)?;
        files.sort_by_key(|file| file.ends_with(guest::RECORD_FILE));
        for file in files {
            copies.push(Copy {
                content: File::open(&file).map_err(file_error("open", &file))?,
                to: file,
                mode: 0o644,
            });
        }
    }
    Ok(copies)
}

/// What is in a directory; nothing, if there is none.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(file_error("read", directory))?,
    };
    entries
        .map(|entry| Ok(entry.map_err(file_error("read", directory))?.path()))
        .collect()
}

fn restart() -> Result<(), InstallError> {
    let output = Command::new("systemctl")
        .args(["restart", "containerd"])
        .env("PATH", NODE_PATH)
        // It would do nothing in a directory that is not its systemd's root, and looks at that by what it may not see.
        .env("SYSTEMD_IGNORE_CHROOT", "1")
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|error| InstallError::Restart(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(InstallError::Restart(said.trim().to_owned()))
        }
    }
}
