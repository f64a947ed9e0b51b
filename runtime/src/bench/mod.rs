//! `rt bench`: what a container costs, in both isolation models and beside the runtimes on the PATH.
//!
//! Runtimes take turns, so that a machine whose speed drifts treats them alike; medians and ratios are what counts.
//! Each is used as a client uses it: by its command line, on a bundle with the default configuration, or a given one, and
//! the smallest program there is.

mod measure;
mod program;
mod report;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use oci_spec::runtime::Spec;
use serde_json::Value;
use tempfile::TempDir;

pub use report::Report;
use report::{Measured, Metric};

use crate::bundle::{self, BundleError};

/// Runtimes to compare with, if they are on the PATH.
const PEERS: &[&str] = &["crun", "runc"];

/// Measure what a container costs, beside the runtimes on the PATH
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Rounds; each runtime takes its turn in each.
    #[arg(long, short = 'n', default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Measure only the runtimes named so (`rt-container`, `rt-microvm`, `crun`, `runc`); may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Let each runtime have this many other containers meanwhile, created and not started.
    #[arg(long, value_name = "N", default_value_t = 0)]
    existing: u32,
    /// Measure with this configuration, a bundle's `config.json`, instead of the one that `rt spec` writes. The program,
    /// the root and the terminal are the benchmark's own.
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The bundles cannot be made.
    #[error("cannot prepare the bundles to measure with")]
    Prepare(#[source] io::Error),
    /// The configuration to measure with is none.
    #[error(transparent)]
    Spec(#[from] BundleError),
    /// A runtime worked at first and failed then.
    #[error("{runtime} failed in round {round} at {step}")]
    Failed {
        /// Its name.
        runtime: String,
        /// The round, from 1.
        round: u32,
        /// What it was to do.
        step: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// No runtime works here.
    #[error("no runtime can be measured here: {0}")]
    Nobody(String),
}

/// One of those who take turns.
#[derive(Debug)]
struct Contestant {
    name: String,
    program: PathBuf,
    flags: Vec<String>,
    root: PathBuf,
    measured: Measured,
}

/// The two bundles: one whose program ends at once, one whose program waits.
#[derive(Debug)]
struct Bundles {
    ends: PathBuf,
    waits: PathBuf,
}

/// Measures and prints.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &BenchArgs) -> Result<String, BenchError> {
    let dir = TempDir::with_prefix("rt-bench-").map_err(BenchError::Prepare)?;
    let own = env::current_exe().map_err(BenchError::Prepare)?;
    let spec = spec(args, &own, dir.path())?;
    let bundles = bundles(&spec, dir.path()).map_err(BenchError::Prepare)?;
    let mut contestants = Vec::new();
    let mut absent = Vec::new();
    for mut contestant in candidates(&own, dir.path(), &args.only) {
        // A turn that does not count: it warms the caches and shows who works here at all.
        match contestant.turn(&bundles, 0) {
            Ok(()) => {
                contestant.measured = Measured::default();
                contestants.push(contestant);
            }
            Err(error) => absent.push((contestant.name.clone(), crate::error_chain(&error))),
        }
    }
    if contestants.is_empty() {
        let reasons: Vec<String> = absent
            .iter()
            .map(|(name, reason)| format!("{name}: {reason}"))
            .collect();
        return Err(BenchError::Nobody(reasons.join("; ")));
    }
    let outcome = take_rounds(args, &mut contestants, &bundles);
    for contestant in &contestants {
        contestant.remove_others(args.existing);
    }
    outcome?;
    let measured = contestants
        .into_iter()
        .map(|contestant| (contestant.name, contestant.measured))
        .collect();
    let report = Report {
        runs: args.runs,
        measured,
        absent,
    };
    Ok(if args.json {
        report.json()
    } else {
        report.table()
    })
}

fn take_rounds(
    args: &BenchArgs,
    contestants: &mut [Contestant],
    bundles: &Bundles,
) -> Result<(), BenchError> {
    for contestant in contestants.iter() {
        contestant.make_others(&bundles.waits, args.existing)?;
    }
    for round in 1..=args.runs {
        for contestant in contestants.iter_mut() {
            contestant.turn(bundles, round)?;
        }
    }
    Ok(())
}

fn candidates(own: &Path, dir: &Path, only: &[String]) -> Vec<Contestant> {
    let contestant = |name: &str, program: PathBuf, flags: &[&str]| Contestant {
        name: name.to_owned(),
        program,
        flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        root: dir.join(format!("root-{name}")),
        measured: Measured::default(),
    };
    let mut all = vec![
        contestant(
            "rt-container",
            own.to_owned(),
            &["--isolation", "container"],
        ),
        contestant("rt-microvm", own.to_owned(), &["--isolation", "microvm"]),
    ];
    for peer in PEERS {
        let found = env::var_os("PATH").and_then(|path| {
            env::split_paths(&path)
                .map(|dir| dir.join(peer))
                .find(|path| path.is_file())
        });
        all.extend(found.map(|program| contestant(peer, program, &[])));
    }
    all.retain(|contestant| only.is_empty() || only.contains(&contestant.name));
    all
}

/// The configuration that all bundles have.
fn spec(args: &BenchArgs, own: &Path, dir: &Path) -> Result<Spec, BenchError> {
    let path = match &args.spec {
        Some(path) => fs::canonicalize(path).map_err(|source| BundleError::Read {
            path: path.clone(),
            source,
        })?,
        None => {
            measure::run(Command::new(own).args(["spec", "--bundle"]).arg(dir))
                .map_err(BenchError::Prepare)?;
            dir.join("config.json")
        }
    };
    let (mut spec, _) = bundle::load_config(&path)?;
    // crun before 1.9 refuses a newer one.
    spec.set_version("1.0.2".to_owned());
    let process = spec.process_mut().get_or_insert_default();
    process
        .set_terminal(Some(false))
        .set_args(Some(vec!["/bin/program".to_owned()]));
    let root = spec.root_mut().get_or_insert_default();
    root.set_path("rootfs".into()).set_readonly(Some(false));
    Ok(spec)
}

fn bundles(spec: &Spec, dir: &Path) -> io::Result<Bundles> {
    let make = |name: &str, program: Vec<u8>| -> io::Result<PathBuf> {
        let bundle = dir.join(name);
        let bin = bundle.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        fs::write(bundle.join("config.json"), serde_json::to_vec(spec)?)?;
        for (name, program) in [("program", program), ("true", program::succeed())] {
            fs::write(bin.join(name), program)?;
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755))?;
        }
        Ok(bundle)
    };
    Ok(Bundles {
        ends: make("ends", program::succeed())?,
        waits: make("waits", program::wait())?,
    })
}

fn other_id(number: u32) -> String {
    format!("rt-bench-{}-other-{number}", std::process::id())
}

impl Contestant {
    /// Containers that are there and do nothing.
    fn make_others(&self, bundle: &Path, count: u32) -> Result<(), BenchError> {
        for number in 0..count {
            let mut command = self.command(&["create", "--bundle"]);
            let made = measure::run(command.arg(bundle).arg(other_id(number)));
            made.map_err(|source| BenchError::Failed {
                runtime: self.name.clone(),
                round: 0,
                step: "create",
                source,
            })?;
        }
        Ok(())
    }

    fn remove_others(&self, count: u32) {
        for number in 0..count {
            // What was never made is no error with force, and what cannot be removed none of the figures'.
            let _ = measure::run(&mut self.command(&["delete", "--force", &other_id(number)]));
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--root")
            .arg(&self.root)
            .args(&self.flags)
            .args(args);
        command
    }

    /// One container run to its end, and one taken through its life step by step.
    fn turn(&mut self, bundles: &Bundles, round: u32) -> Result<(), BenchError> {
        let id = format!("rt-bench-{}-{round}", std::process::id());
        let failed = |name: &str, step| {
            let runtime = name.to_owned();
            move |source| BenchError::Failed {
                runtime,
                round,
                step,
                source,
            }
        };
        let usage = measure::run_to_output(
            self.command(&["run", "--bundle"])
                .arg(&bundles.ends)
                .arg(&id),
        )
        .map_err(failed(&self.name, "run"))?;
        self.measured
            .add(Metric::Run, usage.wall.as_secs_f64() * 1e3);
        if let Some(first) = usage.first_output {
            self.measured
                .add(Metric::Workload, first.as_secs_f64() * 1e3);
        }
        self.measured
            .add(Metric::RunCpu, usage.cpu.as_secs_f64() * 1e3);
        self.measured
            .add(Metric::RunPeak, usage.peak_kib as f64 / 1024.0);

        let life = self.life(&bundles.waits, &id);
        let removed = measure::run(&mut self.command(&["delete", "--force", &id]));
        let (created, started) = life.map_err(|(step, source)| failed(&self.name, step)(source))?;
        let removed = removed.map_err(failed(&self.name, "delete"))?;
        self.measured.add(
            Metric::CreateToStart,
            (created.wall + started.wall).as_secs_f64() * 1e3,
        );
        self.measured
            .add(Metric::Delete, removed.wall.as_secs_f64() * 1e3);
        Ok(())
    }

    fn life(
        &mut self,
        bundle: &Path,
        id: &str,
    ) -> Result<(measure::Usage, measure::Usage), (&'static str, io::Error)> {
        let at = |step| move |error| (step, error);
        let created = measure::run(self.command(&["create", "--bundle"]).arg(bundle).arg(id))
            .map_err(at("create"))?;
        let started = measure::run(&mut self.command(&["start", id])).map_err(at("start"))?;
        let exec =
            measure::run(&mut self.command(&["exec", id, "/bin/true"])).map_err(at("exec"))?;
        self.measured
            .add(Metric::Exec, exec.wall.as_secs_f64() * 1e3);
        let state = measure::run(&mut self.command(&["state", id])).map_err(at("state"))?;
        self.measured
            .add(Metric::State, state.wall.as_secs_f64() * 1e3);
        self.look_at_memory(id).map_err(at("state"))?;
        self.look_at_boot(id);
        let killed = measure::run(&mut self.command(&["kill", id, "CONT"])).map_err(at("kill"))?;
        self.measured
            .add(Metric::Kill, killed.wall.as_secs_f64() * 1e3);
        Ok((created, started))
    }

    fn look_at_memory(&mut self, id: &str) -> io::Result<()> {
        let output = self.command(&["state", id]).output()?;
        let state: Value = serde_json::from_slice(&output.stdout)?;
        let pid = state["pid"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or(0);
        let resident = measure::resident(pid)?;
        self.measured
            .add(Metric::Resident, resident.total_kib as f64 / 1024.0);
        if self.name == "rt-microvm" {
            let beside = resident.total_kib - resident.largest_mapping_kib;
            self.measured
                .add(Metric::BesideGuest, beside as f64 / 1024.0);
        }
        Ok(())
    }

    /// What the VMM noted of its guest's boot. A container has none.
    fn look_at_boot(&mut self, id: &str) {
        let Ok(text) = fs::read(self.root.join(id).join("vm/boot.json")) else {
            return;
        };
        let Ok(boot) = serde_json::from_slice::<BTreeMap<String, Option<f64>>>(&text) else {
            return;
        };
        for (key, metric) in [
            ("loaded_ms", Metric::Loaded),
            ("agent_ms", Metric::Agent),
            ("created_ms", Metric::Created),
            ("exits_to_agent", Metric::ExitsToAgent),
            ("exits_to_created", Metric::ExitsToCreated),
        ] {
            if let Some(value) = boot.get(key).copied().flatten() {
                self.measured.add(metric, value);
            }
        }
    }
}
