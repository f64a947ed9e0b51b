//! Attempts to reach what is the host's: its files, processes, namespaces, sockets, keys and disks.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::sys::stat::SFlag;
use nix::unistd::Pid;

use super::kernel::{call, device};
use super::{Failed, Got, Told};

/// Whether a file holds the word.
pub(super) fn is_bait(path: &Path, told: &Told) -> Result<(), Failed> {
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

/// Where the host's root may be seen.
fn roots() -> Vec<PathBuf> {
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
    roots
}

/// The path of something of the host below a root.
fn below(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

pub(super) fn file(told: &Told) -> Result<Got, Failed> {
    let mut last = Failed::Errno(Errno::ENOENT);
    for root in roots() {
        match is_bait(&root.join(below(&told.file)), told) {
            Ok(()) => return Ok(Got::Host("a file of the host was read")),
            Err(error) => last = error,
        }
    }
    Err(last)
}

pub(super) fn leaked(told: &Told) -> Result<Got, Failed> {
    let mut last = Failed::Nowhere("none is open");
    for entry in fs::read_dir("/proc/self/fd")?.flatten() {
        let up = entry.path().join("../../../../../../../../../../..");
        match is_bait(&up.join(below(&told.file)), told) {
            Ok(()) => return Ok(Got::Host("a descriptor led to the host's root")),
            // A descriptor of something else.
            Err(Failed::Errno(Errno::ENOTDIR)) => {}
            Err(error) => last = error,
        }
    }
    // What the first process was left with, this one has too.
    if engine::observation::outside(nix::unistd::getpid())?.is_empty() {
        Err(last)
    } else {
        Ok(Got::Host("a file outside of the container is open"))
    }
}

/// The bait's process has the file as its standard output.
pub(super) fn descriptor(told: &Told) -> Result<Got, Failed> {
    process(told)?;
    let got = Got::Host("a descriptor of a process of the host was taken");
    if is_bait(format!("/proc/{}/fd/1", told.pid).as_ref(), told).is_ok() {
        return Ok(got);
    }
    let process = call(libc::SYS_pidfd_open, [told.pid.into(), 0, 0, 0])?;
    let taken = call(libc::SYS_pidfd_getfd, [process, 1, 0, 0])?;
    is_bait(format!("/proc/self/fd/{taken}").as_ref(), told)?;
    Ok(got)
}

/// A socket has a name in the network namespace, or in a directory that both sides see.
pub(super) fn passed_descriptor(told: &Told) -> Result<Got, Failed> {
    let address = SocketAddr::from_abstract_name(told.socket.as_bytes())?;
    let mut last = match UnixStream::connect_addr(&address) {
        Ok(stream) => return receive(&stream, told),
        Err(error) => error,
    };
    for root in roots() {
        let path = root.join(below(&told.socket_file));
        match engine::with_short_path(&path, |short| UnixStream::connect(short)) {
            Ok(stream) => return receive(&stream, told),
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

/// Takes the descriptor that the bait's sockets hand to everybody.
fn receive(stream: &UnixStream, told: &Told) -> Result<Got, Failed> {
    let mut word = [0; 64];
    let mut parts = [IoSliceMut::new(&mut word)];
    let mut space = cmsg_space!(RawFd);
    let message = recvmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for control in message.cmsgs()? {
        let ControlMessageOwned::ScmRights(files) = control else {
            continue;
        };
        for number in files {
            // SAFETY: the kernel has just put this descriptor into this process for us alone.
            let file = unsafe { OwnedFd::from_raw_fd(number) };
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            if is_bait(path.as_ref(), told).is_ok() {
                return Ok(Got::Host("a descriptor of the host was received"));
            }
        }
    }
    Err(Failed::Nowhere("no descriptor came"))
}

pub(super) fn handle(told: &Told) -> Result<Got, Failed> {
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
                let root = PathBuf::from(format!("/proc/self/fd/{root}"));
                if is_bait(&root.join(below(&told.file)), told).is_ok() {
                    return Ok(Got::Host("the host's root was opened by its handle"));
                }
            }
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

pub(super) fn process(told: &Told) -> Result<Got, Failed> {
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

pub(super) fn ptrace(told: &Told) -> Result<Got, Failed> {
    process(told)?;
    let pid = Pid::from_raw(told.pid as i32);
    nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty())?;
    let _ = nix::sys::ptrace::detach(pid, None);
    Ok(Got::Host("a process of the host was traced"))
}

pub(super) fn namespace(told: &Told) -> Result<Got, Failed> {
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

pub(super) fn abstract_socket(told: &Told) -> Result<Got, Failed> {
    let address = SocketAddr::from_abstract_name(told.socket.as_bytes())?;
    says_the_word(UnixStream::connect_addr(&address)?, told)?;
    Ok(Got::Host("a socket of the host answered"))
}

pub(super) fn loopback(told: &Told) -> Result<Got, Failed> {
    says_the_word(TcpStream::connect(("127.0.0.1", told.port))?, told)?;
    Ok(Got::Host("a port of the host answered"))
}

pub(super) fn vsock(_: &Told) -> Result<Got, Failed> {
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

pub(super) fn key(told: &Told) -> Result<Got, Failed> {
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

pub(super) fn disk(told: &Told) -> Result<Got, Failed> {
    let numbers = told.disk.ok_or(Failed::Untried("the host has no disk"))?;
    device(SFlag::S_IFBLK, numbers)?.read_exact(&mut [0; 512])?;
    // A machine has no disk of these numbers, unless it is the host's.
    Ok(Got::Host("a disk of the host was read"))
}

#[cfg(test)]
mod tests {
    use super::super::super::bait::tests::told;
    use super::*;

    #[test]
    fn an_open_directory_of_the_host_is_a_way_out() {
        let place = tempfile::tempdir().unwrap();
        let _open = File::open(place.path()).unwrap();
        assert!(matches!(leaked(&told(place.path())), Ok(Got::Host(_))));
    }
}
