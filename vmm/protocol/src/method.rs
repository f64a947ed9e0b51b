//! The agent's methods: each name with the types of its request and response.

use crate::message::*;

/// The name of the agent's service in [`envelope::Request::service`](crate::envelope::Request::service).
pub const SERVICE: &str = "rt.agent.v1.Agent";

/// The name of the service that the agent addresses its [`Hello`] to, on the host.
pub const HOST_SERVICE: &str = "rt.agent.v1.Host";

/// The name of the only call to [`HOST_SERVICE`]. It has no response.
pub const HELLO: &str = "Hello";

/// One method of the agent.
pub trait Method {
    /// The name on the wire.
    const NAME: &'static str;
    /// What the host sends.
    type Request: prost::Message + Default;
    /// What the agent answers.
    type Response: prost::Message + Default;
}

macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident: $request:ty => $response:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $name {}

        impl Method for $name {
            const NAME: &'static str = stringify!($name);
            type Request = $request;
            type Response = $response;
        }
    )*};
}

methods! {
    /// Makes a machine that goes on from a snapshot one of its own: its randomness and its time. The first call
    /// to it.
    Renew: RenewRequest => Empty;
    /// Moves nothing any more between the processes and their streams: the host is about to write the machine down. What was
    /// moved before has been sent when this is answered. Fails if a process of [`Exec`] runs.
    Suspend: Empty => Empty;
    /// Goes on after [`Suspend`] by the same streams.
    Proceed: Empty => Empty;
    /// Goes on after [`Suspend`], in a machine that was restored, by new streams. After [`Renew`].
    Adopt: AdoptRequest => Empty;
    /// Creates a container; its init process waits for [`StartContainer`].
    CreateContainer: CreateContainerRequest => ProcessStarted;
    /// Lets the init process of a created container run the workload.
    StartContainer: ContainerRequest => Empty;
    /// Starts a further process in a running container.
    Exec: ExecRequest => ProcessStarted;
    /// Sends a signal to a process, or to all of a container.
    Signal: SignalRequest => Empty;
    /// Answers when a process has ended and what it wrote has been passed on. May be called before and
    /// after the end, and several times.
    Wait: ProcessRequest => WaitResponse;
    /// Answers when what the processes of a container, which have ended, sent over TCP has been received, or after a
    /// while in which it was not. The connections end with the VM.
    FinishSending: ContainerRequest => Empty;
    /// Sets the size of a process's terminal.
    ResizeTerminal: ResizeTerminalRequest => Empty;
    /// Lists the processes of a container.
    Processes: ContainerRequest => ProcessesResponse;
    /// What the guest's kernel says of the container.
    Observe: ContainerRequest => ObserveResponse;
    /// Reads the resource use of a container.
    Stats: ContainerRequest => StatsResponse;
    /// Answers when the guest's kernel has killed processes of a container for want of memory, also those
    /// that it killed before the call. The answer precedes that to a [`Wait`] for the process.
    WaitOom: OomRequest => OomResponse;
    /// Freezes all processes of a container.
    Pause: ContainerRequest => Empty;
    /// Thaws a paused container.
    Resume: ContainerRequest => Empty;
    /// Changes the resource limits of a container.
    Update: UpdateRequest => Empty;
    /// Tells the state of a container.
    State: ContainerRequest => StateResponse;
    /// Removes a stopped container, or the record of an ended process of [`Exec`].
    Delete: DeleteRequest => Empty;
    /// Powers the VM off. The agent answers, and does it when the host closes this connection, so that the
    /// answer arrives.
    Shutdown: Empty => Empty;
}
