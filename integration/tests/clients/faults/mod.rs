//! Faults at random moments: the shim, containerd, the machine or a container's first process gets SIGKILL while a client
//! goes through the life of a container or a pod.
//!
//! A *hit* is one life in which somebody was killed. The step of the life is drawn, and in it a moment: behind the one in which the
//! victim is seen for the first time, up to about as late as an undisturbed step ends. A moment in which there was nobody to
//! kill is no hit, and another is drawn. Whatever was hit, in the end no command may hang, no exit code may be wrong, and
//! nothing may be left.
//!
//! `RT_FAULTS` says how many hits there are for each victim, `RT_FAULT_SEED` with which seed the first is drawn. Each hit
//! has a seed of its own, the next number, so that one that fails can be asked for alone. (The processes' own order is not the
//! seed's.)

pub mod ctr;
pub mod pod;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use integration::{Claim, World, ensure, eventually};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::containerd::LIMIT;
use crate::cri::{self, Cri};
use crate::process::Process;
use crate::{BOTH, Entry, MICROVM, Reason, Start, is_lab};

/// Claims for clients that start their daemons themselves, one each: what is left behind is seen by comparison.
pub const CTR_CLAIMS: &[Entry<Start>] = &[
    Entry::further("the_shim_is_killed", BOTH, |start| {
        ctr_hit(start, Victim::Shim)
    }),
    Entry::further("containerd_is_killed", BOTH, |start| {
        ctr_hit(start, Victim::Containerd)
    }),
    Entry::further("a_first_process_is_killed", BOTH, |start| {
        ctr_hit(start, Victim::FirstProcess)
    }),
    Entry::further("a_machine_is_killed", MICROVM, |start| {
        ctr_hit(start, Victim::Vmm)
    }),
];
pub const POD_CLAIMS: &[Entry<Pods>] = &[
    Entry::further("the_shim_is_killed", BOTH, |pods| pods.hit(Victim::Shim)),
    Entry::further("containerd_is_killed", BOTH, |pods| {
        pods.hit(Victim::Containerd)
    }),
    Entry::further("a_first_process_is_killed", BOTH, |pods| {
        pods.hit(Victim::FirstProcess)
    }),
    Entry::further("a_machine_is_killed", MICROVM, |pods| pods.hit(Victim::Vmm)),
];

/// How pods are made.
pub struct Pods {
    /// What their worlds are called, each by itself.
    name: &'static str,
    start: Start,
    cri: fn(Start) -> Result<Cri, Reason>,
}

/// By the containerd that is installed.
pub fn pods(start: Start) -> Result<Pods, Reason> {
    Ok(Pods {
        name: "faults-cri",
        start,
        cri: cri::start,
    })
}

/// By containerd 2, with our shim to make the sandboxes.
pub fn pods_without_image(start: Start) -> Result<Pods, Reason> {
    Ok(Pods {
        name: "faults-cri-2-shim",
        start,
        cri: cri::start_without_image,
    })
}

impl Pods {
    fn hit(&self, victim: Victim) -> Claim {
        let start = self.start.another(&format!("{}-{victim:?}", self.name))?;
        hit(&pod::PodClient::new((self.cri)(start)?), victim)
    }
}

fn ctr_hit(start: &Start, victim: Victim) -> Claim {
    let start = start.another(&format!("faults-ctr-{victim:?}"))?;
    hit(&ctr::start(start)?, victim)
}

/// The variable that says how many hits there are; without it there are none.
pub const HITS: &str = "RT_FAULTS";

/// How long what a fault leaves may take to go away.
const SETTLED: Duration = Duration::from_secs(30);

/// What a container does: it ends with [`EXIT_CODE`] on SIGTERM, once it has said that it will.
const SERVICE: &str = "trap 'exit 5' TERM; echo > /tmp/up; sleep 1000000 & wait";
const EXIT_CODE: i32 = 5;

/// What is executed in it, which waits for that, and its exit code.
const EXEC: &str = "until [ -e /tmp/up ]; do sleep 0.01; done; exit 7";
const EXEC_CODE: i32 = 7;

/// The exit code of a process that was killed, and that which containerd tells when it does not know.
const KILLED: i32 = 137;
const LOST: i32 = 255;

/// The exit codes that a container may have which was stopped while somebody was killed.
fn stopped_codes(victim: Option<Victim>) -> &'static [i32] {
    match victim {
        None | Some(Victim::Containerd) => &[EXIT_CODE],
        Some(Victim::FirstProcess | Victim::Vmm) => &[EXIT_CODE, KILLED],
        Some(Victim::Shim) => &[EXIT_CODE, KILLED, LOST],
    }
}

/// Those that it may have when it ended by that; it may have been stopped before.
fn ended_codes(victim: Victim, may_be_stopped: bool) -> Vec<i32> {
    let mut codes = vec![KILLED];
    codes.extend(may_be_stopped.then_some(EXIT_CODE));
    codes.extend((victim == Victim::Shim).then_some(LOST));
    codes
}

/// What the exit code of [`EXEC`] tells.
fn exec_told(code: i32, victim: Option<Victim>) -> Result<(), Told> {
    match (code, victim) {
        (EXEC_CODE, _) => Ok(()),
        (KILLED, Some(_)) | (LOST, Some(Victim::Shim)) => {
            Err(Told::Failure(format!("the exec: {code}")))
        }
        _ => Err(Told::Wrong(format!("the exec: the exit code is {code}"))),
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The server of our shim; every other time together with its worker and what that is doing.
    Shim,
    /// The daemon, which is started anew at once.
    Containerd,
    /// A first process of a container: of the sandbox, or of another one.
    FirstProcess,
    /// The process that has the machine.
    Vmm,
}

/// What a client was told of a step that did not succeed.
#[derive(Debug)]
pub enum Told {
    /// That it failed. After a fault it may.
    Failure(String),
    /// What is not so, whatever was killed.
    Wrong(String),
}

impl Told {
    fn text(&self) -> String {
        match self {
            Self::Failure(reason) => format!("it failed: {reason}"),
            Self::Wrong(reason) => format!("wrong: {reason}"),
        }
    }
}

impl<E: fmt::Display> From<E> for Told {
    fn from(error: E) -> Self {
        Self::Failure(error.to_string())
    }
}

/// A client's way through a life.
pub trait Client: Sync {
    /// The steps of one life, in their order.
    fn steps(&self) -> &'static [&'static str];

    /// Begins a life of which nothing is there yet.
    fn begin(&self, life: &str);

    /// Takes a step of it.
    fn take(&self, step: &str, victim: Option<Victim>) -> Result<(), Told>;

    /// Goes on behind a step in which somebody was killed. After the daemon, what had been made must be as it was; after
    /// others, it must have ended.
    fn go_on(&self, step: &str, victim: Victim) -> Result<(), Told>;

    /// Removes what there is of it, as the client would, until the daemon knows of nothing.
    fn clean_up(&self) -> Claim;

    /// Kills the daemon and starts it anew.
    fn restart(&self) -> Claim;

    fn world(&self) -> &World;
}

/// Hits as often as is asked for.
pub fn hit(client: &impl Client, victim: Victim) -> Claim {
    let number = |name| {
        env::var(name)
            .ok()
            .map(|text| text.parse::<u64>())
            .transpose()
    };
    let hits = number(HITS)?.unwrap_or(1);
    let first = number("RT_FAULT_SEED")?.unwrap_or(1);
    let walk = Walk::new(client)?;
    let mut tally: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut made, mut seed) = (0, first);
    while made < hits {
        let hit = walk.hit(victim, seed);
        let hit = hit.map_err(|reason| format!("{victim:?}, seed {seed}: {reason}"))?;
        if let Some(hit) = hit {
            made += 1;
            *tally.entry(hit.step).or_default() += 1;
            println!("{victim:?}, seed {seed}: {}", hit.account);
        }
        seed += 1;
        ensure!(
            seed - first < 20 + 5 * hits,
            "{made} hits in {} tries",
            seed - first
        );
    }
    println!(
        "{victim:?}: {made} hits in {} lives: {tally:?}",
        seed - first
    );
    Ok(())
}

/// A hit, for the reader.
struct Hit {
    step: &'static str,
    account: String,
}

struct Walk<'a, C> {
    client: &'a C,
    /// How long each step takes when nothing disturbs it.
    times: Vec<Duration>,
    before: Mutex<Traces>,
}

impl<'a, C: Client> Walk<'a, C> {
    /// Goes through a life that nobody disturbs.
    fn new(client: &'a C) -> Result<Self, Reason> {
        let walk = Self {
            client,
            times: Vec::new(),
            before: Mutex::default(),
        };
        let mut times = Vec::new();
        // The first brings what stays, such as the bridge of all pods.
        for life in ["undisturbed-1", "undisturbed-2"] {
            client.begin(life);
            times.clear();
            for step in client.steps() {
                let begun = Instant::now();
                client
                    .take(step, None)
                    .map_err(|told| format!("{step}, undisturbed: {}", told.text()))?;
                times.push(begun.elapsed());
            }
            client.clean_up()?;
            if life == "undisturbed-1" {
                *lock(&walk.before) = Traces::of(client.world())?;
            }
        }
        walk.nothing_left(false)?;
        Ok(Self { times, ..walk })
    }

    /// One life, with a fault. None: there was nobody to kill.
    fn hit(&self, victim: Victim, seed: u64) -> Result<Option<Hit>, Reason> {
        let mut random = Random(seed);
        let steps = self.client.steps();
        let drawn = random.below(steps.len() as u64) as usize;
        let (step, time) = (steps[drawn], self.times[drawn]);
        let part = random.fraction() * 1.1;
        let is_whole_shim = random.below(2) == 1;
        let chosen = random.below(16) as usize;

        self.client.begin(&format!("life-{seed}"));
        for earlier in &steps[..drawn] {
            let taken = self.client.take(earlier, None);
            taken.map_err(|told| format!("{earlier}, before the fault: {}", told.text()))?;
        }
        let begun = Instant::now();
        let (told, killed, was_under_way, moment) = thread::scope(|scope| {
            let taking = scope.spawn(|| self.client.take(step, Some(victim)));
            let find = || self.find(victim, is_whole_shim, chosen);
            let mut seen = find()?;
            while seen.is_empty() && !taking.is_finished() {
                thread::sleep(Duration::from_micros(200));
                seen = find()?;
            }
            thread::sleep(time.saturating_sub(begun.elapsed()).mul_f64(part));
            let moment = begun.elapsed();
            let was_under_way = !taking.is_finished();
            let killed = match victim {
                Victim::Containerd => {
                    self.client.restart()?;
                    vec!["containerd".to_owned()]
                }
                _ => kill_all(&find()?)?,
            };
            let told = taking.join().map_err(|_| "the step panicked")?;
            Ok::<_, Reason>((told, killed, was_under_way, moment))
        })?;
        let when = if was_under_way { "in" } else { "after" };
        let heard = match &told {
            Ok(()) => "it succeeded".to_owned(),
            Err(told) => told.text(),
        };
        let account = format!(
            "{when} {step}, {} of {} ms, killed {killed:?}; {heard}",
            moment.as_millis(),
            time.as_millis()
        );
        let after = || -> Claim {
            if let Err(Told::Wrong(reason)) = &told {
                return Err(reason.clone().into());
            }
            if killed.is_empty() {
                ensure!(told.is_ok(), "it failed though nobody was killed");
            } else {
                let gone_on = self.client.go_on(step, victim);
                gone_on.map_err(|told| format!("afterwards: {}", told.text()))?;
            }
            self.client.clean_up()?;
            self.nothing_left(victim == Victim::Containerd)
        };
        let settling = Instant::now();
        after().map_err(|reason| format!("{account}: {reason}"))?;
        let account = format!(
            "{account}; clean after {} ms",
            settling.elapsed().as_millis()
        );
        Ok((!killed.is_empty()).then_some(Hit { step, account }))
    }

    /// The processes that are to be killed, if they are there.
    fn find(&self, victim: Victim, whole: bool, chosen: usize) -> Result<Vec<Process>, Reason> {
        let world = self.client.world();
        let is_shims = |process: &Process| process.has("-id") && process.has("serve");
        let found = match victim {
            Victim::Containerd => return Ok(vec![Process::default()]),
            Victim::Vmm => {
                let mut all = processes(world)?;
                all.retain(|process| process.name == "rt-vmm");
                all
            }
            Victim::Shim => {
                let mut all = processes(world)?;
                all.retain(|process| is_shims(process) && process.name != "rt-stand-in");
                let pids: BTreeSet<i32> = all.iter().map(|process| process.pid).collect();
                all.retain(|process| whole || !pids.contains(&process.parent));
                all
            }
            Victim::FirstProcess => {
                let mut first: Vec<i32> = Vec::new();
                for cgroup in world.cgroups() {
                    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
                    let pid = pids.lines().next().and_then(|line| line.parse().ok());
                    first.extend(pid.filter(|pid| !first.contains(pid)));
                }
                first.sort_unstable();
                let one = first.get(chosen.checked_rem(first.len()).unwrap_or_default());
                one.into_iter()
                    .filter_map(|pid| Process::of(*pid))
                    .collect()
            }
        };
        Ok(found)
    }

    /// Nothing is there that was not there before. What containerd itself leaves when it is killed is not ours.
    fn nothing_left(&self, containerd_was_killed: bool) -> Claim {
        let world = self.client.world();
        let before = lock(&self.before).clone();
        eventually(scaled(SETTLED), || {
            let now = Traces::of(world)?;
            let mut left: Vec<_> = now.0.difference(&before.0).collect();
            left.retain(|trace| !(containerd_was_killed && is_containerds(trace)));
            ensure!(left.is_empty(), "left behind: {left:#?}");
            Ok(())
        })?;
        if containerd_was_killed {
            *lock(&self.before) = Traces::of(world)?;
        }
        Ok(())
    }
}

/// In the lab everything takes longer.
fn scaled(limit: Duration) -> Duration {
    if is_lab() { LIMIT } else { limit }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Kills them; returns those that were there.
fn kill_all(processes: &[Process]) -> Result<Vec<String>, Reason> {
    let mut killed = Vec::new();
    for process in processes {
        match kill(Pid::from_raw(process.pid), Signal::SIGKILL) {
            Ok(()) => killed.push(format!("{} {}", process.name, process.pid)),
            Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(killed)
}

/// The processes in the world's own pid namespace.
fn processes(world: &World) -> io::Result<Vec<Process>> {
    let namespace = fs::read_link(world.path("/proc/1/ns/pid"))?;
    let is_worlds =
        |dir: &Path| fs::read_link(dir.join("ns/pid")).is_ok_and(|own| own == namespace);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(pid) = pid
            && is_worlds(&entry.path())
        {
            found.extend(Process::of(pid));
        }
    }
    Ok(found)
}

/// What there is in a world that could have been left there, a line each.
#[derive(Debug, Default, Clone)]
struct Traces(BTreeSet<String>);

impl Traces {
    fn of(world: &World) -> io::Result<Self> {
        let mut found = BTreeSet::new();
        // The world's view has the processes of the containers' namespaces, too.
        for entry in fs::read_dir(world.path("/proc"))?.flatten() {
            let name = entry.file_name();
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let is_process = name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
            if is_process && !line.is_empty() && !line.starts_with("containerd --config") {
                found.insert(format!("process {} {line}", name.display()));
            }
        }
        let mounts = fs::read_to_string(world.path("/proc/1/mountinfo"))?;
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        found.extend(mounts.map(|mount| format!("mount {mount}")));
        let cgroups = world.cgroups();
        found.extend(
            cgroups
                .iter()
                .map(|cgroup| format!("cgroup {}", cgroup.display())),
        );
        let devices = fs::read_to_string(world.path("/proc/1/net/dev"))?;
        let devices = devices.lines().filter_map(|line| line.split_once(':'));
        found.extend(devices.map(|(name, _)| format!("network device {}", name.trim())));
        collect_files(world, "/run", &mut found);
        Ok(Self(found))
    }
}

/// Those that are the daemon's own store, and those that a client's standard streams go through.
const OTHERS: [&str; 2] = [
    "/run/containerd-root/io.containerd.",
    "/run/containerd/fifo",
];

fn collect_files(world: &World, dir: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(world.path(dir))
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = format!("{dir}/{}", entry.file_name().display());
        let is_others = OTHERS.iter().any(|others| path.starts_with(others));
        if is_others && !path.contains("runtime.v2.task") {
            continue;
        }
        // A root file system that is mounted is told as a mount.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !path.ends_with("/rootfs") {
            collect_files(world, &path, found);
        }
        found.insert(format!("file {path}"));
    }
}

/// Whether containerd itself leaves such a thing when it is killed: the network of a pod that it was making or removing,
/// and its own notes of it.
fn is_containerds(trace: &str) -> bool {
    let is_network = trace.contains("/run/netns/") || trace.starts_with("network device veth");
    is_network || trace.contains("io.containerd.grpc.v1.cri/")
}

/// Numbers that are drawn: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn fraction(&mut self) -> f64 {
        f64::from((self.next() >> 32) as u32) / f64::from(u32::MAX)
    }
}
