//! The containers of this server and their processes, as containerd has been told of them.
//!
//! One lock guards them all and is held for moments only, never for an operation. An exit may be reaped before the
//! operation that made the process has told us its pid: while operations are under way, exits that are nobody's are
//! kept for them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics::{TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC};
use runtime::id::ContainerId;
use runtime::lifecycle::{Event, Lifecycle};
use runtime::signal::Signal;

use crate::error::{Failure, Kind};
use crate::events::{Events, timestamp};
use crate::options::Options;
use crate::pod::Pod;
use crate::process::{Exit, Phase, Process};

/// Between two looks at a container's use, which nobody asked for: only its other events count.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// A container.
pub struct Container {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub root: PathBuf,
    pub options: Options,
    pub lifecycle: Arc<Lifecycle>,
    /// Its first process.
    pub init: Process,
    /// Those of `exec`, by id, with what is to be executed until that is done.
    pub execs: HashMap<String, Exec>,
    pub paused: bool,
    /// Other processes may outlive the first one: it has no pid namespace of its own.
    pub shares_pids: bool,
    /// The thread that waits for its events.
    pub watcher: Option<JoinHandle<()>>,
}

/// A process of an `exec`.
pub struct Exec {
    pub process: Process,
    /// What to execute.
    pub spec: oci_spec::runtime::Process,
}

/// A container, or one that is being made.
pub enum Entry {
    /// The id is taken; perhaps by what nobody wants any more.
    Creating { is_given_up: bool },
    /// It is there.
    Made(Box<Container>),
}

/// What the lock guards.
#[derive(Default)]
pub struct State {
    containers: HashMap<String, Entry>,
    /// How many operations that make a process are under way.
    operations: usize,
    /// The exits that were nobody's meanwhile.
    unclaimed: HashMap<i32, Exit>,
    /// The pod, if the sandbox service made its sandbox.
    pod: Option<Pod>,
    /// The pod is over: the server ends with the last container.
    is_over: bool,
    /// The containerd that had the server started has ended or takes the server for dead, and none has asked for anything
    /// since.
    is_forgotten: bool,
}

/// The containers.
pub struct Tasks {
    state: Mutex<State>,
    pub events: Events,
}

impl State {
    /// The container with this id.
    pub fn container(&mut self, id: &str) -> Result<&mut Container, Failure> {
        match self.containers.get_mut(id) {
            Some(Entry::Made(container)) => Ok(container),
            Some(Entry::Creating { .. }) => {
                Err(Failure::new(Kind::State, format!("{id}: is being created")))
            }
            None => Err(Failure::not_found(id)),
        }
    }

    /// A process: of an `exec`, or with an empty `exec` the container's first.
    pub fn process(&mut self, id: &str, exec: &str) -> Result<&mut Process, Failure> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Ok(&mut container.init);
        }
        let exec = container.execs.get_mut(exec);
        let exec = exec.ok_or_else(|| Failure::not_found(id))?;
        Ok(&mut exec.process)
    }

    /// Takes an id for a container that is to be made.
    pub fn reserve(&mut self, id: &str) -> Result<(), Failure> {
        if self.containers.contains_key(id) {
            return Err(Failure::new(Kind::Exists, format!("{id}: exists already")));
        }
        let entry = Entry::Creating { is_given_up: false };
        self.containers.insert(id.to_owned(), entry);
        Ok(())
    }

    /// Nobody wants the container any more. Says whether it is being made: then who makes it has to remove it.
    pub fn give_up(&mut self, id: &str) -> bool {
        match self.containers.get_mut(id) {
            Some(Entry::Creating { is_given_up }) => {
                *is_given_up = true;
                true
            }
            _ => false,
        }
    }

    /// Whether it was given up while it was made.
    pub fn is_given_up(&self, id: &str) -> bool {
        matches!(
            self.containers.get(id),
            Some(Entry::Creating { is_given_up: true })
        )
    }

    /// The container is there.
    pub fn insert(&mut self, container: Container) {
        let id = container.id.as_str().to_owned();
        self.containers.insert(id, Entry::Made(Box::new(container)));
    }

    /// Forgets a container. Who waits for one of its processes is told so when it is dropped.
    pub fn remove(&mut self, id: &str) -> Option<Container> {
        match self.containers.remove(id) {
            Some(Entry::Made(container)) => Some(*container),
            _ => None,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty()
    }

    /// All that are made.
    pub fn all(&self) -> Vec<(Arc<Lifecycle>, ContainerId)> {
        let made = self.containers.values().filter_map(|entry| match entry {
            Entry::Made(container) => {
                Some((Arc::clone(&container.lifecycle), container.id.clone()))
            }
            Entry::Creating { .. } => None,
        });
        made.collect()
    }

    /// The pod, if the sandbox service made its sandbox.
    pub fn pod(&self) -> Option<&Pod> {
        self.pod.as_ref()
    }

    /// This server is to have the pod's sandbox.
    pub fn enter_pod(&mut self, pod: Pod) -> Result<(), Failure> {
        if let Some(other) = &self.pod {
            let reason = format!("{}: this shim has the sandbox {}", pod.id, other.id);
            return Err(Failure::new(Kind::Exists, reason));
        }
        self.pod = Some(pod);
        Ok(())
    }

    /// It has it no more.
    pub fn leave_pod(&mut self) -> Option<Pod> {
        self.pod.take()
    }

    /// Whether this container is the pod's sandbox, of which the task service's events do not tell.
    pub fn is_sandbox(&self, id: &str) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.id == id)
    }

    /// The server is to end with the last container.
    pub fn end_with_last(&mut self) {
        self.is_over = true;
    }

    /// Nobody is there who would tell the server to end, or somebody is again.
    pub fn set_forgotten(&mut self, is_forgotten: bool) {
        self.is_forgotten = is_forgotten;
    }

    /// Whether there is nothing left to serve.
    pub fn has_ended(&self) -> bool {
        let is_over = self.is_over || (self.is_forgotten && self.pod.is_none());
        is_over && self.is_empty()
    }

    /// An operation begins that makes a process.
    pub fn begin_operation(&mut self) {
        self.operations += 1;
    }

    /// The operation is done and has made `pid`, if any. Returns how that ended if it has already.
    pub fn end_operation(&mut self, pid: Option<i32>) -> Option<Exit> {
        let exit = pid.and_then(|pid| self.unclaimed.remove(&pid));
        self.operations = self.operations.saturating_sub(1);
        if self.operations == 0 {
            self.unclaimed.clear();
        }
        exit
    }

    /// Whose a pid is: the container, and the `exec` if it is not the first process.
    fn owner(&self, pid: i32) -> Option<(String, Option<String>)> {
        let is_it = |process: &Process| process.pid == pid && process.exit.is_none();
        self.containers.iter().find_map(|(id, entry)| {
            let Entry::Made(container) = entry else {
                return None;
            };
            if is_it(&container.init) {
                return Some((id.clone(), None));
            }
            let exec = container
                .execs
                .iter()
                .find(|(_, exec)| is_it(&exec.process));
            exec.map(|(exec, _)| (id.clone(), Some(exec.clone())))
        })
    }
}

impl Tasks {
    /// No containers yet.
    pub fn new(events: Events) -> Self {
        Self {
            state: Mutex::default(),
            events,
        }
    }

    /// Locks the containers.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of a process, for at most `limit` if there is one.
    pub fn wait(&self, id: &str, exec: &str, limit: Option<Duration>) -> Result<Exit, Failure> {
        let end = self.lock().process(id, exec)?.wait();
        // One that is forgotten before its end tells nobody.
        let gone = || Failure::not_found(id);
        match limit {
            None => end.recv().map_err(|_| gone()),
            Some(limit) => end.recv_timeout(limit).map_err(|error| match error {
                RecvTimeoutError::Disconnected => gone(),
                RecvTimeoutError::Timeout => {
                    Failure::new(Kind::Other, format!("{id}: does not end"))
                }
            }),
        }
    }

    /// A child has been reaped.
    pub fn reaped(&self, pid: i32, exit: Exit) {
        let mut state = self.lock();
        let Some((id, exec)) = state.owner(pid) else {
            if state.operations > 0 {
                state.unclaimed.insert(pid, exit);
            }
            return;
        };
        if exec.is_none() {
            drop(state);
            self.first_process_ended(&id);
            state = self.lock();
        }
        self.record(&mut state, &id, exec.as_deref().unwrap_or_default(), exit);
    }

    /// What comes before the exit of a container's first process is told.
    fn first_process_ended(&self, id: &str) {
        let (watcher, others) = {
            let mut state = self.lock();
            let Ok(container) = state.container(id) else {
                return;
            };
            let others = container
                .shares_pids
                .then(|| (Arc::clone(&container.lifecycle), container.id.clone()));
            (container.watcher.take(), others)
        };
        // It ends with the process, and tells of kills for want of memory first.
        if let Some(watcher) = watcher {
            let _ = watcher.join();
        }
        if let Some((lifecycle, id)) = others
            && let Err(error) = lifecycle.kill(&id, Signal::KILL, true)
        {
            tracing::debug!("{}", runtime::error_chain(&error));
        }
    }

    /// Writes an exit down and tells of it, unless the start has to be told first.
    pub fn record(&self, state: &mut State, id: &str, exec: &str, exit: Exit) {
        let is_sandbox = exec.is_empty() && state.is_sandbox(id);
        if let Ok(process) = state.process(id, exec) {
            process.end(exit);
            if process.phase != Phase::Starting && !is_sandbox {
                self.tell_exit(id, exec, process.pid(), exit);
            }
        }
    }

    /// Tells containerd of an exit.
    fn tell_exit(&self, id: &str, exec: &str, pid: u32, exit: Exit) {
        let event = TaskExit {
            container_id: id.to_owned(),
            id: if exec.is_empty() { id } else { exec }.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.time)),
            ..Default::default()
        };
        self.events.send(TASK_EXIT_EVENT_TOPIC, &event);
    }

    /// Tells containerd of the container's events until its end, in a thread.
    pub fn watch(
        self: &Arc<Self>,
        lifecycle: Arc<Lifecycle>,
        id: ContainerId,
    ) -> Option<JoinHandle<()>> {
        let tasks = Arc::clone(self);
        let watch = move || {
            let events = match lifecycle.events(&id, NEVER) {
                Ok(events) => events,
                Err(error) => {
                    tracing::debug!("{id}: {}", runtime::error_chain(&error));
                    return;
                }
            };
            for event in events {
                match event {
                    Ok(Event::Oom) => {
                        let event = TaskOOM {
                            container_id: id.as_str().to_owned(),
                            ..Default::default()
                        };
                        tasks.events.send(TASK_OOM_EVENT_TOPIC, &event);
                    }
                    Ok(Event::Stats(_)) => {}
                    Err(error) => tracing::warn!("{id}: {}", runtime::error_chain(&error)),
                }
            }
        };
        let thread = std::thread::Builder::new().name("watcher".to_owned());
        thread
            .stack_size(128 << 10)
            .spawn(watch)
            .inspect_err(|error| tracing::warn!("cannot watch for events: {error}"))
            .ok()
    }
}
