//! Checkpoints: a machine with a container in it, written down for the same container to go on from.
//!
//! The VMM process, in its jail, can make no files: who asks for a checkpoint makes them and hands them over by the
//! machine's control socket. A restored machine has new connections to its host, the same files under the same names, and
//! the network that it had. Who may write to the images owns the machine that goes on from them, so that only root may;
//! that they are whole, and of a machine like this one, is checked.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use engine::fault;
use prost::Message;
use protocol::message::{ContainerRequest, Empty, Network};
use protocol::method::{Pause, Proceed, Resume, Suspend};
use serde::{Deserialize, Serialize};
use vmm::RunningVm;
use vmm::snapshot::{Snapshot, SnapshotError, SnapshotFiles};

use super::agent::Agent;
use super::control::{self, Request};
use super::report::{self, Reporter};
use super::template::{Shape, TemplateError, check_owner};
use super::vmm_process::{Orders, VmmError};

/// What the images are of, in their directory. Without it there is no checkpoint.
const MANIFEST: &str = "checkpoint.json";

/// The version of [`MANIFEST`]. Nothing reads another's.
const FORMAT: u32 = 1;

/// Why a machine cannot be written down, or none can go on from the images.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The manifest is none.
    #[error("{} is not the description of a microVM's checkpoint", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is of another version.
    #[error("{} has format {found}, and this rt reads {FORMAT}: restore it by the rt that made it", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u32,
    },
    /// It is of another container.
    #[error("the checkpoint is of the container {id}: restore it under this id")]
    OtherContainer {
        /// Whose it is.
        id: String,
    },
    /// The machine would not be the same.
    #[error("the checkpoint was made with another {what}: restore it with the same")]
    OtherMachine {
        /// What differs.
        what: &'static str,
    },
    /// What the machine has that images do not.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The machine's own state.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The files that the machine is made of cannot be looked at, or others could have put a machine of theirs in place of
    /// the images.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The machine cannot be asked.
    #[error("cannot ask the VMM process for a checkpoint")]
    Ask(#[source] io::Error),
    /// The VMM process's own words.
    #[error(transparent)]
    Refused(#[from] protocol::Failure),
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::File {
        action,
        path,
        source,
    }
}

/// What a machine is, beside its state: one that goes on from its checkpoint must be the same.
#[derive(Debug, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    id: String,
    shape: Shape,
    /// The network namespace, as the agent was told of it.
    network: Vec<u8>,
    volumes: usize,
    /// Whether there is a device for volumes, though there need be none.
    pub shares_volumes: bool,
    root_read_only: bool,
    terminal: bool,
}

impl Manifest {
    /// Of the machine that these orders lead to.
    ///
    /// # Errors
    /// A file that it boots from cannot be looked at.
    pub fn of(
        orders: &Orders,
        interfaces: usize,
        network: Option<&Network>,
        shares_volumes: bool,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            format: FORMAT,
            id: orders.id.clone(),
            shape: Shape::of(&orders.boot, interfaces)?,
            network: network.map(Network::encode_to_vec).unwrap_or_default(),
            volumes: orders.volumes.len(),
            shares_volumes,
            root_read_only: orders.rootfs_read_only,
            terminal: orders.console_socket.is_some(),
        })
    }

    /// Checks that a machine that is to be made is what was written down.
    ///
    /// # Errors
    /// It is another, and by what.
    pub fn check(&self, now: &Self) -> Result<(), CheckpointError> {
        if self.id != now.id {
            let id = self.id.clone();
            return Err(CheckpointError::OtherContainer { id });
        }
        let differs = self.shape.difference(&now.shape).or_else(|| {
            [
                (
                    self.network != now.network,
                    "network: interfaces, addresses or routes differ",
                ),
                (self.volumes != now.volumes, "number of volumes"),
                (self.root_read_only != now.root_read_only, "`root.readonly`"),
                (self.terminal != now.terminal, "`process.terminal`"),
            ]
            .into_iter()
            .find_map(|(differs, what)| differs.then_some(what))
        });
        match differs {
            Some(what) => Err(CheckpointError::OtherMachine { what }),
            None => Ok(()),
        }
    }
}

/// The images of a checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// What they are of.
    pub manifest: Manifest,
    /// The machine.
    pub snapshot: Snapshot,
}

impl Checkpoint {
    /// Opens the images in `directory`.
    ///
    /// # Errors
    /// Others may write there, or a file is missing, damaged or of another version.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        check_owner(directory)?;
        let path = directory.join(MANIFEST);
        let text = fs::read(&path).map_err(failed("read", &path))?;
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let malformed = |source| CheckpointError::Malformed {
            path: path.clone(),
            source,
        };
        let Version { format: found } = serde_json::from_slice(&text).map_err(malformed)?;
        if found != FORMAT {
            let path = path.clone();
            return Err(CheckpointError::Format { path, found });
        }
        Ok(Self {
            manifest: serde_json::from_slice(&text).map_err(malformed)?,
            snapshot: Snapshot::open(directory)?,
        })
    }
}

/// Images that are being made, beside those that are there. What is not finished is taken away.
struct Unfinished(PathBuf);

impl Unfinished {
    fn create(directory: &Path) -> Result<Self, CheckpointError> {
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        builder
            .recursive(true)
            .create(directory)
            .map_err(failed("create", directory))?;
        check_owner(directory)?;
        let own = directory.join(format!(".new-{}", std::process::id()));
        builder
            .recursive(false)
            .create(&own)
            .map_err(failed("create", &own))?;
        Ok(Self(own))
    }

    /// Takes the place of the images in `directory`. The manifest, without which there are none, goes first and comes last.
    /// Machines that went on from what was there keep it.
    fn put(&self, directory: &Path) -> Result<(), CheckpointError> {
        let manifest = directory.join(MANIFEST);
        match fs::remove_file(&manifest) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &manifest)(error));
            }
            _ => {}
        }
        for name in SnapshotFiles::NAMES.into_iter().chain([MANIFEST]) {
            let path = directory.join(name);
            fs::rename(self.0.join(name), &path).map_err(failed("create", &path))?;
        }
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Has the machine of the container with this `vm` directory written down in `directory`; it then goes on or ends.
///
/// # Errors
/// It cannot be written down; then it goes on, and images that were there are as they were.
pub fn write(vm_dir: &Path, directory: &Path, leave_running: bool) -> Result<(), CheckpointError> {
    let unfinished = Unfinished::create(directory)?;
    let files = SnapshotFiles::create(&unfinished.0)?;
    let path = unfinished.0.join(MANIFEST);
    let mut options = File::options();
    let manifest = options.write(true).create_new(true).mode(0o600).open(&path);
    let manifest = manifest.map_err(failed("create", &path))?;
    fault::point("checkpoint.files-made");
    let (mut report, reporter) =
        report::channel("the VMM process").map_err(CheckpointError::Ask)?;
    let report_write = reporter.into_fd();
    let fds = [&files.memory, &files.state, &manifest].map(AsRawFd::as_raw_fd);
    let fds = [&fds[..], &[report_write.as_raw_fd()]].concat();
    // It waits at the connection until the images are in their place: without them it goes on.
    let request = Request::Checkpoint { leave_running };
    let mut control = control::ask(vm_dir, request, &fds).map_err(CheckpointError::Ask)?;
    drop(report_write);
    report.wait()?;
    fault::point("checkpoint.written");
    unfinished.put(directory)?;
    fault::point("checkpoint.put");
    control.write_all(&[0]).map_err(CheckpointError::Ask)?;
    Ok(report.wait()?)
}

/// What is to be made, and whom to tell.
struct Order {
    asker: UnixStream,
    leave_running: bool,
    files: SnapshotFiles,
    manifest: File,
    reporter: Reporter,
}

/// In the VMM process: writes the machine down, as `asker` wants it, in the files that came along. If it is to end, it
/// stands still when this returns whom to tell that it has.
pub fn serve(
    asker: UnixStream,
    leave_running: bool,
    fds: Vec<OwnedFd>,
    orders: &Orders,
    manifest: &Manifest,
    vm: &mut RunningVm,
    agent: &mut Agent,
) -> Option<Reporter> {
    let Ok([memory, state, images_manifest, report]) = <[OwnedFd; 4]>::try_from(fds) else {
        tracing::warn!("a request for a checkpoint without its files");
        return None;
    };
    let mut order = Order {
        asker,
        leave_running,
        files: SnapshotFiles {
            memory: memory.into(),
            state: state.into(),
        },
        manifest: images_manifest.into(),
        reporter: report.into(),
    };
    match write_down(&mut order, orders, manifest, vm, agent) {
        Ok(()) if !leave_running => Some(order.reporter),
        Ok(()) => {
            // Who is gone does not want to know.
            let _ = order.reporter.ready();
            None
        }
        Err(error) => {
            order.reporter.failed(&error);
            None
        }
    }
}

fn write_down(
    order: &mut Order,
    orders: &Orders,
    manifest: &Manifest,
    vm: &mut RunningVm,
    agent: &mut Agent,
) -> Result<(), VmmError> {
    refuse(orders)?;
    let container = ContainerRequest {
        id: orders.id.clone(),
    };
    // A restored machine is to do nothing before it has randomness and a time of its own.
    agent.call::<Pause>(&container)?;
    let suspended = agent.call::<Suspend>(&Empty {}).map_err(VmmError::from);
    let written = suspended.and_then(|_| write_machine(order, manifest, vm));
    if written.is_ok() && !order.leave_running {
        return Ok(());
    }
    let went_on = agent
        .call::<Proceed>(&Empty {})
        .and_then(|_| agent.call::<Resume>(&container));
    written.and(went_on.map(drop).map_err(VmmError::from))
}

fn write_machine(
    order: &mut Order,
    manifest: &Manifest,
    vm: &mut RunningVm,
) -> Result<(), VmmError> {
    let paused = vm.pause().map_err(CheckpointError::from)?;
    let written = paused
        .write(&order.files)
        .map_err(CheckpointError::from)
        .and_then(|()| {
            let text = serde_json::to_vec(manifest).map_err(io::Error::from);
            text.and_then(|text| (&order.manifest).write_all(&text))
                .map_err(failed("write", Path::new(MANIFEST)))
        })
        .and_then(|()| {
            let told = order.reporter.arrived();
            told.and_then(|()| order.asker.read_exact(&mut [0]))
                .map_err(CheckpointError::Ask)
        });
    if order.leave_running || written.is_err() {
        paused.resume();
    } else {
        paused.end();
    }
    Ok(written?)
}

/// Refuses what images would not have.
///
/// # Errors
/// The machine has it.
pub fn refuse(orders: &Orders) -> Result<(), CheckpointError> {
    if orders.is_sandbox {
        return Err(CheckpointError::Unsupported(
            "the machine is a pod's: its containers would be cut off from the processes that stand for them",
        ));
    }
    if !orders.disks.is_empty() {
        return Err(CheckpointError::Unsupported(
            "the machine has disks, whose content the images would not have: take them out of the configuration",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Images that say `text`.
    fn put(directory: &Path, text: &str) -> Result<(), CheckpointError> {
        let unfinished = Unfinished::create(directory)?;
        for name in SnapshotFiles::NAMES.into_iter().chain([MANIFEST]) {
            fs::write(unfinished.0.join(name), text).unwrap();
        }
        unfinished.put(directory)
    }

    #[test]
    fn images_take_the_place_of_older_ones_or_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("deep/images");
        if !nix::unistd::geteuid().is_root() {
            let error = put(&images, "any").unwrap_err();
            assert!(
                matches!(
                    error,
                    CheckpointError::Template(TemplateError::Writable { .. })
                ),
                "{error}"
            );
            return;
        }
        for text in ["first", "second"] {
            put(&images, text).unwrap();
        }
        drop(Unfinished::create(&images).unwrap());
        let entries = fs::read_dir(&images).unwrap();
        let texts: Vec<_> = entries
            .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
            .collect();
        assert_eq!(texts, ["second"; 3]);
    }

    #[test]
    fn a_description_that_is_none_or_another_s_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let path = dir.path().join(MANIFEST);
        for (text, reason) in [
            ("", "is not the description of a microVM's checkpoint"),
            ("[]", "is not the description of a microVM's checkpoint"),
            (r#"{"format":9}"#, "has format 9, and this rt reads 1"),
            (
                r#"{"format":1}"#,
                "is not the description of a microVM's checkpoint",
            ),
        ] {
            fs::write(&path, text).unwrap();
            let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
