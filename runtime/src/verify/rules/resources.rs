//! What a container may use up, which devices it has, and what runs for it outside.

use super::{ALLOW, RULE, RUNTIME_SPEC, Rule, Weakness, weakness_if};
use crate::verify::posture::{Devices, Fact};

const CGROUPS: &str = "https://docs.kernel.org/admin-guide/cgroup-v2.html";

pub(super) const DEVICES: Rule = Rule {
    id: "devices",
    why: "a device reaches past every file system and namespace: a disk holds the host's files, /dev/mem its memory",
    fix: "begin linux.resources.devices with {\"allow\": false, \"access\": \"rwm\"}, and allow no device but those that the \
          workload needs and may have",
    reference: RUNTIME_SPEC,
    lists: ALLOW,
    check: |setting| {
        setting
            .allow
            .iter()
            .try_for_each(|one| one.parse::<Devices>().map(drop))
    },
    judge: |posture, setting| {
        let allowed: Vec<Devices> = setting.allow.iter().flat_map(|one| one.parse()).collect();
        let is_allowed = |devices: &Devices| devices.are_among(&allowed);
        let rules = posture.devices.iter();
        let rules = rules
            .filter(|fact| !is_allowed(&fact.value))
            .map(|Fact { at, value }| {
                Weakness::new(at, format!("the devices {value} are allowed"))
            });
        let nodes = posture.nodes.iter();
        let nodes =
            nodes
                .filter(|fact| !is_allowed(&fact.value.device))
                .map(|Fact { at, value }| {
                    let path = value.path.display();
                    Weakness::new(at, format!("{path} is the device {}", value.device))
                });
        rules.chain(nodes).collect()
    },
};

pub(super) const INTERFACES: Rule = Rule {
    id: "network-interfaces",
    why: "the host loses the interface while the container runs, and the container is on whatever network it is on",
    fix: "leave linux.netDevices out, and connect the container by a pair of virtual interfaces",
    reference: RUNTIME_SPEC,
    judge: |posture, _| {
        let interfaces = posture.interfaces.iter();
        let what =
            |fact: &Fact<String>| format!("the interface {} of the host is moved", fact.value);
        interfaces
            .map(|fact| Weakness::new(&fact.at, what(fact)))
            .collect()
    },
    ..RULE
};

pub(super) const MEMORY_LIMIT: Rule = Rule {
    id: "memory-limit",
    why: "the container can use up the host's memory, and the kernel may then end other processes",
    fix: "set linux.resources.memory.limit",
    reference: CGROUPS,
    judge: |posture, _| without(&posture.memory_limit, "memory"),
    ..RULE
};

pub(super) const PIDS_LIMIT: Rule = Rule {
    id: "pids-limit",
    why: "a container that forks without end leaves the host no process ids",
    fix: "set linux.resources.pids.limit",
    reference: CGROUPS,
    judge: |posture, _| without(&posture.pids_limit, "the number of processes"),
    ..RULE
};

fn without(limit: &Fact<Option<u64>>, of: &str) -> Vec<Weakness> {
    weakness_if(
        limit.value.is_none(),
        &limit.at,
        format!("{of} is not limited"),
    )
}

pub(super) const CPU_LIMIT: Rule = Rule {
    id: "cpu-limit",
    why: "the container can take all processors whenever they are idle, and its share of them otherwise",
    fix: "set linux.resources.cpu.quota and period",
    reference: CGROUPS,
    judge: |posture, _| {
        let fact = &posture.has_cpu_limit;
        weakness_if(!fact.value, &fact.at, "processor time is not limited")
    },
    ..RULE
};

pub(super) const REAL_TIME: Rule = Rule {
    id: "real-time",
    why: "a real-time process goes before all of the host's others, and keeps them from running if it never waits",
    fix: "leave process.scheduler, process.ioPriority and the realtime properties of linux.resources.cpu out",
    reference: "https://man7.org/linux/man-pages/man7/sched.7.html",
    judge: |posture, _| {
        let facts = posture.real_time.iter();
        facts
            .map(|fact| Weakness::new(&fact.at, fact.value.as_str()))
            .collect()
    },
    ..RULE
};

pub(super) const OOM_SCORE: Rule = Rule {
    id: "oom-score",
    why: "where memory runs out, the kernel ends the host's own processes before those of the container",
    fix: "leave process.oomScoreAdj out, or set it to 0 or more",
    reference: "https://man7.org/linux/man-pages/man5/proc_pid_oom_score_adj.5.html",
    judge: |posture, _| {
        let fact = &posture.oom_score;
        weakness_if(
            fact.value < 0,
            &fact.at,
            format!("the score is {}", fact.value),
        )
    },
    ..RULE
};

pub(super) const OOM_KILLER: Rule = Rule {
    id: "oom-killer",
    why: "where its memory runs out the container hangs, with all that it holds; without a limit the host does",
    fix: "leave linux.resources.memory.disableOOMKiller out",
    reference: "https://docs.kernel.org/admin-guide/cgroup-v1/memory.html",
    judge: |posture, _| {
        let fact = &posture.has_no_oom_killer;
        weakness_if(fact.value, &fact.at, "the OOM killer is disabled")
    },
    ..RULE
};

pub(super) const HOOKS: Rule = Rule {
    id: "hooks",
    why: "a hook is a program that runs on the host with the runtime's rights: who writes the bundle chooses it",
    fix: "make sure that nobody but the administrator can write the bundle and the program",
    reference: "https://github.com/opencontainers/runtime-spec/blob/main/config.md#posix-platform-hooks",
    judge: |posture, _| {
        let hooks = posture.hooks.iter();
        hooks
            .map(|fact| Weakness::new(&fact.at, format!("{} runs on the host", fact.value)))
            .collect()
    },
    ..RULE
};

pub(super) const OPEN_DESCRIPTORS: Rule = Rule {
    id: "open-descriptors",
    why: "a file or directory outside the container's mounts that a process holds is a way out (CVE-2024-21626)",
    fix: "close the descriptor before the container is made, and end the process that has it",
    reference: "https://nvd.nist.gov/vuln/detail/CVE-2024-21626",
    judge: |posture, _| {
        let outside = posture.outside.iter();
        outside
            .map(|fact| Weakness::new(&fact.at, format!("{} is outside the container", fact.value)))
            .collect()
    },
    ..RULE
};
