//! News that the kernel's out-of-memory killer was in a cgroup.
//!
//! Version 1 signals an eventfd, version 2 the file `memory.events`; both are polled. The cgroup may be removed at any
//! time.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Cgroup, Result, io_error, write};

/// Watches a cgroup for processes that are killed for want of memory.
#[derive(Debug)]
pub struct OomWatch {
    source: Source,
    kills: u64,
}

#[derive(Debug)]
enum Source {
    V1 {
        event: EventFd,
        control: PathBuf,
    },
    V2 {
        events: File,
    },
    /// Without the controller the kernel tells nothing.
    None,
}

impl OomWatch {
    pub(super) fn new(cgroup: &Cgroup) -> Result<Self> {
        let source = if let Some(directory) = cgroup.v1("memory") {
            let path = directory.join("memory.oom_control");
            let open = || {
                let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
                Ok((EventFd::from_flags(flags)?, File::open(&path)?))
            };
            let (event, file) = open().map_err(|source| io_error("watch", &path, source))?;
            let control = directory.join("cgroup.event_control");
            let line = format!("{} {}", event.as_fd().as_raw_fd(), file.as_raw_fd());
            write(&control, &line)?;
            Source::V1 { event, control }
        } else {
            let path = cgroup
                .unified()
                .map(|directory| directory.join("memory.events"))
                .filter(|path| path.exists());
            match path {
                Some(path) => Source::V2 {
                    events: File::open(&path).map_err(|source| io_error("open", &path, source))?,
                },
                None => Source::None,
            }
        };
        let mut watch = Self { source, kills: 0 };
        watch
            .kills()
            .map_err(|source| io_error("watch", cgroup.path(), source))?;
        Ok(watch)
    }

    /// The descriptor to poll and what for; `None` if there never is news. An event of it need not be news.
    #[must_use]
    pub fn polled(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.source {
            Source::V1 { event, .. } => Some((event.as_fd(), PollFlags::POLLIN)),
            Source::V2 { events } => Some((events.as_fd(), PollFlags::POLLPRI)),
            Source::None => None,
        }
    }

    /// How often the kernel had to kill: since the cgroup was made with version 2, since the watch with version 1.
    /// It does not block. Of a cgroup that is gone it is what was known last.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kills(&mut self) -> io::Result<u64> {
        match &mut self.source {
            Source::V1 { event, control } => {
                let events = match event.read() {
                    Err(Errno::EAGAIN) => 0,
                    events => events?,
                };
                // The removal of the cgroup is one event more.
                let removal = u64::from(!control.exists());
                self.kills += events.saturating_sub(removal);
            }
            Source::V2 { events } => match kills_in(events) {
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                kills => self.kills = kills?,
            },
            Source::None => {}
        }
        Ok(self.kills)
    }
}

/// The count in `memory.events`. Reading it is also what arms the next event.
fn kills_in(events: &mut File) -> io::Result<u64> {
    events.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    events.read_to_string(&mut text)?;
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.parse().ok());
    Ok(count.unwrap_or_default())
}
