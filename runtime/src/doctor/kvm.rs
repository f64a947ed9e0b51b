//! Whether KVM runs guests here, and whether the processor does it: told by running one.

use serde::Serialize;
use vmm::kvm::KvmError;
use vmm::probe::{self, Execution, ProbeError};

use super::Check;
use crate::error_chain;

const NAME: &str = "kvm";

/// How KVM runs guests on this host.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kvm {
    /// The processor runs them.
    Native,
    /// KVM interprets each instruction.
    Emulating,
    /// There is no KVM.
    Absent,
    /// There is one, but it cannot be used.
    Unusable,
}

pub(super) fn examine() -> (Kvm, Check) {
    match probe::probe() {
        Ok(report) => {
            let speed = format!(
                "{:.1} million instructions a second",
                report.instructions_per_second / 1e6
            );
            match report.execution {
                Execution::Native => (
                    Kvm::Native,
                    Check::ok(NAME, format!("the processor runs guests ({speed})")),
                ),
                Execution::Emulated => (
                    Kvm::Emulating,
                    Check::fail(
                        NAME,
                        format!("KVM emulates each instruction ({speed}); Linux does not run so"),
                        "use a host whose processor has VMX or SVM; in a virtual machine turn on nested \
                         virtualisation",
                    ),
                ),
            }
        }
        Err(error) => {
            let message = error_chain(&error);
            let (kvm, advice) = match error {
                ProbeError::Kvm(KvmError::NoDevice) => (
                    Kvm::Absent,
                    "load kvm_intel or kvm_amd, or use a host with virtualisation",
                ),
                ProbeError::Kvm(KvmError::Denied(_)) => {
                    (Kvm::Unusable, "run as root, or join the device's group")
                }
                ProbeError::Kvm(KvmError::Busy(_)) => (Kvm::Unusable, "stop the other hypervisor"),
                _ => (Kvm::Unusable, "use another host kernel or host"),
            };
            (kvm, Check::fail(NAME, message, advice))
        }
    }
}
