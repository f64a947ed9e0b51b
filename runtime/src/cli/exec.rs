//! `rt exec`.

use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, Process};

use super::{CliError, Context, parse_id, read};
use crate::bundle;
use crate::lifecycle::{Console, ExecOptions, Executed, Foreground, console_size};
use crate::process::PidFd;

/// Run another process in a container
#[derive(Debug, clap::Args)]
pub(super) struct ExecArgs {
    /// File with the process as JSON, as `process` in config.json
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Unix socket to send the terminal's master to
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Return as soon as it runs
    #[arg(short, long)]
    detach: bool,
    /// File to write its pid to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket to send a descriptor of the process to
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// User id, and group id behind a colon
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<UserIds>,
    /// Further group id; may be repeated
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Capability to add; may be repeated
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Never gain privileges by executing a file
    #[arg(long)]
    no_new_privs: bool,
    /// AppArmor profile
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// SELinux label
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Pass this many descriptors from 3 on to it
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Existing cgroup below the container's to run in
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Go on although the container is paused; it then waits until the container is resumed
    #[arg(long)]
    ignore_paused: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
    /// The program and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true)]
    command: Vec<String>,
}

/// `UID` or `UID:GID`, numbers and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct UserIds {
    uid: u32,
    gid: Option<u32>,
}

impl FromStr for UserIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |digits: &str| {
            // `u32::from_str` would take "+1".
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            digits
                .parse::<u32>()
                .ok()
                .filter(|_| plain)
                .ok_or_else(|| format!("{digits:?} is no numeric id"))
        };
        let (uid, gid) = match text.split_once(':') {
            Some((uid, gid)) => (uid, Some(number(gid)?)),
            None => (text, None),
        };
        Ok(Self {
            uid: number(uid)?,
            gid,
        })
    }
}

impl ExecArgs {
    #[cfg(test)]
    pub(super) fn command(&self) -> &[String] {
        &self.command
    }

    pub(super) fn run(self, context: &Context<'_>) -> Result<u8, CliError> {
        let id = parse_id(&self.id)?;
        let lifecycle = &context.lifecycle;
        lifecycle.state(&id)?.isolation.seal()?;
        let mut process = match &self.process {
            Some(path) => bundle::parse_process(path, &read(path)?)?,
            None => {
                let spec = lifecycle.spec(&id)?;
                let process = spec.process().clone();
                self.edit(process.ok_or_else(|| {
                    CliError::Usage(format!("container {id} has no process to copy"))
                })?)?
            }
        };
        let foreground = (!self.detach).then(Foreground::new).transpose()?;
        let terminal = process.terminal().unwrap_or(false);
        let console = match (&self.console_socket, self.detach) {
            (Some(socket), _) => Console::Socket(socket),
            (None, false) if terminal => Console::Ours,
            (None, _) => Console::None,
        };
        if let (Console::Ours, Some(size)) = (console, console_size()) {
            process.set_console_size(Some(size));
        }
        let options = ExecOptions {
            id: &id,
            process: &process,
            console,
            pid_file: self.pid_file.as_deref(),
            pidfd_socket: self.pidfd_socket.as_deref(),
            preserve_fds: self.preserve_fds,
            cgroup: self.cgroup.as_deref(),
            ignore_paused: self.ignore_paused,
        };
        let Executed { pid, terminal } = lifecycle.exec(&options)?;
        let Some(foreground) = foreground else {
            return Ok(0);
        };
        let exit = foreground.wait(pid, terminal, |signal| {
            // Our child is not reaped before the wait ends, so the pid is its.
            let _ = PidFd::open(pid).and_then(|process| process.signal(signal));
        })?;
        Ok(exit.code())
    }

    /// The container's own process with what the options say otherwise.
    fn edit(&self, mut process: Process) -> Result<Process, CliError> {
        if self.command.is_empty() {
            return Err(CliError::Usage(
                "give a command, or --process with a file".into(),
            ));
        }
        process.set_args(Some(self.command.clone()));
        process.set_terminal(Some(self.tty));
        // The size was the first process's terminal's.
        process.set_console_size(None);
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(self.env.iter().cloned());
        process.set_env(Some(env));
        if let Some(UserIds { uid, gid }) = self.user {
            let user = process.user_mut();
            user.set_uid(uid);
            if let Some(gid) = gid {
                user.set_gid(gid);
            }
        }
        if !self.additional_gids.is_empty() {
            let mut gids = process.user().additional_gids().clone().unwrap_or_default();
            gids.extend(&self.additional_gids);
            process.user_mut().set_additional_gids(Some(gids));
        }
        if !self.cap.is_empty() {
            let added = self
                .cap
                .iter()
                .map(|name| parse_capability(name))
                .collect::<Result<Capabilities, _>>()?;
            process.set_capabilities(Some(with_capabilities(
                process.capabilities().as_ref(),
                &added,
            )));
        }
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        if let Some(profile) = &self.apparmor {
            process.set_apparmor_profile(Some(profile.clone()));
        }
        if let Some(label) = &self.process_label {
            process.set_selinux_label(Some(label.clone()));
        }
        Ok(process)
    }
}

fn parse_capability(name: &str) -> Result<Capability, CliError> {
    let upper = name.to_ascii_uppercase();
    upper
        .strip_prefix("CAP_")
        .unwrap_or(&upper)
        .parse()
        .map_err(|_| {
            CliError::Usage(format!(
                "unknown capability {name:?}: use a name as CAP_NET_ADMIN"
            ))
        })
}

/// The sets with `added` in all but the inheritable one, which stays as it is: what is inheritable there a program
/// with file capabilities would gain. The ambient one, which can have nothing that is not inheritable, gets what is.
fn with_capabilities(old: Option<&LinuxCapabilities>, added: &Capabilities) -> LinuxCapabilities {
    let union = |set: Option<&Capabilities>| {
        Some(set.into_iter().flatten().chain(added).copied().collect())
    };
    let mut new = old.cloned().unwrap_or_default();
    if old.is_none() {
        // The default of oci-spec is not "none".
        new.set_inheritable(None).set_ambient(None);
    }
    new.set_bounding(union(old.and_then(|old| old.bounding().as_ref())))
        .set_effective(union(old.and_then(|old| old.effective().as_ref())))
        .set_permitted(union(old.and_then(|old| old.permitted().as_ref())));
    if let Some(inheritable) = new.inheritable() {
        let ambient = added.intersection(inheritable).copied();
        let ambient = ambient.chain(new.ambient().iter().flatten().copied());
        let ambient = ambient.collect();
        new.set_ambient(Some(ambient));
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_are_numbers_and_nothing_else() {
        assert_eq!("0".parse(), Ok(UserIds { uid: 0, gid: None }));
        assert_eq!(
            "1000:4294967294".parse(),
            Ok(UserIds {
                uid: 1000,
                gid: Some(4_294_967_294)
            })
        );
        for text in [
            "",
            ":",
            "1:",
            ":1",
            "root",
            "+1",
            "-1",
            " 1",
            "1 ",
            "0x0",
            "1:2:3",
            "4294967296",
        ] {
            assert!(text.parse::<UserIds>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn added_capabilities_are_not_inheritable() {
        let added = [
            parse_capability("cap_net_admin").unwrap(),
            parse_capability("SYS_PTRACE").unwrap(),
        ]
        .into();
        let sets = with_capabilities(None, &added);
        assert_eq!(sets.effective().as_ref(), Some(&added));
        assert_eq!((sets.inheritable(), sets.ambient()), (&None, &None));
        assert!(parse_capability("CAP_EVERYTHING").is_err());
    }

    #[test]
    fn added_capabilities_that_are_inheritable_are_ambient() {
        let (first, second) = (Capability::NetAdmin, Capability::SysPtrace);
        let mut old = LinuxCapabilities::default();
        old.set_inheritable(Some([first].into())).set_ambient(None);
        let sets = with_capabilities(Some(&old), &[first, second].into());
        assert_eq!(sets.ambient().as_ref(), Some(&[first].into()));
        assert_eq!(sets.inheritable().as_ref(), Some(&[first].into()));
    }
}
