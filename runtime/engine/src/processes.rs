//! What /proc says of the processes of a container.
//!
//! The names and command lines are chosen by the container: they are data, never more.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its number as this process sees it.
    pub pid: i32,
    /// Its parent's number.
    pub ppid: i32,
    /// Its effective user.
    pub uid: u32,
    /// `R`, `S`, `D`, `Z`, `T` and so on, see proc(5).
    pub state: char,
    /// When it began, in clock ticks after the system's boot; with the pid it names a process for ever.
    pub start: u64,
    /// The device number of its terminal; 0 is none.
    pub tty: i32,
    /// Processor time used so far, in clock ticks.
    pub cpu_ticks: u64,
    /// The arguments, or the name in brackets where there are none.
    pub command: Vec<String>,
}

/// The processes of a cgroup, by pid. Those that end meanwhile are left out.
///
/// # Errors
/// The list of processes cannot be read.
pub fn processes(cgroup: &Cgroup) -> Result<Vec<ProcessInfo>, crate::cgroup::Error> {
    Ok(cgroup
        .pids()?
        .into_iter()
        .filter_map(|pid| process(pid).ok())
        .collect())
}

/// One process.
///
/// # Errors
/// There is no such process (any more).
pub fn process(pid: Pid) -> io::Result<ProcessInfo> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let stat = fs::read(directory.join("stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    let uid = fs::metadata(directory.join("stat"))?.uid();
    let uid = effective_uid(&fs::read_to_string(directory.join("status"))?).unwrap_or(uid);
    let command = fs::read(directory.join("cmdline"))?;
    parse(pid, &stat, uid, &command).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// When a process began, in clock ticks after boot; `None` if there is none or it has ended (a zombie).
#[must_use]
pub fn start_time(pid: Pid) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let info = parse(pid, &String::from_utf8_lossy(&stat), 0, b"")?;
    (!matches!(info.state, 'Z' | 'X')).then_some(info.start)
}

fn effective_uid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// proc(5), /proc/pid/stat: the name is in parentheses and may itself contain some.
fn parse(pid: Pid, stat: &str, uid: u32, command: &[u8]) -> Option<ProcessInfo> {
    let (head, tail) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    // `fields[0]` is field 3 of the manual page, the state.
    let field = |number: usize| fields.get(number - 3).copied();
    let mut arguments: Vec<String> = command
        .split(|byte| *byte == 0)
        .map(|one| String::from_utf8_lossy(one).into_owned())
        .collect();
    arguments.pop();
    if arguments.is_empty() {
        arguments.push(format!("[{name}]"));
    }
    Some(ProcessInfo {
        pid: pid.as_raw(),
        ppid: field(4)?.parse().ok()?,
        uid,
        state: field(3)?.chars().next()?,
        start: field(22)?.parse().ok()?,
        tty: field(7)?.parse().ok()?,
        cpu_ticks: field(14)?
            .parse::<u64>()
            .ok()?
            .saturating_add(field(15)?.parse().ok()?),
        command: arguments,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 34816 7 0 0 0 0 0 11 22 0 0 20 0 1 0 4242 0 0";
        let info = parse(Pid::from_raw(7), stat, 5, b"sh\0-c\0true\0").unwrap();
        assert_eq!((info.ppid, info.state, info.tty), (1, 'S', 34816));
        assert_eq!((info.cpu_ticks, info.start), (33, 4242));
        assert_eq!(info.command, ["sh", "-c", "true"]);
    }

    #[test]
    fn this_process_is_found() {
        let info = process(Pid::this()).unwrap();
        assert_eq!(start_time(Pid::this()), Some(info.start));
        assert_eq!(info.uid, nix::unistd::geteuid().as_raw());
    }

    #[test]
    fn a_process_that_is_not_there_has_no_start() {
        assert_eq!(start_time(Pid::from_raw(i32::MAX)), None);
    }
}
