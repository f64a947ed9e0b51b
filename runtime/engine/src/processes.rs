//! What /proc says of the processes of a container.
//!
//! The names and command lines are chosen by the container: they are data, never more.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::cgroup::Cgroup;

/// One process, with what `ps -ef` tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its number as this process sees it.
    pub pid: i32,
    /// Its parent's number.
    pub parent: i32,
    /// Its effective user.
    pub uid: u32,
    /// The device number of its terminal, as proc(5) packs it; 0 is none.
    pub terminal: u32,
    /// Processor time used so far, in user and in kernel mode.
    pub cpu: Duration,
    /// When it began, since 1970 by this system's clock.
    pub started: Duration,
    /// Its arguments joined by spaces, or its name in brackets where there are none.
    pub command: String,
}

/// The processes of a cgroup, by pid. Those that end meanwhile are left out.
///
/// # Errors
/// The list of processes cannot be read.
pub fn processes(cgroup: &Cgroup) -> Result<Vec<ProcessInfo>, crate::cgroup::Error> {
    let clock = Clock::read();
    Ok(cgroup
        .pids()?
        .into_iter()
        .filter_map(|pid| process(pid, &clock).ok())
        .collect())
}

fn process(pid: Pid, clock: &Clock) -> io::Result<ProcessInfo> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let stat = fs::read(directory.join("stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    let uid = fs::metadata(directory.join("stat"))?.uid();
    let uid = effective_uid(&fs::read_to_string(directory.join("status"))?).unwrap_or(uid);
    let command = fs::read(directory.join("cmdline"))?;
    let stat = parse(&stat).ok_or(io::ErrorKind::InvalidData)?;
    Ok(ProcessInfo {
        pid: pid.as_raw(),
        parent: stat.parent,
        uid,
        terminal: stat.terminal,
        cpu: clock.duration(stat.cpu_ticks),
        started: clock.boot.saturating_add(clock.duration(stat.start)),
        command: arguments(&command).unwrap_or_else(|| format!("[{}]", stat.name)),
    })
}

/// When a process began, in clock ticks after boot; `None` if there is none or it has ended (a zombie).
#[must_use]
pub fn start_time(pid: Pid) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let stat = parse(&stat)?;
    (!matches!(stat.state, 'Z' | 'X')).then_some(stat.start)
}

/// Whether a process still runs the program of who made it: it was cloned, and has executed none since.
pub(crate) fn has_executed_none(pid: Pid) -> bool {
    const PF_FORKNOEXEC: u32 = 0x40;
    let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let stat = String::from_utf8_lossy(&stat);
    parse(&stat).is_some_and(|stat| stat.flags & PF_FORKNOEXEC != 0)
}

fn effective_uid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The command line as a person reads it; `None` for a process that has none.
fn arguments(cmdline: &[u8]) -> Option<String> {
    let text = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    (!text.is_empty()).then(|| String::from_utf8_lossy(text).replace('\0', " "))
}

/// What we read of /proc/pid/stat.
#[derive(Debug)]
struct Stat<'a> {
    name: &'a str,
    /// `R`, `S`, `D`, `Z`, `T` and so on.
    state: char,
    parent: i32,
    terminal: u32,
    /// `PF_*` of `linux/sched.h`.
    flags: u32,
    cpu_ticks: u64,
    /// When it began, in clock ticks after the system's boot; with the pid it names a process for ever.
    start: u64,
}

/// proc(5), /proc/pid/stat: the name is in parentheses and may itself contain some.
fn parse(stat: &str) -> Option<Stat<'_>> {
    let (head, tail) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    // `fields[0]` is field 3 of the manual page, the state.
    let field = |number: usize| fields.get(number - 3).copied();
    Some(Stat {
        name: head.split_once('(')?.1,
        state: field(3)?.chars().next()?,
        parent: field(4)?.parse().ok()?,
        terminal: field(7)?.parse().ok()?,
        flags: field(9)?.parse().ok()?,
        cpu_ticks: field(14)?
            .parse::<u64>()
            .ok()?
            .saturating_add(field(15)?.parse().ok()?),
        start: field(22)?.parse().ok()?,
    })
}

/// What turns the kernel's ticks since boot into times.
struct Clock {
    ticks_a_second: u64,
    /// When the system was booted, since 1970.
    boot: Duration,
}

impl Clock {
    fn read() -> Self {
        let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME)
            .map(Into::into)
            .unwrap_or_default();
        Self {
            ticks_a_second: ticks
                .and_then(|ticks| u64::try_from(ticks).ok())
                .filter(|&ticks| ticks > 0)
                .unwrap_or(100),
            boot: now.saturating_sub(uptime),
        }
    }

    fn duration(&self, ticks: u64) -> Duration {
        Duration::from_millis(ticks.saturating_mul(1000) / self.ticks_a_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 34816 7 64 0 0 0 0 11 22 0 0 20 0 1 0 4242 0 0";
        let stat = parse(stat).unwrap();
        assert_eq!(stat.name, "a) b (c");
        assert_eq!((stat.parent, stat.state, stat.terminal), (1, 'S', 34816));
        assert_eq!((stat.flags, stat.cpu_ticks, stat.start), (64, 33, 4242));
    }

    #[test]
    fn arguments_are_joined() {
        assert_eq!(arguments(b"sh\0-c\0true\0").unwrap(), "sh -c true");
        assert_eq!(arguments(b""), None);
    }

    #[test]
    fn this_process_is_found() {
        let clock = Clock::read();
        let info = process(Pid::this(), &clock).unwrap();
        assert_eq!(info.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(info.parent, nix::unistd::getppid().as_raw());
        // The clock's grain is a tick.
        let latest = clock.boot
            + Duration::from_secs(1)
            + Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap());
        assert!(info.started > clock.boot && info.started < latest);
    }

    #[test]
    fn a_child_runs_our_program_until_it_executes_another() {
        assert!(!has_executed_none(Pid::this()));
        // SAFETY: the child calls pause(2) and nothing else.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => loop {
                nix::unistd::pause();
            },
            nix::unistd::ForkResult::Parent { child } => {
                let has = has_executed_none(child);
                nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
                nix::sys::wait::waitpid(child, None).unwrap();
                assert!(has);
            }
        }
    }

    #[test]
    fn a_process_that_is_not_there_has_no_start() {
        assert_eq!(start_time(Pid::from_raw(i32::MAX)), None);
    }
}
