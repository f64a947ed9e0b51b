//! Kernel parameters, as a container's namespaces have them.
//!
//! They are read from the host's own /proc by a thread that is in those namespaces: what the container has mounted there
//! says nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;

/// Values by the names of their parameters. `Err`: why one is not known.
type Values = BTreeMap<String, Result<String, String>>;

/// How many parameters are read.
const LIMIT: usize = 256;

/// The namespaces that have parameters, and that a thread can enter alone.
const NAMESPACES: [(&str, CloneFlags); 3] = [
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("net", CloneFlags::CLONE_NEWNET),
    ("uts", CloneFlags::CLONE_NEWUTS),
];

/// Those of namespaces that a thread cannot enter.
const OF_OTHERS: [&str; 3] = ["user/", "kernel/pid_max", "kernel/ns_last_pid"];

/// The parameters that `spec` names, by its names for them.
pub(super) fn read(pid: Pid, spec: &Spec) -> Values {
    let linux = spec.linux().as_ref();
    let named = linux.and_then(|linux| linux.sysctl().as_ref());
    let names: Vec<&String> = named.into_iter().flatten().map(|(name, _)| name).collect();
    if names.is_empty() {
        return Values::new();
    }
    let all = |why: &str| -> Values {
        let names = names.iter();
        names
            .map(|name| ((*name).clone(), Err(why.to_owned())))
            .collect()
    };
    thread::scope(|scope| {
        let reader = thread::Builder::new().spawn_scoped(scope, || -> Result<Values, String> {
            enter(pid)?;
            let names = names.iter().take(LIMIT);
            let read = names.map(|name| ((*name).clone(), value(name)));
            Ok(read.collect())
        });
        match reader.map(thread::ScopedJoinHandle::join) {
            Ok(Ok(Ok(values))) => values,
            Ok(Ok(Err(why))) => all(&why),
            Ok(Err(_)) | Err(_) => all("they could not be read"),
        }
    })
}

fn enter(pid: Pid) -> Result<(), String> {
    for (kind, flag) in NAMESPACES {
        let path = format!("/proc/{pid}/ns/{kind}");
        let entered = File::open(&path)
            .map_err(|error| error.to_string())
            .and_then(|file| setns(file, flag).map_err(|error| error.to_string()));
        entered.map_err(|error| format!("{path} cannot be entered: {error}"))?;
    }
    Ok(())
}

fn value(name: &str) -> Result<String, String> {
    let path = path(name).ok_or("it is none that can be read from here")?;
    let text = super::read(&path.to_string_lossy()).map_err(|error| error.to_string())?;
    Ok(text.trim().to_owned())
}

/// The file of a parameter, whose name has dots or slashes.
fn path(name: &str) -> Option<PathBuf> {
    let name = name.replace('.', "/");
    let is_plain = Path::new(&name)
        .components()
        .all(|one| matches!(one, Component::Normal(_)));
    let is_of_others = OF_OTHERS.iter().any(|begin| name.starts_with(begin));
    (is_plain && !is_of_others && !name.is_empty()).then(|| Path::new("/proc/sys").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(names: &[&str]) -> Spec {
        let all: serde_json::Map<_, _> = names
            .iter()
            .map(|name| ((*name).to_owned(), "1".into()))
            .collect();
        let spec = serde_json::json!({"ociVersion": "1.2.0", "linux": {"sysctl": all}});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn a_parameter_is_read_by_either_form_of_its_name() {
        let own = nix::unistd::getpid();
        let found = read(own, &spec(&["kernel.ostype", "kernel/osrelease"]));
        assert_eq!(found["kernel.ostype"], Ok("Linux".to_owned()));
        assert!(found["kernel/osrelease"].is_ok(), "{found:?}");
    }

    #[test]
    fn what_is_no_parameter_or_not_to_be_read_is_not_known() {
        let own = nix::unistd::getpid();
        let names = ["../version", "no.such", "user.max_user_namespaces", ""];
        let found = read(own, &spec(&names));
        assert!(
            found.len() == 4 && found.values().all(Result::is_err),
            "{found:?}"
        );
    }
}
