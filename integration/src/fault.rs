//! Ends processes of `rt` at its fault points: named places between two steps, which builds with debug assertions have;
//! and runs it without a step.
//! What they are and how they are armed is written in the engine's module `fault`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use crate::wait_with_limit;

/// A point that was passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// The point.
    pub name: String,
    /// How often its process had passed it by then.
    pub number: u32,
    /// Whether it was the command itself, and not a process that it made.
    pub own: bool,
}

/// One run of a command with fault points, in a directory of its own.
#[derive(Debug)]
pub struct FaultRun {
    dir: PathBuf,
}

impl FaultRun {
    /// Prepares a run; `dir` must be new.
    ///
    /// # Errors
    /// The file system's.
    pub fn new(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir(&dir)?;
        File::create(dir.join("passed"))?;
        Ok(Self { dir })
    }

    fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        command.env("RT_FAULT", &self.dir).spawn()
    }

    /// Runs the command to its end and says which points were passed. None: this `rt` has no fault points.
    ///
    /// # Errors
    /// It failed or took too long.
    pub fn record(&self, command: &mut Command, limit: Duration) -> io::Result<Vec<Pass>> {
        let mut child = self.spawn(command)?;
        let pid = child.id().to_string();
        let status = wait_with_limit(&mut child, limit)?;
        if !status.success() {
            return Err(io::Error::other(format!("the command: {status}")));
        }
        let text = fs::read_to_string(self.dir.join("passed"))?;
        let pass = |line: &str| {
            let mut parts = line.split(' ');
            Some(Pass {
                own: parts.next()? == pid,
                name: parts.next()?.to_owned(),
                number: parts.next()?.parse().ok()?,
            })
        };
        Ok(text.lines().filter_map(pass).collect())
    }

    /// Runs the command, while the process that passes the point gets SIGKILL there.
    ///
    /// # Errors
    /// The command took too long, or nobody passed the point.
    pub fn kill_at(&self, pass: &Pass, command: &mut Command, limit: Duration) -> io::Result<()> {
        self.arm(pass)?;
        wait_with_limit(&mut self.spawn(command)?, limit)?;
        let passed = fs::read_to_string(self.dir.join("passed"))?;
        let reached = format!(" {} {}", pass.name, pass.number);
        if passed.lines().any(|line| line.ends_with(&reached)) {
            return Ok(());
        }
        Err(io::Error::other("the point was not passed again"))
    }

    /// Runs the command, and kills it while a process that it made stands at the point, which then goes on.
    ///
    /// # Errors
    /// Nobody came to the point.
    pub fn kill_command_at(
        &self,
        pass: &Pass,
        command: &mut Command,
        limit: Duration,
    ) -> io::Result<()> {
        self.arm(pass)?;
        let fifo = |name| {
            let path = self.dir.join(name);
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
            OpenOptions::new().read(true).write(true).open(path)
        };
        let (mut held, mut go) = (fifo("held")?, fifo("go")?);
        let mut child = self.spawn(command)?;
        let came = wait_for_either(&held, &child, limit);
        child.kill()?;
        child.wait()?;
        if !came? {
            return Err(io::Error::other("the command ended before the point"));
        }
        held.read_exact(&mut [0])?;
        go.write_all(b"g")
    }

    /// Runs the command to its end, without a step. Says whether this `rt` can do so.
    ///
    /// # Errors
    /// It failed or took too long.
    pub fn run_without(
        &self,
        step: &str,
        command: &mut Command,
        limit: Duration,
    ) -> io::Result<bool> {
        fs::write(self.dir.join("left-out"), step)?;
        Ok(!self.record(command, limit)?.is_empty())
    }

    /// Has a thread of that kind that serves the guest of a microVM try something, as one that a guest has taken over.
    ///
    /// # Errors
    /// The file system's.
    pub fn intrude(&self, thread: &str, attempt: &str, command: &mut Command) -> io::Result<()> {
        fs::write(self.dir.join("intruder"), format!("{thread} {attempt}"))?;
        command.env("RT_FAULT", &self.dir);
        Ok(())
    }

    /// Whether the command that was run has fault points.
    ///
    /// # Errors
    /// The file system's.
    pub fn was_heard(&self) -> io::Result<bool> {
        Ok(fs::metadata(self.dir.join("passed"))?.len() > 0)
    }

    fn arm(&self, pass: &Pass) -> io::Result<()> {
        let point = format!("{} {}", pass.name, pass.number);
        fs::write(self.dir.join("point"), point)
    }
}

/// Waits until the file can be read, or the child has ended; says whether it was the file.
fn wait_for_either(file: &File, child: &Child, limit: Duration) -> io::Result<bool> {
    // SAFETY: pidfd_open takes no pointer; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor.
    let end = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let mut fds = [
        PollFd::new(file.as_fd(), PollFlags::POLLIN),
        PollFd::new(end.as_fd(), PollFlags::POLLIN),
    ];
    if poll(&mut fds, timeout)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(fds[0].any().unwrap_or(false))
}

/// The names in a directory; none if it is not there.
///
/// # Errors
/// The file system's.
pub fn names_in(dir: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect(),
    }
}
