//! Turns `linux.seccomp` of config.json into the kernel's filter program before any process is made, and installs it.
//!
//! The program is compiled by the parent, so that the container's first process needs one system call for it, as late
//! as can be; the profile is the bundle's and only decides what its own container may do.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};

use crate::error::{Context, Error};

const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
const SECCOMP_FILTER_FLAG_LOG: libc::c_uint = 2;
const SECCOMP_FILTER_FLAG_SPEC_ALLOW: libc::c_uint = 4;

/// A compiled filter.
#[derive(Clone)]
pub(crate) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_uint,
}

impl Filter {
    /// Compiles a profile.
    pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Self, Error> {
        let failed = |field: &str, source: libseccomp::error::SeccompError| {
            Error::unsupported(
                format!("linux.seccomp.{field}"),
                format!("libseccomp refused it: {source}"),
            )
        };
        let default = action(
            "defaultAction",
            profile.default_action(),
            profile.default_errno_ret(),
        )?;
        let mut context =
            ScmpFilterContext::new(default).map_err(|source| failed("defaultAction", source))?;
        for arch in profile.architectures().iter().flatten() {
            context
                .add_arch(architecture(*arch))
                .map_err(|source| failed("architectures", source))?;
        }
        // A tree instead of a list: a system call takes some ten steps instead of hundreds (libseccomp 2.5).
        let _ = context.set_ctl_optimize(2);
        for (index, rule) in profile.syscalls().iter().flatten().enumerate() {
            let field = format!("syscalls[{index}]");
            let action = action(&format!("{field}.action"), rule.action(), rule.errno_ret())?;
            if action == default {
                continue;
            }
            let conditions: Vec<_> = rule.args().iter().flatten().map(condition).collect();
            for name in rule.names() {
                // A profile names system calls of other architectures and kernels too.
                let Ok(call) = ScmpSyscall::from_name(name) else {
                    continue;
                };
                add_rule(&mut context, action, call, rule.args(), &conditions)
                    .map_err(|source| failed(&field, source))?;
            }
        }
        let mut flags = 0;
        for flag in profile.flags().iter().flatten() {
            flags |= match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                // The process that installs the filter has one thread, so there is none to synchronise.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                    return Err(Error::unsupported(
                        "linux.seccomp.flags",
                        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is only for SCMP_ACT_NOTIFY, which is not supported yet",
                    ));
                }
            };
        }
        Ok(Self {
            program: export(&context)?,
            flags,
        })
    }

    /// Puts the filter on this process. It needs `no_new_privs` or CAP_SYS_ADMIN.
    pub(crate) fn install(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel copies the program, whose length is given, and does not write to it.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// libseccomp compares each argument once a rule; comparisons of one argument become rules of their own.
fn add_rule(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    call: ScmpSyscall,
    arguments: &Option<Vec<LinuxSeccompArg>>,
    conditions: &[ScmpArgCompare],
) -> Result<(), libseccomp::error::SeccompError> {
    if conditions.is_empty() {
        context.add_rule(action, call)?;
        return Ok(());
    }
    let mut seen = HashSet::new();
    let distinct = arguments
        .iter()
        .flatten()
        .all(|argument| seen.insert(argument.index()));
    if distinct {
        context.add_rule_conditional(action, call, conditions)?;
        return Ok(());
    }
    for condition in conditions {
        context.add_rule_conditional(action, call, std::slice::from_ref(condition))?;
    }
    Ok(())
}

fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>, Error> {
    let what = || "cannot compile linux.seccomp".to_owned();
    let fd = memfd_create(c"rt-seccomp", MemFdCreateFlag::MFD_CLOEXEC).context(what)?;
    let mut file = File::from(fd);
    context
        .export_bpf(&file)
        .map_err(io::Error::other)
        .context(what)?;
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).context(what)?;
    file.read_to_end(&mut bytes).context(what)?;
    Ok(bytes
        .chunks_exact(8)
        .map(|one| libc::sock_filter {
            code: u16::from_ne_bytes([one[0], one[1]]),
            jt: one[2],
            jf: one[3],
            k: u32::from_ne_bytes([one[4], one[5], one[6], one[7]]),
        })
        .collect())
}

fn action(
    field: &str,
    action: LinuxSeccompAction,
    value: Option<u32>,
) -> Result<ScmpAction, Error> {
    let value = value.unwrap_or(libc::EPERM as u32);
    let range = || {
        Error::unsupported(
            format!("linux.seccomp.{field}"),
            format!("{value} is not an error number"),
        )
    };
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => {
            ScmpAction::Errno(i32::try_from(value).map_err(|_| range())?)
        }
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(value).map_err(|_| range())?)
        }
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Error::unsupported(
                format!("linux.seccomp.{field}"),
                "SCMP_ACT_NOTIFY is not supported yet",
            ));
        }
    })
}

/// For SCMP_CMP_MASKED_EQ the specification's `value` is the mask and `valueTwo` what is compared with.
fn condition(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let index = argument.index() as u32;
    let value = argument.value();
    let (operator, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(value),
            argument.value_two().unwrap_or_default(),
        ),
    };
    ScmpArgCompare::new(index, operator, value)
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> LinuxSeccomp {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_profile_becomes_a_program() {
        let filter = Filter::compile(&profile(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
                "syscalls":[{"names":["mkdir","no_such_call"],"action":"SCMP_ACT_ERRNO"},
                {"names":["clone"],"action":"SCMP_ACT_ERRNO",
                 "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
        ))
        .unwrap();
        assert!(filter.program.len() > 5);
    }

    #[test]
    fn notification_is_refused_by_name() {
        let error = Filter::compile(&profile(
            r#"{"defaultAction":"SCMP_ACT_ALLOW",
                "syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        ))
        .err()
        .unwrap();
        assert!(
            error
                .to_string()
                .starts_with("linux.seccomp.syscalls[0].action"),
            "{error}"
        );
    }
}
