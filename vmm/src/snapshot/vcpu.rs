//! What a vCPU holds beside the guest's memory, as KVM tells it and takes it back.

use kvm_bindings::{
    CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use crate::kvm::KvmError;

/// `IA32_TSC_DEADLINE`, which means nothing before the time stamp counter is right.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// A vCPU that does not run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    /// What the guest was told of its processor.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Of the time stamp counter, in kHz; 0 where KVM does not say.
    frequency: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// Without AMX, which no guest is offered, all of it fits.
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a vCPU that was told `cpuid`, with the model-specific registers `msrs`. It must have finished
    /// the access for which it left the guest.
    pub fn save(vcpu: &VcpuFd, cpuid: &CpuId, msrs: &[u32]) -> Result<Self, KvmError> {
        // First, for it makes KVM take in what has happened to the local APIC.
        let mp_state = vcpu
            .get_mp_state()
            .map_err(KvmError::ioctl("KVM_GET_MP_STATE"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            frequency: frequency(vcpu),
            mp_state,
            regs: vcpu.get_regs().map_err(KvmError::ioctl("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(KvmError::ioctl("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(KvmError::ioctl("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(KvmError::ioctl("KVM_GET_XCRS"))?,
            debug_regs: vcpu
                .get_debug_regs()
                .map_err(KvmError::ioctl("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(KvmError::ioctl("KVM_GET_LAPIC"))?,
            msrs: read_msrs(vcpu, msrs)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(KvmError::ioctl("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Makes a fresh vCPU, which was told `cpuid`, what another was.
    pub fn restore(&self, vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), SnapshotError> {
        if self.cpuid != cpuid.as_slice() || self.frequency != frequency(vcpu) {
            return Err(SnapshotError::OtherHost);
        }
        vcpu.set_mp_state(self.mp_state)
            .map_err(KvmError::ioctl("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs)
            .map_err(KvmError::ioctl("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(KvmError::ioctl("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads no more than this structure has: no guest is offered a feature of the processor whose state
        // does not fit in it.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(KvmError::ioctl("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(KvmError::ioctl("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(KvmError::ioctl("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(KvmError::ioctl("KVM_SET_LAPIC"))?;
        let (deadline, others): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .copied()
            .partition(|msr| msr.index == MSR_TSC_DEADLINE);
        write_msrs(vcpu, &others)?;
        write_msrs(vcpu, &deadline)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(KvmError::ioctl("KVM_SET_VCPU_EVENTS"))?;
        // The guest's watchdogs are to see that time was skipped; a guest without KVM's clock has no use for it.
        if let Err(errno) = vcpu.kvmclock_ctrl() {
            tracing::debug!(%errno, "KVM_KVMCLOCK_CTRL");
        }
        Ok(())
    }
}

/// Of the time stamp counter, in kHz; 0 where KVM does not say.
fn frequency(vcpu: &VcpuFd) -> u32 {
    vcpu.get_tsc_khz().unwrap_or(0)
}

fn entries(of: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(of).map_err(|_| KvmError::TooManyMsrs { count: of.len() })
}

/// Reads what there is of the registers `indices`: KVM lists some that a guest like ours does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut left: Vec<_> = indices
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    while !left.is_empty() {
        let asked = left.len().min(KVM_MAX_MSR_ENTRIES);
        let mut msrs = entries(&left[..asked])?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(KvmError::ioctl("KVM_GET_MSRS"))?;
        found.extend_from_slice(&msrs.as_slice()[..read]);
        // It stops at the first that it cannot read.
        left.drain(..if read < asked { read + 1 } else { read });
    }
    Ok(found)
}

/// Writes the registers. What KVM lets be read and not written must be what it is already.
fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut left = msrs;
    while !left.is_empty() {
        let (asked, _) = left.split_at(left.len().min(KVM_MAX_MSR_ENTRIES));
        let written = vcpu
            .set_msrs(&entries(asked)?)
            .map_err(KvmError::ioctl("KVM_SET_MSRS"))?;
        left = &left[written..];
        if written < asked.len()
            && let [refused, rest @ ..] = left
        {
            let index = refused.index;
            let now = read_msrs(vcpu, &[index])?;
            if now.first().map(|msr| msr.data) != Some(refused.data) {
                return Err(KvmError::Msr { index });
            }
            left = rest;
        }
    }
    Ok(())
}
