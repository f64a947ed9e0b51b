//! `rt metrics`: what the containers of a state root use, for Prometheus.
//!
//! The figures of a microVM come from its guest, which is hostile: it may say what it likes of itself, and one that does
//! not answer is left out after a while and holds up nobody else.

pub mod cli;
mod serve;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use engine::cgroup;

use crate::id::ContainerId;
use crate::isolation::{Model, Stats};
use crate::lifecycle::{Error, Lifecycle, State};
use text::{Kind, Text};

/// How long is waited for the guests' answers.
const LIMIT: Duration = Duration::from_secs(5);

/// Reads the figures of all containers.
pub struct Collector {
    lifecycle: Arc<Lifecycle>,
    /// Guests that have not answered an earlier question: they are not asked another.
    asked: Arc<Mutex<BTreeSet<String>>>,
}

/// A container with its figures; none: they could not be read.
type Figures = (State, Option<Stats>);

impl Collector {
    /// A collector for the containers of a state root.
    pub fn new(lifecycle: Lifecycle) -> Self {
        Self {
            lifecycle: Arc::new(lifecycle),
            asked: Arc::default(),
        }
    }

    /// The figures of now, in Prometheus' text format.
    ///
    /// # Errors
    /// The containers cannot be listed.
    pub fn collect(&self) -> Result<String, Error> {
        let all = self.lifecycle.list()?;
        let mut stats = self.guests(&all);
        let figures: Vec<Figures> = all
            .into_iter()
            .map(|state| {
                let own = match state.isolation {
                    Model::Container if state.status.lives() => {
                        self.lifecycle.stats(&state.id).ok()
                    }
                    Model::Container => None,
                    Model::Microvm => stats.remove(&state.id.to_string()),
                };
                (state, own)
            })
            .collect();
        Ok(render(&figures))
    }

    /// Asks all guests at the same time.
    fn guests(&self, all: &[State]) -> BTreeMap<String, Stats> {
        let (sender, receiver) = channel();
        let mut open = 0;
        for state in all {
            if state.isolation != Model::Microvm || !state.status.lives() {
                continue;
            }
            let id = state.id.to_string();
            if !lock(&self.asked).insert(id) {
                continue;
            }
            let (lifecycle, asked) = (Arc::clone(&self.lifecycle), Arc::clone(&self.asked));
            let (sender, id) = (sender.clone(), state.id.clone());
            open += 1;
            thread::spawn(move || ask(&lifecycle, &asked, id, |answer| drop(sender.send(answer))));
        }
        drop(sender);
        let end = Instant::now() + LIMIT;
        let mut stats = BTreeMap::new();
        while open > 0 {
            let left = end.saturating_duration_since(Instant::now());
            match receiver.recv_timeout(left) {
                Ok((id, Some(answer))) => drop(stats.insert(id, answer)),
                Ok((_, None)) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
            open -= 1;
        }
        stats
    }
}

fn ask(
    lifecycle: &Lifecycle,
    asked: &Mutex<BTreeSet<String>>,
    id: ContainerId,
    answer: impl FnOnce((String, Option<Stats>)),
) {
    let stats = lifecycle.stats(&id).ok();
    let id = id.to_string();
    lock(asked).remove(&id);
    answer((id, stats));
}

fn lock(asked: &Mutex<BTreeSet<String>>) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernel counts processor time in nanoseconds.
fn seconds(nanoseconds: u64) -> f64 {
    Duration::from_nanos(nanoseconds).as_secs_f64()
}

fn bound(stats: &cgroup::Stats) -> Option<f64> {
    let limit = cgroup::memory_bound(stats.memory.main.limit?)?;
    Some(limit as f64)
}

fn render(all: &[Figures]) -> String {
    let mut text = Text::default();
    let mut counts: BTreeMap<(String, &str), u64> = BTreeMap::new();
    for model in [Model::Container, Model::Microvm] {
        for status in ["created", "running", "paused", "stopped"] {
            counts.insert((model.to_string(), status), 0);
        }
    }
    for (state, _) in all {
        let key = (state.isolation.to_string(), state.status.name());
        *counts.entry(key).or_default() += 1;
    }
    text.family(
        "rt_containers",
        Kind::Gauge,
        "Containers by model and status.",
    );
    for ((model, status), count) in counts {
        text.sample(
            &[("isolation", model.as_str()), ("status", status)],
            count as f64,
        );
    }
    text.family(
        "rt_container_unreadable",
        Kind::Gauge,
        "1 for a container that lives and whose figures could not be read.",
    );
    for (state, stats) in all.iter().filter(|(state, _)| state.status.lives()) {
        let unreadable = f64::from(u8::from(stats.is_none()));
        text.sample(&labels(state), unreadable);
    }
    type Figure = fn(&Stats) -> Option<f64>;
    let figures: [(&str, Kind, &str, Figure); 10] = [
        (
            "rt_container_cpu_seconds_total",
            Kind::Counter,
            "Processor time of the workload.",
            |stats| Some(seconds(stats.workload.cpu.total)),
        ),
        (
            "rt_container_cpu_throttled_seconds_total",
            Kind::Counter,
            "Time for which the workload was held by its limit of processor time.",
            |stats| Some(seconds(stats.workload.cpu.throttling.throttled_time)),
        ),
        (
            "rt_container_memory_usage_bytes",
            Kind::Gauge,
            "Memory of the workload, with its cache.",
            |stats| Some(stats.workload.memory.main.usage as f64),
        ),
        (
            "rt_container_memory_limit_bytes",
            Kind::Gauge,
            "Limit of the workload's memory, where there is one.",
            |stats| bound(&stats.workload),
        ),
        (
            "rt_container_oom_kills_total",
            Kind::Counter,
            "Processes of the workload that were killed for want of memory.",
            |stats| Some(stats.workload.memory.oom_kills as f64),
        ),
        (
            "rt_container_processes",
            Kind::Gauge,
            "Processes and threads of the workload.",
            |stats| Some(stats.workload.pids.current as f64),
        ),
        (
            "rt_container_processes_limit",
            Kind::Gauge,
            "Limit of the workload's processes and threads, where there is one.",
            |stats| stats.workload.pids.limit.map(|limit| limit as f64),
        ),
        (
            "rt_machine_cpu_seconds_total",
            Kind::Counter,
            "Processor time of a microVM's VMM process on the host, its guest included.",
            |stats| Some(seconds(stats.machine.as_ref()?.cpu.total)),
        ),
        (
            "rt_machine_memory_usage_bytes",
            Kind::Gauge,
            "Memory of a microVM's VMM process on the host, its guest's included.",
            |stats| Some(stats.machine.as_ref()?.memory.main.usage as f64),
        ),
        (
            "rt_machine_memory_limit_bytes",
            Kind::Gauge,
            "Limit of the memory of a microVM's VMM process, where there is one.",
            |stats| bound(stats.machine.as_ref()?),
        ),
    ];
    for (name, kind, help, figure) in figures {
        text.family(name, kind, help);
        for (state, stats) in all {
            if let Some(value) = stats.as_ref().and_then(figure) {
                text.sample(&labels(state), value);
            }
        }
    }
    text.finish()
}

fn labels(state: &State) -> [(&'static str, String); 2] {
    [
        ("id", state.id.to_string()),
        ("isolation", state.isolation.to_string()),
    ]
}
