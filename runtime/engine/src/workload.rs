//! The last steps of a process on its way into the container's program, the same for create and exec.
//!
//! This code runs inside the container's namespaces with all rights, until it gives them up. What it reads there
//! (/etc/passwd, the program's path) is hostile; it never executes or loads anything of it before `execve`.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use caps::Capability;
use libcontainer::capabilities::CapabilityExt;
use nix::unistd::{AccessFlags, Gid, Uid};
use oci_spec::runtime::{Capabilities, Hook, LinuxCapabilities, PosixRlimit, Process};

use crate::error::{Context, Error};
use crate::handshake::{ChildEnd, Message};
use crate::hooks;
use crate::limits;
use crate::report::Failure;
use crate::seccomp::Filter;

/// Capability sets as the kernel takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CapabilitySets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl CapabilitySets {
    pub(crate) fn new(given: Option<&LinuxCapabilities>) -> Self {
        let Some(given) = given else {
            return Self::default();
        };
        let bits = |set: &Option<Capabilities>| {
            set.iter()
                .flatten()
                .fold(0u64, |bits, one| bits | 1 << one.to_cap().index())
        };
        let (permitted, inheritable) = (bits(given.permitted()), bits(given.inheritable()));
        Self {
            bounding: bits(given.bounding()),
            effective: bits(given.effective()),
            permitted,
            inheritable,
            // The kernel gives no others, and the other runtimes' sample configurations ask for some.
            ambient: bits(given.ambient()) & permitted & inheritable,
        }
    }

    /// The capabilities that must be permitted but are not among those given.
    fn missing(&self, have: u64) -> Vec<String> {
        let missing = (self.permitted | self.effective) & !have;
        caps::all()
            .into_iter()
            .filter(|one| missing & 1 << one.index() != 0)
            .map(|one| one.to_string())
            .collect()
    }
}

/// The container's program and the rights it runs with.
pub(crate) struct Workload {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    rlimits: Vec<PosixRlimit>,
    pub(crate) capabilities: CapabilitySets,
    pub(crate) no_new_privileges: bool,
    pub(crate) seccomp: Option<Filter>,
    pub(crate) terminal_size: Option<(u16, u16)>,
    pub(crate) terminal: bool,
    /// The name of a new session keyring.
    pub(crate) keyring: Option<CString>,
    pub(crate) start_hooks: Vec<Hook>,
    pub(crate) state: serde_json::Value,
}

/// A program that was found inside the container.
pub(crate) struct Program {
    path: CString,
    env: Vec<CString>,
}

impl Workload {
    pub(crate) fn new(process: &Process, seccomp: Option<Filter>) -> Self {
        let user = process.user();
        Self {
            args: process.args().clone().unwrap_or_default(),
            env: process.env().clone().unwrap_or_default(),
            cwd: process.cwd().clone(),
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            rlimits: process.rlimits().clone().unwrap_or_default(),
            capabilities: CapabilitySets::new(process.capabilities().as_ref()),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            seccomp,
            terminal_size: process.console_size().map(|size| {
                let limit = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
                (limit(size.height()), limit(size.width()))
            }),
            terminal: process.terminal().unwrap_or(false),
            keyring: None,
            start_hooks: Vec::new(),
            state: serde_json::Value::Null,
        }
    }

    /// Takes every step that can fail, down to finding the program, so that a failure is one of create.
    pub(crate) fn prepare(&self, socket: &ChildEnd) -> Result<Program, Error> {
        if let Some(name) = &self.keyring {
            join_keyring(name)?;
        }
        let home = home_of(self.uid);
        let entered = self.enter_cwd();
        if self.terminal {
            self.own_terminal()?;
        }
        if self.no_new_privileges {
            // SAFETY: no memory is passed.
            check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
                .context(|| "cannot set process.noNewPrivileges".to_owned())?;
        } else if let Some(filter) = &self.seccomp {
            // Without no_new_privs only a process with CAP_SYS_ADMIN may do this.
            install(filter, socket)?;
        }
        self.change_user()?;
        if entered.is_err() {
            // On a network file system the user may be let in where root is not.
            nix::unistd::chdir(&self.cwd)
                .map_err(|_| ())
                .or(entered.map_err(|_| ()))
                .map_err(|()| Error::Setup(format!("cannot enter process.cwd {:?}", self.cwd)))?;
        }
        // A descriptor of the host must not have become the working directory.
        nix::unistd::getcwd()
            .ok()
            .filter(|cwd| cwd.is_absolute())
            .ok_or_else(|| {
                Error::Setup(format!(
                    "process.cwd {:?} is not inside the container",
                    self.cwd
                ))
            })?;
        let env = complete_env(&self.env, &home);
        let path = find_program(self.args.first().map_or("", String::as_str), &env)?;
        let env = env
            .into_iter()
            .map(CString::new)
            .collect::<Result<_, _>>()
            .map_err(|_| Error::unsupported("process.env", "it contains NUL"))?;
        if self.no_new_privileges
            && let Some(filter) = self.seccomp.as_ref().filter(|filter| filter.notifies())
        {
            // While there is still somebody to take the listener.
            install(filter, socket)?;
        }
        Ok(Program { path, env })
    }

    /// Gives up the last rights, as late as can be. What runs from here on is of the container.
    pub(crate) fn confine(&self) -> Result<(), Failure> {
        reset_signals();
        if self.no_new_privileges
            && let Some(filter) = self.seccomp.as_ref().filter(|filter| !filter.notifies())
        {
            filter.install().map_err(|error| {
                Failure::Setup(format!("cannot install linux.seccomp: {error}"))
            })?;
        }
        Ok(())
    }

    /// Becomes the program. It returns only to say why it could not.
    pub(crate) fn become_program(&self, program: &Program) -> Failure {
        match self.execute(program) {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    fn execute(&self, program: &Program) -> Result<std::convert::Infallible, Failure> {
        let args: Vec<CString> = self
            .args
            .iter()
            .map(|one| CString::new(one.as_str()))
            .collect::<Result<_, _>>()
            .map_err(|_| Failure::Setup("process.args contains NUL".to_owned()))?;
        let Err(error) = nix::unistd::execve(&program.path, &args, &program.env);
        let name = self.args.first().map_or("", String::as_str);
        let text = format!("exec {name}: {}", describe(error.into()));
        Err(match error {
            nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR => Failure::NotFound(text),
            _ => Failure::NotExecutable(text),
        })
    }

    /// Runs the hooks that run in the container just before its program.
    pub(crate) fn run_start_hooks(&self, program: &Program) -> Result<(), Error> {
        if self.start_hooks.is_empty() {
            return Ok(());
        }
        let env: Vec<(&OsStr, &OsStr)> = program
            .env
            .iter()
            .filter_map(|entry| {
                let bytes = entry.as_bytes();
                let at = bytes.iter().position(|byte| *byte == b'=')?;
                Some((
                    OsStr::from_bytes(&bytes[..at]),
                    OsStr::from_bytes(&bytes[at + 1..]),
                ))
            })
            .collect();
        let state = self.state.to_string();
        let surroundings = hooks::Surroundings {
            state: state.as_bytes(),
            directory: Path::new("."),
            env: &env,
        };
        let kind = hooks::Kind::StartContainer;
        Ok(hooks::run(kind, &self.start_hooks, &surroundings)?)
    }

    fn enter_cwd(&self) -> Result<(), Error> {
        let context = || format!("cannot enter process.cwd {:?}", self.cwd);
        match nix::unistd::chdir(&self.cwd) {
            Err(nix::errno::Errno::ENOENT) => {
                // As others do: an image may name a directory that it does not have.
                fs::create_dir_all(&self.cwd).context(context)?;
                nix::unistd::chdir(&self.cwd).context(context)
            }
            other => other.context(context),
        }
    }

    /// Gives the terminal to the user, who could not open it again otherwise, and sets its size.
    fn own_terminal(&self) -> Result<(), Error> {
        if let Some((rows, columns)) = self.terminal_size {
            let size = libc::winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // SAFETY: the structure is the one that this request reads.
            check(unsafe { libc::ioctl(0, libc::TIOCSWINSZ, &raw const size) })
                .context(|| "cannot set process.consoleSize".to_owned())?;
        }
        if self.uid != 0 {
            // Not fatal: on a read-only or foreign devpts the terminal works all the same.
            // SAFETY: no memory is passed.
            let _ = unsafe { libc::fchown(0, self.uid, libc::gid_t::MAX) };
        }
        Ok(())
    }

    fn change_user(&self) -> Result<(), Error> {
        let permitted = current_permitted()?;
        let missing = self.capabilities.missing(permitted);
        if !missing.is_empty() {
            return Err(Error::Setup(format!(
                "process.capabilities: {} cannot be given, since the runtime itself does not have it",
                missing.join(", ")
            )));
        }
        limits::lower_rlimits(&self.rlimits)?;
        self.drop_bounding()?;
        // SAFETY: no memory is passed.
        check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) })
            .context(|| "cannot keep capabilities".to_owned())?;
        self.set_groups()?;
        let (gid, uid) = (Gid::from_raw(self.gid), Uid::from_raw(self.uid));
        nix::unistd::setresgid(gid, gid, gid)
            .context(|| format!("cannot become process.user.gid {gid}"))?;
        nix::unistd::setresuid(uid, uid, uid)
            .context(|| format!("cannot become process.user.uid {uid}"))?;
        // SAFETY: no memory is passed.
        check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) })
            .context(|| "cannot stop keeping capabilities".to_owned())?;
        set_capabilities(&self.capabilities)
    }

    fn set_groups(&self) -> Result<(), Error> {
        let groups: Vec<libc::gid_t> = self.groups.clone();
        // SAFETY: the array is as long as said.
        let answer = unsafe { libc::setgroups(groups.len(), groups.as_ptr()) };
        match check(answer) {
            // In a user namespace with setgroups denied nobody can have more groups; asking for none is then granted.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) && groups.is_empty() => Ok(()),
            other => other.context(|| format!("cannot set process.user.additionalGids {groups:?}")),
        }
    }

    fn drop_bounding(&self) -> Result<(), Error> {
        for bit in 0..64 {
            // SAFETY: no memory is passed.
            match unsafe { libc::prctl(libc::PR_CAPBSET_READ, bit, 0, 0, 0) } {
                // Beyond the last one that the kernel knows.
                answer if answer < 0 => break,
                0 => continue,
                _ => {}
            }
            if self.capabilities.bounding & 1 << bit == 0 {
                // SAFETY: no memory is passed.
                check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, bit, 0, 0, 0) })
                    .context(|| format!("cannot drop capability {bit} from the bounding set"))?;
            }
        }
        Ok(())
    }
}

/// Puts a filter in force, and hands its listener over if it notifies.
fn install(filter: &Filter, socket: &ChildEnd) -> Result<(), Error> {
    let context = || "cannot install linux.seccomp".to_owned();
    match filter.install().context(context)? {
        None => Ok(()),
        Some(listener) => {
            socket.send(&Message::Listener(listener));
            socket.wait()
        }
    }
}

/// The environment in the order given, each variable once and as it was given last, with HOME if it has none.
fn complete_env(env: &[String], home: &str) -> Vec<String> {
    let name = |entry: &String| entry.split('=').next().unwrap_or_default().to_owned();
    let mut seen = HashSet::new();
    let mut complete: Vec<String> = env.to_vec();
    complete.reverse();
    complete.retain(|entry| seen.insert(name(entry)) && entry != "HOME=");
    complete.reverse();
    if !complete.iter().any(|entry| entry.starts_with("HOME=")) {
        complete.push(format!("HOME={home}"));
    }
    complete
}

/// The home directory of a user by the container's /etc/passwd, read as text and with a limit.
fn home_of(uid: u32) -> String {
    let lookup = || -> Option<String> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
            .open("/etc/passwd")
            .ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut text = Vec::new();
        file.take(1 << 20).read_to_end(&mut text).ok()?;
        home_in(&String::from_utf8_lossy(&text), uid)
    };
    lookup().unwrap_or_else(|| "/".to_owned())
}

fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let home = *fields.get(5)?;
        (fields.get(2)?.parse() == Ok(uid) && home.starts_with('/') && !home.contains('\0'))
            .then(|| home.to_owned())
    })
}

/// Looks the program up as a shell would, in the container and as its user.
fn find_program(name: &str, env: &[String]) -> Result<CString, Error> {
    let refuse = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => {
            Error::CommandNotFound(format!("exec: {name:?}: stat {name}: {}", describe(error)))
        }
        // As the kernel would have it: by this word clients tell exit code 126 (podman's `exec`, docker).
        Some(libc::EISDIR) => Error::CommandNotExecutable(format!(
            "exec: {name:?}: is a directory: permission denied"
        )),
        _ => Error::CommandNotExecutable(format!("exec: {name:?}: {}", describe(error))),
    };
    let found = |path: &Path| {
        CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Error::unsupported("process.args", "it contains NUL"))
    };
    if name.contains('/') {
        let path = Path::new(name);
        executable(path).map_err(refuse)?;
        return found(path);
    }
    let path = env
        .iter()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut denied = None;
    for directory in path.split(':') {
        // An empty entry is the working directory.
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match executable(&candidate) {
            Ok(()) if !name.is_empty() => return found(&candidate),
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => denied = Some(error),
            _ => {}
        }
    }
    match denied {
        Some(error) => Err(refuse(error)),
        None => Err(Error::CommandNotFound(format!(
            "exec: {name:?}: executable file not found in $PATH"
        ))),
    }
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    let any_bit = metadata.permissions().mode() & 0o111 != 0;
    may_execute(path)?;
    if !any_bit || metadata.mode() & libc::S_IFMT != libc::S_IFREG {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Ok(())
}

/// Asks the C library first, which takes calls that every filter knows but leaves out what capabilities permit; then the
/// kernel itself (faccessat2(2)).
fn may_execute(path: &Path) -> nix::Result<()> {
    let (mode, flags) = (AccessFlags::X_OK, nix::fcntl::AtFlags::AT_EACCESS);
    match nix::unistd::eaccess(path, mode) {
        Err(denied @ nix::errno::Errno::EACCES) => {
            nix::unistd::faccessat(None, path, mode, flags).map_err(|_| denied)
        }
        other => other,
    }
}

/// The kernel's words, in lower case and without the number, as users of other runtimes know them.
fn describe(error: io::Error) -> String {
    let text = match error.raw_os_error() {
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    };
    let mut letters = text.chars();
    letters
        .next()
        .map(|first| first.to_lowercase().chain(letters).collect())
        .unwrap_or_default()
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Brings up `lo` in the network namespace of this process.
///
/// # Errors
/// The kernel's.
pub fn loopback_up() -> Result<(), Error> {
    let context = || "cannot bring up the loopback device".to_owned();
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context(context)?;
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the structure is the one that this request reads.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    })
    .context(context)
}

/// A session keyring of its own, so that keys of the caller are out of reach.
fn join_keyring(name: &CString) -> Result<(), Error> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: the name ends with NUL.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            name.as_ptr(),
            0,
            0,
            0,
        )
    };
    if answer >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOSYS) {
        // A kernel without keys has none to keep apart.
        return Ok(());
    }
    Err(error).context(|| {
        "cannot make a session keyring (--no-new-keyring keeps the caller's)".to_owned()
    })
}

/// Kernel ABI: `struct __user_cap_header_struct`, version 3.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Kernel ABI: `struct __user_cap_data_struct`, of which version 3 has two, low bits first.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

fn current_permitted() -> Result<u64, Error> {
    let mut header = CapabilityHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let mut data = [CapabilityData::default(); 2];
    // SAFETY: the kernel fills the two structures of this version.
    let answer = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    check(answer as libc::c_int).context(|| "cannot read capabilities".to_owned())?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

fn set_capabilities(sets: &CapabilitySets) -> Result<(), Error> {
    let mut header = CapabilityHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let part = |shift: u32| CapabilityData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [part(0), part(32)];
    // SAFETY: the kernel reads the two structures of this version.
    let answer = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    check(answer as libc::c_int).context(|| "cannot set process.capabilities".to_owned())?;
    // SAFETY: no memory is passed.
    let answer = unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    };
    check(answer).context(|| "cannot clear ambient capabilities".to_owned())?;
    for bit in (0..64).filter(|bit| sets.ambient & 1 << bit != 0) {
        // SAFETY: no memory is passed.
        let answer =
            unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, bit, 0, 0) };
        check(answer).context(|| {
            let name = caps::all()
                .into_iter()
                .find(|one: &Capability| one.index() == bit as u8)
                .map_or_else(|| bit.to_string(), |one| one.to_string());
            format!(
                "cannot raise process.capabilities.ambient {name} (it must be permitted and inheritable too)"
            )
        })?;
    }
    Ok(())
}

/// Gives the program default signal handling and nothing blocked, whatever our caller had.
fn reset_signals() {
    /// Kernel ABI: `struct sigaction` of rt_sigaction(2); all zero is the default action.
    const DEFAULT: [u64; 4] = [0; 4];
    for signal in 1..=64 {
        // SAFETY: the default action is always sound; the kernel refuses it for SIGKILL and SIGSTOP. The C library
        // would refuse it for its own signals too, which a caller may have been started with ignored.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            );
        }
    }
    let empty = nix::sys::signal::SigSet::empty();
    let _ = empty.thread_set_mask();
}

/// Marks every descriptor from a number on as closed by execve(2).
pub(crate) fn close_on_exec_from(first: u32) -> Result<(), Error> {
    // SAFETY: no memory is passed, and descriptors stay open until execve.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(answer as libc::c_int).context(|| "cannot mark descriptors close-on-exec".to_owned())
}

/// Marks this process so that processes of the namespaces it joins cannot look into it.
pub(crate) fn hide_from_tracing() -> Result<(), Error> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })
        .context(|| "cannot make the process non-dumpable".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_the_seventh_fields_neighbour() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbad\nx:y:z\nu:x:7:7::/home/u:/bin/sh\n";
        assert_eq!(home_in(passwd, 7).as_deref(), Some("/home/u"));
        assert_eq!(home_in(passwd, 8), None);
        assert_eq!(home_in("u:x:7:7::relative:/bin/sh", 7), None);
    }

    #[test]
    fn the_environment_keeps_its_order_and_gets_a_home() {
        let env = ["B=2".to_owned(), "A=1".to_owned()];
        assert_eq!(complete_env(&env, "/root"), ["B=2", "A=1", "HOME=/root"]);
        let env = ["HOME=".to_owned()];
        assert_eq!(complete_env(&env, "/h"), ["HOME=/h"]);
        let env = ["HOME=/mine".to_owned()];
        assert_eq!(complete_env(&env, "/h"), ["HOME=/mine"]);
        let env = ["A=1", "HOME=/mine", "B=2", "A=", "HOME="].map(str::to_owned);
        assert_eq!(complete_env(&env, "/h"), ["B=2", "A=", "HOME=/h"]);
    }

    #[test]
    fn a_program_is_found_as_a_shell_finds_it() {
        let env = ["PATH=/nowhere:/bin".to_owned()];
        assert_eq!(
            find_program("sh", &env).unwrap().to_str().unwrap(),
            "/bin/sh"
        );
        let error = find_program("no-such", &env).unwrap_err();
        assert_eq!(
            error.to_string(),
            "exec: \"no-such\": executable file not found in $PATH"
        );
        assert_eq!(error.exit_code(), 127);
        let error = find_program("/no/such", &env).unwrap_err();
        assert_eq!(
            error.to_string(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        let error = find_program("/etc", &env).unwrap_err();
        assert_eq!(
            error.to_string(),
            "exec: \"/etc\": is a directory: permission denied"
        );
        assert_eq!(error.exit_code(), 126);
        assert_eq!(
            find_program("/etc/passwd", &env).unwrap_err().exit_code(),
            126
        );
        assert_eq!(find_program("", &env).unwrap_err().exit_code(), 127);
    }

    #[test]
    fn missing_capabilities_are_named() {
        let sets = CapabilitySets {
            permitted: 1 << Capability::CAP_SYS_RESOURCE.index(),
            ..CapabilitySets::default()
        };
        assert_eq!(sets.missing(0), ["CAP_SYS_RESOURCE"]);
        assert!(sets.missing(u64::MAX).is_empty());
    }
}
