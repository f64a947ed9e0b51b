//! Operations on containers, each in a process of its own that has one thread, as the engine wants it.
//!
//! The worker is forked before the server has threads, and has one itself. For each operation it forks a process, which
//! reads the request, does it as the command line would, and answers. What the operation started is then an orphan, and
//! becomes the server's child, since that is a subreaper: the server alone reaps.
//!
//! The worker and its operations end with the server. Whoever removes what a server left that was killed, as our `delete`
//! does, then neither waits for an operation nor is overtaken by one: it finds what a command leaves that was killed.
//!
//! Requests and answers are JSON behind their length, with descriptors beside them; both ends are this binary.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::exit;

use engine::systemd;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, Signal as NixSignal, signal};
use nix::unistd::{ForkResult, dup2, fork, getpid, getppid};
use oci_spec::runtime::{LinuxResources, Process};
use runtime::bundle::Bundle;
use runtime::config::Config;
use runtime::id::ContainerId;
use runtime::isolation::{Images, Model, select};
use runtime::lifecycle::{Console, CreateOptions, ExecOptions, Lifecycle};
use runtime::state::Store;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Kind};
use crate::options::Options;
use crate::pod::Files;

/// The most that a request may be: a process of an `exec` with a large environment is far below.
const LONGEST: usize = 16 << 20;

/// The most descriptors that a message has: three standard streams.
const MOST_FILES: usize = 3;

/// What to do, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The state root.
    pub root: PathBuf,
    /// The options of the container.
    pub options: Options,
    /// The container.
    pub id: ContainerId,
    pub operation: Operation,
}

/// What to do with a container.
#[derive(Debug, Serialize, Deserialize)]
pub enum Operation {
    /// Make it from this bundle, with the files of its pod and the standard streams that come along.
    Create { bundle: PathBuf, pod: Option<Files> },
    /// Let its workload run.
    Start,
    /// Start another process in it, with the standard streams that come along.
    Exec { process: Box<Process> },
    /// End and remove it.
    Delete,
    /// Stop its processes where they are.
    Pause,
    /// Let them go on.
    Resume,
    /// Change its limits.
    Update { resources: Box<LinuxResources> },
    /// Write its processes to images.
    Checkpoint { images: Box<Images> },
}

/// What was done.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// The process that was started; 0 if none was.
    pub pid: i32,
    /// Of a container that was made: other processes may outlive its first one, since it has no pid namespace of its own.
    pub shares_pids: bool,
}

/// The containers of a state root.
pub fn lifecycle(root: &Path, options: &Options) -> Result<Lifecycle, Failure> {
    let config = Config::load(options.config_path.as_deref())
        .map_err(|error| Failure::new(Kind::Invalid, runtime::error_chain(&error)))?;
    Ok(Lifecycle::new(Store::new(root.to_owned()), config))
}

/// The process that forks one for each operation.
#[derive(Debug)]
pub struct Worker {
    control: OwnedFd,
}

impl Worker {
    /// Forks it. `model` is that of containers that do not say one, `close` what it must not keep.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn fork(model: Option<Model>, close: BorrowedFd<'_>) -> Result<Self, Failure> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| Failure::io("make a socket pair")(error.into()))?;
        // SAFETY: this process has one thread, so that the child may go on as the parent would.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { .. }) => Ok(Self { control: ours }),
            Ok(ForkResult::Child) => {
                drop(ours);
                let _ = nix::unistd::close(close.as_raw_fd());
                serve(&theirs, model)
            }
            Err(errno) => Err(Failure::io("fork")(errno.into())),
        }
    }

    /// Does an operation, with these standard streams, and returns what was done and the terminal if one was made.
    ///
    /// # Errors
    /// Why it was not done.
    pub fn call(
        &self,
        request: &Request,
        streams: &[BorrowedFd<'_>],
    ) -> Result<(Done, Option<OwnedFd>), Failure> {
        let talk = || -> io::Result<(Result<Done, Failure>, Option<OwnedFd>)> {
            let (mut ours, theirs) = UnixStream::pair()?;
            send_files(&self.control, &[0], &[theirs.as_fd()])?;
            drop(theirs);
            send(&mut ours, request, streams)?;
            let (answer, files) = receive(&mut ours)?;
            Ok((answer, files.into_iter().next()))
        };
        let (answer, terminal) = talk().map_err(Failure::io("ask the worker process"))?;
        Ok((answer?, terminal))
    }
}

/// The worker's life. It ends with the server.
fn serve(control: &OwnedFd, model: Option<Model>) -> ! {
    // SAFETY: no handler is installed. Ignored, so that the kernel reaps those that are forked below.
    let _ = unsafe { signal(NixSignal::SIGCHLD, SigHandler::SigIgn) };
    let worker = getpid();
    loop {
        let connection = match receive_files(control, &mut [0]) {
            Ok((1.., mut files)) if files.len() == 1 => files.remove(0),
            _ => exit(0),
        };
        // SAFETY: this process has one thread, so that the child may go on as the parent would.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                if set_pdeathsig(NixSignal::SIGKILL).is_err() || getppid() != worker {
                    exit(1);
                }
                // SAFETY: no handler is installed. The engine waits for its children itself.
                let _ = unsafe { signal(NixSignal::SIGCHLD, SigHandler::SigDfl) };
                let _ = nix::unistd::close(control.as_raw_fd());
                let served = serve_one(UnixStream::from(connection), model);
                exit(i32::from(served.is_err()));
            }
            Ok(ForkResult::Parent { .. }) => {}
            Err(errno) => {
                let failure = Failure::io("fork")(errno.into());
                let answer: Result<Done, Failure> = Err(failure);
                let _ = send(&mut UnixStream::from(connection), &answer, &[]);
            }
        }
    }
}

fn serve_one(mut connection: UnixStream, model: Option<Model>) -> io::Result<()> {
    let (request, files): (Request, _) = receive(&mut connection)?;
    for (target, file) in (0..).zip(&files) {
        dup2(file.as_raw_fd(), target)?;
    }
    drop(files);
    let (answer, terminal) = match carry_out(&request, model) {
        Ok((done, terminal)) => (Ok(done), terminal),
        Err(failure) => (Err(failure), None),
    };
    let terminal = terminal.as_ref().map(AsFd::as_fd);
    send(&mut connection, &answer, terminal.as_slice())
}

/// Does an operation; returns what was done and the terminal that was made.
fn carry_out(request: &Request, model: Option<Model>) -> Result<(Done, Option<OwnedFd>), Failure> {
    let lifecycle = lifecycle(&request.root, &request.options)?;
    let id = &request.id;
    match &request.operation {
        Operation::Create { bundle, pod } => {
            let invalid = |error: &dyn std::error::Error| {
                Failure::new(Kind::Invalid, runtime::error_chain(error))
            };
            let mut bundle = Bundle::load(bundle).map_err(|error| invalid(&error))?;
            if let Some(files) = pod {
                let mounts = files.mounts(bundle.spec())?;
                bundle = bundle.with_mounts(mounts);
            }
            let model = select(None, &bundle, lifecycle.config(), model)
                .map_err(|error| invalid(&error))?;
            let terminal = bundle.spec().process().as_ref().and_then(Process::terminal);
            let linux = bundle.spec().linux().as_ref();
            let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_deref());
            // containerd names scopes when the kubelet names slices, whatever its options for us say.
            let systemd_cgroup =
                request.options.systemd_cgroup || cgroups_path.is_some_and(systemd::names_a_scope);
            let shares_pids = !engine::begins_pid_namespace(bundle.spec());
            let created = lifecycle.create(CreateOptions {
                id,
                console: console(terminal),
                bundle,
                model,
                pid_file: None,
                pidfd_socket: None,
                preserve_fds: 0,
                no_pivot: request.options.no_pivot_root,
                no_new_keyring: request.options.no_new_keyring,
                systemd_cgroup,
                rootless: engine::cgroup::is_rootless(),
            })?;
            let done = Done {
                pid: created.pid,
                shares_pids,
            };
            return Ok((done, created.terminal));
        }
        Operation::Exec { process } => {
            let executed = lifecycle.exec(&ExecOptions {
                id,
                process,
                console: console(process.terminal()),
                pid_file: None,
                pidfd_socket: None,
                preserve_fds: 0,
                cgroup: None,
                ignore_paused: false,
            })?;
            let done = Done {
                pid: executed.pid,
                ..Done::default()
            };
            return Ok((done, executed.terminal));
        }
        Operation::Start => lifecycle.start(id)?,
        Operation::Delete => lifecycle.delete(id, true)?,
        Operation::Pause => lifecycle.pause(id)?,
        Operation::Resume => lifecycle.resume(id)?,
        Operation::Update { resources } => lifecycle.update(id, resources)?,
        Operation::Checkpoint { images } => lifecycle.checkpoint(id, images)?,
    }
    Ok((Done::default(), None))
}

fn console(terminal: Option<bool>) -> Console<'static> {
    match terminal {
        Some(true) => Console::Ours,
        _ => Console::None,
    }
}

fn send(
    stream: &mut UnixStream,
    message: &impl Serialize,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    send_files(&*stream, &length.to_le_bytes(), files)?;
    stream.write_all(&text)
}

fn receive<M: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<(M, Vec<OwnedFd>)> {
    let mut length = [0; 4];
    let (count, files) = receive_files(&*stream, &mut length)?;
    stream.read_exact(length.get_mut(count..).unwrap_or_default())?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok((serde_json::from_slice(&text)?, files))
}

/// Sends a few bytes, with descriptors beside them.
fn send_files(socket: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    // A socket takes a few bytes whole.
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Receives at most as many bytes as there is room for, and what is beside them. None is the end.
fn receive_files(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(&socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)
    })?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            files.extend(some);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((received.bytes, files))
}
