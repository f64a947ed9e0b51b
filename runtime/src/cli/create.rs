//! `rt create` and `rt run`.

use std::path::{Path, PathBuf};

use super::{CliError, Context, parse_id};
use crate::bundle::{Bundle, CONFIG_FILE};
use crate::clock;
use crate::id::ContainerId;
use crate::isolation;
use crate::lifecycle::{Console, CreateOptions, Created, Foreground, console_size};

/// What a container is made with.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Directory of the bundle [default: the current one]
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Unix socket to send the terminal's master to
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File to write the init process's pid to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket to send a descriptor of the process to
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Do not use pivot_root (for a root on an initramfs)
    #[arg(long)]
    no_pivot: bool,
    /// Keep the caller's session keyring
    #[arg(long)]
    no_new_keyring: bool,
    /// Pass this many descriptors from 3 on to the workload
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
}

/// Make a container that waits for `rt start`
#[derive(Debug, clap::Args)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    options: Options,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Make a container, start it and stand in for it
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    options: Options,
    /// Return as soon as it runs
    #[arg(short, long)]
    detach: bool,
    /// Keep the container when it has ended
    #[arg(long)]
    keep: bool,
    /// Accepted for runc's clients: we never become a subreaper
    #[arg(long, hide = true)]
    no_subreaper: bool,
    /// Id of the container; or, without --bundle, a directory with a config.json: then the id is generated
    #[arg(value_name = "ID|BUNDLE")]
    target: String,
}

impl CreateArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        let id = parse_id(&self.id)?;
        let console = self
            .options
            .console_socket
            .as_deref()
            .map_or(Console::None, Console::Socket);
        let bundle = self.options.bundle.as_deref();
        let options = self.options.resolve(context, &id, bundle, console)?;
        context.lifecycle.create(options)?;
        Ok(())
    }
}

impl RunArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<u8, CliError> {
        let (id, bundle) = resolve(&self.target, self.options.bundle.as_deref())?;
        // Before anything is forked: a signal that comes from here on is the workload's.
        let foreground = (!self.detach).then(Foreground::new).transpose()?;
        let console = self.options.console(self.detach);
        let options = self
            .options
            .resolve(context, &id, bundle.as_deref(), console)?;
        let created = context.lifecycle.create(options)?;
        let lifecycle = &context.lifecycle;
        if let Err(error) = lifecycle.start(&id) {
            // The reason is what counts; a failure to clean up is in the log.
            if let Err(leftover) = lifecycle.delete(&id, true) {
                tracing::warn!("{}", crate::error_chain(&leftover));
            }
            return Err(error.into());
        }
        stand_in(context, &id, created, foreground, self.keep)
    }
}

/// Stands in for a container that runs, unless it is in the background, and returns the exit code.
pub(super) fn stand_in(
    context: &Context<'_>,
    id: &ContainerId,
    Created { pid, terminal }: Created,
    foreground: Option<Foreground>,
    keep: bool,
) -> Result<u8, CliError> {
    let Some(foreground) = foreground else {
        return Ok(0);
    };
    let exit = foreground.wait(pid, terminal, |signal| {
        // The workload may be ending, which the loop will see.
        let _ = context.lifecycle.kill(id, signal, false);
    });
    if !keep {
        context.lifecycle.delete(id, true)?;
    }
    Ok(exit?.code())
}

impl Options {
    /// The bundle's directory, if it was given.
    pub(super) fn bundle(&self) -> Option<&Path> {
        self.bundle.as_deref()
    }

    /// Where the terminal of a container that is not only created goes.
    pub(super) fn console(&self, detach: bool) -> Console<'_> {
        match (&self.console_socket, detach) {
            (Some(socket), _) => Console::Socket(socket),
            (None, true) => Console::None,
            (None, false) => Console::Ours,
        }
    }

    /// Loads the bundle and chooses its model.
    pub(super) fn resolve<'a>(
        &'a self,
        context: &Context<'_>,
        id: &'a ContainerId,
        bundle: Option<&Path>,
        console: Console<'a>,
    ) -> Result<CreateOptions<'a>, CliError> {
        let rootless = is_rootless(context.global.rootless.as_deref())?;
        let mut bundle = Bundle::load(bundle.unwrap_or(Path::new(".")))?;
        if let (Console::Ours, Some(size)) = (console, console_size()) {
            bundle = bundle.with_console_size(size);
        }
        let model = isolation::select(
            context.global.isolation,
            &bundle,
            context.config(),
            context.binary,
        )?;
        // If that was not clear before.
        model.seal()?;
        Ok(CreateOptions {
            id,
            bundle,
            model,
            console,
            pid_file: self.pid_file.as_deref(),
            pidfd_socket: self.pidfd_socket.as_deref(),
            preserve_fds: self.preserve_fds,
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            systemd_cgroup: context.global.systemd_cgroup,
            rootless,
        })
    }
}

/// `--rootless`: by itself, what is true of the caller.
fn is_rootless(flag: Option<&str>) -> Result<bool, CliError> {
    match flag {
        None | Some("" | "auto") => Ok(engine::cgroup::is_rootless()),
        Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Ok(true),
        Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Ok(false),
        Some(other) => Err(CliError::Usage(format!(
            "--rootless={other}: it must be auto, true or false"
        ))),
    }
}

/// The one rule of `rt run X`: without `--bundle`, an X that is a directory with a `config.json` is the bundle and the
/// id is generated from its name; so is an X with a slash, which no id has. In every other case X is the id.
fn resolve(
    target: &str,
    bundle: Option<&Path>,
) -> Result<(ContainerId, Option<PathBuf>), CliError> {
    let dir = PathBuf::from(target);
    if bundle.is_none() && (target.contains('/') || dir.join(CONFIG_FILE).exists()) {
        return Ok((generate_id(&dir)?, Some(dir)));
    }
    Ok((parse_id(target)?, bundle.map(Path::to_owned)))
}

/// The bundle's name, as far as an id may have it, and a suffix that no other container has.
fn generate_id(bundle: &Path) -> Result<ContainerId, CliError> {
    let name = bundle
        .canonicalize()
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let name: String = name
        .unwrap_or_default()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "_+-.".contains(*c))
        .take(64)
        .collect();
    let now = clock::now();
    parse_id(&format!(
        "{name}-{:x}{:05x}-{:x}",
        now.as_secs(),
        now.subsec_nanos() >> 10,
        std::process::id()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_a_configuration_is_the_bundle_and_anything_else_an_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
        let (id, bundle) = resolve(path, None).unwrap();
        assert_eq!(bundle.as_deref(), Some(dir.path()));
        assert!(id.as_str().contains('-'));

        let (id, bundle) = resolve("c1", None).unwrap();
        assert_eq!((id.as_str(), bundle), ("c1", None));
        let (id, bundle) = resolve("c1", Some(dir.path())).unwrap();
        assert_eq!((id.as_str(), bundle.as_deref()), ("c1", Some(dir.path())));
        assert!(resolve(path, Some(dir.path())).is_err());
    }
}
