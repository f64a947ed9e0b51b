//! The sockets of another network: whoever holds one reaches that network, and its abstract sockets, from any namespace.
//!
//! A socket tells its network to who has it, so it is asked by a copy of the descriptor, which is closed at once. The last
//! one to close a socket may have to wait for what was sent over it, as long as the container chose: a thread of its own
//! does, which is left behind then.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, getsockname, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::processes::related;

/// How long the asking may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// `PIDFD_THREAD` (Linux 6.9): of a thread that is not the first of its process.
const THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);

/// A descriptor that is a socket.
pub(super) struct Socket {
    /// The file of /proc that leads there.
    pub(super) at: String,
    /// The process or thread that has it.
    pub(super) holder: i32,
    pub(super) is_thread: bool,
    pub(super) number: i32,
}

/// What a socket says of itself.
struct Identity {
    network: u64,
    /// The name of a Unix socket that has one.
    name: Option<SocketAddrUnix>,
    listens: bool,
}

/// Where those of `sockets` are that are of none of the `own` network namespaces. `Err`: why that is not known.
pub(super) fn of_others(sockets: Vec<Socket>, own: BTreeSet<u64>) -> Result<Vec<String>, String> {
    if sockets.is_empty() {
        return Ok(Vec::new());
    }
    let (told, answers) = mpsc::channel();
    let worker = thread::Builder::new().spawn(move || {
        // Nobody waits any more, otherwise.
        let _ = told.send(search(sockets, &own));
    });
    worker.map_err(|error| format!("no thread can be made: {error}"))?;
    let seconds = PATIENCE.as_secs();
    let found = answers.recv_timeout(PATIENCE);
    found.map_err(|_| format!("the sockets could not be asked within {seconds} s"))?
}

fn search(sockets: Vec<Socket>, own: &BTreeSet<u64>) -> Result<Vec<String>, String> {
    let mut known = Vec::new();
    for socket in sockets {
        let found = identity(&socket);
        let found = found.map_err(|error| format!("{} does not tell: {error}", socket.at))?;
        known.extend(found.map(|found| (socket.at, found)));
    }
    Ok(strangers(known, own))
}

fn strangers(known: Vec<(String, Identity)>, own: &BTreeSet<u64>) -> Vec<String> {
    let is_own = |one: &Identity| own.contains(&one.network);
    // What a listener accepts is of the network of who called, and has the listener's name.
    let doors = known.iter().filter(|(_, one)| one.listens && is_own(one));
    let doors: BTreeSet<SocketAddrUnix> = doors.filter_map(|(_, one)| one.name.clone()).collect();
    let is_accepted =
        |one: &Identity| !one.listens && one.name.as_ref().is_some_and(|name| doors.contains(name));
    let others = known
        .into_iter()
        .filter(|(_, one)| !is_own(one) && !is_accepted(one));
    others.map(|(at, _)| at).collect()
}

/// `None`: it is there no more.
fn identity(socket: &Socket) -> io::Result<Option<Identity>> {
    let copy = match copy(socket) {
        Err(Errno::SRCH | Errno::BADF) => return Ok(None),
        other => other?,
    };
    let file = fs::File::from(copy);
    if !file.metadata()?.file_type().is_socket() {
        return Ok(None);
    }
    let network = related(&file, libc::SIOCGSKNS as libc::Ioctl)?;
    let is_unix = sockopt::socket_domain(&file)? == AddressFamily::UNIX;
    let name = is_unix.then(|| getsockname(&file)).transpose()?;
    let name = name.and_then(|name| SocketAddrUnix::try_from(name).ok());
    Ok(Some(Identity {
        network,
        name: name.filter(|name| !name.is_unnamed()),
        listens: sockopt::socket_acceptconn(&file).unwrap_or(false),
    }))
}

fn copy(socket: &Socket) -> rustix::io::Result<OwnedFd> {
    let holder = Pid::from_raw(socket.holder).ok_or(Errno::SRCH)?;
    let flags = if socket.is_thread {
        THREAD
    } else {
        PidfdFlags::empty()
    };
    let holder = pidfd_open(holder, flags)?;
    pidfd_getfd(holder.as_fd(), socket.number, PidfdGetfdFlags::empty())
}

/// The network namespace of a process.
pub(super) fn network_of(directory: &str) -> Option<u64> {
    let file = fs::metadata(format!("{directory}/ns/net"));
    file.ok().map(|file| file.ino())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn held(file: &impl AsRawFd) -> Socket {
        let number = file.as_raw_fd();
        Socket {
            at: format!("/proc/self/fd/{number}"),
            holder: std::process::id().cast_signed(),
            is_thread: false,
            number,
        }
    }

    #[test]
    fn a_socket_is_of_the_network_in_which_it_was_made() {
        let (one, _other) = UnixStream::pair().unwrap();
        let own = network_of("/proc/self").unwrap();
        assert_eq!(of_others(vec![held(&one)], [own].into()), Ok(Vec::new()));
        let others = of_others(vec![held(&one)], [own + 1].into()).unwrap();
        assert_eq!(others, [held(&one).at]);
    }

    #[test]
    fn what_is_no_socket_or_gone_is_left_out() {
        let file = fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(
            of_others(vec![held(&file)], BTreeSet::new()),
            Ok(Vec::new())
        );
        let mut gone = held(&file);
        gone.number = i32::MAX;
        assert_eq!(of_others(vec![gone], BTreeSet::new()), Ok(Vec::new()));
    }

    #[test]
    fn only_what_a_listener_of_its_own_accepted_may_be_of_another_network() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let _caller = UnixStream::connect(&path).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let told = |networks: [u64; 2]| {
            let sockets = [held(&listener), held(&accepted)].into_iter().zip(networks);
            let known = sockets.map(|(socket, network)| {
                let found = identity(&socket).unwrap().unwrap();
                (socket.at, Identity { network, ..found })
            });
            strangers(known.collect(), &[1].into())
        };
        assert_eq!(told([1, 1]), [""; 0]);
        assert_eq!(told([1, 2]), [""; 0]);
        assert_eq!(told([2, 1]), [held(&listener).at]);
        assert_eq!(told([2, 2]), [held(&listener).at, held(&accepted).at]);
    }
}
