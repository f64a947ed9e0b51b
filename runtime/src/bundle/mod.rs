//! A bundle on disk: `config.json` and the root file system that it names.
//!
//! Everything here was written by whoever made the bundle, who may be hostile: sizes are bounded, each error names
//! the file and the place in it, and nothing of the bundle is executed or followed beyond the root directory's path.

mod vm;

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Box as ConsoleSize, Capabilities, Capability, Mount, Process, Spec};
use serde::Deserialize;
use serde_json::{Map, Value};

pub use vm::{HwConfig, VmHypervisor, VmImage, VmKernel, VmSection};

/// The file that describes a bundle (OCI runtime specification, "Filesystem Bundle").
pub const CONFIG_FILE: &str = "config.json";

/// The largest `config.json` that is read, in bytes. Real ones are below 100 KiB.
const CONFIG_LIMIT: u64 = 16 << 20;

/// What is wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The bundle's directory cannot be used.
    #[error("bundle {}: give the path of a directory that holds {CONFIG_FILE}", path.display())]
    Directory {
        /// As given.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is no `config.json`.
    #[error("JSON specification file {CONFIG_FILE} not found in {}: `rt spec` writes one", bundle.display())]
    NoConfig {
        /// The bundle's directory.
        bundle: PathBuf,
    },
    /// `config.json` cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// `config.json` is too large to be one.
    #[error("{}: larger than {} MiB", path.display(), CONFIG_LIMIT >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// `config.json` is no JSON.
    #[error("{}: not valid JSON", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A value has the wrong type, or a required one is missing.
    #[error("{}: at `{at}`", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The place in it, as `process.args[0]`.
        at: String,
        /// What is wrong there.
        #[source]
        source: serde_json::Error,
    },
    /// A property that a Linux container cannot do without is missing.
    #[error("{}: `{property}` is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// Its path in the file.
        property: &'static str,
    },
    /// A value has the right type and still cannot be.
    #[error("{}: `{property}` {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Its path in the file.
        property: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A version of the specification that is not known.
    #[error("{}: `ociVersion` is {version:?}: versions 1.x are supported", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// As given.
        version: String,
    },
    /// The root file system is not there.
    #[error("root file system {}, which `root.path` in {} names", rootfs.display(), path.display())]
    Rootfs {
        /// The file.
        path: PathBuf,
        /// The directory that it names.
        rootfs: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A bundle that was loaded and checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
    rootfs: PathBuf,
    spec: Spec,
    vm: Option<VmSection>,
}

impl Bundle {
    /// Loads the bundle in the directory `dir`: `config.json` is parsed and checked, the root directory is there.
    ///
    /// # Errors
    /// What is wrong, with the file and the place in it.
    pub fn load(dir: &Path) -> Result<Self, BundleError> {
        let dir = directory(dir)?;
        let path = dir.join(CONFIG_FILE);
        let text = read_config(&dir, &path)?;
        let (mut spec, vm) = parse(&path, &text)?;
        let rootfs = check(&dir, &path, &spec)?;
        spec.process().iter().for_each(warn_of_ambient);
        make_absolute(&dir, &rootfs, &mut spec);
        Ok(Self {
            dir,
            rootfs,
            spec,
            vm,
        })
    }

    /// The bundle's directory, absolute and without symbolic links.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The root directory, absolute and without symbolic links.
    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }

    /// The configuration without its `vm` section; `root.path` and the sources of bind mounts are absolute.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The `vm` section, if there is one.
    pub fn vm(&self) -> Option<&VmSection> {
        self.vm.as_ref()
    }

    /// An annotation's value.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations()?.get(key).map(String::as_str)
    }

    /// All annotations.
    pub fn annotations(&self) -> Option<&HashMap<String, String>> {
        self.spec.annotations().as_ref()
    }

    /// The configuration as JSON, with the `vm` section, as [`load_config`] reads it.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let mut value = serde_json::to_value(&self.spec)?;
        if let (Some(config), Some(vm)) = (value.as_object_mut(), &self.vm) {
            config.insert("vm".to_owned(), serde_json::to_value(vm)?);
        }
        serde_json::to_vec(&value)
    }

    /// The same bundle with `linux.cgroupsPath` replaced by the path that was resolved for it.
    #[must_use]
    pub fn with_cgroup_path(mut self, cgroup_path: &Path) -> Self {
        if let Some(linux) = self.spec.linux_mut() {
            linux.set_cgroups_path(Some(cgroup_path.to_owned()));
        }
        self
    }

    /// The same bundle with other `mounts`; the sources of bind mounts are absolute.
    #[must_use]
    pub fn with_mounts(mut self, mounts: Vec<Mount>) -> Self {
        self.spec.set_mounts(Some(mounts));
        self
    }

    /// The same bundle with another `process.consoleSize`.
    #[must_use]
    pub fn with_console_size(mut self, size: ConsoleSize) -> Self {
        if let Some(process) = self.spec.process_mut() {
            process.set_console_size(Some(size));
        }
        self
    }
}

/// A configuration that can be read, though it may be none that can run.
#[derive(Debug)]
pub struct Draft {
    /// The bundle's directory, absolute and without symbolic links.
    pub dir: PathBuf,
    /// The file.
    pub path: PathBuf,
    /// As it is.
    pub text: String,
    /// The same with the parts that we do not know.
    pub json: Value,
    /// As a bundle's, but `root.path` and the sources of bind mounts are made absolute without following links.
    pub spec: Spec,
    /// Why [`Bundle::load`] would refuse it.
    pub problem: Option<BundleError>,
}

impl Draft {
    /// Reads the configuration of the bundle in the directory `dir`.
    ///
    /// # Errors
    /// There is none, or it is not of the form of one.
    pub fn read(dir: &Path) -> Result<Self, BundleError> {
        let dir = directory(dir)?;
        let path = dir.join(CONFIG_FILE);
        let text = read_config(&dir, &path)?;
        let json = parse_json(&path, &text)?;
        let (mut spec, _) = parse(&path, &text)?;
        let problem = check(&dir, &path, &spec).err();
        let rootfs = spec.root().as_ref().map(|root| dir.join(root.path()));
        make_absolute(&dir, &rootfs.unwrap_or_default(), &mut spec);
        Ok(Self {
            dir,
            path,
            text: String::from_utf8_lossy(&text).into_owned(),
            json,
            spec,
            problem,
        })
    }
}

fn directory(dir: &Path) -> Result<PathBuf, BundleError> {
    let resolved = dir.canonicalize().and_then(|path| {
        if path.is_dir() {
            Ok(path)
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    });
    resolved.map_err(|source| BundleError::Directory {
        path: dir.to_owned(),
        source,
    })
}

/// Reads a configuration without its bundle: one that we wrote ourselves beside a state record, or one to measure with.
///
/// # Errors
/// As [`Bundle::load`], but the root directory may be gone.
pub fn load_config(path: &Path) -> Result<(Spec, Option<VmSection>), BundleError> {
    let text = read_config(path.parent().unwrap_or(path), path)?;
    parse(path, &text)
}

/// Reads such a configuration as it is, with the parts that we do not know.
///
/// # Errors
/// It cannot be read, or is no JSON.
pub fn load_json(path: &Path) -> Result<Value, BundleError> {
    let text = read_config(path.parent().unwrap_or(path), path)?;
    parse_json(path, &text)
}

fn parse_json(path: &Path, text: &[u8]) -> Result<Value, BundleError> {
    serde_json::from_slice(text).map_err(|source| BundleError::Syntax {
        path: path.to_owned(),
        source,
    })
}

fn read_config(bundle: &Path, path: &Path) -> Result<Vec<u8>, BundleError> {
    read_regular(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => BundleError::NoConfig {
            bundle: bundle.to_owned(),
        },
        io::ErrorKind::FileTooLarge => BundleError::TooLarge {
            path: path.to_owned(),
        },
        _ => BundleError::Read {
            path: path.to_owned(),
            source,
        },
    })
}

/// Reads a regular file, of no more than [`CONFIG_LIMIT`] bytes.
///
/// # Errors
/// It cannot be read, is another kind of file, or is larger.
pub fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    // O_NONBLOCK: a FIFO under this name must not hold us.
    let mut options = std::fs::OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut text = Vec::new();
    file.take(CONFIG_LIMIT + 1).read_to_end(&mut text)?;
    if text.len() as u64 > CONFIG_LIMIT {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(text)
}

fn parse(path: &Path, text: &[u8]) -> Result<(Spec, Option<VmSection>), BundleError> {
    let mut value: Value = serde_json::from_slice(text).map_err(|source| BundleError::Syntax {
        path: path.to_owned(),
        source,
    })?;
    let Some(config) = value.as_object_mut() else {
        return Err(BundleError::Invalid {
            path: path.to_owned(),
            property: ".",
            problem: "must be an object".to_owned(),
        });
    };
    // oci-spec requires `vm.kernel` and does not know `hwConfig`: we read that section ourselves.
    let vm = match config.shift_remove("vm") {
        None | Some(Value::Null) => None,
        Some(section) => Some(typed::<VmSection>(path, "vm.", section)?),
    };
    settle_pids(config);
    if let Some(process) = config.get_mut("process") {
        settle_process(process);
    }
    let spec = typed::<Spec>(path, "", value)?;
    Ok((spec, vm))
}

/// `pids.limit` is 0 in the configurations of older clients where they mean no limit. From runtime-spec 1.3 on that is
/// -1, 0 is a number, and nothing is no wish; oci-spec has 0 for that.
fn settle_pids(config: &mut Map<String, Value>) {
    let mut version = config
        .get("ociVersion")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or_default());
    let older = (version.next(), version.next()) < (Some(1), Some(3));
    let resources = config
        .get_mut("linux")
        .and_then(|linux| linux.get_mut("resources"))
        .and_then(Value::as_object_mut);
    let Some(resources) = resources else {
        return;
    };
    let Some(pids) = resources.get_mut("pids").and_then(Value::as_object_mut) else {
        return;
    };
    match pids.get("limit") {
        None | Some(Value::Null) => drop(resources.shift_remove("pids")),
        Some(limit) if older && limit.as_i64() == Some(0) => {
            pids.insert("limit".to_owned(), Value::from(-1));
        }
        Some(_) => {}
    }
}

/// Reads a process of its own, as `process` in `config.json`.
///
/// # Errors
/// It is no JSON, or a value in it has the wrong type.
pub fn parse_process(path: &Path, text: &[u8]) -> Result<Process, BundleError> {
    let mut value = parse_json(path, text)?;
    settle_process(&mut value);
    let process = typed(path, "", value)?;
    warn_of_ambient(&process);
    Ok(process)
}

/// Gives a process the ids of root where clients leave them out, and its scheduler flags the names that oci-spec reads.
/// Names of capabilities that nobody knows go: they may be of a later kernel, and the specification wants a warning.
fn settle_process(process: &mut Value) {
    let Some(process) = process.as_object_mut() else {
        return;
    };
    let user = process
        .entry("user")
        .or_insert_with(|| Value::Object(Map::new()));
    if let Some(user) = user.as_object_mut() {
        for id in ["uid", "gid"] {
            user.entry(id).or_insert(Value::from(0));
        }
    }
    // oci-spec spells two of them otherwise than the specification.
    let flags = process
        .get_mut("scheduler")
        .and_then(|one| one.get_mut("flags"));
    for flag in flags.and_then(Value::as_array_mut).into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
    let sets = process.get_mut("capabilities");
    let mut unknown = BTreeSet::new();
    for set in sets.and_then(Value::as_object_mut).into_iter().flatten() {
        let Some(names) = set.1.as_array_mut() else {
            continue;
        };
        names.retain(|name| match name.as_str() {
            Some(text) if Capability::deserialize(name).is_err() => {
                unknown.insert(text.to_owned());
                false
            }
            _ => true,
        });
    }
    for name in unknown {
        tracing::warn!("ignoring the unknown capability {name}");
    }
}

/// The kernel gives no ambient capability that is not permitted and inheritable too. Clients that give nothing to inherit
/// since CVE-2022-29162, and ask for ambient ones as before, mean that: only one that is left out of others is a mistake.
fn warn_of_ambient(process: &Process) {
    let Some(sets) = process.capabilities() else {
        return;
    };
    let has = |set: &Option<Capabilities>, one| set.iter().flatten().any(|other| other == one);
    let nothing_is_inheritable = sets.inheritable().iter().flatten().next().is_none();
    for one in sets.ambient().iter().flatten() {
        if has(sets.permitted(), one) && has(sets.inheritable(), one) {
            continue;
        }
        let text = "can't raise ambient capability";
        let reason = "it is not permitted and inheritable too";
        if nothing_is_inheritable {
            tracing::debug!("{text} CAP_{one}: {reason}");
        } else {
            tracing::warn!("{text} CAP_{one}: {reason}");
        }
    }
}

/// Deserializes `value`, naming the place of an error.
fn typed<T: serde::de::DeserializeOwned>(
    path: &Path,
    prefix: &str,
    value: Value,
) -> Result<T, BundleError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let at = format!("{prefix}{}", error.path());
        BundleError::Value {
            path: path.to_owned(),
            at,
            source: error.into_inner(),
        }
    })
}

fn check(dir: &Path, path: &Path, spec: &Spec) -> Result<PathBuf, BundleError> {
    let missing = |property| BundleError::Missing {
        path: path.to_owned(),
        property,
    };
    let invalid = |property, problem: &str| BundleError::Invalid {
        path: path.to_owned(),
        property,
        problem: problem.to_owned(),
    };
    if spec.version().is_empty() {
        return Err(missing("ociVersion"));
    }
    if !version_is_supported(spec.version()) {
        return Err(BundleError::Version {
            path: path.to_owned(),
            version: spec.version().clone(),
        });
    }
    let process = spec.process().as_ref().ok_or(missing("process"))?;
    if process.args().as_ref().is_none_or(|args| args.is_empty()) {
        return Err(invalid("process.args", "must name a program"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid("process.cwd", "must be an absolute path"));
    }
    if spec.linux().is_none() {
        return Err(missing("linux"));
    }
    let root = spec.root().as_ref().ok_or(missing("root"))?;
    let rootfs = dir.join(root.path());
    let rootfs_error = |source| BundleError::Rootfs {
        path: path.to_owned(),
        rootfs: rootfs.clone(),
        source,
    };
    let resolved = rootfs.canonicalize().map_err(rootfs_error)?;
    if !resolved.is_dir() {
        return Err(rootfs_error(io::ErrorKind::NotADirectory.into()));
    }
    Ok(resolved)
}

/// Paths on the host count from the bundle's directory; from here on nobody needs to know it.
fn make_absolute(dir: &Path, rootfs: &Path, spec: &mut Spec) {
    if let Some(root) = spec.root_mut() {
        root.set_path(rootfs.to_owned());
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let bind = mount.typ().as_deref() == Some("bind")
            || mount
                .options()
                .iter()
                .flatten()
                .any(|option| option == "bind" || option == "rbind");
        if let Some(source) = mount.source().as_ref().filter(|_| bind) {
            mount.set_source(Some(dir.join(source)));
        }
    }
}

/// 1.x in every form that clients send: `1.0.2-dev`, `1.3.0`, and minor versions still to come. Within a major
/// version the specification only adds.
fn version_is_supported(version: &str) -> bool {
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Option<Vec<u32>> = core.split('.').map(|part| part.parse().ok()).collect();
    matches!(numbers.as_deref(), Some([1, _] | [1, _, _]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"process":{"cwd":"/","args":["sh"],
        "user":{"uid":0,"gid":0}},"linux":{}}"#;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), config).unwrap();
        dir
    }

    /// The error as a user sees it, with the bundle's directory written as `B`.
    fn message(dir: &tempfile::TempDir) -> String {
        let error = Bundle::load(dir.path()).unwrap_err();
        let mut text = crate::error_chain(&error);
        text = text.replace(dir.path().canonicalize().unwrap().to_str().unwrap(), "B");
        text
    }

    fn error_of(config: &str) -> String {
        message(&bundle(config))
    }

    #[test]
    fn a_pids_limit_of_0_is_none_for_older_clients() {
        let limit = |version: &str, pids: &str| {
            let linux = format!(r#""linux":{{"resources":{{"pids":{pids}}}}}"#);
            let config = VALID
                .replace("1.2.0", version)
                .replace(r#""linux":{}"#, &linux);
            let (spec, _) = parse(Path::new("config.json"), config.as_bytes()).unwrap();
            let resources = spec.linux().as_ref().unwrap().resources().clone().unwrap();
            resources.pids().map(|pids| pids.limit())
        };
        assert_eq!(limit("1.0.2-dev", r#"{"limit":0}"#), Some(-1));
        assert_eq!(limit("1.3.0", r#"{"limit":0}"#), Some(0));
        assert_eq!(limit("1.2.0", r#"{"limit":7}"#), Some(7));
        assert_eq!(limit("1.3.0", "{}"), None);
    }

    #[test]
    fn a_process_may_leave_out_its_user_and_name_capabilities_to_come() {
        let process = r#"{"cwd":"/","args":["sh"],"user":{"uid":7},
            "capabilities":{"bounding":["CAP_KILL","CAP_OF_LATER"],"effective":["CAP_OF_LATER"]}}"#;
        let process = parse_process(Path::new("process.json"), process.as_bytes()).unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (7, 0));
        let sets = process.capabilities().as_ref().unwrap();
        assert_eq!(sets.bounding(), &Some([Capability::Kill].into()));
        assert_eq!(sets.effective(), &Some([].into()));
        let process = parse_process(Path::new("process.json"), br#"{"cwd":"/","args":["sh"]}"#);
        assert_eq!(process.unwrap().user().uid(), 0);
    }

    #[test]
    fn a_valid_bundle_loads_with_its_root() {
        let dir = bundle(VALID);
        let loaded = Bundle::load(dir.path()).unwrap();
        assert_eq!(
            loaded.rootfs(),
            dir.path().canonicalize().unwrap().join("rootfs")
        );
        assert!(loaded.vm().is_none());
    }

    #[test]
    fn errors_name_the_file_and_the_place() {
        assert_eq!(
            error_of("{\"ociVersion\": "),
            "B/config.json: not valid JSON: EOF while parsing a value at line 1 column 15"
        );
        assert_eq!(
            error_of(&VALID.replace("[\"sh\"]", "\"sh\"")),
            "B/config.json: at `process.args`: invalid type: string \"sh\", expected a sequence"
        );
        assert_eq!(error_of("[]"), "B/config.json: `.` must be an object");
        assert_eq!(
            error_of(&VALID.replace("1.2.0", "2.0.0")),
            "B/config.json: `ociVersion` is \"2.0.0\": versions 1.x are supported"
        );
        assert_eq!(
            error_of(&VALID.replace("\"path\":\"rootfs\"", "\"path\":\"nowhere\"")),
            "root file system B/nowhere, which `root.path` in B/config.json names: No such file or directory (os error 2)"
        );
        assert_eq!(
            error_of(&VALID.replace("[\"sh\"]", "[]")),
            "B/config.json: `process.args` must name a program"
        );
        assert_eq!(
            error_of(r#"{"ociVersion":"1.0.0"}"#),
            "B/config.json: `process` is missing"
        );
        assert_eq!(error_of("{}"), "B/config.json: `ociVersion` is missing");
    }

    #[test]
    fn a_directory_without_config_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            message(&dir),
            "JSON specification file config.json not found in B: `rt spec` writes one"
        );
    }

    #[test]
    fn the_vm_section_needs_no_kernel_and_has_hw_config() {
        let dir = bundle(&VALID.replace(
            "\"linux\"",
            r#""vm":{"hwConfig":{"vcpus":2,"memory":268435456}},"linux""#,
        ));
        let loaded = Bundle::load(dir.path()).unwrap();
        let hw = loaded.vm().unwrap().hw_config.clone().unwrap();
        assert_eq!((hw.vcpus, hw.memory), (Some(2), Some(268_435_456)));
        assert_eq!(
            error_of(&VALID.replace("\"linux\"", r#""vm":{"hwConfig":{"vcpus":"2"}},"linux""#)),
            "B/config.json: at `vm.hwConfig.vcpus`: invalid type: string \"2\", expected u32"
        );
    }

    #[test]
    fn unknown_properties_are_ignored_as_the_specification_says() {
        assert!(
            Bundle::load(bundle(&VALID.replace("\"linux\"", "\"x\":{\"y\":1},\"linux\"")).path())
                .is_ok()
        );
    }

    #[test]
    fn versions_of_major_1_are_supported() {
        for version in ["1.0.0", "1.0.2-dev", "1.2", "1.3.0-rc.1", "1.99.0+build"] {
            assert!(version_is_supported(version), "{version}");
        }
        for version in ["", "1", "0.9.0", "2.0.0", "v1.0.0", "1.0.0.0", "1.x"] {
            assert!(!version_is_supported(version), "{version}");
        }
    }

    #[test]
    fn a_fifo_as_config_is_an_error_not_a_hang() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join(CONFIG_FILE), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(message(&dir), "read B/config.json: not a regular file");
    }
}
