//! The messages of the agent's methods, as protobuf. A tag, once released, keeps its meaning.

/// The agent is up and listens. It sends this once, in a request frame to the host's RPC port, and gets no
/// answer; it keeps the connection open as long as it lives.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// The agent's [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION).
    #[prost(uint32, tag = "1")]
    pub protocol_version: u32,
    /// The agent's own version, for people.
    #[prost(string, tag = "2")]
    pub agent_version: String,
    /// The guest kernel's release, as `uname -r` prints it.
    #[prost(string, tag = "3")]
    pub kernel_release: String,
    /// Nanoseconds from the guest kernel's start to this message, by the guest's clock.
    #[prost(uint64, tag = "4")]
    pub uptime_nanos: u64,
}

/// What a machine that goes on from a snapshot must not have in common with others, or cannot know.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RenewRequest {
    /// Random bytes of the host for the guest kernel's generator: 32 or more.
    #[prost(bytes = "vec", tag = "1")]
    pub seed: Vec<u8>,
    /// The time of day in nanoseconds since 1970, UTC.
    #[prost(uint64, tag = "2")]
    pub unix_nanos: u64,
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Empty {}

/// Gives the streams of a machine that goes on from a checkpoint, whose connections are gone, to its processes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AdoptRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The init process's streams: as many as it was created with, or its terminal.
    #[prost(message, optional, tag = "2")]
    pub stdio: Option<Stdio>,
}

/// Names a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Names a process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProcessRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process's id from [`ExecRequest::exec_id`]; empty for the container's init.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// Creates a container from a spec that the host has rewritten for the guest: the root's path and the
/// sources of bind mounts lie under [`SHARES_DIR`](crate::SHARES_DIR).
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateContainerRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The spec: the text of a config.json.
    #[prost(string, tag = "2")]
    pub spec_json: String,
    /// Where the init process's stdio goes.
    #[prost(message, optional, tag = "3")]
    pub stdio: Option<Stdio>,
    /// Tags of virtio-fs shares that must be mounted for it, each at `SHARES_DIR/<tag>`; those that are
    /// mounted already stay.
    #[prost(string, repeated, tag = "4")]
    pub shares: Vec<String>,
    /// What the container's network namespace is to have beside a loopback device; absent if nothing. The spec then
    /// has a network namespace without a path.
    #[prost(message, optional, tag = "5")]
    pub network: Option<Network>,
    /// The block devices of the host that the spec names, which the machine has as disks.
    #[prost(message, repeated, tag = "6")]
    pub disks: Vec<Disk>,
}

/// A disk of the machine.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Disk {
    /// Its serial number, by which the guest finds it. A mount in the spec has `DISKS_DIR/<serial>` for its source.
    #[prost(string, tag = "1")]
    pub serial: String,
    /// The major number of the block device on the host, which the spec has.
    #[prost(uint32, tag = "2")]
    pub major: u32,
    /// Its minor number.
    #[prost(uint32, tag = "3")]
    pub minor: u32,
    /// What the spec's device rules let the container do with it: of the letters `rw`.
    #[prost(string, tag = "4")]
    pub access: String,
}

/// What a network namespace on the host has, for one in the guest. Addresses of the internet are 4 or 16 bytes long,
/// those of an Ethernet link 6.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Network {
    /// The interfaces that the machine has a device for.
    #[prost(message, repeated, tag = "1")]
    pub interfaces: Vec<Interface>,
    /// The routes beside those that come with the interfaces' addresses, in the order in which they can be added.
    #[prost(message, repeated, tag = "2")]
    pub routes: Vec<Route>,
    /// Neighbours on the link that are known without asking.
    #[prost(message, repeated, tag = "3")]
    pub neighbours: Vec<Neighbour>,
}

/// A network interface.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Interface {
    /// Its name in the container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its link address.
    #[prost(bytes = "vec", tag = "2")]
    pub link_address: Vec<u8>,
    /// The largest packet without its link header, in bytes.
    #[prost(uint32, tag = "3")]
    pub mtu: u32,
    /// Its addresses.
    #[prost(message, repeated, tag = "4")]
    pub addresses: Vec<InterfaceAddress>,
    /// The link address by which its device is found, if that is another.
    #[prost(bytes = "vec", tag = "5")]
    pub device_address: Vec<u8>,
}

/// An address of an interface.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InterfaceAddress {
    /// The address.
    #[prost(bytes = "vec", tag = "1")]
    pub address: Vec<u8>,
    /// The bits of the network's prefix.
    #[prost(uint32, tag = "2")]
    pub prefix_length: u32,
    /// The broadcast address, if there is one.
    #[prost(bytes = "vec", tag = "3")]
    pub broadcast: Vec<u8>,
    /// The other end of a link between two.
    #[prost(bytes = "vec", tag = "4")]
    pub peer: Vec<u8>,
    /// Whether the address comes without a route to its network.
    #[prost(bool, tag = "5")]
    pub no_prefix_route: bool,
    /// Where the address is valid, as rtnetlink(7) numbers it.
    #[prost(uint32, tag = "6")]
    pub scope: u32,
}

/// A route of the main table.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Route {
    /// The interface's name.
    #[prost(string, tag = "1")]
    pub interface: String,
    /// The destination; all zeroes with a prefix of 0 bits for the default route.
    #[prost(bytes = "vec", tag = "2")]
    pub destination: Vec<u8>,
    /// The bits of the destination's prefix.
    #[prost(uint32, tag = "3")]
    pub prefix_length: u32,
    /// The next hop, if it is not on the link.
    #[prost(bytes = "vec", tag = "4")]
    pub gateway: Vec<u8>,
    /// The preferred source address.
    #[prost(bytes = "vec", tag = "5")]
    pub source: Vec<u8>,
    /// The metric: of several routes the one with the least is taken. 0 leaves it to the kernel.
    #[prost(uint32, tag = "6")]
    pub priority: u32,
    /// How far the destination is, as rtnetlink(7) numbers it.
    #[prost(uint32, tag = "7")]
    pub scope: u32,
    /// Whether the gateway counts as on the link although no prefix says so.
    #[prost(bool, tag = "8")]
    pub on_link: bool,
    /// The largest packet on this route, in bytes; 0 for the interface's.
    #[prost(uint32, tag = "9")]
    pub mtu: u32,
}

/// A neighbour whose link address is fixed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Neighbour {
    /// The interface's name.
    #[prost(string, tag = "1")]
    pub interface: String,
    /// Its address.
    #[prost(bytes = "vec", tag = "2")]
    pub address: Vec<u8>,
    /// Its link address.
    #[prost(bytes = "vec", tag = "3")]
    pub link_address: Vec<u8>,
}

/// Starts a process in a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process's id, chosen by the host; not empty, and unused in this container.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// The text of the spec's `process` object.
    #[prost(string, tag = "3")]
    pub process_json: String,
    /// Where the process's stdio goes.
    #[prost(message, optional, tag = "4")]
    pub stdio: Option<Stdio>,
    /// A cgroup below the container's, relative to it; empty for the container's own.
    #[prost(string, tag = "5")]
    pub sub_cgroup: String,
    /// Whether to start the process in a paused container too (it then waits for the resume).
    #[prost(bool, tag = "6")]
    pub ignore_paused: bool,
}

/// Where a process's stdio goes: to a terminal, or to up to three streams. The tokens are those of the
/// [`StdioHeader`](crate::StdioHeader); 0 is `/dev/null`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Stdio {
    /// The terminal; the three tokens must then be 0.
    #[prost(message, optional, tag = "1")]
    pub console: Option<Console>,
    /// The stream whose bytes the process reads.
    #[prost(fixed64, tag = "2")]
    pub stdin: u64,
    /// The stream that gets the process's standard output.
    #[prost(fixed64, tag = "3")]
    pub stdout: u64,
    /// The stream that gets the process's standard error.
    #[prost(fixed64, tag = "4")]
    pub stderr: u64,
}

/// A pseudo-terminal, made by the agent. Needs `terminal: true` in the process's spec.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Console {
    /// The stream of both directions; not 0.
    #[prost(fixed64, tag = "1")]
    pub token: u64,
    /// The size at the start; absent or 0 by 0 leaves the kernel's default.
    #[prost(message, optional, tag = "2")]
    pub size: Option<ConsoleSize>,
}

/// The size of a terminal, in characters. Values above 65,535 are refused.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ConsoleSize {
    /// Characters a line.
    #[prost(uint32, tag = "1")]
    pub columns: u32,
    /// Lines.
    #[prost(uint32, tag = "2")]
    pub rows: u32,
}

/// A process exists.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ProcessStarted {
    /// Its pid in the guest. The host only shows it: it means nothing there.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// Sends a signal.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SignalRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process's id from [`ExecRequest::exec_id`]; empty for the container's init.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// The signal's number on x86-64 Linux.
    #[prost(uint32, tag = "3")]
    pub signal: u32,
    /// Whether every process of the container gets it; `exec_id` must then be empty.
    #[prost(bool, tag = "4")]
    pub all: bool,
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct WaitResponse {
    /// The end. An answer without it is malformed.
    #[prost(oneof = "Outcome", tags = "1, 2")]
    pub outcome: Option<Outcome>,
}

/// One of the two ways to end.
#[derive(Clone, Copy, PartialEq, Eq, prost::Oneof)]
pub enum Outcome {
    /// It exited with this code, 0 to 255.
    #[prost(uint32, tag = "1")]
    Exited(u32),
    /// This signal killed it.
    #[prost(uint32, tag = "2")]
    Signaled(u32),
}

impl WaitResponse {
    /// The end as the status of a shell: the code, or 128 and the signal. `None` if the answer is
    /// malformed: without an end, or with numbers that no process can have.
    #[must_use]
    pub fn shell_status(&self) -> Option<u8> {
        match self.outcome? {
            Outcome::Exited(code) => u8::try_from(code).ok(),
            Outcome::Signaled(signal @ 1..=64) => u8::try_from(128 + signal).ok(),
            Outcome::Signaled(_) => None,
        }
    }
}

/// Sets a terminal's size.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResizeTerminalRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process's id from [`ExecRequest::exec_id`]; empty for the container's init.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// The new size.
    #[prost(message, optional, tag = "3")]
    pub size: Option<ConsoleSize>,
}

/// The processes of a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProcessesResponse {
    /// One entry for each, by rising pid.
    #[prost(message, repeated, tag = "1")]
    pub processes: Vec<Process>,
}

/// What the guest's kernel says of a container's processes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ObserveResponse {
    /// The engine's observation, as JSON.
    #[prost(bytes = "vec", tag = "1")]
    pub observation: Vec<u8>,
}

/// One process, with what `ps -ef` shows.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Process {
    /// The pid in the guest.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// The parent's pid in the guest.
    #[prost(uint32, tag = "2")]
    pub parent: u32,
    /// The effective user id.
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    /// Milliseconds of CPU time used, in user and kernel mode.
    #[prost(uint64, tag = "4")]
    pub cpu_millis: u64,
    /// When it started, in milliseconds since 1970 by the guest's clock.
    #[prost(uint64, tag = "5")]
    pub started_millis: u64,
    /// Its arguments, joined by spaces; its name in brackets if it has none.
    #[prost(string, tag = "6")]
    pub command: String,
    /// The device number of its terminal, as proc(5) packs it; 0 is none.
    #[prost(uint32, tag = "7")]
    pub terminal: u32,
}

/// The resource use of a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatsResponse {
    /// The container engine's statistics, as JSON.
    #[prost(string, tag = "1")]
    pub stats_json: String,
}

/// Waits for processes that the kernel kills for want of memory.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OomRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// How many are known of: the answer comes when there are more.
    #[prost(uint64, tag = "2")]
    pub known: u64,
}

/// Processes were killed for want of memory.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct OomResponse {
    /// How many since the container was created.
    #[prost(uint64, tag = "1")]
    pub kills: u64,
}

/// Changes resource limits.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The text of the spec's `linux.resources` object.
    #[prost(string, tag = "2")]
    pub resources_json: String,
}

/// The state of a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StateResponse {
    /// `created`, `running`, `paused` or `stopped`.
    #[prost(string, tag = "1")]
    pub status: String,
    /// The init process's pid in the guest; 0 when it has ended.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
}

/// Removes a container or the record of a process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeleteRequest {
    /// The container's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The ended process whose record is to go; empty for the container and all of its.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Whether a container that still runs is killed first.
    #[prost(bool, tag = "3")]
    pub force: bool,
}
