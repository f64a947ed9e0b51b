//! `start`: finds the server of the container's pod, or starts one, and prints its address.
//!
//! containerd reads everything that this process prints, so it prints the address and nothing else. The socket is a
//! path in a directory of ours that only root can enter: an abstract one could be reached from a container that has the
//! host's network (CVE-2020-15257).

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::ShutdownRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use containerd_shim_protos::{Client, TaskClient, ttrpc};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::cleanup::save_options;
use crate::error::{Failure, Kind};
use crate::flags::Flags;
use crate::options::Options;
use crate::pod::SANDBOX_ID;
use crate::starter::Starter;

/// Where the sockets are, on a tmpfs.
const SOCKETS: &str = "/run/rt-shim";

/// The annotations that name the pod of a container: CRI's, and the one for clients without CRI.
const GROUPS: [&str; 2] = [SANDBOX_ID, "dev.rt.group"];

/// The most that is read of standard input; options have some hundred bytes.
const LONGEST_INPUT: u64 = 1 << 20;

/// How long a server may take to remove a container; containerd waits five seconds for all that `delete` does.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What containerd reads the address from when it is started again, in the bundle.
const ADDRESS_FILE: &str = "address";

/// The part of config.json that says where a container belongs. The rest is judged when the container is made.
#[derive(Deserialize)]
struct Belonging {
    #[serde(default)]
    annotations: std::collections::HashMap<String, String>,
}

/// Prints the address of the server that is to serve the container whose bundle is the working directory.
pub fn start(flags: &Flags) -> Result<(), Failure> {
    let config = Path::new("config.json");
    let group = if config.exists() {
        group(config)?.unwrap_or_else(|| flags.id.clone())
    } else {
        // A sandbox of the sandbox service, which is told its options here and nowhere else.
        save_options(Path::new("."), &options(flags)?)?;
        flags.id.clone()
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(SOCKETS)
        .map_err(Failure::io(format_args!("make {SOCKETS}")))?;
    let socket = socket_path(&flags.address, &flags.namespace, &group);
    let address = format!("unix://{}", socket.display());
    let lock = File::open(SOCKETS).map_err(Failure::io(format_args!("open {SOCKETS}")))?;
    // Two containers of a pod may be started at once.
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|error| Failure::io(format_args!("lock {SOCKETS}"))(error.into()))?;
    let starter = match UnixStream::connect(&socket) {
        Ok(_) => None,
        Err(_) => Some(spawn(flags, &socket)?),
    };
    write_address(&address)?;
    let mut stdout = io::stdout();
    stdout
        .write_all(address.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(Failure::io("print the address"))?;
    starter.map_or(Ok(()), Starter::finish)
}

/// The runtime options on standard input.
fn options(flags: &Flags) -> Result<Options, Failure> {
    let mut input = Vec::new();
    io::stdin()
        .take(LONGEST_INPUT)
        .read_to_end(&mut input)
        .map_err(Failure::io("read standard input"))?;
    Options::of_start(&input, &flags.id, &flags.namespace)
}

fn group(config: &Path) -> Result<Option<String>, Failure> {
    let wrong =
        |reason: String| Failure::new(Kind::Invalid, format!("{}: {reason}", config.display()));
    let text = fs::read(config).map_err(|error| wrong(error.to_string()))?;
    let belonging: Belonging =
        serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let mut groups = GROUPS
        .iter()
        .filter_map(|name| belonging.annotations.get(*name));
    Ok(groups.next().cloned())
}

/// A name of fixed length, since that of a socket may not be long.
fn socket_path(address: &str, namespace: &str, group: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for part in [address, namespace, group] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let hash = hash.finalize();
    let name: String = hash
        .iter()
        .take(20)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Path::new(SOCKETS).join(format!("{name}.sock"))
}

/// The socket of a container's server, by the address in its bundle.
fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
    let socket = Path::new(address.strip_prefix("unix://")?);
    (socket.parent() == Some(Path::new(SOCKETS))).then(|| socket.to_owned())
}

/// Tells the server of a container, if there is one, that containerd takes it for dead and will not ask for the container
/// any more. Says whether it has removed the container, or will when that is made.
pub fn give_up(bundle: &Path, id: &str) -> bool {
    let Some(socket) = socket_of(bundle) else {
        return false;
    };
    let request = ShutdownRequest {
        id: id.to_owned(),
        now: true,
        ..Default::default()
    };
    let tell = || {
        let server = TaskClient::new(Client::connect(&format!("unix://{}", socket.display()))?);
        server.shutdown(ttrpc::context::with_duration(ANSWER_LIMIT), &request)
    };
    tell()
        .inspect_err(|error| tracing::debug!("no server was told: {error}"))
        .is_ok()
}

/// Removes the socket of a server that is gone, by the address in a container's bundle.
pub fn remove_socket(bundle: &Path) {
    let Some(socket) = socket_of(bundle) else {
        return;
    };
    let lock = File::open(SOCKETS);
    // Under the lock, since another container of the pod may be starting a server there just now.
    if let Ok(lock) = lock
        && rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).is_ok()
        && UnixStream::connect(&socket).is_err()
    {
        let _ = fs::remove_file(socket);
    }
}

/// Starts the server, which gets the listening socket as its standard input, so that containerd can connect at once, and
/// as its standard output what tells it that this process is done.
fn spawn(flags: &Flags, socket: &Path) -> Result<Starter, Failure> {
    let (starter, told) = Starter::new().map_err(Failure::io("make a pipe"))?;
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket)
        .map_err(Failure::io(format_args!("listen on {}", socket.display())))?;
    fs::set_permissions(socket, PermissionsExt::from_mode(0o600))
        .map_err(Failure::io(format_args!("guard {}", socket.display())))?;
    let program = env::current_exe().map_err(Failure::io("find this program"))?;
    // The name that we were called by selects the model.
    let name = flags.program.file_name().unwrap_or(program.as_os_str());
    let mut server = Command::new(&program);
    server
        .arg0(program.with_file_name(name))
        .args(["-namespace", &flags.namespace])
        .args(["-address", &flags.address])
        .args(["-id", &flags.id])
        .args(flags.debug.then_some("-debug"))
        .arg("serve")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::from(told))
        .stderr(Stdio::null())
        .process_group(0);
    match server.spawn() {
        Ok(_) => Ok(starter),
        Err(error) => {
            let _ = fs::remove_file(socket);
            Err(Failure::io("execute the server")(error))
        }
    }
}

fn write_address(address: &str) -> Result<(), Failure> {
    let write = || -> io::Result<()> {
        let temporary = format!(".{ADDRESS_FILE}");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(address.as_bytes())?;
        fs::rename(temporary, ADDRESS_FILE)
    };
    write().map_err(Failure::io("write the address into the bundle"))
}

/// Prints what we are, as containerd 2 asks for it.
pub fn info() -> Result<(), Failure> {
    let features = serde_json::to_vec(&runtime::cli::features())
        .map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    let info = RuntimeInfo {
        name: "io.containerd.rt.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        features: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
                .to_owned(),
            value: features,
            ..Default::default()
        }),
        ..Default::default()
    };
    info.write_to_writer(&mut io::stdout())
        .map_err(|error| Failure::new(Kind::Other, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_containers_share_a_socket() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        let group_of = |text: &str| {
            fs::write(&config, text).unwrap();
            group(&config)
        };
        assert_eq!(group_of("{}").unwrap(), None);
        let pod = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"p1"},"root":7}"#;
        assert_eq!(group_of(pod).unwrap().as_deref(), Some("p1"));
        assert!(group_of("{").is_err());
        assert_ne!(socket_path("a", "n", "p1"), socket_path("a", "n", "p2"));
        assert_ne!(socket_path("a", "bc", "d"), socket_path("a", "b", "cd"));
        // sun_path has 108 bytes.
        assert!(socket_path("a", "n", "p1").as_os_str().len() < 100);
    }
}
