//! Templates: machines that were written down when their agents had answered, for others to begin from.
//!
//! A template has run its kernel and its agent and nothing of anybody's. A machine that needs just such a start goes on
//! from it instead of booting; what it must not have in common with others it gets before its container: randomness,
//! the time, its interfaces' addresses. The addresses within the guest's kernel stay shared, which is why templates are
//! the administrator's to make. Who may write to their directory owns every machine made of them, so that only root may.

use std::arch::x86_64::__cpuid;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::sys::utsname::uname;
use protocol::message::{Network, RenewRequest};
use protocol::method::Renew;
use protocol::{ROOTFS_TAG, RPC_PORT, VOLUMES_TAG};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::devices::virtio::fs::{Access, Cache};
use vmm::devices::virtio::net::{Interface, Tap};
use vmm::devices::virtio::vsock::{GuestCid, VsockHandle};
use vmm::snapshot::{Snapshot, SnapshotError, SnapshotFiles};
use vmm::{Origin, RunningVm, Vm, VmConfig, VsockConfig};

use super::agent::Agent;
use super::confinement;
use super::network::{NetworkError, TAP_NAMES};
use super::vmm_process::{Boot, VmmError, errno, hear_agent, io_error, shared_directory, vsock_of};
use crate::clock;

/// What the template is of, in its directory.
const RECORD: &str = "template.json";

/// Directories of this prefix are unfinished; no id begins so.
const UNFINISHED: &str = ".new-";

/// The bytes of randomness that a machine gets.
const SEED: usize = 64;

/// The digits of an id.
const ID_LENGTH: usize = 16;

/// Larger than any interface that a machine of the template may stand for.
const MTU: u16 = u16::MAX;

/// A file as it was: another has taken its place if any of this differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl FileIdentity {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// All that a machine's start depends on. Machines of one shape begin alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Of this program, whose devices the guest has.
    version: String,
    /// The host's kernel and processor.
    host: String,
    kernel: FileIdentity,
    modules: Option<FileIdentity>,
    agent: FileIdentity,
    parameters: Vec<String>,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Network interfaces.
    pub interfaces: usize,
}

impl Shape {
    /// In what another machine differs, if it does.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        let (a, b) = (self, other);
        [
            (a.version != b.version, "version of rt"),
            (a.host != b.host, "kernel or processor of the host"),
            (a.kernel != b.kernel, "guest kernel"),
            (
                a.modules != b.modules,
                "archive of the guest kernel's modules",
            ),
            (a.agent != b.agent, "rt-agent"),
            (a.parameters != b.parameters, "`vm.kernel.parameters`"),
            (a.vcpus != b.vcpus, "number of vCPUs"),
            (a.memory != b.memory, "size of the guest's memory"),
            (a.interfaces != b.interfaces, "number of network interfaces"),
        ]
        .into_iter()
        .find_map(|(differs, what)| differs.then_some(what))
    }

    /// Of a machine that boots so.
    ///
    /// # Errors
    /// A file cannot be looked at.
    pub fn of(boot: &Boot, interfaces: usize) -> Result<Self, TemplateError> {
        let identity = |path: &Path| FileIdentity::of(path).map_err(file("look at", path));
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: host().map_err(TemplateError::Host)?,
            kernel: identity(&boot.kernel)?,
            modules: boot.modules.as_deref().map(identity).transpose()?,
            agent: identity(&boot.agent)?,
            parameters: boot.parameters.clone(),
            vcpus: boot.vcpus,
            memory: boot.memory,
            interfaces,
        })
    }
}

/// Checks that root alone can put a machine into a directory.
///
/// # Errors
/// Others can, or it cannot be looked at.
pub fn check_owner(directory: &Path) -> Result<(), TemplateError> {
    let metadata = fs::metadata(directory).map_err(file("look at", directory))?;
    if metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
        let path = directory.to_owned();
        return Err(TemplateError::Writable { path });
    }
    Ok(())
}

/// The host's kernel and its processor's name, as CPUID has it.
fn host() -> io::Result<String> {
    let kernel = uname()?;
    let mut host = format!(
        "{} {}",
        kernel.release().to_string_lossy(),
        kernel.version().to_string_lossy()
    );
    // The processor's signature, and its name in three parts.
    for leaf in [1, 0x8000_0002, 0x8000_0003, 0x8000_0004] {
        let answer = __cpuid(leaf);
        let words = match leaf {
            1 => vec![answer.eax],
            _ => vec![answer.eax, answer.ebx, answer.ecx, answer.edx],
        };
        for word in words {
            // Writing to a string does not fail.
            let _ = write!(host, " {word:x}");
        }
    }
    Ok(host)
}

/// What is written down beside a machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// What it is of.
    pub shape: Shape,
    /// The kernel's path, for people.
    pub kernel: PathBuf,
    /// When it was made: RFC 3339.
    pub created: String,
}

/// Why a template cannot be made, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The host does not say what it is.
    #[error("cannot ask the host's kernel for its release")]
    Host(#[source] io::Error),
    /// Others could have put a machine of theirs there.
    #[error(
        "{} could be written by others than root: take that from them with chown and chmod", path.display()
    )]
    Writable {
        /// The directory.
        path: PathBuf,
    },
    /// A file of it is damaged, or it is not of this host.
    #[error(
        "the template {id} cannot be used: remove it with `rt template remove {id}`, or make it anew"
    )]
    Unusable {
        /// The template's id.
        id: String,
        /// What is wrong.
        #[source]
        source: SnapshotError,
    },
    /// Nothing has the name.
    #[error("there is no template {id} in {}: `rt template list` shows what there is", root.display())]
    Unknown {
        /// What was asked for.
        id: String,
        /// Where templates are.
        root: PathBuf,
    },
    /// The machine could not be started.
    #[error(transparent)]
    Machine(#[from] Box<VmmError>),
    /// The machine could not be written down.
    #[error("cannot write the machine down")]
    Snapshot(#[from] SnapshotError),
}

impl From<VmmError> for TemplateError {
    fn from(error: VmmError) -> Self {
        Self::Machine(Box::new(error))
    }
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File {
        action,
        path,
        source,
    }
}

/// Tells which devices a machine that goes on from a template has its interfaces by.
pub fn name_devices(network: &mut Network) {
    for (index, interface) in network.interfaces.iter_mut().enumerate() {
        interface.device_address = link_address(index).to_vec();
    }
}

/// The link address of a template's interface, which each machine replaces by its own: locally administered.
fn link_address(interface: usize) -> [u8; 6] {
    let [.., high, low] = interface.to_be_bytes();
    [0x02, b'r', b't', 0, high, low]
}

/// The directory of templates, which need not exist.
#[derive(Debug, Clone, Copy)]
pub struct Templates<'a> {
    root: &'a Path,
}

/// A template that is there.
#[derive(Debug)]
pub struct Template {
    /// Its id: machines of one shape have one.
    pub id: String,
    /// What it is of.
    pub record: Record,
    /// What its files take on the host.
    pub disk_bytes: u64,
}

/// A directory among the templates.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub id: String,
    /// The template, or why it cannot be used.
    pub template: Result<Template, TemplateError>,
}

impl<'a> Templates<'a> {
    /// The templates in `root`.
    pub fn new(root: &'a Path) -> Self {
        Self { root }
    }

    /// The machine to go on from in place of this boot with so many network interfaces; none if no template has its
    /// shape.
    ///
    /// # Errors
    /// There is one, and it cannot be used.
    pub fn find(&self, boot: &Boot, interfaces: usize) -> Result<Option<Snapshot>, TemplateError> {
        // Most hosts have none; and what a bundle brings to boot from is nobody else's.
        if boot.initrd.is_some() || !self.root.exists() {
            return Ok(None);
        }
        let id = id(&Shape::of(boot, interfaces)?);
        let directory = self.root.join(&id);
        if !directory.exists() {
            return Ok(None);
        }
        for path in [self.root, &directory] {
            check_owner(path)?;
        }
        match Snapshot::open(&directory) {
            Ok(snapshot) => Ok(Some(snapshot)),
            Err(source) => Err(TemplateError::Unusable { id, source }),
        }
    }

    /// All there are, sorted by id.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, TemplateError> {
        let entries = match fs::read_dir(self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(file("read", self.root)(error)),
        };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry.map_err(file("read", self.root))?;
            let id = entry.file_name().to_string_lossy().into_owned();
            if !id.starts_with('.') {
                let template = self.get(&id);
                all.push(Listed { id, template });
            }
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }

    fn get(&self, id: &str) -> Result<Template, TemplateError> {
        let directory = self.root.join(id);
        let path = directory.join(RECORD);
        let text = fs::read(&path).map_err(file("read", &path))?;
        let record = serde_json::from_slice(&text)
            .map_err(|error| file("understand", &path)(error.into()))?;
        let mut disk_bytes = 0;
        for entry in fs::read_dir(&directory).map_err(file("read", &directory))? {
            let metadata = entry.and_then(|entry| entry.metadata());
            // Blocks are counted in units of 512 bytes.
            disk_bytes += 512 * metadata.map_err(file("read", &directory))?.blocks();
        }
        Ok(Template {
            id: id.to_owned(),
            record,
            disk_bytes,
        })
    }

    /// Removes the template. Machines that began from it go on.
    ///
    /// # Errors
    /// There is none, or the file system's.
    pub fn remove(&self, id: &str) -> Result<(), TemplateError> {
        let is_id = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let directory = self.root.join(id);
        if !is_id || !directory.is_dir() {
            return Err(TemplateError::Unknown {
                id: id.to_owned(),
                root: self.root.to_owned(),
            });
        }
        // Nothing finds half of one.
        let doomed = self.unfinished();
        fs::rename(&directory, &doomed).map_err(file("remove", &directory))?;
        fs::remove_dir_all(&doomed).map_err(file("remove", &doomed))
    }

    /// Removes what was left unfinished by processes that were killed.
    fn sweep(&self) {
        for entry in fs::read_dir(self.root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(UNFINISHED));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    fn unfinished(&self) -> PathBuf {
        self.root
            .join(format!("{UNFINISHED}{}", std::process::id()))
    }

    /// Boots a machine, and writes it down when its agent has answered. One of the same shape is replaced. For its
    /// interfaces the calling process leaves its network namespace.
    ///
    /// # Errors
    /// The guest does not come up, or the files cannot be written; nothing is left then.
    pub fn create(&self, boot: &Boot, interfaces: usize) -> Result<Template, TemplateError> {
        let shape = Shape::of(boot, interfaces)?;
        let id = id(&shape);
        let private = |path: &Path, recursive| {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(recursive).mode(0o700);
            builder.create(path).map_err(file("create", path))
        };
        private(self.root, true)?;
        self.sweep();
        let unfinished = Unfinished(self.unfinished());
        private(&unfinished.0, false)?;
        let nothing = unfinished.0.join("nothing");
        private(&nothing, false)?;
        let mut machine = until_agent_waits(boot, interfaces, &nothing)?;
        let files = SnapshotFiles::create(&unfinished.0)?;
        machine.pause()?.write(&files)?;
        drop(machine);
        fs::remove_dir(&nothing).map_err(file("remove", &nothing))?;
        let record = Record {
            shape,
            kernel: boot.kernel.clone(),
            created: clock::rfc3339(clock::now()),
        };
        let path = unfinished.0.join(RECORD);
        let text = serde_json::to_vec(&record).map_err(|e| file("write", &path)(e.into()))?;
        fs::write(&path, text).map_err(file("write", &path))?;
        self.put(&unfinished, &id)?;
        self.get(&id)
    }

    /// Gives what is finished its name; what had it before is taken away with `unfinished`.
    fn put(&self, unfinished: &Unfinished, id: &str) -> Result<(), TemplateError> {
        let directory = self.root.join(id);
        let how = if directory.exists() {
            RenameFlags::EXCHANGE
        } else {
            RenameFlags::NOREPLACE
        };
        renameat_with(CWD, &unfinished.0, CWD, &directory, how)
            .map_err(|errno| file("create", &directory)(errno.into()))
    }
}

/// Takes what is not finished away.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn id(shape: &Shape) -> String {
    // A structure of numbers and strings has a text.
    let text = serde_json::to_vec(shape).unwrap_or_default();
    let mut id = String::new();
    for byte in Sha256::digest(&text) {
        let _ = write!(id, "{byte:02x}");
    }
    id.truncate(ID_LENGTH);
    id
}

/// Boots a machine with the devices that one of this shape has, each with nothing of the host's behind it, until its
/// agent has answered a call and has no connection left.
fn until_agent_waits(boot: &Boot, interfaces: usize, shares: &Path) -> Result<RunningVm, VmmError> {
    if interfaces > 0 {
        unshare(CloneFlags::CLONE_NEWNET).map_err(errno("make a network namespace"))?;
    }
    let interfaces = (0..interfaces).map(|interface| {
        Ok(Interface {
            tap: Tap::create(TAP_NAMES).map_err(NetworkError::from)?,
            mac: link_address(interface),
            mtu: MTU,
        })
    });
    let vm = Vm::new(VmConfig {
        vcpus: boot.vcpus,
        memory: boot.memory_size()?,
        origin: Origin::Kernel(boot.kernel_config()?),
        console: Box::new(io::sink()),
        rng: true,
        balloon: true,
        hotplug: true,
        vsock: Some(VsockConfig {
            cid: GuestCid::DEFAULT,
            socket: None,
        }),
        shares: [ROOTFS_TAG, VOLUMES_TAG]
            .map(|tag| shared_directory(tag, shares, Cache::None, Access::ReadOnly))
            .into_iter()
            .collect::<Result<_, _>>()?,
        interfaces: interfaces.collect::<Result<_, VmmError>>()?,
        disks: Vec::new(),
        leave_host: Box::new(|| Ok(())),
        seccomp: confinement(),
        intruder: None,
    })
    .map_err(VmmError::Machine)?;
    let vsock = vsock_of(&vm)?;
    let hello = vsock
        .listen(RPC_PORT)
        .map_err(io_error("listen for the guest's agent"))?;
    let mut vm = vm.start().map_err(VmmError::Machine)?;
    hear_agent(&hello, &mut vm, boot)?;
    let agent = renew(&vsock)?;
    // It has closed its end when ours reads the end.
    agent
        .finish()
        .map_err(io_error("close the connection to the guest's agent"))?;
    Ok(vm)
}

/// Calls the agent of a machine for the first time: gives it randomness and the time.
pub fn renew(vsock: &VsockHandle) -> Result<Agent, VmmError> {
    let stream = vsock.connect(RPC_PORT);
    let stream = stream.map_err(io_error("connect to the guest's agent"))?;
    let mut agent = Agent::over(stream).map_err(io_error("limit the agent's time"))?;
    let mut seed = vec![0; SEED];
    getrandom(&mut seed, GetRandomFlags::empty())
        .map_err(|error| io_error("draw random bytes")(error.into()))?;
    let unix_nanos = u64::try_from(clock::now().as_nanos()).unwrap_or(u64::MAX);
    agent.call::<Renew>(&RenewRequest { seed, unix_nanos })?;
    Ok(agent)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn boot(kernel: &Path) -> Boot {
        Boot {
            kernel: kernel.to_owned(),
            modules: None,
            initrd: None,
            agent: kernel.to_owned(),
            parameters: Vec::new(),
            vcpus: 1,
            memory: 256 << 20,
            limit: Duration::from_secs(1),
        }
    }

    #[test]
    fn a_shape_has_one_id_until_anything_of_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        fs::write(&kernel, "one").unwrap();
        let id_of = |boot: &Boot, interfaces| id(&Shape::of(boot, interfaces).unwrap());
        let first = id_of(&boot(&kernel), 0);
        assert_eq!(first.len(), ID_LENGTH);
        assert_eq!(id_of(&boot(&kernel), 0), first);
        assert_ne!(id_of(&boot(&kernel), 1), first);
        let mut other = boot(&kernel);
        other.memory += 2 << 20;
        assert_ne!(id_of(&other, 0), first);
        other = boot(&kernel);
        other.parameters.push("quiet".to_owned());
        assert_ne!(id_of(&other, 0), first);
        fs::write(&kernel, "another").unwrap();
        assert_ne!(id_of(&boot(&kernel), 0), first);
    }

    #[test]
    fn nothing_is_found_where_nothing_is_or_a_bundle_brings_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        fs::write(&kernel, "kernel").unwrap();
        let root = dir.path().join("templates");
        let templates = Templates::new(&root);
        let found = |boot: &Boot| templates.find(boot, 0).map(|found| found.is_some());
        assert!(!found(&boot(&kernel)).unwrap());
        let id = id(&Shape::of(&boot(&kernel), 0).unwrap());
        fs::create_dir_all(root.join(&id)).unwrap();
        let error = found(&boot(&kernel)).unwrap_err().to_string();
        // Another user's directory could be written by that one.
        let expected = if nix::unistd::geteuid().is_root() {
            format!(
                "the template {id} cannot be used: remove it with `rt template remove {id}`, or make it anew"
            )
        } else {
            let root = root.display();
            format!(
                "{root} could be written by others than root: take that from them with chown and chmod"
            )
        };
        assert_eq!(error, expected);
        let mut own = boot(&kernel);
        own.initrd = Some(kernel.clone());
        assert!(!found(&own).unwrap());
    }

    #[test]
    fn only_what_is_a_template_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("templates");
        fs::create_dir_all(root.join("1234")).unwrap();
        fs::create_dir_all(dir.path().join("else")).unwrap();
        let templates = Templates::new(&root);
        for id in ["", ".", "..", "../else", "5678"] {
            let error = templates.remove(id).unwrap_err();
            assert!(
                matches!(error, TemplateError::Unknown { .. }),
                "{id}: {error}"
            );
        }
        templates.remove("1234").unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        assert!(dir.path().join("else").exists());
    }

    #[test]
    fn a_template_takes_the_place_of_one_of_its_shape() {
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::new(dir.path());
        for content in ["first", "second"] {
            let unfinished = Unfinished(templates.unfinished());
            fs::create_dir(&unfinished.0).unwrap();
            fs::write(unfinished.0.join("memory"), content).unwrap();
            templates.put(&unfinished, "1234").unwrap();
        }
        let kept = fs::read_to_string(dir.path().join("1234/memory")).unwrap();
        assert_eq!(kept, "second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_template_is_listed_with_its_fault_and_an_unfinished_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["1234", ".new-0"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let templates = Templates::new(dir.path());
        let all = templates.list().unwrap();
        let [Listed { id, template }] = all.as_slice() else {
            panic!("{all:?}")
        };
        assert_eq!(id, "1234");
        let error = template.as_ref().unwrap_err().to_string();
        assert!(error.ends_with("1234/template.json"), "{error}");
        templates.sweep();
        assert!(!dir.path().join(".new-0").exists());
    }
}
