//! Ending and removing a cgroup, and stopping its processes for a while.
//!
//! All waiting is on events of the kernel: `cgroup.events` of version 2, the end of each process on version 1.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Cgroup, Error, Result, io_error, read, write};
use crate::clone::{pidfd_open, send_signal};
use crate::fault;

const LIMIT: Duration = Duration::from_secs(10);

/// A directory of cgroups and all below it, the deepest first.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(one) = open.pop() {
        if let Ok(entries) = fs::read_dir(&one) {
            open.extend(
                entries
                    .flatten()
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|entry| entry.path()),
            );
        }
        found.push(one);
    }
    found.reverse();
    found
}

pub(super) fn pids(cgroup: &Cgroup) -> Result<Vec<Pid>> {
    // Any hierarchy would do if all joins had succeeded; after a crash only the union is sure.
    let mut pids = cgroup.init.map(beside).unwrap_or_default();
    for root in cgroup.directories() {
        // Most often there are none: one look is enough.
        if !list(&root, &mut pids)? {
            continue;
        }
        for directory in tree(&root).iter().filter(|one| **one != root) {
            list(directory, &mut pids)?;
        }
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// The processes of a first process's pid namespace; if that is also ours, itself alone.
fn beside(init: Pid) -> Vec<Pid> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let theirs = namespace(&init.to_string());
    let mut pids = vec![init];
    if theirs.is_some()
        && theirs != namespace("self")
        && let Ok(entries) = fs::read_dir("/proc")
    {
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let numbers = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        pids.extend(
            numbers
                .filter(|name| namespace(name) == theirs)
                .filter_map(|name| name.parse().ok().map(Pid::from_raw)),
        );
    }
    pids
}

/// Adds the processes of one directory; `false` if it does not exist.
fn list(directory: &Path, pids: &mut Vec<Pid>) -> Result<bool> {
    match read(&directory.join("cgroup.procs")) {
        Ok(text) => pids.extend(
            text.lines()
                .filter_map(|line| line.parse().ok())
                .filter(|pid| *pid > 0)
                .map(Pid::from_raw),
        ),
        Err(Error::Io { source, .. }) => match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV) => return Ok(false),
            // A threaded cgroup: its parent lists the processes.
            Some(libc::EOPNOTSUPP) => {}
            _ => return Err(io_error("read the processes of", directory, source)),
        },
        Err(error) => return Err(error),
    }
    Ok(true)
}

pub(super) fn signal_all(cgroup: &Cgroup, signal: Signal) -> Result<()> {
    for pid in pids(cgroup)? {
        // It may have ended since it was listed.
        let _ = kill(pid, signal);
    }
    Ok(())
}

pub(super) fn kill_all(cgroup: &Cgroup) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    if let Some(directory) = cgroup.unified().filter(|one| one.exists()) {
        // Also ends processes that fork faster than they can be listed (Linux 5.14).
        let _ = write(&directory.join("cgroup.kill"), "1");
    }
    let events = cgroup
        .unified()
        .and_then(|directory| File::open(directory.join("cgroup.events")).ok());
    loop {
        let living = kill_listed(cgroup)?;
        if living.is_empty() {
            return Ok(());
        }
        // A process frozen by the version 1 freezer dies only when it is thawed.
        if is_frozen(cgroup) {
            let _ = request(cgroup, false);
        }
        let now = Instant::now();
        if now > deadline {
            return Err(Error::StillPopulated(cgroup.path().to_owned()));
        }
        let mut polled: Vec<PollFd<'_>> = living
            .iter()
            .map(|pidfd| PollFd::new(pidfd.as_fd(), PollFlags::POLLIN))
            .collect();
        polled.extend(
            events
                .iter()
                .map(|file| PollFd::new(file.as_fd(), PollFlags::POLLPRI)),
        );
        // The limit is for what has no event: a dying init whose zombies somebody else has still to reap leaves its
        // cgroup, but has not ended yet.
        wait(&mut polled, deadline.min(now + Duration::from_millis(10)))
            .map_err(|source| io_error("wait for the processes of", cgroup.path(), source))?;
    }
}

/// Kills the processes of a cgroup once and returns those that have not ended yet.
fn kill_listed(cgroup: &Cgroup) -> Result<Vec<OwnedFd>> {
    let mut living = Vec::new();
    for pid in pids(cgroup)? {
        let pidfd = match pidfd_open(pid) {
            Ok(pidfd) => pidfd,
            // It has ended since it was listed, or is a thread, whose process is listed elsewhere.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {
                continue;
            }
            Err(source) => return Err(io_error("open a process of", cgroup.path(), source)),
        };
        let _ = send_signal(&pidfd, libc::SIGKILL);
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        // One that has ended waits for its parent and runs no more.
        let ended = matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1..));
        if !ended {
            living.push(pidfd);
        }
    }
    Ok(living)
}

/// Waits for one of the events; `None` when the time is over.
fn wait(polled: &mut [PollFd<'_>], deadline: Instant) -> io::Result<Option<()>> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        match poll(polled, timeout) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(())),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

pub(super) fn remove(cgroup: &Cgroup) -> Result<()> {
    // Where all processes have ended the kernel says so by removing it.
    let left: Vec<PathBuf> = cgroup
        .directories()
        .filter(|directory| match fs::remove_dir(directory) {
            Ok(()) => false,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        })
        .collect();
    if left.is_empty() && cgroup.init.is_none() {
        return Ok(());
    }
    kill_all(cgroup)?;
    fault::point("cgroup.killed");
    let deadline = Instant::now() + LIMIT;
    for root in left {
        for directory in tree(&root) {
            remove_directory(&directory, deadline)?;
        }
        fault::point("cgroup.removed");
    }
    Ok(())
}

fn remove_directory(directory: &Path, deadline: Instant) -> Result<()> {
    loop {
        let source = match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => error,
        };
        if source.raw_os_error() != Some(libc::EBUSY) || Instant::now() > deadline {
            return Err(io_error("remove the cgroup", directory, source));
        }
        // The last process has ended but the kernel has not let go of it yet.
        match File::open(directory.join("cgroup.events")) {
            Ok(events) => {
                wait_event(&events, directory, "populated 0", deadline)?;
            }
            // Version 1 has no event for this moment, which lasts some microseconds.
            Err(_) => std::thread::yield_now(),
        }
    }
}

/// Waits until `cgroup.events` holds a line; `false` when the time is over.
fn wait_event(events: &File, directory: &Path, line: &str, deadline: Instant) -> Result<bool> {
    let failed = |source| io_error("wait for the events of", directory, source);
    let mut events = events;
    loop {
        let mut text = String::new();
        events.seek(SeekFrom::Start(0)).map_err(failed)?;
        match events.read_to_string(&mut text) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(true),
            Err(error) => return Err(failed(error)),
        }
        if text.lines().any(|one| one == line) {
            return Ok(true);
        }
        let mut polled = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        if wait(&mut polled, deadline).map_err(failed)?.is_none() {
            return Ok(false);
        }
    }
}

/// The file that freezes the cgroup, and what is written to it.
fn freezer(cgroup: &Cgroup) -> Option<(PathBuf, bool)> {
    if let Some(directory) = cgroup.v1("freezer") {
        return Some((directory.join("freezer.state"), false));
    }
    let directory = cgroup.unified()?;
    Some((directory.join("cgroup.freeze"), true))
}

fn request(cgroup: &Cgroup, frozen: bool) -> Result<()> {
    let (file, unified) = freezer(cgroup).ok_or(Error::NoController {
        field: "pause".to_owned(),
        controller: "freezer",
    })?;
    let value = match (unified, frozen) {
        (true, true) => "1",
        (true, false) => "0",
        (false, true) => "FROZEN",
        (false, false) => "THAWED",
    };
    write(&file, value)
}

pub(super) fn set_frozen(cgroup: &Cgroup, frozen: bool) -> Result<()> {
    request(cgroup, frozen)?;
    let deadline = Instant::now() + LIMIT;
    let Some((file, unified)) = freezer(cgroup) else {
        return Ok(());
    };
    let reached = if unified {
        let directory = file.parent().unwrap_or(&file);
        let path = directory.join("cgroup.events");
        let events = File::open(&path).map_err(|source| io_error("open", &path, source))?;
        let line = if frozen { "frozen 1" } else { "frozen 0" };
        wait_event(&events, directory, line, deadline)?
    } else {
        freeze_v1(cgroup, &file, frozen, deadline)?
    };
    if reached {
        return Ok(());
    }
    let _ = request(cgroup, false);
    Err(Error::Io {
        operation: "freeze in 10 s".to_owned(),
        path: cgroup.path().to_owned(),
        source: io::ErrorKind::TimedOut.into(),
    })
}

/// Version 1 tells no one when it has frozen: reading its state makes it look again.
fn freeze_v1(cgroup: &Cgroup, file: &Path, frozen: bool, deadline: Instant) -> Result<bool> {
    loop {
        let state = read(file)?;
        if state.trim() == if frozen { "FROZEN" } else { "THAWED" } {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        // A process that forked meanwhile is caught by asking again.
        request(cgroup, frozen)?;
        std::thread::yield_now();
    }
}

/// Whether a process that is put into the cgroup would stop there: it is frozen, or one above it. One that does not exist
/// begins as the nearest above it.
pub(super) fn would_freeze(cgroup: &Cgroup) -> bool {
    let Some((file, unified)) = freezer(cgroup) else {
        return false;
    };
    let existing = file.ancestors().skip(1).find(|above| above.is_dir());
    let Some(directory) = existing else {
        return false;
    };
    // The root has no such file, and cannot be frozen.
    let read = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
    match unified {
        true => read("cgroup.events").lines().any(|line| line == "frozen 1"),
        false => matches!(read("freezer.state").trim(), "FROZEN" | "FREEZING"),
    }
}

pub(super) fn is_frozen(cgroup: &Cgroup) -> bool {
    let Some((file, unified)) = freezer(cgroup) else {
        return false;
    };
    let state = fs::read_to_string(file).unwrap_or_default();
    match unified {
        true => state.trim() == "1",
        false => matches!(state.trim(), "FROZEN" | "FREEZING"),
    }
}
