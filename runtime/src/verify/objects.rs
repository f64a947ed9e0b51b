//! Objects of the kernel that a container's processes hold, and of which nobody tells who made them: a bpf program, an
//! io_uring, a namespace. Who has one does with it what its maker might.
//!
//! What the container's rights keep it from making came in from outside; what it may make is taken for its own, but for
//! namespaces, in which nothing is looked at.

use engine::observation::{Needs, Observation, Outside, needs};

use super::filter::{self, Filter};
use super::live;
use super::posture::{Devices, Posture};

/// Whose an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maker {
    /// Nobody in the container could make it.
    Other,
    /// It may be its own.
    Itself,
    /// It may be its own, and what is in it is not looked at.
    Unseen,
}

/// The objects that are held, and whose each is. `found` is the posture of what was seen.
pub(super) fn of<'a>(
    seen: &'a Observation,
    found: &Posture,
) -> impl Iterator<Item = (&'a Outside, Maker)> {
    let first = found.seccomp.value.as_deref().unwrap_or_default().to_vec();
    let others = seen.other_filters.iter().map(|one| {
        let filters = one.filters.as_deref().unwrap_or_default();
        filters.iter().map(|one| live::filter_of(one)).collect()
    });
    let all: Vec<Vec<Filter>> = [first].into_iter().chain(others).collect();
    let has_one_of = |names: &[&str]| {
        let mut sets = found.capabilities.values();
        found.capabilities.is_empty()
            || sets.any(|set| names.iter().any(|name| set.value.contains(*name)))
    };
    let has_bpf = has_one_of(&["CAP_BPF", "CAP_SYS_ADMIN"]);
    // Without the capability a user namespace has to come first.
    let namespaces = match has_one_of(&["CAP_SYS_ADMIN"]) {
        true => &NAMESPACES[..],
        false => &NAMESPACES[..1],
    };
    let has_users = found.user_ids.value.is_some();
    let devices: Vec<Devices> = found.devices.iter().map(|one| one.value.clone()).collect();
    seen.objects.iter().map(move |object| {
        // One that is not known is a guest's word.
        let needs = needs(&object.target).unwrap_or(Needs::Namespaces);
        // Without a filter there is no call that is refused, and of one that is not known nothing is.
        let may_call = |name: &str| {
            let mut threads = all.iter();
            threads.any(|filters| filter::may_let_through(filters, name))
        };
        let may_make = match needs {
            Needs::Call(name) => may_call(name),
            Needs::Bpf => has_bpf && !has_users && may_call("bpf"),
            Needs::Device(device) => {
                let device = device.parse::<Devices>();
                devices.is_empty()
                    || device.is_ok_and(|device| {
                        // Everybody may make the node; it takes more to open it.
                        let may_open = |one: &Devices| {
                            one.cover_numbers(&device) && one.access.contains(['r', 'w'])
                        };
                        devices.iter().any(may_open)
                    })
            }
            Needs::Namespaces => {
                let mut threads = all.iter();
                may_call("unshare")
                    || may_call("clone3")
                    || threads.any(|filters| filter::lets_through(filters, "clone", namespaces))
            }
        };
        let maker = match (may_make, needs) {
            (false, _) => Maker::Other,
            (true, Needs::Namespaces) => Maker::Unseen,
            (true, _) => Maker::Itself,
        };
        (object, maker)
    })
}

/// Flags of clone(2), each of which makes a namespace; the first one needs no capability.
const NAMESPACES: [u64; 7] = [
    libc::CLONE_NEWUSER as u64,
    libc::CLONE_NEWCGROUP as u64,
    libc::CLONE_NEWIPC as u64,
    libc::CLONE_NEWNET as u64,
    libc::CLONE_NEWNS as u64,
    libc::CLONE_NEWPID as u64,
    libc::CLONE_NEWUTS as u64,
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::verify::live::tests::observation;

    /// Whose an object is in a container with this profile and these devices.
    fn maker(target: &str, refused: &[&str], change: impl Fn(&mut Observation)) -> Maker {
        let mut seen = observation();
        for thread in &mut seen.threads {
            thread.status = thread.status.replace("8000000000000401", "401");
        }
        let profile = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": refused, "action": "SCMP_ACT_ERRNO"}]
        });
        let profile = serde_json::from_value(profile).unwrap();
        let program = engine::compile_seccomp(&profile).unwrap().into_iter();
        let program =
            program.map(|one| engine::observation::Instruction(one.code, one.jt, one.jf, one.k));
        seen.seccomp = Ok(vec![program.collect()]);
        seen.objects.push(Outside {
            at: "/proc/7/fd/5".to_owned(),
            target: target.to_owned(),
        });
        change(&mut seen);
        of(&seen, &live::posture(&seen)).next().unwrap().1
    }

    #[test]
    fn what_the_rights_keep_a_container_from_making_is_not_its_own() {
        for (target, call) in [
            ("anon_inode:[io_uring]", "io_uring_setup"),
            ("anon_inode:[perf_event]", "perf_event_open"),
            ("anon_inode:[userfaultfd]", "userfaultfd"),
            ("anon_inode:[fanotify]", "fanotify_init"),
            ("anon_inode:[fscontext]", "fsopen"),
            ("anon_inode:seccomp notify", "seccomp"),
        ] {
            assert_eq!(maker(target, &[call], |_| ()), Maker::Other, "{target}");
            assert_eq!(maker(target, &["bpf"], |_| ()), Maker::Itself, "{target}");
        }
        let host_users = |seen: &mut Observation| {
            let users = seen.namespaces.get_mut("user").unwrap();
            users.own = users.host[0];
        };
        let with_bpf = |seen: &mut Observation| {
            host_users(seen);
            let status = &mut seen.threads[0].status;
            *status = status.replace("CapBnd:\t0000000000000401", "CapBnd:\t0000008000000000");
        };
        let prog = "anon_inode:bpf-prog";
        assert_eq!(maker(prog, &["reboot"], host_users), Maker::Other);
        assert_eq!(maker(prog, &["reboot"], with_bpf), Maker::Itself);
        assert_eq!(maker(prog, &["bpf"], with_bpf), Maker::Other);
        let vm = "anon_inode:kvm-vm";
        assert_eq!(maker(vm, &["reboot"], |_| ()), Maker::Other);
        let with_kvm = |seen: &mut Observation| seen.devices = Ok(vec!["c 10:232 rwm".to_owned()]);
        assert_eq!(maker(vm, &["reboot"], with_kvm), Maker::Itself);
    }

    #[test]
    fn a_namespace_is_its_own_or_not_known() {
        let net = "net:[4026532999]";
        let calls = ["unshare", "clone", "clone3"];
        assert_eq!(maker(net, &calls, |_| ()), Maker::Other);
        assert_eq!(maker(net, &calls[..2], |_| ()), Maker::Unseen);
        let without = |seen: &mut Observation| seen.seccomp = Ok(Vec::new());
        assert_eq!(maker(net, &calls, without), Maker::Unseen);
    }
}
