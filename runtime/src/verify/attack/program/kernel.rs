//! Attempts to rule the kernel: its devices, its files, and the calls that only an administrator needs.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::{Failed, Got, Told};

/// A system call that passes numbers alone.
pub(super) fn call(number: libc::c_long, arguments: [i64; 4]) -> Result<i64, Errno> {
    let [a, b, c, d] = arguments;
    // SAFETY: whoever calls this passes no address of memory.
    Errno::result(unsafe { libc::syscall(number, a, b, c, d) })
}

/// Makes a device node and opens it.
pub(super) fn device(kind: SFlag, numbers: (u64, u64)) -> Result<File, Failed> {
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

pub(super) fn memory_device(_: &Told) -> Result<Got, Failed> {
    device(SFlag::S_IFCHR, (1, 1))?;
    Ok(Got::Kernel("the memory device was opened"))
}

pub(super) fn port_device(_: &Told) -> Result<Got, Failed> {
    device(SFlag::S_IFCHR, (1, 4))?;
    Ok(Got::Kernel("the port device was opened"))
}

pub(super) fn log_device(_: &Told) -> Result<Got, Failed> {
    device(SFlag::S_IFCHR, (1, 11))?;
    Ok(Got::Kernel("the kernel's log was opened"))
}

pub(super) fn kernel_memory(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn core_pattern(_: &Told) -> Result<Got, Failed> {
    writable(
        "/proc/sys/kernel/core_pattern",
        "core_pattern can be written",
    )
}

pub(super) fn modprobe_path(_: &Told) -> Result<Got, Failed> {
    writable("/proc/sys/kernel/modprobe", "modprobe can be written")
}

pub(super) fn uevent_helper(_: &Told) -> Result<Got, Failed> {
    writable("/sys/kernel/uevent_helper", "uevent_helper can be written")
}

pub(super) fn sysrq(_: &Told) -> Result<Got, Failed> {
    writable("/proc/sysrq-trigger", "sysrq-trigger can be written")
}

pub(super) fn release_agent(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn own_limits(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn second_proc(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn kernel_module(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn kexec(_: &Told) -> Result<Got, Failed> {
    // More segments than there can be: refused, but behind the question of the right.
    match call(libc::SYS_kexec_load, [0, 1 << 30, 0, 0]) {
        Ok(_) | Err(Errno::EINVAL) => Ok(Got::Kernel("the kernel takes another kernel")),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn clock(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn io_ports(_: &Told) -> Result<Got, Failed> {
    call(libc::SYS_iopl, [3, 0, 0, 0])?;
    Ok(Got::Kernel("the machine's ports are open"))
}

pub(super) fn bpf(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn perf(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn io_uring(_: &Told) -> Result<Got, Failed> {
    // Kernel ABI: `struct io_uring_params`, 120 bytes.
    let mut parameters = [0_u8; 120];
    // SAFETY: the kernel reads and writes the structure, of its size.
    Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) })?;
    Ok(Got::Kernel("the kernel takes io_uring"))
}

pub(super) fn userfaultfd(_: &Told) -> Result<Got, Failed> {
    call(libc::SYS_userfaultfd, [0; 4])?;
    Ok(Got::Kernel("faults of the kernel can be held"))
}
