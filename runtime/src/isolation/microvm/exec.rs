//! `exec` in a microVM: one more process in a container's guest, and one on the host that stands for it.

use std::path::Path;

use engine::fault;
use nix::sys::wait::waitpid;
use oci_spec::runtime::Process;
use protocol::message::ExecRequest;
use protocol::method::Exec;

use super::guest_spec::remove_labels;
use super::report::Reporter;
use super::stand_in::{self, StandIn, StandInError, io_error};

/// A process to start in a running container.
#[derive(Debug)]
pub struct Execution<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The `vm` directory of the container's machine.
    pub machine: &'a Path,
    /// The container's cgroup, which the stand-in enters.
    pub cgroup_path: &'a Path,
    /// The process.
    pub process: &'a Process,
    /// Where its terminal's master goes.
    pub console_socket: Option<&'a Path>,
    /// Whether to go on in a paused container.
    pub ignore_paused: bool,
    /// Its cgroup in the guest, below the container's.
    pub sub_cgroup: &'a str,
}

impl Execution<'_> {
    /// Starts the process and gives the pid of its stand-in, a child of ours.
    ///
    /// # Errors
    /// The process could not be started; no stand-in is left.
    pub fn start(&self) -> Result<i32, StandInError> {
        let (pid, mut report) = stand_in::spawn(&[], |reporter| self.live(reporter))?;
        fault::point("exec.stand-in-made");
        if let Err(failure) = report.wait() {
            let _ = waitpid(pid, None);
            return Err(failure.into());
        }
        Ok(pid.as_raw())
    }

    /// The stand-in's life; its exit code, if it does not end by a signal.
    fn live(&self, reporter: Reporter) -> u8 {
        let exec_id = format!("exec-{}", std::process::id());
        let stand_in = match self.begin(&exec_id) {
            Ok(stand_in) => stand_in,
            Err(error) => {
                reporter.failed(&error);
                return 1;
            }
        };
        // A parent that is gone leaves the process as it would leave one of the host.
        let _ = reporter.ready();
        fault::point("stand-in.reported");
        stand_in.until_its_end(self.id, &exec_id)
    }

    /// Starts the process in the guest.
    fn begin(&self, exec_id: &str) -> Result<StandIn, StandInError> {
        fault::point("stand-in.born");
        let has_terminal =
            self.console_socket.is_some() && self.process.terminal().unwrap_or(false);
        let signals = stand_in::take_place(self.cgroup_path, has_terminal)?;
        fault::point("stand-in.in-cgroup");
        let mut process = self.process.clone();
        remove_labels(&mut process);
        let socket = self.console_socket;
        let mut connected = stand_in::connect_streams(signals, self.machine, &process, socket)?;
        fault::point("stand-in.streams-connected");
        connected.agent.call::<Exec>(&ExecRequest {
            id: self.id.to_owned(),
            exec_id: exec_id.to_owned(),
            process_json: serde_json::to_string(&process)
                .map_err(|error| io_error("encode the process")(error.into()))?,
            stdio: Some(connected.relay.stdio()),
            sub_cgroup: self.sub_cgroup.to_owned(),
            ignore_paused: self.ignore_paused,
        })?;
        fault::point("stand-in.process-runs");
        StandIn::new(connected, self.machine)
    }
}
