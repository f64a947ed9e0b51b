//! A small KVM virtual machine monitor for x86-64; it knows nothing of OCI.
//!
//! The host and the caller's configuration are trusted. The guest is not: whatever comes from its
//! memory, its port and MMIO accesses and its sockets is checked in [`devices`].

mod acpi;
pub mod boot;
pub mod capabilities;
pub mod config;
mod cpuid;
pub mod devices;
mod exit;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod probe;
pub mod seccomp;
pub mod snapshot;
mod stats;
mod vcpu;
mod vm;

pub use config::{KernelConfig, Origin, SharedDirectory, VmConfig, VsockConfig};
pub use devices::serial::ConsoleTail;
pub use exit::VmExit;
pub use vm::{Error, PausedVm, RunningVm, Timeline, Vm};

/// That of `rt`, so that the tests of the filters see its system calls.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;
