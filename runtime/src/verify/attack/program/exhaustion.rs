//! Attempts to take more than a share: processes, threads, memory, descriptors, terminals, and the host's disk.
//!
//! None takes all that there is: each stops by itself at a bound that is no danger to a host. What counts is whether a
//! limit of the container stopped it before. It got through where it reached its bound and nothing of the container
//! would have stopped it later; where a limit is there but higher than the bound, it is told that it was not reached.
//! The kernel's tables are the guest's in a machine. The disk below a root file system is the host's in both models.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};

use super::super::bait::Disk;
use super::{Failed, Got, MEMORY, PROCESSES, Told};

/// How many descriptors are opened.
const DESCRIPTORS: u64 = 4096;

/// How many terminals are opened. The kernel has 3072 for all containers together (pty(7)).
pub(in super::super) const TERMINALS: u32 = 256;

/// How many files are made. Under emulation each takes a machine some hundredth of a second.
const FILES: u32 = 256;

/// How many bytes are written to the disk.
const BYTES: usize = 32 << 20;

pub(super) fn fork_bomb(_: &Told) -> Result<Got, Failed> {
    let mut children = Vec::new();
    let mut result = Ok(Got::Kernel("processes without a limit were made"));
    for _ in 0..PROCESSES {
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => loop {
                nix::unistd::pause();
            },
            Ok(ForkResult::Parent { child }) => children.push(child),
            Err(error) => {
                result = Err(error.into());
                break;
            }
        }
    }
    for child in children {
        let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
    }
    result
}

pub(super) fn memory_bomb(_: &Told) -> Result<Got, Failed> {
    // Each page has to be there: one that was never written is none.
    let mut pages: Vec<Vec<u8>> = Vec::new();
    let mut filled = 0;
    while filled < MEMORY {
        let piece = 1 << 20;
        let mut page = Vec::new();
        page.try_reserve_exact(piece)
            .map_err(|_| Failed::Errno(Errno::ENOMEM))?;
        page.resize(piece, 1);
        pages.push(page);
        filled += piece as u64;
    }
    // They are in use until here.
    std::hint::black_box(&pages);
    Ok(Got::Kernel("memory without a limit was filled"))
}

pub(super) fn shared_memory(_: &Told) -> Result<Got, Failed> {
    let path = "/dev/shm/rt-attack-memory";
    let mut file = File::create(path)?;
    let piece = vec![1; 1 << 20];
    let mut written = Ok(());
    for _ in 0..(MEMORY >> 20) {
        written = file.write_all(&piece);
        if written.is_err() {
            break;
        }
    }
    let _ = fs::remove_file(path);
    written?;
    Ok(Got::Kernel("a tmpfs without a size was filled"))
}

pub(super) fn thread_bomb(_: &Told) -> Result<Got, Failed> {
    for _ in 0..PROCESSES {
        // They end with this process.
        thread::Builder::new().stack_size(64 << 10).spawn(|| {
            loop {
                thread::park();
            }
        })?;
    }
    Ok(Got::Kernel("threads without a limit were made"))
}

pub(super) fn descriptor_bomb(_: &Told) -> Result<Got, Failed> {
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // With room for what is open already.
    let wanted = limit.max(DESCRIPTORS + 64);
    // Who may not lift its limit has what there is.
    setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, limit, limit))?;
    let mut open = Vec::new();
    for _ in 0..DESCRIPTORS {
        open.push(File::open("/")?);
    }
    if limit > DESCRIPTORS {
        let reached = format!("{DESCRIPTORS} of the {limit} descriptors that it may have");
        return Err(Failed::Bounded(reached));
    }
    Ok(Got::Kernel("more descriptors than it may have were opened"))
}

pub(super) fn terminal_bomb(_: &Told) -> Result<Got, Failed> {
    let mut open = Vec::new();
    for _ in 0..TERMINALS {
        open.push(File::options().read(true).write(true).open("/dev/ptmx")?);
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut terminals = mounts.lines().filter(|line| line.contains(" - devpts "));
    if terminals.any(|line| line.contains(",max=")) {
        let reached = format!("{TERMINALS} terminals, fewer than its devpts has");
        return Err(Failed::Bounded(reached));
    }
    Ok(Got::Kernel(
        "terminals of all containers were taken without a limit",
    ))
}

/// Makes a directory on the disk that the root file system is on, and has it filled.
fn fill(
    told: &Told,
    what: &'static str,
    fill: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<Got, Failed> {
    let root = fs::metadata("/")?.dev();
    let is_on_it = |place: &PathBuf| fs::metadata(place).is_ok_and(|file| file.dev() == root);
    let places = ["/tmp", "/"].map(PathBuf::from).into_iter();
    let mut made = Err(Errno::EROFS.into());
    for place in places.filter(is_on_it) {
        let directory = place.join("rt-attack-files");
        made = fs::create_dir(&directory).map(|()| directory);
        if made.is_ok() {
            break;
        }
    }
    let directory = made?;
    let filled = fill(&directory);
    let disk = Disk::of(&directory);
    let _ = fs::remove_dir_all(&directory);
    filled?;
    // A quota shows as a smaller disk.
    if disk?.is_part_of(&told.disk_below) {
        return Err(Failed::Bounded("a part of its quota".to_owned()));
    }
    Ok(Got::Host(what))
}

pub(super) fn inode_bomb(told: &Told) -> Result<Got, Failed> {
    fill(
        told,
        "inodes of the host's disk, without a quota",
        |directory| {
            for number in 0..FILES {
                File::create(directory.join(number.to_string()))?;
            }
            Ok(())
        },
    )
}

pub(super) fn disk_bomb(told: &Told) -> Result<Got, Failed> {
    fill(
        told,
        "space of the host's disk, without a quota",
        |directory| {
            let mut file = File::create(directory.join("file"))?;
            let piece = vec![1; 1 << 20];
            for _ in 0..BYTES / piece.len() {
                file.write_all(&piece)?;
            }
            file.sync_all()
        },
    )
}
