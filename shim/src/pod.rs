//! A pod as containerd's sandbox service describes it: the container that holds its namespaces, and the files that all its
//! containers share.
//!
//! Where containerd makes a pod's sandbox it makes both; where we make it nobody else does. The configuration is the
//! kubelet's. Its annotations are the pod author's: only those that are named after us are taken, and of these rt's own
//! configuration says which count.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Failure, Kind};
use crate::messages::cri::{DNSConfig, NamespaceMode, NamespaceOption, PodSandboxConfig};
use crate::options::Options;
use crate::pause;

/// The type of a pod's configuration.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// The annotation that names the pod of a container.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// What our annotations begin with.
const OURS: &str = "dev.rt.";

/// Everything that a pod's containers share, in the bundle of the sandbox.
const DIR: &str = "pod";

/// A file each, in that directory and in `/etc` of the containers.
const ETC: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Where POSIX's shared memory is, which belongs to an IPC namespace.
const SHM: &str = "/dev/shm";

/// The user of the program that only waits: nobody's.
const NOBODY: u32 = 65535;

/// The pod whose sandbox is in this server.
#[derive(Debug)]
pub struct Pod {
    /// The id of its sandbox.
    pub id: String,
    /// The options of its runtime handler.
    pub options: Options,
    pub files: Files,
    /// When it was made, since 1970.
    pub created: Duration,
}

/// The files of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    dir: PathBuf,
    /// The sandbox's root.
    root: PathBuf,
}

/// Reads a pod's configuration. A client without Kubernetes gives none.
pub fn configuration(any: Option<&Any>) -> Result<PodSandboxConfig, Failure> {
    let wrong = |reason: String| Failure::new(Kind::Invalid, format!("sandbox options: {reason}"));
    let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
        return Ok(PodSandboxConfig::default());
    };
    if any.type_url.rsplit('/').next() != Some(CONFIG_TYPE) {
        let kind = &any.type_url;
        return Err(wrong(format!("their type {kind:?} is not {CONFIG_TYPE}")));
    }
    PodSandboxConfig::parse_from_bytes(&any.value).map_err(|error| wrong(error.to_string()))
}

impl Files {
    /// Those of the sandbox with this bundle.
    pub fn of(bundle: &Path) -> Self {
        let dir = bundle.join(DIR);
        // A bundle is in memory; what belongs to it on the disk is where containerd's link leads.
        let root = match bundle.join("work").canonicalize() {
            Ok(work) => work.join(DIR),
            Err(_) => dir.join("root"),
        };
        Self { dir, root }
    }

    /// Whether they were made.
    pub fn exist(&self) -> bool {
        self.dir.exists()
    }

    /// Makes them as `config` says. `program` is what the sandbox is to execute.
    ///
    /// It is copied: a container that shares the pod's pid namespace and may mount can reach it, and must not find the
    /// node's own file.
    pub fn make(&self, config: &PodSandboxConfig, program: &Path) -> Result<(), Failure> {
        let resolv_conf = match config.dns_config.as_ref() {
            Some(dns) => Some(resolv_conf(dns)?),
            None => None,
        };
        self.make_all(config, resolv_conf, program)
            .map_err(Failure::io(format_args!("make {}", self.dir.display())))?;
        let shm = json!({
            "destination": SHM, "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "nodev", "noexec", "mode=1777", "size=65536k"],
        });
        Ok(engine::mount_on_host(0, &mount(shm)?, &self.shm())?)
    }

    fn make_all(
        &self,
        config: &PodSandboxConfig,
        resolv_conf: Option<String>,
        program: &Path,
    ) -> io::Result<()> {
        let root = &self.root;
        let (dev, proc) = (root.join("dev"), root.join("proc"));
        for dir in [&self.dir, &self.shm(), root, &dev, &proc] {
            fs::create_dir(dir)?;
            // Whatever our umask is: the containers' users enter and read.
            fs::set_permissions(dir, PermissionsExt::from_mode(0o755))?;
        }
        let pause = root.join(pause::PROGRAM.trim_start_matches('/'));
        fs::copy(program, &pause)?;
        fs::set_permissions(&pause, PermissionsExt::from_mode(0o755))?;
        let host = |name: &str| match fs::read(Path::new("/etc").join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            read => read,
        };
        let hostname = match config.hostname.as_str() {
            "" => nix::unistd::gethostname()?.to_string_lossy().into_owned(),
            name => name.to_owned(),
        };
        let contents = [
            format!("{hostname}\n").into_bytes(),
            host("hosts")?,
            match resolv_conf {
                Some(text) => text.into_bytes(),
                None => host("resolv.conf")?,
            },
        ];
        for (name, content) in ETC.iter().zip(contents) {
            let path = self.dir.join(name);
            fs::write(&path, content)?;
            fs::set_permissions(&path, PermissionsExt::from_mode(0o644))?;
        }
        Ok(())
    }

    /// Removes them.
    pub fn remove(&self) -> Result<(), Failure> {
        engine::unmount_on_host(&self.shm())?;
        for dir in [&self.root, &self.dir] {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Failure::io(format_args!("remove {}", dir.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn shm(&self) -> PathBuf {
        self.dir.join("shm")
    }

    /// The mounts of a container of the pod: its own, and the pod's files where it does not say otherwise.
    pub fn mounts(&self, spec: &Spec) -> Result<Vec<Mount>, Failure> {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for name in ETC {
            let destination = Path::new("/etc").join(name);
            if !mounts
                .iter()
                .any(|mount| *mount.destination() == destination)
            {
                mounts.push(bind(&self.dir.join(name), &destination, &[])?);
            }
        }
        let namespaces = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        let shares_ipc = namespaces.into_iter().flatten().any(|namespace| {
            namespace.typ() == LinuxNamespaceType::Ipc && namespace.path().is_some()
        });
        let own = mounts.iter_mut().find(|mount| {
            mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs")
        });
        if let Some(own) = own.filter(|_| shares_ipc) {
            *own = bind(&self.shm(), Path::new(SHM), &["nosuid", "nodev", "noexec"])?;
        }
        Ok(mounts)
    }

    /// The configuration of the container that holds the pod's namespaces. `network` is the path of the pod's network
    /// namespace; empty for a new one.
    pub fn sandbox(
        &self,
        id: &str,
        config: &PodSandboxConfig,
        network: &str,
    ) -> Result<Value, Failure> {
        let linux = config.linux.as_ref();
        let options = linux
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|security| security.namespace_options.as_ref());
        let namespaces = namespaces(options, network)?;
        let has = |kind: &str| namespaces.iter().any(|one| one["type"] == kind);
        let mut sysctls: Map<String, Value> = Map::new();
        if has("network") {
            // As containerd 2 has it unless it is told otherwise: these are the pod's own ports.
            sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
            sysctls.insert("net.ipv4.ping_group_range".into(), "0 2147483647".into());
        }
        for (name, value) in linux.into_iter().flat_map(|linux| &linux.sysctls) {
            sysctls.insert(name.clone(), value.as_str().into());
        }
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": self.root, "readonly": true},
            "process": {
                "user": {"uid": NOBODY, "gid": NOBODY},
                "args": [pause::PROGRAM],
                "cwd": "/",
                "noNewPrivileges": true,
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {
                    "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                    "options": ["nosuid", "noexec", "mode=755", "size=64k"],
                },
            ],
            "annotations": annotations(id, config),
            "linux": {"namespaces": namespaces, "sysctl": sysctls},
        });
        if has("uts") && !config.hostname.is_empty() {
            spec["hostname"] = config.hostname.as_str().into();
        }
        if let Some(path) = linux.and_then(|linux| cgroup(&linux.cgroup_parent, id)) {
            spec["linux"]["cgroupsPath"] = path.into();
        }
        // Of a container nobody uses them; a machine runs all that is in the pod.
        let shares = linux
            .and_then(|linux| linux.resources.as_ref())
            .map_or(0, |resources| resources.cpu_shares);
        if shares > 0 {
            spec["linux"]["resources"] = json!({"cpu": {"shares": shares}});
        }
        Ok(spec)
    }
}

/// The namespaces of a pod, as the configuration has them.
fn namespaces(options: Option<&NamespaceOption>, network: &str) -> Result<Vec<Value>, Failure> {
    let default = NamespaceOption::default();
    let options = options.unwrap_or(&default);
    let users = options.userns_options.as_ref();
    if users.is_some_and(|users| users.mode.enum_value() != Ok(NamespaceMode::NODE)) {
        let reason =
            "a pod in a user namespace of its own needs a handler with sandboxer = \"podsandbox\"";
        return Err(Failure::new(Kind::Unsupported, reason));
    }
    let is_nodes = |mode: Result<NamespaceMode, i32>| mode == Ok(NamespaceMode::NODE);
    let mut namespaces = vec![json!({"type": "mount"})];
    if !is_nodes(options.network.enum_value()) {
        namespaces.push(match network {
            "" => json!({"type": "network"}),
            path => json!({"type": "network", "path": path}),
        });
        namespaces.push(json!({"type": "uts"}));
    }
    for (kind, mode) in [("pid", options.pid), ("ipc", options.ipc)] {
        if !is_nodes(mode.enum_value()) {
            namespaces.push(json!({"type": kind}));
        }
    }
    Ok(namespaces)
}

/// What the sandbox is, in containerd's words; the size of the pod; and what its author says to us.
fn annotations(id: &str, config: &PodSandboxConfig) -> HashMap<String, String> {
    let mut annotations: HashMap<_, _> = config
        .annotations
        .iter()
        .filter(|(name, _)| name.starts_with(OURS))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let mut tell = |name: &str, value: String| {
        annotations.insert(format!("io.kubernetes.cri.{name}"), value);
    };
    tell("container-type", "sandbox".to_owned());
    if let Some(metadata) = config.metadata.as_ref() {
        tell("sandbox-name", metadata.name.clone());
        tell("sandbox-namespace", metadata.namespace.clone());
        tell("sandbox-uid", metadata.uid.clone());
    }
    let linux = config.linux.as_ref();
    if let Some(resources) = linux.and_then(|linux| linux.resources.as_ref()) {
        tell("sandbox-cpu-quota", resources.cpu_quota.to_string());
        tell("sandbox-cpu-period", resources.cpu_period.to_string());
        tell(
            "sandbox-memory",
            resources.memory_limit_in_bytes.to_string(),
        );
    }
    annotations.insert(SANDBOX_ID.to_owned(), id.to_owned());
    annotations
}

/// The sandbox's cgroup below the pod's, in the form of the kubelet's driver; a slice is systemd's.
fn cgroup(parent: &str, id: &str) -> Option<String> {
    let last = Path::new(parent).file_name()?.to_str()?;
    if last.ends_with(".slice") {
        return Some(format!("{last}:cri-containerd:{id}"));
    }
    Some(Path::new(parent).join(id).to_string_lossy().into_owned())
}

fn resolv_conf(dns: &DNSConfig) -> Result<String, Failure> {
    let mut text = String::new();
    for (keyword, values) in [("search", &dns.searches), ("options", &dns.options)] {
        if !values.is_empty() {
            let _ = writeln!(text, "{keyword} {}", values.join(" "));
        }
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    let all = [&dns.searches, &dns.options, &dns.servers];
    match all.into_iter().flatten().find(|one| one.contains('\n')) {
        Some(value) => {
            let reason = format!("dns_config: {value:?} is more than a line");
            Err(Failure::new(Kind::Invalid, reason))
        }
        None => Ok(text),
    }
}

fn bind(source: &Path, destination: &Path, options: &[&str]) -> Result<Mount, Failure> {
    let options = [&["bind", "rprivate"], options].concat();
    mount(json!({
        "destination": destination, "type": "bind", "source": source, "options": options,
    }))
}

fn mount(value: Value) -> Result<Mount, Failure> {
    serde_json::from_value(value).map_err(|error| Failure::new(Kind::Other, error.to_string()))
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::MessageField;

    use super::*;
    use crate::messages::cri::{
        LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, UserNamespace,
    };

    fn config(options: NamespaceOption) -> PodSandboxConfig {
        PodSandboxConfig {
            hostname: "named".to_owned(),
            annotations: HashMap::from([
                ("dev.rt.isolation".to_owned(), "microvm".to_owned()),
                (SANDBOX_ID.to_owned(), "another".to_owned()),
                (
                    "io.kubernetes.cri.container-type".to_owned(),
                    "container".to_owned(),
                ),
            ]),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/pods/p".to_owned(),
                security_context: MessageField::some(LinuxSandboxSecurityContext {
                    namespace_options: MessageField::some(options),
                    ..Default::default()
                }),
                sysctls: HashMap::from([(
                    "net.ipv4.ip_unprivileged_port_start".to_owned(),
                    "80".to_owned(),
                )]),
                resources: MessageField::some(LinuxContainerResources {
                    memory_limit_in_bytes: 5,
                    cpu_shares: 512,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn sandbox(options: NamespaceOption) -> Result<Value, Failure> {
        let files = Files::of(Path::new("/bundle"));
        files.sandbox("s1", &config(options), "/netns")
    }

    fn kinds(spec: &Value) -> Vec<&str> {
        let all = spec["linux"]["namespaces"].as_array().unwrap();
        all.iter()
            .map(|one| one["type"].as_str().unwrap())
            .collect()
    }

    #[test]
    fn a_sandbox_is_what_the_pod_says() {
        let spec = sandbox(NamespaceOption::default()).unwrap();
        assert_eq!(kinds(&spec), ["mount", "network", "uts", "pid", "ipc"]);
        assert_eq!(spec["linux"]["namespaces"][1]["path"], "/netns");
        assert_eq!(spec["hostname"], "named");
        assert_eq!(spec["linux"]["cgroupsPath"], "/pods/p/s1");
        assert_eq!(spec["linux"]["resources"]["cpu"]["shares"], 512);
        let sysctls = &spec["linux"]["sysctl"];
        assert_eq!(sysctls["net.ipv4.ip_unprivileged_port_start"], "80");
        assert_eq!(sysctls["net.ipv4.ping_group_range"], "0 2147483647");
        let annotations = &spec["annotations"];
        assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "5");
        assert_eq!(annotations["dev.rt.isolation"], "microvm");
        // What a pod says of itself in containerd's name does not count.
        assert_eq!(annotations[SANDBOX_ID], "s1");
        assert_eq!(annotations["io.kubernetes.cri.container-type"], "sandbox");
        let spec: Spec = serde_json::from_value(spec).unwrap();
        assert!(spec.process().is_some());
    }

    #[test]
    fn what_is_the_nodes_stays_the_nodes() {
        let node = NamespaceMode::NODE.into();
        let options = NamespaceOption {
            network: node,
            pid: node,
            ipc: node,
            ..Default::default()
        };
        let spec = sandbox(options).unwrap();
        assert_eq!(kinds(&spec), ["mount"]);
        assert!(spec["hostname"].is_null());
        let sysctls = spec["linux"]["sysctl"].as_object().unwrap();
        assert!(!sysctls.contains_key("net.ipv4.ping_group_range"));
    }

    #[test]
    fn a_user_namespace_is_refused() {
        let options = NamespaceOption {
            userns_options: MessageField::some(UserNamespace::default()),
            ..Default::default()
        };
        let failure = sandbox(options).unwrap_err();
        assert!(failure.reason.contains("podsandbox"), "{failure}");
    }

    #[test]
    fn a_cgroup_has_the_form_of_its_driver() {
        assert_eq!(cgroup("", "s1"), None);
        assert_eq!(
            cgroup("/kubepods.slice/kubepods-pod1.slice", "s1").as_deref(),
            Some("kubepods-pod1.slice:cri-containerd:s1")
        );
    }

    #[test]
    fn a_container_gets_the_pods_files_unless_it_has_its_own() {
        let files = Files::of(Path::new("/bundle"));
        let mounts = |ipc: Value| {
            let spec = json!({
                "ociVersion": "1.2.0",
                "mounts": [
                    {"destination": "/etc/hosts", "type": "bind", "source": "/kubelets", "options": ["rbind"]},
                    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                ],
                "linux": {"namespaces": [ipc]},
            });
            let mounts = files.mounts(&serde_json::from_value(spec).unwrap());
            let of = |mount: &Mount| {
                let source = mount.source().clone().unwrap();
                format!("{} {}", mount.destination().display(), source.display())
            };
            mounts.unwrap().iter().map(of).collect::<Vec<_>>()
        };
        let shared = mounts(json!({"type": "ipc", "path": "/proc/7/ns/ipc"}));
        let expected = [
            "/etc/hosts /kubelets",
            "/dev/shm /bundle/pod/shm",
            "/etc/hostname /bundle/pod/hostname",
            "/etc/resolv.conf /bundle/pod/resolv.conf",
        ];
        assert_eq!(shared, expected);
        let own = mounts(json!({"type": "ipc"}));
        assert_eq!(own[1], "/dev/shm shm");
    }

    #[test]
    fn a_name_server_is_one_line() {
        let mut dns = DNSConfig {
            servers: vec!["10.0.0.1".to_owned()],
            searches: vec!["a".to_owned(), "b".to_owned()],
            ..Default::default()
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "search a b\nnameserver 10.0.0.1\n"
        );
        dns.options = vec!["x\nnameserver 6.6.6.6".to_owned()];
        assert!(resolv_conf(&dns).is_err());
    }

    #[test]
    fn a_configuration_is_a_pods_or_none() {
        assert_eq!(configuration(None).unwrap(), PodSandboxConfig::default());
        let any = |kind: &str, value: Vec<u8>| Any {
            type_url: kind.to_owned(),
            value,
            ..Default::default()
        };
        let pod = config(NamespaceOption::default());
        let value = pod.write_to_bytes().unwrap();
        assert_eq!(
            configuration(Some(&any(CONFIG_TYPE, value.clone()))).unwrap(),
            pod
        );
        assert!(configuration(Some(&any("other", value))).is_err());
        assert!(configuration(Some(&any(CONFIG_TYPE, vec![0xff; 3]))).is_err());
    }
}
