//! Fault points: named places between two steps at which a test ends a process, as a crash would.
//!
//! Crash safety is a claim about every step, so the tests walk the steps by name and not by time. A step that is to be
//! walked is followed by a [`point`]; the tests find it by themselves. Only builds with debug assertions have points: in
//! a release build [`point`] is empty and nothing is read from the environment.
//!
//! `RT_FAULT` names a directory. Each point that a process passes is appended to the file `passed` in it, with the pid
//! and how often this process has passed it: "42 state.renamed 2". If the file `point` holds such a name and number the
//! process gets SIGKILL there; if there are also the FIFOs `held` and `go`, it writes a byte to the one and waits for a
//! byte from the other instead, so that another process can be ended meanwhile. The steps that the file `left-out` names,
//! a line each, are not done, so that a check can be seen to miss them. What the file `intruder` says is tried in a thread
//! that serves a guest.

/// The steps before this place are done, those after it are not begun.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_: &'static str) {}

/// Whether a step is to be left out; never in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn is_left_out(_: &'static str) -> bool {
    false
}

/// What an intruder is to try, and where; never in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn intruder() -> Option<String> {
    None
}

#[cfg(debug_assertions)]
pub use armed::{intruder, is_left_out, point};

#[cfg(debug_assertions)]
mod armed {
    use std::collections::BTreeMap;
    use std::ffi::OsStr;
    use std::fs::{self, OpenOptions};
    use std::os::fd::{IntoRawFd, RawFd};
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    use std::path::Path;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// What this process knows of the test. It outlives changes of root and namespaces, and forks.
    struct Plan {
        log: OpenFile,
        /// Where to act: a point's name and how often it was passed.
        target: Option<(String, u32)>,
        held: Option<OpenFile>,
        go: Option<OpenFile>,
        left_out: String,
        intruder: Option<String>,
    }

    /// A file that some child closes when it closes all descriptors that it does not know.
    struct OpenFile {
        fd: RawFd,
        identity: (u64, u64),
    }

    static PLAN: Mutex<Option<Plan>> = Mutex::new(None);
    static PASSED: Mutex<BTreeMap<&'static str, u32>> = Mutex::new(BTreeMap::new());

    /// See the module.
    pub fn point(name: &'static str) {
        let plan = plan();
        let Some(plan) = plan.as_ref() else { return };
        let mut passed = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
        let count = passed.entry(name).or_default();
        *count += 1;
        plan.log
            .write(format!("{} {name} {count}\n", std::process::id()).as_bytes());
        let Some((target, number)) = &plan.target else {
            return;
        };
        if target != name || number != count {
            return;
        }
        match (&plan.held, &plan.go) {
            (Some(held), Some(go)) => {
                held.write(b"h");
                go.wait();
            }
            _ => die(),
        }
    }

    /// See the module.
    pub fn is_left_out(step: &'static str) -> bool {
        let plan = plan();
        let plan = plan.as_ref();
        plan.is_some_and(|plan| plan.left_out.lines().any(|line| line == step))
    }

    /// See the module.
    pub fn intruder() -> Option<String> {
        plan().as_ref()?.intruder.clone()
    }

    /// What was read, or is now if it was not yet.
    fn plan() -> MutexGuard<'static, Option<Plan>> {
        let mut plan = PLAN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dir) = std::env::var_os("RT_FAULT")
            && !plan.as_ref().is_some_and(|plan| plan.log.is_open())
        {
            *plan = Plan::read(&dir);
        }
        plan
    }

    impl Plan {
        fn read(dir: &OsStr) -> Option<Self> {
            let dir = Path::new(dir);
            let target = fs::read_to_string(dir.join("point")).ok();
            Some(Self {
                log: OpenFile::open(&dir.join("passed"))?,
                target: target.and_then(|text| {
                    let (name, number) = text.trim().split_once(' ')?;
                    Some((name.to_owned(), number.parse().ok()?))
                }),
                held: OpenFile::open(&dir.join("held")),
                go: OpenFile::open(&dir.join("go")),
                left_out: fs::read_to_string(dir.join("left-out")).unwrap_or_default(),
                intruder: fs::read_to_string(dir.join("intruder")).ok(),
            })
        }
    }

    impl OpenFile {
        fn open(path: &Path) -> Option<Self> {
            // Both ways: neither opening a FIFO nor losing its other side is then an event.
            let file = OpenOptions::new()
                .read(true)
                .append(true)
                .custom_flags(libc::O_CLOEXEC)
                .open(path)
                .ok()?;
            let metadata = file.metadata().ok()?;
            Some(Self {
                identity: (metadata.dev(), metadata.ino()),
                fd: file.into_raw_fd(),
            })
        }

        fn is_open(&self) -> bool {
            // SAFETY: all-zero is a valid value of this plain structure, which the kernel fills.
            let (answer, stat) = unsafe {
                let mut stat: libc::stat = std::mem::zeroed();
                (libc::fstat(self.fd, &raw mut stat), stat)
            };
            answer == 0 && (stat.st_dev, stat.st_ino) == self.identity
        }

        fn write(&self, bytes: &[u8]) {
            // SAFETY: the bytes are as many as said. A failure shows as a point that is missing in the log.
            let _ = unsafe { libc::write(self.fd, bytes.as_ptr().cast(), bytes.len()) };
        }

        fn wait(&self) {
            let mut byte = 0u8;
            // SAFETY: one byte is read into one.
            let _ = unsafe { libc::read(self.fd, (&raw mut byte).cast(), 1) };
        }
    }

    fn die() -> ! {
        // SAFETY: no memory is passed. The kernel spares the first process of a pid namespace its own SIGKILL, which
        // therefore leaves by itself; nothing of this process is run or dropped either way.
        unsafe {
            libc::kill(libc::getpid(), libc::SIGKILL);
            libc::_exit(137)
        }
    }
}
