//! Terminals: in the foreground, by a console socket, and for exec.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::Duration;

use integration::{Claim, Fixture, Pseudoterminal, ensure, ensure_eq, wait_with_limit};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::json;

use crate::Entry;
use crate::lifecycle::console_socket;

pub const CLAIMS: &[Entry] = &[
    (
        "foreground_terminal_is_a_terminal",
        foreground_terminal_is_a_terminal,
    ),
    (
        "console_socket_gets_the_terminal",
        console_socket_gets_the_terminal,
    ),
    ("exec_with_a_terminal", exec_with_a_terminal),
    (
        "window_size_changes_reach_the_workload",
        window_size_changes_reach_the_workload,
    ),
    (
        "terminal_without_anybody_to_show_it_is_an_error",
        terminal_without_anybody_to_show_it_is_an_error,
    ),
];

const LIMIT: Duration = Duration::from_secs(60);

fn foreground_terminal_is_a_terminal(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["terminal"] = json!(true);
    bundle.script("tty; stty size; read -r line; echo \"<$line>\"; exit 4");
    bundle.save()?;
    let (mut screen, terminal) = Pseudoterminal::open(33, 77)?;
    let mut command = fixture.rt(&["run", "--bundle"]);
    command.arg(bundle.dir()).arg(fixture.id("tty"));
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    let mut child = command.spawn()?;
    drop(command);
    let shown = screen.read_until("33 77", LIMIT);
    ensure!(
        shown.contains("/dev/pts/") || shown.contains("/dev/console"),
        "tty says {shown:?}"
    );
    ensure!(shown.contains("33 77"), "stty says {shown:?}");
    screen.type_text("typed\n")?;
    let shown = screen.read_until("<typed>", LIMIT);
    ensure!(shown.contains("<typed>"), "shown: {shown:?}");
    ensure_eq!(
        wait_with_limit(&mut child, LIMIT)?.code(),
        Some(4),
        "exit code"
    );
    Ok(())
}

/// The descriptor that comes with a message at a socket.
pub fn receive_descriptor(
    listener: &UnixListener,
) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
    let (socket, _) = listener.accept()?;
    let mut name = [0; 4096];
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut buffers = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let [fd] = fds[..]
        {
            // SAFETY: the kernel has just installed this descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err("the console socket got no descriptor".into())
}

fn console_socket_gets_the_terminal(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["terminal"] = json!(true);
    bundle.spec["process"]["consoleSize"] = json!({"height": 11, "width": 22});
    bundle.script("test -t 0 && test -t 1 && test -t 2 && echo all terminals; stty size; cat");
    bundle.save()?;
    let (path, listener) = console_socket(fixture)?;
    let id = fixture.id("console");
    let mut command = fixture.rt(&["run", "--detach", "--console-socket"]);
    command
        .arg(&path)
        .arg("--bundle")
        .arg(bundle.dir())
        .arg(&id);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut screen = Pseudoterminal::from_master(receive_descriptor(&listener)?);
    ensure!(
        wait_with_limit(&mut child, LIMIT)?.success(),
        "run --detach failed"
    );
    // With the line's end, so that what is typed comes behind it.
    let shown = screen.read_until("11 22\r\n", LIMIT);
    ensure!(
        shown.contains("all terminals\r\n") && shown.contains("11 22"),
        "shown: {shown:?}"
    );
    screen.type_text("echoed\n")?;
    let shown = screen.read_until("echoed\r\nechoed\r\n", LIMIT);
    ensure!(shown.contains("echoed\r\nechoed\r\n"), "shown: {shown:?}");
    // Control-D ends cat, and with it the container.
    screen.type_text("\x04")?;
    fixture.wait_for_end(&id)
}

fn exec_with_a_terminal(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("exec-tty");
    fixture.start_detached(&bundle, &id)?;
    let (mut screen, terminal) = Pseudoterminal::open(40, 100)?;
    let mut command = fixture.rt(&[
        "exec",
        "--tty",
        &id,
        "/bin/sh",
        "-c",
        "tty; stty size; exit 6",
    ]);
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    let mut child = command.spawn()?;
    drop(command);
    let shown = screen.read_until("40 100", LIMIT);
    ensure!(
        shown.contains("/dev/pts/") && shown.contains("40 100"),
        "shown: {shown:?}"
    );
    ensure_eq!(
        wait_with_limit(&mut child, LIMIT)?.code(),
        Some(6),
        "exit code"
    );
    Ok(())
}

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, nix::pty::Winsize);

fn window_size_changes_reach_the_workload(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["terminal"] = json!(true);
    bundle.script("trap 'stty size' WINCH; echo ready; while true; do sleep 0.2; done");
    bundle.save()?;
    let (path, listener) = console_socket(fixture)?;
    let id = fixture.id("winch");
    let mut command = fixture.rt(&["run", "--detach", "--console-socket"]);
    command
        .arg(&path)
        .arg("--bundle")
        .arg(bundle.dir())
        .arg(&id);
    let mut child = command.stdout(Stdio::null()).spawn()?;
    let mut screen = Pseudoterminal::from_master(receive_descriptor(&listener)?);
    ensure!(
        wait_with_limit(&mut child, LIMIT)?.success(),
        "run --detach failed"
    );
    screen.read_until("ready", LIMIT);
    let size = nix::pty::Winsize {
        ws_row: 12,
        ws_col: 34,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is a terminal's and the pointer is to a whole winsize.
    unsafe { set_window_size(screen.master().as_raw_fd(), &raw const size) }?;
    let shown = screen.read_until("12 34", LIMIT);
    ensure!(shown.contains("12 34"), "shown: {shown:?}");
    Ok(())
}

fn terminal_without_anybody_to_show_it_is_an_error(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["terminal"] = json!(true);
    bundle.save()?;
    let mut command = fixture.rt(&["create", "--bundle"]);
    let output = command
        .arg(bundle.dir())
        .arg(fixture.id("no-console"))
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "create succeeded");
    ensure!(stderr.contains("console"), "reason: {stderr:?}");
    Ok(())
}
