//! Signals as a caller names them: `KILL`, `SIGKILL`, `9`, `RTMIN+3`.
//!
//! A number is checked against the kernel's range, so that what reaches `kill(2)` is always a signal.

use std::fmt;
use std::str::FromStr;

use nix::sys::signal::SigSet;

/// The highest signal number of Linux (`_NSIG`).
const LAST: i32 = 64;
/// The first real-time signal a program may use: the C library keeps 32 and 33 (glibc).
const RTMIN: i32 = 34;

/// All signals that a program may use. musl leaves [`RTMIN`] out of its own such set: it has a use for it in processes
/// whose threads change users by musl, which ours do not.
pub fn all() -> SigSet {
    let mut set = *SigSet::all().as_ref();
    // SAFETY: kernel ABI: a set begins with a bit for each signal, from 1; any bits are a valid set.
    unsafe {
        *(&raw mut set).cast::<u64>() |= 1 << (RTMIN - 1);
        SigSet::from_sigset_t_unchecked(set)
    }
}

const NAMES: &[(&str, i32)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("IOT", libc::SIGIOT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("POLL", libc::SIGPOLL),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

/// The text names no signal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown signal {0:?}: use a name (TERM, SIGTERM, RTMIN+1) or a number from 0 to {LAST}")]
pub struct UnknownSignal(pub String);

/// A signal number, 0 (which only asks whether the process is there) to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal(i32);

impl Signal {
    /// SIGKILL.
    pub const KILL: Self = Self(libc::SIGKILL);
    /// SIGTERM.
    pub const TERM: Self = Self(libc::SIGTERM);

    /// The number as `kill(2)` takes it.
    pub fn number(self) -> i32 {
        self.0
    }
}

impl TryFrom<i32> for Signal {
    type Error = UnknownSignal;

    fn try_from(number: i32) -> Result<Self, UnknownSignal> {
        if (0..=LAST).contains(&number) {
            Ok(Self(number))
        } else {
            Err(UnknownSignal(number.to_string()))
        }
    }
}

impl FromStr for Signal {
    type Err = UnknownSignal;

    fn from_str(text: &str) -> Result<Self, UnknownSignal> {
        let unknown = || UnknownSignal(text.to_owned());
        if let Ok(number) = text.parse::<i32>() {
            return Self::try_from(number);
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
            return Ok(Self(*number));
        }
        let offset = |digits: &str| match digits {
            "" => Some(0),
            digits if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse::<i32>().ok(),
            _ => None,
        };
        let number = if let Some(rest) = name.strip_prefix("RTMIN") {
            offset(rest.strip_prefix('+').unwrap_or(rest)).and_then(|n| RTMIN.checked_add(n))
        } else if let Some(rest) = name.strip_prefix("RTMAX") {
            offset(rest.strip_prefix('-').unwrap_or(rest)).and_then(|n| LAST.checked_sub(n))
        } else {
            None
        };
        match number {
            Some(number) if (RTMIN..=LAST).contains(&number) => Ok(Self(number)),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None => write!(f, "signal {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same_signal() {
        for text in ["KILL", "SIGKILL", "kill", "sigkill", "9"] {
            assert_eq!(text.parse::<Signal>().unwrap(), Signal::KILL, "{text}");
        }
        assert_eq!("15".parse::<Signal>().unwrap(), Signal::TERM);
        assert_eq!("0".parse::<Signal>().unwrap().number(), 0);
    }

    #[test]
    fn real_time_signals_count_from_both_ends() {
        for (text, number) in [
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX", 64),
            ("SIGRTMAX-2", 62),
            ("64", 64),
        ] {
            assert_eq!(text.parse::<Signal>().unwrap().number(), number, "{text}");
        }
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for text in [
            "",
            "SIG",
            "NOPE",
            "65",
            "-9",
            "9x",
            "RTMIN+99",
            "RTMAX--1",
            "RTMIN+-1",
            "99999999999",
        ] {
            assert_eq!(
                text.parse::<Signal>(),
                Err(UnknownSignal(text.into())),
                "{text}"
            );
        }
    }
}
