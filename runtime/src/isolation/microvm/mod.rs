//! The microVM model: the container runs in a virtual machine of its own, made by a VMM process that stands for it.
//!
//! The host distrusts everything beyond the VMM: the guest's kernel and agent can at most end their own machine. This
//! module and its children run on the host; what runs in the guest is the `agent` crate and the same engine that the
//! container model has.

mod agent;
mod checkpoint;
mod control;
mod exec;
mod guest_spec;
mod intruder;
mod jail;
mod memory;
mod network;
mod oom;
mod pod;
mod relay;
mod report;
mod shares;
mod sizing;
mod stand_in;
mod supervise;
pub mod template;
mod terminal;
mod vmm_process;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use engine::cgroup::Cgroup;
use engine::observation::Observation;
use engine::{Hold, ProcessInfo, fault};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::{LinuxResources, Spec};
use protocol::message::{ContainerRequest, ResizeTerminalRequest, SignalRequest, UpdateRequest};
use protocol::method::{
    Observe, Pause, Processes, ResizeTerminal, Resume, Signal as SendSignal, StartContainer, State,
    Stats as GuestStats, Update,
};
use protocol::{ClientError, Code, Method};
use vmm::seccomp::Policy;

use self::agent::{Agent, AgentError};
use self::guest_spec::{Network, PodInit};
use self::pod::{Member, Role};
use self::shares::Content;
use self::vmm_process::{Boot, Orders};
use super::{
    CreateContext, ExecRequest, Images, Isolation, IsolationError, Made, Model, OomWatch, Stats,
    Target,
};
use crate::bundle::{Bundle, VmSection};
use crate::config::MicrovmConfig;
use crate::guest::{Guest, Store};
use crate::id::ContainerId;
use crate::process::PidFd;
use crate::signal::Signal;
use crate::state::Status;

pub use vmm_process::{is_vmm, main};

/// What happens to a thread that serves a guest and asks the host's kernel for more than it needs.
fn confinement() -> Policy {
    if fault::is_left_out("vmm.confined") {
        Policy::Off
    } else {
        Policy::Enforce
    }
}

/// The model's directory in a container's.
const VM_DIR: &str = "vm";

/// The path of the network namespace that was joined, in the model's directory.
const NETWORK_NAMESPACE: &str = "network-namespace";

/// How long a VMM process may take to end after SIGKILL: it may have gigabytes to give back.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The model.
#[derive(Debug)]
pub struct MicrovmModel;

/// What fails before the VMM process speaks for itself.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error("cannot {action}")]
    Io {
        action: String,
        #[source]
        source: io::Error,
    },
    #[error("config.json: `vm.kernel.path`: {} cannot be used", path.display())]
    Kernel {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the agent {} cannot be used: install rt-agent beside rt, or set `microvm.agent`", path.display())]
    NoAgent {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the VMM process {pid} did not end after SIGKILL")]
    Immortal { pid: i32 },
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> IsolationError {
    move |source| {
        IsolationError::failed(SetupError::Io {
            action: action.into(),
            source,
        })
    }
}

fn unsupported(operation: &'static str, reason: &'static str) -> IsolationError {
    IsolationError::Unsupported {
        model: Model::Microvm,
        operation,
        reason,
    }
}

/// An agent that cannot be reached belongs to a container that has ended.
fn agent_error(error: AgentError) -> IsolationError {
    match error {
        AgentError::Connect { .. } => IsolationError::NotRunning,
        AgentError::Call(ClientError::Failed(failure)) if failure.code() == Code::NotFound => {
            IsolationError::NotRunning
        }
        AgentError::Call(ClientError::Failed(failure)) => IsolationError::failed(failure),
        error => IsolationError::failed(error),
    }
}

fn call<M: Method>(
    container: &Target<'_>,
    request: &M::Request,
) -> Result<M::Response, IsolationError> {
    let mut agent = Agent::connect(&pod::machine_of(container.dir)).map_err(agent_error)?;
    agent.call::<M>(request).map_err(agent_error)
}

fn name(container: &Target<'_>) -> ContainerRequest {
    ContainerRequest {
        id: container.id.as_str().to_owned(),
    }
}

/// What the guest's kernel counted for the container.
fn guest_stats(container: &Target<'_>) -> Result<engine::cgroup::Stats, IsolationError> {
    let response = call::<GuestStats>(container, &name(container))?;
    serde_json::from_str(&response.stats_json)
        .map_err(|error| io_error("read the statistics that the guest's agent sent")(error.into()))
}

impl Isolation for MicrovmModel {
    fn model(&self) -> Model {
        Model::Microvm
    }

    fn create(&self, context: &CreateContext<'_>) -> Result<Made, IsolationError> {
        check_context(context)?;
        match pod::role(context.bundle).map_err(IsolationError::failed)? {
            Role::Member(sandbox) => create_in_pod(context, &sandbox),
            role => create_machine(context, role == Role::Sandbox, None),
        }
    }

    fn start(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        let vm_dir = container.dir.join(VM_DIR);
        let mut agent = Agent::connect(&pod::machine_of(container.dir)).map_err(agent_error)?;
        // The client may have given its terminal a size since create; the workload must not see an older one.
        if let Ok(terminal) = fs::read_to_string(vm_dir.join(vmm_process::TERMINAL))
            && let Ok(device) = fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOCTTY)
                .open(terminal)
            && let Some(size) = terminal::size_of(device.as_fd())
        {
            let id = container.id.as_str().to_owned();
            let request = ResizeTerminalRequest {
                id,
                exec_id: String::new(),
                size: Some(size),
            };
            agent
                .call::<ResizeTerminal>(&request)
                .map_err(agent_error)?;
        }
        fault::point("microvm.start-connected");
        agent
            .call::<StartContainer>(&name(container))
            .map_err(agent_error)?;
        Ok(())
    }

    fn status(&self, container: &Target<'_>) -> Result<Status, IsolationError> {
        // A guest that lies about its own workload deceives nobody but its owner.
        let state = call::<State>(container, &name(container))?;
        Ok(match state.status.as_str() {
            "created" => Status::Created,
            "paused" => Status::Paused,
            _ => Status::Running,
        })
    }

    fn kill(
        &self,
        container: &Target<'_>,
        signal: Signal,
        all: bool,
    ) -> Result<(), IsolationError> {
        // The machine ends with its VMM: no guest, however broken, outlives this. In a pod others need it.
        if signal == Signal::KILL && !pod::is_member(container.dir) {
            let pid = container.pid.ok_or(IsolationError::NotRunning)?;
            let process = PidFd::open(pid).map_err(|_| IsolationError::NotRunning)?;
            return process
                .signal(signal)
                .map_err(io_error("kill the VMM process"));
        }
        let id = container.id.as_str().to_owned();
        let request = SignalRequest {
            id,
            exec_id: String::new(),
            signal: signal.number().unsigned_abs(),
            all,
        };
        call::<SendSignal>(container, &request).map(drop)
    }

    fn delete(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        if let Some(pid) = container.pid
            && let Ok(process) = PidFd::open(pid)
        {
            // It may just be ending by itself, and then takes no signal.
            let _ = process.signal(Signal::KILL);
            if !process
                .wait_exit(END_LIMIT)
                .map_err(io_error("wait for the VMM process"))?
            {
                return Err(IsolationError::failed(SetupError::Immortal { pid }));
            }
            fault::point("microvm.machine-ended");
        }
        let vm_dir = container.dir.join(VM_DIR);
        if !vm_dir.exists() {
            return Ok(());
        }
        // With the cgroup go the processes that stand for `exec`, and a VMM process that nobody has recorded.
        let cgroup = Cgroup::new(container.cgroup_path).map_err(IsolationError::failed)?;
        cgroup.remove().map_err(IsolationError::failed)?;
        fault::point("microvm.cgroup-removed");
        if pod::is_member(container.dir) {
            pod::leave(container.dir, container.id.as_str()).map_err(IsolationError::failed)?;
        }
        let shares = vm_dir.join(vmm_process::SHARES);
        shares::remove_mount_point(&shares)
            .map_err(io_error(format!("remove {}", shares.display())))?;
        fault::point("microvm.shares-removed");
        if let Ok(path) = fs::read(vm_dir.join(NETWORK_NAMESPACE)) {
            network::detach(Path::new(OsStr::from_bytes(&path))).map_err(IsolationError::failed)?;
        }
        fault::point("microvm.network-detached");
        match fs::remove_dir_all(&vm_dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error(format!("remove {}", vm_dir.display()))(error))
            }
            _ => Ok(()),
        }
    }

    fn exec(
        &self,
        container: &Target<'_>,
        request: &ExecRequest<'_>,
    ) -> Result<i32, IsolationError> {
        if request.preserve_fds > 0 {
            return Err(unsupported(
                "preserve descriptors",
                "a descriptor of the host has no meaning in the guest",
            ));
        }
        let execution = exec::Execution {
            id: container.id.as_str(),
            machine: &pod::machine_of(container.dir),
            cgroup_path: container.cgroup_path,
            process: request.process,
            console_socket: request.console_socket,
            ignore_paused: request.ignore_paused,
            sub_cgroup: &request
                .cgroup
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
        };
        execution.start().map_err(IsolationError::failed)
    }

    fn pause(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        call::<Pause>(container, &name(container)).map(drop)
    }

    fn resume(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        call::<Resume>(container, &name(container)).map(drop)
    }

    fn update(
        &self,
        container: &Target<'_>,
        resources: &LinuxResources,
    ) -> Result<(), IsolationError> {
        let resources_json = serde_json::to_string(resources)
            .map_err(|error| io_error("encode the resources")(error.into()))?;
        let id = container.id.as_str().to_owned();
        let set = || call::<Update>(container, &UpdateRequest { id, resources_json }).map(drop);
        match resources.memory() {
            Some(memory) if memory.limit().is_some_and(|limit| limit != 0) => {
                memory::update(container, memory, set)
            }
            _ => set(),
        }
    }

    fn stats(&self, container: &Target<'_>) -> Result<Stats, IsolationError> {
        Ok(Stats {
            workload: guest_stats(container)?,
            machine: Some(
                Cgroup::new(container.cgroup_path)
                    .and_then(|cgroup| cgroup.stats())
                    .map_err(IsolationError::failed)?,
            ),
        })
    }

    fn watch_oom(&self, container: &Target<'_>) -> Result<Box<dyn OomWatch>, IsolationError> {
        let known = guest_stats(container)?.memory.oom_kills;
        let watch = oom::GuestWatch::new(&pod::machine_of(container.dir), container.id, known);
        Ok(Box::new(watch.map_err(agent_error)?))
    }

    fn checkpoint(&self, container: &Target<'_>, images: &Images) -> Result<(), IsolationError> {
        if images.pre_dump || images.parent_path.is_some() {
            return Err(unsupported(
                "checkpoint in several passes",
                "the memory is written as a whole: leave out --pre-dump and --parent-path",
            ));
        }
        if pod::is_member(container.dir) {
            return Err(unsupported(
                "checkpoint a container of a pod",
                "the machine is the pod's",
            ));
        }
        let vm_dir = container.dir.join(VM_DIR);
        checkpoint::write(&vm_dir, &images.image_path, images.leave_running)
            .map_err(IsolationError::failed)
    }

    fn restore(&self, context: &CreateContext<'_>, images: &Images) -> Result<i32, IsolationError> {
        check_context(context)?;
        if pod::role(context.bundle).map_err(IsolationError::failed)? != Role::Alone {
            return Err(unsupported(
                "restore a container of a pod",
                "the machine is the pod's",
            ));
        }
        let Made { pid, hold } = create_machine(context, false, Some(&images.image_path))?;
        hold.release()
            .map_err(io_error("let go of the VMM process"))?;
        Ok(pid)
    }

    fn console(&self, container: &Target<'_>) -> Result<Vec<u8>, IsolationError> {
        let path = pod::machine_of(container.dir).join(vmm_process::CONSOLE_LOG);
        fs::read(path).map_err(io_error("read the guest's console"))
    }

    fn observe(&self, container: &Target<'_>, _: &Spec) -> Result<Observation, IsolationError> {
        let response = call::<Observe>(container, &name(container))?;
        serde_json::from_slice(&response.observation).map_err(IsolationError::failed)
    }

    fn processes(&self, container: &Target<'_>) -> Result<Vec<ProcessInfo>, IsolationError> {
        if container.pid.is_none() {
            // All ended with the first one.
            return Ok(Vec::new());
        }
        let response = call::<Processes>(container, &name(container))?;
        Ok(response
            .processes
            .into_iter()
            .filter_map(|process| {
                Some(ProcessInfo {
                    pid: i32::try_from(process.pid).ok()?,
                    parent: i32::try_from(process.parent).ok()?,
                    uid: process.uid,
                    terminal: process.terminal,
                    cpu: Duration::from_millis(process.cpu_millis),
                    started: Duration::from_millis(process.started_millis),
                    command: process.command,
                })
            })
            .collect())
    }
}

/// Refuses what no machine can be made for.
fn check_context(context: &CreateContext<'_>) -> Result<(), IsolationError> {
    if context.preserve_fds > 0 {
        return Err(unsupported(
            "preserve descriptors",
            "a descriptor of the host has no meaning in the guest",
        ));
    }
    if engine::cgroup::is_rootless() {
        return Err(unsupported(
            "run for an ordinary user",
            "its process takes privileges to give them up; call it as root",
        ));
    }
    refuse_foreign_machines(context.bundle.vm())
}

/// Makes a machine with the container in it, which is created, or goes on from the images of a checkpoint.
fn create_machine(
    context: &CreateContext<'_>,
    is_sandbox: bool,
    images: Option<&Path>,
) -> Result<Made, IsolationError> {
    let orders = Orders {
        images: images.map(Path::to_owned),
        ..orders(context, is_sandbox)?
    };
    let cgroup = claim(context)?;
    if let Network::Join(path) = &orders.network {
        fs::write(
            orders.vm_dir.join(NETWORK_NAMESPACE),
            path.as_os_str().as_encoded_bytes(),
        )
        .map_err(io_error("note the network namespace"))?;
    }
    fault::point("microvm.cgroup-claimed");
    limit(&cgroup, context)?;
    fault::point("microvm.cgroup-limited");
    spawn_vmm(&orders, |pid| prepare_host(context, pid))
}

/// Makes the container in the machine of its pod.
fn create_in_pod(
    context: &CreateContext<'_>,
    sandbox: &ContainerId,
) -> Result<Made, IsolationError> {
    if context.bundle.vm().is_some() {
        return Err(unsupported(
            "honour `vm` in a container of a pod",
            "the machine is the pod's: ask for it in the sandbox's configuration",
        ));
    }
    let machine = pod::Machine::find(context.dir, sandbox).map_err(IsolationError::failed)?;
    let init = PodInit {
        host: machine.vmm.pid,
        guest: machine.init,
    };
    let guest_spec = guest_spec::rewrite(context.bundle, context.id, Some(init))
        .map_err(IsolationError::failed)?;
    let cgroup = claim(context)?;
    let vm_dir = context.dir.join(VM_DIR);
    pod::note_sandbox(&vm_dir, sandbox).map_err(io_error("note the pod's sandbox"))?;
    fault::point("pod.claimed");
    limit(&cgroup, context)?;
    let content = Content {
        id: context.id.as_str(),
        rootfs: context.bundle.rootfs(),
        read_only: is_read_only(context.bundle),
        volumes: &guest_spec.volumes,
    };
    shares::add(machine.vmm.fd.as_fd(), &content).map_err(IsolationError::failed)?;
    fault::point("pod.shared");
    let member = Member {
        id: context.id.as_str(),
        vm_dir: &vm_dir,
        machine: &machine,
        cgroup: context.cgroup_path,
        spec: &guest_spec.spec,
        console_socket: context.console_socket,
    };
    let (pid, hold) = member
        .create(|pid| prepare_host(context, pid))
        .map_err(IsolationError::failed)?;
    Ok(Made { pid, hold })
}

/// Makes the container's `vm` directory: from then on, what is in the cgroup is ours to end.
fn claim(context: &CreateContext<'_>) -> Result<Cgroup, IsolationError> {
    let mut cgroup = Cgroup::new(context.cgroup_path).map_err(IsolationError::failed)?;
    if let Some(keeper) = context.cgroup_keeper {
        cgroup = cgroup.kept_by(keeper);
    }
    cgroup.ensure_unused().map_err(IsolationError::failed)?;
    let vm_dir = context.dir.join(VM_DIR);
    fs::create_dir(&vm_dir).map_err(io_error(format!("create {}", vm_dir.display())))?;
    Ok(cgroup)
}

fn limit(cgroup: &Cgroup, context: &CreateContext<'_>) -> Result<(), IsolationError> {
    cgroup.create().map_err(IsolationError::failed)?;
    if let Some(resources) = host_resources(context) {
        cgroup.apply(&resources).map_err(IsolationError::failed)?;
    }
    Ok(())
}

/// What the host does when the process that stands for the container is in its place.
fn prepare_host(context: &CreateContext<'_>, pid: Pid) -> Result<(), engine::Error> {
    let (spec, bundle) = (context.bundle.spec(), context.bundle.dir());
    engine::prepare_host(context.id.as_str(), spec, bundle, pid)
}

/// What the VMM process will need, all of it checked as far as the host can.
fn orders(context: &CreateContext<'_>, is_sandbox: bool) -> Result<Orders, IsolationError> {
    let config = &context.config.microvm;
    let size = sizing::size(context.bundle, config, host_cpus()).map_err(IsolationError::failed)?;
    let guest_spec =
        guest_spec::rewrite(context.bundle, context.id, None).map_err(IsolationError::failed)?;
    let vm = context.bundle.vm();
    let (kernel, modules) = match vm.and_then(|vm| vm.kernel.as_ref()) {
        Some(kernel) => {
            let path = context.bundle.dir().join(&kernel.path);
            let usable = File::open(&path).map(drop);
            usable.map_err(|source| {
                IsolationError::failed(SetupError::Kernel {
                    path: path.clone(),
                    source,
                })
            })?;
            (path, None)
        }
        None => {
            let guest = guest(config)?;
            (guest.kernel(), guest.modules_cpio())
        }
    };
    let kernel_section = vm.and_then(|vm| vm.kernel.as_ref());
    Ok(Orders {
        id: context.id.as_str().to_owned(),
        vm_dir: context.dir.join(VM_DIR),
        cgroup: context.cgroup_path.to_owned(),
        network: guest_spec.network,
        boot: Boot {
            kernel,
            modules,
            initrd: kernel_section
                .and_then(|kernel| kernel.initrd.as_ref())
                .map(|path| context.bundle.dir().join(path)),
            agent: agent_binary(config.agent.as_deref())?,
            parameters: kernel_section
                .map(|kernel| kernel.parameters.clone())
                .unwrap_or_default(),
            vcpus: size.vcpus,
            memory: size.memory,
            limit: config.boot_limit(),
        },
        templates: config.templates.clone(),
        rootfs: context.bundle.rootfs().to_owned(),
        rootfs_read_only: is_read_only(context.bundle),
        is_sandbox,
        volumes: guest_spec.volumes,
        disks: guest_spec.disks,
        spec: guest_spec.spec,
        images: None,
        console_socket: context.console_socket.map(Path::to_owned),
    })
}

/// What a bundle boots that says nothing of its machine.
///
/// # Errors
/// There is no guest kernel, or no agent.
pub(crate) fn default_boot(config: &MicrovmConfig) -> Result<Boot, IsolationError> {
    let guest = guest(config)?;
    let size = sizing::configured(config, host_cpus());
    Ok(Boot {
        kernel: guest.kernel(),
        modules: guest.modules_cpio(),
        initrd: None,
        agent: agent_binary(config.agent.as_deref())?,
        parameters: Vec::new(),
        vcpus: size.vcpus,
        memory: size.memory,
        limit: config.boot_limit(),
    })
}

/// The guest that the configuration chooses.
fn guest(config: &MicrovmConfig) -> Result<Guest, IsolationError> {
    let store = Store::locate(None, Some(&config.guests));
    store
        .select(config.guest.as_deref())
        .map_err(IsolationError::failed)
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism()
        .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

/// Whether the host can refuse every write to the root. Where a mount point is missing the guest's engine has to make
/// it first, as it does for a container; the root is then read-only in the guest alone.
fn is_read_only(bundle: &Bundle) -> bool {
    let asked = bundle
        .spec()
        .root()
        .as_ref()
        .and_then(|root| root.readonly())
        .unwrap_or(false);
    if !asked {
        return false;
    }
    let Ok(root) = File::open(bundle.rootfs()) else {
        return false;
    };
    // The root's links are the image's: none may lead out of it.
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let is_there = |path: &Path| match openat2(root.as_raw_fd(), path, how) {
        Ok(fd) => {
            // SAFETY: the kernel has just given us this descriptor; it is closed at once.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            true
        }
        Err(_) => false,
    };
    // What lies below another mount is made on that.
    let mut mounted: Vec<&Path> = Vec::new();
    for mount in bundle.spec().mounts().iter().flatten() {
        let destination = mount.destination();
        if !mounted.iter().any(|above| destination.starts_with(above)) && !is_there(destination) {
            return false;
        }
        mounted.push(destination);
    }
    true
}

/// Parts of the `vm` section that ask for a machine which is not ours to make.
fn refuse_foreign_machines(vm: Option<&VmSection>) -> Result<(), IsolationError> {
    let Some(vm) = vm else { return Ok(()) };
    if vm.hypervisor.is_some() {
        return Err(unsupported(
            "honour `vm.hypervisor`",
            "the VMM is built in: remove the property",
        ));
    }
    if vm.image.is_some() {
        return Err(unsupported(
            "honour `vm.image`",
            "the container's root is shared with the guest: use `root.path`",
        ));
    }
    if vm
        .hw_config
        .as_ref()
        .is_some_and(|hardware| hardware.device_tree.is_some())
    {
        return Err(unsupported(
            "honour `vm.hwConfig.deviceTree`",
            "an x86-64 machine is described by ACPI: remove it",
        ));
    }
    Ok(())
}

/// The agent's binary: as configured, else beside this one.
pub(crate) fn agent_binary(configured: Option<&Path>) -> Result<PathBuf, IsolationError> {
    let beside = || engine::own_path().map(|own| own.with_file_name("rt-agent"));
    let path = configured
        .map_or_else(beside, |path| Ok(path.to_owned()))
        .map_err(io_error("find this binary"))?;
    match File::open(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(IsolationError::failed(SetupError::NoAgent { path, source })),
    }
}

/// The limits of the cgroup on the host, which holds the VMM and with it the guest's memory: the workload's, with the
/// machine's own need added. The workload's own limits hold inside.
fn host_resources(context: &CreateContext<'_>) -> Option<LinuxResources> {
    let linux = context.bundle.spec().linux().as_ref()?;
    let mut resources = linux.resources().clone()?;
    // Processes and devices of the workload are the guest's.
    resources
        .set_pids(None)
        .set_devices(None)
        .set_hugepage_limits(None);
    if let Some(memory) = resources.memory() {
        let memory = sizing::host_memory(memory, 0);
        resources.set_memory(Some(memory));
    }
    Some(resources)
}

/// Starts the VMM process and waits until the container in it is created. `prepare` gets the process's pid when it is
/// in the container's network namespace, and before it looks at what is there.
fn spawn_vmm(
    orders: &Orders,
    prepare: impl FnOnce(Pid) -> Result<(), engine::Error>,
) -> Result<Made, IsolationError> {
    let mut text = serde_json::to_vec(orders)
        .map_err(|error| io_error("encode the VMM's orders")(error.into()))?;
    text.push(b'\n');
    let (orders_read, orders_write) =
        pipe2(OFlag::O_CLOEXEC).map_err(|error| io_error("make a pipe")(error.into()))?;
    let (held, hold) =
        pipe2(OFlag::O_CLOEXEC).map_err(|error| io_error("make a pipe")(error.into()))?;
    let (mut report, reporter) =
        report::channel("the VMM process").map_err(io_error("make a pipe"))?;
    let report_write = reporter.into_fd();
    let mut command = Command::new("/proc/self/exe");
    command.arg0("rt").arg(vmm_process::ARGUMENT);
    command
        .arg("--orders-fd")
        .arg(orders_read.as_raw_fd().to_string());
    command
        .arg("--report-fd")
        .arg(report_write.as_raw_fd().to_string());
    command.arg("--hold-fd").arg(held.as_raw_fd().to_string());
    for fd in [&orders_read, &report_write, &held] {
        fcntl(fd.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::empty()))
            .map_err(|error| io_error("pass on a pipe")(error.into()))?;
    }
    let mut child = command
        .spawn()
        .map_err(io_error("execute the VMM process"))?;
    fault::point("microvm.vmm-executed");
    drop((orders_read, report_write, held));
    let pid = child.id().cast_signed();
    let made = (|| {
        let mut line = File::from(orders_write);
        // A child that dies early breaks the pipe; its report says why.
        let _ = line.write_all(&text);
        fault::point("microvm.orders-given");
        report.wait().map_err(IsolationError::failed)?;
        fault::point("microvm.network-entered");
        prepare(Pid::from_raw(pid)).map_err(IsolationError::failed)?;
        fault::point("microvm.network-prepared");
        let _ = line.write_all(b"\n");
        report.wait().map_err(IsolationError::failed)
    })();
    if let Err(error) = made {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok(Made {
        pid,
        hold: Hold::new(hold),
    })
}
