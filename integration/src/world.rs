//! A world of its own for a client and its daemons: mount, network and pid
//! namespaces, a `/run` that nobody else sees, and the name of a cgroup to put
//! everything under. When it ends, or this process does, the kernel ends each
//! process in it and takes its mounts and network devices along.

use std::collections::BTreeSet;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::wait_with_limit;

/// Process 1 of the world: says its pid as the host sees it, then reaps orphans until its stdin ends.
const INIT: &str = r#"
read -r pid _ < /proc/self/stat
mount -t proc proc /proc && mount -t tmpfs -o mode=755 tmpfs /run && busybox ip link set lo up || exit 1
echo "$pid"
exec 3<&0
cat <&3 >/dev/null &
wait "$!"
"#;

/// Namespaces that hold a client, its daemons and its containers.
pub struct World {
    /// `unshare`, whose one child is process 1; closing its stdin ends the world.
    keeper: Child,
    pid: String,
    name: String,
    dir: TempDir,
    /// Where its commands find programs.
    path: OsString,
}

impl World {
    /// Makes a world; `name` becomes part of the name of its cgroup.
    ///
    /// # Errors
    /// The kernel's, or what the first process said.
    pub fn new(name: &str) -> io::Result<Self> {
        let mut keeper = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "sh", "-c", INIT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut pid = String::new();
        if let Some(stdout) = keeper.stdout.take() {
            BufReader::new(stdout).read_line(&mut pid)?;
        }
        let world = Self {
            keeper,
            pid: pid.trim().to_owned(),
            name: format!("rt-clients-{name}-{}", std::process::id()),
            dir: TempDir::with_prefix("rt-clients-")?,
            path: env::var_os("PATH").unwrap_or_default(),
        };
        if world.pid.is_empty() {
            return Err(io::Error::other(
                "cannot set up namespaces for the client: see above",
            ));
        }
        Ok(world)
    }

    /// A directory that this process and the world share.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The name of the cgroup, below the root of each hierarchy, that the client's containers belong in.
    pub fn cgroup(&self) -> &str {
        &self.name
    }

    /// Has the world's commands find the programs in this directory before others of their names.
    pub fn prefer_programs_in(&mut self, dir: &Path) {
        let mut path = dir.as_os_str().to_owned();
        path.push(":");
        path.push(&self.path);
        self.path = path;
    }

    /// A command in the world, without stdin.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.pid, "--mount", "--net", "--pid", "--"])
            .arg(program)
            .env("PATH", &self.path)
            .stdin(Stdio::null());
        command
    }

    /// A path in the world, as this process reaches it.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc")
            .join(&self.pid)
            .join("root")
            .join(path.trim_start_matches('/'))
    }

    /// The cgroups below the world's, of every hierarchy.
    pub fn cgroups(&self) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        for top in self.top_cgroups() {
            collect(&top, &mut found);
        }
        found
    }

    fn top_cgroups(&self) -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(root).into_iter().flatten().flatten();
        hierarchies
            .map(|entry| entry.path())
            .chain([root.to_owned()])
            .map(|hierarchy| hierarchy.join(&self.name))
            .filter(|top| top.is_dir())
            .collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // The kernel lets process 1 end when every other process has.
        let _ = wait_with_limit(&mut self.keeper, Duration::from_secs(30));
        for top in self.top_cgroups() {
            let mut below = BTreeSet::new();
            collect(&top, &mut below);
            // A cgroup sorts before those below it.
            for dir in below.iter().rev().chain([&top]) {
                if let Err(error) = fs::remove_dir(dir) {
                    eprintln!("cannot remove the cgroup {}: {error}", dir.display());
                }
            }
        }
    }
}

fn collect(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), found);
            found.insert(entry.path());
        }
    }
}

/// A command in the background whose output, both streams, is collected; killed on drop.
pub struct Output {
    child: Child,
    collected: Arc<(Mutex<Collected>, Condvar)>,
}

#[derive(Default)]
struct Collected {
    text: String,
    /// How many of the two streams may still bring more.
    open: usize,
}

impl Output {
    /// Starts the command.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(command: &mut Command) -> io::Result<Self> {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let collected = Arc::default();
        collect_output(child.stdout.take(), &collected);
        collect_output(child.stderr.take(), &collected);
        Ok(Self { child, collected })
    }

    /// Waits until the text was written.
    ///
    /// # Errors
    /// When the command ends without, or it takes too long; with all that was written so far.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<(), String> {
        let (collected, more) = &*self.collected;
        let collected = collected.lock().unwrap_or_else(PoisonError::into_inner);
        let (collected, _) = more
            .wait_timeout_while(collected, limit, |collected| {
                collected.open > 0 && !collected.text.contains(text)
            })
            .unwrap_or_else(PoisonError::into_inner);
        if collected.text.contains(text) {
            return Ok(());
        }
        Err(format!(
            "{text:?} was not written within {limit:?}: {}",
            collected.text
        ))
    }

    /// All that was written so far.
    pub fn text(&self) -> String {
        let collected = self.collected.0.lock();
        let collected = collected.unwrap_or_else(PoisonError::into_inner);
        collected.text.clone()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect_output(
    pipe: Option<impl Read + Send + 'static>,
    all: &Arc<(Mutex<Collected>, Condvar)>,
) {
    let Some(mut pipe) = pipe else { return };
    let change = {
        let all = Arc::clone(all);
        move |change: &dyn Fn(&mut Collected)| {
            change(&mut all.0.lock().unwrap_or_else(PoisonError::into_inner));
            all.1.notify_all();
        }
    };
    change(&|collected| collected.open += 1);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = pipe.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..read]);
            change(&|collected| collected.text.push_str(&text));
        }
        change(&|collected| collected.open -= 1);
    });
}
