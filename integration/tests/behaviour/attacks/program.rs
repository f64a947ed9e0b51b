//! The attacker's program: this test program under another name, inside a container.

use std::env;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

/// Where it is in the container.
pub const PATH: &str = "/bin/attacker";

/// Knocks at the machine's vsock ports.
pub const KNOCK: &str = "knock";

/// Runs the attack that the arguments name, if this process is the attacker.
pub fn run() -> Option<ExitCode> {
    let mut args = env::args();
    if args.next()? != PATH {
        return None;
    }
    match args.next()?.as_str() {
        KNOCK => knock(),
        _ => {}
    }
    Some(ExitCode::SUCCESS)
}

/// Tries ports of the host, of this machine, and of the loopback device, by vsock.
fn knock() {
    const HOST: u32 = 2;
    const LOCAL: u32 = 1;
    for cid in [LOCAL, HOST, 3, own_cid().unwrap_or(3)] {
        for port in 1..=2048 {
            if let Some(mut stream) = connect(cid, port) {
                // Somebody listens. Whether it talks to us is what counts.
                let _ = stream.write_all(b"\0\0\0\x0a\0\0\0\x01\x01\0hello world");
                println!("OPEN {cid} {port}");
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
    Some(socket.into())
}
