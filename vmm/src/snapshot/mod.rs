//! A machine written down: what its processors and devices held in one file, its memory in another.
//!
//! Any number of machines go on from a snapshot, each in memory of its own: a page is copied when it is first written.
//! They then have all in common that the first had: also its keys, unless its guest renews them. Who may write the files
//! owns every machine that is made of them, so they are trusted as a kernel's image is; that they are whole, and fit
//! this host and this machine, is checked.

mod vcpu;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::GuestMemory;

use crate::devices::io_apic;
use crate::devices::serial::SerialRegisters;
use crate::devices::virtio::{PauseError, mmio};
use crate::exit::VmExit;
use crate::kvm::KvmError;
use crate::memory::{Memory, MemorySize};

pub(crate) use vcpu::VcpuState;

/// The version of what is written. Nothing reads another's.
const FORMAT: u32 = 2;

/// What the processors and devices held, in a snapshot's directory.
const STATE: &str = "machine.json";

/// The guest's memory in the order of its addresses, without the hole for devices. Pages of zeros are holes.
const MEMORY: &str = "memory";

/// How much memory is looked at at a time.
const CHUNK: usize = 64 << 10;

/// What is written or left a hole as a whole.
const PAGE: usize = 4096;

/// Why a machine cannot be written down, or cannot go on.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// A file cannot be made, written or read.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The state is no state.
    #[error("{} is not the state of a machine: make the snapshot anew", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The state is of a kind that this program does not know.
    #[error(
        "{} has format {found}, and this rt reads {FORMAT}: make the snapshot anew", path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u32,
    },
    /// The memory's file is of another size than the memory was.
    #[error("{} has {found} bytes in place of {expected}: make the snapshot anew", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The memory's.
        expected: u64,
    },
    /// It is of another machine.
    #[error("the snapshot is of another machine: {what}")]
    OtherMachine {
        /// What differs.
        what: String,
    },
    /// The host has changed since.
    #[error("the snapshot was made on a host with another processor, kernel or KVM: make it anew")]
    OtherHost,
    /// Only a machine that runs can be written down.
    #[error("the machine has ended: {0}")]
    Ended(VmExit),
    /// KVM does not tell or take something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM does not take an interrupt's route.
    #[error("leading the interrupts of the snapshot's devices")]
    Interrupts(#[source] io::Error),
    /// A device cannot be paused, or cannot go on.
    #[error(transparent)]
    Device(#[from] PauseError),
    /// A vCPU is gone.
    #[error("a vCPU's thread has ended")]
    VcpuEnded,
}

impl SnapshotError {
    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

/// What the processors and devices held.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    /// Bytes of memory.
    pub memory: u64,
    /// What KVM's clock of the machine showed, in nanoseconds.
    pub clock: u64,
    pub io_apic: io_apic::State,
    #[serde(with = "SerialRegisters")]
    pub serial: vm_superio::serial::SerialState,
    /// By their windows' addresses.
    pub devices: Vec<mmio::State>,
    /// By their index.
    pub vcpus: Vec<VcpuState>,
}

/// The file [`STATE`].
#[derive(Serialize, Deserialize)]
struct StateFile<S> {
    format: u32,
    machine: S,
}

/// A machine that was written down.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) state: MachineState,
    pub(crate) memory: File,
}

impl Snapshot {
    /// Opens the snapshot in `directory`.
    ///
    /// # Errors
    /// A file is missing, damaged, of another format or too short.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let path = directory.join(STATE);
        let text = fs::read(&path).map_err(SnapshotError::file("read", &path))?;
        let malformed = |source| SnapshotError::Malformed {
            path: path.clone(),
            source,
        };
        let state = match serde_json::from_slice::<StateFile<MachineState>>(&text) {
            Ok(StateFile {
                format: FORMAT,
                machine,
            }) => machine,
            other => {
                // What another format has beside its number is nobody's to say.
                let file: StateFile<IgnoredAny> =
                    serde_json::from_slice(&text).map_err(malformed)?;
                let found = file.format;
                return Err(match other {
                    Err(source) if found == FORMAT => malformed(source),
                    _ => SnapshotError::Format {
                        path: path.clone(),
                        found,
                    },
                });
            }
        };
        let path = directory.join(MEMORY);
        let memory = File::open(&path).map_err(SnapshotError::file("open", &path))?;
        let metadata = memory
            .metadata()
            .map_err(SnapshotError::file("look at", &path))?;
        if metadata.len() != state.memory {
            return Err(SnapshotError::Truncated {
                path,
                found: metadata.len(),
                expected: state.memory,
            });
        }
        Ok(Self { state, memory })
    }

    /// Checks that a machine of this size is what was written down.
    pub(crate) fn check(&self, vcpus: u8, memory: MemorySize) -> Result<(), SnapshotError> {
        let other = |what| Err(SnapshotError::OtherMachine { what });
        let state = &self.state;
        if state.vcpus.len() != usize::from(vcpus) {
            return other(format!("{} vCPUs, not {vcpus}", state.vcpus.len()));
        }
        if state.memory != memory.bytes() {
            let bytes = memory.bytes();
            return other(format!("{} bytes of memory, not {bytes}", state.memory));
        }
        Ok(())
    }
}

/// The files of a snapshot that is to be written, empty.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// The memory.
    pub memory: File,
    /// All else. A snapshot without it is none.
    pub state: File,
}

impl SnapshotFiles {
    /// Their names in a snapshot's directory.
    pub const NAMES: [&str; 2] = [MEMORY, STATE];

    /// Makes them in `directory`, which has none of a snapshot.
    ///
    /// # Errors
    /// The file system's, or there are some.
    pub fn create(directory: &Path) -> Result<Self, SnapshotError> {
        let create = |name: &str| {
            let path = directory.join(name);
            let mut options = File::options();
            let file = options.write(true).create_new(true).mode(0o600).open(&path);
            file.map_err(SnapshotError::file("create", &path))
        };
        Ok(Self {
            memory: create(MEMORY)?,
            state: create(STATE)?,
        })
    }

    /// Writes a machine that stands still.
    pub(crate) fn write(&self, state: &MachineState, memory: &Memory) -> Result<(), SnapshotError> {
        let failed = |name| SnapshotError::file("write", Path::new(name));
        write_memory(&self.memory, memory).map_err(failed(MEMORY))?;
        let whole = StateFile {
            format: FORMAT,
            machine: state,
        };
        serde_json::to_vec(&whole)
            .map_err(io::Error::from)
            .and_then(|text| (&self.state).write_all(&text))
            .map_err(failed(STATE))
    }
}

fn write_memory(file: &File, memory: &Memory) -> io::Result<()> {
    file.set_len(memory.size().bytes())?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    for (start, length) in memory.size().ranges() {
        let mut done = 0;
        while done < length {
            // At most a chunk.
            let part = length.saturating_sub(done).min(CHUNK as u64) as usize;
            let address = vm_memory::GuestAddress(start.0 + done);
            let slice = memory.ram().get_slice(address, part);
            slice
                .map_err(io::Error::other)?
                .copy_to(&mut buffer[..part]);
            for (page, bytes) in (0u64..).zip(buffer[..part].chunks(PAGE)) {
                if bytes.iter().any(|byte| *byte != 0) {
                    file.write_all_at(bytes, at + done + page * PAGE as u64)?;
                }
            }
            done += part as u64;
        }
        at += length;
    }
    Ok(())
}
