//! `create`: from a bundle to a container that waits for `start`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use engine::cgroup::Cgroup;
use engine::console::Listener;
use engine::fault;
use engine::systemd::{Keeper, Scope};
use oci_spec::runtime::LinuxResources;

use super::{Console, Error, Lifecycle, identify, send_pidfd, write_pid_file};
use crate::bundle::Bundle;
use crate::clock;
use crate::id::ContainerId;
use crate::isolation::{CreateContext, Images, Made, Model};
use crate::state::{LockedContainer, Phase, RECORD_VERSION, Record, SAVED_CONFIG};

/// The socket in the container's directory on which we get a terminal that is ours to relay.
const CONSOLE_SOCKET: &str = "console.sock";

/// What a container is made from.
#[derive(Debug)]
pub struct CreateOptions<'a> {
    /// Its id, which must be free.
    pub id: &'a ContainerId,
    /// Its bundle.
    pub bundle: Bundle,
    /// Its isolation model.
    pub model: Model,
    /// Where its terminal goes.
    pub console: Console<'a>,
    /// Where to write the init process's pid.
    pub pid_file: Option<&'a Path>,
    /// The Unix socket to send a descriptor of the init process to.
    pub pidfd_socket: Option<&'a Path>,
    /// How many of our descriptors from 3 on the workload gets.
    pub preserve_fds: u32,
    /// Do not use `pivot_root`.
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Have systemd make the cgroup.
    pub systemd_cgroup: bool,
    /// Go without a cgroup where the user may not make one and no limit needs it, and ask the user's systemd.
    pub rootless: bool,
}

/// A container that waits for `start`.
#[derive(Debug)]
pub struct Created {
    /// The init process, a child of the caller.
    pub pid: i32,
    /// The terminal's master, for [`Console::Ours`].
    pub terminal: Option<OwnedFd>,
}

impl Lifecycle {
    /// Makes a container.
    ///
    /// # Errors
    /// Why it could not be made. Nothing is left of it then; should even that fail, its record is left and
    /// `delete --force` removes the rest.
    pub fn create(&self, options: CreateOptions<'_>) -> Result<Created, Error> {
        self.make_from(options, None)
    }

    /// Makes a container by its bundle, or by it and images, whose processes run already.
    pub(super) fn make_from(
        &self,
        options: CreateOptions<'_>,
        images: Option<&Images>,
    ) -> Result<Created, Error> {
        let spec = options.bundle.spec();
        let wants_terminal = spec
            .process()
            .as_ref()
            .and_then(|process| process.terminal())
            .unwrap_or(false);
        check_console(wants_terminal, options.console)?;
        let given_path = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().as_deref());
        let (cgroup_path, scope) = place(&options, given_path)?;
        let record = Record {
            version: RECORD_VERSION,
            id: options.id.clone(),
            isolation: options.model,
            phase: Phase::Creating,
            creator: Some(identify(std::process::id().cast_signed())?),
            process: None,
            oci_version: spec.version().clone(),
            bundle: options.bundle.dir().to_owned(),
            rootfs: options.bundle.rootfs().to_owned(),
            cgroup_path,
            scope: None,
            created: clock::rfc3339(clock::now()),
            owner: nix::unistd::getuid().as_raw(),
            annotations: options
                .bundle
                .annotations()
                .map(|all| all.clone().into_iter().collect())
                .unwrap_or_default(),
        };
        let mut container = self.store.create(record)?;
        let record = container.record();
        tracing::debug!(
            "{}: creating it as {} from {}, in the cgroup {}",
            record.id,
            record.isolation,
            record.bundle.display(),
            record.cgroup_path.display()
        );
        match self.make(&mut container, options, scope, images) {
            Ok(created) => Ok(created),
            Err(error) => {
                self.undo(container);
                Err(error)
            }
        }
    }

    fn make(
        &self,
        container: &mut LockedContainer,
        options: CreateOptions<'_>,
        scope: Option<Scope>,
        images: Option<&Images>,
    ) -> Result<Created, Error> {
        let bundle = options
            .bundle
            .with_cgroup_path(&container.record().cgroup_path);
        let config = bundle.to_json().map_err(|source| Error::Encode {
            what: "config.json",
            source,
        })?;
        container.write(SAVED_CONFIG, &config)?;
        fault::point("create.configuration-saved");
        let listener = listen(options.console, container.dir(), &bundle)?;
        let isolation = options.model.isolation();
        let keeper = match scope {
            Some(scope) => {
                let keeper = scope.start(options.id.as_str(), limits(options.model, &bundle))?;
                // Not before: one that could not be started may be another container's. Its end needs no record, for
                // it comes with the keeper's, and that with ours.
                container.update(|record| record.scope = Some(scope))?;
                Some(keeper)
            }
            None => None,
        };
        let context = CreateContext {
            id: options.id,
            bundle: &bundle,
            dir: container.dir(),
            cgroup_path: &container.record().cgroup_path,
            cgroup_keeper: keeper.as_ref().map(Keeper::pid),
            console_socket: match options.console {
                Console::Socket(path) => Some(path),
                Console::Ours => listener.as_ref().map(Listener::path),
                Console::None => None,
            },
            preserve_fds: options.preserve_fds,
            no_pivot: options.no_pivot,
            no_new_keyring: options.no_new_keyring,
            config: &self.config,
        };
        let (pid, hold) = match images {
            None => {
                let Made { pid, hold } = isolation.create(&context)?;
                (pid, Some(hold))
            }
            Some(images) => (isolation.restore(&context, images)?, None),
        };
        fault::point("create.model-done");
        drop(keeper);
        let process = identify(pid)?;
        container.update(|record| record.process = Some(process))?;
        let terminal = match &listener {
            Some(listener) => Some(listener.receive().map_err(|source| Error::Console {
                operation: "receive the terminal",
                source,
            })?),
            None => None,
        };
        fault::point("create.terminal-received");
        if let Some(path) = options.pid_file {
            write_pid_file(path, pid)?;
        }
        if let Some(socket) = options.pidfd_socket {
            send_pidfd(socket, pid, "standard")?;
        }
        let phase = images.map_or(Phase::Created, |_| Phase::Running);
        container.update(|record| record.phase = phase)?;
        if let Some(hold) = hold {
            hold.release().map_err(|source| Error::Process {
                operation: "let go of",
                pid,
                source,
            })?;
        }
        fault::point("create.released");
        tracing::debug!("{}: created, its first process is {pid}", options.id);
        Ok(Created { pid, terminal })
    }

    /// Removes what a failed `create` made. The record goes last: while anything else is there, it says so.
    fn undo(&self, mut container: LockedContainer) {
        let pid = container.record().process.map(|process| process.pid);
        let removed = self
            .remove(&mut container)
            .and_then(|()| Ok(container.remove()?));
        if let Err(error) = removed {
            tracing::warn!(
                "a failed create left something: {}",
                crate::error_chain(&error)
            );
        }
        if let Some(pid) = pid {
            // It was killed and is our child.
            let _ = nix::sys::wait::waitpid(
                nix::unistd::Pid::from_raw(pid),
                Some(nix::sys::wait::WaitPidFlag::WNOHANG),
            );
        }
    }
}

/// Where the container's cgroup will be, and systemd's unit if that makes it.
fn place(
    options: &CreateOptions<'_>,
    given: Option<&Path>,
) -> Result<(PathBuf, Option<Scope>), Error> {
    let id = options.id.as_str();
    if options.systemd_cgroup {
        let scope = Scope::new(given, id, options.rootless)?;
        return Ok((scope.cgroup_path()?, Some(scope)));
    }
    let path = match options.rootless {
        true => Cgroup::path_for_user(given, id),
        false => Cgroup::path_for(given, id),
    };
    Ok((path.map_err(Error::Cgroup)?, None))
}

/// The limits that systemd is told. Those of a machine are more than its workload's, and the model's to set.
fn limits(model: Model, bundle: &Bundle) -> Option<&LinuxResources> {
    let limits = bundle.spec().linux().as_ref()?.resources().as_ref()?;
    (model == Model::Container).then_some(limits)
}

/// A terminal needs somebody who takes it, and who waits for one must get it.
pub(super) fn check_console(wants_terminal: bool, console: Console<'_>) -> Result<(), Error> {
    match (wants_terminal, console) {
        (true, Console::None) => Err(Error::Terminal(
            "cannot allocate tty without a console socket when detached: give --console-socket",
        )),
        (false, Console::Socket(_)) => Err(Error::Terminal(
            "cannot use console socket if the process has no terminal: set `process.terminal` or drop --console-socket",
        )),
        _ => Ok(()),
    }
}

fn listen(console: Console<'_>, dir: &Path, bundle: &Bundle) -> Result<Option<Listener>, Error> {
    let wants_terminal = bundle
        .spec()
        .process()
        .as_ref()
        .and_then(|process| process.terminal())
        .unwrap_or(false);
    if !matches!(console, Console::Ours) || !wants_terminal {
        return Ok(None);
    }
    listen_at(dir, CONSOLE_SOCKET).map(Some)
}

pub(super) fn listen_at(dir: &Path, name: &str) -> Result<Listener, Error> {
    let path = dir.join(name);
    Listener::bind(&path).map_err(|source| Error::Path {
        operation: "listen on",
        path,
        source,
    })
}
