//! A process that containerd knows: the first one of a container, or one of an `exec`.

use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use containerd_shim_protos::types::task::Status;
use runtime::process::PidFd;
use runtime::signal::Signal;

use crate::error::{Failure, Kind};
use crate::stdio::{Addresses, Kept};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 and the signal's number.
    pub status: u32,
    /// When, since 1970.
    pub time: Duration,
}

/// How far a process has come. That it has ended is told by its exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It is known and can be started: a container's is there and waits, that of an `exec` is not there yet.
    Created,
    /// A start is under way, so that nobody has been told of it.
    Starting,
    /// Its start has been told.
    Running,
}

/// A process, known until containerd deletes it.
#[derive(Debug)]
pub struct Process {
    /// 0 while there is none.
    pub pid: i32,
    /// To signal it and nobody who gets its pid later.
    fd: Option<PidFd>,
    pub phase: Phase,
    pub exit: Option<Exit>,
    pub addresses: Addresses,
    kept: Kept,
    /// Each who waits for its end. They are woken one by one, since many processes may be waited for.
    waiting: Vec<Sender<Exit>>,
    /// Its stdin is to end, which may be said before it is there.
    stdin_is_closed: bool,
}

impl Process {
    /// A process that is not there yet.
    pub fn new(addresses: Addresses) -> Self {
        Self {
            pid: 0,
            fd: None,
            phase: Phase::Created,
            exit: None,
            addresses,
            kept: Kept::default(),
            waiting: Vec::new(),
            stdin_is_closed: false,
        }
    }

    /// It is there.
    pub fn begin(&mut self, pid: i32, kept: Kept) {
        self.pid = pid;
        // One that has ended and been reaped already has none, and no need of one.
        self.fd = PidFd::open(pid).ok();
        self.kept = kept;
        if self.stdin_is_closed {
            self.kept.close_stdin();
        }
    }

    /// Lets its stdin end.
    pub fn close_stdin(&mut self) {
        self.stdin_is_closed = true;
        self.kept.close_stdin();
    }

    /// Gives its terminal a size, if it has one.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), Failure> {
        self.kept.resize(columns, rows)
    }

    /// Where its end will be told, or has been.
    pub fn wait(&mut self) -> Receiver<Exit> {
        let (sender, receiver) = mpsc::channel();
        match self.exit {
            // The receiver is there.
            Some(exit) => drop(sender.send(exit)),
            None => self.waiting.push(sender),
        }
        receiver
    }

    /// It has ended.
    pub fn end(&mut self, exit: Exit) {
        self.exit = Some(exit);
        for waits in self.waiting.drain(..) {
            // Who does not wait any more has lost patience.
            let _ = waits.send(exit);
        }
        self.fd = None;
        self.kept.close_stdin();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<(), Failure> {
        let gone = || Failure::new(Kind::NotFound, "process already finished");
        match (&self.fd, self.exit, self.pid) {
            (_, Some(_), _) => Err(gone()),
            (None, None, 0) => Err(Failure::new(Kind::State, "process not created")),
            (None, None, _) => Err(gone()),
            (Some(fd), None, _) => fd.signal(signal).map_err(|_| gone()),
        }
    }

    /// Its status, but for that of a container that is paused.
    pub fn status(&self) -> Status {
        match (self.exit, self.phase) {
            (Some(_), _) => Status::STOPPED,
            (None, Phase::Running) => Status::RUNNING,
            (None, Phase::Created | Phase::Starting) => Status::CREATED,
        }
    }

    /// Its pid as the protocol has it.
    pub fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }
}
