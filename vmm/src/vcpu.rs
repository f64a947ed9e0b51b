//! Virtual processors: their first state, and the thread that runs each.
//!
//! What comes out of KVM_RUN is the guest's doing: ports, addresses and data are handed to the
//! buses, which check them. A vCPU is never polled: it leaves the guest for a device, for the end
//! of the machine, or for a signal that asks it to stop.

use std::cell::Cell;
use std::io;
use std::ops::ControlFlow;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::boot::{BootProtocol, Entry};
use crate::devices::bus::Bus;
use crate::exit::{ExitLatch, VmExit};
use crate::kvm::KvmError;
use crate::layout;
use crate::memory::GuestRam;
use crate::snapshot::VcpuState;

/// Selectors of the boot descriptor table; Linux's 64-bit protocol names the first two.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, memory is write-back unless said otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Registers of the local APIC (Intel SDM 3A, 11.4.1) and what firmware sets them to.
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u8 = 7;
const APIC_MODE_NMI: u8 = 4;

/// Sets what firmware would have set, on every vCPU.
pub(crate) fn set_up(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(KvmError::ioctl("KVM_SET_FPU"))?;
    let entries = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    if let Ok(msrs) = Msrs::from_entries(&entries) {
        let set = vcpu.set_msrs(&msrs);
        let set = set.map_err(KvmError::ioctl("KVM_SET_MSRS"))?;
        if let Some(refused) = entries.get(set) {
            let index = refused.index;
            return Err(KvmError::Msr { index });
        }
    }
    let mut lapic = vcpu.get_lapic().map_err(KvmError::ioctl("KVM_GET_LAPIC"))?;
    for (register, mode) in [
        (APIC_LVT_LINT0, APIC_MODE_EXTINT),
        (APIC_LVT_LINT1, APIC_MODE_NMI),
    ] {
        // The delivery mode is bits 8 to 10.
        if let Some(byte) = lapic.regs.get_mut(register + 1) {
            *byte = (*byte & !7) | mode as libc::c_char;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(KvmError::ioctl("KVM_SET_LAPIC"))
}

/// A flat segment of 4 GiB.
fn segment(selector: u16, kind: u8, long: bool, granular: bool) -> kvm_segment {
    let system = kind == 0xb && selector == TASK_SELECTOR;
    kvm_segment {
        base: 0,
        limit: if granular { u32::MAX } else { 0x67 },
        selector,
        type_: kind,
        present: 1,
        s: u8::from(!system),
        l: u8::from(long),
        db: u8::from(granular && !long),
        g: u8::from(granular),
        ..Default::default()
    }
}

/// The descriptor table that matches [`segment`]'s segments.
fn descriptors(long: bool) -> [u64; 5] {
    let code = if long {
        0x00af_9b00_0000_ffff
    } else {
        0x00cf_9b00_0000_ffff
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}

/// Writes the descriptor table for the boot processor.
pub(crate) fn write_descriptors(
    ram: &GuestRam,
    protocol: BootProtocol,
) -> Result<(), GuestMemoryError> {
    let table = descriptors(protocol == BootProtocol::Linux64);
    for (index, entry) in (0..).zip(table) {
        ram.write_obj(entry, GuestAddress(layout::GDT + index * 8))?;
    }
    Ok(())
}

/// Puts the boot processor at the kernel's entry. The others wait for its start-up interrupt.
pub(crate) fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let long = entry.protocol == BootProtocol::Linux64;
    let mut sregs = vcpu.get_sregs().map_err(KvmError::ioctl("KVM_GET_SREGS"))?;
    let data = segment(DATA_SELECTOR, 0x3, false, true);
    sregs.cs = segment(CODE_SELECTOR, 0xb, long, true);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK_SELECTOR, 0xb, false, false);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = size_of_val(&descriptors(long)) as u16 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs)
        .map_err(KvmError::ioctl("KVM_SET_SREGS"))?;
    let mut regs = kvm_regs {
        rip: entry.address,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    match entry.protocol {
        BootProtocol::Pvh => regs.rbx = layout::PVH_INFO,
        BootProtocol::Linux64 => {
            regs.rsi = layout::ZERO_PAGE;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
        }
    }
    vcpu.set_regs(&regs)
        .map_err(KvmError::ioctl("KVM_SET_REGS"))
}

thread_local! {
    /// The run structure of the vCPU that this thread runs, for the signal handler; null outside
    /// of the run loop. It has no destructor and is initialised at compile time, so that the
    /// handler may touch it at any instruction.
    static RUNNING: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that makes a vCPU leave the guest.
pub(crate) fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Takes the vCPU of this thread out of the guest, or keeps it from entering once more.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUNNING.get();
    if !run.is_null() {
        // SAFETY: the pointer is only set while this very thread owns the mapping; the field is
        // one byte that the kernel reads when it enters KVM_RUN.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

/// Installs the handler of [`kick_signal`] for the process.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
}

/// What a vCPU thread shares with the machine.
#[derive(Debug)]
pub(crate) struct Shared {
    pub ports: Bus,
    pub mmio: Bus,
    pub latch: Arc<ExitLatch>,
    /// Set before the vCPUs are kicked: they then wait for their next order.
    pub stop: AtomicBool,
    /// When the boot processor first entered the guest.
    pub first_entry: OnceLock<Instant>,
    /// Exits to user space of all vCPUs.
    pub user_exits: AtomicU64,
}

/// What the thread of a vCPU is to do next. It ends when there will be none.
#[derive(Debug)]
pub(crate) enum Order {
    /// Run the guest until the machine ends or is stopped.
    Run,
    /// Finish what the guest was left for.
    Settle(SyncSender<()>),
    /// Tell the state.
    Save(SyncSender<Result<VcpuState, KvmError>>),
}

/// One vCPU with its thread's view of the machine.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub fd: VcpuFd,
    /// What the guest was told of it.
    pub cpuid: CpuId,
    /// The model-specific registers that KVM knows.
    pub msrs: Arc<[u32]>,
    pub shared: Arc<Shared>,
}

/// Marks the thread as running a vCPU, for as long as it lives.
struct Running;

impl Running {
    fn enter(vcpu: &mut VcpuFd) -> Self {
        RUNNING.set(ptr::from_mut(vcpu.get_kvm_run()));
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(ptr::null_mut());
    }
}

impl Vcpu {
    /// Does what it is told until nobody is left to tell it.
    pub fn obey(&mut self, orders: &Receiver<Order>) {
        for order in orders {
            // Whoever gave the order may have given up.
            match order {
                Order::Run => self.run(),
                Order::Settle(settled) => {
                    self.settle();
                    let _ = settled.send(());
                }
                Order::Save(reply) => {
                    let _ = reply.send(VcpuState::save(&self.fd, &self.cpuid, &self.msrs));
                }
            }
        }
    }

    /// Runs the vCPU until the machine ends or is stopped.
    fn run(&mut self) {
        let running = Running::enter(&mut self.fd);
        // The mask came from the thread that made this one; it may block everything.
        if let Err(error) = unblock_signal(kick_signal()) {
            tracing::error!(?error, "unblocking the vCPU's signal");
        }
        self.shared.first_entry.get_or_init(Instant::now);
        while !self.shared.stop.load(Ordering::Acquire) {
            if let ControlFlow::Break(Some(exit)) = self.step() {
                self.shared.latch.set(exit);
                break;
            }
            if self.shared.latch.get().is_some() {
                break;
            }
        }
        drop(running);
    }

    /// Lets KVM finish the access for which the guest was left last, which it does on the next entry, without letting
    /// the guest run.
    fn settle(&mut self) {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.step() {
                // An access in several parts.
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(None) => return,
                ControlFlow::Break(Some(exit)) => return self.shared.latch.set(exit),
            }
        }
    }

    /// Enters the guest once and serves what it left for. Breaks off when a signal, or nothing at all, made it leave,
    /// and with the reason when the machine is to end.
    fn step(&mut self) -> ControlFlow<Option<VmExit>> {
        self.shared.user_exits.fetch_add(1, Ordering::Relaxed);
        let shared = &self.shared;
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                shared.ports.write(port.into(), data);
                ControlFlow::Continue(())
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                shared.ports.read(port.into(), data);
                ControlFlow::Continue(())
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.mmio.write(address, data);
                ControlFlow::Continue(())
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.mmio.read(address, data);
                ControlFlow::Continue(())
            }
            Ok(VcpuExit::Shutdown) => ControlFlow::Break(Some(VmExit::TripleFault)),
            Ok(VcpuExit::InternalError) => ControlFlow::Break(Some(self.internal_error())),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                ControlFlow::Break(Some(VmExit::EntryFailed { reason }))
            }
            // The kernel's own notice of an interruption.
            Ok(VcpuExit::Intr) => ControlFlow::Break(None),
            Ok(other) => ControlFlow::Break(Some(VmExit::Unexpected {
                reason: format!("{other:?}"),
            })),
            Err(errno) => match errno.errno() {
                libc::EINTR | libc::EAGAIN => {
                    self.fd.set_kvm_immediate_exit(0);
                    ControlFlow::Break(None)
                }
                errno => ControlFlow::Break(Some(VmExit::RunFailed { errno })),
            },
        }
    }

    fn internal_error(&mut self) -> VmExit {
        let rip = self.fd.get_regs().ok().map(|regs| regs.rip);
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so the union holds `internal`.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        VmExit::InternalError { suberror, rip }
    }
}
