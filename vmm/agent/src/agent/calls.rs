//! The host's calls: each is checked, then answered at once or by an engine operation.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use engine::console::Listener;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use prost::Message;
use protocol::envelope::Request;
use protocol::message::{
    AdoptRequest, ContainerRequest, CreateContainerRequest, DeleteRequest, ExecRequest, OomRequest,
    ProcessRequest, ResizeTerminalRequest, SignalRequest, StateResponse, Stdio, UpdateRequest,
};
use protocol::method::{self, Method};
use protocol::wire::{Frame, Kind};
use protocol::{Code, Failure};

use super::{Agent, Answer, MAX_SOURCES, OomCall, Source, Terminal, Then, decode, invalid};
use crate::container::{Container, Encoded, ProcessIo};
use crate::process::{Caller, ProcessName, ProcessState};
use crate::relay::Relay;
use crate::renew::renew;
use crate::{sys, terminal};

/// The most calls that wait for one process.
const MAX_WAITERS: usize = 64;

impl Agent {
    pub(super) fn call(&mut self, caller: Caller, frame: &Frame) -> Result<Answer, Failure> {
        if frame.kind != Kind::Request {
            return Err(invalid("the frame is not a request"));
        }
        let request: Request = decode(&frame.payload)?;
        if request.service != method::SERVICE {
            let text = format!("the agent has no service {}", request.service);
            return Err(Failure::new(Code::Unimplemented, text));
        }
        let payload = request.payload.as_slice();
        match request.method.as_str() {
            method::Renew::NAME => match renew(&decode(payload)?) {
                Ok(()) => Ok(Answer::empty()),
                Err(error) => Err(Failure::from_error(Code::Internal, &error)),
            },
            method::Suspend::NAME => self.suspend(),
            method::Proceed::NAME => Ok(self.proceed()),
            method::Adopt::NAME => self.adopt(decode(payload)?),
            method::CreateContainer::NAME => self.create(caller, decode(payload)?),
            method::StartContainer::NAME => self.start(caller, payload),
            method::Exec::NAME => self.exec(caller, decode(payload)?),
            method::Signal::NAME => self.signal(caller, decode(payload)?),
            method::Wait::NAME => self.wait(caller, decode(payload)?),
            method::FinishSending::NAME => {
                self.on_container(caller, payload, Container::finish_sending)
            }
            method::ResizeTerminal::NAME => self.resize(&decode(payload)?),
            method::Processes::NAME => self.on_container(caller, payload, Container::processes),
            method::Observe::NAME => self.observe(caller, payload),
            method::Stats::NAME => self.on_container(caller, payload, Container::stats),
            method::WaitOom::NAME => self.wait_oom(caller, decode(payload)?),
            method::Pause::NAME => self.on_container(caller, payload, Container::pause),
            method::Resume::NAME => self.on_container(caller, payload, Container::resume),
            method::Update::NAME => self.update(caller, decode(payload)?),
            method::State::NAME => self.state(payload),
            method::Delete::NAME => self.delete(caller, decode(payload)?),
            method::Shutdown::NAME => {
                self.shutdown = Some(caller.connection);
                Ok(Answer::empty())
            }
            other => {
                let text = format!("the agent has no method {other}");
                Err(Failure::new(Code::Unimplemented, text))
            }
        }
    }

    /// Holds all streams, for the machine to be written down.
    fn suspend(&mut self) -> Result<Answer, Failure> {
        let refuse = |text: String| Err(Failure::new(Code::FailedPrecondition, text));
        if let Some(ProcessName { exec, .. }) = self.containers.running_exec() {
            return refuse(format!(
                "the process {exec} of exec runs, whose streams would be lost: end it first"
            ));
        }
        if self.operations > 0 {
            return refuse("an operation on the container is under way: try again".to_owned());
        }
        for source in self.sources.values_mut() {
            if let Source::Relay { relay, .. } = source {
                relay.hold();
            }
        }
        Ok(Answer::empty())
    }

    fn proceed(&mut self) -> Answer {
        for (&key, source) in &mut self.sources {
            if let Source::Relay { relay, .. } = source {
                relay.release();
                self.ready.push_back(key);
            }
        }
        Answer::empty()
    }

    /// Gives a container's init process new streams for its old ones.
    fn adopt(&mut self, request: AdoptRequest) -> Result<Answer, Failure> {
        let name = ProcessName::init(&request.id);
        let process = self.containers.process(&name)?;
        let (keys, has_terminal) = (process.relays.clone(), process.terminal.is_some());
        let stdio = request.stdio.unwrap_or_default();
        let tokens = match &stdio.console {
            Some(console) => vec![console.token],
            None => vec![stdio.stdin, stdio.stdout, stdio.stderr],
        };
        if stdio.console.is_some() != has_terminal || tokens.len() != keys.len() {
            return Err(invalid("the process has other streams, or no terminal"));
        }
        if tokens
            .iter()
            .any(|token| *token == 0 || self.streams.contains_key(token))
        {
            return Err(invalid("a stream's token is missing or in use"));
        }
        for (key, token) in keys.into_iter().zip(tokens) {
            self.streams.retain(|_, stream| *stream != key);
            self.streams.insert(token, key);
            if let Some(Source::Relay { relay, .. }) = self.sources.get_mut(&key) {
                relay.disconnect();
            } else {
                // It has ended before, which the new stream has to be told.
                let null = File::open("/dev/null").map_err(|error| {
                    let text = "cannot open /dev/null".to_owned();
                    Failure::from_texts(Code::Internal, vec![text, error.to_string()])
                })?;
                let relay = Relay::ended(null.into());
                let owner = name.clone();
                self.sources.insert(key, Source::Relay { relay, owner });
            }
            self.connect_parked(key, token);
        }
        if let Some(size) = stdio.console.and_then(|console| console.size) {
            let id = request.id;
            // One whose other side is closed has no size any more.
            let _ = self.resize(&ResizeTerminalRequest {
                id,
                exec_id: String::new(),
                size: Some(size),
            });
        }
        Ok(Answer::empty())
    }

    /// An operation on the container that the payload names.
    fn on_container(
        &mut self,
        caller: Caller,
        payload: &[u8],
        run: fn(&Container) -> Encoded,
    ) -> Result<Answer, Failure> {
        let ContainerRequest { id } = decode(payload)?;
        let container = self.containers.container(&id)?;
        self.start_operation(caller, &[], Then::Nothing, || run(&container))
    }

    fn start(&mut self, caller: Caller, payload: &[u8]) -> Result<Answer, Failure> {
        let ContainerRequest { id } = decode(payload)?;
        let container = self.containers.container(&id)?;
        self.start_operation(caller, &[], Then::Running(id), || container.start())
    }

    fn observe(&mut self, caller: Caller, payload: &[u8]) -> Result<Answer, Failure> {
        let ContainerRequest { id } = decode(payload)?;
        let container = self.containers.container(&id)?;
        let init = self.containers.process(&ProcessName::init(&id))?.pid();
        let init = init.ok_or_else(|| not_running(&id))?;
        self.start_operation(caller, &[], Then::Nothing, || container.observe(init))
    }

    fn state(&mut self, payload: &[u8]) -> Result<Answer, Failure> {
        let ContainerRequest { id } = decode(payload)?;
        let (status, pid) = self.containers.status(&id)?;
        let pid = pid.unwrap_or(0).unsigned_abs();
        Ok(Answer::Now(
            StateResponse {
                status: status.to_owned(),
                pid,
            }
            .encode_to_vec(),
        ))
    }

    fn create(
        &mut self,
        caller: Caller,
        request: CreateContainerRequest,
    ) -> Result<Answer, Failure> {
        let name = ProcessName::init(&request.id);
        name.check()?;
        let directory = self.directory.join("engine");
        let container = Rc::new(Container::new(&directory, &request)?);
        self.containers.insert(&request.id, Rc::clone(&container))?;
        let stdio = request.stdio.unwrap_or_default();
        self.start_process(caller, &name, &stdio, |io| {
            container.create(&request.shares, request.network.as_ref(), io)
        })
    }

    fn exec(&mut self, caller: Caller, mut request: ExecRequest) -> Result<Answer, Failure> {
        let container = self.containers.container(&request.id)?;
        let init = self
            .containers
            .process(&ProcessName::init(&request.id))?
            .pid();
        let init = init.ok_or_else(|| not_running(&request.id))?;
        let name = ProcessName {
            container: request.id.clone(),
            exec: request.exec_id.clone(),
        };
        if name.exec.is_empty() {
            return Err(invalid("a process of exec needs an id"));
        }
        self.containers.insert_exec(&name)?;
        let stdio = request.stdio.take().unwrap_or_default();
        self.start_process(caller, &name, &stdio, |io| {
            container.exec(init, &request, io)
        })
    }

    /// Makes the stdio of a registered process and lets the engine create it.
    fn start_process(
        &mut self,
        caller: Caller,
        name: &ProcessName,
        stdio: &Stdio,
        run: impl FnOnce(ProcessIo) -> Encoded,
    ) -> Result<Answer, Failure> {
        let started = self.start_registered(caller, name, stdio, run);
        if started.is_err() {
            self.forget(name);
        }
        started
    }

    fn start_registered(
        &mut self,
        caller: Caller,
        name: &ProcessName,
        stdio: &Stdio,
        run: impl FnOnce(ProcessIo) -> Encoded,
    ) -> Result<Answer, Failure> {
        let terminal = self.terminal(stdio)?;
        let io = match &terminal {
            Some(terminal) => ProcessIo::Terminal(terminal.socket.path().to_owned()),
            None => ProcessIo::Files(self.files(name, stdio)?),
        };
        let keep: Vec<RawFd> = match &io {
            ProcessIo::Terminal(_) => Vec::new(),
            ProcessIo::Files(files) => files.iter().map(AsRawFd::as_raw_fd).collect(),
        };
        let token = terminal.as_ref().map(|terminal| terminal.token);
        let then = Then::Started {
            name: name.clone(),
            terminal,
        };
        let started = self.start_operation(caller, &keep, then, || run(io));
        if let (Err(_), Some(token)) = (&started, token) {
            self.streams.remove(&token);
        }
        started
    }

    /// The terminal that a process is to get, if it is to get one.
    fn terminal(&mut self, stdio: &Stdio) -> Result<Option<Terminal>, Failure> {
        let Some(console) = &stdio.console else {
            return Ok(None);
        };
        if (stdio.stdin, stdio.stdout, stdio.stderr) != (0, 0, 0) {
            return Err(invalid("a process has a terminal or streams, not both"));
        }
        let key = self.claim_stream(console.token)?;
        let path = self.directory.join(format!("console-{key}.sock"));
        let socket = Listener::bind(path).map_err(|error| {
            self.streams.remove(&console.token);
            let text = "cannot make a console socket".to_owned();
            Failure::from_texts(Code::Internal, vec![text, error.to_string()])
        })?;
        let size = console
            .size
            .filter(|size| (size.columns, size.rows) != (0, 0));
        Ok(Some(Terminal {
            socket,
            token: console.token,
            key,
            size,
        }))
    }

    /// The process's ends of its stdin, stdout and stderr; the other ends become relays.
    fn files(&mut self, name: &ProcessName, stdio: &Stdio) -> Result<[OwnedFd; 3], Failure> {
        let failed = |error: std::io::Error| {
            let text = "cannot make the pipes of a process".to_owned();
            Failure::from_texts(Code::Internal, vec![text, error.to_string()])
        };
        let null = || File::options().read(true).write(true).open("/dev/null");
        let mut ends = Vec::new();
        for (token, is_input) in [
            (stdio.stdin, true),
            (stdio.stdout, false),
            (stdio.stderr, false),
        ] {
            if token == 0 {
                ends.push(OwnedFd::from(null().map_err(failed)?));
                continue;
            }
            let key = self.claim_stream(token)?;
            self.containers.process(name)?.relays.push(key);
            let (read_end, write_end) =
                pipe2(OFlag::O_CLOEXEC).map_err(|errno: Errno| failed(errno.into()))?;
            let (ours, theirs) = if is_input {
                (write_end, read_end)
            } else {
                (read_end, write_end)
            };
            terminal::set_nonblocking(&ours).map_err(failed)?;
            let relay = if is_input {
                Relay::input(ours)
            } else {
                Relay::output(ours)
            };
            self.add_relay(key, token, relay, name.clone())
                .map_err(failed)?;
            ends.push(theirs);
        }
        ends.try_into()
            .map_err(|_| invalid("a process has three streams"))
    }

    /// Reserves a stream's token for a relay; the key is the relay's.
    fn claim_stream(&mut self, token: u64) -> Result<u64, Failure> {
        if token == 0 {
            return Err(invalid("a terminal needs a stream token"));
        }
        if self.streams.contains_key(&token) {
            return Err(Failure::new(
                Code::AlreadyExists,
                "the stream token is in use",
            ));
        }
        let key = self.new_key();
        self.streams.insert(token, key);
        Ok(key)
    }

    fn signal(&mut self, caller: Caller, request: SignalRequest) -> Result<Answer, Failure> {
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (0..=64).contains(signal))
            .ok_or_else(|| invalid("signals have numbers from 0 to 64"))?;
        let name = ProcessName {
            container: request.id.clone(),
            exec: request.exec_id,
        };
        let pid = self.containers.process(&name)?.pid();
        if request.all {
            if !name.exec.is_empty() {
                return Err(invalid(
                    "all processes of a container, or one of exec, not both",
                ));
            }
            let container = self.containers.container(&request.id)?;
            return self
                .start_operation(caller, &[], Then::Nothing, || container.signal_all(signal));
        }
        // Not reaped yet, so the pid still means this process.
        let pid = pid.ok_or_else(|| not_running(&name.container))?;
        sys::kill(pid, signal).map_err(|error| {
            let text = format!("cannot send signal {signal} to process {pid} in the guest");
            Failure::from_texts(Code::Internal, vec![text, error.to_string()])
        })?;
        Ok(Answer::empty())
    }

    fn wait(&mut self, caller: Caller, request: ProcessRequest) -> Result<Answer, Failure> {
        let name = ProcessName {
            container: request.id,
            exec: request.exec_id,
        };
        let waiters = &mut self.containers.process(&name)?.waiters;
        if waiters.len() >= MAX_WAITERS {
            let sources = &self.sources;
            waiters.retain(|waiter| sources.contains_key(&waiter.connection));
        }
        if waiters.len() >= MAX_WAITERS {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "too many wait for this process",
            ));
        }
        waiters.push(caller);
        self.answer_waiters(&name);
        Ok(Answer::Later)
    }

    fn wait_oom(&mut self, caller: Caller, request: OomRequest) -> Result<Answer, Failure> {
        if self.sources.len() >= MAX_SOURCES {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "too many calls at a time",
            ));
        }
        let watch = self.containers.container(&request.id)?.watch_oom()?;
        let key = self.new_key();
        if let Some((fd, _)) = watch.polled() {
            self.watch_changes(fd, key).map_err(|errno| {
                let texts = [
                    "cannot watch the cgroup".to_owned(),
                    errno.desc().to_owned(),
                ];
                Failure::from_texts(Code::Internal, texts.to_vec())
            })?;
        }
        let call = OomCall {
            caller,
            container: request.id,
            known: request.known,
            watch,
        };
        self.on_oom(key, call);
        Ok(Answer::Later)
    }

    fn resize(&mut self, request: &ResizeTerminalRequest) -> Result<Answer, Failure> {
        let size = request
            .size
            .ok_or_else(|| invalid("a terminal's new size is missing"))?;
        let name = ProcessName {
            container: request.id.clone(),
            exec: request.exec_id.clone(),
        };
        let terminal = self.containers.process(&name)?.terminal;
        let relay = terminal.and_then(|key| match self.sources.get(&key) {
            Some(Source::Relay { relay, .. }) => relay.process_end(),
            _ => None,
        });
        let master = relay
            .ok_or_else(|| Failure::new(Code::FailedPrecondition, "the process has no terminal"))?;
        terminal::resize(&master, size).map_err(|error| {
            let text = "cannot set the terminal's size".to_owned();
            Failure::from_texts(Code::Internal, vec![text, error.to_string()])
        })?;
        Ok(Answer::empty())
    }

    fn update(&mut self, caller: Caller, request: UpdateRequest) -> Result<Answer, Failure> {
        let container = self.containers.container(&request.id)?;
        self.start_operation(caller, &[], Then::Nothing, || {
            container.update(&request.resources_json)
        })
    }

    fn delete(&mut self, caller: Caller, request: DeleteRequest) -> Result<Answer, Failure> {
        let name = ProcessName {
            container: request.id.clone(),
            exec: request.exec_id,
        };
        let container = self.containers.container(&request.id)?;
        let kill = request.force && name.exec.is_empty();
        let refusal = match self.containers.process(&name)?.state {
            ProcessState::Ended(_) => None,
            ProcessState::Running(_) if kill => None,
            ProcessState::Running(_) => Some("still runs"),
            ProcessState::Starting => Some("is being started"),
        };
        if let Some(refusal) = refusal {
            let text = format!("a process of container {} {refusal}", name.container);
            return Err(Failure::new(Code::FailedPrecondition, text));
        }
        if !name.exec.is_empty() {
            self.forget(&name);
            return Ok(Answer::empty());
        }
        self.start_operation(caller, &[], Then::Deleted(name), || container.delete())
    }
}

fn not_running(id: &str) -> Failure {
    Failure::new(
        Code::FailedPrecondition,
        format!("container {id} is not running"),
    )
}
