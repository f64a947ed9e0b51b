//! Finds out whether this host's KVM runs guests, and whether the processor runs them or KVM
//! emulates each instruction: by running a small loop in a guest and looking at the clock.
//!
//! No name and no flag tells the two apart reliably; the difference in speed is more than tenfold.

use std::io;
use std::time::Duration;

use kvm_ioctls::VcpuExit;
use nix::time::{ClockId, clock_gettime};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::{self, BootProtocol, Entry};
use crate::cpuid;
use crate::kvm::{self, Hypervisor, KvmError};
use crate::layout;
use crate::memory::{Memory, MemoryError, MemorySize};
use crate::vcpu;

/// Turns of the guest's loop: some milliseconds at least where each instruction is emulated, and
/// too few to be noticed where none is.
const TURNS: u32 = 100_000;
/// Two instructions a turn.
const INSTRUCTIONS: u32 = 2 * TURNS;
/// Below this many instructions a second, KVM emulates. Emulation reaches some millions; the
/// slowest processor with virtualisation, itself emulated in software, tens of millions.
const NATIVE_FROM: f64 = 15e6;
/// The best of so many runs counts: the others met a busy machine, whose processor may itself be one of a virtual
/// machine that had to wait.
const RUNS: u32 = 5;
/// After a run that took so long another would only cost time.
const HOPELESS: Duration = Duration::from_millis(200);
/// The port that the guest writes to when it is done.
const DONE_PORT: u16 = 0x10;

/// How KVM runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Execution {
    /// The processor runs the guest's instructions.
    Native,
    /// KVM interprets each one, which is far too slow and too incomplete for Linux.
    Emulated,
}

/// What the probe found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// How KVM runs a guest.
    pub execution: Execution,
    /// The guest's speed.
    pub instructions_per_second: f64,
}

/// Why the probe could not tell. [`ProbeError::Kvm`] says why this host has no usable KVM.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest could not be written.
    #[error("writing the probe's guest")]
    Write(#[from] GuestMemoryError),
    /// KVM_RUN failed.
    #[error("KVM_RUN failed for the probe's guest")]
    Run(#[source] io::Error),
    /// The guest did something else.
    #[error("KVM cannot run even a loop: the probe's guest ended with {exit}")]
    Exit {
        /// What KVM said.
        exit: String,
    },
}

/// Runs a tiny guest in long mode and times it. It takes a few milliseconds, at most about a
/// second where KVM emulates.
///
/// # Errors
/// KVM is missing, or cannot run the guest at all.
pub fn probe() -> Result<Report, ProbeError> {
    let hypervisor = Hypervisor::open()?;
    let mut best = Duration::MAX;
    for _ in 0..RUNS {
        let took = run(&hypervisor)?;
        best = best.min(took);
        if speed(best) >= NATIVE_FROM || took > HOPELESS {
            break;
        }
    }
    let instructions_per_second = speed(best);
    let execution = if instructions_per_second < NATIVE_FROM {
        Execution::Emulated
    } else {
        Execution::Native
    };
    Ok(Report {
        execution,
        instructions_per_second,
    })
}

fn speed(took: Duration) -> f64 {
    f64::from(INSTRUCTIONS) / took.as_secs_f64().max(1e-9)
}

/// The guest: counts down, says so, halts.
fn program() -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, TURNS
    code.extend(TURNS.to_le_bytes());
    code.extend([0xff, 0xc9]); // dec ecx
    code.extend([0x75, 0xfc]); // jnz to the dec
    code.extend([0xe6, DONE_PORT as u8]); // out DONE_PORT, al
    code.push(0xf4); // hlt
    code
}

/// How long this thread has run, its guest included, and others of this machine have not.
fn own_time() -> Result<Duration, ProbeError> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(Duration::from)
        .map_err(|errno| ProbeError::Run(errno.into()))
}

/// Runs the guest once and says how long its loop took.
fn run(hypervisor: &Hypervisor) -> Result<Duration, ProbeError> {
    let memory = Memory::new(MemorySize::from_bytes(MemorySize::MIN)?)?;
    let vm = hypervisor.create_vm()?;
    kvm::register_memory(&vm, &memory)?;
    let entry = Entry {
        protocol: BootProtocol::Linux64,
        address: layout::HIGH_RAM_START,
    };
    let ram = memory.ram();
    boot::write_page_tables(ram)?;
    vcpu::write_descriptors(ram, entry.protocol)?;
    ram.write_slice(&program(), GuestAddress(entry.address))?;
    let mut vcpu = kvm::create_vcpu(&vm, 0)?;
    let supported = hypervisor.supported_cpuid()?;
    vcpu.set_cpuid2(&cpuid::for_vcpu(&supported, 0, 1, false))
        .map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
    vcpu::set_entry(&vcpu, entry)?;
    let begun = own_time()?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(DONE_PORT, _)) => return Ok(own_time()?.saturating_sub(begun)),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                let exit = format!("{exit:?}");
                return Err(ProbeError::Exit { exit });
            }
            Err(errno) if errno.errno() == libc::EINTR => {}
            Err(errno) => {
                let error = io::Error::from_raw_os_error(errno.errno());
                return Err(ProbeError::Run(error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_finds_a_speed() {
        match probe() {
            Ok(report) => {
                let native = report.execution == Execution::Native;
                assert_eq!(native, report.instructions_per_second >= NATIVE_FROM);
                assert!(report.instructions_per_second > 1e3, "{report:?}");
                println!("{report:?}");
            }
            Err(ProbeError::Kvm(error @ (KvmError::NoDevice | KvmError::Denied(_)))) => {
                println!("skipped: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
