//! What happens in a container while it lives: its use from time to time, and kills for want of memory.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Error, Lifecycle};
use crate::id::ContainerId;
use crate::isolation::{OomWatch, Stats};
use crate::process::PidFd;
use crate::state::Record;

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The interval is over: what has been used so far.
    Stats(Box<Stats>),
    /// The kernel killed a process for want of memory.
    Oom,
}

/// The events of a container, each when it happens; the end of the container is the end.
pub struct Events<'a> {
    lifecycle: &'a Lifecycle,
    record: Record,
    dir: PathBuf,
    /// The init process; `None` when it has ended.
    process: Option<PidFd>,
    /// `None` when there will be no more news.
    oom: Option<Box<dyn OomWatch>>,
    interval: Duration,
    next: Instant,
    ready: VecDeque<Event>,
}

impl Lifecycle {
    /// What a container that lives has used.
    ///
    /// # Errors
    /// It does not live, or its use could not be read.
    pub fn stats(&self, id: &ContainerId) -> Result<Stats, Error> {
        let record = self.living(id)?;
        let dir = self.store.dir(id);
        let isolation = record.isolation.isolation();
        Ok(isolation.stats(&self.target(&record, &dir))?)
    }

    /// The events of a container that lives, with its use at every `interval`.
    ///
    /// # Errors
    /// It does not live, or cannot be watched.
    pub fn events(&self, id: &ContainerId, interval: Duration) -> Result<Events<'_>, Error> {
        let record = self.living(id)?;
        let dir = self.store.dir(id);
        let opened = record.process.map(|process| (process.pid, process.open()));
        let process = match opened {
            Some((pid, opened)) => opened.map_err(|source| Error::Process {
                operation: "watch",
                pid,
                source,
            })?,
            None => None,
        };
        let isolation = record.isolation.isolation();
        let oom = isolation.watch_oom(&self.target(&record, &dir))?;
        Ok(Events {
            lifecycle: self,
            record,
            dir,
            process,
            oom: Some(oom),
            interval,
            next: Instant::now() + interval,
            ready: VecDeque::new(),
        })
    }

    fn living(&self, id: &ContainerId) -> Result<Record, Error> {
        let record = self.store.load(id)?;
        if record.status().lives() {
            return Ok(record);
        }
        Err(Error::Status {
            problem: "container not running",
            id: id.clone(),
        })
    }
}

impl Events<'_> {
    /// Waits until something may have happened, and collects it.
    fn wait(&mut self, process: PidFd) -> Result<(), Error> {
        let polled = self.oom.as_ref().and_then(|oom| oom.polled());
        let mut fds = vec![PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        fds.extend(polled.map(|(fd, flags)| PollFd::new(fd, flags)));
        let left = self.next.saturating_duration_since(Instant::now());
        // In full milliseconds, so that the time is over when the wait is.
        let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => {}
            result => drop(result.map_err(|errno| Error::Process {
                operation: "watch",
                pid: self.record.process.map_or(0, |process| process.pid),
                source: errno.into(),
            })?),
        }
        let ended = fds[0].any().unwrap_or(false);
        let news = fds.get(1).is_some_and(|fd| fd.any().unwrap_or(true));
        if ended || news {
            self.collect_oom();
        }
        if ended {
            return Ok(());
        }
        self.process = Some(process);
        if Instant::now() >= self.next {
            self.next = Instant::now() + self.interval;
            self.collect_stats();
        }
        Ok(())
    }

    fn collect_oom(&mut self) {
        match self.oom.as_mut().map(|oom| oom.news()) {
            Some(Ok(kills)) => self.ready.extend((0..kills).map(|_| Event::Oom)),
            // A machine that ends takes its agent with it; the end of its process is what comes next.
            Some(Err(_)) | None => self.oom = None,
        }
    }

    fn collect_stats(&mut self) {
        let isolation = self.record.isolation.isolation();
        let target = self.lifecycle.target(&self.record, &self.dir);
        match isolation.stats(&target) {
            Ok(stats) => self.ready.push_back(Event::Stats(Box::new(stats))),
            // It may just be ending.
            Err(error) => tracing::warn!("{}", crate::error_chain(&error)),
        }
    }
}

impl Iterator for Events<'_> {
    type Item = Result<Event, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            let process = self.process.take()?;
            if let Err(error) = self.wait(process) {
                return Some(Err(error));
            }
        }
    }
}
