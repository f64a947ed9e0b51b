//! One claim's surroundings: a directory of its own, a state root of its own,
//! one isolation model, and `rt` called as a client calls it.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Bundle, ensure_eq};

/// How long any one command may take before the claim fails; generous, since a
/// microVM may run under software emulation.
const LIMIT: Duration = Duration::from_secs(150);

/// An isolation model, as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// Namespaces on the host.
    Container,
    /// A virtual machine of its own.
    Microvm,
}

impl Model {
    /// The value of `--isolation`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Microvm => "microvm",
        }
    }
}

/// What a finished command did.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; its code is `None` when a signal ended it.
    pub status: ExitStatus,
    /// Everything on stdout, lossily decoded.
    pub stdout: String,
    /// Everything on stderr, lossily decoded.
    pub stderr: String,
    /// Stdout as it came.
    pub raw_stdout: Vec<u8>,
}

impl Outcome {
    /// The exit code, or 128 + n as a shell would show death by signal n.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Fails unless the command wrote just this and had this exit code; `what` names it.
    ///
    /// # Errors
    /// What differs.
    pub fn expect(&self, what: &str, stdout: &str, stderr: &str, code: i32) -> crate::Claim {
        ensure_eq!(
            self.stdout,
            stdout,
            "stdout of {what}; stderr was {:?}",
            self.stderr
        );
        ensure_eq!(self.stderr, stderr, "stderr of {what}");
        ensure_eq!(self.code(), code, "exit code of {what}");
        Ok(())
    }

    /// Fails unless the command succeeded.
    ///
    /// # Errors
    /// What it printed instead.
    pub fn success(self) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        if self.status.success() {
            return Ok(self);
        }
        Err(format!(
            "exit code {}; stdout: {}; stderr: {}",
            self.code(),
            shown(&self.stdout),
            shown(&self.stderr)
        )
        .into())
    }
}

/// Tries again until it holds, for `limit`: for what has no event of its own.
///
/// # Errors
/// Why it does not hold when the time is over.
pub fn eventually(limit: Duration, claim: impl Fn() -> crate::Claim) -> crate::Claim {
    let deadline = Instant::now() + limit;
    loop {
        match claim() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            result => return result,
        }
    }
}

/// Output as a message has it: quoted, and its beginning only if it is long.
fn shown(text: &str) -> String {
    const MOST: usize = 2000;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?} and more, {} bytes", &text[..end], text.len()),
        None => format!("{text:?}"),
    }
}

/// The surroundings of one claim. Whatever it leaves running is killed on drop.
pub struct Fixture {
    model: Model,
    rt: PathBuf,
    dir: TempDir,
    bundles: AtomicU32,
}

impl Fixture {
    /// Makes new surroundings for `model`, with `rt` the binary under test.
    ///
    /// # Errors
    /// The file system's.
    pub fn new(model: Model, rt: &Path) -> io::Result<Self> {
        Ok(Self {
            model,
            rt: rt.to_owned(),
            dir: TempDir::with_prefix("rt-claim-")?,
            bundles: AtomicU32::new(0),
        })
    }

    /// The isolation model under test.
    pub fn model(&self) -> Model {
        self.model
    }

    /// The `rt` under test.
    pub fn binary(&self) -> &Path {
        &self.rt
    }

    /// The fixture's own directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The state root that every call of `rt` gets.
    pub fn state_root(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A container id that no other claim uses at the same time.
    pub fn id(&self, name: &str) -> String {
        let dir = self
            .dir
            .path()
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        format!("{name}-{}", dir.trim_start_matches("rt-claim-"))
    }

    /// `rt` with the global flags and then `args`.
    pub fn rt<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.rt);
        command
            .arg("--root")
            .arg(self.state_root())
            .args(["--isolation", self.model.name()])
            .args(args);
        command.stdin(Stdio::null());
        command
    }

    /// Calls `rt` and waits for its end.
    ///
    /// # Errors
    /// When it cannot be started or takes too long.
    pub fn call<S: AsRef<OsStr>>(&self, args: &[S]) -> io::Result<Outcome> {
        finish(&mut self.rt(args), None)
    }

    /// Calls `rt` with bytes on its stdin.
    ///
    /// # Errors
    /// When it cannot be started or takes too long.
    pub fn call_with_input<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        input: Vec<u8>,
    ) -> io::Result<Outcome> {
        self.complete(self.rt(args), input)
    }

    /// Runs a command of [`Fixture::rt`] with bytes on its stdin to its end.
    ///
    /// # Errors
    /// When it cannot be started or takes too long.
    pub fn complete(&self, mut command: Command, input: Vec<u8>) -> io::Result<Outcome> {
        finish(&mut command, Some(input))
    }

    /// A new bundle with the default configuration of `rt spec`.
    ///
    /// # Errors
    /// The file system's, or that `rt spec` failed.
    pub fn bundle(&self) -> io::Result<Bundle> {
        let number = self.bundles.fetch_add(1, Ordering::Relaxed);
        let dir = self.dir.path().join(format!("bundle-{number}"));
        fs::create_dir(&dir)?;
        let made = finish(self.rt(&["spec"]).arg("--bundle").arg(&dir), None)?;
        if !made.status.success() {
            return Err(io::Error::other(format!("rt spec failed: {}", made.stderr)));
        }
        let spec: Value = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
        Bundle::create(&dir, spec)
    }

    /// Saves the bundle and runs it in the foreground to its end.
    ///
    /// # Errors
    /// When `rt` cannot be started or takes too long.
    pub fn run(&self, bundle: &Bundle) -> io::Result<Outcome> {
        self.run_with_input(bundle, Vec::new())
    }

    /// [`Fixture::run`] with bytes on stdin.
    ///
    /// # Errors
    /// When `rt` cannot be started or takes too long.
    pub fn run_with_input(&self, bundle: &Bundle, input: Vec<u8>) -> io::Result<Outcome> {
        bundle.save()?;
        finish(
            self.rt(&["run", "--bundle"])
                .arg(bundle.dir())
                .arg(self.id("run")),
            Some(input),
        )
    }

    /// Saves the bundle, then creates and starts a container that runs in the background.
    ///
    /// # Errors
    /// What `rt` said.
    pub fn start_detached(
        &self,
        bundle: &Bundle,
        id: &str,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        bundle.save()?;
        let mut command = self.rt(&["run", "--detach", "--bundle"]);
        command.arg(bundle.dir()).arg(id);
        // A detached container keeps its stdio: captured pipes would never end.
        let log = fs::File::create(self.dir.path().join(format!("{id}.log")))?;
        command.stdout(log.try_clone()?).stderr(log);
        let status = wait_with_limit(&mut command.spawn()?, LIMIT)?;
        if !status.success() {
            return Err(format!("rt run --detach: {status}: {}", self.log_of(id)).into());
        }
        Ok(())
    }

    /// What a container started by [`Fixture::start_detached`] wrote.
    pub fn log_of(&self, id: &str) -> String {
        fs::read_to_string(self.dir.path().join(format!("{id}.log"))).unwrap_or_default()
    }

    /// The parsed output of `rt state`.
    ///
    /// # Errors
    /// What `rt` said, or that its output is not JSON.
    pub fn state(&self, id: &str) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
        let outcome = self.call(&["state", id])?.success()?;
        Ok(serde_json::from_str(&outcome.stdout)?)
    }

    /// The status in `rt state`.
    ///
    /// # Errors
    /// As [`Fixture::state`].
    pub fn status(&self, id: &str) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.state(id)?["status"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }

    /// Waits until the container's process, as the host sees it, has ended.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_for_end(&self, id: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let pid = self.state(id)?["pid"].as_i64().unwrap_or(0);
        if pid == 0 {
            return Ok(());
        }
        // SAFETY: pidfd_open takes no pointer; the result is checked.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let Ok(fd) = i32::try_from(fd) else {
            return Ok(());
        };
        if fd < 0 {
            return Ok(());
        }
        // SAFETY: the kernel has just given us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        poll_readable(fd.as_fd(), LIMIT)
            .then_some(())
            .ok_or_else(|| format!("{id} did not end").into())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let Ok(entries) = fs::read_dir(self.state_root()) else {
            return;
        };
        for entry in entries.flatten() {
            let _ = self.call(&[
                OsStr::new("delete"),
                OsStr::new("--force"),
                &entry.file_name(),
            ]);
        }
    }
}

fn poll_readable(fd: std::os::fd::BorrowedFd<'_>, limit: Duration) -> bool {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other.is_ok_and(|ready| ready > 0),
        }
    }
}

/// Waits for a child's end; kills it when the time is over.
///
/// # Errors
/// `TimedOut` when it had to be killed, or the kernel's.
pub fn wait_with_limit(child: &mut Child, limit: Duration) -> io::Result<ExitStatus> {
    // SAFETY: pidfd_open takes no pointer; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    let fd = i32::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just given us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if poll_readable(fd.as_fd(), limit) {
        return child.wait();
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("the command did not end within {limit:?}"),
    ))
}

/// Runs a command to its end, with bytes on its stdin if there are any; kills it when it takes too long.
///
/// # Errors
/// When it cannot be started or takes too long.
pub fn finish(command: &mut Command, input: Option<Vec<u8>>) -> io::Result<Outcome> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let writer = child.stdin.take().zip(input).map(|(mut stdin, bytes)| {
        // The workload may end without reading it all: a broken pipe is its right.
        thread::spawn(move || drop(stdin.write_all(&bytes)))
    });
    let (stdout, stderr) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let status = wait_with_limit(&mut child, LIMIT);
    if status.is_err() {
        // A pipe that a runaway process still holds would block the readers for ever.
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{command:?} did not end within {LIMIT:?}"),
        ));
    }
    if let Some(writer) = writer {
        let _ = writer.join();
    }
    let raw_stdout = stdout.join().unwrap_or_default();
    let stderr = stderr.join().unwrap_or_default();
    Ok(Outcome {
        status: status?,
        stdout: String::from_utf8_lossy(&raw_stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        raw_stdout,
    })
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}
