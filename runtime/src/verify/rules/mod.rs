//! The rules: what a container may give up of its isolation, why that matters, and what to do about it.
//!
//! A rule judges a [`Posture`] under the setting that a policy gives it, and knows nothing else; so it says the same of a
//! bundle and of a running container.

mod filesystem;
mod kernel;
mod resources;
mod rights;

use super::policy::Setting;
use super::posture::Posture;

/// A place where a rule does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weakness {
    /// The JSON path, or the file of the kernel.
    pub at: String,
    /// What is there.
    pub what: String,
}

impl Weakness {
    /// `what` at `at`.
    pub fn new(at: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            at: at.into(),
            what: what.into(),
        }
    }
}

/// What is found at a place where something is weak, and else nothing.
fn weakness_if(is_weak: bool, at: &str, what: impl Into<String>) -> Vec<Weakness> {
    is_weak
        .then(|| Weakness::new(at, what))
        .into_iter()
        .collect()
}

/// Which lists a rule's setting has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lists {
    /// `allow`: what passes.
    pub allow: bool,
    /// `forbid`: what does not.
    pub forbid: bool,
    /// `require`: what must be.
    pub require: bool,
}

const NO_LIST: Lists = Lists {
    allow: false,
    forbid: false,
    require: false,
};
const ALLOW: Lists = Lists {
    allow: true,
    ..NO_LIST
};
const FORBID: Lists = Lists {
    forbid: true,
    ..NO_LIST
};
const REQUIRE: Lists = Lists {
    require: true,
    ..NO_LIST
};

/// A rule.
#[derive(Debug)]
pub struct Rule {
    /// Its name in policies and reports; stable.
    pub id: &'static str,
    /// What can happen where it does not hold.
    pub why: &'static str,
    /// What to do.
    pub fix: &'static str,
    /// Where to read more.
    pub reference: &'static str,
    /// The lists of its setting.
    pub lists: Lists,
    /// Checks the lists' entries.
    pub check: fn(&Setting) -> Result<(), String>,
    /// Finds what does not hold.
    pub judge: fn(&Posture, &Setting) -> Vec<Weakness>,
}

/// Checks that each entry of a list is one, and names the first that is not.
fn each(list: &[String], what: &str, is_one: impl Fn(&str) -> bool) -> Result<(), String> {
    let wrong = list.iter().find(|entry| !is_one(entry));
    wrong.map_or(Ok(()), |entry| Err(format!("{entry:?} is not {what}")))
}

fn is_bare_name(entry: &str) -> bool {
    !entry.is_empty() && !entry.contains(['/', '\0'])
}

/// A rule without lists that finds nothing: a base for the others.
const RULE: Rule = Rule {
    id: "",
    why: "",
    fix: "",
    reference: "",
    lists: NO_LIST,
    check: |_| Ok(()),
    judge: |_, _| Vec::new(),
};

const POD_SECURITY: &str = "https://kubernetes.io/docs/concepts/security/pod-security-standards/";
const RUNTIME_SPEC: &str =
    "https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md";

/// What the text of a configuration breaks; found by [`super::lint`].
pub const SPECIFICATION: &str = "specification";
/// A property that is in no specification; found by [`super::lint`].
pub const UNKNOWN_PROPERTY: &str = "unknown-property";
/// What this runtime does not do; found by the engine.
pub const UNSUPPORTED: &str = "unsupported";
/// What is not there where the bundle is looked at, and may be where it will run; found by who loads it and the engine.
pub const NOT_ON_THIS_HOST: &str = "not-on-this-host";

/// Every rule, in the order of a report.
pub static ALL: [Rule; 39] = [
    Rule {
        id: SPECIFICATION,
        why: "a runtime refuses the bundle, or makes another container than was meant",
        fix: "correct the value; `rt spec` writes a configuration to begin with",
        reference: "https://github.com/opencontainers/runtime-spec/blob/main/config.md",
        ..RULE
    },
    Rule {
        id: UNKNOWN_PROPERTY,
        why: "runtimes ignore what they do not know: a misspelt property has no effect",
        fix: "correct its name, or remove it",
        reference: "https://github.com/opencontainers/runtime-spec/blob/main/config.md#extensibility",
        ..RULE
    },
    Rule {
        id: UNSUPPORTED,
        why: "rt refuses the bundle",
        fix: "leave it out, or run the bundle with a runtime that supports it",
        reference: RUNTIME_SPEC,
        ..RULE
    },
    Rule {
        id: NOT_ON_THIS_HOST,
        why: "rt refuses the bundle here; it may be right where it will run",
        fix: "look at the bundle on the host that it is for",
        reference: RUNTIME_SPEC,
        ..RULE
    },
    rights::HOST_NAMESPACES,
    rights::USER_NAMESPACE,
    rights::HOST_ROOT,
    rights::ROOT_USER,
    rights::ROOT_GROUP,
    rights::CAPABILITIES,
    rights::INHERITED_CAPABILITIES,
    rights::NEW_PRIVILEGES,
    kernel::SECCOMP,
    kernel::SECCOMP_CALLS,
    kernel::SPECULATION,
    kernel::APPARMOR,
    kernel::SELINUX,
    kernel::SYSCTLS,
    filesystem::MASKED_PATHS,
    filesystem::READ_ONLY_PATHS,
    filesystem::WRITABLE_SYSFS,
    filesystem::WRITABLE_CGROUPS,
    filesystem::HOST_PATHS,
    filesystem::WRITABLE_HOST_PATHS,
    filesystem::RUNTIME_SOCKETS,
    filesystem::MOUNT_TYPES,
    filesystem::MOUNT_PROPAGATION,
    filesystem::MOUNT_FLAGS,
    filesystem::WRITABLE_ROOT,
    resources::DEVICES,
    resources::INTERFACES,
    resources::MEMORY_LIMIT,
    resources::PIDS_LIMIT,
    resources::CPU_LIMIT,
    resources::REAL_TIME,
    resources::OOM_SCORE,
    resources::OOM_KILLER,
    resources::HOOKS,
    resources::OPEN_DESCRIPTORS,
];

/// The rule of this name.
pub fn find(id: &str) -> Option<&'static Rule> {
    ALL.iter().find(|rule| rule.id == id)
}
