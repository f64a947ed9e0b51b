//! One command, measured from outside: its time, its processor time, its memory; and the memory of a process that runs.

use std::fs;
use std::io::{self, Read, Seek};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a command took.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// From its start to its end.
    pub wall: Duration,
    /// From its start to the first byte that it or a process of its wrote, if that was listened for.
    pub first_output: Option<Duration>,
    /// Processor time of it and of all descendants that were waited for.
    pub cpu: Duration,
    /// The largest resident set of any one of them, in KiB.
    pub peak_kib: u64,
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or does not succeed; then its standard error is in the text.
pub fn run(command: &mut Command) -> io::Result<Usage> {
    measure(command.stdout(Stdio::null()))
}

/// As [`run`], and notes when the command's standard output begins.
///
/// # Errors
/// As [`run`]'s.
pub fn run_to_output(command: &mut Command) -> io::Result<Usage> {
    measure(command.stdout(Stdio::piped()))
}

fn measure(command: &mut Command) -> io::Result<Usage> {
    // A file: a pipe that a detached container inherits would never end.
    let mut errors = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stderr(errors.try_clone()?);
    let begin = Instant::now();
    let mut child = command.spawn()?;
    let first_output = match child.stdout.take() {
        Some(mut output) => (output.read(&mut [0])? > 0).then(|| begin.elapsed()),
        None => None,
    };
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let mut status = 0;
    // SAFETY: all bytes zero are a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to our own variables of the types that the call fills.
        let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
        if waited == pid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let wall = begin.elapsed();
    if status != 0 {
        let mut text = String::new();
        errors.rewind()?;
        errors.read_to_string(&mut text)?;
        let status = std::os::unix::process::ExitStatusExt::from_raw(status);
        let status: std::process::ExitStatus = status;
        return Err(io::Error::other(format!("{status}: {}", text.trim())));
    }
    let cpu = duration(usage.ru_utime) + duration(usage.ru_stime);
    Ok(Usage {
        wall,
        first_output,
        cpu,
        peak_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    })
}

fn duration(time: libc::timeval) -> Duration {
    let micros = u64::try_from(time.tv_usec).unwrap_or(0);
    Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0)) + Duration::from_micros(micros)
}

/// The memory of a running process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// All that is resident.
    pub total_kib: u64,
    /// What is resident of the largest mapping that can be read: in a VMM, the guest's memory.
    pub largest_mapping_kib: u64,
}

/// Reads a process's mappings.
///
/// # Errors
/// It has ended.
pub fn resident(pid: i32) -> io::Result<Resident> {
    Ok(parse_smaps(&fs::read_to_string(format!(
        "/proc/{pid}/smaps"
    ))?))
}

/// Adds up `/proc/PID/smaps`: each mapping has a line with its addresses and its access, then one `Size:` and later one
/// `Rss:`, in KiB.
fn parse_smaps(text: &str) -> Resident {
    let mut resident = Resident {
        total_kib: 0,
        largest_mapping_kib: 0,
    };
    let (mut size, mut largest) = (0, 0);
    let mut is_readable = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next().is_some_and(|first| first.contains('-')) {
            is_readable = words.next().is_some_and(|access| access.starts_with('r'));
            continue;
        }
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let kib = || {
            value
                .trim()
                .trim_end_matches(" kB")
                .parse::<u64>()
                .unwrap_or(0)
        };
        match name {
            "Size" => size = kib(),
            "Rss" => {
                let rss = kib();
                resident.total_kib += rss;
                if is_readable && size > largest {
                    largest = size;
                    resident.largest_mapping_kib = rss;
                }
            }
            _ => {}
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_measured_and_its_failure_quoted() {
        let usage =
            run(Command::new("/bin/sh")
                .args(["-c", "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done"]))
            .unwrap();
        assert!(
            usage.wall > Duration::ZERO && usage.peak_kib > 100,
            "{usage:?}"
        );
        assert_eq!(usage.first_output, None);
        let usage = run_to_output(Command::new("/bin/sh").args(["-c", "echo first; :"])).unwrap();
        assert!(usage.first_output.is_some_and(|first| first <= usage.wall));
        let error =
            run(Command::new("/bin/sh").args(["-c", "echo reason >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "exit status: 3: reason");
    }

    #[test]
    fn mappings_are_added_up_and_the_largest_is_told_apart() {
        let text = "7f00-7f10 rw-p 0 0:0 0\nSize:              64 kB\nRss:               8 kB\n\
                    7f20-7f90 rw-p 0 0:0 0\nSize:            4096 kB\nRss:            1000 kB\n\
                    7f90-7fa0 ---p 0 0:0 0\nSize:           99999 kB\nRss:               0 kB\n\
                    7fa0-7fb0 r-xp 0 0:0 0 /bin/x\nSize:             128 kB\nRss:             100 kB\n";
        assert_eq!(
            parse_smaps(text),
            Resident {
                total_kib: 1108,
                largest_mapping_kib: 1000
            }
        );
        assert!(
            resident(std::process::id().cast_signed())
                .unwrap()
                .total_kib
                > 0
        );
    }
}
