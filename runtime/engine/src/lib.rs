//! The container engine that the host and the guest agent share.
//!
//! It does the mechanics of one container: namespaces, mounts, cgroup, rights, and the first process, which waits for
//! its start. docs/architecture.md says which steps are left to libcontainer, and why. The engine keeps no record of a
//! container's life: its caller does, and can end and remove a container knowing only its cgroup path and the engine's
//! directory.
//!
//! The configuration, the root file system and the container's processes are hostile. The caller must have one thread:
//! the engine clones it.

pub mod cgroup;
pub mod console;
pub mod fault;
pub mod hooks;
pub mod netlink;
pub mod observation;
pub mod systemd;

mod attributes;
mod clone;
mod create;
mod error;
mod exec;
mod handshake;
mod limits;
mod namespaces;
mod net_devices;
mod own_binary;
mod own_code;
mod processes;
mod report;
mod rootfs;
mod seccomp;
mod seccomp_cache;
mod spec;
mod stdio;
mod workload;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use oci_spec::runtime::{Linux, Process, Spec};

pub use attributes::reset_affinity;
pub use cgroup::Cgroup;
pub use create::prepare_host;
pub use error::Error;
pub use own_binary::{Stay, own_path, seal};
pub use own_code::give_back_code;
pub use processes::{ProcessInfo, processes, start_time};
pub use report::chain as error_chain;
pub use rootfs::{KNOWN_MOUNT_OPTIONS, mount_on_host, unmount_on_host};
pub use seccomp::{
    AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, compile as compile_seccomp, name as syscall_name,
    numbers as syscall_numbers,
};
pub use spec::{begins_pid_namespace, validate};
pub use stdio::{Stdio, send_with_files, with_short_path};
pub use workload::loopback_up;

use error::Context;

/// The engine of one container.
#[derive(Clone, Debug)]
pub struct Engine {
    directory: PathBuf,
    seccomp_cache: Option<PathBuf>,
}

/// What a container is made from.
pub struct CreateRequest<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Its configuration; `root.path` and the sources of bind mounts must be absolute.
    ///
    /// Its `prestart`, `createRuntime`, `createContainer` and `startContainer` hooks are run by the engine, the first
    /// two in the caller's namespaces. `poststart` and `poststop` are left to the caller.
    pub spec: &'a Spec,
    /// The bundle's directory, for the state that hooks get.
    pub bundle: &'a Path,
    /// The cgroup, which must have no processes; it is made, limited by `linux.resources` and entered.
    pub cgroup: &'a Cgroup,
    /// Standard input, output and error of the first process.
    pub stdio: Stdio,
    /// How many descriptors from number 3 on the program inherits.
    pub preserve_fds: u32,
    /// Move the root with `MS_MOVE` and chroot instead of pivot_root, for a root on an initramfs.
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
}

/// A container whose first process waits for [`Engine::start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    /// Its first process, a child of the caller.
    pub pid: Pid,
    /// When that process began ([`start_time`]); with the pid it names the process for ever.
    pub start_time: u64,
}

/// Ties a container's first process to the process that creates it: it ends with it, however that ends, unless it has
/// been released. So no creation that was cut off leaves a process that waits for a start which nobody will give.
#[derive(Debug)]
pub struct Hold(OwnedFd);

impl Hold {
    /// The creator's end of a pipe or a pair of sockets, from whose other end the first process reads one byte.
    #[must_use]
    pub fn new(end: OwnedFd) -> Self {
        Self(end)
    }

    /// Lets the first process live on by itself.
    ///
    /// # Errors
    /// It is gone.
    pub fn release(self) -> io::Result<()> {
        File::from(self.0).write_all(RELEASE)
    }
}

/// What [`Hold::release`] says.
const RELEASE: &[u8] = b"r";

/// Waits for [`Hold::release`] at the other end; an error means that the creator is gone. It needs no other system call
/// than read(2): a filter may be in force.
///
/// # Errors
/// The creator ended without it.
pub fn wait_for_release(end: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        match nix::unistd::read(end.as_raw_fd(), &mut [0]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// One more process for a running container.
pub struct ExecRequest<'a> {
    /// The container's first process.
    pub init: Pid,
    /// When it began, as [`Created`] said; a pid taken over by another process is then found out.
    pub init_start: u64,
    /// The process: program, user, environment, capabilities, limits, `noNewPrivileges`.
    pub process: &'a Process,
    /// `linux` of the container's configuration, whose seccomp profile and personality are those of each process.
    pub linux: Option<&'a Linux>,
    /// The container's state (runtime-spec, "State"), for who gets the notifications of a seccomp profile.
    pub state: serde_json::Value,
    /// The container's cgroup.
    pub cgroup: &'a Cgroup,
    /// An existing cgroup below it to run in.
    pub sub_cgroup: Option<&'a Path>,
    /// Standard input, output and error.
    pub stdio: Stdio,
    /// How many descriptors from number 3 on the program inherits.
    pub preserve_fds: u32,
    /// Go on although the container is frozen; the process then waits until it is thawed.
    pub ignore_paused: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
}

impl Engine {
    /// An engine that keeps its few files in a directory of its own, such as `/run/rt/<id>/engine`.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            seccomp_cache: None,
        }
    }

    /// The same with a directory for compiled seccomp profiles, which is made in one that exists and may be shared with
    /// other engines of this user.
    #[must_use]
    pub fn with_seccomp_cache(mut self, cache: impl Into<PathBuf>) -> Self {
        self.seccomp_cache = Some(cache.into());
        self
    }

    /// Makes a container. Its first process, a child of the caller, waits for [`Engine::start`], and ends if the
    /// [`Hold`] is dropped before it was released: the caller notes first what it made.
    ///
    /// # Errors
    /// What could not be done, with the field of the configuration or the path in question. Nothing is left behind,
    /// neither process, mount, cgroup nor file; a missing program is an error here already.
    pub fn create(&self, request: CreateRequest<'_>) -> Result<(Created, Hold), Error> {
        spec::validate(request.spec)?;
        let cgroup = request.cgroup;
        self.adopt(cgroup)?;
        let created = create::create(self, request);
        if created.is_err() {
            // The first failure is the one to tell.
            let _ = self.delete(cgroup);
        }
        created
    }

    /// Makes a cgroup this container's own, as [`Engine::create`] does, for processes that somebody else makes in it.
    ///
    /// # Errors
    /// A process is in it already, it is frozen, or the engine's directory cannot be made.
    pub fn adopt(&self, cgroup: &Cgroup) -> Result<(), Error> {
        cgroup.ensure_unused()?;
        self.claim(cgroup)
    }

    /// Lets the first process run the container's program.
    ///
    /// # Errors
    /// The process is gone or was started before.
    pub fn start(&self) -> Result<(), Error> {
        create::start(&self.start_pipe())
    }

    /// Whether the first process has been let go, by this process or another, or is gone.
    ///
    /// # Errors
    /// The start pipe cannot be looked at.
    pub fn has_started(&self) -> Result<bool, Error> {
        create::has_started(&self.start_pipe())
    }

    /// Runs one more process in the container; it is a child of the caller.
    ///
    /// # Errors
    /// The container does not run, is frozen, or the process cannot be started as asked: then it never ran.
    pub fn exec(&self, request: ExecRequest<'_>) -> Result<Created, Error> {
        exec::exec(request, self.seccomp_cache.as_deref())
    }

    /// Kills what is left of the container and removes its cgroup and the engine's directory.
    ///
    /// It may be called again, and after a crash at any point of [`Engine::create`]. A cgroup that was never claimed
    /// by a create of this engine is not touched.
    ///
    /// # Errors
    /// A process does not end, or a file or cgroup cannot be removed.
    pub fn delete(&self, cgroup: &Cgroup) -> Result<(), Error> {
        if self.claim_file().exists() {
            cgroup.remove()?;
            fault::point("engine.cgroup-removed");
        }
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context(|| format!("cannot remove {}", self.directory.display()))
            }
            _ => Ok(()),
        }
    }

    fn start_pipe(&self) -> PathBuf {
        self.directory.join("start")
    }

    /// Written before the cgroup is made, after it was seen to have no processes: what is in it later is ours to kill.
    fn claim_file(&self) -> PathBuf {
        self.directory.join("cgroup")
    }

    fn claim(&self, cgroup: &Cgroup) -> Result<(), Error> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .context(|| format!("cannot create {}", self.directory.display()))?;
        let path = self.claim_file();
        fs::write(&path, cgroup.path().as_os_str().as_encoded_bytes())
            .context(|| format!("cannot write {}", path.display()))?;
        fault::point("engine.cgroup-claimed");
        Ok(())
    }
}
