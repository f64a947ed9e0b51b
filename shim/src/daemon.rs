//! The server: what `start` executes and leaves behind.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use containerd_shim_protos::sandbox_sync::{Sandbox, create_sandbox};
use containerd_shim_protos::ttrpc::r#sync::MethodHandler;
use containerd_shim_protos::{Task, create_task, ttrpc};
use nix::sys::signal::{SigHandler, Signal, signal};
use runtime::log::{Format, Log};

use crate::error::{Failure, Kind};
use crate::events::Events;
use crate::flags::Flags;
use crate::reaper;
use crate::service::Service;
use crate::starter;
use crate::tasks::Tasks;
use crate::worker::Worker;

/// The task service's names: version 3 is version 2 under another name.
const VERSION_3: &str = "/containerd.task.v3.Task/";
const VERSION_2: &str = "/containerd.task.v2.Task/";

/// containerd's ttrpc socket, where events go.
const EVENTS_ADDRESS: &str = "TTRPC_ADDRESS";

/// The fifo in the bundle from which containerd reads our log.
const LOG: &str = "log";

/// How long containerd may take to hear of the last events when it has told us to end, and then of the last answers.
const FAREWELL: Duration = Duration::from_secs(3);

/// Serves the socket that is our standard input until containerd says that it is enough, or nobody knows of us.
pub fn serve(flags: &Flags) -> Result<(), Failure> {
    open_log(flags.debug);
    // Processes of ours enter containers.
    engine::seal(engine::Stay::Server)
        .map_err(|error| Failure::new(Kind::Other, runtime::error_chain(&error)))?;
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: no handler is installed. Containers' processes get their dispositions from the engine.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    nix::sys::prctl::set_child_subreaper(true)
        .map_err(|errno| Failure::io("become a subreaper")(errno.into()))?;
    let (listener, starter) = take_streams().map_err(Failure::io("take the socket over"))?;
    let socket = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned));
    // The last moment with one thread.
    let worker = Worker::fork(flags.model(), listener.as_fd())?;
    let address = env::var(EVENTS_ADDRESS).unwrap_or_default();
    let events = Events::new(address, flags.namespace.clone())?;
    let tasks = Arc::new(Tasks::new(events));
    reaper::start(Arc::clone(&tasks))?;
    let (service, ended) = Service::new(flags, worker, Arc::clone(&tasks));
    let service = Arc::new(service);
    starter::watch(starter, Arc::clone(&service))?;
    let sandbox: Arc<dyn Sandbox + Send + Sync> = Arc::clone(&service) as _;
    let service: Arc<dyn Task + Send + Sync> = service;
    let failed = |error: ttrpc::Error| Failure::new(Kind::Other, format!("cannot serve: {error}"));
    let mut server = ttrpc::Server::new()
        .add_listener(OwnedFd::from(listener).into_raw_fd())
        .map_err(failed)?
        .register_service(renamed(create_task(Arc::clone(&service)), VERSION_2))
        .register_service(create_task(service))
        .register_service(create_sandbox(sandbox));
    server.start().map_err(failed)?;
    // The service lives as long as the server, so that this is what it says.
    let _ = ended.recv();
    // First, so that no new container of the pod finds us.
    if let Some(socket) = socket {
        let _ = fs::remove_file(socket);
    }
    tasks.events.flush(FAREWELL);
    // The answers that are under way. A connection that does not come to its end must not keep us for ever.
    let (done, is_done) = mpsc::channel();
    thread::Builder::new()
        .name("farewell".to_owned())
        .spawn(move || {
            server.shutdown();
            drop::<mpsc::Sender<()>>(done);
        })
        .map_err(Failure::io("start a thread"))?;
    let _ = is_done.recv_timeout(FAREWELL);
    Ok(())
}

type Methods = std::collections::HashMap<String, Box<dyn MethodHandler + Send + Sync>>;

fn renamed(methods: Methods, prefix: &str) -> Methods {
    let rename = |name: String| match name.strip_prefix(VERSION_3) {
        Some(method) => format!("{prefix}{method}"),
        None => name,
    };
    methods
        .into_iter()
        .map(|(name, method)| (rename(name), method))
        .collect()
}

/// Moves the socket away from standard input, and the pipe from `start` from standard output.
fn take_streams() -> io::Result<(UnixListener, File)> {
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    let starter = io::stdout().as_fd().try_clone_to_owned()?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2(null.as_raw_fd(), io::stdin().as_raw_fd())?;
    nix::unistd::dup2(null.as_raw_fd(), io::stdout().as_raw_fd())?;
    Ok((UnixListener::from(listener), File::from(starter)))
}

/// Logs into the bundle's fifo, if there is one. What nobody reads is lost, since we must not wait for a containerd that
/// is away.
fn open_log(debug: bool) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(LOG);
    if let Ok(file) = file {
        runtime::log::install(Log::to(file, Format::Text), debug);
    }
}
