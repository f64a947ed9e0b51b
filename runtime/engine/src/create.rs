//! Makes a container's first process: parent and child side.
//!
//! The parent opens and compiles all that it can before, then clones straight into the cgroup and the new namespaces.
//! The child makes the root file system ([`crate::rootfs`]), takes the steps of [`Workload`], and waits for its start.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use crate::attributes;
use crate::cgroup::Entrance;
use crate::clone::{Child, ExitGuard, clone, exit_now, pidfd_open};
use crate::error::{Context, Error};
use crate::handshake::{self, ChildEnd, Message, ParentEnd};
use crate::hooks::{self, Kind, Surroundings};
use crate::namespaces::{self, Namespaces};
use crate::net_devices::NetDevices;
use crate::report::Failure;
use crate::rootfs::RootfsPlan;
use crate::seccomp::SeccompAgent;
use crate::seccomp_cache;
use crate::spec::{hooks_of, namespace, path_of};
use crate::stdio::Ready;
use crate::workload::{Workload, close_on_exec_from, hide_from_tracing, loopback_up};
use crate::{CreateRequest, Created, Engine, Hold, fault, limits, processes};

/// What the two sides have in common before they part.
struct Plan<'a> {
    spec: &'a Spec,
    bundle: &'a Path,
    process: &'a Process,
    namespaces: Namespaces,
    rootfs: RootfsPlan<'a>,
    stdio: Ready,
    workload: Workload,
    entrance: Entrance,
    /// Where the first process waits for [`Engine::start`].
    start: File,
    /// How many descriptors from number 3 on the program inherits.
    preserve_fds: u32,
    /// Who gets the notifications of the seccomp filter.
    agent: Option<SeccompAgent>,
    net_devices: NetDevices<'a>,
    /// The state that hooks get, without the pid.
    state: serde_json::Value,
    waits_for_hooks: bool,
}

pub(crate) fn create(
    engine: &Engine,
    mut request: CreateRequest<'_>,
) -> Result<(Created, Hold), Error> {
    let spec = request.spec;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::unsupported("process", "it is missing"))?;
    let linux = spec.linux().as_ref();
    let seccomp_profile = linux.and_then(|linux| linux.seccomp().as_ref());
    let compile = |profile| seccomp_cache::compile(profile, engine.seccomp_cache.as_deref());
    let seccomp = seccomp_profile.map(compile).transpose()?;
    let stdio = std::mem::replace(&mut request.stdio, crate::Stdio::Inherit);
    let stdio = stdio.ready(process.terminal().unwrap_or(false))?;
    let rootfs = RootfsPlan::new(spec, request.cgroup, request.no_pivot)?;

    let cgroup = request.cgroup;
    cgroup.create()?;
    let mut resources = linux
        .and_then(|linux| linux.resources().clone())
        .unwrap_or_default();
    if resources.devices().is_none() {
        // Without rules a container gets the default devices, not all.
        resources.set_devices(Some(Vec::new()));
    }
    cgroup.apply(&resources)?;
    fault::point("create.limits-set");

    let state = creating(request.id, spec, request.bundle);
    let mut workload = Workload::new(process, seccomp);
    workload.keyring = keyring(request.id, request.no_new_keyring)?;
    let hooks = |wanted: Kind| {
        hooks_of(spec)
            .into_iter()
            .find(|(kind, hooks)| *kind == wanted && !hooks.is_empty())
            .map(|(_, hooks)| hooks)
    };
    workload.start_hooks = hooks(Kind::StartContainer)
        .map(<[_]>::to_vec)
        .unwrap_or_default();
    workload.state = state.clone();
    workload.state["status"] = "created".into();
    // Sockets that systemd opened for the program come behind those that the caller passes.
    let activated = activation_sockets();
    if activated > 0 {
        workload.env.push(format!("LISTEN_FDS={activated}"));
        workload.env.push("LISTEN_PID=1".to_owned());
    }

    let plan = Plan {
        spec,
        bundle: request.bundle,
        process,
        namespaces: Namespaces::of_spec(spec)?,
        rootfs,
        stdio,
        workload,
        entrance: cgroup.entrance()?,
        start: make_start_pipe(&engine.start_pipe())?,
        preserve_fds: request.preserve_fds.saturating_add(activated),
        agent: seccomp_profile
            .map(SeccompAgent::connect)
            .transpose()?
            .flatten(),
        net_devices: NetDevices::of_spec(spec),
        state,
        waits_for_hooks: [Kind::Prestart, Kind::CreateRuntime, Kind::CreateContainer]
            .into_iter()
            .any(|kind| hooks(kind).is_some()),
    };
    launch(plan)
}

/// The number of sockets in `LISTEN_FDS`, see sd_listen_fds(3).
fn activation_sockets() -> u32 {
    std::env::var("LISTEN_FDS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or_default()
}

/// A named pipe through which one byte comes when the program is to run.
///
/// The first process holds it open for both directions: it never sees its end, and who writes to it without anybody
/// there is told so.
fn make_start_pipe(path: &Path) -> Result<File, Error> {
    let context = || format!("cannot make the start pipe {}", path.display());
    nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).context(context)?;
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .context(context)
}

/// Wakes the first process that waits at the pipe.
pub(crate) fn start(path: &Path) -> Result<(), Error> {
    let context =
        || "cannot start the container: its first process does not wait (any more)".to_owned();
    let mut pipe = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .context(context)?;
    fault::point("engine.start-opened");
    pipe.write_all(b"s").context(context)?;
    fault::point("engine.start-told");
    // Nobody can start it twice. One whose teller was killed here may be told twice; it reads once.
    let _ = fs::remove_file(path);
    Ok(())
}

/// Whether nobody waits at the pipe any more. It has a reader as long as the first process waits, and no longer.
pub(crate) fn has_started(path: &Path) -> Result<bool, Error> {
    let pipe = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    match pipe {
        Ok(_) => Ok(false),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => Ok(true),
        Err(error) => Err(error).context(|| format!("cannot look at {}", path.display())),
    }
}

pub(crate) fn keyring(id: &str, keep: bool) -> Result<Option<CString>, Error> {
    if keep {
        return Ok(None);
    }
    CString::new(format!("_ses.{id}"))
        .map(Some)
        .map_err(|_| Error::unsupported("id", "it contains NUL"))
}

fn launch(plan: Plan<'_>) -> Result<(Created, Hold), Error> {
    let (ours, theirs) = handshake::pair()?;
    let helped = plan.namespaces.need_helper();
    let flags = match helped {
        true => 0,
        false => plan.namespaces.birth,
    };
    let child = clone(flags, plan.entrance.born_in.as_ref().map(AsFd::as_fd))
        .context(|| "cannot make the container's first process".to_owned())?;
    let Some(child) = child else {
        let _guard = ExitGuard;
        drop(ours);
        let failure = match helped {
            true => help(plan, &theirs),
            false => first_process(plan, &theirs),
        };
        let code = failure.exit_code();
        theirs.send(&Message::Failed(failure));
        exit_now(code);
    };
    // The child has the other end; only with this one closed is its end seen.
    drop(theirs);
    fault::point("create.cloned");
    let child = match helped {
        true => helped_birth(&child, &ours)?,
        false => child,
    };
    follow(&plan, &child, &ours).inspect_err(|_| {
        // One that failed has ended by itself; one that we failed must be ended.
        child.kill_and_reap();
    })?;
    let start_time = processes::start_time(child.pid)
        .ok_or_else(|| Error::Setup("the container's first process has ended".to_owned()))?;
    let created = Created {
        pid: child.pid,
        start_time,
    };
    Ok((created, ours.into_hold()))
}

/// Takes over the first process from the helper that made it, our child as well, and sees the helper off.
pub(crate) fn helped_birth(helper: &Child, socket: &ParentEnd) -> Result<Child, Error> {
    let born = match socket.expect() {
        Ok(Message::Born(pid)) => Ok(Pid::from_raw(pid)),
        Ok(Message::Failed(failure)) => Err(failure.into()),
        Ok(_) => Err(Error::Setup(
            "the helper said something unexpected".to_owned(),
        )),
        Err(error) => Err(error),
    };
    let context = || "cannot wait for the process that joined namespaces".to_owned();
    match born {
        Ok(pid) => {
            helper.wait().context(context)?;
            // Not reaped by us yet, so the number is still that process's.
            let pidfd =
                pidfd_open(pid).context(|| format!("cannot open the first process {pid}"))?;
            Ok(Child { pid, pidfd })
        }
        Err(error) => {
            helper.kill_and_reap();
            Err(error)
        }
    }
}

/// The parent's part: id maps, hooks, limits; until the first process waits for its start.
fn follow(plan: &Plan<'_>, child: &Child, socket: &ParentEnd) -> Result<(), Error> {
    if plan.namespaces.new_user() {
        namespaces::write_id_maps(child.pid, plan.spec)?;
        socket.go_on()?;
    }
    if !plan.net_devices.is_empty() {
        plan.net_devices.move_to(child)?;
        socket.go_on()?;
    }
    fault::point("create.maps-written");
    loop {
        match socket.expect()? {
            Message::Hooks => {
                run_hooks(plan, child)?;
                fault::point("create.hooks-run");
                socket.go_on()?;
            }
            Message::Listener(listener) => {
                if let Some(agent) = &plan.agent {
                    agent.hand_over(listener, child.pid, &plan.state)?;
                }
                socket.go_on()?;
            }
            Message::Ready => break,
            Message::Failed(failure) => return Err(failure.into()),
            Message::Born(_) => {}
        }
    }
    fault::point("create.first-process-ready");
    limits::set_oom_score(child.pid, plan.process)?;
    limits::raise_rlimits(child.pid, plan.process)
}

/// The state of a container that is being made (runtime-spec, "State"), without its pid.
fn creating(id: &str, spec: &Spec, bundle: &Path) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": spec.version(),
        "id": id,
        "status": "creating",
        "bundle": bundle,
        "annotations": spec.annotations().clone().unwrap_or_default(),
    })
}

/// What the host does for a container when its namespaces are there: moves `linux.netDevices` to them and runs the
/// `prestart` and `createRuntime` hooks. [`Engine::create`] has it done; this is for a container that another kernel
/// makes, for which the process `pid` stands here.
///
/// # Errors
/// A device cannot be moved; a hook fails.
pub fn prepare_host(id: &str, spec: &Spec, bundle: &Path, pid: Pid) -> Result<(), Error> {
    let pidfd = pidfd_open(pid).context(|| format!("cannot open the process {pid}"))?;
    NetDevices::of_spec(spec).move_to(&Child { pid, pidfd })?;
    let mut state = creating(id, spec, bundle);
    state["pid"] = pid.as_raw().into();
    run_runtime_hooks(spec, bundle, &state)
}

fn run_runtime_hooks(spec: &Spec, bundle: &Path, state: &serde_json::Value) -> Result<(), Error> {
    let state = state.to_string();
    let surroundings = Surroundings {
        state: state.as_bytes(),
        directory: bundle,
        env: &[],
    };
    for (kind, hooks) in hooks_of(spec) {
        if matches!(kind, Kind::Prestart | Kind::CreateRuntime) {
            hooks::run(kind, hooks, &surroundings)?;
        }
    }
    Ok(())
}

/// The hooks between the namespaces' making and the change of root.
fn run_hooks(plan: &Plan<'_>, child: &Child) -> Result<(), Error> {
    let mut state = plan.state.clone();
    state["pid"] = child.pid.as_raw().into();
    run_runtime_hooks(plan.spec, plan.bundle, &state)?;
    for (kind, hooks) in hooks_of(plan.spec) {
        if kind == Kind::CreateContainer && !hooks.is_empty() {
            run_in_container(plan, child, hooks, &state)?;
        }
    }
    Ok(())
}

/// Runs hooks in the container's namespaces, where its root is not yet changed: their paths are the host's. They are where
/// the root is, as with other runtimes.
fn run_in_container(
    plan: &Plan<'_>,
    child: &Child,
    hooks: &[oci_spec::runtime::Hook],
    state: &serde_json::Value,
) -> Result<(), Error> {
    let flags = namespaces::foreign(child.pid)?;
    let what = "the process that runs the createContainer hooks";
    let cgroup = plan.entrance.born_in.as_ref().map(AsFd::as_fd);
    let failure = handshake::in_child(what, cgroup, || {
        plan.entrance.pass()?;
        namespaces::join(child.pidfd.as_fd(), flags)?;
        let root = plan.spec.root().as_ref();
        let state = state.to_string();
        let surroundings = Surroundings {
            state: state.as_bytes(),
            directory: root.map_or(Path::new("/"), |root| root.path()),
            env: &[],
        };
        hooks::run(Kind::CreateContainer, hooks, &surroundings)?;
        Ok(())
    })?;
    match failure {
        None => Ok(()),
        Some(failure) => Err(Error::Hooks(failure.text().to_owned())),
    }
}

/// The helper's part: joins namespaces and makes the first process in them. It returns only to say what failed.
fn help(plan: Plan<'_>, socket: &ChildEnd) -> Failure {
    let enter = || -> Result<(), Error> {
        plan.entrance.pass()?;
        hide_from_tracing()?;
        plan.namespaces.join_existing()
    };
    if let Err(error) = enter() {
        return error.into();
    }
    bear(plan.namespaces.birth, socket, || {
        first_process(plan, socket)
    })
}

/// Makes a process that is the helper's sibling, tells the runtime its pid, and ends the helper. What returns is the new
/// process's failure, or the helper's.
pub(crate) fn bear(flags: u64, socket: &ChildEnd, process: impl FnOnce() -> Failure) -> Failure {
    let made = || -> Result<_, Error> {
        let pipe =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".to_owned())?;
        let child = clone(flags | libc::CLONE_PARENT as u64, None)
            .context(|| "cannot make a process in the container's namespaces".to_owned())?;
        Ok((child, pipe))
    };
    match made() {
        Err(error) => error.into(),
        Ok((None, (told, tell))) => {
            drop(tell);
            // The helper's end, which comes when it has said who we are: nothing of ours may come before that.
            let _ = File::from(told).read(&mut [0]);
            process()
        }
        Ok((Some(child), _)) => {
            socket.send(&Message::Born(child.pid.as_raw()));
            exit_now(0);
        }
    }
}

/// The child's part. It returns only to say what failed.
fn first_process(plan: Plan<'_>, socket: &ChildEnd) -> Failure {
    match become_workload(plan, socket) {
        Ok(failure) => failure,
        Err(error) => error.into(),
    }
}

fn become_workload(plan: Plan<'_>, socket: &ChildEnd) -> Result<Failure, Error> {
    let Plan {
        spec,
        process,
        namespaces,
        rootfs,
        stdio,
        workload,
        entrance,
        start,
        ..
    } = plan;
    fault::point("first.born");
    if !namespaces.need_helper() {
        entrance.pass()?;
    }
    fault::point("first.in-cgroup");
    attributes::reset_affinity();
    if namespaces.new_user() {
        socket.wait()?;
    }
    if !plan.net_devices.is_empty() {
        socket.wait()?;
    }
    if namespaces.has_user() {
        namespaces::become_root()?;
    }
    hide_from_tracing()?;
    nix::unistd::setsid().context(|| "cannot make a session".to_owned())?;
    namespaces.finish()?;
    fault::point("first.in-namespaces");
    set_names(spec)?;
    if is_new(spec, LinuxNamespaceType::Network) {
        loopback_up()?;
    }
    attributes::set(process)?;
    attributes::set_memory_policy(spec)?;
    stdio.put_in_place()?;
    let prepared = rootfs.prepare(stdio.console())?;
    fault::point("first.mounted");
    if plan.waits_for_hooks {
        socket.send(&Message::Hooks);
        socket.wait()?;
    }
    let profile = attributes::Profile::open(process)?;
    prepared.enter()?;
    fault::point("first.in-root");
    let linux = spec.linux().as_ref();
    attributes::set_personality(linux.and_then(|linux| linux.personality().as_ref()))?;
    profile.apply()?;
    attributes::set_umask(process);
    close_on_exec_from(plan.preserve_fds.saturating_add(3))?;
    fault::point("first.before-rights");
    end_when_asked()?;
    let program = workload.prepare(socket)?;
    socket.send(&Message::Ready);
    socket.wait_for_release()?;
    wait_for_start(start)?;
    let failure = match workload.confine() {
        Ok(()) => match workload.run_start_hooks(&program) {
            Ok(()) => workload.become_program(&program),
            Err(error) => error.into(),
        },
        Err(failure) => failure,
    };
    // Whoever made the container has gone; the workload's error stream is what is left.
    let _ = writeln!(std::io::stderr(), "{}", failure.text());
    Ok(failure)
}

/// Has a container that waits for its start end by a signal that asks it to: the kernel spares the first process of a pid
/// namespace those that have no handler.
fn end_when_asked() -> Result<(), Error> {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: it ends the process and does nothing else, as a handler may.
        unsafe { libc::_exit(128 + signal) }
    }
    let action = SigAction::new(SigHandler::Handler(end), SaFlags::empty(), SigSet::empty());
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
    ] {
        // SAFETY: the handler calls nothing that another call of this process could be in the middle of.
        unsafe { sigaction(signal, &action) }.context(|| format!("cannot handle {signal}"))?;
    }
    Ok(())
}

/// Waits for the byte that [`start`] sends. It needs no other system call than read(2): a filter may be in force.
fn wait_for_start(mut pipe: File) -> Result<(), Error> {
    let mut byte = [0];
    pipe.read_exact(&mut byte)
        .context(|| "cannot wait for the start".to_owned())
}

fn is_new(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    namespace(spec, kind).is_some_and(|one| path_of(one).is_none())
}

/// Sets the host and domain names of a new uts namespace.
fn set_names(spec: &Spec) -> Result<(), Error> {
    if !is_new(spec, LinuxNamespaceType::Uts) {
        return Ok(());
    }
    if let Some(name) = spec.hostname() {
        nix::unistd::sethostname(name).context(|| format!("cannot set hostname to {name:?}"))?;
    }
    if let Some(name) = spec.domainname() {
        rustix::system::setdomainname(name.as_bytes())
            .map_err(|error| Errno::from_raw(error.raw_os_error()))
            .context(|| format!("cannot set domainname to {name:?}"))?;
    }
    Ok(())
}
