//! Real containers through the agent, without a VM: the agent serves Unix sockets instead of vsock.
//!
//! The program starts itself again as the agent, one for each test, since the agent needs a process with
//! one thread and takes over orphans. Needs root; the root file system is a static busybox.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::error::Error;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio as ProcessStdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use agent::Agent;
use libtest_mimic::{Arguments, Failed, Trial};
use protocol::message::{
    AdoptRequest, Console, ConsoleSize, ContainerRequest, CreateContainerRequest, DeleteRequest,
    Empty, ExecRequest, OomRequest, Outcome, ProcessRequest, ResizeTerminalRequest, SignalRequest,
    Stdio, UpdateRequest, WaitResponse,
};
use protocol::method::{
    Adopt, CreateContainer, Delete, Exec, Method, Pause, Processes, ResizeTerminal, Resume, Signal,
    StartContainer, State, Stats, Suspend, Update, Wait, WaitOom,
};
use protocol::wire::Decoder;
use protocol::{Client, ClientError, Code, Failure, StdioHeader, decode_response, encode_request};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The argument with which this program is the agent.
const SERVE: &str = "--serve-as-agent";

/// A static shell with what the tests run.
const BUSYBOX: &str = "/bin/busybox";

/// Above this an answer will not come any more.
const PATIENCE: Duration = Duration::from_secs(60);

type Claim = fn() -> Outcomes<()>;

type Outcomes<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    if let [_, mode, directory] = arguments.as_slice()
        && mode == SERVE
    {
        return match serve(Path::new(directory)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("agent: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let claims: &[(&str, Claim)] = &[
        ("output_and_exit_code_arrive", output_and_exit_code_arrive),
        ("ten_mebibytes_pass_both_ways", ten_mebibytes_pass_both_ways),
        (
            "output_written_before_the_host_connects_is_kept",
            late_connection,
        ),
        (
            "a_signal_ends_the_init_process",
            a_signal_ends_the_init_process,
        ),
        (
            "a_real_time_signal_is_reported",
            a_real_time_signal_is_reported,
        ),
        (
            "exec_runs_beside_the_init_process",
            exec_runs_beside_the_init_process,
        ),
        (
            "exec_of_a_missing_program_is_127",
            exec_of_a_missing_program_is_127,
        ),
        (
            "exec_ends_although_a_child_holds_its_output",
            exec_ends_with_a_child_left,
        ),
        (
            "a_terminal_has_its_size_and_echoes",
            a_terminal_has_its_size_and_echoes,
        ),
        ("exec_gets_a_terminal", exec_gets_a_terminal),
        (
            "streams_that_are_lost_are_replaced",
            streams_that_are_lost_are_replaced,
        ),
        ("pause_resume_and_state", pause_resume_and_state),
        ("processes_stats_and_update", processes_stats_and_update),
        (
            "an_oom_kill_is_told_before_the_end",
            an_oom_kill_is_told_before_the_end,
        ),
        ("loopback_is_up", loopback_is_up),
        ("delete_leaves_nothing_behind", delete_leaves_nothing_behind),
        ("wrong_calls_are_refused", wrong_calls_are_refused),
        (
            "a_broken_connection_harms_nobody",
            a_broken_connection_harms_nobody,
        ),
    ];
    // SAFETY: geteuid has no effects.
    let missing = if unsafe { libc::geteuid() } != 0 {
        Some("needs root")
    } else if !Path::new(BUSYBOX).exists() {
        Some("needs /bin/busybox (package busybox-static)")
    } else {
        None
    };
    if let Some(missing) = missing {
        println!("skipped: {missing}");
    }
    let trial = |&(name, claim): &(&str, Claim)| {
        Trial::test(name, move || {
            claim().map_err(|error| Failed::from(chain(&*error)))
        })
        .with_ignored_flag(missing.is_some())
    };
    libtest_mimic::run(&Arguments::from_args(), claims.iter().map(trial).collect()).exit_code()
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Is the agent.
fn serve(directory: &Path) -> Outcomes<()> {
    // SAFETY: changes only who is the parent of orphans.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let listen = |name: &str| -> io::Result<UnixListener> {
        let listener = UnixListener::bind(directory.join(name))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let (rpc, stdio) = (listen("rpc")?, listen("stdio")?);
    let agent = Agent::new(rpc.into(), stdio.into(), directory.to_owned())?;
    println!("ready");
    Ok(agent.run()?)
}

/// An agent, and the bundle of one container.
struct Guest {
    directory: TempDir,
    agent: Child,
    id: String,
}

impl Guest {
    fn new() -> Outcomes<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir()?;
        let root = directory.path().join("rootfs");
        for name in ["bin", "proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::copy(BUSYBOX, root.join("bin/busybox"))?;
        for name in [
            "sh", "cat", "sleep", "stty", "tty", "echo", "true", "dd", "ip", "ifconfig", "kill",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
        let mut agent = Command::new(env::current_exe()?)
            .arg(SERVE)
            .arg(directory.path())
            .stdout(ProcessStdio::piped())
            .spawn()?;
        let output = agent.stdout.take().ok_or("no output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        assert_eq!(line, "ready\n");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("agent-test-{}-{count}", std::process::id());
        Ok(Self {
            directory,
            agent,
            id,
        })
    }

    fn spec(&self, arguments: &[&str], terminal: bool) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": self.directory.path().join("rootfs")},
            "hostname": "guest",
            "process": process(arguments, terminal),
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"},
                ],
            },
        })
    }

    fn call<M: Method>(&self, request: &M::Request) -> Result<M::Response, ClientError> {
        self.client().call::<M>(request)
    }

    fn client(&self) -> Client<UnixStream> {
        let stream = UnixStream::connect(self.directory.path().join("rpc")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client::new(stream)
    }

    fn stream(&self, token: u64) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join("stdio")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&StdioHeader { token }.encode()).unwrap();
        stream
    }

    fn container(&self) -> ContainerRequest {
        ContainerRequest {
            id: self.id.clone(),
        }
    }

    fn create(&self, arguments: &[&str], stdio: Stdio) -> Outcomes<()> {
        let spec = self.spec(arguments, stdio.console.is_some());
        let request = CreateContainerRequest {
            id: self.id.clone(),
            spec_json: spec.to_string(),
            stdio: Some(stdio),
            shares: Vec::new(),
            network: None,
            disks: Vec::new(),
        };
        self.call::<CreateContainer>(&request)?;
        Ok(())
    }

    fn run(&self, arguments: &[&str], stdio: Stdio) -> Outcomes<()> {
        self.create(arguments, stdio)?;
        self.call::<StartContainer>(&self.container())?;
        Ok(())
    }

    fn exec(&self, exec_id: &str, arguments: &[&str], stdio: Stdio) -> Result<(), ClientError> {
        let request = ExecRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            process_json: process(arguments, stdio.console.is_some()).to_string(),
            stdio: Some(stdio),
            ..ExecRequest::default()
        };
        self.call::<Exec>(&request).map(|_| ())
    }

    fn wait(&self, exec_id: &str) -> Outcomes<Outcome> {
        let request = ProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let WaitResponse { outcome } = self.call::<Wait>(&request)?;
        outcome.ok_or_else(|| "an answer without an outcome".into())
    }

    fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), ClientError> {
        let request = SignalRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
        };
        self.call::<Signal>(&request).map(|_| ())
    }

    fn delete(&self, force: bool) -> Result<(), ClientError> {
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: String::new(),
            force,
        };
        self.call::<Delete>(&request).map(|_| ())
    }

    fn status(&self) -> Outcomes<String> {
        Ok(self.call::<State>(&self.container())?.status)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.delete(true);
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn process(arguments: &[&str], terminal: bool) -> Value {
    json!({
        "terminal": terminal,
        "args": arguments,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": {
            "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"],
        },
        "noNewPrivileges": true,
    })
}

fn token() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn text(mut stream: UnixStream) -> Outcomes<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn failure(result: Result<(), ClientError>) -> Outcomes<Failure> {
    match result {
        Err(ClientError::Failed(failure)) => Ok(failure),
        Err(other) => Err(other.into()),
        Ok(()) => Err("the call must fail".into()),
    }
}

fn output_and_exit_code_arrive() -> Outcomes<()> {
    let guest = Guest::new()?;
    let stdio = Stdio {
        stdout: token(),
        stderr: token(),
        ..Stdio::default()
    };
    let (stdout, stderr) = (guest.stream(stdio.stdout), guest.stream(stdio.stderr));
    guest.run(&["sh", "-c", "echo out; echo err >&2; exit 7"], stdio)?;
    assert_eq!(guest.wait("")?, Outcome::Exited(7));
    assert_eq!(text(stdout)?, "out\n");
    assert_eq!(text(stderr)?, "err\n");
    assert_eq!(
        guest.wait("")?,
        Outcome::Exited(7),
        "a second wait gets the same"
    );
    Ok(())
}

fn ten_mebibytes_pass_both_ways() -> Outcomes<()> {
    let guest = Guest::new()?;
    let stdio = Stdio {
        stdin: token(),
        stdout: token(),
        ..Stdio::default()
    };
    let (mut stdin, mut stdout) = (guest.stream(stdio.stdin), guest.stream(stdio.stdout));
    guest.run(&["cat"], stdio)?;
    let sent: Vec<u8> = (0..10_u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let expected = sent.clone();
    let writer = thread::spawn(move || {
        stdin.write_all(&sent)?;
        stdin.shutdown(Shutdown::Write)
    });
    let mut received = Vec::new();
    stdout.read_to_end(&mut received)?;
    writer.join().unwrap()?;
    assert_eq!(received.len(), expected.len());
    assert!(received == expected, "bytes changed under way");
    assert_eq!(guest.wait("")?, Outcome::Exited(0));
    Ok(())
}

fn late_connection() -> Outcomes<()> {
    let guest = Guest::new()?;
    let stdio = Stdio {
        stdout: token(),
        ..Stdio::default()
    };
    let stdout = stdio.stdout;
    guest.run(&["echo", "early"], stdio)?;
    assert_eq!(guest.wait("")?, Outcome::Exited(0));
    assert_eq!(text(guest.stream(stdout))?, "early\n");
    Ok(())
}

fn a_signal_ends_the_init_process() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.run(&["sleep", "1000"], Stdio::default())?;
    guest.signal("", 9, false)?;
    assert_eq!(guest.wait("")?, Outcome::Signaled(9));
    assert_eq!(
        failure(guest.signal("", 9, false))?.code(),
        Code::FailedPrecondition
    );
    Ok(())
}

fn a_real_time_signal_is_reported() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.run(&["sleep", "1000"], Stdio::default())?;
    guest.exec("e", &["sleep", "1000"], Stdio::default())?;
    guest.signal("e", 40, false)?;
    assert_eq!(guest.wait("e")?, Outcome::Signaled(40));
    guest.signal("", 9, true)?;
    assert_eq!(guest.wait("")?, Outcome::Signaled(9));
    Ok(())
}

fn exec_runs_beside_the_init_process() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.run(&["sleep", "1000"], Stdio::default())?;
    let stdio = Stdio {
        stdin: token(),
        stdout: token(),
        ..Stdio::default()
    };
    let (mut stdin, stdout) = (guest.stream(stdio.stdin), guest.stream(stdio.stdout));
    guest.exec(
        "e",
        &["sh", "-c", "read line; echo got $line; exit 3"],
        stdio,
    )?;
    stdin.write_all(b"it\n")?;
    assert_eq!(guest.wait("e")?, Outcome::Exited(3));
    assert_eq!(text(stdout)?, "got it\n");
    let again = guest.exec("e", &["true"], Stdio::default());
    assert_eq!(failure(again)?.code(), Code::AlreadyExists);
    let request = DeleteRequest {
        id: guest.id.clone(),
        exec_id: "e".to_owned(),
        force: false,
    };
    guest.call::<Delete>(&request)?;
    guest.exec("e", &["true"], Stdio::default())?;
    assert_eq!(guest.wait("e")?, Outcome::Exited(0));
    Ok(())
}

fn exec_of_a_missing_program_is_127() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.run(&["sleep", "1000"], Stdio::default())?;
    let stdio = Stdio {
        stdout: token(),
        ..Stdio::default()
    };
    let failure = failure(guest.exec("e", &["no-such-program"], stdio))?;
    assert_eq!(failure.exit_code(), Some(127), "{}", chain(&failure));
    assert!(
        chain(&failure).contains("no-such-program"),
        "{}",
        chain(&failure)
    );
    Ok(())
}

fn exec_ends_with_a_child_left() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.run(&["sleep", "1000"], Stdio::default())?;
    let stdio = Stdio {
        stdout: token(),
        ..Stdio::default()
    };
    let stdout = guest.stream(stdio.stdout);
    guest.exec("e", &["sh", "-c", "sleep 1000 & echo started"], stdio)?;
    assert_eq!(guest.wait("e")?, Outcome::Exited(0));
    assert_eq!(text(stdout)?, "started\n");
    Ok(())
}

fn streams_that_are_lost_are_replaced() -> Outcomes<()> {
    let guest = Guest::new()?;
    let streams = || Stdio {
        stdin: token(),
        stdout: token(),
        stderr: token(),
        console: None,
    };
    let open =
        |stdio: &Stdio| [stdio.stdin, stdio.stdout, stdio.stderr].map(|token| guest.stream(token));
    let old = streams();
    let [mut stdin, stdout, _stderr] = open(&old);
    let script = "exec 2>&-; read a; echo got $a; read b; echo got $b";
    guest.run(&["sh", "-c", script], old)?;
    stdin.write_all(b"one\n")?;
    let mut lines = BufReader::new(stdout).lines();
    assert_eq!(lines.next().unwrap()?, "got one");
    guest.call::<Suspend>(&Empty {})?;
    drop((stdin, lines));
    let new = streams();
    // One of them before, the others after the agent expects them.
    let mut stdin = guest.stream(new.stdin);
    let request = AdoptRequest {
        id: guest.id.clone(),
        stdio: Some(new.clone()),
    };
    guest.call::<Adopt>(&request)?;
    let (stdout, stderr) = (guest.stream(new.stdout), guest.stream(new.stderr));
    assert_eq!(text(stderr)?, "");
    stdin.write_all(b"two\n")?;
    assert_eq!(text(stdout)?, "got two\n");
    assert_eq!(guest.wait("")?, Outcome::Exited(0));
    Ok(())
}

fn console(size: Option<ConsoleSize>) -> Stdio {
    Stdio {
        console: Some(Console {
            token: token(),
            size,
        }),
        ..Stdio::default()
    }
}

fn a_terminal_has_its_size_and_echoes() -> Outcomes<()> {
    let guest = Guest::new()?;
    let stdio = console(Some(ConsoleSize {
        columns: 100,
        rows: 40,
    }));
    let mut terminal = guest.stream(stdio.console.as_ref().map_or(0, |console| console.token));
    guest.run(
        &["sh", "-c", "tty; stty size; read line; stty size; exit 5"],
        stdio,
    )?;
    let mut lines = BufReader::new(terminal.try_clone()?).lines();
    let mut next = || lines.next().unwrap_or(Ok(String::new()));
    assert_eq!(next()?, "/dev/pts/0");
    assert_eq!(next()?, "40 100");
    let size = Some(ConsoleSize {
        columns: 80,
        rows: 24,
    });
    let request = ResizeTerminalRequest {
        id: guest.id.clone(),
        exec_id: String::new(),
        size,
    };
    guest.call::<ResizeTerminal>(&request)?;
    terminal.write_all(b"typed\n")?;
    assert_eq!(next()?, "typed");
    assert_eq!(next()?, "24 80");
    assert_eq!(guest.wait("")?, Outcome::Exited(5));
    assert_eq!(next()?, "");
    Ok(())
}

fn exec_gets_a_terminal() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.run(&["sleep", "1000"], Stdio::default())?;
    let stdio = console(None);
    let terminal = guest.stream(stdio.console.as_ref().map_or(0, |console| console.token));
    guest.exec(
        "e",
        &["sh", "-c", "test -t 0 && test -t 1 && echo yes"],
        stdio,
    )?;
    assert_eq!(guest.wait("e")?, Outcome::Exited(0));
    assert_eq!(text(terminal)?, "yes\r\n");
    let size = Some(ConsoleSize {
        columns: 80,
        rows: 24,
    });
    let request = ResizeTerminalRequest {
        id: guest.id.clone(),
        exec_id: String::new(),
        size,
    };
    let error = guest.call::<ResizeTerminal>(&request).map(|_| ());
    assert_eq!(failure(error)?.code(), Code::FailedPrecondition);
    Ok(())
}

fn pause_resume_and_state() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.create(&["sleep", "1000"], Stdio::default())?;
    assert_eq!(guest.status()?, "created");
    guest.call::<StartContainer>(&guest.container())?;
    assert_eq!(guest.status()?, "running");
    guest.call::<Pause>(&guest.container())?;
    assert_eq!(guest.status()?, "paused");
    guest.call::<Resume>(&guest.container())?;
    assert_eq!(guest.status()?, "running");
    guest.signal("", 9, false)?;
    guest.wait("")?;
    assert_eq!(guest.status()?, "stopped");
    Ok(())
}

fn processes_stats_and_update() -> Outcomes<()> {
    let guest = Guest::new()?;
    guest.run(&["sh", "-c", "sleep 1000 & wait"], Stdio::default())?;
    guest.exec("e", &["sleep", "999"], Stdio::default())?;
    let commands = || -> Outcomes<Vec<String>> {
        let list = guest.call::<Processes>(&guest.container())?.processes;
        Ok(list.into_iter().map(|process| process.command).collect())
    };
    let commands = commands()?;
    assert!(commands.contains(&"sleep 999".to_owned()), "{commands:?}");
    let stats = guest.call::<Stats>(&guest.container())?.stats_json;
    assert!(serde_json::from_str::<Value>(&stats)?.is_object());
    let resources_json = json!({"memory": {"limit": 64 << 20}}).to_string();
    guest.call::<Update>(&UpdateRequest {
        id: guest.id.clone(),
        resources_json,
    })?;
    let broken = UpdateRequest {
        id: guest.id.clone(),
        resources_json: "[".to_owned(),
    };
    let error = guest.call::<Update>(&broken).map(|_| ());
    assert_eq!(failure(error)?.code(), Code::InvalidArgument);
    Ok(())
}

fn an_oom_kill_is_told_before_the_end() -> Outcomes<()> {
    let guest = Guest::new()?;
    let script = "until [ -e /go ]; do sleep 0.1; done; x=a; while true; do x=$x$x; done";
    guest.run(&["sh", "-c", script], Stdio::default())?;
    let limited = guest.call::<Update>(&UpdateRequest {
        id: guest.id.clone(),
        resources_json: json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}}).to_string(),
    });
    if let Err(ClientError::Failed(failure)) = &limited
        && failure.to_string().contains("is not available here")
    {
        println!("skipped: {failure}");
        return Ok(());
    }
    limited?;
    let request = OomRequest {
        id: guest.id.clone(),
        known: 0,
    };
    let mut news = UnixStream::connect(guest.directory.path().join("rpc"))?;
    news.write_all(&encode_request::<WaitOom>(1, &request)?)?;
    fs::write(guest.directory.path().join("rootfs/go"), "")?;
    assert_eq!(guest.wait("")?, Outcome::Signaled(9));
    // The answer is there already: nothing is waited for.
    news.set_nonblocking(true)?;
    let mut bytes = [0; 512];
    let length = news.read(&mut bytes)?;
    let frame = Decoder::new().decode(&mut &bytes[..length])?;
    let response = decode_response::<WaitOom>(&frame.ok_or("half a frame")?)?;
    assert!(response.kills > 0, "{response:?}");
    Ok(())
}

fn loopback_is_up() -> Outcomes<()> {
    let guest = Guest::new()?;
    let stdio = Stdio {
        stdout: token(),
        ..Stdio::default()
    };
    let stdout = guest.stream(stdio.stdout);
    guest.run(&["ip", "addr", "show", "lo"], stdio)?;
    assert_eq!(guest.wait("")?, Outcome::Exited(0));
    let output = text(stdout)?;
    assert!(output.contains("127.0.0.1"), "{output}");
    Ok(())
}

fn delete_leaves_nothing_behind() -> Outcomes<()> {
    let guest = Guest::new()?;
    let descriptors = || -> Outcomes<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", guest.agent.id()))?.count())
    };
    let entries = || -> Outcomes<Vec<PathBuf>> {
        let mut paths = Vec::new();
        let mut pending = vec![guest.directory.path().to_owned()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                let is_root = path.ends_with("rootfs");
                if path.is_dir() && !is_root {
                    pending.push(path.clone());
                }
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    };
    let once = || -> Outcomes<()> {
        let stdio = Stdio {
            stdin: token(),
            stdout: token(),
            ..Stdio::default()
        };
        let stdout = guest.stream(stdio.stdout);
        guest.create(&["cat"], stdio)?;
        assert_eq!(
            failure(guest.delete(false))?.code(),
            Code::FailedPrecondition
        );
        guest.call::<StartContainer>(&guest.container())?;
        guest.exec("t", &["true"], console(None))?;
        guest.wait("t")?;
        guest.delete(true)?;
        assert_eq!(text(stdout)?, "");
        Ok(())
    };
    once()?;
    let before = (descriptors()?, entries()?);
    for _ in 0..5 {
        once()?;
    }
    // The agent sees the end of our connections after we do. Nothing tells us when; a leak stays.
    let deadline = Instant::now() + Duration::from_secs(10);
    while descriptors()? > before.0 {
        assert!(Instant::now() < deadline, "descriptors have leaked");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(entries()?, before.1);
    let error = guest.call::<State>(&guest.container()).map(|_| ());
    assert_eq!(failure(error)?.code(), Code::NotFound);
    Ok(())
}

fn wrong_calls_are_refused() -> Outcomes<()> {
    let guest = Guest::new()?;
    let create = |id: &str, spec_json: &str, stdio: Stdio| {
        let (id, spec_json) = (id.to_owned(), spec_json.to_owned());
        let request = CreateContainerRequest {
            id,
            spec_json,
            stdio: Some(stdio),
            shares: Vec::new(),
            network: None,
            disks: Vec::new(),
        };
        failure(guest.call::<CreateContainer>(&request).map(|_| ()))
    };
    assert_eq!(
        create("../x", "{}", Stdio::default())?.code(),
        Code::InvalidArgument
    );
    assert_eq!(
        create("c", "{", Stdio::default())?.code(),
        Code::InvalidArgument
    );
    let both = Stdio {
        stdout: token(),
        ..console(None)
    };
    assert_eq!(create("c", "{}", both)?.code(), Code::InvalidArgument);
    guest.create(&["sleep", "1000"], Stdio::default())?;
    assert_eq!(
        create(&guest.id, "{}", Stdio::default())?.code(),
        Code::AlreadyExists
    );
    assert_eq!(
        failure(guest.signal("", 65, false))?.code(),
        Code::InvalidArgument
    );
    assert_eq!(
        failure(guest.signal("nobody", 9, false))?.code(),
        Code::NotFound
    );
    let error = guest.exec("", &["true"], Stdio::default());
    assert_eq!(failure(error)?.code(), Code::InvalidArgument);
    Ok(())
}

fn a_broken_connection_harms_nobody() -> Outcomes<()> {
    let guest = Guest::new()?;
    let connect = |name: &str| UnixStream::connect(guest.directory.path().join(name));
    for bytes in [&[0xff; 64][..], &[0; 3]] {
        connect("rpc")?.write_all(bytes)?;
        connect("stdio")?.write_all(bytes)?;
    }
    drop(guest.stream(token()));
    guest.run(&["true"], Stdio::default())?;
    assert_eq!(guest.wait("")?, Outcome::Exited(0));
    Ok(())
}
