//! Makes a container's first process: parent and child side.
//!
//! The parent clones straight into the cgroup and the new pid and user namespaces. The child lets libcontainer
//! prepare the root file system and the other namespaces, finishes with the steps of [`Workload`], and waits.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::rc::Rc;

use libcgroups::common::CgroupConfig;
use libcontainer::container::{Container, ContainerStatus, State};
use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::channel::{
    InitReceiver, InitSender, MainReceiver, MainSender, init_channel, main_channel,
};
use libcontainer::process::init::container_init_process;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::OFlag;
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use crate::capture::Capture;
use crate::cgroup::Entrance;
use crate::clone::{Child, ExitGuard, clone, exit_now};
use crate::error::{Context, Error};
use crate::hooks::Kind;
use crate::namespaces::{self, ForChildren};
use crate::report::{self, Failure, Reader, chain};
use crate::seccomp::Filter;
use crate::spec::{adapt, hooks_of, namespace, path_of};
use crate::stdio::Ready;
use crate::workload::{Workload, hide_from_tracing};
use crate::{CreateRequest, Created, Engine, limits, processes};

/// What the two sides have in common before they part.
struct Plan<'a> {
    spec: &'a Spec,
    process: &'a Process,
    args: ContainerArgs,
    workload: Workload,
    entrance: Entrance,
    new_user: bool,
    joined_user: Option<OwnedFd>,
    state: serde_json::Value,
    waits_for_hooks: bool,
}

pub(crate) fn create(engine: &Engine, mut request: CreateRequest<'_>) -> Result<Created, Error> {
    let spec = request.spec;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::unsupported("process", "it is missing"))?;
    check_root(spec)?;
    let seccomp = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref());
    let seccomp = seccomp.map(Filter::compile).transpose()?;
    let stdio = std::mem::replace(&mut request.stdio, crate::Stdio::Inherit);
    let stdio = stdio.ready(process.terminal().unwrap_or(false))?;

    let cgroup = request.cgroup;
    cgroup.create()?;
    let mut resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().clone())
        .unwrap_or_default();
    if resources.devices().is_none() {
        // Without rules a container gets the default devices, not all.
        resources.set_devices(Some(Vec::new()));
    }
    cgroup.apply(&resources)?;

    let adapted = adapt(spec)?;
    let state = serde_json::json!({
        "ociVersion": spec.version(),
        "id": request.id,
        "status": "creating",
        "bundle": request.bundle,
        "annotations": spec.annotations().clone().unwrap_or_default(),
    });
    let mut workload = Workload::new(process, seccomp);
    workload.mounts = adapted.mounts;
    workload.loopback = namespace(spec, LinuxNamespaceType::Network)
        .is_some_and(|network| path_of(network).is_none());
    workload.keyring = keyring(request.id, request.no_new_keyring)?;
    workload.start_hooks = hooks_of(spec)
        .into_iter()
        .find(|(kind, _)| *kind == Kind::StartContainer)
        .map(|(_, hooks)| hooks.to_vec())
        .unwrap_or_default();
    workload.state = state.clone();
    workload.state["status"] = "created".into();

    let waits_for_hooks = adapted.spec.hooks().is_some();
    let notify_listener = NotifyListener::new(&engine.start_socket()).map_err(|error| {
        Error::Setup(format!("cannot make the start socket: {}", chain(&error)))
    })?;
    let args = container_args(&request, adapted.spec, &stdio, notify_listener, &workload)?;
    let plan = Plan {
        spec,
        process,
        args,
        workload,
        entrance: cgroup.entrance()?,
        new_user: namespaces::birth_flags(spec) & libc::CLONE_NEWUSER as u64 != 0,
        joined_user: namespaces::joined_user(spec)?,
        state,
        waits_for_hooks,
    };
    let mut capture = Capture::new().context(|| "cannot make a memory file".to_owned())?;
    let created = capture
        .run(|| launch(&plan))
        .context(|| "cannot use the memory file".to_owned())?;
    created.map_err(|error| match (&error, capture.first()) {
        // libcontainer's own words say more than the name of the step.
        (Error::Setup(text), Some(cause)) if !text.contains(&cause) => {
            Error::Setup(format!("{text}: {cause}"))
        }
        _ => error,
    })
}

/// A root whose /dev is a symbolic link would have its device nodes made wherever that leads, on the host.
fn check_root(spec: &Spec) -> Result<(), Error> {
    let Some(root) = spec.root() else {
        return Ok(());
    };
    let path = root.path();
    let metadata =
        fs::metadata(path).context(|| format!("cannot use root.path {}", path.display()))?;
    if !metadata.is_dir() {
        return Err(Error::unsupported(
            "root.path",
            format!("{} is not a directory", path.display()),
        ));
    }
    let dev = path.join("dev");
    match fs::symlink_metadata(&dev) {
        Ok(metadata) if !metadata.is_dir() => {
            return Err(Error::unsupported(
                "root.path",
                format!("{} is not a directory", dev.display()),
            ));
        }
        _ => {}
    }
    let mounted = spec
        .mounts()
        .iter()
        .flatten()
        .any(|mount| mount.destination() == Path::new("/dev"));
    if !mounted {
        remove_own_nodes(spec, &dev);
    }
    Ok(())
}

/// Removes what an earlier container on the same root was given in /dev: libcontainer makes it anew and expects
/// nothing there. Only links, and nodes of the very device that will be made, are taken for such.
fn remove_own_nodes(spec: &Spec, dev: &Path) {
    for name in ["kcore", "fd", "stdin", "stdout", "stderr"] {
        let link = dev.join(name);
        if fs::symlink_metadata(&link).is_ok_and(|one| one.is_symlink()) {
            let _ = fs::remove_file(link);
        }
    }
    let defaults = [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("tty", 5, 0),
        ("random", 1, 8),
        ("urandom", 1, 9),
    ];
    let given = spec.linux().iter().flat_map(|linux| {
        linux.devices().iter().flatten().filter_map(|one| {
            Some((
                one.path().strip_prefix("/dev").ok()?,
                one.major(),
                one.minor(),
            ))
        })
    });
    let defaults = defaults
        .into_iter()
        .map(|(name, major, minor)| (Path::new(name), major, minor));
    for (name, major, minor) in defaults.chain(given) {
        // Deeper ones could lead out of the root through a link.
        if name.components().count() != 1 {
            continue;
        }
        let node = dev.join(name);
        let same = fs::symlink_metadata(&node).is_ok_and(|one| {
            (one.file_type().is_char_device() || one.file_type().is_block_device())
                && i64::from(libc::major(one.rdev())) == major
                && i64::from(libc::minor(one.rdev())) == minor
        });
        if same {
            let _ = fs::remove_file(node);
        }
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

fn container_args(
    request: &CreateRequest<'_>,
    spec: Spec,
    stdio: &Ready,
    notify_listener: NotifyListener,
    workload: &Workload,
) -> Result<ContainerArgs, Error> {
    let rootfs = spec
        .root()
        .as_ref()
        .map(|root| root.path().clone())
        .unwrap_or_default();
    let rootfs = rootfs
        .canonicalize()
        .context(|| format!("cannot resolve root.path {}", rootfs.display()))?;
    let [stdin, stdout, stderr] = stdio.files();
    let container = Container {
        state: State::new(
            request.id,
            ContainerStatus::Creating,
            None,
            request.bundle.to_owned(),
        ),
        root: request.bundle.to_owned(),
    };
    Ok(ContainerArgs {
        container_type: ContainerType::InitContainer,
        syscall: SyscallType::default(),
        spec: Rc::new(spec),
        rootfs,
        console_socket: stdio.console(),
        notify_listener,
        preserve_fds: i32::try_from(request.preserve_fds)
            .map_err(|_| Error::unsupported("--preserve-fds", "the number is too large"))?,
        container: Some(container),
        user_ns_config: None,
        // Only libcontainer's own parent process would use it.
        cgroup_config: CgroupConfig {
            cgroup_path: request.cgroup.path().to_owned(),
            systemd_cgroup: false,
            container_name: request.id.to_owned(),
        },
        detached: true,
        executor: Box::new(workload.clone()),
        no_pivot: request.no_pivot,
        stdin,
        stdout,
        stderr,
        as_sibling: false,
        pid_file: None,
    })
}

fn channel_error(error: libcontainer::process::channel::ChannelError) -> Error {
    Error::Setup(chain(&error))
}

fn launch(plan: &Plan<'_>) -> Result<Created, Error> {
    let (mut main_sender, main_receiver) = main_channel().map_err(channel_error)?;
    let (init_sender, mut init_receiver) = init_channel().map_err(channel_error)?;
    let (failures, report) = report::pipe()?;
    let (mapped, tell_mapped) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".to_owned())?;

    let birth = ForChildren::of_spec(plan.spec)?;
    let child = clone(
        namespaces::birth_flags(plan.spec),
        plan.entrance.born_in.as_ref().map(AsFd::as_fd),
    )
    .context(|| "cannot make the container's first process".to_owned())?;
    let Some(child) = child else {
        let _guard = ExitGuard;
        drop(tell_mapped);
        let failure = first_process(plan, mapped, &mut main_sender, &mut init_receiver);
        report.send(&failure);
        exit_now(failure.exit_code());
    };
    drop(birth);
    drop(mapped);
    drop(report);
    // The child has the other ends; only with these closed is its end seen.
    let closed = main_sender.close().and_then(|()| init_receiver.close());
    let followed = closed
        .map_err(channel_error)
        .and_then(|()| follow(plan, &child, tell_mapped, main_receiver, init_sender));
    match followed {
        Ok(created) => Ok(created),
        Err(error) => {
            // A child that failed has reported and ended; one that we failed must be ended.
            child.kill_and_reap();
            Err(pick(failures, error))
        }
    }
}

/// The child's own report says more than that it ended.
fn pick(failures: Reader, error: Error) -> Error {
    match (failures.receive(), error) {
        (Some(failure), Error::Setup(_)) => failure.into(),
        (None, Error::Setup(text)) => Error::Setup(text),
        (_, error) => error,
    }
}

/// The parent's part: id maps, hooks, limits; until the first process waits for its start.
fn follow(
    plan: &Plan<'_>,
    child: &Child,
    tell_mapped: OwnedFd,
    mut main_receiver: MainReceiver,
    mut init_sender: InitSender,
) -> Result<Created, Error> {
    if plan.new_user {
        namespaces::write_id_maps(child.pid, plan.spec)?;
        File::from(tell_mapped)
            .write_all(b"m")
            .context(|| "cannot wake the container's first process".to_owned())?;
    } else {
        drop(tell_mapped);
    }
    if plan.waits_for_hooks {
        main_receiver
            .wait_for_hook_request()
            .map_err(channel_error)?;
        run_hooks(plan, child)?;
        init_sender.hook_done().map_err(channel_error)?;
    }
    init_sender.close().map_err(channel_error)?;
    main_receiver.wait_for_init_ready().map_err(channel_error)?;
    main_receiver.close().map_err(channel_error)?;
    limits::set_oom_score(child.pid, plan.process)?;
    limits::raise_rlimits(child.pid, plan.process)?;
    let start_time = processes::start_time(child.pid)
        .ok_or_else(|| Error::Setup("the container's first process has ended".to_owned()))?;
    Ok(Created {
        pid: child.pid,
        start_time,
    })
}

/// The hooks between the namespaces' making and the change of root.
fn run_hooks(plan: &Plan<'_>, child: &Child) -> Result<(), Error> {
    let mut state = plan.state.clone();
    state["pid"] = child.pid.as_raw().into();
    for (kind, hooks) in hooks_of(plan.spec) {
        match kind {
            Kind::Prestart | Kind::CreateRuntime => {
                crate::hooks::run(kind, hooks, state.to_string().as_bytes())?;
            }
            Kind::CreateContainer if !hooks.is_empty() => {
                run_in_container(plan, child, hooks, &state)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Runs hooks in the container's namespaces, where its root is not yet changed: their paths are the host's.
fn run_in_container(
    plan: &Plan<'_>,
    child: &Child,
    hooks: &[oci_spec::runtime::Hook],
    state: &serde_json::Value,
) -> Result<(), Error> {
    let flags = namespaces::foreign(child.pid)?;
    let (failures, report) = report::pipe()?;
    let runner = clone(0, plan.entrance.born_in.as_ref().map(AsFd::as_fd))
        .context(|| "cannot make the process that runs the createContainer hooks".to_owned())?;
    let Some(runner) = runner else {
        let _guard = ExitGuard;
        let run = || -> Result<(), Error> {
            plan.entrance.pass()?;
            namespaces::join(child.pidfd.as_fd(), flags)?;
            crate::hooks::run(Kind::CreateContainer, hooks, state.to_string().as_bytes())?;
            Ok(())
        };
        if let Err(error) = run() {
            report.send(&Failure::Setup(chain(&error)));
            exit_now(1);
        }
        exit_now(0);
    };
    drop(report);
    let failure = failures.receive();
    runner
        .wait()
        .context(|| "cannot wait for the createContainer hooks".to_owned())?;
    match failure {
        None => Ok(()),
        // Not `Setup`, which would be taken for the first process's own failure.
        Some(failure) => Err(Error::Hooks(failure.text().to_owned())),
    }
}

/// The child's part. It returns only to say what failed.
fn first_process(
    plan: &Plan<'_>,
    mapped: OwnedFd,
    main_sender: &mut MainSender,
    init_receiver: &mut InitReceiver,
) -> Failure {
    let enter = || -> Result<(), Error> {
        plan.entrance.pass()?;
        if plan.new_user {
            let mut answer = [0u8; 1];
            File::from(mapped)
                .read_exact(&mut answer)
                .context(|| "the id maps were not written".to_owned())?;
        }
        if let Some(user) = &plan.joined_user {
            namespaces::join_user(user)?;
        }
        if plan.new_user || plan.joined_user.is_some() {
            namespaces::become_root()?;
        }
        hide_from_tracing()
    };
    if let Err(error) = enter() {
        return error.into();
    }
    let error = match container_init_process(&plan.args, main_sender, init_receiver) {
        Ok(()) => return Failure::Setup("the container's program was not run".to_owned()),
        Err(error) => error,
    };
    let failure = plan.workload.found.borrow_mut().failure.take();
    match failure {
        Some(failure) => failure,
        None => Failure::Setup(chain(&error)),
    }
}
