//! What the agent knows of containers and their processes.

use std::collections::HashMap;
use std::rc::Rc;

use protocol::message::Outcome;
use protocol::{Code, Failure};

use crate::container::Container;

/// The call that an answer belongs to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    /// The connection's key in the loop.
    pub connection: u64,
    /// The call's stream id on it.
    pub stream_id: u32,
}

/// Names a process: a container's init if `exec` is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessName {
    pub container: String,
    pub exec: String,
}

/// A process from its creation until its record is deleted.
#[derive(Debug)]
pub(crate) struct Process {
    pub state: ProcessState,
    /// Keys of the relays of its stdio.
    pub relays: Vec<u64>,
    /// The terminal's relay, one of `relays`.
    pub terminal: Option<u64>,
    /// The [`Wait`](protocol::method::Wait) calls that are not yet answered.
    pub waiters: Vec<Caller>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum ProcessState {
    /// The engine is at work.
    Starting,
    /// It exists, with this pid.
    Running(i32),
    /// It has ended and is reaped.
    Ended(Outcome),
}

/// The containers and their processes.
#[derive(Debug, Default)]
pub(crate) struct Containers {
    entries: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    container: Rc<Container>,
    is_started: bool,
    /// The init process with the empty name, and those of exec.
    processes: HashMap<String, Process>,
}

impl Process {
    pub(crate) fn new() -> Self {
        Self {
            state: ProcessState::Starting,
            relays: Vec::new(),
            terminal: None,
            waiters: Vec::new(),
        }
    }

    /// The pid, unless the process has ended.
    pub(crate) fn pid(&self) -> Option<i32> {
        match self.state {
            ProcessState::Running(pid) => Some(pid),
            ProcessState::Starting | ProcessState::Ended(_) => None,
        }
    }
}

impl ProcessName {
    /// The init process of a container.
    pub(crate) fn init(container: &str) -> Self {
        Self {
            container: container.to_owned(),
            exec: String::new(),
        }
    }

    fn unknown(&self) -> Failure {
        let Self { container, exec } = self;
        let text = if exec.is_empty() {
            format!("container {container} does not exist in the guest")
        } else {
            format!("container {container} has no process {exec}")
        };
        Failure::new(Code::NotFound, text)
    }

    /// Refuses names that would not be one component of a path.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let plain = |name: &str| {
            name.len() <= 255
                && !name.starts_with('.')
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"+-._".contains(&b))
        };
        if !self.container.is_empty() && plain(&self.container) && plain(&self.exec) {
            return Ok(());
        }
        Err(Failure::new(
            Code::InvalidArgument,
            "the container or process id is not valid",
        ))
    }
}

impl Containers {
    /// Adds a container that is about to be created, with its init process.
    pub(crate) fn insert(&mut self, id: &str, container: Rc<Container>) -> Result<(), Failure> {
        if self.entries.contains_key(id) {
            let text = format!("container {id} already exists in the guest");
            return Err(Failure::new(Code::AlreadyExists, text));
        }
        let processes = HashMap::from([(String::new(), Process::new())]);
        self.entries.insert(
            id.to_owned(),
            Entry {
                container,
                is_started: false,
                processes,
            },
        );
        Ok(())
    }

    /// Adds a process that is about to be started in a container.
    pub(crate) fn insert_exec(&mut self, name: &ProcessName) -> Result<(), Failure> {
        name.check()?;
        let unknown = || ProcessName::init(&name.container).unknown();
        let entry = self.entries.get_mut(&name.container).ok_or_else(unknown)?;
        if entry.processes.contains_key(&name.exec) {
            let text = format!("process {} already exists", name.exec);
            return Err(Failure::new(Code::AlreadyExists, text));
        }
        entry.processes.insert(name.exec.clone(), Process::new());
        Ok(())
    }

    /// A container, for an operation on it.
    pub(crate) fn container(&self, id: &str) -> Result<Rc<Container>, Failure> {
        let unknown = || ProcessName::init(id).unknown();
        self.entries
            .get(id)
            .map(|entry| Rc::clone(&entry.container))
            .ok_or_else(unknown)
    }

    /// Notes that a container's init process runs the workload.
    pub(crate) fn set_started(&mut self, id: &str) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.is_started = true;
        }
    }

    /// A container's status, by the names of the OCI specification, and its init process's pid.
    pub(crate) fn status(&mut self, id: &str) -> Result<(&'static str, Option<i32>), Failure> {
        let init = self.process(&ProcessName::init(id))?;
        let (state, pid) = (init.state, init.pid());
        let is_started = self.entries.get(id).is_some_and(|entry| entry.is_started);
        let status = match state {
            ProcessState::Starting => "creating",
            ProcessState::Ended(_) => "stopped",
            ProcessState::Running(_) if !is_started => "created",
            ProcessState::Running(_) if self.container(id)?.is_paused() => "paused",
            ProcessState::Running(_) => "running",
        };
        Ok((status, pid))
    }

    pub(crate) fn process(&mut self, name: &ProcessName) -> Result<&mut Process, Failure> {
        self.entries
            .get_mut(&name.container)
            .and_then(|entry| entry.processes.get_mut(&name.exec))
            .ok_or_else(|| name.unknown())
    }

    /// Removes a process; with its init, a container and all its processes.
    pub(crate) fn remove(&mut self, name: &ProcessName) -> Vec<Process> {
        if name.exec.is_empty() {
            let entry = self.entries.remove(&name.container);
            return entry
                .into_iter()
                .flat_map(|entry| entry.processes.into_values())
                .collect();
        }
        let entry = self.entries.get_mut(&name.container);
        entry
            .and_then(|entry| entry.processes.remove(&name.exec))
            .into_iter()
            .collect()
    }

    /// A further process of a container that has not ended.
    pub(crate) fn running_exec(&self) -> Option<ProcessName> {
        self.entries.iter().find_map(|(container, entry)| {
            let mut processes = entry.processes.iter();
            let (exec, _) = processes.find(|(exec, process)| {
                !exec.is_empty() && !matches!(process.state, ProcessState::Ended(_))
            })?;
            Some(ProcessName {
                container: container.clone(),
                exec: exec.clone(),
            })
        })
    }

    /// The process that runs with this pid.
    pub(crate) fn find(&self, pid: i32) -> Option<ProcessName> {
        self.entries.iter().find_map(|(container, entry)| {
            let mut processes = entry.processes.iter();
            let (exec, _) = processes.find(|(_, process)| process.pid() == Some(pid))?;
            Some(ProcessName {
                container: container.clone(),
                exec: exec.clone(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use protocol::message::CreateContainerRequest;

    use super::*;

    fn name(container: &str, exec: &str) -> ProcessName {
        ProcessName {
            container: container.to_owned(),
            exec: exec.to_owned(),
        }
    }

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "a\0", "\u{e9}", &"x".repeat(256)] {
            assert!(name(bad, "").check().is_err(), "{bad:?}");
        }
        assert!(name("c", "../x").check().is_err());
        assert!(name("web-1.prod_2+x", "").check().is_ok());
    }

    #[test]
    fn a_process_belongs_to_its_container() {
        let mut containers = Containers::default();
        let request = CreateContainerRequest {
            id: "c".to_owned(),
            spec_json: "{\"ociVersion\":\"1.0.2\"}".to_owned(),
            ..CreateContainerRequest::default()
        };
        let container = || Rc::new(Container::new("/x".as_ref(), &request).unwrap());
        assert!(containers.insert_exec(&name("c", "e")).is_err());
        containers.insert("c", container()).unwrap();
        containers.insert_exec(&name("c", "e")).unwrap();
        let error = containers.insert("c", container()).unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists);
        containers.process(&name("c", "e")).unwrap().state = ProcessState::Running(7);
        assert_eq!(containers.find(7), Some(name("c", "e")));
        assert_eq!(containers.status("c").unwrap(), ("creating", None));
        assert_eq!(containers.remove(&name("c", "")).len(), 2);
        assert_eq!(
            containers.process(&name("c", "e")).unwrap_err().code(),
            Code::NotFound
        );
    }
}
