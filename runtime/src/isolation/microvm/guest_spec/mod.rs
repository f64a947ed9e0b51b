//! The configuration that the engine in the guest gets, made from the bundle's.
//!
//! What names something on the host is replaced by where the guest finds it, or belongs to the VMM process and is taken
//! out, or cannot be had in a virtual machine and is an error that names its place. The rest is left as it is: the
//! same engine reads it.

mod disks;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hook, LinuxNamespaceType, Mount, Process, Spec};
use protocol::{ROOTFS_TAG, SHARES_DIR, VOLUMES_TAG};

use disks::Disks;
pub use disks::{Disk, serial};

use crate::bundle::Bundle;
use crate::id::ContainerId;

/// A file or directory of the host that the guest sees as `volumes/<id>/<index>`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// Its place on the host.
    pub source: PathBuf,
    /// Whether what is mounted below it is seen too.
    pub recursive: bool,
    /// Whether the host refuses the guest's writes.
    pub read_only: bool,
}

/// The VMM process's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Network {
    /// A new one.
    New,
    /// The one at this path.
    Join(PathBuf),
}

/// What the guest gets and what the VMM process must do for it.
#[derive(Debug)]
pub struct GuestSpec {
    /// The configuration for the guest's engine.
    pub spec: Spec,
    /// What it names, in the order of their numbers.
    pub volumes: Vec<Volume>,
    /// The machine's disks, in the order of their serial numbers.
    pub disks: Vec<Disk>,
    /// Where the VMM process belongs, if it is made for this container.
    pub network: Network,
}

/// What a microVM cannot do for a bundle.
#[derive(Debug, thiserror::Error)]
pub enum GuestSpecError {
    /// A property that needs the host's kernel.
    #[error("config.json: `{at}`: a microVM cannot {what}; use --isolation container")]
    Impossible {
        /// The place.
        at: String,
        /// What it would have to do.
        what: &'static str,
    },
    /// Something that the configuration names on the host cannot be used.
    #[error("config.json: `{at}`: cannot use {}", path.display())]
    Unusable {
        /// The place.
        at: String,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A rule for devices that is none.
    #[error(transparent)]
    Rule(#[from] engine::cgroup::Error),
}

/// The init process of a pod's sandbox, whose namespaces the pod's containers share.
#[derive(Debug, Clone, Copy)]
pub struct PodInit {
    /// Its pid on the host: that of the VMM process.
    pub host: i32,
    /// Its pid in the guest.
    pub guest: u32,
}

/// What the guest sees of the host beside the root, while it is found.
struct Volumes {
    /// Where it is in the guest.
    dir: PathBuf,
    all: Vec<Volume>,
}

impl Volumes {
    /// Adds a volume and gives its path in the guest.
    fn add(&mut self, volume: Volume) -> PathBuf {
        let path = self.dir.join(self.all.len().to_string());
        self.all.push(volume);
        path
    }
}

/// Rewrites the bundle's configuration for the guest: of a machine of its own, or of that of the pod whose sandbox's
/// init is given.
///
/// # Errors
/// Something in it cannot be had in a microVM, or does not exist.
pub fn rewrite(
    bundle: &Bundle,
    id: &ContainerId,
    pod: Option<PodInit>,
) -> Result<GuestSpec, GuestSpecError> {
    let mut spec = bundle.spec().clone();
    let shares = Path::new(SHARES_DIR);
    let mut volumes = Volumes {
        dir: shares.join(VOLUMES_TAG).join(id.as_str()),
        all: Vec::new(),
    };
    if let Some(root) = spec.root_mut() {
        root.set_path(shares.join(ROOTFS_TAG).join(id.as_str()));
    }
    let mut disks = Disks::of_nodes(&spec)?;
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, mount) in mounts.iter_mut().enumerate() {
        disks.take_source(index, mount)?;
        share_bind_source(bundle.dir(), index, mount, &mut volumes)?;
    }
    spec.set_mounts(Some(mounts));
    rewrite_hooks(&mut spec, &mut volumes)?;
    if let Some(process) = spec.process_mut() {
        remove_labels(process);
    }
    let network = rewrite_linux(&mut spec, id, pod)?;
    Ok(GuestSpec {
        spec,
        volumes: volumes.all,
        disks: disks.into_all(pod)?,
        network,
    })
}

fn impossible(at: impl Into<String>, what: &'static str) -> GuestSpecError {
    GuestSpecError::Impossible {
        at: at.into(),
        what,
    }
}

fn share_bind_source(
    bundle: &Path,
    index: usize,
    mount: &mut Mount,
    volumes: &mut Volumes,
) -> Result<(), GuestSpecError> {
    if !is_bind(mount) {
        return Ok(());
    }
    let at = || format!("mounts[{index}].source");
    let Some(source) = mount.source() else {
        return Err(GuestSpecError::Unusable {
            at: at(),
            path: PathBuf::new(),
            source: io::ErrorKind::NotFound.into(),
        });
    };
    let source = bundle.join(source);
    let unusable = |error| GuestSpecError::Unusable {
        at: at(),
        path: source.clone(),
        source: error,
    };
    let resolved = source.canonicalize().map_err(unusable)?;
    if resolved
        .metadata()
        .map_err(unusable)?
        .file_type()
        .is_socket()
    {
        return Err(impossible(at(), "reach a Unix socket of the host"));
    }
    let volume = Volume {
        source: resolved,
        recursive: has_option(mount, "rbind"),
        read_only: has_option(mount, "ro") || has_option(mount, "rro"),
    };
    mount.set_source(Some(volumes.add(volume)));
    Ok(())
}

fn has_option(mount: &Mount, name: &str) -> bool {
    mount
        .options()
        .iter()
        .flatten()
        .any(|option| option == name)
}

fn is_bind(mount: &Mount) -> bool {
    has_option(mount, "rbind")
        || has_option(mount, "bind")
        || mount.typ().as_deref() == Some("bind")
}

/// Takes the labels of the host's security modules away: they confine the VMM's side, not a process under another kernel.
pub fn remove_labels(process: &mut Process) {
    process.set_apparmor_profile(None).set_selinux_label(None);
}

/// Hooks of the runtime namespace run on the host; createContainer is taken to the guest as a volume; startContainer
/// is in the container's own root already.
fn rewrite_hooks(spec: &mut Spec, volumes: &mut Volumes) -> Result<(), GuestSpecError> {
    let Some(mut hooks) = spec.hooks().clone() else {
        return Ok(());
    };
    hooks.set_prestart(None);
    hooks
        .set_create_runtime(None)
        .set_poststart(None)
        .set_poststop(None);
    let mut create: Vec<Hook> = hooks.create_container().clone().unwrap_or_default();
    for (index, hook) in create.iter_mut().enumerate() {
        let at = format!("hooks.createContainer[{index}].path");
        let path = hook.path().clone();
        let unusable = |source| GuestSpecError::Unusable {
            at: at.clone(),
            path: path.clone(),
            source,
        };
        if !is_static_executable(&path).map_err(unusable)? {
            let what = "run this hook: it runs in the guest, where only a statically linked executable works";
            return Err(impossible(at, what));
        }
        // Without arguments the hook's name is its path, which must not change for it.
        if hook.args().as_ref().is_none_or(Vec::is_empty) {
            hook.set_args(Some(vec![path.to_string_lossy().into_owned()]));
        }
        hook.set_path(volumes.add(Volume {
            source: path.clone(),
            recursive: false,
            read_only: true,
        }));
    }
    hooks.set_create_container(Some(create));
    spec.set_hooks(Some(hooks));
    Ok(())
}

/// What names a namespace of the pod's sandbox on the host, as the guest names it.
fn in_pod(path: &Path, pod: PodInit) -> Option<PathBuf> {
    let namespace = path.strip_prefix(format!("/proc/{}/ns", pod.host)).ok()?;
    let guest = PathBuf::from(format!("/proc/{}/ns", pod.guest));
    Some(guest.join(namespace))
}

fn rewrite_linux(
    spec: &mut Spec,
    id: &ContainerId,
    pod: Option<PodInit>,
) -> Result<Network, GuestSpecError> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(Network::New);
    };
    let mut network = None;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for (index, namespace) in namespaces.iter_mut().enumerate() {
        let path = namespace.path().clone();
        let pods = path.as_deref().and_then(|path| in_pod(path, pod?));
        match (namespace.typ(), path) {
            (kind, Some(_)) if pods.is_some() => {
                if kind == LinuxNamespaceType::Network {
                    network = Some(Network::New);
                }
                namespace.set_path(pods);
            }
            (LinuxNamespaceType::Network, Some(_)) if pod.is_some() => {
                let at = format!("linux.namespaces[{index}].path");
                return Err(impossible(at, "have another network than its pod's"));
            }
            (LinuxNamespaceType::Network, path) => {
                network = Some(path.map_or(Network::New, Network::Join));
                namespace.set_path(None);
            }
            (_, None) => {}
            (_, Some(_)) => {
                let at = format!("linux.namespaces[{index}].path");
                return Err(impossible(at, "join a namespace of the host's kernel"));
            }
        }
    }
    let Some(network) = network else {
        return Err(impossible(
            "linux.namespaces",
            "share the host's network: a namespace of type `network` is needed",
        ));
    };
    linux.set_namespaces(Some(namespaces));
    if pod.is_some()
        && linux
            .net_devices()
            .as_ref()
            .is_some_and(|devices| !devices.is_empty())
    {
        let what = "take a network device over into its pod's machine, which runs already";
        return Err(impossible("linux.netDevices", what));
    }
    // The host moves them to where the VMM process is.
    linux.set_net_devices(None);
    if linux
        .seccomp()
        .as_ref()
        .is_some_and(|profile| profile.listener_path().is_some())
    {
        return Err(impossible(
            "linux.seccomp.listenerPath",
            "have a program of the host decide about system calls of the guest's kernel",
        ));
    }
    // Numbers of the host's processors, disks and network mean nothing in the guest; they hold for the VMM process.
    if let Some(mut resources) = linux.resources().clone() {
        if let Some(mut cpu) = resources.cpu().clone() {
            cpu.set_cpus(None).set_mems(None);
            resources.set_cpu(Some(cpu));
        }
        resources
            .set_block_io(None)
            .set_network(None)
            .set_rdma(None);
        linux.set_resources(Some(resources));
    }
    linux
        .set_cgroups_path(Some(Path::new("/").join(id.as_str())))
        .set_mount_label(None)
        .set_intel_rdt(None);
    Ok(network)
}

/// Whether `path` is an ELF executable that needs no interpreter and no library.
fn is_static_executable(path: &Path) -> io::Result<bool> {
    // The program headers of any real executable are in its first page.
    let mut head = Vec::new();
    File::open(path)?.take(4096).read_to_end(&mut head)?;
    let field = |at: usize, len: usize| -> Option<u64> {
        let bytes = head.get(at..at.checked_add(len)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        )
    };
    // ELF-64: e_phoff at 32, e_phentsize at 54, e_phnum at 56; p_type first in each header; PT_INTERP is 3.
    let static_elf = || -> Option<bool> {
        let (offset, size, count) = (field(32, 8)?, field(54, 2)?, field(56, 2)?);
        for index in 0..count {
            let at = usize::try_from(offset.checked_add(size.checked_mul(index)?)?).ok()?;
            if field(at, 4)? == 3 {
                return Some(false);
            }
        }
        Some(count > 0)
    };
    Ok(head.starts_with(b"\x7fELF\x02\x01") && static_elf().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    pub fn rewritten(edit: impl FnOnce(&Path, &mut Value)) -> Result<GuestSpec, String> {
        rewritten_in(None, edit)
    }

    pub fn rewritten_in(
        pod: Option<PodInit>,
        edit: impl FnOnce(&Path, &mut Value),
    ) -> Result<GuestSpec, String> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let mut config = json!({
            "ociVersion": "1.2.0", "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}, "apparmorProfile": "docker-default"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}],
                "resources": {"cpu": {"cpus": "0-1", "quota": 1000}}},
        });
        edit(dir.path(), &mut config);
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let bundle = Bundle::load(dir.path()).unwrap();
        let base = bundle.dir().to_str().unwrap().to_owned();
        rewrite(&bundle, &"c1".parse().unwrap(), pod)
            .map_err(|error| crate::error_chain(&error).replace(&base, "B"))
    }

    #[test]
    fn paths_lead_into_the_shares_and_host_numbers_are_gone() {
        let guest = rewritten(|dir, config| {
            fs::create_dir(dir.join("data")).unwrap();
            config["mounts"] = json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "source": "data", "options": ["rbind", "ro"]},
            ]);
        })
        .unwrap();
        assert_eq!(
            guest.spec.root().as_ref().unwrap().path(),
            Path::new("/run/rt/rootfs/c1")
        );
        let mounts = guest.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        assert_eq!(
            mounts[1].source().as_deref(),
            Some(Path::new("/run/rt/volumes/c1/0"))
        );
        assert_eq!(guest.volumes.len(), 1);
        assert!(
            guest.volumes[0].recursive
                && guest.volumes[0].read_only
                && guest.volumes[0].source.is_absolute()
        );
        let linux = guest.spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/c1")));
        let cpu = linux.resources().as_ref().unwrap().cpu().clone().unwrap();
        assert_eq!((cpu.cpus().clone(), cpu.quota()), (None, Some(1000)));
        assert_eq!(
            guest.spec.process().as_ref().unwrap().apparmor_profile(),
            &None
        );
        assert_eq!(guest.network, Network::New);
    }

    #[test]
    fn a_network_namespace_is_joined_by_the_vmm_not_by_the_guest() {
        let guest = rewritten(|_, config| {
            config["linux"]["namespaces"] = json!([{"type": "network", "path": "/run/netns/x"}]);
        })
        .unwrap();
        assert_eq!(guest.network, Network::Join("/run/netns/x".into()));
        assert_eq!(
            guest
                .spec
                .linux()
                .as_ref()
                .unwrap()
                .namespaces()
                .as_ref()
                .unwrap()[0]
                .path(),
            &None
        );
    }

    #[test]
    fn in_a_pod_the_sandboxs_namespaces_are_those_in_the_guest() {
        let pod = Some(PodInit {
            host: 4711,
            guest: 42,
        });
        let network = json!({"type": "network", "path": "/proc/4711/ns/net"});
        let joining = |other: Value| {
            let network = network.clone();
            rewritten_in(pod, move |_, config| {
                config["linux"]["namespaces"] = json!([network, other]);
            })
        };
        let guest = joining(json!({"type": "pid", "path": "/proc/4711/ns/pid"})).unwrap();
        let namespaces = guest.spec.linux().as_ref().unwrap().namespaces().clone();
        let paths: Vec<_> = namespaces
            .unwrap()
            .iter()
            .map(|namespace| namespace.path().clone().unwrap())
            .collect();
        let expected = ["/proc/42/ns/net", "/proc/42/ns/pid"].map(PathBuf::from);
        assert_eq!(paths, expected);
        for path in ["/proc/4712/ns/pid", "/proc/4711/ns-pid"] {
            let error = joining(json!({"type": "pid", "path": path})).unwrap_err();
            assert!(error.contains("linux.namespaces[1].path"), "{error}");
        }
        let error = rewritten_in(pod, |_, config| {
            config["linux"]["namespaces"] = json!([{"type": "network", "path": "/run/netns/x"}]);
        });
        let error = error.unwrap_err();
        assert!(error.contains("another network than its pod's"), "{error}");
    }

    #[test]
    fn what_needs_the_hosts_kernel_is_named() {
        let error = |edit: fn(&Path, &mut Value)| rewritten(edit).unwrap_err();
        assert_eq!(
            error(|_, config| config["linux"]["namespaces"] = json!([{"type": "pid"}])),
            "config.json: `linux.namespaces`: a microVM cannot share the host's network: a namespace of type `network` \
             is needed; use --isolation container"
        );
        assert_eq!(
            error(|_, config| config["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid")),
            "config.json: `linux.namespaces[0].path`: a microVM cannot join a namespace of the host's kernel; \
             use --isolation container"
        );
        assert_eq!(
            error(|_, config| config["mounts"] =
                json!([{"destination": "/d", "source": "nowhere", "options": ["bind"]}])),
            "config.json: `mounts[0].source`: cannot use B/nowhere: No such file or directory (os error 2)"
        );
        let socket = error(|dir, config| {
            std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
            config["mounts"] = json!([{"destination": "/s", "source": "socket", "type": "bind"}]);
        });
        assert!(
            socket.contains("mounts[0].source") && socket.contains("Unix socket"),
            "{socket}"
        );
    }

    #[test]
    fn hooks_of_the_host_stay_on_the_host() {
        let guest = rewritten(|dir, config| {
            // The smallest header that says: 64-bit, little endian, one program header, which is no interpreter.
            let mut elf = b"\x7fELF\x02\x01".to_vec();
            elf.resize(128, 0);
            elf[32] = 64;
            elf[54] = 56;
            elf[56] = 1;
            elf[64] = 1;
            fs::write(dir.join("hook"), elf).unwrap();
            let on_host = json!([{"path": "/bin/true"}]);
            config["hooks"] = json!({
                "prestart": on_host, "createRuntime": on_host, "poststart": on_host, "poststop": on_host,
                "createContainer": [{"path": dir.join("hook")}], "startContainer": [{"path": "/in/root"}],
            });
        })
        .unwrap();
        let hooks = guest.spec.hooks().clone().unwrap();
        assert!(
            hooks.create_runtime().is_none()
                && hooks.poststart().is_none()
                && hooks.poststop().is_none()
        );
        let create = &hooks.create_container().as_ref().unwrap()[0];
        assert_eq!(create.path(), Path::new("/run/rt/volumes/c1/0"));
        assert!(create.args().as_ref().unwrap()[0].ends_with("/hook"));
        assert_eq!(
            hooks.start_container().as_ref().unwrap()[0].path(),
            Path::new("/in/root")
        );
    }

    #[test]
    fn a_hook_that_needs_the_hosts_libraries_is_refused() {
        let error = rewritten(|dir, config| {
            fs::write(dir.join("script"), "#!/bin/sh\n").unwrap();
            config["hooks"] = json!({"createContainer": [{"path": dir.join("script")}]});
        })
        .unwrap_err();
        assert!(
            error.contains("hooks.createContainer[0].path") && error.contains("statically linked"),
            "{error}"
        );
    }
}
