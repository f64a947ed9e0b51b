//! containerd's task service: what it asks for, in terms of the lifecycle.
//!
//! Every method answers from memory or asks the worker for an operation; none decides about containers. The order of
//! events is containerd's contract: create, start, out of memory, exit, delete.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, Mount, PidsRequest,
    PidsResponse, ProcessInfo, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{
    TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::{EnumOrUnknown, Message, MessageField};
use containerd_shim_protos::shim::oci::{CheckpointOptions, ProcessDetails};
use containerd_shim_protos::topics::{
    TASK_CHECKPOINTED_EVENT_TOPIC, TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC,
    TASK_EXEC_ADDED_EVENT_TOPIC, TASK_EXEC_STARTED_EVENT_TOPIC, TASK_PAUSED_EVENT_TOPIC,
    TASK_RESUMED_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
};
use runtime::id::ContainerId;
use runtime::isolation::Images;
use runtime::lifecycle::Lifecycle;
use runtime::process::PidFd;
use runtime::signal::Signal;

use crate::cleanup::{rootfs, save_options, state_root};
use crate::error::{Failure, Kind};
use crate::events::{any, timestamp};
use crate::flags::Flags;
use crate::metrics;
use crate::options::Options;
use crate::pod::Files;
use crate::process::{Exit, Phase, Process};
use crate::stdio::{Addresses, Kept, Logged, Streams};
use crate::tasks::{Container, Exec, State, Tasks};
use crate::worker::{Done, Operation, Request, Worker, lifecycle};

/// How long a process may take to be reaped after its container was deleted.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What a method answers.
pub type Reply<T> = Result<T, Failure>;

/// A container that is to be made.
pub struct New<'a> {
    pub id: &'a str,
    pub bundle: &'a str,
    /// What its root is mounted from.
    pub rootfs: &'a [Mount],
    pub addresses: Addresses,
    pub options: Options,
    /// The files of the pod that it is put into.
    pub pod: Option<Files>,
}

/// The service.
pub struct Service {
    namespace: String,
    worker: Worker,
    pub tasks: Arc<Tasks>,
    end: SyncSender<()>,
}

impl Service {
    /// The service, and where it says that it is to end.
    pub fn new(flags: &Flags, worker: Worker, tasks: Arc<Tasks>) -> (Self, Receiver<()>) {
        let (end, ended) = mpsc::sync_channel(1);
        let service = Self {
            namespace: flags.namespace.clone(),
            worker,
            tasks,
            end,
        };
        (service, ended)
    }

    /// Has an operation done to a container that is there.
    fn operate(&self, id: &str, operation: Operation) -> Reply<Done> {
        let request = self.request(self.tasks.lock().container(id)?, operation);
        Ok(self.worker.call(&request, &[])?.0)
    }

    fn request(&self, container: &Container, operation: Operation) -> Request {
        Request {
            root: container.root.clone(),
            options: container.options.clone(),
            id: container.id.clone(),
            operation,
        }
    }

    /// Makes a container that waits for its start.
    pub fn create(&self, request: &CreateTaskRequest) -> Reply<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            let reason = "restoring from a checkpoint is the command line's: rt restore";
            return Err(Failure::new(Kind::Unsupported, reason));
        }
        let mut options = Options::of(request.options.as_ref())?;
        let mut files = None;
        if let Some(pod) = self.tasks.lock().pod() {
            // containerd tells the handler's options with the sandbox alone.
            options = Options {
                io_uid: options.io_uid,
                io_gid: options.io_gid,
                ..pod.options.clone()
            };
            files = Some(pod.files.clone());
        }
        let new = New {
            id: &request.id,
            bundle: &request.bundle,
            rootfs: &request.rootfs,
            addresses: addresses(request),
            options,
            pod: files,
        };
        let pid = self.make(new, |tasks, pid| {
            let event = TaskCreate {
                container_id: request.id.clone(),
                bundle: request.bundle.clone(),
                rootfs: request.rootfs.clone(),
                io: MessageField::some(TaskIO {
                    stdin: request.stdin.clone(),
                    stdout: request.stdout.clone(),
                    stderr: request.stderr.clone(),
                    terminal: request.terminal,
                    ..Default::default()
                }),
                pid,
                ..Default::default()
            };
            tasks.events.send(TASK_CREATE_EVENT_TOPIC, &event);
        })?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    /// Makes a container, which then waits for its start, and tells of it.
    pub fn make(&self, new: New<'_>, tell: impl FnOnce(&Tasks, u32)) -> Reply<u32> {
        let id: ContainerId = new
            .id
            .parse()
            .map_err(|error| Failure::new(Kind::Invalid, format!("{error}")))?;
        let root = state_root(&new.options, &self.namespace);
        let lifecycle = Arc::new(lifecycle(&root, &new.options)?);
        {
            let mut state = self.tasks.lock();
            state.reserve(new.id)?;
            state.begin_operation();
        }
        let made = self.make_reserved(&new, &root, &id);
        let mut state = self.tasks.lock();
        let exit = state.end_operation(made.as_ref().ok().map(|(done, _)| done.pid));
        let (Done { pid, shares_pids }, kept) = made.inspect_err(|_| {
            drop(state.remove(new.id));
            self.end_if_over(&state);
        })?;
        let is_given_up = state.is_given_up(new.id);
        let mut init = Process::new(new.addresses);
        init.begin(pid, kept);
        let watcher = match state.is_sandbox(new.id) {
            true => None,
            false => self.tasks.watch(Arc::clone(&lifecycle), id.clone()),
        };
        state.insert(Container {
            id,
            bundle: new.bundle.into(),
            root,
            options: new.options,
            lifecycle,
            init,
            execs: HashMap::new(),
            paused: false,
            shares_pids,
            watcher,
        });
        tell(&self.tasks, pid.unsigned_abs());
        if let Some(exit) = exit {
            self.tasks.record(&mut state, new.id, "", exit);
        }
        drop(state);
        if is_given_up {
            // Nobody hears the answer, but for the log.
            self.remove_given_up(new.id)?;
            return Err(Failure::not_found(new.id));
        }
        Ok(pid.unsigned_abs())
    }

    /// Mounts the root, and has the container made. Nothing is left of it if that fails.
    fn make_reserved(&self, new: &New<'_>, root: &Path, id: &ContainerId) -> Reply<(Done, Kept)> {
        let bundle = Path::new(new.bundle);
        save_options(bundle, &new.options)?;
        let target = rootfs(bundle);
        let make = || {
            for (index, mount) in new.rootfs.iter().enumerate() {
                engine::mount_on_host(index, &oci_mount(mount)?, &target)?;
            }
            let streams = self.open(&new.addresses, new.id, &new.options)?;
            let operation = Request {
                root: root.to_owned(),
                options: new.options.clone(),
                id: id.clone(),
                operation: Operation::Create {
                    bundle: bundle.to_owned(),
                    pod: new.pod.clone(),
                },
            };
            self.begin(&operation, streams)
        };
        make().inspect_err(|_| {
            if !new.rootfs.is_empty()
                && let Err(failure) = engine::unmount_on_host(&target)
            {
                tracing::warn!("{}", engine::error_chain(&failure));
            }
        })
    }

    fn open(&self, addresses: &Addresses, id: &str, options: &Options) -> Reply<Streams> {
        let logged = Logged {
            id,
            namespace: &self.namespace,
        };
        Streams::open(addresses, logged, (options.io_uid, options.io_gid))
    }

    /// Has a process made that gets these streams, or a terminal that is copied to them.
    fn begin(&self, request: &Request, streams: Streams) -> Reply<(Done, Kept)> {
        let (done, terminal) = self.worker.call(request, &streams.files())?;
        let kept = streams.into_kept(terminal).inspect_err(|_| {
            // Nobody will know of it: it must not go on. containerd has what is left of a container deleted.
            let _ = PidFd::open(done.pid).and_then(|process| process.signal(Signal::KILL));
        })?;
        Ok((done, kept))
    }

    /// Lets a container's workload run, or starts a process of an `exec`.
    pub fn start(&self, request: &StartRequest) -> Reply<StartResponse> {
        self.start_process(&request.id, &request.exec_id)
    }

    /// The same of a container, or of its `exec`.
    pub fn start_process(&self, id: &str, exec: &str) -> Reply<StartResponse> {
        {
            let mut state = self.tasks.lock();
            let process = state.process(id, exec)?;
            if process.phase != Phase::Created || process.exit.is_some() {
                let reason = "cannot start a process that was started already";
                return Err(Failure::new(Kind::State, reason));
            }
            process.phase = Phase::Starting;
        }
        if exec.is_empty() {
            self.start_container(id)
        } else {
            self.start_exec(id, exec)
        }
    }

    fn start_container(&self, id: &str) -> Reply<StartResponse> {
        let started = self.operate(id, Operation::Start);
        let mut state = self.tasks.lock();
        let pid = self.started(&mut state, id, "", started.is_ok(), |tasks, pid| {
            let event = TaskStart {
                container_id: id.to_owned(),
                pid,
                ..Default::default()
            };
            tasks.events.send(TASK_START_EVENT_TOPIC, &event);
        })?;
        drop(state);
        started?;
        // Now it waits, often for days.
        engine::give_back_code();
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    fn start_exec(&self, id: &str, exec: &str) -> Reply<StartResponse> {
        let (request, addresses) = {
            let mut state = self.tasks.lock();
            let container = state.container(id)?;
            let known = container
                .execs
                .get(exec)
                .ok_or_else(|| Failure::not_found(exec))?;
            let process = Box::new(known.spec.clone());
            let addresses = known.process.addresses.clone();
            let request = self.request(container, Operation::Exec { process });
            state.begin_operation();
            (request, addresses)
        };
        let made = self
            .open(&addresses, id, &request.options)
            .and_then(|streams| self.begin(&request, streams));
        let mut state = self.tasks.lock();
        let exit = state.end_operation(made.as_ref().ok().map(|(done, _)| done.pid));
        let is_made = made.is_ok();
        let failure = match made {
            Ok((done, kept)) => {
                let process = state.process(id, exec)?;
                process.begin(done.pid, kept);
                if let Some(exit) = exit {
                    process.end(exit);
                }
                None
            }
            Err(failure) => Some(failure),
        };
        let pid = self.started(&mut state, id, exec, is_made, |tasks, pid| {
            let event = TaskExecStarted {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                pid,
                ..Default::default()
            };
            tasks.events.send(TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        })?;
        match failure {
            Some(failure) => Err(failure),
            None => Ok(StartResponse {
                pid,
                ..Default::default()
            }),
        }
    }

    /// A start has come to its end. An exit that came meanwhile is told behind it.
    fn started(
        &self,
        state: &mut State,
        id: &str,
        exec: &str,
        is_started: bool,
        tell: impl Fn(&Tasks, u32),
    ) -> Reply<u32> {
        let process = state.process(id, exec)?;
        let (pid, exit) = (process.pid(), process.exit);
        process.phase = match is_started {
            true => Phase::Running,
            false => Phase::Created,
        };
        if is_started && !(exec.is_empty() && state.is_sandbox(id)) {
            tell(&self.tasks, pid);
        }
        if let Some(exit) = exit {
            self.tasks.record(state, id, exec, exit);
        }
        Ok(pid)
    }

    /// Removes a container or a process that has ended, or was never started.
    pub fn delete(&self, request: &DeleteRequest) -> Reply<DeleteResponse> {
        let (id, exec) = (request.id.as_str(), request.exec_id.as_str());
        let is_running = {
            let mut state = self.tasks.lock();
            let process = state.process(id, exec)?;
            process.exit.is_none() && process.phase != Phase::Created
        };
        if is_running {
            let reason = format!("cannot delete a running process: {id} {exec}");
            return Err(Failure::new(Kind::State, reason.trim_end()));
        }
        let (pid, exit) = if exec.is_empty() {
            self.delete_container(id)?
        } else {
            let mut state = self.tasks.lock();
            let known = state.container(id)?.execs.remove(exec);
            let process = known.ok_or_else(|| Failure::not_found(exec))?.process;
            (process.pid(), process.exit)
        };
        let mut response = DeleteResponse {
            pid,
            ..Default::default()
        };
        if let Some(exit) = exit {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(timestamp(exit.time));
        }
        Ok(response)
    }

    /// Removes a container, with all that runs in it.
    pub fn delete_container(&self, id: &str) -> Reply<(u32, Option<Exit>)> {
        match self.operate(id, Operation::Delete) {
            // Another process has: our own `delete`, or `rt`.
            Err(failure) if failure.kind == Kind::NotFound => {}
            deleted => {
                deleted?;
            }
        }
        // One that was never started was killed just now.
        let exit = self.tasks.wait(id, "", Some(END_LIMIT))?;
        let bundle = self.tasks.lock().container(id)?.bundle.clone();
        engine::unmount_on_host(&rootfs(&bundle))?;
        let container = self.tasks.lock().remove(id);
        let pid = container.map_or(0, |container| container.init.pid());
        let state = self.tasks.lock();
        if !state.is_sandbox(id) {
            let event = TaskDelete {
                container_id: id.to_owned(),
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.time)),
                ..Default::default()
            };
            self.tasks.events.send(TASK_DELETE_EVENT_TOPIC, &event);
        }
        self.end_if_over(&state);
        Ok((pid, Some(exit)))
    }

    /// Notes a process that is to be started in a container.
    pub fn exec(&self, request: &ExecProcessRequest) -> Reply<()> {
        let spec = request.spec.as_ref().map(|spec| spec.value.as_slice());
        let mut spec: oci_spec::runtime::Process = serde_json::from_slice(spec.unwrap_or_default())
            .map_err(|error| Failure::new(Kind::Invalid, format!("the process: {error}")))?;
        spec.set_terminal(Some(request.terminal));
        let mut state = self.tasks.lock();
        let container = state.container(&request.id)?;
        if container.init.exit.is_some() {
            return Err(Failure::new(
                Kind::State,
                "cannot exec in a stopped container",
            ));
        }
        if request.exec_id.is_empty() || container.execs.contains_key(&request.exec_id) {
            let reason = format!("{:?}: exists already", request.exec_id);
            return Err(Failure::new(Kind::Exists, reason));
        }
        let addresses = Addresses {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let process = Process::new(addresses);
        container
            .execs
            .insert(request.exec_id.clone(), Exec { process, spec });
        let event = TaskExecAdded {
            container_id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        };
        self.tasks.events.send(TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// What is known of a process.
    pub fn state(&self, request: &StateRequest) -> Reply<StateResponse> {
        let mut state = self.tasks.lock();
        state.set_forgotten(false);
        let container = state.container(&request.id)?;
        let (bundle, is_paused) = (container.bundle.clone(), container.paused);
        let process = state.process(&request.id, &request.exec_id)?;
        let status = match process.status() {
            Status::RUNNING if is_paused => Status::PAUSED,
            status => status,
        };
        let mut response = StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: bundle.to_string_lossy().into_owned(),
            pid: process.pid(),
            status: EnumOrUnknown::new(status),
            stdin: process.addresses.stdin.clone(),
            stdout: process.addresses.stdout.clone(),
            stderr: process.addresses.stderr.clone(),
            terminal: process.addresses.terminal,
            ..Default::default()
        };
        if let Some(exit) = process.exit {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(timestamp(exit.time));
        }
        Ok(response)
    }

    /// The processes of a container, with the ids of those that an `exec` started.
    pub fn pids(&self, request: &PidsRequest) -> Reply<PidsResponse> {
        let (lifecycle, id) = self.lifecycle(&request.id)?;
        let pids = lifecycle.processes(&id)?;
        let mut state = self.tasks.lock();
        state.set_forgotten(false);
        let container = state.container(&request.id)?;
        let info = |pid: i32| {
            let mut known = container.execs.iter();
            let exec = known.find(|(_, exec)| exec.process.pid == pid);
            let details = exec.map(|(exec_id, _)| {
                any(&ProcessDetails {
                    exec_id: exec_id.clone(),
                    ..Default::default()
                })
            });
            ProcessInfo {
                pid: pid.unsigned_abs(),
                info: details.into(),
                ..Default::default()
            }
        };
        Ok(PidsResponse {
            processes: pids.iter().map(|process| info(process.pid)).collect(),
            ..Default::default()
        })
    }

    /// How a container is asked.
    pub fn lifecycle(&self, id: &str) -> Reply<(Arc<Lifecycle>, ContainerId)> {
        let mut state = self.tasks.lock();
        let container = state.container(id)?;
        Ok((Arc::clone(&container.lifecycle), container.id.clone()))
    }

    /// Sends a signal.
    pub fn kill(&self, request: &KillRequest) -> Reply<()> {
        let signal = i32::try_from(request.signal).ok();
        let signal = signal.and_then(|signal| Signal::try_from(signal).ok());
        let signal = signal.ok_or_else(|| {
            Failure::new(
                Kind::Invalid,
                format!("there is no signal {}", request.signal),
            )
        })?;
        if !request.exec_id.is_empty() {
            let mut state = self.tasks.lock();
            return state.process(&request.id, &request.exec_id)?.signal(signal);
        }
        let (ended, lifecycle, id) = {
            let mut state = self.tasks.lock();
            let container = state.container(&request.id)?;
            let lifecycle = Arc::clone(&container.lifecycle);
            (
                container.init.exit.is_some(),
                lifecycle,
                container.id.clone(),
            )
        };
        if ended && !request.all {
            return Err(Failure::new(Kind::NotFound, "process already finished"));
        }
        lifecycle.kill(&id, signal, request.all).map_err(|error| {
            let failure = Failure::from(error);
            match failure.kind {
                // It ended a moment ago, and its exit is on its way.
                Kind::State => Failure::new(Kind::NotFound, failure.reason),
                _ => failure,
            }
        })
    }

    /// Stops a container's processes where they are, or lets them go on.
    pub fn pause(&self, id: &str, paused: bool) -> Reply<()> {
        let operation = match paused {
            true => Operation::Pause,
            false => Operation::Resume,
        };
        self.operate(id, operation)?;
        self.tasks.lock().container(id)?.paused = paused;
        let container_id = id.to_owned();
        if paused {
            let event = TaskPaused {
                container_id,
                ..Default::default()
            };
            self.tasks.events.send(TASK_PAUSED_EVENT_TOPIC, &event);
        } else {
            let event = TaskResumed {
                container_id,
                ..Default::default()
            };
            self.tasks.events.send(TASK_RESUMED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// Writes a container's processes to images.
    pub fn checkpoint(&self, request: &CheckpointTaskRequest) -> Reply<()> {
        let wrong = |reason: String| Failure::new(Kind::Invalid, reason);
        let options = request.options.as_ref().map(|any| any.value.as_slice());
        let options = CheckpointOptions::parse_from_bytes(options.unwrap_or_default())
            .map_err(|error| wrong(format!("checkpoint options: {error}")))?;
        let path = [&options.image_path, &request.path]
            .into_iter()
            .find(|path| !path.is_empty())
            .ok_or_else(|| wrong("a checkpoint needs a path".to_owned()))?;
        let manage_cgroups = match options.cgroups_mode.as_str() {
            "" => Default::default(),
            mode => mode.parse().map_err(wrong)?,
        };
        let images = Box::new(Images {
            image_path: path.into(),
            work_path: Some(&options.work_path)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            parent_path: None,
            leave_running: !options.exit,
            pre_dump: false,
            link_remap: false,
            tcp_established: options.open_tcp,
            ext_unix_sk: options.external_unix_sockets,
            shell_job: options.terminal,
            file_locks: options.file_locks,
            manage_cgroups,
            empty_network: options
                .empty_namespaces
                .iter()
                .any(|name| name == "network"),
            auto_dedup: false,
        });
        self.operate(&request.id, Operation::Checkpoint { images })?;
        let event = TaskCheckpointed {
            container_id: request.id.clone(),
            checkpoint: path.clone(),
            ..Default::default()
        };
        self.tasks
            .events
            .send(TASK_CHECKPOINTED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Changes a container's limits.
    pub fn update(&self, request: &UpdateTaskRequest) -> Reply<()> {
        let text = request.resources.as_ref().map(|any| any.value.as_slice());
        let resources = serde_json::from_slice(text.unwrap_or_default())
            .map_err(|error| Failure::new(Kind::Invalid, format!("the resources: {error}")))?;
        self.operate(&request.id, Operation::Update { resources })
            .map(drop)
    }

    /// Waits for the end of a process.
    pub fn wait(&self, request: &WaitRequest) -> Reply<WaitResponse> {
        let exit = self.tasks.wait(&request.id, &request.exec_id, None)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.time)),
            ..Default::default()
        })
    }

    /// What a container has used.
    pub fn stats(&self, request: &StatsRequest) -> Reply<StatsResponse> {
        let (lifecycle, id) = self.lifecycle(&request.id)?;
        let stats = metrics::of(&lifecycle.stats(&id)?);
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    /// Who serves the container.
    pub fn connect(&self, request: &ConnectRequest) -> Reply<ConnectResponse> {
        let mut state = self.tasks.lock();
        // A containerd that was started again asks for one of these first.
        state.set_forgotten(false);
        // Asked for also when nothing is made yet.
        let pid = state
            .process(&request.id, "")
            .map_or(0, |process| process.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    /// Ends the server unless it has containers: that of a pod is told for each of them.
    pub fn shutdown(&self) {
        if self.tasks.lock().is_empty() {
            self.end();
        }
    }

    /// Ends the server with its last container, if it has no pod, and no containerd asks for anything before.
    pub fn forgotten(&self) {
        let mut state = self.tasks.lock();
        state.set_forgotten(true);
        self.end_if_over(&state);
    }

    /// Removes a container of which containerd will not ask any more, and ends the server with the last one: containerd
    /// takes it for dead, and has executed `delete` in its place. One that is being made is removed when that is done.
    pub fn give_up(&self, id: &str) -> Reply<()> {
        let is_being_made = {
            let mut state = self.tasks.lock();
            state.set_forgotten(true);
            state.give_up(id)
        };
        match is_being_made {
            true => Ok(()),
            false => self.remove_given_up(id),
        }
    }

    fn remove_given_up(&self, id: &str) -> Reply<()> {
        let is_sandbox = self.tasks.lock().is_sandbox(id);
        let removed = match is_sandbox {
            true => self.remove_pod(id),
            false => self.delete_container(id).map(drop),
        };
        self.end_if_over(&self.tasks.lock());
        removed
    }

    /// Ends the server with its last container, which may be gone already.
    pub fn shutdown_with_last(&self) {
        let mut state = self.tasks.lock();
        state.end_with_last();
        self.end_if_over(&state);
    }

    pub fn end_if_over(&self, state: &State) {
        if state.has_ended() {
            self.end();
        }
    }

    fn end(&self) {
        // Full means that it was told before.
        let _ = self.end.try_send(());
    }
}

fn addresses(request: &CreateTaskRequest) -> Addresses {
    Addresses {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}

/// A mount of the protocol in the form that the engine takes.
fn oci_mount(mount: &Mount) -> Reply<oci_spec::runtime::Mount> {
    let value = serde_json::json!({
        "destination": "/", "type": mount.type_, "source": mount.source, "options": mount.options,
    });
    serde_json::from_value(value)
        .map_err(|error| Failure::new(Kind::Invalid, format!("rootfs: {error}")))
}
