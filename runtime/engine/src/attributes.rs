//! What a process of a container is given besides its root and its rights: scheduling, memory policy, personality, an
//! AppArmor profile, its umask. The same for create and exec.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use libcontainer::process::memory_policy::setup_memory_policy;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::stat::Mode;
use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Scheduler, Spec,
};

use crate::error::{Context, Error};
use crate::report::chain;
use crate::spec::apparmor_profile;

/// What an umask is when the configuration says nothing, as with other runtimes.
const DEFAULT_UMASK: u32 = 0o022;

/// Sets `process.ioPriority` and `process.scheduler` on this process.
pub(crate) fn set(process: &Process) -> Result<(), Error> {
    if let Some(priority) = process.io_priority() {
        let class = match priority.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        set_io_priority(class, priority.priority())
            .context(|| format!("cannot set process.ioPriority to {:?}", priority.class()))?;
    }
    if let Some(scheduler) = process.scheduler() {
        set_scheduler(scheduler).context(|| {
            format!(
                "cannot set process.scheduler to {:?} (more than the default needs CAP_SYS_NICE)",
                scheduler.policy()
            )
        })?;
    }
    Ok(())
}

/// Lets this process run on each processor that its cgroup has, whatever those of our caller are, such as a service that
/// systemd keeps to one of them. The kernel leaves out what there is not and what the cgroup may not use.
pub fn reset_affinity() {
    /// Of 8192 processors, the most that Linux can have.
    const ALL: [u64; 128] = [u64::MAX; 128];
    // SAFETY: the kernel reads as many bytes as the array has. Where it refuses, our caller's processors have to do.
    let _ = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(&ALL),
            ALL.as_ptr(),
        )
    };
}

/// ioprio_set(2) of this process: the class in the upper three of sixteen bits, the level in the others.
fn set_io_priority(class: i64, level: i64) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    let value = class << 13 | level & 0x1fff;
    // SAFETY: no memory is passed.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// sched_setattr(2) of this process.
fn set_scheduler(scheduler: &Scheduler) -> io::Result<()> {
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => libc::SCHED_FLAG_RESET_ON_FORK,
        LinuxSchedulerFlag::SchedFlagReclaim => libc::SCHED_FLAG_RECLAIM,
        LinuxSchedulerFlag::SchedFlagDLOverrun => libc::SCHED_FLAG_DL_OVERRUN,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => libc::SCHED_FLAG_KEEP_POLICY,
        LinuxSchedulerFlag::SchedFlagKeepParams => libc::SCHED_FLAG_KEEP_PARAMS,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => libc::SCHED_FLAG_UTIL_CLAMP_MIN,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => libc::SCHED_FLAG_UTIL_CLAMP_MAX,
    };
    let flags = scheduler.flags().iter().flatten().map(flag);
    /// Of `linux/sched.h`; the C library has no name for it.
    const SCHED_ISO: libc::c_int = 4;
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIso => SCHED_ISO,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: policy as u32,
        sched_flags: flags.fold(0, |all, one| all | one as u64),
        sched_nice: scheduler.nice().unwrap_or_default(),
        sched_priority: scheduler.priority().unwrap_or_default() as u32,
        sched_runtime: scheduler.runtime().unwrap_or_default(),
        sched_deadline: scheduler.deadline().unwrap_or_default(),
        sched_period: scheduler.period().unwrap_or_default(),
    };
    // SAFETY: the structure has the size that it says, and is only read.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets `linux.memoryPolicy` on this process.
pub(crate) fn set_memory_policy(spec: &Spec) -> Result<(), Error> {
    let linux = spec.linux().as_ref();
    let Some(policy) = linux.and_then(|linux| linux.memory_policy().as_ref()) else {
        return Ok(());
    };
    let syscall = SyscallType::default().create_syscall();
    setup_memory_policy(&Some(policy.clone()), &*syscall)
        .map_err(|error| Error::Setup(format!("linux.memoryPolicy: {}", chain(&error))))
}

/// Sets `linux.personality` on this process.
pub(crate) fn set_personality(personality: Option<&LinuxPersonality>) -> Result<(), Error> {
    let Some(personality) = personality else {
        return Ok(());
    };
    /// Of `linux/personality.h`.
    const PER_LINUX32: libc::c_ulong = 0x0008;
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    };
    // SAFETY: no memory is passed.
    match unsafe { libc::personality(domain) } {
        answer if answer < 0 => {
            Err(io::Error::last_os_error()).context(|| "cannot set linux.personality".to_owned())
        }
        _ => Ok(()),
    }
}

/// Sets `process.user.umask` on this process, or the usual one.
pub(crate) fn set_umask(process: &Process) {
    let umask = process.user().umask().unwrap_or(DEFAULT_UMASK);
    nix::sys::stat::umask(Mode::from_bits_truncate(umask));
}

/// `process.apparmorProfile`, to be applied when the program is executed.
///
/// The file of the kernel is opened while /proc is still the host's: the container's may be anything.
pub(crate) struct Profile<'a> {
    wanted: Option<(&'a str, File)>,
}

impl<'a> Profile<'a> {
    pub(crate) fn open(process: &'a Process) -> Result<Self, Error> {
        let Some(name) = apparmor_profile(process) else {
            return Ok(Self { wanted: None });
        };
        let open = |path| OpenOptions::new().write(true).open(Path::new(path));
        // The second is the only one before Linux 5.8.
        let file = open("/proc/thread-self/attr/apparmor/exec")
            .or_else(|_| open("/proc/thread-self/attr/exec"))
            .context(|| format!("cannot set process.apparmorProfile {name:?}"))?;
        Ok(Self {
            wanted: Some((name, file)),
        })
    }

    pub(crate) fn apply(self) -> Result<(), Error> {
        let Some((name, mut file)) = self.wanted else {
            return Ok(());
        };
        file.write_all(format!("exec {name}").as_bytes())
            .context(|| format!("cannot set process.apparmorProfile {name:?}"))
    }
}
