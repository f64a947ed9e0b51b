//! Calls to the guest's agent. The guest is hostile: each call has a time limit, each answer is checked by `protocol`.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use protocol::{Client, ClientError, Method, RPC_PORT};

/// How long the agent may take for one call. Hooks in the guest have limits of their own.
pub const CALL_LIMIT: Duration = Duration::from_secs(120);

/// The name of the VMM's socket in the container's `vm` directory.
pub const VSOCK: &str = "vsock.sock";

/// Why the agent did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The VMM cannot be reached: it has ended, or is about to.
    #[error("the microVM cannot be reached at {path}")]
    Connect {
        /// The VMM's socket.
        path: String,
        /// What the kernel or the VMM said.
        #[source]
        source: io::Error,
    },
    /// The call failed.
    #[error(transparent)]
    Call(#[from] ClientError),
}

/// A connection to the agent.
pub struct Agent {
    client: Client<UnixStream>,
}

impl Agent {
    /// Connects from outside the VMM process. `vm_dir` is the container's `vm` directory.
    ///
    /// # Errors
    /// There is no VMM, or its guest does not answer.
    pub fn connect(vm_dir: &Path) -> Result<Self, AgentError> {
        let connect = || Self::over(connect(vm_dir, RPC_PORT)?);
        connect().map_err(|source| AgentError::Connect {
            path: vm_dir.join(VSOCK).display().to_string(),
            source,
        })
    }

    /// Calls over a stream that leads to the agent.
    ///
    /// # Errors
    /// The stream takes no time limit.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(CALL_LIMIT))?;
        stream.set_write_timeout(Some(CALL_LIMIT))?;
        Ok(Self {
            client: Client::new(stream),
        })
    }

    /// Closes the connection, and waits until the agent has closed its end.
    ///
    /// # Errors
    /// The connection's.
    pub fn finish(self) -> io::Result<()> {
        let mut stream = self.client.stream();
        stream.shutdown(Shutdown::Write)?;
        io::copy(&mut stream, &mut io::sink()).map(drop)
    }

    /// Calls a method and waits for its answer.
    ///
    /// # Errors
    /// The agent's, or that it did not answer properly.
    pub fn call<M: Method>(&mut self, request: &M::Request) -> Result<M::Response, AgentError> {
        Ok(self.client.call::<M>(request)?)
    }
}

/// Connects to `port` in the guest through the VMM's socket in `vm_dir`.
///
/// # Errors
/// There is no VMM, or nobody listens on the port.
pub fn connect(vm_dir: &Path, port: u32) -> io::Result<UnixStream> {
    // A state root's path may be longer than a socket's name can be; a descriptor's is not.
    let dir = std::fs::File::open(vm_dir)?;
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{}/{VSOCK}", dir.as_raw_fd()))?;
    stream.set_read_timeout(Some(CALL_LIMIT))?;
    writeln!(stream, "CONNECT {port}")?;
    // The answer is read byte by byte: what follows it belongs to the connection.
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.last() != Some(&b'\n') && answer.len() < 32 {
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            format!("nobody listens on port {port} in the guest"),
        ));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}
