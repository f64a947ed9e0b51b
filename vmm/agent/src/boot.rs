//! Turns the kernel's bare initramfs into a place where containers can run, and opens the door to the host.
//!
//! Every step costs each VM start, so only what the engine needs is mounted; shares are mounted by the
//! first container that asks for them. The module list and the command line come from the host.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, VsockAddr, bind, connect, listen,
    socket,
};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::utsname::uname;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{chdir, chroot};
use protocol::message::Hello;
use protocol::{PROTOCOL_VERSION, RPC_PORT, STDIO_PORT};
use thiserror::Error;

/// Names, a line each, the kernel modules that the host packed for this kernel, in the order to load.
const MODULES_LIST: &str = "/lib/modules/modules.list";

/// The kernel decompresses the module itself (`MODULE_INIT_COMPRESSED_FILE` of finit_module(2)).
const COMPRESSED_MODULE: u32 = 4;

/// Where the new root is put together.
const NEW_ROOT: &str = "/newroot";

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// The guest cannot be set up.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file system is missing.
    #[error("cannot mount {what} on {target}")]
    Mount {
        /// The file system, or the share's tag.
        what: String,
        /// Where.
        target: PathBuf,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// A path cannot be made, read or entered.
    #[error("cannot {operation} {path}")]
    Path {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A kernel module does not load.
    #[error("cannot load the kernel module {0}")]
    Module(PathBuf, #[source] Errno),
    /// The vsock device is missing, or the host does not listen.
    #[error("cannot {operation} (is there a vsock device, and does the host listen?)")]
    Vsock {
        /// What was tried.
        operation: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A share's tag could name a path.
    #[error("{0:?} is not a tag of a share")]
    Tag(String),
}

/// The two listening sockets of the agent in a guest.
#[derive(Debug)]
pub struct Ports {
    /// For the host's calls.
    pub rpc: OwnedFd,
    /// For stdio streams.
    pub stdio: OwnedFd,
}

/// Makes a root file system that containers can be started from: a tmpfs (the initramfs itself cannot be
/// left by pivot_root) with the kernel's file systems. Loads the modules before that.
///
/// # Errors
/// [`BootError`] for the first step that fails.
pub fn set_up_root() -> Result<(), BootError> {
    load_modules()?;
    let none = MsFlags::empty();
    let closed = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    make_dir(NEW_ROOT)?;
    mount_at(
        "tmpfs",
        NEW_ROOT,
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        "mode=0755",
    )?;
    chdir(NEW_ROOT).map_err(|errno| path_error("enter", NEW_ROOT, errno.into()))?;
    for directory in ["proc", "sys", "dev", "run", "tmp"] {
        make_dir(directory)?;
    }
    mount_at("proc", "proc", "proc", closed, "")?;
    mount_at("sysfs", "sys", "sysfs", closed, "")?;
    mount_at(
        "devtmpfs",
        "dev",
        "devtmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "mode=0755",
    )?;
    mount_at("cgroup2", "sys/fs/cgroup", "cgroup2", closed, "")?;
    // A new network namespace is to have a loopback device and no tunnel. Not every kernel knows how.
    let _ = std::fs::write("proc/sys/net/core/fb_tunnels_only_for_init_net", "2");
    // The initramfs holds this program, which containers must not write to through /proc/PID/exe.
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>)
        .map_err(|source| mount_error("the initramfs read-only", "/", source))?;
    let moved = mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>);
    moved.map_err(|source| mount_error("the new root", "/", source))?;
    chroot(".").map_err(|errno| path_error("change the root to", NEW_ROOT, errno.into()))?;
    chdir("/").map_err(|errno| path_error("enter", "/", errno.into()))?;
    // Containers' mounts must not come back here.
    let private = mount(
        None::<&str>,
        "/",
        None::<&str>,
        none | MsFlags::MS_PRIVATE,
        None::<&str>,
    );
    private.map_err(|source| mount_error("a private root", "/", source))
}

/// Listens on the agent's two vsock ports.
///
/// # Errors
/// [`BootError::Vsock`] if the guest has no vsock device.
pub fn listen_on_vsock() -> Result<Ports, BootError> {
    Ok(Ports {
        rpc: listen_on(RPC_PORT)?,
        stdio: listen_on(STDIO_PORT)?,
    })
}

/// Tells the host that the agent listens. The connection is to be kept open.
///
/// # Errors
/// [`BootError::Vsock`] if the host does not take it.
pub fn say_hello() -> Result<OwnedFd, BootError> {
    let failed = |source: io::Error| BootError::Vsock {
        operation: format!("tell the host on vsock port {RPC_PORT} that the agent is ready"),
        source,
    };
    let system = |errno: Errno| failed(errno.into());
    let kernel = uname().map_err(system)?;
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(system)?;
    let hello = Hello {
        protocol_version: PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: kernel.release().to_string_lossy().into_owned(),
        uptime_nanos: u64::try_from(std::time::Duration::from(uptime).as_nanos())
            .unwrap_or(u64::MAX),
    };
    let bytes = protocol::encode_hello(&hello).map_err(|error| failed(io::Error::other(error)))?;
    let host = VsockAddr::new(libc::VMADDR_CID_HOST, RPC_PORT);
    let socket = vsock_socket(SockFlag::empty()).map_err(system)?;
    connect(socket.as_raw_fd(), &host).map_err(system)?;
    let mut stream = File::from(socket);
    stream.write_all(&bytes).map_err(failed)?;
    Ok(stream.into())
}

/// Mounts the virtio-fs share with this tag at its place, unless it is mounted there.
///
/// # Errors
/// [`BootError`] if the tag is no plain name or the VM has no such share.
pub fn mount_share(tag: &str) -> Result<(), BootError> {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    if tag.is_empty() || tag.len() > 36 || !tag.bytes().all(is_plain) {
        return Err(BootError::Tag(tag.to_owned()));
    }
    let target = Path::new(protocol::SHARES_DIR).join(tag);
    if is_mount_point(&target)? {
        return Ok(());
    }
    let made = fs::create_dir_all(&target);
    made.map_err(|source| BootError::Path {
        operation: "make",
        path: target.clone(),
        source,
    })?;
    let mounted = mount(
        Some(tag),
        &target,
        Some("virtiofs"),
        MsFlags::empty(),
        None::<&str>,
    );
    mounted.map_err(|source| BootError::Mount {
        what: format!("share {tag}"),
        target,
        source,
    })
}

/// Prints a line that the kernel puts on the console whatever its log level: a quiet guest has no
/// console device that could be written to.
pub fn print_emergency(text: &str) {
    let open = |path: &str| File::options().write(true).open(path);
    let log = open("/dev/kmsg").or_else(|_| {
        // In the initramfs, before there is a /dev.
        let device = makedev(1, 11);
        mknod("/kmsg", SFlag::S_IFCHR, Mode::S_IWUSR, device)?;
        open("/kmsg")
    });
    // One write is one line of the log.
    let line = format!("<0>{text}\n");
    if log
        .and_then(|mut log| log.write_all(line.as_bytes()))
        .is_err()
    {
        eprintln!("{text}");
    }
}

/// Ends the VM: powered off, or with `failed` reset, which the host takes for a failure.
pub fn end_vm(failed: bool) -> ! {
    let mode = if failed {
        RebootMode::RB_AUTOBOOT
    } else {
        RebootMode::RB_POWER_OFF
    };
    let _ = reboot(mode);
    // Only without the right to end the VM: that of a process which is not its PID 1.
    std::process::exit(1)
}

fn load_modules() -> Result<(), BootError> {
    let list = match File::open(MODULES_LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(path_error("open", MODULES_LIST, source)),
    };
    for line in BufReader::new(list).lines() {
        let line = line.map_err(|source| path_error("read", MODULES_LIST, source))?;
        if !line.is_empty() {
            load_module(Path::new(&line))?;
        }
    }
    Ok(())
}

fn load_module(path: &Path) -> Result<(), BootError> {
    let path = Path::new("/lib/modules").join(path);
    let failed = |source| BootError::Path {
        operation: "open",
        path: path.clone(),
        source,
    };
    let file = File::open(&path).map_err(failed)?;
    let is_plain = path.extension().is_some_and(|extension| extension == "ko");
    let flags = if is_plain { 0 } else { COMPRESSED_MODULE };
    let loaded = finit_module(
        &file,
        &CString::default(),
        ModuleInitFlags::from_bits_retain(flags),
    );
    match loaded {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(source) => Err(BootError::Module(path, source)),
    }
}

fn listen_on(port: u32) -> Result<OwnedFd, BootError> {
    let failed = |errno: Errno| BootError::Vsock {
        operation: format!("listen on vsock port {port}"),
        source: errno.into(),
    };
    let socket = vsock_socket(SockFlag::SOCK_NONBLOCK).map_err(failed)?;
    let address = VsockAddr::new(libc::VMADDR_CID_ANY, port);
    bind(socket.as_raw_fd(), &address as &dyn SockaddrLike).map_err(failed)?;
    listen(&socket, Backlog::new(BACKLOG).map_err(failed)?).map_err(failed)?;
    Ok(socket)
}

fn vsock_socket(flags: SockFlag) -> Result<OwnedFd, Errno> {
    socket(
        AddressFamily::Vsock,
        SockType::Stream,
        flags | SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// Whether something is mounted on `path`: it is on another device than its parent.
fn is_mount_point(path: &Path) -> Result<bool, BootError> {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.dev())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(BootError::Path {
            operation: "look at",
            path: path.to_owned(),
            source,
        }),
    };
    let Some(own) = device(path)? else {
        return Ok(false);
    };
    Ok(device(Path::new(protocol::SHARES_DIR))? != Some(own))
}

fn make_dir(path: &str) -> Result<(), BootError> {
    fs::create_dir(path).map_err(|source| path_error("make", path, source))
}

fn mount_at(
    what: &str,
    target: &str,
    kind: &str,
    flags: MsFlags,
    data: &str,
) -> Result<(), BootError> {
    mount(Some(what), target, Some(kind), flags, Some(data))
        .map_err(|source| mount_error(what, target, source))
}

fn mount_error(what: &str, target: &str, source: Errno) -> BootError {
    BootError::Mount {
        what: what.to_owned(),
        target: target.into(),
        source,
    }
}

fn path_error(operation: &'static str, path: &str, source: io::Error) -> BootError {
    BootError::Path {
        operation,
        path: path.into(),
        source,
    }
}
