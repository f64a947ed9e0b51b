//! Attempts to get out of a volume while what is in it changes: by a name that is a directory at one time and a link at
//! the next, and from a directory that is moved away.
//!
//! Who resolves a path in several steps, be it a kernel or a machine's file server, must not be led outside between two of
//! them. An attempt ends after so many changes and looks, or a while where they are slow.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::host::is_bait;
use super::{Failed, Got, Told};

/// How often a name is changed, and looked behind, at least.
const CHANGES: u32 = 1000;

/// How often it is looked behind at most, and how long.
const LOOKS: u32 = 50_000;
const WHILE: Duration = Duration::from_secs(4);

/// The directory of the bait, as it is seen from the volume's place on the host.
fn beside(told: &Told) -> Option<PathBuf> {
    let name = told.file.parent()?.file_name()?;
    Some(Path::new("..").join(name))
}

pub(super) fn link(told: &Told) -> Result<Got, Failed> {
    let (Some(bait), Some(name)) = (told.file.parent(), told.file.file_name()) else {
        return Err(Failed::Untried("the bait has no directory"));
    };
    let beside = beside(told);
    let (directory, link) = (told.volume.join("directory"), told.volume.join("link"));
    fs::create_dir(&directory)?;
    fs::write(directory.join(name), "")?;
    // As the host would resolve it from the volume, and from its root.
    let mut result = Err(Failed::Untried("no link can be made"));
    for target in beside.as_deref().into_iter().chain([bait]) {
        symlink(target, &link)?;
        let exchange = || renameat_with(CWD, &directory, CWD, &link, RenameFlags::EXCHANGE);
        result = race(told, exchange, &directory.join(name));
        // Which of them is the link now is not known.
        let _ = fs::remove_file(&directory).and_then(|()| fs::rename(&link, &directory));
        let _ = fs::remove_file(&link);
        if result.is_ok() {
            break;
        }
    }
    let _ = fs::remove_dir_all(&directory);
    result
}

/// CVE-2015-2925: `..` ends at the root of a mount, but a directory that was moved out of it is not below that root.
pub(super) fn moved_directory(told: &Told) -> Result<Got, Failed> {
    let inside = told.volume.join("inner/moved");
    let outside = told.volume.join("moved");
    fs::create_dir(&inside)?;
    // Seen by the mount of the inner volume; moved by that of the outer one.
    let held = File::open(told.inner.join("moved"))?;
    let mut names = [&inside, &outside];
    let moves = || {
        fs::rename(names[0], names[1])?;
        names.reverse();
        io::Result::Ok(())
    };
    let held = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
    let (Some(bait), Some(name)) = (beside(told), told.file.file_name()) else {
        return Err(Failed::Untried("the bait has no directory"));
    };
    let result = race(told, moves, &held.join("..").join(bait).join(name));
    let _ = fs::remove_dir(&inside);
    let _ = fs::remove_dir(&outside);
    result
}

/// Reads the file again and again while another thread changes what its name leads to.
fn race<E>(
    told: &Told,
    mut change: impl FnMut() -> Result<(), E> + Send,
    path: &Path,
) -> Result<Got, Failed> {
    let changes = AtomicU32::new(0);
    let is_over = AtomicBool::new(false);
    let begun = Instant::now();
    let mut last = Failed::Nowhere("another file");
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) && change().is_ok() {
                changes.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
            is_over.store(true, Ordering::Relaxed);
        });
        for look in 0..LOOKS {
            match is_bait(path, told) {
                Ok(()) => {
                    is_over.store(true, Ordering::Relaxed);
                    return Ok(Got::Host("a file outside of a volume was read"));
                }
                Err(Failed::Errno(error)) => last = error.into(),
                Err(_) => {}
            }
            let has_raced = look.min(changes.load(Ordering::Relaxed)) >= CHANGES;
            if has_raced || is_over.load(Ordering::Relaxed) || begun.elapsed() > WHILE {
                break;
            }
            thread::yield_now();
        }
        is_over.store(true, Ordering::Relaxed);
        match changes.load(Ordering::Relaxed) {
            0 => Err(Failed::Untried("names cannot be changed")),
            _ => Err(last),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::bait::tests::told;
    use super::*;

    #[test]
    fn a_link_and_a_moved_directory_lead_out_of_what_is_no_mount() {
        let place = tempfile::tempdir().unwrap();
        let told = told(place.path());
        assert!(matches!(link(&told), Ok(Got::Host(_))));
        assert!(matches!(moved_directory(&told), Ok(Got::Host(_))));
        let left = |directory| fs::read_dir(directory).unwrap().count();
        assert_eq!((left(&told.volume), left(&told.inner)), (1, 0));
    }
}
