//! Who the container's processes are: namespaces, users and capabilities.

use super::{ALLOW, FORBID, POD_SECURITY, RULE, RUNTIME_SPEC, Rule, Weakness, each, weakness_if};
use crate::verify::config::NAMESPACES;
use crate::verify::posture::{Fact, Sharing};

const USER_NAMESPACES: &str = "https://man7.org/linux/man-pages/man7/user_namespaces.7.html";
const MAN_CAPABILITIES: &str = "https://man7.org/linux/man-pages/man7/capabilities.7.html";

pub(super) const HOST_NAMESPACES: Rule = Rule {
    id: "host-namespaces",
    why: "in a namespace of the host, a process sees and reaches what the host's own processes do: its network, its \
          processes, its mounts",
    fix: "list the type in linux.namespaces, without a path or with that of another container",
    reference: POD_SECURITY,
    lists: FORBID,
    check: |setting| {
        let kinds = NAMESPACES.map(|(kind, _, _)| kind);
        let what = format!("a kind of namespace: {}", kinds.join(", "));
        each(&setting.forbid, &what, |entry| kinds.contains(&entry))
    },
    judge: |posture, setting| {
        let shared = posture.namespaces.iter().filter(|(kind, fact)| {
            fact.value == Sharing::Host && setting.forbid.iter().any(|one| one == *kind)
        });
        shared
            .map(|(kind, fact)| {
                Weakness::new(&fact.at, format!("the {kind} namespace is the host's"))
            })
            .collect()
    },
};

pub(super) const USER_NAMESPACE: Rule = Rule {
    id: "user-namespace",
    why: "without one, root in the container is root on the host for all that gets past the other walls",
    fix: "add a namespace of type \"user\", with uidMappings and gidMappings",
    reference: USER_NAMESPACES,
    judge: |posture, _| {
        let ids = &posture.user_ids;
        weakness_if(
            ids.value.is_none(),
            &ids.at,
            "there is no user namespace of its own",
        )
    },
    ..RULE
};

pub(super) const HOST_ROOT: Rule = Rule {
    id: "host-root",
    why: "a user namespace that contains the host's root keeps nobody from being it",
    fix: "map ids of the host that nobody else has",
    reference: USER_NAMESPACES,
    judge: |posture, _| {
        let users = posture.user_ids.value.iter().flatten();
        let users = users.map(|range| ("user", range));
        let groups = posture.group_ids.iter().map(|range| ("group", range));
        users
            .chain(groups)
            .filter(|(_, Fact { value, .. })| value.outside == 0 && value.size > 0)
            .map(|(kind, Fact { at, value })| {
                let what = format!(
                    "{kind} {} of the container is root on the host",
                    value.inside
                );
                Weakness::new(at, what)
            })
            .collect()
    },
    ..RULE
};

pub(super) const ROOT_USER: Rule = Rule {
    id: "root-user",
    why: "many of the kernel's files and most of its past holes are open to root alone",
    fix: "set process.user.uid to an ordinary user",
    reference: POD_SECURITY,
    judge: |posture, _| {
        let uid = &posture.uid;
        weakness_if(
            uid.value == 0,
            &uid.at,
            "the process is root in the container",
        )
    },
    ..RULE
};

pub(super) const ROOT_GROUP: Rule = Rule {
    id: "root-group",
    why: "files that root's group may write are the container's too, where it shares them with the host",
    fix: "set process.user.gid to an ordinary group, and leave 0 out of process.user.additionalGids",
    reference: POD_SECURITY,
    judge: |posture, _| {
        let gids = posture.gids.iter().filter(|gid| gid.value == 0);
        gids.map(|gid| Weakness::new(&gid.at, "the process is in the root group of the container"))
            .collect()
    },
    ..RULE
};

pub(super) const CAPABILITIES: Rule = Rule {
    id: "capabilities",
    why: "a capability is a part of root's power; several of them, as CAP_SYS_ADMIN, are a way to the rest",
    fix: "remove it from process.capabilities, from every set",
    reference: MAN_CAPABILITIES,
    lists: ALLOW,
    check: |setting| {
        let is_known = |entry: &str| entry.parse::<caps::Capability>().is_ok();
        each(&setting.allow, "a capability, as \"CAP_CHOWN\"", is_known)
    },
    judge: |posture, setting| {
        let mut weaknesses = Vec::new();
        // Nothing can be in another set for long that is not in these.
        for set in [
            "bounding",
            "effective",
            "permitted",
            "inheritable",
            "ambient",
        ] {
            let Some(fact) = posture.capabilities.get(set) else {
                continue;
            };
            let beyond: Vec<&str> = fact
                .value
                .iter()
                .filter(|capability| !setting.allow.contains(capability))
                .map(String::as_str)
                .collect();
            if !beyond.is_empty() {
                weaknesses.push(Weakness::new(&fact.at, beyond.join(", ")));
            }
        }
        weaknesses
    },
};

pub(super) const INHERITED_CAPABILITIES: Rule = Rule {
    id: "inherited-capabilities",
    why: "inheritable and ambient capabilities are kept by a program that an ordinary user executes (CVE-2022-29162)",
    fix: "leave the sets inheritable and ambient empty",
    reference: MAN_CAPABILITIES,
    judge: |posture, _| {
        let sets = ["inheritable", "ambient"].into_iter();
        sets.filter_map(|set| posture.capabilities.get(set))
            .filter(|fact| !fact.value.is_empty())
            .map(|fact| {
                let names: Vec<&str> = fact.value.iter().map(String::as_str).collect();
                Weakness::new(&fact.at, names.join(", "))
            })
            .collect()
    },
    ..RULE
};

pub(super) const NEW_PRIVILEGES: Rule = Rule {
    id: "new-privileges",
    why: "a set-user-id program in the image, or a file with capabilities, gives an ordinary user of the container more",
    fix: "set process.noNewPrivileges to true",
    reference: RUNTIME_SPEC,
    judge: |posture, _| {
        let fact = &posture.no_new_privileges;
        weakness_if(!fact.value, &fact.at, "programs may gain privileges")
    },
    ..RULE
};
