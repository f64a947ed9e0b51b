//! The event loop: connections, calls, engine operations, stdio and the ends of processes.
//!
//! Everything that can be waited for is one entry in `sources`, found by the key in its epoll event. All
//! events are edge-triggered, so a source works until it would block, or asks for another turn.

mod calls;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use engine::cgroup::OomWatch;
use engine::console::Listener;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::read;
use prost::Message;
use protocol::envelope::Response;
use protocol::message::{ConsoleSize, Empty, OomResponse, Outcome, ProcessStarted, WaitResponse};
use protocol::wire::{self, Kind};
use protocol::{Code, Failure, StdioHeader};

use crate::connection::{Connection, Reading};
use crate::operation::{self, Operation};
use crate::process::{Caller, Containers, ProcessName, ProcessState};
use crate::relay::Relay;
use crate::{sys, terminal};

/// The most connections and operations at a time; each costs a descriptor or more.
const MAX_SOURCES: usize = 512;

/// Keys of the sources that always exist; the others get higher ones, never twice.
const RPC_LISTENER: u64 = 0;
const STDIO_LISTENER: u64 = 1;
const SIGNALS: u64 = 2;
const FIRST_KEY: u64 = 3;

/// The loop cannot be set up or cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}")]
pub struct AgentError {
    operation: &'static str,
    #[source]
    source: Errno,
}

/// The agent, ready to serve two listening sockets.
#[derive(Debug)]
pub struct Agent {
    epoll: Epoll,
    signals: SignalFd,
    rpc: OwnedFd,
    stdio: OwnedFd,
    /// Where the engine keeps its records, and where console sockets are made.
    directory: PathBuf,
    sources: HashMap<u64, Source>,
    next_key: u64,
    /// Keys of the sources that go on without an event.
    ready: VecDeque<u64>,
    /// The relay of each stream that a process has, by its token. A terminal's has its key before the
    /// terminal exists.
    streams: HashMap<u64, u64>,
    /// The connections whose streams nobody has yet, by their token.
    parked: HashMap<u64, u64>,
    containers: Containers,
    /// Ended children that no process is known for, while an operation may yet name one.
    unclaimed: HashMap<i32, Outcome>,
    operations: usize,
    /// The connection whose end is the end of the agent.
    shutdown: Option<u64>,
}

#[derive(Debug)]
enum Source {
    Connection(Connection),
    Greeting(Greeting),
    Relay {
        relay: Relay,
        owner: ProcessName,
    },
    Operation {
        operation: Operation,
        caller: Caller,
        then: Then,
    },
    Oom(OomCall),
}

/// A [`WaitOom`](protocol::method::WaitOom) call that is not yet answered.
#[derive(Debug)]
struct OomCall {
    caller: Caller,
    container: String,
    /// How many kills the caller knows of.
    known: u64,
    watch: OomWatch,
}

/// A connection to the stdio port that has not found its process.
#[derive(Debug)]
struct Greeting {
    fd: OwnedFd,
    header: [u8; StdioHeader::LEN],
    filled: usize,
}

/// What to do with the result of an operation before the host gets it.
#[derive(Debug)]
enum Then {
    Nothing,
    Started {
        name: ProcessName,
        terminal: Option<Terminal>,
    },
    /// A container's init process runs the workload.
    Running(String),
    Deleted(ProcessName),
}

/// A terminal that the engine is about to make.
#[derive(Debug)]
struct Terminal {
    socket: Listener,
    token: u64,
    key: u64,
    size: Option<ConsoleSize>,
}

/// What a call leads to.
enum Answer {
    Now(Vec<u8>),
    Later,
}

impl Answer {
    fn empty() -> Self {
        Self::Now(Empty {}.encode_to_vec())
    }
}

impl Agent {
    /// An agent that takes calls on `rpc` and stdio streams on `stdio` (both listening and non-blocking)
    /// and keeps the engine's records below `directory`.
    ///
    /// It blocks SIGCHLD for this process, and expects to be the parent of orphans: PID 1, or a subreaper.
    ///
    /// # Errors
    /// [`AgentError`] if the kernel refuses one of the descriptors.
    pub fn new(rpc: OwnedFd, stdio: OwnedFd, directory: PathBuf) -> Result<Self, AgentError> {
        let failed = |operation| move |source| AgentError { operation, source };
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block().map_err(failed("block SIGCHLD"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags).map_err(failed("make a signalfd"))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("make an epoll"))?;
        let agent = Self {
            epoll,
            signals,
            rpc,
            stdio,
            directory,
            sources: HashMap::new(),
            next_key: FIRST_KEY,
            ready: VecDeque::new(),
            streams: HashMap::new(),
            parked: HashMap::new(),
            containers: Containers::default(),
            unclaimed: HashMap::new(),
            operations: 0,
            shutdown: None,
        };
        agent
            .watch(agent.rpc.as_fd(), RPC_LISTENER)
            .map_err(failed("watch the RPC port"))?;
        agent
            .watch(agent.stdio.as_fd(), STDIO_LISTENER)
            .map_err(failed("watch the stdio port"))?;
        agent
            .watch(agent.signals.as_fd(), SIGNALS)
            .map_err(failed("watch for signals"))?;
        Ok(agent)
    }

    /// Serves until the host shuts the agent down.
    ///
    /// # Errors
    /// [`AgentError`] if the kernel does not deliver events any more.
    pub fn run(mut self) -> Result<(), AgentError> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let timeout = if self.ready.is_empty() {
                EpollTimeout::NONE
            } else {
                EpollTimeout::ZERO
            };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(source) => {
                    return Err(AgentError {
                        operation: "wait for events",
                        source,
                    });
                }
            };
            for event in &events[..count] {
                self.on_event(event.data(), event.events());
            }
            for key in std::mem::take(&mut self.ready) {
                self.on_event(key, EpollFlags::empty());
            }
            if self
                .shutdown
                .is_some_and(|key| !self.sources.contains_key(&key))
            {
                return Ok(());
            }
        }
    }

    fn on_event(&mut self, key: u64, flags: EpollFlags) {
        match key {
            RPC_LISTENER => self.accept(key),
            STDIO_LISTENER => self.accept(key),
            SIGNALS => self.on_child_ended(),
            _ => match self.sources.remove(&key) {
                Some(Source::Connection(connection)) => self.on_connection(key, connection),
                Some(Source::Greeting(greeting)) => self.on_greeting(key, greeting, flags),
                Some(Source::Relay { relay, owner }) => self.on_relay(key, relay, owner),
                Some(Source::Operation {
                    mut operation,
                    caller,
                    then,
                }) => {
                    operation.collect();
                    self.sources.insert(
                        key,
                        Source::Operation {
                            operation,
                            caller,
                            then,
                        },
                    );
                }
                Some(Source::Oom(call)) => self.on_oom(key, call),
                // An event that was under way when its source went.
                None => {}
            },
        }
    }

    fn accept(&mut self, listener: u64) {
        loop {
            let socket = if listener == RPC_LISTENER {
                &self.rpc
            } else {
                &self.stdio
            };
            // Out of descriptors: the caller's connection stays in the queue until another one comes.
            let Ok(Some(fd)) = sys::accept(socket.as_fd()) else {
                return;
            };
            if self.sources.len() >= MAX_SOURCES {
                continue;
            }
            let key = self.new_key();
            if self.watch(fd.as_fd(), key).is_err() {
                continue;
            }
            let source = if listener == RPC_LISTENER {
                Source::Connection(Connection::new(fd))
            } else {
                Source::Greeting(Greeting {
                    fd,
                    header: [0; StdioHeader::LEN],
                    filled: 0,
                })
            };
            self.sources.insert(key, source);
        }
    }

    fn on_connection(&mut self, key: u64, mut connection: Connection) {
        connection.flush();
        let mut frames = Vec::new();
        let reading = connection.read_frames(&mut frames);
        if reading == Reading::Again {
            self.ready.push_back(key);
        }
        self.sources.insert(key, Source::Connection(connection));
        for frame in frames {
            let caller = Caller {
                connection: key,
                stream_id: frame.stream_id,
            };
            match self.call(caller, &frame) {
                Ok(Answer::Now(payload)) => self.answer(caller, &operation::response(Ok(payload))),
                Ok(Answer::Later) => {}
                Err(failure) => self.answer(caller, &operation::response(Err(failure))),
            }
        }
        if reading == Reading::Closed {
            self.sources.remove(&key);
            self.sources.retain(|_, source| match source {
                Source::Oom(call) => call.caller.connection != key,
                _ => true,
            });
        }
    }

    fn answer(&mut self, caller: Caller, response: &Response) {
        // The host may have gone meanwhile; nobody else wants the answer.
        if let Some(Source::Connection(connection)) = self.sources.get_mut(&caller.connection)
            && let Ok(bytes) =
                wire::encode(Kind::Response, caller.stream_id, &response.encode_to_vec())
        {
            connection.send(&bytes);
        }
    }

    /// Runs an engine operation in a child; `then` and the answer follow when it ends.
    fn start_operation(
        &mut self,
        caller: Caller,
        keep: &[RawFd],
        then: Then,
        run: impl FnOnce() -> Result<Vec<u8>, Failure>,
    ) -> Result<Answer, Failure> {
        if self.sources.len() >= MAX_SOURCES {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "too many operations at a time",
            ));
        }
        let operation = Operation::spawn(keep, run)?;
        let key = self.new_key();
        // Unwatched, the pipe is still read when the child has ended.
        let _ = self.watch(operation.pipe(), key);
        self.sources.insert(
            key,
            Source::Operation {
                operation,
                caller,
                then,
            },
        );
        self.operations += 1;
        Ok(Answer::Later)
    }

    fn on_child_ended(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        // Who hears of an end must know by then what caused it.
        self.look_for_oom_kills();
        while let Some(reaped) = sys::reap() {
            let is_it = |source: &Source| match source {
                Source::Operation { operation, .. } => operation.pid() == reaped.pid,
                _ => false,
            };
            if let Some(name) = self.containers.find(reaped.pid) {
                self.on_process_ended(&name, reaped.outcome);
            } else if let Some((&key, _)) = self.sources.iter().find(|(_, source)| is_it(source)) {
                if let Some(Source::Operation {
                    operation,
                    caller,
                    then,
                }) = self.sources.remove(&key)
                {
                    self.operations -= 1;
                    self.on_operation_ended(operation.finish(reaped.outcome), caller, then);
                }
            } else if self.operations > 0 {
                self.unclaimed.insert(reaped.pid, reaped.outcome);
            }
            if self.operations == 0 {
                self.unclaimed.clear();
            }
        }
    }

    fn on_operation_ended(&mut self, mut response: Response, caller: Caller, then: Then) {
        let succeeded = response.status.is_none();
        match then {
            Then::Nothing => {}
            Then::Started { name, terminal } if succeeded => {
                if let Err(failure) = self.on_process_started(&name, terminal, &response.payload) {
                    response = operation::response(Err(failure));
                }
            }
            Then::Started { name, terminal } => {
                if let Some(terminal) = terminal {
                    self.streams.remove(&terminal.token);
                }
                self.forget(&name);
            }
            Then::Running(id) if succeeded => self.containers.set_started(&id),
            Then::Deleted(name) if succeeded => self.forget(&name),
            Then::Running(_) | Then::Deleted(_) => {}
        }
        self.answer(caller, &response);
    }

    fn on_process_started(
        &mut self,
        name: &ProcessName,
        terminal: Option<Terminal>,
        payload: &[u8],
    ) -> Result<(), Failure> {
        let started: ProcessStarted = decode(payload)?;
        let pid = i32::try_from(started.pid).map_err(|_| invalid("a pid that is too large"))?;
        self.containers.process(name)?.state = ProcessState::Running(pid);
        if let Some(terminal) = terminal {
            self.attach_terminal(name, terminal).map_err(|error| {
                // The process is of no use without its terminal.
                let _ = sys::kill(pid, libc::SIGKILL);
                let texts = [
                    "cannot take over the terminal".to_owned(),
                    error.to_string(),
                ];
                Failure::from_texts(Code::Internal, texts.to_vec())
            })?;
        }
        if let Some(outcome) = self.unclaimed.remove(&pid) {
            self.on_process_ended(name, outcome);
        }
        Ok(())
    }

    fn attach_terminal(&mut self, name: &ProcessName, terminal: Terminal) -> io::Result<()> {
        let master = terminal.socket.receive()?;
        terminal::set_nonblocking(&master)?;
        if let Some(size) = terminal.size {
            terminal::resize(&master, size)?;
        }
        let relay = Relay::terminal(master)?;
        if let Ok(process) = self.containers.process(name) {
            process.relays.push(terminal.key);
            process.terminal = Some(terminal.key);
        }
        self.add_relay(terminal.key, terminal.token, relay, name.clone())
    }

    fn on_process_ended(&mut self, name: &ProcessName, outcome: Outcome) {
        let Ok(process) = self.containers.process(name) else {
            return;
        };
        process.state = ProcessState::Ended(outcome);
        for key in process.relays.clone() {
            if let Some(Source::Relay { relay, .. }) = self.sources.get_mut(&key) {
                relay.drain();
                self.ready.push_back(key);
            }
        }
        self.answer_waiters(name);
    }

    /// Answers those who wait for a process if it has ended and what it wrote is delivered.
    fn answer_waiters(&mut self, name: &ProcessName) {
        let Ok(process) = self.containers.process(name) else {
            return;
        };
        let ProcessState::Ended(outcome) = process.state else {
            return;
        };
        let is_settled = |key: &u64| match self.sources.get(key) {
            Some(Source::Relay { relay, .. }) => relay.is_settled(),
            _ => true,
        };
        if !process.relays.iter().all(is_settled) {
            return;
        }
        let payload = WaitResponse {
            outcome: Some(outcome),
        }
        .encode_to_vec();
        let response = operation::response(Ok(payload));
        for caller in std::mem::take(&mut process.waiters) {
            self.answer(caller, &response);
        }
    }

    fn look_for_oom_kills(&mut self) {
        let is_oom =
            |(key, source): (&u64, &Source)| matches!(source, Source::Oom(_)).then_some(*key);
        let keys: Vec<u64> = self.sources.iter().filter_map(is_oom).collect();
        for key in keys {
            if let Some(Source::Oom(call)) = self.sources.remove(&key) {
                self.on_oom(key, call);
            }
        }
    }

    /// Answers a call if there is news for it.
    fn on_oom(&mut self, key: u64, mut call: OomCall) {
        let kills = call.watch.kills().unwrap_or_default();
        if kills > call.known {
            let payload = OomResponse { kills }.encode_to_vec();
            self.answer(call.caller, &operation::response(Ok(payload)));
        } else {
            self.sources.insert(key, Source::Oom(call));
        }
    }

    /// Removes a process, or a container with all of its, and their streams.
    fn forget(&mut self, name: &ProcessName) {
        let gone = Failure::new(Code::NotFound, "the process was deleted");
        if name.exec.is_empty() {
            let is_its = |source: &Source| matches!(source, Source::Oom(call) if call.container == name.container);
            let calls: Vec<Source> = self
                .sources
                .extract_if(|_, source| is_its(source))
                .map(|(_, source)| source)
                .collect();
            for call in calls {
                if let Source::Oom(call) = call {
                    self.answer(call.caller, &operation::response(Err(gone.clone())));
                }
            }
        }
        for process in self.containers.remove(name) {
            for key in process.relays {
                self.sources.remove(&key);
                self.streams.retain(|_, relay| *relay != key);
            }
            for caller in process.waiters {
                self.answer(caller, &operation::response(Err(gone.clone())));
            }
        }
    }

    fn on_greeting(&mut self, key: u64, mut greeting: Greeting, flags: EpollFlags) {
        let header = greeting.read();
        if flags.contains(EpollFlags::EPOLLHUP) && greeting.is_empty() {
            self.parked.retain(|_, parked| *parked != key);
            return;
        }
        match header {
            // Not a stream of ours, or the host went away: closes the connection.
            Err(()) => self.parked.retain(|_, parked| *parked != key),
            Ok(None) => {
                self.sources.insert(key, Source::Greeting(greeting));
            }
            Ok(Some(StdioHeader { token })) => {
                let waiting = self.streams.get(&token).copied();
                if let Some(relay) = waiting.filter(|relay| self.sources.contains_key(relay)) {
                    self.connect(relay, greeting.fd);
                } else {
                    // Two connections for one stream: the first stays.
                    if *self.parked.entry(token).or_insert(key) == key {
                        self.sources.insert(key, Source::Greeting(greeting));
                    }
                }
            }
        }
    }

    /// Adds a relay under a key that [`Self::claim_stream`] gave, and connects it if the host is there.
    fn add_relay(
        &mut self,
        key: u64,
        token: u64,
        relay: Relay,
        owner: ProcessName,
    ) -> io::Result<()> {
        if let Some(end) = relay.process_end() {
            self.watch(end, key)?;
        }
        self.sources.insert(key, Source::Relay { relay, owner });
        self.connect_parked(key, token);
        Ok(())
    }

    /// Gives a relay the host's connection, if that is there already.
    fn connect_parked(&mut self, key: u64, token: u64) {
        if let Some(parked) = self.parked.remove(&token)
            && let Some(Source::Greeting(greeting)) = self.sources.remove(&parked)
        {
            self.connect(key, greeting.fd);
        }
    }

    /// Gives a relay the host's connection; a second one is closed.
    fn connect(&mut self, key: u64, fd: OwnedFd) {
        let Some(Source::Relay { relay, .. }) = self.sources.get_mut(&key) else {
            return;
        };
        if relay.is_connected() {
            return;
        }
        let mut event = EpollEvent::new(EDGES, key);
        if self.epoll.modify(&fd, &mut event).is_ok() {
            relay.connect(fd);
            self.ready.push_back(key);
        }
    }

    fn on_relay(&mut self, key: u64, mut relay: Relay, owner: ProcessName) {
        if relay.advance() {
            self.ready.push_back(key);
        }
        if relay.is_finished() {
            self.streams.retain(|_, stream| *stream != key);
            drop(relay);
        } else {
            self.sources.insert(
                key,
                Source::Relay {
                    relay,
                    owner: owner.clone(),
                },
            );
        }
        self.answer_waiters(&owner);
    }

    fn new_key(&mut self) -> u64 {
        let key = self.next_key;
        self.next_key += 1;
        key
    }

    fn watch(&self, fd: BorrowedFd<'_>, key: u64) -> Result<(), Errno> {
        self.epoll.add(fd, EpollEvent::new(EDGES, key))
    }

    /// Watches a file of a cgroup, whose changes are events of their own.
    fn watch_changes(&self, fd: BorrowedFd<'_>, key: u64) -> Result<(), Errno> {
        let changes = EpollFlags::EPOLLPRI | EpollFlags::EPOLLET;
        self.epoll.add(fd, EpollEvent::new(changes, key))
    }
}

/// What every source is watched for.
const EDGES: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLOUT)
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLET);

impl Greeting {
    /// Reads the header as far as it has come, and no byte behind it.
    fn read(&mut self) -> Result<Option<StdioHeader>, ()> {
        while self.filled < StdioHeader::LEN {
            match read(self.fd.as_raw_fd(), &mut self.header[self.filled..]) {
                Ok(length @ 1..) => self.filled += length,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Ok(0) | Err(_) => return Err(()),
            }
        }
        StdioHeader::decode(self.header).map(Some).map_err(|_| ())
    }

    /// Whether nothing is to be read behind the header.
    fn is_empty(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        !matches!(recv(self.fd.as_raw_fd(), &mut [0], flags), Ok(1..))
    }
}

/// A message that the host sent.
fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, Failure> {
    M::decode(bytes).map_err(|error| {
        let texts = ["the request does not decode".to_owned(), error.to_string()];
        Failure::from_texts(Code::InvalidArgument, texts.to_vec())
    })
}

fn invalid(text: &str) -> Failure {
    Failure::new(Code::InvalidArgument, text)
}
