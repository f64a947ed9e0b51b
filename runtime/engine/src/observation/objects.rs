//! Objects of the kernel that do more than their holder may, if somebody else made them.
//!
//! /proc names an object by its kind alone: who made it, nobody tells. What it takes to make one is told here, so that
//! whoever knows a process's rights can say whether it may be its own.

/// What it takes to make an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// A system call.
    Call(&'static str),
    /// `bpf`, and one of its capabilities, which no user namespace gives.
    Bpf,
    /// A device, as the devices cgroup writes it.
    Device(&'static str),
    /// One of the calls that make namespaces.
    Namespaces,
}

/// How the links begin, and what each needs.
const OBJECTS: [(&str, Needs); 12] = [
    ("anon_inode:bpf", Needs::Bpf),
    ("anon_inode:btf", Needs::Bpf),
    ("anon_inode:kvm", Needs::Device("c 10:232 rw")),
    ("anon_inode:seccomp notify", Needs::Call("seccomp")),
    ("anon_inode:[fanotify]", Needs::Call("fanotify_init")),
    ("anon_inode:[fscontext]", Needs::Call("fsopen")),
    ("anon_inode:[io_uring]", Needs::Call("io_uring_setup")),
    ("anon_inode:[perf_event]", Needs::Call("perf_event_open")),
    ("anon_inode:[userfaultfd]", Needs::Call("userfaultfd")),
    ("anon_inode:[vfio", Needs::Device("c 10:196 rw")),
    // The number of its device is given when the module is loaded.
    ("anon_inode:iommufd", Needs::Device("c *:* rw")),
    ("anon_inode:[iommufd]", Needs::Device("c *:* rw")),
];

/// What it takes to make the object that a link in /proc/pid/fd names; `None`: it is none of these.
pub fn needs(link: &str) -> Option<Needs> {
    let known = OBJECTS.iter().find(|(begin, _)| link.starts_with(begin));
    known
        .map(|(_, needs)| *needs)
        .or_else(|| namespace(link).map(|_| Needs::Namespaces))
}

/// The kind and the number of the namespace that a link names: `net:[4026531840]`.
pub(super) fn namespace(link: &str) -> Option<(&str, u64)> {
    let (kind, id) = link.strip_suffix(']')?.split_once(":[")?;
    let is_kind = super::processes::KINDS.contains(&kind);
    Some((kind, id.parse().ok()?)).filter(|_| is_kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_known_by_how_its_link_begins() {
        assert_eq!(needs("anon_inode:bpf-map"), Some(Needs::Bpf));
        assert_eq!(
            needs("anon_inode:kvm-vcpu:0").unwrap(),
            Needs::Device("c 10:232 rw")
        );
        assert_eq!(needs("net:[4026531840]"), Some(Needs::Namespaces));
        for none in [
            "anon_inode:[eventfd]",
            "pipe:[7]",
            "socket:[7]",
            "net:[x]",
            "/bpf",
            "",
        ] {
            assert_eq!(needs(none), None, "{none}");
        }
    }
}
