//! The figures as a table for a person and as JSON for a program.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// `run` of a program that ends at once, wall time.
    Run,
    /// The same, to the first byte that the program writes.
    Workload,
    /// The same, processor time of everybody waited for.
    RunCpu,
    /// The same, the largest resident set of one process.
    RunPeak,
    /// `create` and then `start`.
    CreateToStart,
    /// `exec` of a program that ends at once.
    Exec,
    /// `state` of a running container.
    State,
    /// `kill` of a running container, by a signal that changes nothing.
    Kill,
    /// `delete --force` of a running container.
    Delete,
    /// The resident set of the container's process on the host while it runs.
    Resident,
    /// The same without the guest's memory.
    BesideGuest,
    /// From the VMM's start to the guest's first instruction.
    Loaded,
    /// From the VMM's start to the agent's first word.
    Agent,
    /// From the VMM's start to a container that waits to be started.
    Created,
    /// How often the guest left its mode up to the agent's first word.
    ExitsToAgent,
    /// The same up to a container that waits to be started.
    ExitsToCreated,
}

impl Metric {
    const ALL: [Self; 16] = [
        Self::Run,
        Self::Workload,
        Self::RunCpu,
        Self::RunPeak,
        Self::CreateToStart,
        Self::Exec,
        Self::State,
        Self::Kill,
        Self::Delete,
        Self::Resident,
        Self::BesideGuest,
        Self::Loaded,
        Self::Agent,
        Self::Created,
        Self::ExitsToAgent,
        Self::ExitsToCreated,
    ];

    /// Its key in JSON, with the unit.
    fn key(self) -> &'static str {
        match self {
            Self::Run => "run_ms",
            Self::Workload => "run_to_workload_ms",
            Self::RunCpu => "run_cpu_ms",
            Self::RunPeak => "run_peak_mib",
            Self::CreateToStart => "create_to_start_ms",
            Self::Exec => "exec_ms",
            Self::State => "state_ms",
            Self::Kill => "kill_ms",
            Self::Delete => "delete_ms",
            Self::Resident => "resident_mib",
            Self::BesideGuest => "vmm_beside_guest_mib",
            Self::Loaded => "vmm_to_kernel_ms",
            Self::Agent => "vmm_to_agent_ms",
            Self::Created => "vmm_to_created_ms",
            Self::ExitsToAgent => "vm_exits_to_agent",
            Self::ExitsToCreated => "vm_exits_to_created",
        }
    }
}

/// One runtime's figures, in the order in which they came.
#[derive(Debug, Default)]
pub struct Measured(BTreeMap<Metric, Vec<f64>>);

impl Measured {
    /// Notes a figure.
    pub fn add(&mut self, metric: Metric, value: f64) {
        self.0.entry(metric).or_default().push(value);
    }

    fn spread(&self, metric: Metric) -> Option<Spread> {
        Spread::of(self.0.get(&metric)?)
    }
}

/// Median, least and greatest of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match (sorted.len() % 2, middle.checked_sub(1)) {
            (0, Some(below)) => f64::midpoint(*sorted.get(below)?, *sorted.get(middle)?),
            _ => *sorted.get(middle)?,
        };
        Some(Self {
            median,
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }
}

/// All figures.
#[derive(Debug)]
pub struct Report {
    /// Rounds.
    pub runs: u32,
    /// Each runtime's name with its figures.
    pub measured: Vec<(String, Measured)>,
    /// Who does not work here, and why.
    pub absent: Vec<(String, String)>,
}

impl Report {
    /// Runtimes that are not ours, with their medians: what the ratios are against.
    fn peers(&self) -> impl Iterator<Item = (&str, &Measured)> {
        let measured = self
            .measured
            .iter()
            .map(|(name, measured)| (name.as_str(), measured));
        measured.filter(|(name, _)| !name.starts_with("rt-"))
    }

    fn ratios(&self, metric: Metric, median: f64) -> BTreeMap<&str, f64> {
        self.peers()
            .filter_map(|(name, measured)| Some((name, median / measured.spread(metric)?.median)))
            .filter(|(_, ratio)| ratio.is_finite())
            .collect()
    }

    /// For a program.
    pub fn json(&self) -> String {
        let runtimes: BTreeMap<&str, Value> = self
            .measured
            .iter()
            .map(|(name, measured)| {
                let metrics: BTreeMap<&str, Value> = Metric::ALL
                    .into_iter()
                    .filter_map(|metric| {
                        let spread = measured.spread(metric)?;
                        let ratios = if name.starts_with("rt-") { self.ratios(metric, spread.median) } else { BTreeMap::new() };
                        let value = json!({"median": spread.median, "min": spread.min, "max": spread.max, "ratio": ratios});
                        Some((metric.key(), value))
                    })
                    .collect();
                (name.as_str(), json!(metrics))
            })
            .collect();
        let absent: BTreeMap<&str, &str> = self
            .absent
            .iter()
            .map(|(name, reason)| (name.as_str(), reason.as_str()))
            .collect();
        format!(
            "{:#}",
            json!({"runs": self.runs, "runtimes": runtimes, "absent": absent})
        )
    }

    /// For a person: medians with least and greatest, then ratios against each peer.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} rounds, taking turns; median (least to greatest)\n\n",
            self.runs
        );
        let mut line = |cells: &[String]| {
            for (index, cell) in cells.iter().enumerate() {
                let width = if index == 0 { 22 } else { 28 };
                // Writing to a string does not fail.
                let _ = write!(text, "{cell:<width$}");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        };
        let mut heading = vec![String::new()];
        heading.extend(self.measured.iter().map(|(name, _)| name.clone()));
        line(&heading);
        for metric in Metric::ALL {
            let mut cells = vec![metric.key().to_owned()];
            cells.extend(self.measured.iter().map(|(_, measured)| {
                let spread = measured.spread(metric);
                spread.map_or_else(
                    || "-".to_owned(),
                    |s| format!("{:.2} ({:.2} to {:.2})", s.median, s.min, s.max),
                )
            }));
            if cells.iter().skip(1).any(|cell| cell != "-") {
                line(&cells);
            }
        }
        for (name, measured) in self
            .measured
            .iter()
            .filter(|(name, _)| name.starts_with("rt-"))
        {
            for metric in [
                Metric::Run,
                Metric::RunCpu,
                Metric::CreateToStart,
                Metric::Exec,
                Metric::Delete,
            ] {
                let Some(spread) = measured.spread(metric) else {
                    continue;
                };
                let ratios = self.ratios(metric, spread.median);
                let ratios: Vec<String> = ratios
                    .iter()
                    .map(|(peer, ratio)| format!("{ratio:.2} of {peer}"))
                    .collect();
                if !ratios.is_empty() {
                    let _ = write!(text, "\n{name} {}: {}", metric.key(), ratios.join(", "));
                }
            }
        }
        for (name, reason) in &self.absent {
            let _ = write!(text, "\nnot measured: {name}: {reason}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let measured = |values: &[f64]| {
            let mut measured = Measured::default();
            values
                .iter()
                .for_each(|value| measured.add(Metric::Run, *value));
            measured
        };
        Report {
            runs: 3,
            measured: vec![
                ("rt-container".to_owned(), measured(&[5.0, 4.0, 9.0])),
                ("crun".to_owned(), measured(&[10.0, 10.0, 8.0])),
            ],
            absent: vec![("runc".to_owned(), "exit status: 1".to_owned())],
        }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(
            Spread::of(&[4.0, 1.0, 3.0, 2.0]),
            Some(Spread {
                median: 2.5,
                min: 1.0,
                max: 4.0
            })
        );
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn ratios_are_of_medians_against_each_peer() {
        let json: Value = serde_json::from_str(&report().json()).unwrap();
        assert_eq!(json["runtimes"]["rt-container"]["run_ms"]["median"], 5.0);
        assert_eq!(
            json["runtimes"]["rt-container"]["run_ms"]["ratio"]["crun"],
            0.5
        );
        assert_eq!(json["absent"]["runc"], "exit status: 1");
    }

    #[test]
    fn the_table_names_figures_ratios_and_who_is_absent() {
        let table = report().table();
        for text in [
            "5.00 (4.00 to 9.00)",
            "rt-container run_ms: 0.50 of crun",
            "not measured: runc: exit status: 1",
        ] {
            assert!(table.contains(text), "{text} in {table}");
        }
    }
}
