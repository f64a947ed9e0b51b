//! Checkpoint and restore of a container's processes by the program `criu`.
//!
//! criu reads and writes the processes from outside and is trusted like the kernel; the images are as trusted as the
//! caller who names their directory. What is the host's and not the container's is told to criu by name: bind mounts,
//! an existing network namespace, and the pipes of the standard streams.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use engine::cgroup::Cgroup;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::Images;

/// The file among the images that says what the standard streams were, as runc writes it.
const DESCRIPTORS: &str = "descriptors.json";

/// What the images call a network namespace that the container was put into.
const NETWORK: &str = "network";

/// Why criu did not do it.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// There is no criu.
    #[error("criu is not on the PATH: install the package criu")]
    Missing,
    /// Something that criu would need to be told, and is not.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A file, a directory or a call of the kernel.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// As a verb.
        operation: &'static str,
        /// The object.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// criu tried and failed.
    #[error("criu failed: {reason} (all of it is in {})", log.display())]
    Failed {
        /// The last error in its log.
        reason: String,
        /// The log.
        log: PathBuf,
    },
    /// The restored process is not where its limits are.
    #[error(
        "the checkpoint was taken in another cgroup: restore it under the id and `linux.cgroupsPath` that it had"
    )]
    OtherCgroup,
}

type Result<T> = std::result::Result<T, CriuError>;

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CriuError {
    move |source| CriuError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// Writes the processes below `pid` to images.
pub(super) fn dump(pid: i32, spec: &Spec, rootfs: &Path, images: &Images) -> Result<()> {
    refuse_terminal(spec)?;
    make_directory(&images.image_path)?;
    let action = if images.pre_dump { "pre-dump" } else { "dump" };
    let mut criu = criu(action, rootfs, images)?;
    criu.arg("--tree").arg(pid.to_string());
    if images.leave_running {
        criu.arg("--leave-running");
    }
    if images.pre_dump || images.parent_path.is_some() {
        criu.arg("--track-mem");
    }
    if let Some(parent) = &images.parent_path {
        criu.arg("--prev-images-dir").arg(parent);
    }
    if let Some(path) = network_path(spec) {
        let inode = fs::metadata(path).map_err(io_error("look at", path))?.ino();
        criu.arg("--external")
            .arg(format!("net[{inode}]:{NETWORK}"));
    }
    let names: Vec<String> = (0..3)
        .map(|number| {
            let link = fs::read_link(format!("/proc/{pid}/fd/{number}"));
            link.map(|link| link.to_string_lossy().into_owned())
                .unwrap_or_default()
        })
        .collect();
    run(criu, images, action)?;
    let path = images.image_path.join(DESCRIPTORS);
    let written = serde_json::to_vec(&names)
        .map_err(io::Error::from)
        .and_then(|text| fs::write(&path, text));
    written.map_err(io_error("write", &path))
}

/// Makes processes from images, in `cgroup`, and returns the first one's pid, a child of ours.
pub(super) fn restore(
    spec: &Spec,
    rootfs: &Path,
    cgroup: &Cgroup,
    pid_file: &Path,
    images: &Images,
) -> Result<i32> {
    refuse_terminal(spec)?;
    if spec.hooks().as_ref().is_some_and(|hooks| {
        let before = [
            hooks.prestart(),
            hooks.create_runtime(),
            hooks.create_container(),
            hooks.start_container(),
        ];
        before.into_iter().flatten().any(|hooks| !hooks.is_empty())
    }) {
        return Err(CriuError::Unsupported(
            "`hooks`: those that run before the program cannot run at a restore: leave them out",
        ));
    }
    let action = "restore";
    let mut criu = criu(action, rootfs, images)?;
    criu.args(["--restore-detached", "--restore-sibling", "--pidfile"])
        .arg(pid_file);
    let path = images.image_path.join(DESCRIPTORS);
    let text = fs::read(&path).map_err(io_error("read", &path))?;
    let names: Vec<String> =
        serde_json::from_slice(&text).map_err(|error| io_error("read", &path)(error.into()))?;
    for (number, name) in names.iter().take(3).enumerate() {
        if name.starts_with("pipe:") {
            criu.arg("--inherit-fd").arg(format!("fd[{number}]:{name}"));
        }
    }
    // Kept open until criu has it.
    let network = network_path(spec)
        .map(|path| File::open(path).map_err(io_error("open", path)))
        .transpose()?;
    let network_fd = network.as_ref().map(AsRawFd::as_raw_fd);
    if let Some(fd) = network_fd {
        criu.arg("--inherit-fd").arg(format!("fd[{fd}]:{NETWORK}"));
    }
    let (root, cgroup) = (rootfs.to_owned(), cgroup.clone());
    // SAFETY: we have one thread, so the child may do whatever its parent may.
    unsafe { criu.pre_exec(move || prepare(&root, &cgroup, network_fd)) };
    run(criu, images, action)?;
    let pid = fs::read_to_string(pid_file).and_then(|text| {
        let pid = text.trim().parse::<i32>();
        pid.map_err(io::Error::other)
    });
    pid.map_err(io_error("read", pid_file))
}

/// In the process that becomes criu: its limits, and a root that is a mount of its own, as criu wants it.
fn prepare(rootfs: &Path, cgroup: &Cgroup, network: Option<RawFd>) -> io::Result<()> {
    cgroup.enter().map_err(io::Error::other)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(rootfs), rootfs, none, bind, none)?;
    mount(none, rootfs, none, MsFlags::MS_PRIVATE, none)?;
    if let Some(fd) = network {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    Ok(())
}

/// criu with what dump and restore have in common.
fn criu(action: &'static str, rootfs: &Path, images: &Images) -> Result<Command> {
    let mut criu = Command::new("criu");
    criu.arg(action)
        .arg("--images-dir")
        .arg(&images.image_path)
        .args(["--log-file", &log_name(action), "-v2"])
        .arg("--root")
        .arg(rootfs)
        // Mounts of the host's: found by criu itself, by the same paths at the restore.
        .args(["--external", "mnt[]"])
        .arg(format!("--manage-cgroups={}", images.manage_cgroups));
    if let Some(path) = &images.work_path {
        make_directory(path)?;
        criu.arg("--work-dir").arg(path);
    }
    for (flag, is_given) in [
        ("--tcp-established", images.tcp_established),
        ("--ext-unix-sk", images.ext_unix_sk),
        ("--shell-job", images.shell_job),
        ("--file-locks", images.file_locks),
        ("--link-remap", images.link_remap && action != "restore"),
        ("--auto-dedup", images.auto_dedup),
    ] {
        if is_given {
            criu.arg(flag);
        }
    }
    if images.empty_network {
        criu.args(["--empty-ns", "net"]);
    }
    Ok(criu)
}

fn run(mut criu: Command, images: &Images, action: &'static str) -> Result<()> {
    let status = criu.status().map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound {
            CriuError::Missing
        } else {
            io_error("execute", Path::new("criu"))(source)
        }
    })?;
    if status.success() {
        return Ok(());
    }
    let directory = images.work_path.as_ref().unwrap_or(&images.image_path);
    let log = directory.join(log_name(action));
    let text = fs::read(&log).unwrap_or_default();
    let reason = last_error(&String::from_utf8_lossy(&text)).unwrap_or(status.to_string());
    Err(CriuError::Failed { reason, log })
}

/// The last but one kind of line in criu's log: the last only says that the action failed.
fn last_error(log: &str) -> Option<String> {
    let errors = log.lines().filter_map(|line| line.split_once("Error ("));
    let mut texts: Vec<&str> = errors
        .map(|(_, rest)| rest.split_once("): ").map_or(rest, |(_, text)| text))
        .collect();
    let last = texts.pop()?;
    let is_closing = last.ends_with("FAILED.") || last.contains("Restoring FAILED");
    let reason = texts.pop().filter(|_| is_closing).unwrap_or(last);
    Some(reason.trim().to_owned())
}

fn log_name(action: &str) -> String {
    format!("{action}.log")
}

fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("create", path))
}

fn refuse_terminal(spec: &Spec) -> Result<()> {
    let process = spec.process().as_ref();
    if process.and_then(|process| process.terminal()) == Some(true) {
        return Err(CriuError::Unsupported(
            "`process.terminal`: a container with a terminal cannot be checkpointed yet",
        ));
    }
    Ok(())
}

/// The network namespace that the container was put into.
fn network_path(spec: &Spec) -> Option<&Path> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let network = namespaces
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?;
    let path = network.path().as_deref()?;
    Some(path).filter(|path| !path.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_error_before_the_closing_one() {
        let log = "(00.01) Dumping\n(00.02) Error (criu/files.c:10): Can't lookup mount=7\n\
                   (00.03) Warn  (x): y\n(00.04) Error (criu/cr-dump.c:1): Dumping FAILED.\n";
        assert_eq!(last_error(log).unwrap(), "Can't lookup mount=7");
        assert_eq!(
            last_error("Error (criu/x.c:1): only this\n").unwrap(),
            "only this"
        );
        assert_eq!(last_error("(00.01) fine\n"), None);
    }
}
