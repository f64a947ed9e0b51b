//! `rt doctor`: whether this host can run each isolation model and, if not, what to do.
//!
//! It reads and tries, but changes nothing. A check that cannot be made is a warning that says so: the doctor itself
//! never fails. What it reads is the kernel's word and the administrator's files; both are trusted.

pub mod cli;
mod host;
mod kvm;

use serde::Serialize;

use crate::config::Config;
use crate::isolation::Model;

pub use kvm::Kvm;

/// How a check came out.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// The model runs, but something will be missing.
    Warn,
    /// The model cannot run.
    Fail,
}

/// One thing looked at. The field names are those of the JSON, and stable.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Check {
    /// What was looked at: a short word, stable.
    pub name: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            message: message.into(),
            advice: None,
        }
    }

    fn warn(name: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Warn,
            message: message.into(),
            advice: Some(advice.into()),
        }
    }

    fn fail(name: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Fail,
            message: message.into(),
            advice: Some(advice.into()),
        }
    }
}

/// What was found for one model.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Findings {
    /// Whether the model can run here.
    pub usable: bool,
    /// How KVM runs guests; for the microVM model only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm: Option<Kvm>,
    /// Everything looked at.
    pub checks: Vec<Check>,
}

impl Findings {
    fn new(kvm: Option<Kvm>, checks: Vec<Check>) -> Self {
        let usable = checks.iter().all(|check| check.status != Status::Fail);
        Self {
            usable,
            kvm,
            checks,
        }
    }
}

/// What was found for each model.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Report {
    /// The container model.
    pub container: Findings,
    /// The microVM model.
    pub microvm: Findings,
}

impl Report {
    /// Looks at this host.
    pub fn examine(config: &Config) -> Self {
        let container = vec![
            host::user(),
            host::capabilities(),
            host::cgroups(),
            host::namespaces(),
            host::user_namespaces(),
            host::seccomp(),
            host::overlay(),
            host::open_files(),
        ];
        let (kvm, kvm_check) = kvm::examine();
        let microvm = vec![
            kvm_check,
            host::root(),
            host::guest_kernel(&config.microvm),
            host::agent(&config.microvm),
            host::cgroups(),
            host::memory(config.microvm.memory_mib),
            host::huge_pages(),
            host::tun(),
            host::open_files(),
        ];
        Self {
            container: Findings::new(None, container),
            microvm: Findings::new(Some(kvm), microvm),
        }
    }

    /// What was found for `model`.
    pub fn of(&self, model: Model) -> &Findings {
        match model {
            Model::Container => &self.container,
            Model::Microvm => &self.microvm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_usable_unless_a_check_fails() {
        let ok = Check::ok("a", "fine");
        let warn = Check::warn("b", "so so", "do this");
        let fail = Check::fail("c", "no", "do that");
        assert!(Findings::new(None, vec![ok.clone(), warn.clone()]).usable);
        assert!(!Findings::new(None, vec![ok, warn, fail]).usable);
    }

    #[test]
    fn the_field_names_of_the_json_are_these() {
        let findings = Findings::new(
            Some(Kvm::Emulating),
            vec![Check::fail("kvm", "slow", "move")],
        );
        assert_eq!(
            serde_json::to_string(&findings).unwrap(),
            r#"{"usable":false,"kvm":"emulating","checks":[{"name":"kvm","status":"fail","message":"slow","advice":"move"}]}"#
        );
    }

    #[test]
    fn this_host_is_examined_without_a_panic_and_both_models_have_checks() {
        let report = Report::examine(&Config::default());
        for model in [Model::Container, Model::Microvm] {
            let findings = report.of(model);
            assert!(findings.checks.len() > 5);
            let advised = |check: &Check| check.status == Status::Ok || check.advice.is_some();
            assert!(findings.checks.iter().all(advised), "{findings:?}");
        }
        assert!(report.microvm.kvm.is_some());
    }
}
