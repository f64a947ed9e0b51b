//! Resource limits and the out-of-memory score of one process.

use std::fs;

use nix::unistd::Pid;
use oci_spec::runtime::{PosixRlimitType, Process};

use crate::error::{Context, Error};

/// Sets `process.rlimits` on a process; the caller's rights count, not the process's.
pub(crate) fn set_rlimits(pid: Pid, process: &Process) -> Result<(), Error> {
    for limit in process.rlimits().iter().flatten() {
        let value = libc::rlimit {
            rlim_cur: limit.soft(),
            rlim_max: limit.hard(),
        };
        // SAFETY: the structure is read, the old value is not asked for.
        let answer = unsafe {
            libc::prlimit(
                pid.as_raw(),
                resource(limit.typ()),
                &raw const value,
                std::ptr::null_mut(),
            )
        };
        if answer < 0 {
            return Err(std::io::Error::last_os_error()).context(|| {
                format!(
                    "cannot set process.rlimits {} to {}:{} (raising a hard limit needs CAP_SYS_RESOURCE)",
                    limit.typ(),
                    limit.soft(),
                    limit.hard()
                )
            });
        }
    }
    Ok(())
}

/// Sets `process.oomScoreAdj` on a process.
pub(crate) fn set_oom_score(pid: Pid, process: &Process) -> Result<(), Error> {
    let Some(score) = process.oom_score_adj() else {
        return Ok(());
    };
    let path = format!("/proc/{pid}/oom_score_adj");
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
