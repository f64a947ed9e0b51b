//! The OCI hooks that run on the host: prestart, createRuntime, poststart and poststop.
//!
//! A hook is a program that the bundle names; whoever may create containers may run it. It gets the container's state
//! on standard input, the environment that the bundle gives it and no more, and the time that the bundle allows.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::Hook;

use crate::process::{PidFd, ProcessId};
use crate::signal::Signal;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run.
    #[error("run the {stage} hook {}", path.display())]
    Run {
        /// Which kind.
        stage: &'static str,
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ran and failed.
    #[error("the {stage} hook {} failed: {status}", path.display())]
    Failed {
        /// Which kind.
        stage: &'static str,
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
    },
    /// It did not end in the time that the bundle gives it.
    #[error("the {stage} hook {} did not end within {seconds} s and was killed", path.display())]
    Timeout {
        /// Which kind.
        stage: &'static str,
        /// The program.
        path: PathBuf,
        /// The limit.
        seconds: i64,
    },
}

/// Runs hooks one after the other, each with `state` on its standard input, up to the first that fails.
///
/// # Errors
/// A hook could not be run, failed or took too long.
pub fn run(stage: &'static str, hooks: &[Hook], state: &[u8]) -> Result<(), HookError> {
    hooks.iter().try_for_each(|hook| run_one(stage, hook, state))
}

fn run_one(stage: &'static str, hook: &Hook, state: &[u8]) -> Result<(), HookError> {
    let path = hook.path();
    let run_error = |source| HookError::Run { stage, path: path.clone(), source };
    let mut command = Command::new(path);
    if let Some((name, arguments)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(arguments);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    let mut child = command.stdin(Stdio::piped()).spawn().map_err(run_error)?;
    let process = ProcessId::of(child.id().cast_signed()).and_then(|_| PidFd::open(child.id().cast_signed()));
    let outcome = (|| {
        let process = process?;
        if let Some(mut stdin) = child.stdin.take() {
            // A state is smaller than a pipe, so this does not block; a hook need not read it.
            match stdin.write_all(state) {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        match hook.timeout().filter(|seconds| *seconds > 0) {
            Some(seconds) => process.wait_exit(Duration::from_secs(seconds.unsigned_abs())),
            None => Ok(true),
        }
    })();
    match outcome {
        Ok(true) => {
            let status = child.wait().map_err(run_error)?;
            if status.success() { Ok(()) } else { Err(HookError::Failed { stage, path: path.clone(), status }) }
        }
        Ok(false) => {
            kill(&mut child);
            Err(HookError::Timeout { stage, path: path.clone(), seconds: hook.timeout().unwrap_or_default() })
        }
        Err(source) => {
            kill(&mut child);
            Err(run_error(source))
        }
    }
}

fn kill(child: &mut std::process::Child) {
    // The process is our child and not reaped, so both work.
    let _ = PidFd::open(child.id().cast_signed()).and_then(|process| process.signal(Signal::KILL));
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(json: &str) -> Hook {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_hook_gets_the_state_its_arguments_and_only_its_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("{{ cat; echo \"|$0|$A|$HOME\"; }} > {}", out.display());
        let json = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script, "name"], "env": ["A=b"]});
        run("poststart", &[hook(&json.to_string())], b"STATE").unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "STATE|name|b|\n");
    }

    #[test]
    fn failures_name_the_hook() {
        let error = run("poststop", &[hook(r#"{"path":"/bin/false"}"#)], b"{}").unwrap_err();
        assert_eq!(error.to_string(), "the poststop hook /bin/false failed: exit status: 1");
        let error = run("poststop", &[hook(r#"{"path":"/nonexistent/h"}"#)], b"{}").unwrap_err();
        assert_eq!(
            crate::error_chain(&error),
            "run the poststop hook /nonexistent/h: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_hook_that_hangs_is_killed_in_time() {
        let slow = hook(r#"{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}"#);
        let error = run("prestart", &[slow], b"{}").unwrap_err();
        assert_eq!(error.to_string(), "the prestart hook /bin/sleep did not end within 1 s and was killed");
    }
}
