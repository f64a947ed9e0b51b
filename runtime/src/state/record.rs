//! The state record of one container.
//!
//! The file is ours, but it may be junk after a full disk or an operator's editor: it is parsed into types that hold
//! no bad value, and a record that does not parse is an error with the file's name.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::id::ContainerId;
use crate::isolation::Model;
use crate::process::ProcessId;

/// The version of the record's form. A record with another one is refused, not guessed at.
pub const RECORD_VERSION: u32 = 1;

/// How far the lifecycle came, as it was written down. See [`Status`] for what is true now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// `create` has begun; anything may exist.
    Creating,
    /// `create` is done.
    Created,
    /// `start`, `pause` or `resume` has begun. What has come of it the isolation model knows.
    Changing,
    /// The workload runs.
    Running,
    /// `pause` has stopped the processes.
    Paused,
}

impl Phase {
    /// What is true now, by whether who creates the container and its init process live.
    pub fn status(self, creator_lives: bool, process_lives: bool) -> Status {
        match self {
            Self::Creating if creator_lives => Status::Creating,
            Self::Created if process_lives => Status::Created,
            Self::Changing | Self::Running if process_lives => Status::Running,
            Self::Paused if process_lives => Status::Paused,
            _ => Status::Stopped,
        }
    }
}

/// The status that the `state` command tells (OCI runtime specification, "State"; `paused` is runc's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being created.
    Creating,
    /// Created and not started.
    Created,
    /// The workload runs.
    Running,
    /// The workload is paused.
    Paused,
    /// The workload has ended, or the creation was cut off.
    Stopped,
}

impl Status {
    /// Whether there are processes, which use something and can be asked for.
    pub fn lives(self) -> bool {
        matches!(self, Self::Created | Self::Running | Self::Paused)
    }

    /// Whether `start` may go on.
    pub fn may_be_started(self) -> bool {
        self == Self::Created
    }

    /// Whether `pause` may go on.
    pub fn may_be_paused(self) -> bool {
        self == Self::Running
    }

    /// Whether `resume` may go on.
    pub fn may_be_resumed(self) -> bool {
        self == Self::Paused
    }

    /// Whether there is somebody for `kill`.
    pub fn may_be_killed(self) -> bool {
        self != Self::Stopped
    }

    /// Whether `delete` may go on without force.
    pub fn may_be_deleted(self) -> bool {
        matches!(self, Self::Created | Self::Stopped)
    }

    /// As the `state` command spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// What is on disk about a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The container's id.
    pub id: ContainerId,
    /// The model that made it.
    pub isolation: Model,
    /// How far it came.
    pub phase: Phase,
    /// Who creates it: a creator that is gone will not go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creator: Option<ProcessId>,
    /// The init process as the host sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessId>,
    /// The version in the bundle's configuration.
    pub oci_version: String,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The root directory.
    pub rootfs: PathBuf,
    /// The cgroup, planned before it is made.
    pub cgroup_path: PathBuf,
    /// The unit of systemd that has the cgroup, where systemd made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<engine::systemd::Scope>,
    /// When, in RFC 3339 with nanoseconds.
    pub created: String,
    /// The user id of who created it.
    pub owner: u32,
    /// The bundle's annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

impl Record {
    /// What is true now: what was written, and whether the init process lives.
    pub fn status(&self) -> Status {
        let lives = |process: Option<ProcessId>| process.is_some_and(ProcessId::is_alive);
        match self.phase {
            Phase::Creating => self.phase.status(lives(self.creator), false),
            phase => phase.status(false, lives(self.process)),
        }
    }

    /// The init process's pid if it lives.
    pub fn live_pid(&self) -> Option<i32> {
        self.process
            .filter(|process| process.is_alive())
            .map(|process| process.pid)
    }
}
