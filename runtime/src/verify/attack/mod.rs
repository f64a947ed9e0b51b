//! `rt verify --attack`: a hostile program runs in a container of each isolation model, and tries to get out.
//!
//! What it tries is real: the calls that attackers of containers make, and a bait on this host that only who is out can
//! reach. Where an attempt would do harm it stops at the door: a file is opened for writing and not written, a module
//! handed over that is none. What the program says comes from inside, and in a microVM from behind a hostile kernel: an
//! attempt of which nothing is heard counts as one that cannot be seen, never as stopped.

mod bait;
mod interruption;
pub mod program;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::conformance::{BY_THE_MACHINE, Property};
use super::filter::{self, Call, Filter};
use super::posture::Posture;
use super::{VerifyError, asked};
use crate::bundle::{Bundle, CONFIG_FILE};
use crate::isolation::Model;
use crate::process::PidFd;
use bait::Bait;
use interruption::Interruption;

/// How long all attempts in one model may take.
const LIMIT: Duration = Duration::from_secs(300);

/// An attempt.
#[derive(Clone, Copy, Debug)]
pub struct Attack {
    /// Its name; stable.
    pub id: &'static str,
    /// What is tried.
    pub what: &'static str,
    /// The system call that it takes, if a filter may stop it.
    call: Option<&'static str>,
    /// The capability that it takes.
    capability: Option<&'static str>,
    /// What it takes of a share that a limit may bound.
    takes: Option<Share>,
    /// What stops it if nothing before does.
    wall: &'static str,
    /// The attempt.
    run: program::Attempt,
}

/// A share of a container, with how much of it an attempt takes.
#[derive(Clone, Copy, Debug)]
enum Share {
    Processes(u64),
    Memory(u64),
}

impl Share {
    /// The limit that it was too little for, if one was asked for.
    fn limit_above(self, asked: &Posture) -> Option<u64> {
        let (taken, limit) = match self {
            Self::Processes(count) => (count, asked.pids_limit.value),
            Self::Memory(bytes) => (bytes, asked.memory_limit.value),
        };
        limit.filter(|limit| *limit > taken)
    }
}

/// What became of an attempt, as the program inside says.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It failed, with an errno's name or a signal's.
    Stopped(String),
    /// It got hold of the kernel that runs the container.
    Kernel(String),
    /// It got hold of something on this host.
    Host(String),
    /// It cannot be tried here.
    Untried(String),
    /// It took so much without meeting the limit that there is.
    Bounded(String),
}

/// A line of the program's output.
#[derive(Debug, Deserialize, Serialize)]
struct Line {
    attack: String,
    outcome: Outcome,
}

/// Why the attacks could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum AttackError {
    /// The container for them cannot be prepared.
    #[error("prepare the attacks")]
    Prepare(#[from] io::Error),
    /// Its configuration cannot be written.
    #[error("write the attacker's configuration")]
    Encode(#[from] serde_json::Error),
    /// The container does not run.
    #[error("the attacker does not run as a {model}: {reason}")]
    Run {
        /// The model.
        model: Model,
        /// What `rt` said.
        reason: String,
    },
    /// A signal came that is to end this process.
    #[error("the attacks were interrupted")]
    Interrupted,
}

/// What the attacks are tried from.
#[derive(Clone, Copy, Debug)]
pub struct Attacker<'a> {
    /// The bundle whose rights it has; none: those of a container that asks for little.
    pub bundle: Option<&'a Path>,
    /// The configuration that such a container is made from.
    pub base: &'a Value,
    /// The administrator's configuration, if it is not at the default place.
    pub config: Option<&'a Path>,
}

/// Tries all attacks in containers of the given models.
///
/// A signal that ends this process does so when nothing of them is left.
///
/// # Errors
/// The container does not run.
pub fn attempt(attacker: Attacker<'_>, models: &[Model]) -> Result<Vec<Property>, VerifyError> {
    let interruption = Interruption::hold().map_err(AttackError::from)?;
    let mut properties = Vec::new();
    for model in models {
        properties.extend(in_model(attacker, *model, &interruption)?);
    }
    Ok(properties)
}

fn in_model(
    attacker: Attacker<'_>,
    model: Model,
    interruption: &Interruption,
) -> Result<Vec<Property>, VerifyError> {
    let place = tempfile::Builder::new()
        .prefix("rt-attack-")
        .tempdir()
        .map_err(AttackError::from)?;
    let bait = Bait::lay(place.path()).map_err(AttackError::from)?;
    let bundle = prepare(place.path(), attacker, &bait)?;
    let loaded = Bundle::load(&bundle)?;
    let asked = asked(loaded.dir(), loaded.spec());
    let outcomes = run(place.path(), &bundle, attacker.config, model, interruption)?;
    let filters = asked.seccomp.value.clone().unwrap_or_default();
    let property = |attack: &Attack| {
        let outcome = outcomes.get(attack.id);
        let (found, holds) = verdict(attack, outcome, model, &asked, &filters);
        Property {
            name: attack.id.to_owned(),
            model: Some(model),
            asked: format!("not to {}", attack.what),
            found,
            holds,
            at: format!("an attempt in a {model}"),
        }
    };
    Ok(program::ATTACKS.iter().map(property).collect())
}

/// What an attempt came to, and whether it was stopped.
fn verdict(
    attack: &Attack,
    outcome: Option<&Outcome>,
    model: Model,
    asked: &Posture,
    filters: &[Filter],
) -> (String, Option<bool>) {
    match outcome {
        None => ("nothing was heard of it".to_owned(), None),
        Some(Outcome::Untried(why)) => (format!("not tried: {why}"), None),
        Some(Outcome::Host(what)) => (format!("GOT OUT: {what}"), Some(false)),
        Some(Outcome::Bounded(what)) => (format!("its limit was not reached: {what}"), None),
        // Behind a machine's wall a kernel is the guest's.
        Some(Outcome::Kernel(what)) if model == Model::Microvm => (
            format!("{BY_THE_MACHINE}: {what}, of the guest alone"),
            Some(true),
        ),
        Some(Outcome::Kernel(what)) => {
            match attack.takes.and_then(|share| share.limit_above(asked)) {
                Some(limit) => (format!("its limit was not reached: {limit}"), None),
                None => (format!("GOT IN: {what}"), Some(false)),
            }
        }
        Some(Outcome::Stopped(error)) => {
            let wall = wall(attack, error, asked, filters);
            (format!("stopped by {wall} ({error})"), Some(true))
        }
    }
}

/// The first wall that stops an attempt, in the order in which the kernel asks them.
fn wall<'a>(attack: &Attack, error: &str, asked: &Posture, filters: &[Filter]) -> &'a str {
    let is_filtered = attack.call.is_some_and(|name| {
        let mut numbers = engine::syscall_numbers(name).into_iter();
        numbers.next().is_some_and(|(architecture, number)| {
            let mut call = Call::new(architecture, number);
            call.arguments = [u64::MAX; 6];
            !filter::answer(filters, &call).lets_through()
        })
    });
    let effective = asked.capabilities.get("effective");
    let lacks = |name: &str| effective.is_none_or(|fact| !fact.value.contains(name));
    if is_filtered || error == "SIGSYS" {
        "the seccomp filter"
    } else if attack.wall == program::NAMESPACE && matches!(error, "ESRCH" | "ENOENT") {
        attack.wall
    } else if error == "EROFS" {
        "a read-only mount"
    } else if matches!(
        error,
        "ENOENT" | "ENXIO" | "ENODEV" | "ENOSYS" | "EAFNOSUPPORT"
    ) {
        "its absence"
    } else if attack.capability.is_some_and(lacks) {
        "the want of a capability"
    } else {
        attack.wall
    }
}

/// Makes the bundle: the attacker's rights, and a root file system with nothing but the attacker.
fn prepare(place: &Path, attacker: Attacker<'_>, bait: &Bait) -> Result<PathBuf, VerifyError> {
    let bundle = place.join("bundle");
    let rootfs = bundle.join("rootfs");
    let prepared = || -> io::Result<()> {
        for name in ["proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(rootfs.join(name))?;
        }
        fs::copy(engine::own_path()?, rootfs.join(program::NAME))?;
        fs::set_permissions(
            rootfs.join(program::NAME),
            fs::Permissions::from_mode(0o755),
        )?;
        // Ordinary users of the container go through it, and write to its /tmp.
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777))
    };
    prepared().map_err(AttackError::from)?;
    let mut config = match attacker.bundle {
        Some(directory) => {
            let loaded = Bundle::load(directory)?;
            serde_json::to_value(loaded.spec()).map_err(AttackError::from)?
        }
        None => {
            let mut config = attacker.base.clone();
            confine(&mut config);
            config
        }
    };
    let environment = serde_json::to_string(bait.told()).map_err(AttackError::from)?;
    config["root"]["path"] = json!("rootfs");
    config["process"]["args"] = json!([format!("/{}", program::NAME)]);
    config["process"]["terminal"] = json!(false);
    config["process"]["cwd"] = json!("/");
    config["process"]["env"] = json!([format!("{}={environment}", program::BAIT)]);
    let volumes = Bait::volumes(place).into_iter().zip(program::VOLUMES);
    let volumes = volumes.map(|(source, destination)| {
        json!({
            "destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate"]
        })
    });
    match &mut config["mounts"] {
        Value::Array(mounts) => mounts.extend(volumes),
        none => *none = volumes.collect(),
    }
    if let Some(config) = config.as_object_mut() {
        // Others' programs are not run, and the cgroup is nobody else's.
        config.shift_remove("hooks");
        if let Some(linux) = config.get_mut("linux").and_then(Value::as_object_mut) {
            linux.shift_remove("cgroupsPath");
        }
    }
    let text = serde_json::to_vec_pretty(&config).map_err(AttackError::from)?;
    fs::write(bundle.join(CONFIG_FILE), text).map_err(AttackError::from)?;
    Ok(bundle)
}

/// What a container that asks for little asks for: limits, and a filter without what no workload needs.
fn confine(config: &mut Value) {
    let mounts = config["mounts"].as_array_mut().into_iter().flatten();
    for terminals in mounts.filter(|mount| mount["type"] == "devpts") {
        if let Some(options) = terminals["options"].as_array_mut() {
            options.push(json!(format!("max={}", program::TERMINALS / 2)));
        }
    }
    config["linux"]["resources"]["pids"] = json!({"limit": program::PROCESSES / 2});
    config["linux"]["resources"]["memory"] = json!({"limit": program::MEMORY / 2});
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{
            "action": "SCMP_ACT_ERRNO",
            "names": [
                "acct", "add_key", "bpf", "clock_settime", "delete_module", "finit_module", "init_module",
                "io_uring_enter", "io_uring_register", "io_uring_setup", "iopl", "ioperm", "kexec_file_load",
                "kexec_load", "keyctl", "open_by_handle_at", "perf_event_open", "quotactl", "reboot", "request_key",
                "settimeofday", "swapoff", "swapon", "userfaultfd"
            ]
        }]
    });
}

/// Runs the attacker, and gives what it says of each attack.
fn run(
    place: &Path,
    bundle: &Path,
    config: Option<&Path>,
    model: Model,
    interruption: &Interruption,
) -> Result<BTreeMap<String, Outcome>, AttackError> {
    let id = format!("rt-attack-{}", std::process::id());
    let rt = || -> io::Result<Command> {
        let mut rt = Command::new(engine::own_path()?);
        rt.arg("--root").arg(place.join("state"));
        if let Some(config) = config {
            rt.arg("--config").arg(config);
        }
        Ok(rt)
    };
    let out = place.join("out");
    let errors = place.join("errors");
    let mut command = rt()?;
    command.args(["--isolation", &model.to_string(), "run", "--bundle"]);
    command.arg(bundle).arg(&id).stdin(Stdio::null());
    command
        .stdout(fs::File::create(&out)?)
        .stderr(fs::File::create(&errors)?);
    let mut child = command.spawn()?;
    let interrupted = PidFd::open(child.id() as i32)
        .and_then(|fd| interruption.comes_before_the_end_of(&fd, LIMIT));
    // Whatever became of it, nothing of it stays: first goes who may still be making it.
    let _ = child.kill();
    let _ = child.wait();
    let _ = rt()?
        .args(["delete", "--force", &id])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if interrupted? {
        return Err(AttackError::Interrupted);
    }
    let text = fs::read(&out)?;
    let outcomes: BTreeMap<String, Outcome> = String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .map(|line| (line.attack, line.outcome))
        .collect();
    if outcomes.is_empty() {
        let reason = fs::read(&errors)?;
        let reason = String::from_utf8_lossy(&reason).trim().to_owned();
        return Err(AttackError::Run { model, reason });
    }
    Ok(outcomes)
}

/// Writes a line of the program's output.
fn tell(attack: &str, outcome: Outcome) {
    let line = Line {
        attack: attack.to_owned(),
        outcome,
    };
    if let Ok(line) = serde_json::to_string(&line) {
        let mut out = io::stdout().lock();
        let _ = writeln!(out, "{line}");
        let _ = out.flush();
    }
}
