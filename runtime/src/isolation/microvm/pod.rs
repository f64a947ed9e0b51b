//! Pods: containers that share the machine of their sandbox container.
//!
//! A container engine for Kubernetes says by annotations which container is a pod's sandbox and which belong to it. The
//! sandbox's machine is made as any other; a further container of the pod is made inside it, by the same agent and with
//! the sandbox's namespaces, and a process on the host stands for its init. The annotations are the caller's, not the
//! workload's, but they name another container: what they say is checked against what is there.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use engine::{Hold, fault};
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::Spec;
use protocol::ROOTFS_TAG;
use protocol::VOLUMES_TAG;
use protocol::message::{ContainerRequest, CreateContainerRequest, DeleteRequest};
use protocol::method::{CreateContainer, Delete, State};
use protocol::{ClientError, Code};

use super::VM_DIR;
use super::agent::{self, Agent, AgentError};
use super::report::Reporter;
use super::shares::{self, ShareError};
use super::stand_in::{self, StandIn, StandInError, io_error};
use super::vmm_process;
use crate::bundle::Bundle;
use crate::id::ContainerId;
use crate::process::PidFd;

/// The annotations that say what a container is to its pod, and which container is the pod's sandbox: containerd's and
/// CRI-O's.
const ANNOTATIONS: [[&str; 2]; 2] = [
    [
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ],
    [
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ],
];

/// The id of the sandbox whose machine a container is in, in its own `vm` directory.
const SANDBOX: &str = "sandbox";

/// What a container is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It belongs to none.
    Alone,
    /// Its machine takes the pod's other containers.
    Sandbox,
    /// It goes into the machine of this container.
    Member(ContainerId),
}

/// Why a container cannot be in a pod's machine.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The annotation is no id.
    #[error("config.json: `annotations[\"{key}\"]`: {value:?} is no container id")]
    Id {
        /// The annotation.
        key: &'static str,
        /// What it says.
        value: String,
    },
    /// There is no such machine.
    #[error(
        "the pod's sandbox {sandbox} has no microVM that runs: is it a container of another isolation model, or has it \
         ended?"
    )]
    NoMachine {
        /// The sandbox.
        sandbox: String,
        /// What was tried in vain.
        #[source]
        source: AgentError,
    },
    /// The sandbox's init has ended.
    #[error("the pod's sandbox {0} has ended")]
    Ended(String),
}

/// What the bundle's annotations say of the container's pod.
///
/// # Errors
/// A sandbox that cannot be one.
pub fn role(bundle: &Bundle) -> Result<Role, PodError> {
    for [type_key, sandbox_key] in ANNOTATIONS {
        match bundle.annotation(type_key) {
            Some("sandbox") => return Ok(Role::Sandbox),
            Some("container") => {
                let value = bundle.annotation(sandbox_key).unwrap_or_default();
                let id = value.parse().map_err(|_| PodError::Id {
                    key: sandbox_key,
                    value: value.to_owned(),
                })?;
                return Ok(Role::Member(id));
            }
            _ => {}
        }
    }
    Ok(Role::Alone)
}

/// The `vm` directory of the machine that the container with this directory is in: its own, or its sandbox's.
pub fn machine_of(container: &Path) -> PathBuf {
    let own = container.join(VM_DIR);
    match fs::read_to_string(own.join(SANDBOX)) {
        Ok(sandbox) => container.with_file_name(sandbox).join(VM_DIR),
        Err(_) => own,
    }
}

/// Whether the container with this directory is in the machine of another.
pub fn is_member(container: &Path) -> bool {
    container.join(VM_DIR).join(SANDBOX).exists()
}

/// Writes down in a container's new `vm` directory whose machine it is in.
///
/// # Errors
/// The file system's.
pub fn note_sandbox(vm_dir: &Path, sandbox: &ContainerId) -> io::Result<()> {
    fs::write(vm_dir.join(SANDBOX), sandbox.as_str())
}

/// The machine of a pod.
#[derive(Debug)]
pub struct Machine {
    /// Its `vm` directory.
    pub dir: PathBuf,
    /// Its VMM process.
    pub vmm: Vmm,
    /// The sandbox's init as the guest's kernel numbers it.
    pub init: u32,
}

impl Machine {
    /// Finds the machine of `sandbox`, whose directory is beside `container`'s.
    ///
    /// # Errors
    /// It has none that runs.
    pub fn find(container: &Path, sandbox: &ContainerId) -> Result<Self, PodError> {
        let dir = container.with_file_name(sandbox.as_str()).join(VM_DIR);
        let no_machine = |source| PodError::NoMachine {
            sandbox: sandbox.as_str().to_owned(),
            source,
        };
        let vmm = Vmm::of(&dir).map_err(|source| {
            let path = dir.display().to_string();
            no_machine(AgentError::Connect { path, source })
        })?;
        // Its answer shows that it still was the VMM process whose descriptor we have.
        let mut agent = Agent::connect(&dir).map_err(no_machine)?;
        let id = sandbox.as_str().to_owned();
        let state = agent.call::<State>(&ContainerRequest { id });
        match state.map_err(no_machine)?.pid {
            0 => Err(PodError::Ended(sandbox.as_str().to_owned())),
            init => Ok(Self { dir, vmm, init }),
        }
    }
}

/// A VMM process.
#[derive(Debug)]
pub struct Vmm {
    /// Its pid.
    pub pid: i32,
    /// A descriptor of it: its number may be taken over by another, this not.
    pub fd: PidFd,
}

impl Vmm {
    /// The process that serves the machine with this `vm` directory. If the machine answers after this, it is the one.
    ///
    /// # Errors
    /// There is none.
    pub fn of(machine: &Path) -> io::Result<Self> {
        let stream: UnixStream = agent::connect(machine, protocol::RPC_PORT)?;
        // Who listens there: the directory is root's alone.
        let pid = getsockopt(&stream, PeerCredentials)?.pid();
        let fd = PidFd::open(pid)?;
        Ok(Self { pid, fd })
    }
}

/// Takes a container out of its pod's machine, if that still runs.
///
/// # Errors
/// The agent's, or the kernel's.
pub fn leave(container: &Path, id: &str) -> Result<(), LeaveError> {
    let machine = machine_of(container);
    let Ok(vmm) = Vmm::of(&machine) else {
        return Ok(());
    };
    let request = DeleteRequest {
        id: id.to_owned(),
        exec_id: String::new(),
        force: true,
    };
    let deleted = Agent::connect(&machine).and_then(|mut agent| agent.call::<Delete>(&request));
    match deleted {
        // The machine has just ended.
        Err(AgentError::Connect { .. }) => return Ok(()),
        Ok(_) => {}
        // It was never made there.
        Err(AgentError::Call(ClientError::Failed(failure))) if failure.code() == Code::NotFound => {
        }
        Err(error) => return Err(error.into()),
    }
    fault::point("pod.left");
    Ok(shares::remove(vmm.fd.as_fd(), id)?)
}

/// Why a container could not be taken out of its pod's machine.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// The guest said no.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its files.
    #[error(transparent)]
    Share(#[from] ShareError),
}

/// A container to make in a pod's machine.
#[derive(Debug)]
pub struct Member<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The container's own `vm` directory.
    pub vm_dir: &'a Path,
    /// The machine.
    pub machine: &'a Machine,
    /// The container's cgroup on the host.
    pub cgroup: &'a Path,
    /// The configuration for the guest's engine.
    pub spec: &'a Spec,
    /// Where its terminal's master goes.
    pub console_socket: Option<&'a Path>,
}

impl Member<'_> {
    /// Makes the container; gives the pid of the process that stands for its init, a child of ours, and what holds it.
    /// `prepare` gets that pid when the process is in the container's cgroup.
    ///
    /// # Errors
    /// It could not be made; no process is left on the host.
    pub fn create(
        &self,
        prepare: impl FnOnce(Pid) -> Result<(), engine::Error>,
    ) -> Result<(i32, Hold), CreateError> {
        let pipe = || {
            pipe2(nix::fcntl::OFlag::O_CLOEXEC)
                .map_err(|errno| io_error("make a pipe")(errno.into()))
        };
        let (held, hold) = pipe()?;
        let (prepared, go) = pipe()?;
        let keep: [&dyn std::os::fd::AsRawFd; 2] = [&held, &prepared];
        let (pid, mut report) =
            stand_in::spawn(&keep, |reporter| self.live(reporter, &prepared, &held))?;
        drop((held, prepared));
        fault::point("pod.stand-in-made");
        let made = (|| {
            report.wait().map_err(StandInError::from)?;
            prepare(pid)?;
            fault::point("pod.prepared");
            // If it is gone, its report says why.
            let _ = Hold::new(go).release();
            Ok(report.wait().map_err(StandInError::from)?)
        })();
        if let Err(error) = made {
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
            return Err(error);
        }
        Ok((pid.as_raw(), Hold::new(hold)))
    }

    /// The stand-in's life; its exit code, if it does not end by a signal.
    fn live(&self, mut reporter: Reporter, prepared: &impl AsFd, held: &impl AsFd) -> u8 {
        let stand_in = match self.begin(&mut reporter, prepared) {
            Ok(stand_in) => stand_in,
            Err(error) => {
                reporter.failed(&error);
                return 1;
            }
        };
        // From here on the hold is what binds us to the process that made us.
        let _ = nix::sys::prctl::set_pdeathsig(None);
        if reporter.ready().is_err() || engine::wait_for_release(held.as_fd()).is_err() {
            return 1;
        }
        fault::point("pod.released");
        stand_in.until_its_end(self.id, "")
    }

    /// Creates the container in the guest.
    fn begin(
        &self,
        reporter: &mut Reporter,
        prepared: &impl AsFd,
    ) -> Result<StandIn, StandInError> {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
            .map_err(|errno| io_error("ask for a signal at the parent's death")(errno.into()))?;
        let signals = stand_in::take_place(self.cgroup, true)?;
        reporter
            .arrived()
            .map_err(io_error("tell that the place is taken"))?;
        engine::wait_for_release(prepared.as_fd())
            .map_err(io_error("wait until the host is prepared"))?;
        let process = self.spec.process().as_ref().ok_or_else(|| {
            io_error("find the process in the spec")(io::ErrorKind::NotFound.into())
        })?;
        let (machine, socket) = (self.machine.dir.as_path(), self.console_socket);
        let mut connected = stand_in::connect_streams(signals, machine, process, socket)?;
        if let Some(terminal) = &connected.terminal {
            vmm_process::note_terminal(self.vm_dir, terminal)
                .map_err(io_error("note the terminal's name"))?;
        }
        fault::point("pod.streams-connected");
        connected
            .agent
            .call::<CreateContainer>(&CreateContainerRequest {
                id: self.id.to_owned(),
                spec_json: serde_json::to_string(self.spec)
                    .map_err(|error| io_error("encode the spec")(error.into()))?,
                stdio: Some(connected.relay.stdio()),
                shares: vec![ROOTFS_TAG.to_owned(), VOLUMES_TAG.to_owned()],
                network: None,
                disks: Vec::new(),
            })?;
        fault::point("pod.container-created");
        StandIn::new(connected, machine)
    }
}

/// Why a container was not made in a pod's machine.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The process that stands for it.
    #[error(transparent)]
    StandIn(#[from] StandInError),
    /// A hook, or a network device.
    #[error(transparent)]
    Host(#[from] engine::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role_by(annotations: &str) -> Result<Role, String> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let config = format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},"linux":{{}},"annotations":{annotations},
            "process":{{"cwd":"/","args":["sh"],"user":{{"uid":0,"gid":0}}}}}}"#
        );
        fs::write(dir.path().join("config.json"), config).unwrap();
        role(&Bundle::load(dir.path()).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn annotations_say_what_a_container_is_to_its_pod() {
        assert_eq!(role_by("{}"), Ok(Role::Alone));
        let sandbox = r#"{"io.kubernetes.cri.container-type":"sandbox"}"#;
        assert_eq!(role_by(sandbox), Ok(Role::Sandbox));
        let member = r#"{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.SandboxID":"p1"}"#;
        assert_eq!(role_by(member), Ok(Role::Member("p1".parse().unwrap())));
    }

    #[test]
    fn a_sandbox_that_leads_elsewhere_is_refused() {
        let error = role_by(
            r#"{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"../x"}"#,
        );
        assert_eq!(
            error.unwrap_err(),
            "config.json: `annotations[\"io.kubernetes.cri.sandbox-id\"]`: \"../x\" is no container id"
        );
    }

    #[test]
    fn a_members_machine_is_its_sandboxs() {
        let root = tempfile::tempdir().unwrap();
        let [own, other] = ["a", "b"].map(|id| root.path().join(id).join(VM_DIR));
        fs::create_dir_all(&own).unwrap();
        assert_eq!(machine_of(&root.path().join("a")), own);
        note_sandbox(&own, &"b".parse().unwrap()).unwrap();
        assert_eq!(machine_of(&root.path().join("a")), other);
    }
}
