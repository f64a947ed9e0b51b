//! The VMM process: the container's init process as the host sees it.
//!
//! `rt` executes itself for it, so that it begins with nothing but what it is told over an inherited pipe: its standard
//! streams, its orders, and the end of a pipe for its report. It enters the container's cgroup and network namespace,
//! waits until its creator has had that prepared, takes over the interfaces in it, boots the machine, has the agent
//! create the container, and then stands for the container's init until that ends.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use engine::cgroup::Cgroup;
use engine::fault;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::unistd::{pipe2, setsid};
use oci_spec::runtime::{Process, Spec};
use protocol::message::{self, AdoptRequest, ContainerRequest, CreateContainerRequest, Outcome};
use protocol::method::{Adopt, CreateContainer, FinishSending, Resume};
use protocol::{ClientError, ROOTFS_TAG, RPC_PORT, VOLUMES_TAG, read_hello};
use serde::{Deserialize, Serialize};
use vmm::boot::Segment;
use vmm::devices::virtio::block::{Disk, DiskError};
use vmm::devices::virtio::fs::{Access, Cache, Share, Tag};
use vmm::devices::virtio::net::Interface;
use vmm::devices::virtio::vsock::{GuestCid, HostSocket, VsockHandle, VsockListener};
use vmm::memory::MemorySize;
use vmm::seccomp::{self, SeccompError, Thread};
use vmm::snapshot::Snapshot;
use vmm::{KernelConfig, Origin, RunningVm, SharedDirectory, Vm, VmConfig, VmExit, VsockConfig};

use super::agent::{Agent, AgentError, VSOCK};
use super::checkpoint::{self, Checkpoint, CheckpointError, Manifest};
use super::confinement;
use super::control::{self, Request};
use super::guest_spec::{self, Network, Volume};
use super::intruder::intruder;
use super::jail;
use super::memory;
use super::network::{self, NetworkError};
use super::relay::Relay;
use super::report::Reporter;
use super::shares::{self, Content, ShareError, Shares};
use super::supervise::{End, MachineEvents, Supervised, catch_signals, end_like};
use super::template::{self, TemplateError, Templates};
use super::terminal::HostTerminal;
use crate::guest::initramfs;

/// The guest's serial console, in the container's `vm` directory.
pub const CONSOLE_LOG: &str = "console.log";

/// Where the shares are built, in the container's `vm` directory.
pub const SHARES: &str = "shares";

/// The name of the host's terminal, in the container's `vm` directory, if the workload has one.
pub const TERMINAL: &str = "terminal";

/// What the boot took, in the container's `vm` directory.
const BOOT_NOTES: &str = "boot.json";

/// The most bytes of a guest's console that are kept on the host.
const CONSOLE_LIMIT: u64 = 1 << 20;

/// What the VMM process has to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    /// The container's id.
    pub id: String,
    /// The container's `vm` directory, which exists.
    pub vm_dir: PathBuf,
    /// The container's cgroup, which exists, as a path below the hierarchies.
    pub cgroup: PathBuf,
    /// Which network namespace to enter.
    pub network: Network,
    /// What the machine boots, unless there is a template of it.
    pub boot: Boot,
    /// The directory of templates.
    pub templates: PathBuf,
    /// The container's root on the host.
    pub rootfs: PathBuf,
    /// Whether the guest may not write to it.
    pub rootfs_read_only: bool,
    /// Whether other containers will come into the machine.
    pub is_sandbox: bool,
    /// What else the guest sees.
    pub volumes: Vec<Volume>,
    /// Its disks.
    pub disks: Vec<guest_spec::Disk>,
    /// The configuration for the guest's engine.
    pub spec: Spec,
    /// The images of a checkpoint to go on from, in place of the boot.
    pub images: Option<PathBuf>,
    /// Where the terminal's master goes.
    pub console_socket: Option<PathBuf>,
}

/// What a machine boots, and how large it is.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel, an ELF file.
    pub kernel: PathBuf,
    /// The archive of its modules.
    pub modules: Option<PathBuf>,
    /// A further archive that the bundle brings.
    pub initrd: Option<PathBuf>,
    /// The agent's binary.
    pub agent: PathBuf,
    /// Words for the kernel's command line.
    pub parameters: Vec<String>,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Bytes of guest memory.
    pub memory: u64,
    /// How long the guest may take from its first instruction to its agent's first word.
    pub limit: Duration,
}

impl Boot {
    /// The guest's memory.
    ///
    /// # Errors
    /// No machine has so little, or so much.
    pub fn memory_size(&self) -> Result<MemorySize, VmmError> {
        MemorySize::from_bytes(self.memory).map_err(|error| VmmError::Machine(error.into()))
    }

    /// The kernel with its initramfs.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn kernel_config(&self) -> Result<KernelConfig, VmmError> {
        let mut initramfs: Vec<Segment> = self.initrd.iter().cloned().map(Segment::File).collect();
        initramfs.extend(initramfs::segments(self.modules.as_deref(), &self.agent)?);
        Ok(KernelConfig {
            path: self.kernel.clone(),
            protocol: None,
            initramfs,
            parameters: self.parameters.join(" "),
            verbose_console: false,
        })
    }
}

/// The first argument of a program that is to be a VMM process.
pub(super) const ARGUMENT: &str = "vmm";

/// The command line of a VMM process, which only its creator writes. Told apart before any other is looked at: what
/// parses those would stay in the memory of each machine's process.
#[derive(Debug, clap::Parser)]
struct VmmArgs {
    /// Descriptor to read the orders from: a line, and another when the network namespace is prepared.
    #[arg(long)]
    orders_fd: RawFd,
    /// Descriptor to write the report to.
    #[arg(long)]
    report_fd: RawFd,
    /// Descriptor to read from that the creator lets go.
    #[arg(long)]
    hold_fd: RawFd,
}

/// Whether this is the command line of a VMM process. A program that makes microVMs is executed so, and must then be
/// [`main`].
pub fn is_vmm(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|first| first == ARGUMENT)
}

/// The VMM process, by its command line with the program's name first; returns the exit code.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    // It was executed as /proc/self/exe: ps(1) and top(1) would call it "exe".
    let _ = nix::sys::prctl::set_name(c"rt-vmm");
    match <VmmArgs as clap::Parser>::try_parse_from(arguments.into_iter().skip(1)) {
        Ok(args) => run(&args),
        Err(error) => {
            let _ = error.print();
            1
        }
    }
}

/// Why a microVM did not come up.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A call of the kernel.
    #[error("cannot {action}")]
    Io {
        /// What was to be done.
        action: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The container's cgroup.
    #[error(transparent)]
    Cgroup(#[from] engine::cgroup::Error),
    /// The guest's files.
    #[error(transparent)]
    Guest(#[from] crate::guest::Error),
    /// The shared trees.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A block device of the host cannot be a disk.
    #[error("cannot make {} a disk of the microVM", path.display())]
    Disk {
        /// Its node.
        path: PathBuf,
        /// Why not.
        #[source]
        source: DiskError,
    },
    /// The machine.
    #[error("cannot start the microVM")]
    Machine(#[source] vmm::Error),
    /// The host would lose its network.
    #[error(
        "config.json: `linux.namespaces`: {} is the host's own network namespace, whose interfaces a microVM would take \
         over: give it another, or use --isolation container",
        path.display()
    )]
    HostNetwork {
        /// The namespace.
        path: PathBuf,
    },
    /// The network namespace's interfaces.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The guest ended before its agent answered.
    #[error("the guest did not boot the kernel {}: {exit}{console}", kernel.display())]
    NotBooted {
        /// The kernel that was booted.
        kernel: PathBuf,
        /// How it ended.
        exit: String,
        /// The end of its console's log.
        console: String,
    },
    /// There is a template of the machine, and it cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The guest does not go on from its template.
    #[error(
        "the guest does not go on from its template, which `rt template list` shows and `rt template remove` takes away"
    )]
    NotResumed(#[source] Box<VmmError>),
    /// There is no checkpoint of the machine, or none to go on from.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The guest does not go on from its checkpoint.
    #[error("the guest does not go on from its checkpoint")]
    NotRestored(#[source] Box<VmmError>),
    /// The guest runs and its agent says nothing.
    #[error(
        "the guest's agent did not answer within {} s: is {} an rt guest kernel with virtio-mmio and vsock?{console}",
        limit.as_secs(),
        kernel.display()
    )]
    Silent {
        /// How long it was waited for.
        limit: Duration,
        /// The kernel that was booted.
        kernel: PathBuf,
        /// The end of its console's log.
        console: String,
    },
    /// This thread could not be confined.
    #[error(transparent)]
    Confine(#[from] SeccompError),
    /// The agent's first word makes no sense, or is of another version.
    #[error(transparent)]
    Hello(ClientError),
    /// The agent refused; its words stand for themselves, as the container model's do.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// Makes what the kernel said an error with what was to be done.
pub fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Io {
        action: action.into(),
        source,
    }
}

/// As [`io_error`].
pub fn errno(action: impl Into<String>) -> impl FnOnce(nix::Error) -> VmmError {
    move |source| VmmError::Io {
        action: action.into(),
        source: source.into(),
    }
}

/// The VMM process's life: boots, reports, and ends as the container's init ends. The result is its exit code.
fn run(args: &VmmArgs) -> u8 {
    // SAFETY: our parent made these descriptors for us and nobody else in this process knows them.
    let (orders, report, held) = unsafe {
        (
            OwnedFd::from_raw_fd(args.orders_fd),
            OwnedFd::from_raw_fd(args.report_fd),
            OwnedFd::from_raw_fd(args.hold_fd),
        )
    };
    let mut reporter = Reporter::from(report);
    let begun = reporter
        .close_all_but(&[held.as_raw_fd(), orders.as_raw_fd()])
        .map_err(io_error("close inherited descriptors"))
        .and_then(|()| {
            seccomp::report_violations().map_err(io_error("say what happens at a violation"))
        })
        .and_then(|()| begin(orders, &mut reporter));
    let (orders, machine) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            reporter.failed(&error);
            return 1;
        }
    };
    // From here on the hold is what binds us to the process that made us.
    let _ = nix::sys::prctl::set_pdeathsig(None);
    fault::point("vmm.on-its-own");
    if reporter.ready().is_err() {
        return 1;
    }
    fault::point("vmm.reported");
    if engine::wait_for_release(held.as_fd()).is_err() {
        return 1;
    }
    fault::point("vmm.released");
    engine::give_back_code();
    machine.until_its_end(&orders)
}

/// From the orders to a machine with the container in it.
fn begin(orders: OwnedFd, reporter: &mut Reporter) -> Result<(Orders, Machine), VmmError> {
    let mut lines = BufReader::new(File::from(orders));
    let orders: Orders = serde_json::from_str(&read_line(&mut lines)?)
        .map_err(|error| io_error("read the orders")(error.into()))?;
    fault::point("vmm.orders-read");
    let signals = take_place(&orders)?;
    reporter
        .arrived()
        .map_err(io_error("tell that the place is taken"))?;
    read_line(&mut lines)?;
    drop(lines);
    fault::point("vmm.prepared-for");
    let machine = Machine::boot(&orders, signals)?;
    Ok((orders, machine))
}

/// The creator's next line; an error if it has ended.
fn read_line(lines: &mut BufReader<File>) -> Result<String, VmmError> {
    let mut line = String::new();
    let length = lines.read_line(&mut line);
    match length.map_err(io_error("read the orders"))? {
        0 => Err(io_error("read the orders")(
            io::ErrorKind::UnexpectedEof.into(),
        )),
        _ => Ok(line),
    }
}

/// Goes where the container's init process would be: its cgroup, a session, its network namespace.
fn take_place(orders: &Orders) -> Result<SignalFd, VmmError> {
    // A creator that is killed takes us along.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(errno("ask for a signal at the parent's death"))?;
    fault::point("vmm.bound-to-creator");
    Cgroup::new(&orders.cgroup)?.enter()?;
    fault::point("vmm.in-cgroup");
    engine::reset_affinity();
    setsid().map_err(errno("start a session"))?;
    let signals = catch_signals().map_err(io_error("catch signals"))?;
    raise_descriptor_limit()?;
    enter_network(&orders.network)?;
    fault::point("vmm.in-network");
    Ok(signals)
}

/// How long who reads what the workload wrote may take before a machine that was written down ends.
const DELIVERY_LIMIT: Duration = Duration::from_secs(10);

/// What a machine's start is in place of a boot.
enum Beginning {
    Boot,
    Template(Snapshot),
    Checkpoint(Box<Checkpoint>),
}

impl Beginning {
    fn of(orders: &Orders, interfaces: usize) -> Result<Self, VmmError> {
        if let Some(images) = &orders.images {
            checkpoint::refuse(orders)?;
            return Ok(Self::Checkpoint(Box::new(Checkpoint::open(images)?)));
        }
        // A template has no disk.
        let template = match orders.disks.is_empty() {
            true => Templates::new(&orders.templates).find(&orders.boot, interfaces)?,
            false => None,
        };
        Ok(template.map_or(Self::Boot, Self::Template))
    }

    /// Whether there is a device for volumes.
    fn shares_volumes(&self, orders: &Orders) -> bool {
        match self {
            Self::Boot => uses_volumes(orders),
            // A template has all that any machine may need.
            Self::Template(_) => true,
            Self::Checkpoint(checkpoint) => checkpoint.manifest.shares_volumes,
        }
    }
}

/// A machine with a container in it that waits to be started, or runs again.
struct Machine {
    vm: RunningVm,
    agent: Agent,
    vsock: VsockHandle,
    control: UnixListener,
    manifest: Manifest,
    signals: SignalFd,
    terminal: Option<HostTerminal>,
    relay: Relay,
    has_network: bool,
}

impl Machine {
    fn boot(orders: &Orders, signals: SignalFd) -> Result<Self, VmmError> {
        let (interfaces, mut network) = network::attach()?;
        let has_network = network.is_some();
        fault::point("vmm.network-attached");
        let beginning = Beginning::of(orders, interfaces.len())?;
        let shares_volumes = beginning.shares_volumes(orders);
        let manifest = Manifest::of(orders, interfaces.len(), network.as_ref(), shares_volumes)?;
        if let Beginning::Checkpoint(checkpoint) = &beginning {
            checkpoint.manifest.check(&manifest)?;
        }
        let is_restored = matches!(beginning, Beginning::Checkpoint(_));
        let is_resumed = matches!(beginning, Beginning::Template(_));
        if is_resumed && let Some(network) = &mut network {
            template::name_devices(network);
        }
        if let Some(score) = orders
            .spec
            .process()
            .as_ref()
            .and_then(Process::oom_score_adj)
        {
            fs::write("/proc/self/oom_score_adj", score.to_string())
                .map_err(io_error("write oom_score_adj"))?;
        }
        let terminal = open_terminal(orders)?;
        let content = Content {
            id: &orders.id,
            rootfs: &orders.rootfs,
            read_only: orders.rootfs_read_only,
            volumes: &orders.volumes,
        };
        let root = orders.vm_dir.join(SHARES);
        shares::build(&root, &content)?;
        fault::point("vmm.shares-built");
        let notes = orders.vm_dir.join(BOOT_NOTES);
        let notes =
            File::create(&notes).map_err(io_error(format!("create {}", notes.display())))?;
        let control = HostSocket::bind(&orders.vm_dir, control::CONTROL)
            .map_err(|error| VmmError::Machine(error.into()))?
            .into_listener();
        // No path of the host means anything from here on.
        let vm =
            Vm::new(config(orders, interfaces, beginning, root)?).map_err(VmmError::Machine)?;
        fault::point("vmm.machine-made");
        let vsock = vsock_of(&vm)?;
        let hello = vsock
            .listen(RPC_PORT)
            .map_err(io_error("listen for the guest's agent"))?;
        let mut vm = vm.start().map_err(VmmError::Machine)?;
        fault::point("vmm.machine-runs");

        if is_resumed {
            resume(vsock.clone(), &mut vm, &orders.boot)
                .map_err(|source| VmmError::NotResumed(Box::new(source)))?;
        } else if is_restored {
            resume(vsock.clone(), &mut vm, &orders.boot)
                .map_err(|source| VmmError::NotRestored(Box::new(source)))?;
        } else {
            hear_agent(&hello, &mut vm, &orders.boot)?;
        }
        let (agent_at, exits_to_agent) = (Instant::now(), vm.exits());
        fault::point("vmm.agent-heard");

        let connect = |port| vsock.connect(port);
        let relay = Relay::start(connect, terminal.as_ref())
            .map_err(io_error("connect the standard streams"))?;
        // The relay's threads were the last to be started.
        seccomp::confine(Thread::Main, confinement())?;
        let to_agent = || connect(RPC_PORT).map_err(io_error("connect to the guest's agent"));
        let mut agent = Agent::over(to_agent()?).map_err(io_error("limit the agent's time"))?;
        let (id, stdio) = (orders.id.clone(), Some(relay.stdio()));
        if is_restored {
            let container = ContainerRequest { id: id.clone() };
            agent.call::<Adopt>(&AdoptRequest { id, stdio })?;
            agent.call::<Resume>(&container)?;
        } else {
            agent.call::<CreateContainer>(&CreateContainerRequest {
                id,
                spec_json: serde_json::to_string(&orders.spec)
                    .map_err(|error| io_error("encode the spec")(error.into()))?,
                stdio,
                shares: share_tags(orders),
                network,
                disks: named_disks(orders),
            })?;
        }
        fault::point("vmm.container-created");
        note_boot(notes, &vm, is_resumed, agent_at, exits_to_agent)
            .map_err(io_error("note the times of the boot"))?;
        Ok(Self {
            vm,
            agent,
            vsock: vsock.clone(),
            control,
            manifest,
            signals,
            terminal,
            relay,
            has_network,
        })
    }

    /// Does what somebody asks of the machine. Where it was written down and is to end, it stands still when this returns
    /// whom to tell that it has.
    fn serve(&mut self, orders: &Orders) -> Option<Reporter> {
        let received = match control::receive(&self.control) {
            Ok(received) => received,
            Err(error) => {
                tracing::warn!(%error, "a request to the VMM process");
                return None;
            }
        };
        let (vm, agent) = (&mut self.vm, &mut self.agent);
        let asker = received.asker;
        match received.request {
            Request::Checkpoint { leave_running } => checkpoint::serve(
                asker,
                leave_running,
                received.fds,
                orders,
                &self.manifest,
                vm,
                agent,
            ),
            Request::Memory => {
                memory::serve(asker, None, orders.is_sandbox, vm);
                None
            }
            Request::SetMemory(bytes) => {
                memory::serve(asker, Some(bytes), orders.is_sandbox, vm);
                None
            }
        }
    }

    fn until_its_end(mut self, orders: &Orders) -> u8 {
        let end = loop {
            let process = Supervised {
                id: &orders.id,
                exec_id: "",
                terminal: self.terminal.as_ref(),
            };
            let machine = MachineEvents {
                exit: exit_event(&self.vm),
                control: self.control.as_fd(),
            };
            let end = self.vsock.connect(RPC_PORT).and_then(|waiting| {
                process.until_its_end(&mut self.agent, waiting, &self.signals, Some(machine))
            });
            let end = end.unwrap_or(End::Machine);
            if end != End::Asked {
                break end;
            }
            if let Some(reporter) = self.serve(orders) {
                self.relay.finish_within(DELIVERY_LIMIT);
                // Who is gone does not want to know.
                let _ = reporter.ready();
                return end_like(Outcome::Signaled(libc::SIGKILL.unsigned_abs()));
            }
        };
        match end {
            End::Process(outcome) => {
                self.relay.finish();
                if self.has_network {
                    let id = orders.id.clone();
                    // A guest whose agent is broken has lost its connections.
                    let _ = self.agent.call::<FinishSending>(&ContainerRequest { id });
                }
                // Every write of the guest has reached the host's files: nothing is lost with the machine.
                end_like(outcome)
            }
            End::Machine | End::Asked => {
                let exit = self.vm.stop();
                let text = quote_console(&self.vm);
                // The workload's standard error is the one place that its user looks at.
                let _ = writeln!(
                    io::stderr(),
                    "rt: the microVM of {} failed: {exit}{text}",
                    orders.id
                );
                end_like(Outcome::Signaled(libc::SIGKILL.unsigned_abs()))
            }
        }
    }
}

/// Whether anything but the root is shared, or may come to be.
fn uses_volumes(orders: &Orders) -> bool {
    orders.is_sandbox || !orders.volumes.is_empty()
}

fn share_tags(orders: &Orders) -> Vec<String> {
    let mut tags = vec![ROOTFS_TAG.to_owned()];
    if uses_volumes(orders) {
        tags.push(VOLUMES_TAG.to_owned());
    }
    tags
}

/// The disks as the agent is to find them.
fn named_disks(orders: &Orders) -> Vec<message::Disk> {
    let name = |(index, disk): (usize, &guest_spec::Disk)| message::Disk {
        serial: guest_spec::serial(index),
        major: disk.major,
        minor: disk.minor,
        access: disk.access.clone(),
    };
    orders.disks.iter().enumerate().map(name).collect()
}

fn open_disks(orders: &Orders) -> Result<Vec<Disk>, VmmError> {
    let disk = |(index, disk): (usize, &guest_spec::Disk)| {
        let path = &disk.path;
        let (file, read_only) =
            open_disk(disk).map_err(io_error(format!("open {}", path.display())))?;
        let disk = Disk::new(file, read_only, &guest_spec::serial(index));
        disk.map_err(|source| VmmError::Disk {
            path: path.clone(),
            source,
        })
    };
    orders.disks.iter().enumerate().map(disk).collect()
}

/// Opens a disk's device; whether for reading only, as is a device that is protected.
fn open_disk(disk: &guest_spec::Disk) -> io::Result<(File, bool)> {
    if !disk.read_only {
        match File::options().read(true).write(true).open(&disk.path) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
                ) => {}
            opened => return opened.map(|file| (file, false)),
        }
    }
    File::open(&disk.path).map(|file| (file, true))
}

/// A file server wants many descriptors.
fn raise_descriptor_limit() -> Result<(), VmmError> {
    let action = "raise the limit of open files";
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(errno(action))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(errno(action))
}

fn enter_network(network: &Network) -> Result<(), VmmError> {
    match network {
        Network::New => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(errno("make a network namespace"))?
        }
        Network::Join(path) => {
            let action = format!("enter the network namespace {}", path.display());
            let file = File::open(path).map_err(io_error(action.clone()))?;
            if is_the_hosts(&file).map_err(io_error(action.clone()))? {
                return Err(VmmError::HostNetwork { path: path.clone() });
            }
            setns(file, CloneFlags::CLONE_NEWNET).map_err(errno(action))?;
        }
    }
    Ok(())
}

/// Whether a network namespace is that of this process's creator or of the host's process 1.
fn is_the_hosts(namespace: &File) -> io::Result<bool> {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let namespace = identity(namespace.metadata()?);
    for host in ["/proc/self/ns/net", "/proc/1/ns/net"] {
        if identity(fs::metadata(host)?) == namespace {
            return Ok(true);
        }
    }
    Ok(false)
}

fn open_terminal(orders: &Orders) -> Result<Option<HostTerminal>, VmmError> {
    let Some((socket, process)) = orders
        .console_socket
        .as_ref()
        .zip(orders.spec.process().as_ref())
    else {
        return Ok(None);
    };
    if !process.terminal().unwrap_or(false) {
        return Ok(None);
    }
    let action = || format!("send the terminal to {}", socket.display());
    let terminal = HostTerminal::open(process, socket).map_err(io_error(action()))?;
    note_terminal(&orders.vm_dir, &terminal).map_err(io_error("note the terminal's name"))?;
    Ok(Some(terminal))
}

/// Writes down where the container's terminal is, in its `vm` directory.
///
/// # Errors
/// The file system's.
pub fn note_terminal(vm_dir: &Path, terminal: &HostTerminal) -> io::Result<()> {
    let name = terminal.path().as_os_str().as_encoded_bytes();
    fs::write(vm_dir.join(TERMINAL), name)
}

/// The machine; `root` is where the shares are, which becomes this process's root.
fn config(
    orders: &Orders,
    interfaces: Vec<Interface>,
    beginning: Beginning,
    root: PathBuf,
) -> Result<VmConfig, VmmError> {
    let has_volumes = beginning.shares_volumes(orders);
    let origin = match beginning {
        Beginning::Boot => Origin::Kernel(orders.boot.kernel_config()?),
        Beginning::Template(snapshot) => Origin::Snapshot(snapshot),
        Beginning::Checkpoint(checkpoint) => Origin::Snapshot(checkpoint.snapshot),
    };
    let console = orders.vm_dir.join(CONSOLE_LOG);
    let console = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&console)
        .map_err(io_error(format!("create {}", console.display())))?;
    Ok(VmConfig {
        vcpus: orders.boot.vcpus,
        memory: orders.boot.memory_size()?,
        origin,
        console: Box::new(Bounded {
            file: console,
            left: CONSOLE_LIMIT,
        }),
        rng: true,
        balloon: true,
        hotplug: true,
        vsock: Some(VsockConfig {
            cid: GuestCid::DEFAULT,
            socket: Some((orders.vm_dir.clone(), VSOCK.to_owned())),
        }),
        shares: shared_directories(orders, &Shares::in_jail(), has_volumes)?,
        interfaces,
        disks: open_disks(orders)?,
        leave_host: Box::new(move || {
            jail::enter(&root).map_err(io::Error::other)?;
            fault::point("vmm.jailed");
            Ok(())
        }),
        seccomp: confinement(),
        intruder: intruder(),
    })
}

/// The devices that serve the trees. The root is the workload's alone and may be cached; volumes are the host's too.
fn shared_directories(
    orders: &Orders,
    shares: &Shares,
    has_volumes: bool,
) -> Result<Vec<SharedDirectory>, VmmError> {
    // Another container's root will be beside a sandbox's; what is read-only of them is mounted so.
    let access = if orders.rootfs_read_only && !orders.is_sandbox {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let root = shared_directory(ROOTFS_TAG, &shares.rootfs, Cache::Always, access)?;
    let mut all = vec![root];
    if has_volumes {
        let (volumes, access) = (&shares.volumes, Access::ReadWrite);
        all.push(shared_directory(VOLUMES_TAG, volumes, Cache::None, access)?);
    }
    Ok(all)
}

/// A directory as a device of the machine.
///
/// # Errors
/// The name is no tag.
pub fn shared_directory(
    name: &str,
    root: &Path,
    cache: Cache,
    access: Access,
) -> Result<SharedDirectory, VmmError> {
    let tag = Tag::new(name)
        .ok_or_else(|| io_error("name a share")(io::ErrorKind::InvalidInput.into()))?;
    Ok(SharedDirectory {
        tag,
        share: Share {
            root: root.to_owned(),
            cache,
            access,
        },
    })
}

/// A log that a guest cannot fill the host's disk with.
#[derive(Debug)]
struct Bounded {
    file: File,
    left: u64,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.file.write_all(&bytes[..length])?;
        self.left -= length as u64;
        // What is over the limit is dropped, which is no error of the serial port.
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn exit_event(vm: &RunningVm) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the machine's, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(vm.exit_event().as_raw_fd()) }
}

/// The machine's socket device.
///
/// # Errors
/// It has none.
pub fn vsock_of(vm: &Vm) -> Result<VsockHandle, VmmError> {
    vm.vsock()
        .ok_or_else(|| io_error("find the vsock device")(io::ErrorKind::NotFound.into()))
}

/// Waits for the first word of the agent of a machine that boots.
///
/// # Errors
/// There is none, or it makes no sense.
pub fn hear_agent(hello: &VsockListener, vm: &mut RunningVm, boot: &Boot) -> Result<(), VmmError> {
    wait_for(hello.as_fd(), vm, boot)?;
    let mut stream = hello.accept().map_err(io_error("hear the guest's agent"))?;
    stream
        .set_read_timeout(Some(boot.limit))
        .map_err(io_error("limit the agent's time"))?;
    read_hello(&mut stream).map(drop).map_err(VmmError::Hello)
}

/// Makes a machine that goes on from a template or a checkpoint one of its own.
fn resume(vsock: VsockHandle, vm: &mut RunningVm, boot: &Boot) -> Result<(), VmmError> {
    // In a thread, so that the machine's end is noticed too. Its end of the pipe goes with it.
    let (ended, end) = pipe2(OFlag::O_CLOEXEC).map_err(errno("make a pipe"))?;
    let renewal = thread::Builder::new()
        .spawn(move || {
            let _end = end;
            template::renew(&vsock).map(drop)
        })
        .map_err(io_error("start a thread"))?;
    wait_for(ended.as_fd(), vm, boot).and_then(|()| {
        let panicked = || {
            Err(io_error("call the guest's agent")(
                io::ErrorKind::Other.into(),
            ))
        };
        renewal.join().unwrap_or_else(|_| panicked())
    })
}

/// Waits for the agent's connection, the machine's end, or the end of patience.
fn wait_for(hello: BorrowedFd<'_>, vm: &mut RunningVm, boot: &Boot) -> Result<(), VmmError> {
    let timeout = PollTimeout::try_from(boot.limit).unwrap_or(PollTimeout::MAX);
    let (heard, ended) = loop {
        let mut fds = [
            PollFd::new(hello, PollFlags::POLLIN),
            PollFd::new(exit_event(vm), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(errno("wait for the guest")(error)),
            Ok(_) => break (fds[0].any().unwrap_or(false), fds[1].any().unwrap_or(false)),
        }
    };
    if heard {
        return Ok(());
    }
    let exit = vm.stop();
    let console = quote_console(vm);
    if ended {
        let exit = match exit {
            VmExit::Reset if console.contains("panic") => "its kernel panicked".to_owned(),
            exit => exit.to_string(),
        };
        return Err(VmmError::NotBooted {
            kernel: boot.kernel.clone(),
            exit,
            console,
        });
    }
    Err(VmmError::Silent {
        limit: boot.limit,
        kernel: boot.kernel.clone(),
        console,
    })
}

/// Writes down what the boot took, for `rt bench`: milliseconds since the VMM began, and exits of the guest.
fn note_boot(
    mut notes: File,
    vm: &RunningVm,
    from_template: bool,
    agent_at: Instant,
    exits_to_agent: Option<u64>,
) -> io::Result<()> {
    let timeline = vm.timeline();
    let millis = |at: Instant| at.duration_since(timeline.begun).as_secs_f64() * 1e3;
    let boot = serde_json::json!({
        "from_template": from_template,
        "loaded_ms": timeline.entered.map(millis),
        "agent_ms": millis(agent_at),
        "created_ms": millis(Instant::now()),
        "exits_to_agent": exits_to_agent,
        "exits_to_created": vm.exits(),
    });
    notes.write_all(boot.to_string().as_bytes())
}

/// The last lines of the guest's console, to stand at the end of a sentence.
fn quote_console(vm: &RunningVm) -> String {
    let lines = vm.console().lines();
    if lines.is_empty() {
        return String::from("; its console is silent");
    }
    let quoted: Vec<String> = lines
        .iter()
        .map(|line| format!("\n  guest: {line}"))
        .collect();
    format!("; its console ends with{}", quoted.concat())
}
