//! What of the kernel a container reaches: system calls, security modules, parameters.

use std::collections::BTreeSet;

use super::{ALLOW, FORBID, POD_SECURITY, RULE, Rule, Weakness, weakness_if};
use crate::verify::filter::{self, Call};
use crate::verify::posture::{Fact, Posture};

const SECCOMP_DOC: &str =
    "https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html";

/// The users and the role that SELinux's own policies give to containers.
const SELINUX_USERS: [&str; 2] = ["system_u", "unconfined_u"];
const SELINUX_ROLE: &str = "system_r";

pub(super) const SECCOMP: Rule = Rule {
    id: "seccomp",
    why: "every system call of the kernel is open to the container, and with it every hole in one",
    fix: "give a profile in linux.seccomp that allows what is needed, as the ones that docker and containerd bring",
    reference: SECCOMP_DOC,
    judge: |posture, _| {
        let Fact { at, value } = &posture.seccomp;
        let Some(filters) = value else {
            return Vec::new();
        };
        // A number that no kernel has: what is not known is to be refused.
        let unknown = Call::new(engine::AUDIT_ARCH_X86_64, 100_000);
        if filters.is_empty() {
            return vec![Weakness::new(at, "there is no seccomp filter")];
        }
        let is_open = filter::answer(filters, &unknown).lets_through();
        let at = default_place(posture);
        weakness_if(is_open, at, "the filter allows what it does not know")
    },
    ..RULE
};

pub(super) const SECCOMP_CALLS: Rule = Rule {
    id: "seccomp-calls",
    why: "the call has no use in a container, and has been a way out of one",
    fix: "take it out of linux.seccomp.syscalls, for every architecture",
    reference: SECCOMP_DOC,
    lists: FORBID,
    check: |setting| {
        let unknown = setting
            .forbid
            .iter()
            .find(|name| engine::syscall_numbers(name).is_empty());
        unknown.map_or(Ok(()), |name| {
            Err(format!("{name:?} is no system call of this machine"))
        })
    },
    judge: |posture, setting| {
        let filters = posture.seccomp.value.as_deref().unwrap_or_default();
        if filters.is_empty() {
            return Vec::new();
        }
        let forbidden = setting.forbid.iter().map(String::as_str);
        let mut open: Vec<&str> = forbidden
            .filter(|name| filter::may_let_through(filters, name))
            .collect();
        let told = |at: &str, names: &[&str]| {
            let what = format!("the filter allows {}", names.join(", "));
            weakness_if(!names.is_empty(), at, what)
        };
        let rules = posture.profile.iter().flat_map(|profile| &profile.rules);
        let mut weaknesses = Vec::new();
        let mut named = BTreeSet::new();
        for Fact { at, value } in rules {
            let names: Vec<&str> = open
                .iter()
                .filter(|name| value.contains(**name))
                .copied()
                .collect();
            weaknesses.extend(told(at, &names));
            named.extend(names);
        }
        open.retain(|name| !named.contains(name));
        weaknesses.extend(told(default_place(posture), &open));
        weaknesses
    },
};

pub(super) const SPECULATION: Rule = Rule {
    id: "speculation",
    why: "the filter turns a mitigation of Spectre off that it would bring: what a process guards, code in it may guess",
    fix: "remove SECCOMP_FILTER_FLAG_SPEC_ALLOW from linux.seccomp.flags",
    reference: "https://docs.kernel.org/userspace-api/spec_ctrl.html",
    judge: |posture, _| {
        let fact = &posture.speculates;
        weakness_if(
            fact.value,
            &fact.at,
            "speculative stores may be bypassed (SECCOMP_FILTER_FLAG_SPEC_ALLOW)",
        )
    },
    ..RULE
};

/// Where it is said what a filter answers to calls that it does not know.
fn default_place(posture: &Posture) -> &str {
    let profile = posture.profile.as_ref();
    profile.map_or(&posture.seccomp.at, |profile| &profile.default)
}

pub(super) const APPARMOR: Rule = Rule {
    id: "apparmor",
    why: "the profile takes AppArmor's wall away",
    fix: "name a profile in process.apparmorProfile, or leave the property out for the runtime's default",
    reference: POD_SECURITY,
    judge: |posture, _| {
        let fact = &posture.apparmor;
        // It may be said of a namespace: `:host:unconfined`, or as Kubernetes does: `localhost/unconfined`.
        let profile = fact.value.as_deref().unwrap_or_default().trim();
        let is_unconfined = profile.rsplit(['/', ':']).next() == Some("unconfined");
        weakness_if(is_unconfined, &fact.at, "\"unconfined\"")
    },
    ..RULE
};

pub(super) const SELINUX: Rule = Rule {
    id: "selinux",
    why: "another type than the containers' may do what the policy of the host lets that type do",
    fix: "give process.selinuxLabel a type for containers, and no user or role of its own",
    reference: POD_SECURITY,
    lists: ALLOW,
    judge: |posture, setting| {
        let fact = &posture.selinux;
        let Some(label) = fact.value.as_deref() else {
            return Vec::new();
        };
        let parts: Vec<&str> = label.splitn(4, ':').collect();
        let &[user, role, kind, ..] = parts.as_slice() else {
            let what = format!("{label:?} is not of the form user:role:type:level");
            return vec![Weakness::new(&fact.at, what)];
        };
        let is_kind = setting.allow.iter().any(|one| one == kind);
        [
            ("user", user, SELINUX_USERS.contains(&user)),
            ("role", role, role == SELINUX_ROLE),
            ("type", kind, is_kind),
        ]
        .into_iter()
        .filter(|(_, _, is_usual)| !is_usual)
        .map(|(part, value, _)| Weakness::new(&fact.at, format!("the {part} is {value:?}")))
        .collect()
    },
    ..RULE
};

pub(super) const SYSCTLS: Rule = Rule {
    id: "sysctls",
    why: "a kernel parameter can weaken the container's own network or IPC, or be the whole host's",
    fix: "remove it from linux.sysctl",
    reference: POD_SECURITY,
    lists: ALLOW,
    judge: |posture, setting| {
        posture
            .sysctls
            .iter()
            .filter(|fact| !setting.allow.contains(&fact.value))
            .map(|fact| Weakness::new(&fact.at, format!("{} is set", fact.value)))
            .collect()
    },
    ..RULE
};
