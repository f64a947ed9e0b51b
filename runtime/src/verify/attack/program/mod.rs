//! The attacker: this binary under another name, as the first process of a container.
//!
//! Each attempt is made by a child, so that one that is killed ends alone. It is written to get out, and to do no harm
//! where it does.

mod exhaustion;
mod host;
mod kernel;
mod volume;

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, alarm, fork, pipe};

use super::bait::Told;
use super::{Attack, Outcome, Share, tell};

/// Its file in the root file system.
pub const NAME: &str = "rt-attack";

/// The variable that tells it of the bait.
pub const BAIT: &str = "RT_ATTACK_BAIT";

/// The name of the process that is bait: it waits until its standard input ends.
pub const WAITS: &str = "rt-bait";

/// How many processes it tries to make.
pub const PROCESSES: u64 = 128;

/// How many bytes it tries to fill.
pub const MEMORY: u64 = 256 << 20;

/// How long an attempt may take, in seconds.
const LIMIT: u32 = 30;

/// Where it sees the two volumes, of which the second is in the first.
pub(super) const VOLUMES: [&str; 2] = ["/rt-attack-volume", "/rt-attack-inner"];

pub(super) use exhaustion::TERMINALS;

/// What an attempt got hold of.
pub(super) enum Got {
    /// The kernel that runs it.
    Kernel(&'static str),
    /// Something of the host.
    Host(&'static str),
}

/// Why it got nowhere.
pub(super) enum Failed {
    /// The kernel's answer.
    Errno(Errno),
    /// Nothing was to be found.
    Nowhere(&'static str),
    /// It makes no sense here.
    Untried(&'static str),
    /// It took so much, no limit was met, and there is one that is higher.
    Bounded(String),
}

impl From<Errno> for Failed {
    fn from(error: Errno) -> Self {
        Self::Errno(error)
    }
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self::Errno(Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    }
}

/// An attempt.
pub(super) type Attempt = fn(&Told) -> Result<Got, Failed>;

/// The namespaces of a process.
pub(super) const NAMESPACE: &str = "a namespace";
/// The rules for devices.
const DEVICE_RULES: &str = "the device rules";
/// What hides the kernel's files.
const MASK: &str = "a mask";
/// What the kernel asks of everybody.
const KERNEL: &str = "the kernel";
/// The limits.
const LIMITS: &str = "the cgroup's limit";

const fn attack(id: &'static str, what: &'static str, wall: &'static str, run: Attempt) -> Attack {
    Attack {
        id,
        what,
        call: None,
        capability: None,
        takes: None,
        wall,
        run,
    }
}

impl Attack {
    const fn by(self, call: &'static str) -> Self {
        Self {
            call: Some(call),
            ..self
        }
    }

    const fn takes(self, share: Share) -> Self {
        Self {
            takes: Some(share),
            ..self
        }
    }

    const fn with(self, capability: &'static str) -> Self {
        Self {
            capability: Some(capability),
            ..self
        }
    }
}

/// Every attack.
pub(super) const ATTACKS: [Attack; 42] = [
    attack(
        "host-file",
        "read a file of the host by its path, or through /proc",
        NAMESPACE,
        host::file,
    ),
    attack(
        "leaked-descriptor",
        "climb to the host's root from an open descriptor",
        "closed descriptors",
        host::leaked,
    ),
    attack(
        "host-descriptor",
        "take a descriptor of a process of the host",
        NAMESPACE,
        host::descriptor,
    )
    .by("pidfd_getfd")
    .with("CAP_SYS_PTRACE"),
    attack(
        "passed-descriptor",
        "be handed a descriptor by a socket of the host",
        NAMESPACE,
        host::passed_descriptor,
    ),
    attack(
        "volume-link",
        "leave a volume by a link that takes the place of a directory",
        NAMESPACE,
        volume::link,
    ),
    attack(
        "volume-rename",
        "leave a volume from a directory that is moved out of it",
        NAMESPACE,
        volume::moved_directory,
    ),
    attack(
        "host-handle",
        "open the host's root by its handle",
        KERNEL,
        host::handle,
    )
    .by("open_by_handle_at")
    .with("CAP_DAC_READ_SEARCH"),
    attack(
        "host-process",
        "see a process of the host",
        NAMESPACE,
        host::process,
    ),
    attack(
        "host-ptrace",
        "trace a process of the host",
        NAMESPACE,
        host::ptrace,
    )
    .by("ptrace")
    .with("CAP_SYS_PTRACE"),
    attack(
        "host-namespace",
        "enter a namespace of the host",
        NAMESPACE,
        host::namespace,
    )
    .by("setns")
    .with("CAP_SYS_ADMIN"),
    attack(
        "abstract-socket",
        "connect to an abstract socket of the host",
        NAMESPACE,
        host::abstract_socket,
    ),
    attack(
        "host-loopback",
        "connect to a port of the host's loopback device",
        NAMESPACE,
        host::loopback,
    ),
    attack(
        "host-vsock",
        "connect to the host by vsock",
        "the want of a listener",
        host::vsock,
    ),
    attack(
        "host-key",
        "read a key from the keyring of the host's user",
        KERNEL,
        host::key,
    )
    .by("keyctl"),
    attack(
        "disk",
        "read a disk of the host by its numbers",
        DEVICE_RULES,
        host::disk,
    )
    .by("mknod")
    .with("CAP_MKNOD"),
    attack(
        "memory-device",
        "open /dev/mem",
        DEVICE_RULES,
        kernel::memory_device,
    )
    .by("mknod")
    .with("CAP_MKNOD"),
    attack(
        "port-device",
        "open /dev/port",
        DEVICE_RULES,
        kernel::port_device,
    )
    .by("mknod")
    .with("CAP_MKNOD"),
    attack(
        "log-device",
        "open /dev/kmsg",
        DEVICE_RULES,
        kernel::log_device,
    )
    .by("mknod")
    .with("CAP_MKNOD"),
    attack(
        "kernel-memory",
        "read the kernel's memory from /proc/kcore",
        MASK,
        kernel::kernel_memory,
    ),
    attack(
        "core-pattern",
        "name a program that the kernel runs for a crash",
        MASK,
        kernel::core_pattern,
    ),
    attack(
        "modprobe-path",
        "name a program that the kernel runs for a module",
        MASK,
        kernel::modprobe_path,
    ),
    attack(
        "uevent-helper",
        "name a program that the kernel runs for a device",
        MASK,
        kernel::uevent_helper,
    ),
    attack(
        "release-agent",
        "name a program that the kernel runs for an empty cgroup",
        KERNEL,
        kernel::release_agent,
    )
    .by("mount")
    .with("CAP_SYS_ADMIN"),
    attack(
        "sysrq",
        "give the kernel an order by /proc/sysrq-trigger",
        MASK,
        kernel::sysrq,
    ),
    attack(
        "own-limits",
        "lift its own limits",
        "a read-only mount",
        kernel::own_limits,
    ),
    attack(
        "second-proc",
        "mount a procfs in which nothing is hidden",
        KERNEL,
        kernel::second_proc,
    )
    .by("mount"),
    attack(
        "kernel-module",
        "load a module",
        KERNEL,
        kernel::kernel_module,
    )
    .by("finit_module")
    .with("CAP_SYS_MODULE"),
    attack("kexec", "load another kernel", KERNEL, kernel::kexec)
        .by("kexec_load")
        .with("CAP_SYS_BOOT"),
    attack("clock", "set the clock", KERNEL, kernel::clock)
        .by("clock_settime")
        .with("CAP_SYS_TIME"),
    attack(
        "io-ports",
        "reach the machine's ports",
        KERNEL,
        kernel::io_ports,
    )
    .by("iopl")
    .with("CAP_SYS_RAWIO"),
    attack("bpf", "give the kernel a program", KERNEL, kernel::bpf)
        .by("bpf")
        .with("CAP_BPF"),
    attack(
        "perf",
        "watch the whole machine by perf events",
        KERNEL,
        kernel::perf,
    )
    .by("perf_event_open")
    .with("CAP_PERFMON"),
    attack(
        "fork-bomb",
        "make more processes than it may",
        LIMITS,
        exhaustion::fork_bomb,
    )
    .takes(Share::Processes(PROCESSES)),
    attack(
        "thread-bomb",
        "make more threads than it may",
        LIMITS,
        exhaustion::thread_bomb,
    )
    .takes(Share::Processes(PROCESSES)),
    attack(
        "memory-bomb",
        "fill more memory than it may",
        LIMITS,
        exhaustion::memory_bomb,
    )
    .takes(Share::Memory(MEMORY)),
    attack(
        "shared-memory",
        "fill the host's memory through /dev/shm",
        "the size of its tmpfs",
        exhaustion::shared_memory,
    )
    .takes(Share::Memory(MEMORY)),
    attack(
        "descriptor-bomb",
        "open more descriptors than it may",
        "a resource limit",
        exhaustion::descriptor_bomb,
    )
    .with("CAP_SYS_RESOURCE"),
    attack(
        "terminal-bomb",
        "take the terminals of all containers",
        "the size of its devpts",
        exhaustion::terminal_bomb,
    ),
    attack(
        "inode-bomb",
        "take the inodes of the host's disk",
        "a quota",
        exhaustion::inode_bomb,
    ),
    attack(
        "disk-bomb",
        "take the space of the host's disk",
        "a quota",
        exhaustion::disk_bomb,
    ),
    attack(
        "io-uring",
        "have calls made behind the filter by io_uring",
        KERNEL,
        kernel::io_uring,
    )
    .by("io_uring_setup"),
    attack(
        "userfaultfd",
        "hold the kernel in a page fault",
        KERNEL,
        kernel::userfaultfd,
    )
    .by("userfaultfd")
    .with("CAP_SYS_PTRACE"),
];

/// Whether a process was called as the attacker, or as its bait; it then is that.
pub fn run(arguments: &[OsString]) -> bool {
    let name = arguments
        .first()
        .and_then(|name| Path::new(name).file_name());
    if name == Some(WAITS.as_ref()) {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        return true;
    }
    if name != Some(NAME.as_ref()) {
        return false;
    }
    let told = std::env::var(BAIT)
        .ok()
        .and_then(|text| serde_json::from_str::<Told>(&text).ok());
    if let Some(told) = told {
        for attack in &ATTACKS {
            tell(attack.id, outcome(attack, &told));
        }
    }
    true
}

/// Makes an attempt in a child.
fn outcome(attack: &Attack, told: &Told) -> Outcome {
    let untried = |error: Errno| Outcome::Untried(format!("{error:?}"));
    let (reader, writer) = match pipe() {
        Ok(ends) => ends,
        Err(error) => return untried(error),
    };
    // SAFETY: this process has one thread.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => {
            drop(reader);
            alarm::set(LIMIT);
            let outcome = match (attack.run)(told) {
                Ok(Got::Kernel(what)) => Outcome::Kernel(what.to_owned()),
                Ok(Got::Host(what)) => Outcome::Host(what.to_owned()),
                Err(Failed::Errno(error)) => Outcome::Stopped(format!("{error:?}")),
                Err(Failed::Nowhere(what)) => Outcome::Stopped(what.to_owned()),
                Err(Failed::Untried(why)) => Outcome::Untried(why.to_owned()),
                Err(Failed::Bounded(what)) => Outcome::Bounded(what),
            };
            let text = serde_json::to_vec(&outcome).unwrap_or_default();
            let _ = File::from(writer).write_all(&text);
            std::process::exit(0);
        }
        Err(error) => return untried(error),
    };
    drop(writer);
    let mut text = Vec::new();
    let _ = File::from(reader).read_to_end(&mut text);
    let end = waitpid(child, None);
    match serde_json::from_slice(&text) {
        Ok(outcome) => outcome,
        Err(_) => match end {
            Ok(WaitStatus::Signaled(_, Signal::SIGALRM, _)) => {
                Outcome::Untried("it took too long".to_owned())
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => Outcome::Stopped(signal.as_str().to_owned()),
            _ => Outcome::Untried("the attempt ended without a word".to_owned()),
        },
    }
}
