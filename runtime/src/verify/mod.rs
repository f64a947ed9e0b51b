//! `rt verify`: whether a bundle keeps a policy, before it runs, and whether the isolation of a running container is the
//! one that was asked for, from what the kernel says.
//!
//! The bundle and the container are hostile: they are looked at, never run, and what is quoted of them is made printable.
//! The policy and the host are trusted.

pub mod attack;
pub mod cli;
mod config;
mod conformance;
mod filter;
mod html;
mod jail;
mod lint;
mod live;
mod mount_data;
mod mount_table;
mod mounts;
mod objects;
mod paths;
pub mod policy;
mod posture;
mod processes;
mod report;
mod resources;
mod rules;
mod source;
mod syscalls;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::Path;

use engine::observation::Topic;
use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use serde::Serialize;

use crate::bundle::{BundleError, Draft};
use crate::error_chain;
use crate::id::{ContainerId, IdError};
use crate::isolation::Model;
use crate::lifecycle::{self, Lifecycle};

use attack::Attacker;
use conformance::{Comparison, Property};
use filter::Filter;
use policy::{Policy, PolicyError, Severity};
use posture::Posture;
use rules::{Rule, Weakness};

/// Why nothing could be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The policy cannot be used.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// There is no configuration to read.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// There is no such container.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The container does not run, or cannot be looked at.
    #[error(transparent)]
    Lifecycle(#[from] lifecycle::Error),
    /// The attacks could not be tried.
    #[error(transparent)]
    Attack(#[from] attack::AttackError),
    /// The process cannot be looked at.
    #[error("look at process {pid}")]
    Process {
        /// As given.
        pid: i32,
        /// Why.
        #[source]
        source: engine::Error,
    },
}

/// A rule that does not hold somewhere. The field names are those of the JSON, and stable.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// The rule's name.
    pub rule: &'static str,
    /// How much it counts under the policy.
    pub severity: Severity,
    /// The JSON path in `config.json`, or the file of the kernel.
    pub at: String,
    /// The line of `config.json` that has it, or what it is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// What is there.
    pub what: String,
    /// What can happen.
    pub why: &'static str,
    /// What to do.
    pub fix: &'static str,
    /// Where to read more.
    pub reference: &'static str,
}

/// What was found. The field names are those of the JSON, and stable.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Report {
    /// What was looked at: a file, a container or a process.
    pub subject: String,
    /// The policy's name, or the path of its file; none for attacks, which no policy allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Whether there is no finding that counts as an error, and no property that does not hold.
    pub holds: bool,
    /// How many properties could not be seen, of those that have to be.
    pub unseen: usize,
    /// What was asked for and what is there, of something that runs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub properties: Vec<Property>,
    /// The rules that were asked.
    pub rules: Vec<&'static str>,
    /// The worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// How many findings count so much.
    fn count(&self, severity: Severity) -> usize {
        let findings = self.findings.iter();
        findings.filter(|one| one.severity == severity).count()
    }
}

/// Looks at the bundle in `directory`.
///
/// # Errors
/// There is no configuration that can be read. One that is wrong is a finding.
pub fn bundle(directory: &Path, policy: &Policy) -> Result<Report, VerifyError> {
    let mut examination = Examination::new(policy);
    let path = match Draft::read(directory) {
        Ok(draft) => {
            examination.draft(&draft);
            draft.path
        }
        Err(error) => {
            let path = match &error {
                BundleError::Syntax { path, .. }
                | BundleError::Value { path, .. }
                | BundleError::Invalid { path, .. } => path.clone(),
                _ => return Err(error.into()),
            };
            examination.note(rules::SPECIFICATION, [weakness_of(&error)]);
            path
        }
    };
    Ok(examination.report(&path.to_string_lossy()))
}

/// Looks at a running container, and at the VMM process of a microVM.
///
/// # Errors
/// It does not run, or cannot be looked at.
pub fn container(
    lifecycle: &Lifecycle,
    id: &ContainerId,
    policy: &Policy,
) -> Result<Report, VerifyError> {
    let seen = lifecycle.observe(id)?;
    let mut examination = Examination::new(policy);
    let mut found = live::posture(&seen.observation);
    let asked = asked(&seen.bundle, &seen.spec);
    let compared = conformance::compare(&Comparison {
        spec: &seen.spec,
        asked: &asked,
        seen: &seen.observation,
        found: &found,
        is_in_guest: seen.isolation == Model::Microvm,
    });
    if seen.isolation == Model::Microvm {
        let vmm = engine::observation::observe(Pid::from_raw(seen.pid), &[], None);
        let vmm = vmm.map_err(|source| VerifyError::Process {
            pid: seen.pid,
            source,
        })?;
        let machine = live::posture(&vmm);
        examination.properties = jail::properties(&vmm, &machine, &seen.observation, &asked);
        // What the guest takes for the host is the guest; the host's paths are those that the machine was given.
        found.replace_sources(machine.mounts);
    }
    examination.properties.extend(compared);
    examination.judge(&found);
    Ok(examination.report(&format!("{} {id} (process {})", seen.isolation, seen.pid)))
}

/// Looks at the process `pid`, which any runtime may have made, from the configuration in `bundle`.
///
/// # Errors
/// It cannot be looked at, or the bundle is wrong.
pub fn process(pid: i32, bundle: Option<&Path>, policy: &Policy) -> Result<Report, VerifyError> {
    let draft = bundle.map(Draft::read).transpose()?;
    let spec = draft.as_ref().map(|draft| &draft.spec);
    let process = Pid::from_raw(pid);
    let (members, all) = engine::observation::companions(process);
    let mut seen = engine::observation::observe(process, &members, spec)
        .map_err(|source| VerifyError::Process { pid, source })?;
    if let Err(why) = all {
        seen.unseen.entry(Topic::Processes).or_insert(why);
    }
    let mut examination = Examination::new(policy);
    let found = live::posture(&seen);
    if let Some(draft) = draft {
        let asked = asked(&draft.dir, &draft.spec);
        examination.properties = conformance::compare(&Comparison {
            spec: &draft.spec,
            asked: &asked,
            seen: &seen,
            found: &found,
            is_in_guest: false,
        });
    } else {
        examination.properties = conformance::bounds(&seen);
    }
    examination.judge(&found);
    Ok(examination.report(&format!("process {pid}")))
}

/// Runs a hostile program in a container of each model.
///
/// # Errors
/// It cannot be run.
pub fn attacks(attacker: Attacker<'_>, models: &[Model]) -> Result<Report, VerifyError> {
    let properties = attack::attempt(attacker, models)?;
    let subject = attacker.bundle.map_or_else(
        || "a container that asks for little".to_owned(),
        |directory| directory.to_string_lossy().into_owned(),
    );
    Ok(Report {
        subject: printable(&format!("attacks from {subject}")),
        policy: None,
        holds: properties.iter().all(|one| one.holds != Some(false)),
        // An attack that could not be tried is none that got through.
        unseen: 0,
        properties: properties.into_iter().map(Property::printable).collect(),
        rules: Vec::new(),
        findings: Vec::new(),
    })
}

/// The posture that a running container's configuration asked for.
fn asked(directory: &Path, spec: &Spec) -> Posture {
    let linux = spec.linux().as_ref();
    let profile = linux.and_then(|linux| linux.seccomp().as_ref());
    // It was compiled when the container was made.
    let program = profile.and_then(|profile| engine::compile_seccomp(profile).ok());
    let filters = program.into_iter().map(Filter::new).collect();
    config::posture(directory, spec, filters)
}

/// Where the engine puts what it has against a configuration as a whole.
const WHOLE_FILE: &str = "config.json";
/// Where it puts that there is no AppArmor.
const APPARMOR_PROFILE: &str = "process.apparmorProfile";

/// Findings as they come.
struct Examination<'a> {
    policy: &'a Policy,
    /// The rules that were asked.
    asked: BTreeSet<&'static str>,
    properties: Vec<Property>,
    findings: Vec<Finding>,
}

impl<'a> Examination<'a> {
    fn new(policy: &'a Policy) -> Self {
        Self {
            policy,
            asked: BTreeSet::new(),
            properties: Vec::new(),
            findings: Vec::new(),
        }
    }

    fn draft(&mut self, draft: &Draft) {
        self.note(rules::NOT_ON_THIS_HOST, None);
        let mut wrong: Vec<Weakness> = Vec::new();
        match &draft.problem {
            Some(error) if is_of_the_host(error) => {
                self.note(rules::NOT_ON_THIS_HOST, [weakness_of(error)]);
            }
            problem => wrong.extend(problem.as_ref().map(weakness_of)),
        }
        for at in source::look(&draft.text, []).twice {
            let what = "it is given twice: one runtime takes the first, another the last";
            wrong.push(Weakness::new(at, what));
        }
        let mut known: HashSet<String> = wrong.iter().map(|one| one.at.clone()).collect();
        for one in lint::contradictions(&draft.json, &draft.spec) {
            if known.insert(one.at.clone()) {
                wrong.push(one);
            }
        }
        let is_wrong = !wrong.is_empty();
        self.note(rules::SPECIFICATION, wrong);
        self.note(
            rules::UNKNOWN_PROPERTY,
            lint::unknown_properties(&draft.json),
        );
        let mut refused = self.refusal(&draft.spec);
        let linux = draft.spec.linux().as_ref();
        let profile = linux.and_then(|linux| linux.seccomp().as_ref());
        let seccomp = match profile.map(engine::compile_seccomp) {
            None => Vec::new(),
            Some(Ok(program)) => vec![Filter::new(program)],
            Some(Err(error)) => {
                refused = refused.or(Some(error));
                // One that cannot be made lets nothing through.
                vec![Filter::new(Vec::new())]
            }
        };
        self.judge(&config::posture(&draft.dir, &draft.spec, seccomp));
        let refused = refused.and_then(|error| match error {
            // What is said of the whole file depends on what exists now, as a namespace's path.
            engine::Error::Unsupported { path, .. } if path == WHOLE_FILE => None,
            engine::Error::Unsupported { path, reason } => Some(Weakness::new(path, reason)),
            other => Some(Weakness::new(WHOLE_FILE, error_chain(&other))),
        });
        // What is found already need not be said twice; a text that is wrong is refused by everybody.
        let is_known = |one: &Weakness| self.findings.iter().any(|known| known.at == one.at);
        let refused = refused.filter(|one| !is_wrong && !is_known(one));
        self.note(rules::UNSUPPORTED, refused);
        let places = self.findings.iter().map(|one| one.at.as_str());
        let lines = source::look(&draft.text, places).lines;
        for one in &mut self.findings {
            one.line = lines.get(&one.at).copied();
        }
    }

    /// Why the engine refuses a configuration, other than for what this host lacks.
    fn refusal(&mut self, spec: &Spec) -> Option<engine::Error> {
        let error = engine::validate(spec).err()?;
        match error {
            // Only a host without AppArmor has something against a profile.
            engine::Error::Unsupported { path, reason } if path == APPARMOR_PROFILE => {
                self.note(rules::NOT_ON_THIS_HOST, [Weakness::new(path, reason)]);
                let mut spec = spec.clone();
                if let Some(process) = spec.process_mut() {
                    process.set_apparmor_profile(None);
                }
                engine::validate(&spec).err()
            }
            other => Some(other),
        }
    }

    fn judge(&mut self, posture: &Posture) {
        for rule in &rules::ALL {
            if let Some((_, setting)) = self.policy.setting(rule.id) {
                let weaknesses = (rule.judge)(posture, setting);
                self.note(rule.id, weaknesses);
            }
        }
    }

    fn note(&mut self, id: &str, weaknesses: impl IntoIterator<Item = Weakness>) {
        let Some((rule, (severity, _))) = rules::find(id).zip(self.policy.setting(id)) else {
            return;
        };
        let Rule {
            why,
            fix,
            reference,
            ..
        } = *rule;
        self.asked.insert(rule.id);
        let findings = weaknesses.into_iter().map(|one| Finding {
            rule: rule.id,
            severity,
            at: printable(&one.at),
            line: None,
            what: printable(&one.what),
            why,
            fix,
            reference,
        });
        self.findings.extend(findings);
    }

    fn report(mut self, subject: &str) -> Report {
        // Stable: within a severity in the order in which they were found, rule by rule.
        self.findings
            .sort_by_key(|one| std::cmp::Reverse(one.severity));
        let is_kept = self
            .findings
            .iter()
            .all(|one| one.severity != Severity::Error)
            && self.properties.iter().all(|one| one.holds != Some(false));
        Report {
            subject: printable(subject),
            policy: Some(self.policy.name.clone()),
            holds: is_kept,
            unseen: self
                .properties
                .iter()
                .filter(|one| jail::must_be_seen(one))
                .count(),
            rules: rules::ALL
                .iter()
                .map(|rule| rule.id)
                .filter(|id| self.asked.contains(id))
                .collect(),
            properties: self
                .properties
                .into_iter()
                .map(Property::printable)
                .collect(),
            findings: self.findings,
        }
    }
}

/// Whether a bundle may be right on the host that it is for: its root may be made or mounted there only.
fn is_of_the_host(error: &BundleError) -> bool {
    let is_absent = |source: &io::Error| source.kind() == io::ErrorKind::NotFound;
    matches!(error, BundleError::Rootfs { source, .. } if is_absent(source))
}

/// A bundle's error as its place and what is there.
fn weakness_of(error: &BundleError) -> Weakness {
    match error {
        BundleError::Value { at, source, .. } => Weakness::new(at, source.to_string()),
        BundleError::Missing { property, .. } => Weakness::new(*property, "it is missing"),
        BundleError::Invalid {
            property, problem, ..
        } => Weakness::new(*property, format!("it {problem}")),
        BundleError::Version { version, .. } => Weakness::new(
            "ociVersion",
            format!("{version:?}: versions 1.x are supported"),
        ),
        BundleError::Rootfs { rootfs, source, .. } => {
            Weakness::new("root.path", format!("{}: {source}", rootfs.display()))
        }
        BundleError::Syntax { source, .. } => {
            Weakness::new(".", format!("it is no JSON: {source}"))
        }
        other => Weakness::new(".", error_chain(other)),
    }
}

/// Control characters of a hostile bundle would be commands to a terminal, and are not allowed in XML; those that say in
/// which direction a text runs, or are not seen, would make it another.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        let is_format = matches!(
            character,
            '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{2069}' | '\u{FEFF}'
        );
        let is_safe =
            !character.is_control() && !is_format && !matches!(character, '\u{FFFE}' | '\u{FFFF}');
        if is_safe {
            printable.push(character);
        } else {
            printable.extend(character.escape_default());
        }
    }
    printable
}

#[cfg(test)]
mod tests;
