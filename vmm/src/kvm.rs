//! `/dev/kvm`: opening it, checking what it can do, making a machine with memory and interrupts.
//!
//! Each error names the ioctl and, where the user can do something, what. The host's kernel is
//! trusted.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_clock_data,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::io_apic::{Lines, Message};
use crate::layout;
use crate::memory::{Memory, Slot};

/// The device that KVM is reached by.
pub const DEVICE: &str = "/dev/kvm";

/// `KVM_PMU_CAP_DISABLE` of the kernel's `uapi/linux/kvm.h`: the guest gets no performance counters.
const KVM_PMU_CAP_DISABLE: u64 = 1;

/// Why KVM cannot be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device file does not exist.
    #[error(
        "there is no {DEVICE}: load the module kvm_intel or kvm_amd and enable virtualisation in \
         the firmware (inside a virtual machine: nested virtualisation)"
    )]
    NoDevice,
    /// The device file may not be opened.
    #[error("no permission to open {DEVICE}: run as root or join the group that owns it")]
    Denied(#[source] io::Error),
    /// The device file cannot be opened for another reason.
    #[error("opening {DEVICE}")]
    Open(#[source] io::Error),
    /// Another hypervisor has the processor's virtualisation.
    #[error("KVM_CREATE_VM: another hypervisor uses the processor; stop it first")]
    Busy(#[source] io::Error),
    /// The kernel's KVM is not the stable one.
    #[error("{DEVICE} speaks KVM API version {found}, not {KVM_API_VERSION}")]
    ApiVersion {
        /// What `KVM_GET_API_VERSION` returned.
        found: i32,
    },
    /// The kernel's KVM is too old or built without a needed part.
    #[error("the host's KVM lacks {name}: a newer host kernel has it")]
    Capability {
        /// The capability's name in the kernel's API.
        name: &'static str,
    },
    /// More vCPUs than the host's KVM allows.
    #[error("{asked} vCPUs: the host's KVM allows at most {most}")]
    TooManyVcpus {
        /// The number asked for.
        asked: u8,
        /// What `KVM_CAP_MAX_VCPUS` says.
        most: usize,
    },
    /// An ioctl failed.
    #[error("the ioctl {ioctl} failed")]
    Ioctl {
        /// The ioctl's name in the kernel's API.
        ioctl: &'static str,
        /// Its errno.
        #[source]
        source: io::Error,
    },
    /// KVM lists more model-specific registers than it takes.
    #[error("the host's KVM lists {count} model-specific registers")]
    TooManyMsrs {
        /// The number.
        count: usize,
    },
    /// KVM took fewer model-specific registers than it was given.
    #[error("KVM_SET_MSRS: the host's KVM refuses the register {index:#x}")]
    Msr {
        /// The first refused register.
        index: u32,
    },
}

impl KvmError {
    /// Makes the errno of the failed ioctl `name` into an error.
    pub(crate) fn ioctl(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |errno| Self::Ioctl {
            ioctl: name,
            source: io::Error::from_raw_os_error(errno.errno()),
        }
    }
}

/// An open `/dev/kvm` that has what a machine of this crate needs.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens `/dev/kvm` and checks its version and capabilities.
    ///
    /// # Errors
    /// No device, no permission, or a KVM that lacks something.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|errno| {
            let source = io::Error::from_raw_os_error(errno.errno());
            match errno.errno() {
                libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::NoDevice,
                libc::EACCES | libc::EPERM => KvmError::Denied(source),
                _ => KvmError::Open(source),
            }
        })?;
        let found = kvm.get_api_version();
        if found != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion { found });
        }
        for (cap, name) in [
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::MpState, "KVM_CAP_MP_STATE"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Capability { name });
            }
        }
        Ok(Self { kvm })
    }

    /// Makes an empty machine.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn create_vm(&self) -> Result<VmFd, KvmError> {
        self.kvm.create_vm().map_err(|errno| {
            let source = io::Error::from_raw_os_error(errno.errno());
            match errno.errno() {
                libc::EBUSY => KvmError::Busy(source),
                _ => KvmError::Ioctl {
                    ioctl: "KVM_CREATE_VM",
                    source,
                },
            }
        })
    }

    /// The processor features that the host's KVM can give to a guest.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn supported_cpuid(&self) -> Result<kvm_bindings::CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID"))
    }

    /// The model-specific registers that a vCPU's state consists of, by their indices.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn msrs(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list();
        let list = list.map_err(KvmError::ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Whether the guest's local APIC timer can be given a time stamp as its deadline.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Refuses more vCPUs than KVM allows.
    ///
    /// # Errors
    /// [`KvmError::TooManyVcpus`].
    pub fn check_vcpus(&self, asked: u8) -> Result<(), KvmError> {
        let most = self.kvm.get_max_vcpus();
        if usize::from(asked) > most {
            return Err(KvmError::TooManyVcpus { asked, most });
        }
        Ok(())
    }
}

/// Gives the machine its RAM.
pub(crate) fn register_memory(vm: &VmFd, memory: &Memory) -> Result<(), KvmError> {
    for (number, slot) in (0..).zip(memory.slots()) {
        register_slot(vm, number, slot)?;
    }
    Ok(())
}

/// Gives the machine a part of its memory.
pub(crate) fn register_slot(vm: &VmFd, number: u32, slot: Slot) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: number,
        flags: 0,
        guest_phys_addr: slot.guest,
        memory_size: slot.length,
        userspace_addr: slot.host,
    };
    // SAFETY: the slots are mapped for the life of the process and do not overlap.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(KvmError::ioctl("KVM_SET_USER_MEMORY_REGION"))
}

/// Gives the machine its local APICs, in the kernel: an interrupt, an acknowledge or a timer never
/// leaves to user space. The I/O APIC with its `pins` is ours; there is no PIC and no PIT, as ACPI
/// tells the guest.
pub(crate) fn create_interrupt_controllers(vm: &VmFd, pins: u8) -> Result<(), KvmError> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(KvmError::ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(KvmError::ioctl("KVM_SET_TSS_ADDR"))?;
    let local = kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_SPLIT_IRQCHIP,
        args: [pins.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&local)
        .map_err(KvmError::ioctl("KVM_ENABLE_CAP (KVM_CAP_SPLIT_IRQCHIP)"))?;
    let no_pmu = kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE, 0, 0, 0],
        ..Default::default()
    };
    // Best effort: CPUID hides the counters already; a kernel without the capability is fine.
    if let Err(errno) = vm.enable_cap(&no_pmu) {
        tracing::debug!(%errno, "KVM_CAP_PMU_CAPABILITY is not there");
    }
    Ok(())
}

/// What the machine's clock shows, in nanoseconds.
pub(crate) fn clock(vm: &VmFd) -> Result<u64, KvmError> {
    let clock = vm.get_clock().map_err(KvmError::ioctl("KVM_GET_CLOCK"))?;
    Ok(clock.clock)
}

/// Sets the machine's clock.
pub(crate) fn set_clock(vm: &VmFd, clock: u64) -> Result<(), KvmError> {
    let clock = kvm_clock_data {
        clock,
        ..Default::default()
    };
    vm.set_clock(&clock)
        .map_err(KvmError::ioctl("KVM_SET_CLOCK"))
}

impl Lines for Arc<VmFd> {
    fn route(&self, messages: &[(u32, Message)]) -> io::Result<()> {
        let entries: Vec<_> = messages
            .iter()
            .map(|&(pin, message)| {
                let mut entry = kvm_irq_routing_entry {
                    gsi: pin,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi.address_lo = message.address;
                entry.u.msi.data = message.data;
                entry
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        self.set_gsi_routing(&routing)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
    }

    fn connect(&self, line: &EventFd, pin: u32) -> io::Result<()> {
        self.register_irqfd(line, pin)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
    }

    fn disconnect(&self, line: &EventFd, pin: u32) -> io::Result<()> {
        self.unregister_irqfd(line, pin)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
    }
}

/// Makes vCPU number `index`.
pub(crate) fn create_vcpu(vm: &VmFd, index: u8) -> Result<VcpuFd, KvmError> {
    vm.create_vcpu(index.into())
        .map_err(KvmError::ioctl("KVM_CREATE_VCPU"))
}
