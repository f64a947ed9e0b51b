//! Runs the hooks of a container (runtime-spec, "POSIX-platform Hooks").
//!
//! A hook comes from the configuration and runs with the rights of the process that calls this; it gets the
//! container's state on its standard input, no environment but its own, and no descriptor of ours.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use nix::unistd::Pid;
use oci_spec::runtime::Hook;

use crate::clone::pidfd_open;

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `prestart`
    Prestart,
    /// `createRuntime`
    CreateRuntime,
    /// `createContainer`
    CreateContainer,
    /// `startContainer`
    StartContainer,
    /// `poststart`
    Poststart,
    /// `poststop`
    Poststop,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        })
    }
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be run.
    #[error("error running {kind} hook #{number}: cannot run {path}")]
    Run {
        /// When it was to run.
        kind: Kind,
        /// Which of that kind, from 0 on.
        number: usize,
        /// Its program.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It ended otherwise than with exit code 0.
    #[error("error running {kind} hook #{number}: {path}: {status}")]
    Failed {
        /// When it ran.
        kind: Kind,
        /// Which of that kind, from 0 on.
        number: usize,
        /// Its program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
    },
    /// It ran longer than its `timeout` and was killed.
    #[error("error running {kind} hook #{number}: {path}: killed after its timeout of {seconds} s")]
    Timeout {
        /// When it ran.
        kind: Kind,
        /// Which of that kind, from 0 on.
        number: usize,
        /// Its program.
        path: PathBuf,
        /// The timeout of the configuration, in seconds.
        seconds: i64,
    },
    /// It is not well formed.
    #[error("hooks.{kind}: {reason}: {path}")]
    Invalid {
        /// When it was to run.
        kind: Kind,
        /// Its program.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

/// What hooks are given.
pub struct Surroundings<'a> {
    /// The container's state as JSON.
    pub state: &'a [u8],
    /// Their working directory; one that is gone is ours.
    pub directory: &'a Path,
    /// The environment of a hook that names none.
    pub env: &'a [(&'a OsStr, &'a OsStr)],
}

/// Runs hooks one after the other; the first that fails ends the series.
///
/// # Errors
/// The first failure, with the hook's kind, number and path.
pub fn run(kind: Kind, hooks: &[Hook], surroundings: &Surroundings<'_>) -> Result<(), Error> {
    (0..)
        .zip(hooks)
        .try_for_each(|(number, hook)| run_one(kind, number, hook, surroundings))
}

/// Checks what can be known of hooks before any of them runs.
///
/// # Errors
/// A path that is not absolute, a timeout that is not positive.
pub fn validate(kind: Kind, hooks: &[Hook]) -> Result<(), Error> {
    for hook in hooks {
        let invalid = |reason| Error::Invalid {
            kind,
            path: hook.path().clone(),
            reason,
        };
        if !hook.path().is_absolute() {
            return Err(invalid("the path must be absolute"));
        }
        if hook.timeout().is_some_and(|seconds| seconds <= 0) {
            return Err(invalid("the timeout must be greater than 0"));
        }
    }
    Ok(())
}

fn run_one(
    kind: Kind,
    number: usize,
    hook: &Hook,
    surroundings: &Surroundings<'_>,
) -> Result<(), Error> {
    validate(kind, std::slice::from_ref(hook))?;
    let failed = |source: io::Error| Error::Run {
        kind,
        number,
        path: hook.path().clone(),
        source,
    };
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_deref().and_then(|args| args.split_first()) {
        command.arg0(name).args(arguments);
    }
    if surroundings.directory.is_dir() {
        command.current_dir(surroundings.directory);
    }
    command.env_clear();
    match hook.env() {
        Some(env) => {
            for entry in env {
                if let Some((name, value)) = entry.split_once('=') {
                    command.env(name, value);
                }
            }
        }
        None => {
            command.envs(surroundings.env.iter().copied());
        }
    }
    // Output goes to the error stream: the caller's standard output is the container's, or read by a client.
    let output = io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
    command
        .stdin(input(surroundings.state).map_err(failed)?)
        .stdout(output);
    let mut child = command.spawn().map_err(failed)?;
    let ended = wait_for_end(&child, hook.timeout()).map_err(failed);
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed)?;
    if !ended? {
        return Err(Error::Timeout {
            kind,
            number,
            path: hook.path().clone(),
            seconds: hook.timeout().unwrap_or_default(),
        });
    }
    if status.success() {
        return Ok(());
    }
    // A hook that was killed says by which signal in its status.
    let _ = status.signal();
    Err(Error::Failed {
        kind,
        number,
        path: hook.path().clone(),
        status,
    })
}

/// A file that holds the state: unlike a pipe it never blocks us, whether the hook reads it or not.
fn input(state: &[u8]) -> io::Result<Stdio> {
    let fd: OwnedFd = memfd_create(c"rt-hook-state", MemFdCreateFlag::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(state)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.into())
}

/// Waits for the process, at most as long as the hook may take; `false` when that time is over.
fn wait_for_end(child: &std::process::Child, timeout: Option<i64>) -> io::Result<bool> {
    let Some(seconds) = timeout else {
        return Ok(true);
    };
    let pidfd = pidfd_open(Pid::from_raw(child.id() as i32))?;
    let deadline = Instant::now().checked_add(Duration::from_secs(seconds.unsigned_abs()));
    loop {
        let left = match deadline {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            None => Duration::MAX,
        };
        let limit = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, limit) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use oci_spec::runtime::HookBuilder;

    use super::*;

    fn shell(script: &str) -> Hook {
        HookBuilder::default()
            .path("/bin/sh")
            .args(["sh".to_owned(), "-c".to_owned(), script.to_owned()])
            .env(["OUT=x".to_owned()])
            .build()
            .unwrap()
    }

    fn run(kind: Kind, hooks: &[Hook], state: &[u8]) -> Result<(), Error> {
        let surroundings = Surroundings {
            state,
            directory: Path::new("/no/such/directory"),
            env: &[],
        };
        super::run(kind, hooks, &surroundings)
    }

    #[test]
    fn the_state_is_on_standard_input_and_the_environment_is_the_hooks_own() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let hook = shell(&format!(
            "{{ cat; echo; env | grep -c . ; echo $OUT; }} > {}",
            out.display()
        ));
        run(Kind::Prestart, &[hook], b"{\"id\":\"c1\"}").unwrap();
        let text = fs::read_to_string(out).unwrap();
        assert!(text.starts_with("{\"id\":\"c1\"}\n"), "{text}");
        assert!(text.ends_with("\nx\n"), "{text}");
        // Only OUT, and PWD and the like that the shell adds itself.
        let count: u32 = text.lines().nth(1).unwrap().parse().unwrap();
        assert!(count <= 4, "{text}");
    }

    #[test]
    fn a_failure_names_the_hook_and_its_kind() {
        let hooks = [shell("true"), shell("exit 3")];
        let error = run(Kind::CreateRuntime, &hooks, b"").unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running createRuntime hook #1: /bin/sh: exit status: 3"
        );
    }

    #[test]
    fn a_hook_is_killed_after_its_timeout() {
        let mut hook = shell("sleep 60");
        hook.set_timeout(Some(1));
        let before = Instant::now();
        let error = run(Kind::Poststop, &[hook], b"").unwrap_err();
        assert!(
            matches!(error, Error::Timeout { seconds: 1, .. }),
            "{error}"
        );
        assert!(before.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_missing_hook_is_an_error() {
        let hook = HookBuilder::default()
            .path("/no/such/hook")
            .build()
            .unwrap();
        let error = run(Kind::Poststart, &[hook], b"").unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running poststart hook #0: cannot run /no/such/hook"
        );
    }

    #[test]
    fn a_hook_runs_in_the_directory_that_it_is_given() {
        let directory = tempfile::tempdir().unwrap();
        let surroundings = Surroundings {
            state: b"",
            directory: directory.path(),
            env: &[],
        };
        super::run(Kind::Prestart, &[shell("touch here")], &surroundings).unwrap();
        assert!(directory.path().join("here").exists());
    }

    #[test]
    fn a_timeout_must_be_positive() {
        let mut hook = shell("true");
        hook.set_timeout(Some(0));
        assert!(matches!(
            run(Kind::Poststart, &[hook], b""),
            Err(Error::Invalid { .. })
        ));
    }
}
