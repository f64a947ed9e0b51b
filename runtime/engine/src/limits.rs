//! Resource limits and the out-of-memory score of one process.

use std::fs;

use nix::unistd::Pid;
use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process};

use crate::error::{Context, Error};

/// Sets `process.rlimits` on this process.
pub(crate) fn set_rlimits(process: &Process) -> Result<(), Error> {
    let limits = process.rlimits().iter().flatten();
    limits
        .into_iter()
        .try_for_each(|limit| set(Pid::this(), limit))
}

/// Sets those of `process.rlimits` that need no right on this process, which may be about to become another user.
pub(crate) fn lower_rlimits(limits: &[PosixRlimit]) -> Result<(), Error> {
    for limit in limits.iter().filter(|limit| !is_raised(limit)) {
        set(Pid::this(), limit)?;
    }
    Ok(())
}

/// Sets the others on a process that was born with our limits: in its user namespace it cannot raise them itself.
pub(crate) fn raise_rlimits(pid: Pid, process: &Process) -> Result<(), Error> {
    let limits = process.rlimits().iter().flatten();
    limits
        .into_iter()
        .filter(|limit| is_raised(limit))
        .try_for_each(|limit| set(pid, limit))
}

/// Whether the hard limit is above this process's.
fn is_raised(limit: &PosixRlimit) -> bool {
    let mut own = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is ours and is filled.
    let answer = unsafe { libc::getrlimit(resource(limit.typ()), &raw mut own) };
    answer == 0 && limit.hard() > own.rlim_max
}

fn set(pid: Pid, limit: &PosixRlimit) -> Result<(), Error> {
    let value = libc::rlimit {
        rlim_cur: limit.soft(),
        rlim_max: limit.hard(),
    };
    let old = std::ptr::null_mut();
    // SAFETY: the structure is read, the old value is not asked for.
    let answer =
        unsafe { libc::prlimit(pid.as_raw(), resource(limit.typ()), &raw const value, old) };
    if answer == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()).context(|| {
        format!(
            "cannot set process.rlimits {} to {}:{} (raising a hard limit needs CAP_SYS_RESOURCE)",
            limit.typ(),
            limit.soft(),
            limit.hard()
        )
    })
}

/// Sets `process.oomScoreAdj` on a process that is ours to see.
pub(crate) fn set_oom_score(pid: Pid, process: &Process) -> Result<(), Error> {
    set_oom_score_of(&pid.to_string(), process)
}

/// Sets `process.oomScoreAdj` on this process, whose own pid may be one of another pid namespace than `/proc` shows.
pub(crate) fn set_own_oom_score(process: &Process) -> Result<(), Error> {
    set_oom_score_of("self", process)
}

fn set_oom_score_of(name: &str, process: &Process) -> Result<(), Error> {
    let Some(score) = process.oom_score_adj() else {
        return Ok(());
    };
    let path = format!("/proc/{name}/oom_score_adj");
    let current = fs::read_to_string(&path).unwrap_or_default();
    if current.trim().parse() == Ok(score) {
        return Ok(());
    }
    fs::write(&path, score.to_string()).context(|| {
        format!("cannot set process.oomScoreAdj to {score} (lowering it needs CAP_SYS_RESOURCE)")
    })
}

fn resource(kind: PosixRlimitType) -> libc::__rlimit_resource_t {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
