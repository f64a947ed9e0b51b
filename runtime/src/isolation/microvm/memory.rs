//! Memory that comes and goes while a machine runs, as `update` sets the limit of its workload.
//!
//! Who calls `update` allows the machine the memory on the host, asks the VMM process for it, and waits until the guest has
//! plugged it; only then does the workload get its new limit, in the guest. A call that is cut off in between leaves a
//! machine with more memory and a workload with the limit that it had, which is what `state` and `events` tell. A lower
//! limit goes the other way: the workload's first, then the guest gives back what it can, and the host allows what is left.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use engine::cgroup::{self, Cgroup};
use engine::fault;
use nix::sys::sysinfo::sysinfo;
use oci_spec::runtime::{LinuxMemory, LinuxResources};
use protocol::{Code, Failure};
use serde::{Deserialize, Serialize};
use vmm::RunningVm;

use super::agent::CALL_LIMIT;
use super::control::{self, Request};
use super::{pod, sizing};
use crate::isolation::{IsolationError, Target};

/// How long a guest may take to plug memory, and for each GiB of it. It takes some hundred milliseconds for a GiB.
const PLUG_LIMIT: Duration = Duration::from_secs(60);
const PLUG_LIMIT_PER_GIB: Duration = Duration::from_secs(2);

/// How long it is waited for a guest to give memory back. It goes on doing so when nobody waits any more.
const UNPLUG_LIMIT: Duration = Duration::from_secs(5);

/// Why a machine does not get the memory.
#[derive(Debug, thiserror::Error)]
enum MemoryError {
    /// The VMM process cannot be asked.
    #[error("cannot ask the VMM process for memory")]
    Ask(#[source] io::Error),
    /// Its own words.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// The machine is a pod's.
    #[error(
        "`linux.resources.memory.limit` is {limit}: the pod's machine has {machine} bytes, and a pod's gets no more while \
         it runs"
    )]
    Pod {
        /// What was asked for.
        limit: u64,
        /// What there is.
        machine: u64,
    },
    /// The guest has not plugged it.
    #[error(
        "the guest has plugged {plugged} of {wanted} bytes within {} s: `rt logs --console` may say why", limit.as_secs()
    )]
    Short {
        /// What it plugged.
        plugged: u64,
        /// What it was asked for.
        wanted: u64,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// The memory of a machine, in bytes. Its VMM process says so, which a guest may have taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct MachineMemory {
    /// What it was made with.
    made_with: u64,
    /// What its guest has plugged since.
    plugged: u64,
    /// What its guest was asked to plug.
    requested: u64,
    /// Whether its guest can plug any.
    has_driver: bool,
    /// Whether other containers are in it.
    is_pod: bool,
}

/// What the VMM process says.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// How much memory there was when it was asked.
    Memory(MachineMemory),
    /// There is as much as was asked for.
    Arrived,
    /// An error and its causes.
    Failed(Vec<String>),
}

/// Sets the memory limit of a running container, with the machine's memory; `set` sets the limits of the workload.
///
/// # Errors
/// The machine does not get as much, or a limit cannot be set; then nothing has changed.
pub fn update(
    container: &Target<'_>,
    memory: &LinuxMemory,
    set: impl FnOnce() -> Result<(), IsolationError>,
) -> Result<(), IsolationError> {
    let vm_dir = pod::machine_of(container.dir);
    let machine = Conversation::start(&vm_dir, Request::Memory).map_err(IsolationError::failed)?;
    let machine = machine.memory;
    let has = machine.made_with.saturating_add(machine.requested);
    let limit = memory.limit().and_then(|limit| u64::try_from(limit).ok());
    if machine.is_pod {
        return match limit {
            Some(limit) if limit > has => Err(IsolationError::failed(MemoryError::Pod {
                limit,
                machine: has,
            })),
            _ => set(),
        };
    }
    let host = Host::of(container).map_err(IsolationError::failed)?;
    let Some(limit) = limit else {
        set()?;
        return host.allow(memory, 0).map_err(IsolationError::failed);
    };
    let host_memory = sysinfo().map_err(|errno| MemoryError::Ask(errno.into()));
    let host_memory = host_memory.map_err(IsolationError::failed)?.ram_total();
    let needed = match machine.has_driver || limit > has {
        true => sizing::grown(limit, host_memory).max(machine.made_with),
        // It cannot be changed, and is enough.
        false => has,
    };
    if needed <= has {
        set()?;
        let left = give_back(&vm_dir, needed).map_err(IsolationError::failed)?;
        return host.allow(memory, left).map_err(IsolationError::failed);
    }
    let before = host.allowed().map_err(IsolationError::failed)?;
    let grown = host
        .allow(memory, needed)
        .map_err(IsolationError::failed)
        .and_then(|()| {
            fault::point("microvm.memory-allowed");
            plug(&vm_dir, needed).map_err(IsolationError::failed)?;
            fault::point("microvm.memory-plugged");
            set()
        });
    if grown.is_err() {
        // What of it fails leaves the machine with more than it needs, which its workload cannot use.
        let _ = give_back(&vm_dir, has);
        let _ = host.apply(before);
    }
    grown
}

/// Has the guest plug memory until the machine has `needed` bytes.
fn plug(vm_dir: &Path, needed: u64) -> Result<(), MemoryError> {
    let mut machine = Conversation::start(vm_dir, Request::SetMemory(needed))?;
    let wanted = needed.saturating_sub(machine.memory.made_with);
    let gib = u32::try_from(wanted >> 30).unwrap_or(u32::MAX);
    let limit = PLUG_LIMIT + PLUG_LIMIT_PER_GIB * gib;
    if machine.has_arrived_within(limit)? {
        return Ok(());
    }
    let plugged = Conversation::start(vm_dir, Request::Memory)?.memory.plugged;
    Err(MemoryError::Short {
        plugged,
        wanted,
        limit,
    })
}

/// Has the guest unplug memory until the machine has `needed` bytes; how many it has then.
fn give_back(vm_dir: &Path, needed: u64) -> Result<u64, MemoryError> {
    Conversation::start(vm_dir, Request::SetMemory(needed))?.has_arrived_within(UNPLUG_LIMIT)?;
    let memory = Conversation::start(vm_dir, Request::Memory)?.memory;
    Ok(memory.made_with.saturating_add(memory.plugged))
}

/// The cgroup that the machine is in.
#[derive(Debug)]
struct Host(Cgroup);

impl Host {
    fn of(container: &Target<'_>) -> Result<Self, cgroup::Error> {
        Cgroup::new(container.cgroup_path).map(Self)
    }

    /// Allows a machine of `machine` bytes what its workload may have, and what it needs itself.
    fn allow(&self, workload: &LinuxMemory, machine: u64) -> Result<(), cgroup::Error> {
        self.apply(sizing::host_memory(workload, machine))
    }

    /// What it is allowed now.
    fn allowed(&self) -> Result<LinuxMemory, cgroup::Error> {
        let stats = self.0.stats()?.memory;
        let number =
            |limit: Option<u64>| limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(-1));
        let mut memory = LinuxMemory::default();
        memory
            .set_limit(Some(number(stats.main.limit)))
            .set_swap(stats.with_swap.map(|with_swap| number(with_swap.limit)));
        Ok(memory)
    }

    fn apply(&self, memory: LinuxMemory) -> Result<(), cgroup::Error> {
        let mut resources = LinuxResources::default();
        // The default of oci-spec is not "nothing".
        resources.set_devices(None).set_memory(Some(memory));
        self.0.apply(&resources)
    }
}

/// A request to the VMM process, and what it says.
#[derive(Debug)]
struct Conversation {
    replies: BufReader<UnixStream>,
    /// How much memory there was.
    memory: MachineMemory,
}

impl Conversation {
    fn start(vm_dir: &Path, request: Request) -> Result<Self, MemoryError> {
        let stream = control::ask(vm_dir, request, &[]).map_err(MemoryError::Ask)?;
        stream
            .set_read_timeout(Some(CALL_LIMIT))
            .map_err(MemoryError::Ask)?;
        let mut replies = BufReader::new(stream);
        match next(&mut replies)? {
            Reply::Memory(memory) => Ok(Self { replies, memory }),
            Reply::Arrived | Reply::Failed(_) => {
                Err(MemoryError::Ask(io::ErrorKind::InvalidData.into()))
            }
        }
    }

    /// Waits until there is as much memory as was asked for; whether there is.
    fn has_arrived_within(&mut self, limit: Duration) -> Result<bool, MemoryError> {
        let stream = self.replies.get_ref();
        stream
            .set_read_timeout(Some(limit))
            .map_err(MemoryError::Ask)?;
        match next(&mut self.replies) {
            Ok(_) => Ok(true),
            Err(MemoryError::Ask(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The next reply, which is no failure.
fn next(replies: &mut BufReader<UnixStream>) -> Result<Reply, MemoryError> {
    let mut line = Vec::new();
    replies
        .read_until(b'\n', &mut line)
        .map_err(MemoryError::Ask)?;
    match serde_json::from_slice(&line) {
        Ok(Reply::Failed(texts)) => {
            Err(Failure::from_texts(Code::FailedPrecondition, texts).into())
        }
        Ok(reply) => Ok(reply),
        Err(error) => Err(MemoryError::Ask(error.into())),
    }
}

/// In the VMM process: tells how much memory the machine has, and asks the guest for `bytes` of it in all.
pub fn serve(asker: UnixStream, bytes: Option<u64>, is_pod: bool, vm: &mut RunningVm) {
    // What is written to a file is written by write(2), which alone each thread may call.
    let asker = File::from(OwnedFd::from(asker));
    let (made_with, came) = vm.memory();
    let memory = MachineMemory {
        made_with,
        plugged: came.plugged,
        requested: came.requested,
        has_driver: came.has_driver,
        is_pod,
    };
    reply(&asker, &Reply::Memory(memory));
    let Some(bytes) = bytes else { return };
    let waiting = match asker.try_clone() {
        Ok(waiting) => waiting,
        Err(error) => return reply(&asker, &failure(&error)),
    };
    let arrived = Box::new(move || reply(&waiting, &Reply::Arrived));
    if let Err(error) = vm.request_memory(bytes, arrived) {
        reply(&asker, &failure(&error));
    }
}

fn failure(error: &(dyn std::error::Error + 'static)) -> Reply {
    let causes = std::iter::successors(Some(error), |error| error.source());
    Reply::Failed(causes.map(ToString::to_string).collect())
}

/// Who is gone does not want to know.
fn reply(mut asker: &File, reply: &Reply) {
    if let Ok(mut line) = serde_json::to_vec(reply) {
        line.push(b'\n');
        let _ = asker.write_all(&line);
    }
}
