//! What is at a path of a container, as its processes see it.
//!
//! The container is hostile: the path is resolved in its root by the kernel (openat2(2), `RESOLVE_IN_ROOT`), without what
//! would lead to other processes' files, and nothing is opened: `O_PATH` gives a place, and asks no driver. A file system
//! that a process of the container serves may never answer, so that there is a bound on the time.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::unistd::Pid;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::{Place, Visible, id_maps};

/// How many paths are looked at.
const LIMIT: usize = 2048;

/// How long that may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a resolution is tried again that renames disturb.
const TRIES: usize = 64;

/// What is at `paths`, and whether the root is the top of its mount namespace. `Err`: why not all of it is known.
pub(super) struct Seen {
    pub(super) places: Vec<Place>,
    pub(super) root_is_top: Result<bool, String>,
    pub(super) all: Result<(), String>,
}

/// Looks at `paths` in the root of `pid`, some of whose mounts may have maps of ids.
pub(super) fn look(pid: Pid, mut paths: Vec<String>, are_mapped: bool) -> Seen {
    paths.sort_unstable();
    paths.dedup();
    let mut all = Ok(());
    if paths.len() > LIMIT {
        paths.truncate(LIMIT);
        all = Err(format!("more than {LIMIT} paths"));
    }
    let root = format!("/proc/{pid}/root");
    let (told, answers) = mpsc::channel();
    let asked = paths.clone();
    // It is left behind if it hangs: nobody can wake it but who does not answer.
    let namespace = are_mapped.then(|| id_maps::namespace(pid)).flatten();
    let worker = thread::Builder::new().spawn(move || {
        let root = open_root(&root);
        let directory = root.as_ref().map_err(ToString::to_string);
        let top = directory.and_then(|root| is_top(root).map_err(|error| error.to_string()));
        let places: Vec<Place> = asked
            .into_iter()
            .map(|path| {
                let found = match &root {
                    Ok(root) => visible(root, &path, namespace).map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                Place { path, found }
            })
            .collect();
        // Nobody waits any more, otherwise.
        let _ = told.send((places, top));
    });
    let answer = match worker {
        Ok(_) => answers.recv_timeout(PATIENCE).map_err(|_| {
            format!(
                "a file system did not answer within {} s",
                PATIENCE.as_secs()
            )
        }),
        Err(error) => Err(format!("no thread can be made: {error}")),
    };
    match answer {
        Ok((places, root_is_top)) => Seen {
            places,
            root_is_top,
            all,
        },
        Err(reason) => Seen {
            places: paths
                .into_iter()
                .map(|path| Place {
                    path,
                    found: Err(reason.clone()),
                })
                .collect(),
            root_is_top: Err(reason.clone()),
            all: Err(reason),
        },
    }
}

/// What statx(2) tells of a place without asking its file system.
pub(super) fn identity(directory: impl AsFd, path: &str) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let found = rustix::fs::statx(directory, path, flags, mask)?;
    if found.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        let text = "this kernel does not tell a mount's id (Linux 5.8)";
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    Ok(found)
}

/// The same of what a link of /proc leads to.
pub(super) fn identity_of(link: &str) -> io::Result<Statx> {
    identity(CWD, link)
}

fn open_root(path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Whether nothing is above a root. `..` leads out of one that is only chroot(2)'s, to what is mounted over it, and
/// nowhere from that of pivot_root(2).
fn is_top(root: &OwnedFd) -> io::Result<bool> {
    let (own, above) = (identity(root, "")?, identity(root, "..")?);
    let is_same = |one: fn(&Statx) -> u64| one(&own) == one(&above);
    Ok(is_same(|file| file.stx_mnt_id) && is_same(|file| file.stx_ino))
}

fn visible(root: &OwnedFd, path: &str, namespace: Option<u64>) -> io::Result<Option<Visible>> {
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mut left = TRIES;
    let file = loop {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), how) {
            Err(Errno::AGAIN) if left > 0 => left -= 1,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => break other?,
        }
    };
    let found = identity(&file, "")?;
    let real = |file: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let (whole, above) = (real(&file)?, real(root)?);
    let real = Path::new("/").join(whole.strip_prefix(&above).unwrap_or(&whole));
    Ok(Some(Visible {
        path: real.to_string_lossy().into_owned(),
        mount: found.stx_mnt_id,
        file: u32::from(found.stx_mode) & libc::S_IFMT,
        device: (found.stx_rdev_major, found.stx_rdev_minor),
        of: (found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        size: found.stx_size,
        maps: namespace.and_then(|namespace| id_maps::of(&file, namespace)),
    }))
}
