//! A machine: built from its configuration, started, waited for, stopped.
//!
//! [`Vm`] is a machine whose kernel is in memory and of which no instruction has run;
//! [`RunningVm`] has a thread for each vCPU. Dropping either takes the machine away.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use kvm_bindings::CpuId;
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use vm_memory::GuestMemoryRegion;
use vm_superio::serial::SerialState;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::Killable;

use crate::acpi::{self, AcpiError};
use crate::boot::{self, Boot, BootError, Entry};
use crate::config::{KernelConfig, Origin, SharedDirectory, VmConfig, VsockConfig};
use crate::cpuid;
use crate::devices::bus::{Bus, BusDevice, BusError};
use crate::devices::io_apic::{self, IoApic};
use crate::devices::power::{self, KeyboardReset, PowerRegisters};
use crate::devices::serial::{ConsoleTail, SerialPort};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockError};
use crate::devices::virtio::fs::{Fs, FsError};
use crate::devices::virtio::mem::{self, Arrived, Mem, MemHandle, PluggedMemory};
use crate::devices::virtio::net::{Net, NetError};
use crate::devices::virtio::vsock::{HostSocket, HostSocketError, Vsock, VsockError, VsockHandle};
use crate::devices::virtio::{
    DeviceType, MmioTransport, PauseError, ThreadHook, ThreadKind, VirtioDevice, mmio, rng::Rng,
};
use crate::exit::{ExitLatch, VmExit};
use crate::kvm::{self, Hypervisor, KvmError};
use crate::layout;
use crate::memory::{Memory, MemoryError};
use crate::seccomp::{self, Policy, SeccompError, Thread};
use crate::snapshot::{MachineState, SnapshotError, SnapshotFiles};
use crate::stats::VcpuStats;
use crate::vcpu::{self, Order, Shared, Vcpu};

/// A vCPU thread runs the register side of the devices, which is shallow.
const VCPU_STACK: usize = 256 << 10;

/// Guests before Linux 6.11 use one; more only cost threads there.
const FS_REQUEST_QUEUES: u32 = 1;

/// Why a machine cannot be built or started.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The guest's memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine cannot be described to the guest.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The socket device's file on the host cannot be made.
    #[error(transparent)]
    HostSocket(#[from] HostSocketError),
    /// The socket device cannot be had.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A directory cannot be shared.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// A network device cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A disk cannot be had.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// Two devices claim an address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// No vCPUs, or more than APIC ids reach.
    #[error("{count} vCPUs: give between 1 and {}", Vm::MAX_VCPUS)]
    VcpuCount {
        /// The number asked for.
        count: u8,
    },
    /// A snapshot does not make this machine.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A vCPU thread cannot be confined.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// More devices than interrupt lines.
    #[error(
        "too many virtio devices: there are interrupt lines for {}",
        layout::VIRTIO_MMIO_MAX
    )]
    TooManyDevices,
    /// Nothing in the guest can take memory while it runs.
    #[error(
        "the guest's kernel has no driver for memory that comes while it runs (virtio_mem, CONFIG_VIRTIO_MEM): choose one \
         that has it, or give the machine the memory when it is made"
    )]
    NoMemoryDriver,
    /// There are no addresses for as much memory.
    #[error("{asked} bytes of guest memory: this machine can have {most}")]
    TooMuchMemory {
        /// Bytes asked for, with those that it began with.
        asked: u64,
        /// The most.
        most: u64,
    },
    /// The host gave no descriptor, signal or thread.
    #[error("{action} for the virtual machine")]
    Host {
        /// What was to be done.
        action: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }
}

/// When the steps of a machine's start were done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeline {
    /// [`Vm::new`] was called.
    pub begun: Instant,
    /// The kernel, the initramfs and the tables were in memory.
    pub loaded: Instant,
    /// Every thread was there and the boot processor entered the guest.
    pub entered: Option<Instant>,
}

/// A machine that is ready to run.
#[derive(Debug)]
pub struct Vm {
    parts: Parts,
    /// Each with what the guest is told of it.
    vcpus: Vec<(VcpuFd, CpuId)>,
    /// The model-specific registers that KVM knows.
    msrs: Arc<[u32]>,
    confinement: Confinement,
}

/// What a machine goes on from, when its memory is as it should be.
enum Beginning {
    /// The boot processor's first instruction.
    Entry(Entry),
    /// All that another machine was.
    State(MachineState),
}

/// What becomes of each thread before it serves the guest.
#[derive(Debug, Clone, Copy)]
struct Confinement {
    policy: Policy,
    intruder: Option<fn(Thread)>,
}

impl Confinement {
    fn apply(self, thread: Thread) -> Result<(), SeccompError> {
        seccomp::confine(thread, self.policy)?;
        if let Some(intrude) = self.intruder {
            intrude(thread);
        }
        Ok(())
    }
}

/// What a machine owns beside its vCPUs, in the order in which it is taken down.
#[derive(Debug)]
struct Parts {
    shared: Arc<Shared>,
    devices: Devices,
    serial: Arc<Mutex<SerialPort>>,
    console: ConsoleTail,
    stats: Vec<VcpuStats>,
    begun: Instant,
    loaded: Instant,
    vsock: Option<VsockHandle>,
    /// Where more memory comes from.
    hotplug: Option<MemHandle>,
    /// The irqfds and ioeventfds belong to it.
    vm: Arc<VmFd>,
    memory: Memory,
}

impl Vm {
    /// The most vCPUs: eight bits of APIC id, less the broadcast id.
    pub const MAX_VCPUS: u8 = 254;

    /// Builds the machine and loads its kernel, or makes it what its snapshot says.
    ///
    /// # Errors
    /// KVM, memory or a file cannot be had, or the configuration is not possible.
    pub fn new(config: VmConfig) -> Result<Self, Error> {
        let begun = Instant::now();
        if !(1..=Self::MAX_VCPUS).contains(&config.vcpus) {
            let count = config.vcpus;
            return Err(Error::VcpuCount { count });
        }
        let hypervisor = Hypervisor::open()?;
        hypervisor.check_vcpus(config.vcpus)?;
        let mut memory = match &config.origin {
            Origin::Kernel(_) => Memory::new(config.memory)?,
            Origin::Snapshot(snapshot) => {
                snapshot.check(config.vcpus, config.memory)?;
                Memory::of_file(config.memory, &snapshot.memory)?
            }
        };
        if config.hotplug {
            memory.add_room()?;
        }
        let vm = hypervisor.create_vm()?;
        kvm::register_memory(&vm, &memory)?;
        let vm = Arc::new(vm);
        let devices = usize::from(config.rng)
            + usize::from(config.balloon)
            + usize::from(memory.room().is_some())
            + usize::from(config.vsock.is_some())
            + config.shares.len()
            + config.interfaces.len()
            + config.disks.len();
        let devices = u32::try_from(devices)
            .ok()
            .filter(|&n| n <= layout::VIRTIO_MMIO_MAX)
            .ok_or(Error::TooManyDevices)?;
        // At most 37.
        let pins = (layout::VIRTIO_GSI_BASE + devices) as u8;
        kvm::create_interrupt_controllers(&vm, pins)?;

        let confinement = Confinement {
            policy: config.seccomp,
            intruder: config.intruder,
        };
        let hook = ThreadHook::new(move |kind| {
            let thread = match kind {
                ThreadKind::Block => Thread::Block,
                ThreadKind::Fs => Thread::Fs,
                ThreadKind::Net => Thread::Net,
                ThreadKind::Vsock => Thread::Vsock,
            };
            Ok(confinement.apply(thread)?)
        });
        let mut board = Board::new(&vm, pins)?;
        let beginning = match config.origin {
            Origin::Kernel(kernel) => {
                Beginning::Entry(load(&kernel, &memory, config.vcpus, devices)?)
            }
            Origin::Snapshot(snapshot) => Beginning::State(snapshot.state),
        };
        let loaded = Instant::now();
        let socket = config
            .vsock
            .as_ref()
            .and_then(|vsock| vsock.socket.as_ref())
            .map(|(directory, name)| HostSocket::bind(directory, name))
            .transpose()?;
        (config.leave_host)().map_err(Error::host("leaving the host's files"))?;

        let console = ConsoleTail::default();
        let registers = match &beginning {
            Beginning::Entry(_) => SerialState::default(),
            Beginning::State(state) => state.serial.clone(),
        };
        let serial = board.add_serial(config.console, console.clone(), &registers)?;
        if config.rng {
            board.add_virtio("virtio-rng", &memory, Box::new(Rng::new()))?;
        }
        if config.balloon {
            board.add_virtio("virtio-balloon", &memory, Box::new(Balloon::new()))?;
        }
        let mut hotplug = None;
        if let Some(room) = memory.room() {
            let device = Mem::new(Arc::clone(room));
            hotplug = Some(device.handle());
            board.add_virtio("virtio-mem", &memory, Box::new(device))?;
        }

        let mut vsock = None;
        if let Some(VsockConfig { cid, .. }) = config.vsock {
            let device = Vsock::new(cid, socket, &hook)?;
            vsock = Some(device.handle());
            board.add_virtio("virtio-vsock", &memory, Box::new(device))?;
        }
        for SharedDirectory { tag, share } in config.shares {
            let device = Fs::new(tag, share, FS_REQUEST_QUEUES, &hook)?;
            board.add_virtio("virtio-fs", &memory, Box::new(device))?;
        }
        for interface in config.interfaces {
            let device = Net::new(interface, &hook)?;
            board.add_virtio("virtio-net", &memory, Box::new(device))?;
        }
        for disk in config.disks {
            let device = Block::new(disk, &hook)?;
            board.add_virtio("virtio-blk", &memory, Box::new(device))?;
        }

        let (shared, devices) = board.finish()?;
        if let Beginning::State(state) = &beginning {
            kvm::set_clock(&vm, state.clock)?;
        }
        let vcpus = create_vcpus(&hypervisor, &vm, config.vcpus)?;
        for (index, (vcpu, cpuid)) in vcpus.iter().enumerate() {
            match &beginning {
                Beginning::Entry(entry) => {
                    vcpu::set_up(vcpu)?;
                    if index == 0 {
                        vcpu::set_entry(vcpu, *entry)?;
                    }
                }
                Beginning::State(state) => {
                    if let Some(state) = state.vcpus.get(index) {
                        state.restore(vcpu, cpuid)?;
                    }
                }
            }
        }
        if let Beginning::State(state) = &beginning {
            // After the vCPUs: a device that goes on at once has interrupts for their local APICs.
            devices.restore(state)?;
        }
        let stats = vcpus.iter().filter_map(|(vcpu, _)| VcpuStats::open(vcpu));
        let stats = stats.collect();
        let parts = Parts {
            shared,
            devices,
            serial,
            console,
            stats,
            begun,
            loaded,
            vsock,
            hotplug,
            vm,
            memory,
        };
        Ok(Self {
            parts,
            vcpus,
            msrs: hypervisor.msrs()?.into(),
            confinement,
        })
    }

    /// The way to the guest's sockets, if the machine has a socket device.
    pub fn vsock(&self) -> Option<VsockHandle> {
        self.parts.vsock.clone()
    }

    /// Starts and confines a thread for each vCPU, then lets the guest run.
    ///
    /// # Errors
    /// The host gives no thread, or one cannot be confined; then none is left.
    pub fn start(self) -> Result<RunningVm, Error> {
        vcpu::install_kick_handler().map_err(Error::host("installing a signal handler"))?;
        let mut running = RunningVm {
            parts: self.parts,
            threads: Vec::new(),
        };
        for (index, (fd, cpuid)) in self.vcpus.into_iter().enumerate() {
            let vcpu = Vcpu {
                fd,
                cpuid,
                msrs: Arc::clone(&self.msrs),
                shared: Arc::clone(&running.parts.shared),
            };
            let thread = VcpuThread::spawn(index, vcpu, self.confinement)?;
            running.threads.push(thread);
        }
        running.enter();
        Ok(running)
    }
}

/// The thread of a vCPU.
#[derive(Debug)]
struct VcpuThread {
    orders: SyncSender<Order>,
    thread: JoinHandle<()>,
}

impl VcpuThread {
    /// Starts the thread. It is confined when this returns, and waits for orders.
    fn spawn(index: usize, mut vcpu: Vcpu, confinement: Confinement) -> Result<Self, Error> {
        let (report, confined) = mpsc::sync_channel(1);
        let (orders, given) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(VCPU_STACK)
            .spawn(move || {
                let result = confinement.apply(Thread::Vcpu);
                let ready = result.is_ok();
                if report.send(result).is_ok() && ready {
                    vcpu.obey(&given);
                }
            })
            .map_err(Error::host("starting a vCPU thread"))?;
        match confined.recv() {
            Ok(result) => result?,
            Err(_) => {
                let source = io::Error::other("the thread panicked");
                return Err(Error::host("starting a vCPU thread")(source));
            }
        }
        Ok(Self { orders, thread })
    }

    /// Takes the vCPU out of the guest.
    fn kick(&self) {
        // A thread that has ended cannot be signalled.
        let _ = self.thread.kill(vcpu::kick_signal());
    }

    /// Gives an order that is answered, and takes the answer.
    fn ask<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order) -> Result<T, SnapshotError> {
        let (reply, answer) = mpsc::sync_channel(1);
        let given = self.orders.send(order(reply));
        given.map_err(|_| SnapshotError::VcpuEnded)?;
        answer.recv().map_err(|_| SnapshotError::VcpuEnded)
    }

    fn join(self) {
        drop(self.orders);
        if self.thread.join().is_err() {
            tracing::error!("a vCPU thread panicked");
        }
    }
}

/// Makes the vCPUs, each with what it is told of its processor.
fn create_vcpus(
    hypervisor: &Hypervisor,
    vm: &VmFd,
    count: u8,
) -> Result<Vec<(VcpuFd, CpuId)>, Error> {
    let mut vcpus = Vec::with_capacity(count.into());
    for (index, cpuid) in (0..).zip(cpuids(hypervisor, count)?) {
        let fd = kvm::create_vcpu(vm, index)?;
        fd.set_cpuid2(&cpuid)
            .map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
        vcpus.push((fd, cpuid));
    }
    Ok(vcpus)
}

/// What each of that many vCPUs is told of its processor.
fn cpuids(hypervisor: &Hypervisor, count: u8) -> Result<Vec<CpuId>, KvmError> {
    let supported = hypervisor.supported_cpuid()?;
    let tsc_deadline = hypervisor.has_tsc_deadline();
    let of = |index| cpuid::for_vcpu(&supported, index, count, tsc_deadline);
    Ok((0..count).map(of).collect())
}

/// Brings the kernel, what it is told of the machine, and the boot processor's tables into memory.
fn load(kernel: &KernelConfig, memory: &Memory, vcpus: u8, devices: u32) -> Result<Entry, Error> {
    let devices: Vec<_> = (0..devices).map(mmio_device).collect();
    let rsdp = acpi::write_tables(
        memory.ram(),
        &acpi::Machine {
            vcpus,
            serial: kernel.verbose_console,
            devices: &devices,
        },
    )?;
    let boot = Boot {
        kernel: &kernel.path,
        protocol: kernel.protocol,
        initramfs: &kernel.initramfs,
        command_line: &kernel.command_line(),
        rsdp,
    };
    let entry = boot::load(memory, &boot)?;
    vcpu::write_descriptors(memory.ram(), entry.protocol).map_err(BootError::Memory)?;
    Ok(entry)
}

/// The devices that have something to be written down.
#[derive(Debug)]
struct Devices {
    io_apic: Arc<Mutex<IoApic<Arc<VmFd>>>>,
    /// By their windows' addresses.
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Devices {
    /// Makes fresh devices what others were.
    fn restore(&self, state: &MachineState) -> Result<(), SnapshotError> {
        lock(&self.io_apic)
            .restore(&state.io_apic)
            .map_err(SnapshotError::Interrupts)?;
        let mut alike = self.virtio.len() == state.devices.len();
        for (device, state) in self.virtio.iter().zip(&state.devices) {
            alike = alike && lock(device).restore(state)?;
        }
        if alike {
            Ok(())
        } else {
            let what = "its virtio devices differ".to_owned();
            Err(SnapshotError::OtherMachine { what })
        }
    }

    /// Has the virtio devices stand still; what they are. With an error some may.
    fn pause(&self) -> Result<Vec<mmio::State>, PauseError> {
        let paused = self.virtio.iter().map(|device| lock(device).pause());
        paused.collect()
    }

    /// Lets the socket devices go on that stand still.
    fn resume_sockets(&self) {
        for device in &self.virtio {
            let mut device = lock(device);
            if device.device_type() == DeviceType::Socket {
                device.resume();
            }
        }
    }

    /// Lets the virtio devices go on that stand still.
    fn resume(&self) {
        for device in &self.virtio {
            lock(device).resume();
        }
    }
}

fn lock<D>(device: &Mutex<D>) -> MutexGuard<'_, D> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The machine's devices while they are put together.
struct Board<'a> {
    vm: &'a VmFd,
    io_apic: IoApic<Arc<VmFd>>,
    ports: Bus,
    mmio: Bus,
    latch: Arc<ExitLatch>,
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
}

/// Where the driver finds the virtio device with this index.
fn mmio_device(index: u32) -> acpi::MmioDevice {
    acpi::MmioDevice {
        // Every window lies in the 32-bit device gap.
        base: (layout::VIRTIO_MMIO_BASE + u64::from(index) * layout::VIRTIO_MMIO_SIZE) as u32,
        gsi: layout::VIRTIO_GSI_BASE + index,
    }
}

impl<'a> Board<'a> {
    /// A board with the power registers and that many interrupt lines.
    fn new(vm: &'a Arc<VmFd>, pins: u8) -> Result<Self, Error> {
        let latch = ExitLatch::new().map_err(Error::host("making an event"))?;
        let latch = Arc::new(latch);
        let mut ports = Bus::new();
        let registers = PowerRegisters::new(Arc::clone(&latch));
        let base = layout::POWER_PORT.into();
        ports.insert("power", base, power::PORTS.into(), share(registers))?;
        let keyboard = KeyboardReset::new(Arc::clone(&latch));
        let base = layout::I8042_COMMAND_PORT.into();
        ports.insert("i8042", base, 1, share(keyboard))?;
        Ok(Self {
            vm,
            io_apic: IoApic::new(pins, Arc::clone(vm)),
            ports,
            mmio: Bus::new(),
            latch,
            virtio: Vec::new(),
        })
    }

    fn add_serial(
        &mut self,
        sink: Box<dyn io::Write + Send>,
        tail: ConsoleTail,
        registers: &SerialState,
    ) -> Result<Arc<Mutex<SerialPort>>, Error> {
        let interrupt = self.interrupt(layout::SERIAL_GSI)?;
        let serial = SerialPort::new(interrupt, sink, tail, registers);
        let serial = share(serial.map_err(Error::host("making the serial port"))?);
        let base = layout::SERIAL_PORT.into();
        let device = Arc::clone(&serial);
        self.ports
            .insert("serial", base, SerialPort::PORTS, device)?;
        Ok(serial)
    }

    /// Puts a virtio device at the next free window. A queue's notification goes by ioeventfd
    /// straight to who serves the queue; the vCPU does not leave the kernel for it.
    fn add_virtio(
        &mut self,
        name: &'static str,
        memory: &Memory,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), Error> {
        // There is a pin for each.
        let acpi::MmioDevice { base, gsi } = mmio_device(self.virtio.len() as u32);
        let base = u64::from(base);
        let ram = Arc::clone(memory.ram());
        let transport = MmioTransport::new(ram, device, self.interrupt(gsi)?);
        let notify = IoEventAddress::Mmio(base + MmioTransport::QUEUE_NOTIFY);
        for (queue, event) in (0u32..).zip(transport.queue_notify_eventfds()) {
            self.vm
                .register_ioevent(event, &notify, queue)
                .map_err(KvmError::ioctl("KVM_IOEVENTFD"))?;
        }
        let transport = share(transport);
        self.virtio.push(Arc::clone(&transport));
        let size = layout::VIRTIO_MMIO_SIZE;
        Ok(self.mmio.insert(name, base, size, transport)?)
    }

    /// An event that raises the interrupt line `gsi`.
    fn interrupt(&mut self, gsi: u32) -> Result<EventFd, Error> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(Error::host("making an interrupt event"))?;
        let line = event
            .try_clone()
            .map_err(Error::host("making an interrupt event"))?;
        if !self.io_apic.attach(gsi, line) {
            return Err(Error::TooManyDevices);
        }
        Ok(event)
    }

    fn finish(mut self) -> Result<(Arc<Shared>, Devices), Error> {
        let base = layout::IO_APIC.into();
        let io_apic = share(self.io_apic);
        let device = Arc::clone(&io_apic);
        self.mmio.insert("io-apic", base, io_apic::SIZE, device)?;
        let devices = Devices {
            io_apic,
            virtio: self.virtio,
        };
        let shared = Arc::new(Shared {
            ports: self.ports,
            mmio: self.mmio,
            latch: self.latch,
            stop: AtomicBool::new(false),
            first_entry: OnceLock::new(),
            user_exits: AtomicU64::new(0),
        });
        Ok((shared, devices))
    }
}

fn share<D: BusDevice>(device: D) -> Arc<Mutex<D>> {
    Arc::new(Mutex::new(device))
}

/// A machine that runs, or has run. Dropping it stops it.
#[derive(Debug)]
pub struct RunningVm {
    parts: Parts,
    /// By the vCPUs' indices.
    threads: Vec<VcpuThread>,
}

impl RunningVm {
    /// Becomes readable when the machine has ended, and stays so: for an event loop, which then
    /// calls [`RunningVm::wait`].
    pub fn exit_event(&self) -> &EventFd {
        self.parts.shared.latch.event()
    }

    /// Waits until the machine has ended and its threads are gone; says why it ended.
    ///
    /// # Errors
    /// The wait itself fails; the machine may still run.
    pub fn wait(&mut self) -> Result<VmExit, Error> {
        let event = self.exit_event();
        // SAFETY: the descriptor is the latch's, which outlives this borrow.
        let fd =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) };
        loop {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Error::host("waiting")(errno.into())),
            }
        }
        Ok(self.join())
    }

    /// Ends the machine if it still runs, waits for its threads, and says why it ended.
    pub fn stop(&mut self) -> VmExit {
        self.parts.shared.latch.set(VmExit::Stopped);
        self.join()
    }

    /// Ends the vCPU threads of a machine that has ended.
    fn join(&mut self) -> VmExit {
        self.halt();
        for thread in self.threads.drain(..) {
            thread.join();
        }
        lock(&self.parts.serial).drain();
        let exit = self.parts.shared.latch.get().cloned();
        exit.unwrap_or(VmExit::Stopped)
    }

    /// Takes the vCPUs out of the guest. Their threads then wait for orders.
    fn halt(&self) {
        self.parts.shared.stop.store(true, Ordering::Release);
        for thread in &self.threads {
            thread.kick();
        }
    }

    /// Lets the vCPUs, whose threads wait for orders, run the guest.
    fn enter(&self) {
        self.parts.shared.stop.store(false, Ordering::Release);
        for thread in &self.threads {
            // One that has ended shows when the machine does not go on.
            let _ = thread.orders.send(Order::Run);
        }
    }

    /// Has the machine stand still, with all of its devices.
    ///
    /// # Errors
    /// It has ended before, or a device or KVM does not tell its state; the machine goes on then.
    pub fn pause(&mut self) -> Result<PausedVm<'_>, SnapshotError> {
        self.halt();
        match self.stand_still() {
            Ok(state) => Ok(PausedVm { vm: self, state }),
            Err(error) => {
                self.go_on();
                Err(error)
            }
        }
    }

    fn go_on(&self) {
        self.parts.devices.resume();
        self.enter();
    }

    fn stand_still(&self) -> Result<MachineState, SnapshotError> {
        let Parts {
            shared,
            devices,
            serial,
            vm,
            memory,
            ..
        } = &self.parts;
        for thread in &self.threads {
            thread.ask(Order::Settle)?;
        }
        if let Some(exit) = shared.latch.get() {
            return Err(SnapshotError::Ended(exit.clone()));
        }
        // Before the vCPUs are read: a device's last interrupt is in a local APIC.
        let virtio = devices.pause()?;
        let mut vcpus = Vec::with_capacity(self.threads.len());
        for thread in &self.threads {
            vcpus.push(thread.ask(Order::Save)??);
        }
        Ok(MachineState {
            memory: memory.size().bytes(),
            clock: kvm::clock(vm)?,
            io_apic: lock(&devices.io_apic).state(),
            serial: lock(serial).registers(),
            devices: virtio,
            vcpus,
        })
    }

    /// How much memory the machine began with, in bytes, and what came since.
    pub fn memory(&self) -> (u64, PluggedMemory) {
        let Parts {
            memory, hotplug, ..
        } = &self.parts;
        let none = PluggedMemory {
            plugged: 0,
            requested: 0,
            has_driver: false,
        };
        let came = hotplug.as_ref().map_or(none, MemHandle::memory);
        (memory.size().bytes(), came)
    }

    /// Asks the guest to have `bytes` of memory, with those that it began with and cannot give back. `arrived` is called
    /// when it is so, unless something else is asked for before.
    ///
    /// # Errors
    /// The guest has no driver for it, or the host or KVM does not take it. Nothing has changed then.
    pub fn request_memory(&mut self, bytes: u64, arrived: Arrived) -> Result<(), Error> {
        let Parts {
            memory,
            hotplug,
            vm,
            ..
        } = &mut self.parts;
        let more = bytes.saturating_sub(memory.size().bytes());
        let hotplug = hotplug.as_ref().filter(|hotplug| {
            // What is unplugged already needs nobody to do so.
            hotplug.memory().has_driver || more == 0
        });
        let (Some(hotplug), Some(room)) = (hotplug, memory.room()) else {
            return Err(Error::NoMemoryDriver);
        };
        if more > room.len() {
            return Err(Error::TooMuchMemory {
                asked: bytes,
                most: memory.size().bytes() + room.len(),
            });
        }
        let more = more.next_multiple_of(mem::BLOCK);
        memory.open_room(more, |number, slot| {
            Ok::<_, Error>(kvm::register_slot(vm, number, slot)?)
        })?;
        hotplug.request(more, arrived);
        Ok(())
    }

    /// The last lines of the guest's console.
    pub fn console(&self) -> &ConsoleTail {
        &self.parts.console
    }

    /// When the steps of the start were done.
    pub fn timeline(&self) -> Timeline {
        Timeline {
            begun: self.parts.begun,
            loaded: self.parts.loaded,
            entered: self.parts.shared.first_entry.get().copied(),
        }
    }

    /// How often all vCPUs together have left the guest, as KVM counts; `None` where the host's
    /// kernel (before 5.14) does not tell.
    pub fn exits(&self) -> Option<u64> {
        if self.parts.stats.is_empty() {
            return None;
        }
        let mut exits = self.parts.stats.iter().map(|s| s.exits().ok());
        exits.try_fold(0, |sum, exits| Some(sum + exits?))
    }

    /// How often the vCPUs came to user space, for a port, a register or a signal.
    pub fn user_exits(&self) -> u64 {
        self.parts.shared.user_exits.load(Ordering::Relaxed)
    }
}

/// A machine that stands still. Where it is dropped the machine does so for good, and is only to be stopped.
#[derive(Debug)]
pub struct PausedVm<'a> {
    vm: &'a mut RunningVm,
    state: MachineState,
}

impl PausedVm<'_> {
    /// Writes the machine down, for others to go on from as [`Origin::Snapshot`]. What its devices have of the host's does
    /// not go along: connections are cut.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn write(&self, files: &SnapshotFiles) -> Result<(), SnapshotError> {
        files.write(&self.state, &self.vm.parts.memory)
    }

    /// Lets the machine go on.
    pub fn resume(self) {
        self.vm.go_on();
    }

    /// Lets it stand still for good. What the guest has sent by its sockets still reaches the host, and then their end.
    pub fn end(self) {
        let Parts { devices, vsock, .. } = &self.vm.parts;
        if let Some(vsock) = vsock {
            // No other: a request that is served now would be served again for who goes on.
            devices.resume_sockets();
            vsock.finish();
        }
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
