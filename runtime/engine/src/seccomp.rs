//! Turns `linux.seccomp` of config.json into the kernel's filter program before any process is made, and installs it.
//!
//! The program is compiled by the parent, so that the container's first process needs one system call for it, as late
//! as can be; the profile is the bundle's and only decides what its own container may do.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use nix::unistd::Pid;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};

use crate::error::{Context, Error};
use crate::stdio::send_with_files;

const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
const SECCOMP_FILTER_FLAG_LOG: libc::c_uint = 2;
const SECCOMP_FILTER_FLAG_SPEC_ALLOW: libc::c_uint = 4;
const SECCOMP_FILTER_FLAG_NEW_LISTENER: libc::c_uint = 8;
const SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: libc::c_uint = 32;

/// The architecture of 64-bit programs, as a filter sees it (`linux/audit.h`).
pub const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
/// That of 32-bit programs.
pub const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// What the process itself needs to hand its listener over, when the filter is in force already.
const NEEDED_BY_US: [&str; 2] = ["sendmsg", "recvmsg"];

/// How long a program may be (`BPF_MAXINSNS`).
const INSTRUCTION_LIMIT: usize = 4096;

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
        // Each takes an instruction at least, and libseccomp longer than the one before.
        let rules = profile.syscalls().iter().flatten();
        let names: usize = rules.map(|rule| rule.names().len()).sum();
        if names > INSTRUCTION_LIMIT {
            return Err(too_long(&format!("{names} system calls")));
        }
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
                    SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
                }
            };
        }
        check_notification(profile)?;
        if notifies(profile) {
            flags |= SECCOMP_FILTER_FLAG_NEW_LISTENER;
        } else {
            // The kernel takes it only together with a listener, of which a profile without one has no use.
            flags &= !SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
        }
        let mut program = match default {
            ScmpAction::Errno(number) if number != libc::ENOSYS => unknown_calls(profile),
            _ => Vec::new(),
        };
        program.extend(export(&context)?);
        if program.len() > INSTRUCTION_LIMIT {
            return Err(too_long(&format!("{} instructions", program.len())));
        }
        Ok(Self { program, flags })
    }

    /// The flags, and the program as it lies in memory: for a program of this machine and this version.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.flags.to_ne_bytes().to_vec();
        for one in &self.program {
            bytes.extend(one.code.to_ne_bytes());
            bytes.extend([one.jt, one.jf]);
            bytes.extend(one.k.to_ne_bytes());
        }
        bytes
    }

    /// What [`Filter::to_bytes`] gave; `None` if it is cut off.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (flags, program) = bytes.split_first_chunk()?;
        let is_whole = !program.is_empty() && program.len().is_multiple_of(8);
        is_whole.then(|| Self {
            program: instructions(program),
            flags: libc::c_uint::from_ne_bytes(*flags),
        })
    }

    /// Whether it has system calls decided by somebody else.
    pub(crate) fn notifies(&self) -> bool {
        self.flags & SECCOMP_FILTER_FLAG_NEW_LISTENER != 0
    }

    /// Puts the filter on this process; one that notifies gives the descriptor at which that is heard.
    ///
    /// It needs `no_new_privs` or CAP_SYS_ADMIN.
    pub(crate) fn install(&self) -> io::Result<Option<OwnedFd>> {
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
        if !self.notifies() {
            return Ok(None);
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(Some(unsafe { OwnedFd::from_raw_fd(answer as libc::c_int) }))
    }
}

fn too_long(length: &str) -> Error {
    Error::unsupported(
        "linux.seccomp.syscalls",
        format!("{length}: the kernel takes a filter of {INSTRUCTION_LIMIT} instructions"),
    )
}

/// The program that a profile compiles to.
///
/// # Errors
/// It cannot be honoured; the field is named.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<libc::sock_filter>, Error> {
    Ok(Filter::compile(profile)?.program)
}

/// This machine's architectures (`AUDIT_ARCH_*`).
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: [(u32, ScmpArch); 3] = [
    (AUDIT_ARCH_X86_64, ScmpArch::X8664),
    // Its calls have a bit of their own in the number, but the architecture of the others.
    (AUDIT_ARCH_X86_64, ScmpArch::X32),
    (AUDIT_ARCH_I386, ScmpArch::X86),
];

/// A system call's numbers by this machine's architectures; none: it is known in none of them.
#[must_use]
pub fn numbers(name: &str) -> Vec<(u32, u32)> {
    let number = |(token, architecture)| {
        let call = ScmpSyscall::from_name_by_arch(name, architecture).ok()?;
        // libseccomp gives negative numbers to calls that an architecture does not have.
        Some((token, u32::try_from(i32::from(call)).ok()?))
    };
    ARCHITECTURES.into_iter().filter_map(number).collect()
}

/// The name of the system call that has a number in an architecture, if it has one.
#[must_use]
pub fn name(architecture: u32, number: u32) -> Option<String> {
    let call = ScmpSyscall::from_raw_syscall(i32::try_from(number).ok()?);
    let mut known = ARCHITECTURES.into_iter();
    known.find_map(|(token, kind)| {
        let is_meant = token == architecture;
        let name = is_meant
            .then(|| call.get_name_by_arch(kind).ok())
            .flatten()?;
        // Another's number may be resolved, too.
        let is_its_own = numbers(&name).contains(&(architecture, number));
        is_its_own.then_some(name)
    })
}

/// Checks what a profile that notifies needs.
fn check_notification(profile: &LinuxSeccomp) -> Result<(), Error> {
    let notify = LinuxSeccompAction::ScmpActNotify;
    if profile.default_action() == notify {
        return Err(Error::unsupported(
            "linux.seccomp.defaultAction",
            "SCMP_ACT_NOTIFY would stop the container before anybody can listen",
        ));
    }
    for (index, rule) in profile.syscalls().iter().flatten().enumerate() {
        if rule.action() != notify {
            continue;
        }
        let ours = rule
            .names()
            .iter()
            .find(|name| NEEDED_BY_US.contains(&name.as_str()));
        if let Some(name) = ours {
            return Err(Error::unsupported(
                format!("linux.seccomp.syscalls[{index}]"),
                format!("SCMP_ACT_NOTIFY cannot be used for {name}, which hands the listener over"),
            ));
        }
    }
    if notifies(profile) && listener_path(profile).is_none() {
        return Err(Error::unsupported(
            "linux.seccomp.listenerPath",
            "SCMP_ACT_NOTIFY needs it: the socket of who decides",
        ));
    }
    Ok(())
}

fn listener_path(profile: &LinuxSeccomp) -> Option<&Path> {
    let path = profile.listener_path().as_deref()?;
    (!path.as_os_str().is_empty()).then_some(path)
}

/// Who decides about the system calls that a filter notifies of: a program behind the socket `linux.seccomp.listenerPath`.
pub(crate) struct SeccompAgent {
    socket: UnixStream,
    metadata: String,
}

impl SeccompAgent {
    /// Connects, if the profile notifies at all.
    pub(crate) fn connect(profile: &LinuxSeccomp) -> Result<Option<Self>, Error> {
        let Some(path) = listener_path(profile).filter(|_| notifies(profile)) else {
            return Ok(None);
        };
        let socket = UnixStream::connect(path).context(|| {
            format!(
                "cannot connect to {} (linux.seccomp.listenerPath)",
                path.display()
            )
        })?;
        Ok(Some(Self {
            socket,
            metadata: profile.listener_metadata().clone().unwrap_or_default(),
        }))
    }

    /// Sends it the listener of a process (runtime-spec, "The Container Process State").
    pub(crate) fn hand_over(
        &self,
        listener: OwnedFd,
        pid: Pid,
        state: &serde_json::Value,
    ) -> Result<(), Error> {
        let mut state = state.clone();
        if state["pid"].is_null() {
            state["pid"] = pid.as_raw().into();
        }
        let message = serde_json::json!({
            "ociVersion": state["ociVersion"],
            "fds": ["seccompFd"],
            "pid": pid.as_raw(),
            "metadata": self.metadata,
            "state": state,
        });
        let message = message.to_string();
        send_with_files(&self.socket, message.as_bytes(), &[listener.as_raw_fd()])
            .context(|| "cannot hand over the seccomp listener".to_owned())
    }
}

fn notifies(profile: &LinuxSeccomp) -> bool {
    let mut rules = profile.syscalls().iter().flatten();
    rules.any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify)
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

/// The beginning of a program that answers ENOSYS to each system call with a higher number than any that the profile names.
///
/// Those are younger than the profile, and its default is not meant for them: a C library that tries a new call and finds
/// it forbidden gives up, while one that is told that there is none takes the old one.
fn unknown_calls(profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    /// `__X32_SYSCALL_BIT` of `asm/unistd.h`.
    const X32_BIT: u32 = 1 << 30;
    let jump = |test: u32| libc::BPF_JMP | test | libc::BPF_K;
    // A jump counts the instructions that it leaves out.
    let step = |code: u32, k, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let (number_at, architecture_at) = (
        std::mem::offset_of!(libc::seccomp_data, nr) as u32,
        std::mem::offset_of!(libc::seccomp_data, arch) as u32,
    );
    let mut program = Vec::new();
    for (token, kind) in ARCHITECTURES {
        let mut named = profile.architectures().iter().flatten();
        if kind != ScmpArch::X8664 && !named.any(|one| architecture(*one) == kind) {
            // A program of this kind is ended by the filter as such.
            continue;
        }
        let names = profile.syscalls().iter().flatten();
        let numbers = names.flat_map(|rule| rule.names()).filter_map(|name| {
            let call = ScmpSyscall::from_name_by_arch(name, kind).ok()?;
            u32::try_from(i32::from(call)).ok()
        });
        let Some(highest) = numbers.max() else {
            continue;
        };
        let is_x32 = u8::from(kind == ScmpArch::X32);
        program.extend([
            step(LOAD, architecture_at, 0, 0),
            step(jump(libc::BPF_JEQ), token, 0, 4),
            step(LOAD, number_at, 0, 0),
            // Leaves the rest out where the bit says the other kind.
            step(jump(libc::BPF_JSET), X32_BIT, 2 * (1 - is_x32), 2 * is_x32),
            step(jump(libc::BPF_JGT), highest, 0, 1),
            step(RETURN, NO_SUCH_CALL, 0, 0),
        ]);
    }
    program
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
    Ok(instructions(&bytes))
}

/// A program as the kernel's `struct sock_filter`s lie in memory.
fn instructions(bytes: &[u8]) -> Vec<libc::sock_filter> {
    bytes
        .chunks_exact(8)
        .map(|one| libc::sock_filter {
            code: u16::from_ne_bytes([one[0], one[1]]),
            jt: one[2],
            jf: one[3],
            k: u32::from_ne_bytes([one[4], one[5], one[6], one[7]]),
        })
        .collect()
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
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
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
    fn calls_younger_than_the_profile_are_unknown_rather_than_forbidden() {
        let compiled = |default: &str| {
            let text = format!(
                r#"{{"defaultAction":{default},"architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X32"],
                    "syscalls":[{{"names":["read","openat2"],"action":"SCMP_ACT_ALLOW"}}]}}"#
            );
            Filter::compile(&profile(&text)).unwrap().program
        };
        let unknown = |program: &[libc::sock_filter]| {
            let answer = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
            program.iter().filter(|step| step.k == answer).count()
        };
        let program = compiled(r#""SCMP_ACT_ERRNO""#);
        assert_eq!(unknown(&program), 2, "one for each architecture");
        assert!(
            program
                .iter()
                .any(|step| step.k == libc::SYS_openat2 as u32)
        );
        assert_eq!(unknown(&compiled(r#""SCMP_ACT_KILL""#)), 0);
        assert_eq!(unknown(&compiled(r#""SCMP_ACT_ALLOW""#)), 0);
    }

    #[test]
    fn notification_needs_somebody_who_listens() {
        let refused = |text: &str| Filter::compile(&profile(text)).err().unwrap().to_string();
        let rule = r#"{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}"#;
        let text = refused(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#
        ));
        assert!(text.starts_with("linux.seccomp.listenerPath"), "{text}");
        let text = refused(r#"{"defaultAction":"SCMP_ACT_NOTIFY","listenerPath":"/x"}"#);
        assert!(text.starts_with("linux.seccomp.defaultAction"), "{text}");
        let text = refused(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x",
                "syscalls":[{"names":["sendmsg"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        );
        assert!(text.starts_with("linux.seccomp.syscalls[0]"), "{text}");
    }
}
