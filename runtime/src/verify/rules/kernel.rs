//! What of the kernel a container reaches: system calls, security modules, parameters.

use super::{ALLOW, FORBID, POD_SECURITY, RULE, Rule, Weakness, weakness_if};
use crate::verify::filter::{self, Call};
use crate::verify::posture::Fact;

const SECCOMP_DOC: &str =
    "https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html";

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
        let what = if filters.is_empty() {
            "there is no seccomp filter"
        } else if filter::answer(filters, &unknown).lets_through() {
            "the filter allows what it does not know"
        } else {
            return Vec::new();
        };
        vec![Weakness::new(at, what)]
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
        let Fact { at, value } = &posture.seccomp;
        let filters = value.as_deref().unwrap_or_default();
        if filters.is_empty() {
            return Vec::new();
        }
        let open: Vec<&str> = setting
            .forbid
            .iter()
            .filter(|name| filter::lets_through(filters, name, &[0, u64::MAX]))
            .map(String::as_str)
            .collect();
        if open.is_empty() {
            return Vec::new();
        }
        vec![Weakness::new(
            at,
            format!("the filter allows {}", open.join(", ")),
        )]
    },
};

pub(super) const APPARMOR: Rule = Rule {
    id: "apparmor",
    why: "the profile takes AppArmor's wall away",
    fix: "name a profile in process.apparmorProfile, or leave the property out for the runtime's default",
    reference: POD_SECURITY,
    judge: |posture, _| {
        let fact = &posture.apparmor;
        let is_unconfined = fact.value.as_deref() == Some("unconfined");
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
        let kind = fact
            .value
            .as_deref()
            .and_then(|label| label.split(':').nth(2));
        kind.filter(|kind| !setting.allow.iter().any(|one| one == kind))
            .map(|kind| Weakness::new(&fact.at, format!("the type is {kind}")))
            .into_iter()
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
