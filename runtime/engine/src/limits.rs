//! Resource limits and the out-of-memory score of one process.

use std::fs;

use nix::unistd::Pid;
use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

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
    let own = getrlimit(resource(limit.typ())).maximum;
    own.is_some_and(|own| limit.hard() > own)
}

fn set(pid: Pid, limit: &PosixRlimit) -> Result<(), Error> {
    let finite = |value| (value != libc::RLIM_INFINITY).then_some(value);
    let value = Rlimit {
        current: finite(limit.soft()),
        maximum: finite(limit.hard()),
    };
    let pid = rustix::process::Pid::from_raw(pid.as_raw());
    let set = prlimit(pid, resource(limit.typ()), value);
    set.map(drop).context(|| {
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

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}
