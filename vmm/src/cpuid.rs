//! What CPUID tells a vCPU: the host's features, less what a guest has no use for, plus the topology.
//!
//! Leaves are numbered as in Intel's SDM volume 2A (CPUID) and AMD's APM volume 3 appendix E. The
//! topology is one package, one thread a core; the APIC id is the vCPU's number.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1 ECX: VMX, the virtualisation of Intel.
const VMX: u32 = 1 << 5;
/// Leaf 1 ECX: performance and debug capabilities MSR.
const PDCM: u32 = 1 << 15;
/// Leaf 1 ECX: the local APIC's TSC deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX: SVM, the virtualisation of AMD.
const SVM: u32 = 1 << 2;
/// Leaf 1 EDX, and leaf 0x8000_0001 EDX on AMD: memory type range registers. All RAM is write-back
/// and a kernel reads some 30 of them three times over, each time leaving the guest.
const MTRR: u32 = 1 << 12;
/// Leaf 0x8000_0001 ECX: "core multi-processing legacy mode", AMD's sign of several cores.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001 ECX: AMD's performance counters.
const PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// The CPUID of vCPU `index` of `count`, from what the host's KVM supports.
pub(crate) fn for_vcpu(supported: &CpuId, index: u8, count: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adapt(entry, index, count, tsc_deadline);
    }
    cpuid
}

/// Bits of an APIC id that number the cores of the package.
fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u8, count: u8, tsc_deadline: bool) {
    let id = u32::from(index);
    let cores = u32::from(count);
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | cores << 16 | id << 24;
            entry.ecx &= !(VMX | PDCM | TSC_DEADLINE);
            entry.ecx |= HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx &= !(HTT | MTRR);
            if count > 1 {
                entry.edx |= HTT;
            }
        }
        // Caches: levels 1 and 2 belong to one core, the last one to all.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { cores - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | (cores - 1).min(63) << 26;
        }
        // Performance counters: the guest has none.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Topology: level 0 is the thread (one a core), level 1 the core.
        0xb | 0x1f => {
            let (shift, logical, level) = match entry.index {
                0 => (0, 1, 1),
                1 => (core_bits(count), cores, 2),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = logical;
            entry.ecx = (entry.index & 0xff) | level << 8;
            entry.edx = id;
        }
        0x8000_0001 => {
            entry.ecx &= !(SVM | PERFCTR | CMP_LEGACY);
            entry.edx &= !MTRR;
            if count > 1 {
                entry.ecx |= CMP_LEGACY;
            }
        }
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | core_bits(count) << 12 | (cores - 1);
        }
        // AMD's caches, as leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { cores - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14;
        }
        // AMD's topology: one thread a core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn leaf_1_names_the_apic_id_and_hides_nested_virtualisation() {
        let mut e = entry(1, 0);
        adapt(&mut e, 2, 3, false);
        assert_eq!(e.ebx >> 24, 2);
        assert_eq!(e.ebx >> 16 & 0xff, 3);
        assert_eq!(e.ecx & (VMX | TSC_DEADLINE), 0);
        assert_ne!(e.ecx & HYPERVISOR, 0);
        assert_ne!(e.edx & HTT, 0);
        adapt(&mut e, 0, 1, true);
        assert_ne!(e.ecx & TSC_DEADLINE, 0);
        assert_eq!(e.edx & HTT, 0);
    }

    #[test]
    fn topology_has_one_thread_a_core_and_all_cores_in_one_package() {
        let mut thread = entry(0xb, 0);
        let mut core = entry(0xb, 1);
        let mut end = entry(0xb, 2);
        for e in [&mut thread, &mut core, &mut end] {
            adapt(e, 4, 5, true);
            assert_eq!(e.edx, 4);
        }
        assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 5, 0x201));
        assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
    }

    #[test]
    fn a_single_vcpu_needs_no_core_bits() {
        assert_eq!([1, 2, 3, 4, 5, 255].map(core_bits), [0, 1, 2, 2, 3, 8]);
    }
}
