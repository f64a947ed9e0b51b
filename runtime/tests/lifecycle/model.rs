//! The lifecycle as a state machine: one id, a few commands at once, and all that they make.
//!
//! What a command decides is asked of the code that decides it ([`Phase::status`] and the questions of `Status`). What it
//! does is a sequence of [`Step`]s, each one change that others can see or a crash can part from the next. Where a build
//! has a fault point behind a step, the step has its name, and `conformance.rs` compares the two.
//!
//! Left out: hooks, terminals, pid files and `exec`, none of which the record tells of; signals but SIGKILL; and what
//! cannot be told apart from outside, as several writes to one file before it is renamed into place.

#![expect(
    clippy::expect_used,
    clippy::unreachable,
    reason = "a step that its command cannot take is a mistake in the model, by which the test fails"
)]

use runtime::state::{Phase, Status};

/// Which container of the id: the first that is made, the second, and so on.
pub type Generation = u8;

/// Which of the commands.
pub type Client = usize;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    Create,
    Start,
    Pause,
    Resume,
    /// With SIGKILL.
    Kill,
    Delete {
        force: bool,
    },
}

/// What a command does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// `create` looks whether the id is free.
    LookForId,
    /// `create` makes a directory under another name.
    MakeDirectory,
    /// It writes the first record, *creating*, and locks the container.
    WriteFirstRecord,
    /// It renames the directory to the id, or finds that another was quicker.
    TakeId,
    /// It saves the bundle's configuration.
    SaveConfiguration,
    /// It makes the cgroup, once it has noted that it will.
    MakeCgroup,
    /// It makes the first process, which ends with it until it is released.
    MakeProcess,
    /// It writes who that is.
    WriteProcess,
    /// It writes *created*.
    WriteCreated,
    /// It lets the first process live on without it.
    Release,

    /// A command that changes a container opens the file that is its lock.
    OpenLock,
    /// It waits for the lock.
    Lock,
    /// It looks whether the container that it has locked still is the one at the id, and reads the record.
    LookAgain,
    /// It looks whether what it is to do may be done; of a change that was cut off the model tells what has come of it.
    Decide,
    /// It writes that the status is being changed.
    Announce,
    /// `start` opens the pipe at which the first process waits.
    OpenPipe,
    /// It writes the byte.
    Tell,
    /// It removes the pipe.
    RemovePipe,
    /// `pause` or `resume` has the kernel stop the processes, or let them go on.
    Freeze,
    /// What was to be changed has been, and the command writes so.
    WriteOutcome,

    /// `kill` reads the record, and asks the model if that says that the status is being changed.
    Load,
    /// It sends the signal.
    Signal,

    /// `delete` kills whatever is in the cgroup.
    KillProcesses,
    /// It removes the cgroup.
    RemoveCgroup,
    /// It moves the directory away from the id.
    FreeId,
    /// It removes the directory.
    RemoveDirectory,
    /// It removes directories of commands that were cut off.
    Sweep,
}

impl Step {
    /// The fault point behind the step.
    pub fn fault_point(self) -> Option<&'static str> {
        Some(match self {
            Self::MakeDirectory => "state.directory-made",
            Self::WriteFirstRecord
            | Self::SaveConfiguration
            | Self::WriteProcess
            | Self::WriteCreated
            | Self::Announce
            | Self::WriteOutcome => "state.file-renamed",
            Self::TakeId => "state.id-taken",
            Self::MakeCgroup => "cgroup.made",
            Self::MakeProcess => "create.cloned",
            Self::Release => "create.released",
            Self::OpenPipe => "engine.start-opened",
            Self::Tell => "engine.start-told",
            Self::KillProcesses => "cgroup.killed",
            Self::RemoveCgroup => "engine.cgroup-removed",
            Self::FreeId => "state.id-free",
            Self::RemoveDirectory => "state.directory-removed",
            _ => return None,
        })
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    Done,
    /// It said why not.
    Refused,
}

/// One command on its way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Run {
    pub command: Command,
    /// `None` if it was killed.
    pub state: Option<RunState>,
}

/// Where a command is that was not killed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RunState {
    Before {
        step: Step,
        /// The container that it works on.
        of: Option<Generation>,
        /// The record as it last read or wrote it.
        known: Option<Record>,
        /// What failed, if it only cleans up or tells.
        failed: bool,
    },
    Ended(Answer),
}

/// The part of the record that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Record {
    pub phase: Phase,
    pub creator: Client,
    /// Whether it names the first process.
    pub has_process: bool,
}

/// A container's first process, with what it waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// Never made, or ended.
    None,
    /// It waits, and ends with this command.
    Held(Client),
    /// It waits at the pipe.
    Waiting,
    /// The byte is in the pipe.
    Told,
    /// The workload runs.
    Runs,
}

/// What there is of one container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Container {
    pub process: Process,
    pub frozen: bool,
    /// Whether the pipe at which the first process waits has a name.
    pub pipe: bool,
    pub lock: Option<Client>,
    /// The directory under another name, and whose.
    pub pending: Option<Client>,
    /// How many commands said that they had started it.
    pub starts: u8,
}

/// All that there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// What is at the id.
    pub at_id: Option<(Generation, Record)>,
    pub containers: Vec<Container>,
    /// Whose the cgroup is that goes by the id.
    pub cgroup: Option<Generation>,
    pub runs: Vec<Run>,
    pub crashes_left: u8,
    /// What must never happen and is not to be seen in a state alone.
    pub broken: Option<&'static str>,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A command goes one step.
    Go(Client),
    /// A command's step fails, as for want of memory.
    Fail(Client),
    /// A command gets SIGKILL.
    Crash(Client),
    /// A first process reads the byte, and the workload begins.
    Begin(Generation),
    /// A workload ends by itself.
    End(Generation),
}

/// What is wrong in a variant of the lifecycle that is not ours, for the properties to be seen to catch it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// The cgroup and the first process are made before there is a record.
    RecordAfterProcess,
    /// The directory is removed before what it tells of.
    RecordRemovedFirst,
    /// `start` tells the first process before it writes that it will.
    StartUnannounced,
    /// `pause` and `resume` write only what they have done.
    PauseUnannounced,
    /// What the model says of a change that was cut off is written to the record.
    AnswerWritten,
    /// A `start` that failed writes *created*.
    FailedStartIsCreated,
    /// Whoever waited for a lock does not look whether the container is still there.
    LockNotLookedAt,
    /// A process is known by its pid alone.
    PidAlone,
    /// The first process does not end with a creator that has not released it.
    ProcessOutlivesCreator,
    /// Nobody waits for a lock.
    NoLock,
    /// The lock of a command that was killed stays.
    LockOfTheDead,
    /// Nobody removes the directories of commands that were cut off.
    NoSweep,
}

/// The lifecycle, ours or one with a flaw.
#[derive(Debug, Clone, Copy)]
pub struct Lifecycle {
    pub flaw: Option<Flaw>,
}

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Property {
    /// What `state` tells at any moment is so.
    StateIsTrue,
    /// A record leads to whatever there is: it is written before that is made, and removed after that is gone.
    NothingWithoutRecord,
    /// A command changes, signals and removes no container but the one that it looked at.
    OwnContainer,
    /// Of several commands that start a container, one succeeds.
    StartedOnce,
    /// Whatever was cut off where, `delete --force` removes it.
    DeleteLeavesNothing,
    /// No command waits for ever.
    EveryCommandEnds,
}

impl Property {
    pub const ALL: [Self; 6] = [
        Self::StateIsTrue,
        Self::NothingWithoutRecord,
        Self::OwnContainer,
        Self::StartedOnce,
        Self::DeleteLeavesNothing,
        Self::EveryCommandEnds,
    ];
}

impl World {
    /// Nothing, and these commands.
    pub fn new(commands: &[Command], crashes: u8) -> Self {
        let runs = commands.iter().map(|command| Run::new(*command)).collect();
        Self {
            at_id: None,
            containers: Vec::new(),
            cgroup: None,
            runs,
            crashes_left: crashes,
            broken: None,
        }
    }

    /// The same with other commands, none of which has begun.
    pub fn with(&self, commands: &[Command], crashes: u8) -> Self {
        let mut world = Self {
            runs: Self::new(commands, 0).runs,
            crashes_left: crashes,
            ..self.clone()
        };
        // Who created the container is gone, and named as nobody is.
        if let Some((_, record)) = &mut world.at_id {
            record.creator = usize::MAX;
        }
        for container in &mut world.containers {
            container.lock = None;
            container.pending = container.pending.map(|_| usize::MAX);
        }
        world
    }

    fn container(&mut self, generation: Generation) -> &mut Container {
        &mut self.containers[usize::from(generation)]
    }

    fn process(&self, generation: Generation) -> Process {
        self.containers[usize::from(generation)].process
    }

    fn lives(&self, generation: Generation) -> bool {
        self.process(generation) != Process::None
    }

    fn works(&self, client: Client) -> bool {
        matches!(
            self.runs.get(client).and_then(|run| run.state.as_ref()),
            Some(RunState::Before { .. })
        )
    }

    /// What the isolation model says while the record does not know.
    fn status_by_model(&self, generation: Generation) -> Status {
        let container = &self.containers[usize::from(generation)];
        let waits = matches!(
            container.process,
            Process::Held(_) | Process::Waiting | Process::Told
        );
        match (container.pipe && waits, container.frozen) {
            (true, _) => Status::Created,
            (false, true) => Status::Paused,
            (false, false) => Status::Running,
        }
    }

    /// The record with a change that was cut off, or is under way, looked into.
    fn settled(&self, generation: Generation, record: Record) -> Record {
        let phase = match (record.phase, self.status_by_model(generation)) {
            (Phase::Changing, Status::Created) => Phase::Created,
            (Phase::Changing, Status::Paused) => Phase::Paused,
            (Phase::Changing, _) => Phase::Running,
            (phase, _) => phase,
        };
        Record { phase, ..record }
    }

    /// The status by a record that somebody has read.
    fn status_by(&self, generation: Generation, record: Record) -> Status {
        let process_lives = record.has_process && self.lives(generation);
        record
            .phase
            .status(self.works(record.creator), process_lives)
    }

    /// What `state` would tell.
    pub fn told(&self) -> Option<Status> {
        let (generation, record) = self.at_id?;
        Some(self.status_by(generation, self.settled(generation, record)))
    }

    /// Whether that is so.
    fn is_true(&self, told: Status) -> bool {
        let Some((generation, record)) = self.at_id else {
            return false;
        };
        let frozen = self.containers[usize::from(generation)].frozen;
        match told {
            Status::Creating => self.works(record.creator),
            Status::Created => matches!(
                self.process(generation),
                Process::Held(_) | Process::Waiting | Process::Told
            ),
            // Whoever has been told is about to run.
            Status::Running => {
                matches!(self.process(generation), Process::Told | Process::Runs) && !frozen
            }
            Status::Paused => self.lives(generation) && frozen,
            Status::Stopped => !self.lives(generation),
        }
    }

    /// What there is without a record that leads to it.
    fn stray(&self) -> bool {
        let recorded = self.at_id.map(|(generation, _)| generation);
        let cgroup = self.cgroup.is_some() && self.cgroup != recorded;
        let process =
            (0..)
                .zip(&self.containers)
                .any(|(generation, container): (Generation, _)| {
                    container.process != Process::None && Some(generation) != recorded
                });
        cgroup || process
    }

    fn all_ended(&self) -> bool {
        (0..self.runs.len()).all(|client| !self.works(client))
    }

    /// Whether one `delete --force`, with nobody else there, leaves nothing.
    fn can_be_removed(&self, lifecycle: Lifecycle) -> bool {
        let mut world = self.with(&[Command::Delete { force: true }], 0);
        while world.works(0) {
            match lifecycle.after(&world, Action::Go(0)) {
                Some(next) => world = next,
                None => return false,
            }
        }
        let nothing_pending = world.containers.iter().all(|one| one.pending.is_none());
        world.at_id.is_none() && world.cgroup.is_none() && !world.stray() && nothing_pending
    }
}

impl Run {
    fn new(command: Command) -> Self {
        let step = match command {
            Command::Create => Step::LookForId,
            Command::Kill => Step::Load,
            _ => Step::OpenLock,
        };
        let state = RunState::Before {
            step,
            of: None,
            known: None,
            failed: false,
        };
        Self {
            command,
            state: Some(state),
        }
    }
}

/// A command that goes one step.
struct Going<'a> {
    world: &'a mut World,
    client: Client,
    command: Command,
    of: Option<Generation>,
    known: Option<Record>,
    failed: bool,
    flaw: Option<Flaw>,
}

/// What follows a step.
enum Next {
    Step(Step),
    End(Answer),
    /// It cannot go on now.
    Wait,
}

use Next::{End, Step as To};

impl Going<'_> {
    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    /// The container that this command works on.
    fn generation(&self) -> Generation {
        self.of.expect("a step of a command that has a container")
    }

    fn container(&mut self) -> &mut Container {
        let generation = self.generation();
        self.world.container(generation)
    }

    fn known(&self) -> Record {
        self.known
            .expect("a step of a command that has read a record")
    }

    /// Replaces the record of the container at the id, as this command knows it.
    fn write(&mut self, change: impl FnOnce(&mut Record)) {
        let mut record = self.known();
        change(&mut record);
        self.known = Some(record);
        match &mut self.world.at_id {
            Some((generation, stored)) if Some(*generation) == self.of => *stored = record,
            _ => self.world.broken = Some("a command writes the record of another container"),
        }
    }

    /// Gives the lock back and ends.
    fn end(&mut self) -> Next {
        if let Some(of) = self.of
            && self.world.container(of).lock == Some(self.client)
        {
            self.world.container(of).lock = None;
        }
        let answer = match self.failed {
            true => Answer::Refused,
            false => Answer::Done,
        };
        if self.command == Command::Start && !self.failed {
            self.container().starts += 1;
        }
        End(answer)
    }

    fn refuse(&mut self) -> Next {
        self.failed = true;
        self.end()
    }

    fn go(&mut self, step: Step) -> Next {
        match step {
            Step::LookForId => match self.world.at_id {
                Some(_) => self.refuse(),
                None => To(Step::MakeDirectory),
            },
            Step::MakeDirectory => {
                // At most a handful.
                self.of = Some(self.world.containers.len() as Generation);
                self.world.containers.push(Container {
                    process: Process::None,
                    frozen: false,
                    pipe: false,
                    lock: None,
                    pending: Some(self.client),
                    starts: 0,
                });
                match self.has(Flaw::RecordAfterProcess) {
                    true => To(Step::MakeCgroup),
                    false => To(Step::WriteFirstRecord),
                }
            }
            Step::WriteFirstRecord => {
                self.known = Some(Record {
                    phase: Phase::Creating,
                    creator: self.client,
                    has_process: false,
                });
                let client = self.client;
                self.container().lock = Some(client);
                To(Step::TakeId)
            }
            Step::TakeId => {
                self.container().pending = None;
                if self.world.at_id.is_some() {
                    return self.refuse();
                }
                self.world.at_id = Some((self.generation(), self.known()));
                To(Step::SaveConfiguration)
            }
            Step::SaveConfiguration if self.has(Flaw::RecordAfterProcess) => To(Step::WriteProcess),
            Step::SaveConfiguration => To(Step::MakeCgroup),
            Step::MakeCgroup => {
                self.world.cgroup = self.of;
                To(Step::MakeProcess)
            }
            Step::MakeProcess => {
                let client = self.client;
                let container = self.container();
                container.process = Process::Held(client);
                container.pipe = true;
                match self.has(Flaw::RecordAfterProcess) {
                    true => To(Step::WriteFirstRecord),
                    false => To(Step::WriteProcess),
                }
            }
            Step::WriteProcess => {
                self.write(|record| record.has_process = true);
                To(Step::WriteCreated)
            }
            Step::WriteCreated => {
                self.write(|record| record.phase = Phase::Created);
                To(Step::Release)
            }
            Step::Release => {
                if matches!(self.container().process, Process::Held(_)) {
                    self.container().process = Process::Waiting;
                }
                self.end()
            }

            Step::OpenLock => match self.world.at_id {
                Some((generation, _)) => {
                    self.of = Some(generation);
                    To(Step::Lock)
                }
                None if self.command == (Command::Delete { force: true }) => To(Step::Sweep),
                None => self.refuse(),
            },
            Step::Lock => {
                if self.container().lock.is_some() && !self.has(Flaw::NoLock) {
                    return Next::Wait;
                }
                let client = self.client;
                self.container().lock = Some(client);
                To(Step::LookAgain)
            }
            Step::LookAgain => match self.world.at_id {
                Some((generation, record))
                    if Some(generation) == self.of || self.has(Flaw::LockNotLookedAt) =>
                {
                    self.known = Some(record);
                    To(Step::Decide)
                }
                _ => {
                    self.container().lock = None;
                    self.of = None;
                    To(Step::OpenLock)
                }
            },
            Step::Decide => self.decide(),
            Step::Announce => {
                self.write(|record| record.phase = Phase::Changing);
                match self.command {
                    Command::Start => To(Step::OpenPipe),
                    _ => To(Step::Freeze),
                }
            }
            Step::OpenPipe => {
                let container = self.container();
                let waits = matches!(container.process, Process::Waiting | Process::Told);
                match container.pipe && waits {
                    true => To(Step::Tell),
                    false => self.fail(),
                }
            }
            Step::Tell => {
                let container = self.container();
                match container.process {
                    Process::Waiting | Process::Told => {
                        container.process = Process::Told;
                        To(Step::RemovePipe)
                    }
                    // It has ended, or read the byte of a `start` that was cut off.
                    _ => self.fail(),
                }
            }
            Step::RemovePipe => {
                self.container().pipe = false;
                To(Step::WriteOutcome)
            }
            Step::Freeze => {
                let frozen = self.command == Command::Pause;
                self.container().frozen = frozen;
                To(Step::WriteOutcome)
            }
            Step::WriteOutcome => {
                let phase = match self.command {
                    _ if self.failed => Phase::Created,
                    Command::Pause => Phase::Paused,
                    _ => Phase::Running,
                };
                self.write(|record| record.phase = phase);
                self.end()
            }

            Step::Load => match self.world.at_id {
                Some((generation, record)) => {
                    self.of = Some(generation);
                    self.known = Some(self.world.settled(generation, record));
                    To(Step::Signal)
                }
                None => self.refuse(),
            },
            Step::Signal => {
                let (generation, record) = (self.generation(), self.known());
                let target = match self.world.at_id {
                    // Its pid may be that of the first process of another container by now.
                    Some((other, _)) if self.has(Flaw::PidAlone) => other,
                    _ => generation,
                };
                let may = self.world.status_by(target, record).may_be_killed();
                if !may || !record.has_process || !self.world.lives(target) {
                    return self.refuse();
                }
                if target != generation {
                    self.world.broken = Some("a signal hits another container");
                }
                self.world.container(target).process = Process::None;
                self.end()
            }

            Step::KillProcesses => {
                if self.world.cgroup == self.of {
                    self.container().process = Process::None;
                }
                To(Step::RemoveCgroup)
            }
            Step::RemoveCgroup => {
                if self.world.cgroup == self.of {
                    self.world.cgroup = None;
                }
                self.container().frozen = false;
                match self.has(Flaw::RecordRemovedFirst) {
                    true => To(Step::Sweep),
                    false => To(Step::FreeId),
                }
            }
            Step::FreeId => {
                match self.world.at_id {
                    Some((generation, _)) if Some(generation) == self.of => {}
                    _ => self.world.broken = Some("a command removes another container"),
                }
                self.world.at_id = None;
                let client = self.client;
                self.container().pending = Some(client);
                To(Step::RemoveDirectory)
            }
            Step::RemoveDirectory => {
                self.container().pending = None;
                match self.has(Flaw::RecordRemovedFirst) {
                    true => To(Step::KillProcesses),
                    false => To(Step::Sweep),
                }
            }
            Step::Sweep => {
                for one in 0..self.world.containers.len() {
                    let owner = self.world.containers[one].pending;
                    if owner.is_some_and(|owner| !self.world.works(owner))
                        && !self.has(Flaw::NoSweep)
                    {
                        self.world.containers[one].pending = None;
                    }
                }
                // A `create` that failed tells so once it has cleaned up.
                self.end()
            }
        }
    }

    fn decide(&mut self) -> Next {
        let settled = self.world.settled(self.generation(), self.known());
        if self.has(Flaw::AnswerWritten) && settled != self.known() {
            self.write(|record| *record = settled);
        }
        let status = self.world.status_by(self.generation(), settled);
        let (may, step) = match self.command {
            Command::Start if self.has(Flaw::StartUnannounced) => {
                (status.may_be_started(), Step::OpenPipe)
            }
            Command::Pause if self.has(Flaw::PauseUnannounced) => {
                (status.may_be_paused(), Step::Freeze)
            }
            Command::Resume if self.has(Flaw::PauseUnannounced) => {
                (status.may_be_resumed(), Step::Freeze)
            }
            Command::Start => (status.may_be_started(), Step::Announce),
            Command::Pause => (status.may_be_paused(), Step::Announce),
            Command::Resume => (status.may_be_resumed(), Step::Announce),
            Command::Delete { force } => {
                let first = match self.has(Flaw::RecordRemovedFirst) {
                    true => Step::FreeId,
                    false => Step::KillProcesses,
                };
                (force || status.may_be_deleted(), first)
            }
            Command::Create | Command::Kill => unreachable!("neither locks a container to decide"),
        };
        match may {
            true => To(step),
            false => self.refuse(),
        }
    }

    /// The step could not be done: `create` cleans up, any other leaves the record as it is.
    fn fail(&mut self) -> Next {
        self.failed = true;
        match self.command {
            Command::Create => To(Step::KillProcesses),
            Command::Start if self.has(Flaw::FailedStartIsCreated) => To(Step::WriteOutcome),
            _ => self.end(),
        }
    }
}

impl Lifecycle {
    fn go(&self, last: &World, client: Client, fails: bool) -> Option<World> {
        let run = &last.runs[client];
        let Some(RunState::Before {
            step,
            of,
            known,
            failed,
        }) = run.state.clone()
        else {
            return None;
        };
        let mut world = last.clone();
        let mut going = Going {
            world: &mut world,
            client,
            command: run.command,
            of,
            known,
            failed,
            flaw: self.flaw,
        };
        let next = match fails {
            true => going.fail(),
            false => going.go(step),
        };
        let (of, known, failed) = (going.of, going.known, going.failed);
        world.runs[client].state = Some(match next {
            Next::Wait => return None,
            Next::End(answer) => RunState::Ended(answer),
            Next::Step(step) => RunState::Before {
                step,
                of,
                known,
                failed,
            },
        });
        Some(world)
    }

    fn crash(&self, last: &World, client: Client) -> Option<World> {
        if !last.works(client) {
            return None;
        }
        let mut world = last.clone();
        world.crashes_left -= 1;
        world.runs[client].state = None;
        for container in &mut world.containers {
            if container.lock == Some(client) && self.flaw != Some(Flaw::LockOfTheDead) {
                container.lock = None;
            }
            if container.process == Process::Held(client) {
                container.process = match self.flaw {
                    Some(Flaw::ProcessOutlivesCreator) => Process::Waiting,
                    _ => Process::None,
                };
            }
        }
        Some(world)
    }
}

impl Lifecycle {
    /// All that may happen, and what is then.
    pub fn next_states(&self, world: &World) -> Vec<(Action, World)> {
        self.actions(world)
            .into_iter()
            .filter_map(|action| Some((action, self.after(world, action)?)))
            .collect()
    }

    fn actions(&self, world: &World) -> Vec<Action> {
        let mut actions = Vec::new();
        for (client, run) in world.runs.iter().enumerate() {
            let Some(RunState::Before { step, failed, .. }) = &run.state else {
                continue;
            };
            actions.push(Action::Go(client));
            if world.crashes_left > 0 {
                actions.push(Action::Crash(client));
            }
            // What fails has done nothing.
            let may_fail = matches!(step, Step::MakeCgroup | Step::MakeProcess | Step::Freeze);
            if may_fail && !failed {
                actions.push(Action::Fail(client));
            }
        }
        for (generation, container) in (0..).zip(&world.containers) {
            match container.process {
                _ if container.frozen => {}
                Process::Told => actions.push(Action::Begin(generation)),
                Process::Runs => actions.push(Action::End(generation)),
                _ => {}
            }
        }
        actions
    }

    /// The world after this; `None` if it cannot happen now.
    pub fn after(&self, world: &World, action: Action) -> Option<World> {
        let becomes = |generation, process| {
            let mut world = world.clone();
            world.container(generation).process = process;
            Some(world)
        };
        match action {
            Action::Go(client) => self.go(world, client, false),
            Action::Fail(client) => self.go(world, client, true),
            Action::Crash(client) => self.crash(world, client),
            Action::Begin(generation) => becomes(generation, Process::Runs),
            Action::End(generation) => becomes(generation, Process::None),
        }
    }

    /// Whether a property holds in a world, after which perhaps nothing more happens.
    pub fn holds(self, property: Property, world: &World, is_last: bool) -> bool {
        match property {
            Property::StateIsTrue => world.told().is_none_or(|told| world.is_true(told)),
            Property::NothingWithoutRecord => !world.stray(),
            Property::OwnContainer => world.broken.is_none(),
            Property::StartedOnce => world.containers.iter().all(|one| one.starts <= 1),
            Property::DeleteLeavesNothing => !world.all_ended() || world.can_be_removed(self),
            Property::EveryCommandEnds => !is_last || world.all_ended(),
        }
    }
}
