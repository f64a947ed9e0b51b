//! What a machine is to be: the caller's choice, complete before anything is opened.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;

use crate::boot::{BootProtocol, Segment};
use crate::devices::virtio::block::Disk;
use crate::devices::virtio::fs::{Share, Tag};
use crate::devices::virtio::net::Interface;
use crate::devices::virtio::vsock::GuestCid;
use crate::memory::MemorySize;
use crate::seccomp::{Policy, Thread};
use crate::snapshot::Snapshot;

/// Leaves the host's file system behind.
pub type LeaveHost = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// A machine.
pub struct VmConfig {
    /// Number of virtual processors, 1 to 254.
    pub vcpus: u8,
    /// The guest's memory.
    pub memory: MemorySize,
    /// What it does first.
    pub origin: Origin,
    /// Where the bytes of the guest's serial console go.
    pub console: Box<dyn Write + Send>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// Whether there is a balloon device, by which the guest reports the memory that it does not use.
    pub balloon: bool,
    /// Whether more memory can come while it runs, by a memory device.
    pub hotplug: bool,
    /// The socket device, if there is to be one.
    pub vsock: Option<VsockConfig>,
    /// Directories of the host, each a file system device of its own.
    pub shares: Vec<SharedDirectory>,
    /// Network interfaces, each a device of its own.
    pub interfaces: Vec<Interface>,
    /// Disks, each a device of its own, in the order in which the guest finds them.
    pub disks: Vec<Disk>,
    /// Called once when every file of the host is open that the machine needs, and before the first of
    /// [`VmConfig::shares`] is: the place to change the root to one in which nothing else is. The shares' paths are
    /// those after it.
    pub leave_host: LeaveHost,
    /// How the machine's threads are confined.
    pub seccomp: Policy,
    /// Called on each of the machine's threads once it is confined: for tests, which put there what a guest would try that
    /// has taken the thread over.
    pub intruder: Option<fn(Thread)>,
}

/// What a machine begins with.
#[derive(Debug)]
pub enum Origin {
    /// A kernel, which it boots.
    Kernel(KernelConfig),
    /// What another machine was when it was written down. This one is to have the same devices, as many vCPUs and as
    /// much memory, and goes on from there.
    Snapshot(Snapshot),
}

/// A kernel to boot.
#[derive(Debug, Clone, Default)]
pub struct KernelConfig {
    /// An uncompressed ELF kernel.
    pub path: PathBuf,
    /// How to enter it; `None` takes Linux's own protocol for Linux, PVH for others that have it.
    pub protocol: Option<BootProtocol>,
    /// The parts of the initramfs, in order.
    pub initramfs: Vec<Segment>,
    /// What is appended to the kernel's default command line.
    pub parameters: String,
    /// Whether the guest uses the serial console as its terminal and logs all that it does there.
    /// Otherwise only what is at least as bad as a panic reaches it, which costs almost nothing.
    pub verbose_console: bool,
}

/// The socket device.
#[derive(Debug, Clone)]
pub struct VsockConfig {
    /// The guest's address.
    pub cid: GuestCid,
    /// The directory and the name in it of the Unix socket for the host's clients.
    pub socket: Option<(PathBuf, String)>,
}

/// A directory of the host in the guest.
#[derive(Debug, Clone)]
pub struct SharedDirectory {
    /// The name by which the guest mounts it.
    pub tag: Tag,
    /// What is shared, and how.
    pub share: Share,
}

impl fmt::Debug for VmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmConfig")
            .field("vcpus", &self.vcpus)
            .field("memory", &self.memory)
            .field("origin", &self.origin)
            .field("rng", &self.rng)
            .field("balloon", &self.balloon)
            .field("hotplug", &self.hotplug)
            .field("vsock", &self.vsock)
            .field("shares", &self.shares)
            .field("interfaces", &self.interfaces)
            .field("disks", &self.disks)
            .field("seccomp", &self.seccomp)
            .finish_non_exhaustive()
    }
}

/// The command line that every guest gets: few exits, a fast boot, and no silent death.
const COMMON: &[&str] = &[
    // A panic becomes a reset at once, by ACPI's register, which ends the machine.
    "panic=-1",
    // There is no PCI, no second serial port and no device that needs bounce buffers.
    "pci=off",
    "swiotlb=noforce",
    // Self-tests of the kernel's ciphers are half of a stock kernel's boot.
    "cryptomgr.notests",
    "initcall_blacklist=jent_mod_init",
    "random.trust_cpu=on",
    "tsc=reliable",
    "no_timer_check",
    // Memory that comes while the guest runs is there without anybody's doing, in a zone from which it can go again as
    // far as there is enough for the kernel itself beside it.
    "memhp_default_state=online",
    "memory_hotplug.online_policy=auto-movable",
];

/// Only a panic and the like reach the serial port, from the first instructions to the last, by the one console that
/// needs no driver and whose code the kernel does not throw away when it has booted, as it does `earlycon`'s.
const QUIET: &[&str] = &[
    "quiet",
    "loglevel=1",
    "earlyprintk=serial,0x3f8,115200,keep",
    "8250.nr_uarts=0",
];

/// The serial port is the guest's console.
const VERBOSE: &[&str] = &[
    "earlycon=uart8250,io,0x3f8",
    "console=ttyS0",
    "8250.nr_uarts=1",
];

impl KernelConfig {
    /// The kernel's whole command line.
    pub fn command_line(&self) -> String {
        let console = if self.verbose_console { VERBOSE } else { QUIET };
        let mut words: Vec<&str> = COMMON.iter().chain(console).copied().collect();
        let extra = self.parameters.trim();
        if !extra.is_empty() {
            words.push(extra);
        }
        words.join(" ")
    }
}
