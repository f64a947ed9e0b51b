//! Runs one more process in a running container: parent and child side.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use libcontainer::process::cpu_affinity::set_cpuset_affinity_from_string;
use nix::sched::CloneFlags;
use nix::unistd::Pid;

use crate::cgroup::{Entrance, is_rootless};
use crate::clone::{Child, ExitGuard, clone, exit_now, pidfd_open};
use crate::error::{Context, Error};
use crate::handshake::{self, ChildEnd, Message, ParentEnd};
use crate::namespaces::{self, ForChildren};
use crate::report::Failure;
use crate::seccomp::SeccompAgent;
use crate::seccomp_cache;
use crate::spec::validate_process;
use crate::stdio::Ready;
use crate::workload::{Program, Workload, close_on_exec_from, hide_from_tracing};
use crate::{Cgroup, Created, ExecRequest, attributes, create, fault, limits, processes, rootfs};

/// What the two sides have in common before they part.
struct Plan<'a> {
    request: &'a ExecRequest<'a>,
    workload: Workload,
    agent: Option<SeccompAgent>,
    stdio: Ready,
    init: OwnedFd,
    foreign: CloneFlags,
    /// Whether a helper joins the user namespace before the process is made.
    helped: bool,
    entrance: Entrance,
}

pub(crate) fn exec(
    mut request: ExecRequest<'_>,
    seccomp_cache: Option<&Path>,
) -> Result<Created, Error> {
    validate_process(request.process)?;
    let init = open_init(request.init, request.init_start)?;
    if !request.ignore_paused && request.cgroup.is_frozen() {
        return Err(Error::Paused);
    }
    let stdio = std::mem::replace(&mut request.stdio, crate::Stdio::Inherit);
    let stdio = stdio.ready(request.process.terminal().unwrap_or(false))?;
    let compile = |profile| seccomp_cache::compile(profile, seccomp_cache);
    let profile = request.linux.and_then(|linux| linux.seccomp().as_ref());
    let seccomp = profile.map(compile).transpose()?;
    let mut workload = Workload::new(request.process, seccomp);
    let name = request.cgroup.path().file_name().unwrap_or_default();
    workload.keyring = create::keyring(&name.to_string_lossy(), request.no_new_keyring)?;
    let cgroup = match request.sub_cgroup {
        None => request.cgroup.clone(),
        Some(sub) => sub_cgroup(request.cgroup, sub)?,
    };
    let foreign = namespaces::foreign(request.init)?;
    let plan = Plan {
        foreign,
        helped: foreign.contains(CloneFlags::CLONE_NEWUSER) && is_rootless(),
        entrance: cgroup.entrance()?,
        request: &request,
        workload,
        agent: profile.map(SeccompAgent::connect).transpose()?.flatten(),
        stdio,
        init,
    };
    launch(&plan)
}

/// Holds the first process by a descriptor and makes sure that it is the one meant.
fn open_init(pid: Pid, start: u64) -> Result<OwnedFd, Error> {
    let gone = || Error::NotRunning(pid.as_raw());
    let init = pidfd_open(pid).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH | libc::EINVAL) => gone(),
        _ => Error::System {
            operation: format!("cannot open process {pid}"),
            source: error,
        },
    })?;
    if processes::start_time(pid) != Some(start) {
        return Err(gone());
    }
    Ok(init)
}

fn sub_cgroup(cgroup: &Cgroup, sub: &Path) -> Result<Cgroup, Error> {
    let mut path = cgroup.path().to_owned();
    for component in sub.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            _ => {
                return Err(Error::unsupported(
                    "--cgroup",
                    "the path must not leave the container's cgroup",
                ));
            }
        }
    }
    Ok(Cgroup::new(&path)?)
}

fn launch(plan: &Plan<'_>) -> Result<Created, Error> {
    let (ours, theirs) = handshake::pair()?;
    let birth = match plan.helped {
        true => ForChildren::default(),
        false => ForChildren::of_process(plan.init.as_fd(), plan.foreign)?,
    };
    let mut child = clone(0, plan.entrance.born_in.as_ref().map(AsFd::as_fd));
    if child
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
        && plan.request.sub_cgroup.is_none()
    {
        child = clone(0, beside_init(plan)?.as_ref().map(AsFd::as_fd));
    }
    let child = child.context(|| "cannot make a process in the container's cgroup".to_owned())?;
    let Some(child) = child else {
        let _guard = ExitGuard;
        drop(ours);
        let failure = match plan.helped {
            true => help(plan, &theirs),
            false => new_process(plan, &theirs),
        };
        let code = failure.exit_code();
        theirs.send(&Message::Failed(failure));
        exit_now(code);
    };
    drop(birth);
    drop(theirs);
    fault::point("exec.cloned");
    let child = match plan.helped {
        true => create::helped_birth(&child, &ours)?,
        false => child,
    };
    let start_time = processes::start_time(child.pid);
    follow(plan, &child, &ours).inspect_err(|_| child.kill_and_reap())?;
    fault::point("exec.program-runs");
    Ok(Created {
        pid: child.pid,
        // A program that has ended already is a zombie, which no other process can be taken for.
        start_time: start_time.unwrap_or_default(),
    })
}

/// The parent's part, until the process has become its program.
fn follow(plan: &Plan<'_>, child: &Child, socket: &ParentEnd) -> Result<(), Error> {
    while let Some(message) = socket.receive()? {
        match message {
            Message::Failed(failure) => return Err(failure.into()),
            Message::Listener(listener) => {
                if let Some(agent) = &plan.agent {
                    let mut state = plan.request.state.clone();
                    state["pid"] = plan.request.init.as_raw().into();
                    agent.hand_over(listener, child.pid, &state)?;
                }
                socket.go_on()?;
            }
            Message::Born(_) | Message::Hooks | Message::Ready => {}
        }
    }
    Ok(())
}

/// A first process that manages cgroups itself, such as systemd, has put itself into one below the container's, which
/// can have no processes from then on. The new one goes where the first is.
fn beside_init(plan: &Plan<'_>) -> Result<Option<OwnedFd>, Error> {
    let file = format!("/proc/{}/cgroup", plan.request.init);
    let text = std::fs::read_to_string(&file).context(|| format!("cannot read {file}"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    match path.map(Path::new) {
        Some(path) if path.starts_with(plan.request.cgroup.path()) => {
            Ok(Cgroup::new(path)?.entrance()?.born_in)
        }
        _ => Err(Error::unsupported(
            "linux.cgroupsPath",
            "the container's first process has left its cgroup, which takes no process any more",
        )),
    }
}

/// The helper's part, for an ordinary user, who has rights over the container's other namespaces only in its user
/// namespace: joins that and makes the process in it. It returns only to say what failed.
fn help(plan: &Plan<'_>, socket: &ChildEnd) -> Failure {
    let enter = || -> Result<(), Error> {
        plan.entrance.pass()?;
        hide_from_tracing()?;
        namespaces::join(plan.init.as_fd(), plan.foreign & BY_HELPER)
    };
    match enter() {
        Ok(()) => create::bear(0, socket, || new_process(plan, socket)),
        Err(error) => error.into(),
    }
}

/// The namespaces that the helper joins.
const BY_HELPER: CloneFlags = CloneFlags::CLONE_NEWUSER.union(CloneFlags::CLONE_NEWPID);

/// The child's part. It returns only to say what failed.
fn new_process(plan: &Plan<'_>, socket: &ChildEnd) -> Failure {
    match enter(plan, socket) {
        Err(error) => error.into(),
        Ok(program) => match plan.workload.confine() {
            Ok(()) => plan.workload.become_program(&program),
            Err(failure) => failure,
        },
    }
}

fn enter(plan: &Plan<'_>, socket: &ChildEnd) -> Result<Program, Error> {
    fault::point("exec.child-born");
    let process = plan.request.process;
    let affinity = process.exec_cpu_affinity().as_ref();
    set_affinity(affinity.and_then(|one| one.initial().as_deref()))?;
    if !plan.helped {
        plan.entrance.pass()?;
    }
    fault::point("exec.child-in-cgroup");
    match affinity {
        None => attributes::reset_affinity(),
        Some(affinity) => set_affinity(affinity.cpu_affinity_final().as_deref())?,
    }
    // With the rights of the host, before they are given up for those of the container.
    limits::set_own_oom_score(process)?;
    limits::set_rlimits(process)?;
    hide_from_tracing()?;
    nix::unistd::setsid().context(|| "cannot make a session".to_owned())?;
    attributes::set(process)?;
    plan.stdio.put_in_place()?;
    let profile = attributes::Profile::open(process)?;
    // The pid namespace was chosen by the parent: this process was born in it.
    let born_in = match plan.helped {
        true => BY_HELPER,
        false => CloneFlags::CLONE_NEWPID,
    };
    // Not by complement, which leaves out the flag that nix does not know.
    namespaces::join(plan.init.as_fd(), plan.foreign.difference(born_in))?;
    if plan.foreign.contains(CloneFlags::CLONE_NEWUSER) {
        namespaces::become_root()?;
    }
    fault::point("exec.child-in-namespaces");
    if let Some(console) = plan.stdio.console() {
        rootfs::own_terminal(console)?;
    }
    let personality = plan.request.linux.map(|linux| linux.personality().as_ref());
    attributes::set_personality(personality.flatten())?;
    profile.apply()?;
    attributes::set_umask(process);
    close_on_exec_from(plan.request.preserve_fds.saturating_add(3))?;
    let program = plan.workload.prepare(socket)?;
    fault::point("exec.child-prepared");
    Ok(program)
}

fn set_affinity(cpus: Option<&str>) -> Result<(), Error> {
    match cpus.filter(|cpus| !cpus.is_empty()) {
        None => Ok(()),
        Some(cpus) => set_cpuset_affinity_from_string(Pid::from_raw(0), cpus)
            .map_err(io::Error::other)
            .context(|| format!("cannot set process.execCPUAffinity {cpus:?}")),
    }
}
