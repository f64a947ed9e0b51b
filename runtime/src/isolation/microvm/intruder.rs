//! What a guest might try that has taken over a thread of its VMM process: for tests, in builds with debug assertions.
//!
//! The thread is confined by then and the process in its jail. An attempt either ends the process, which says so itself, or
//! is told on standard error with what the kernel answered; the process then ends too.

use std::io;
use std::sync::OnceLock;

use engine::fault;
use vmm::seccomp::Thread;

/// The kind of thread and the attempt, as `Fs open`. A confined thread could not ask for it.
static ORDER: OnceLock<String> = OnceLock::new();

/// What is to be called on each thread: nothing, unless a test says so.
pub fn intruder() -> Option<fn(Thread)> {
    ORDER.set(fault::intruder()?).ok()?;
    Some(intrude)
}

/// Does what was ordered, on the first thread of that kind.
fn intrude(thread: Thread) {
    let order = ORDER.get().and_then(|order| order.split_once(' '));
    let Some((kind, attempt)) = order else {
        return;
    };
    if format!("{thread:?}") != kind {
        return;
    }
    let answer = match tried(attempt) {
        -1 => io::Error::last_os_error().to_string(),
        _ => "done".to_owned(),
    };
    eprintln!("intruder: {attempt}: {answer}");
    std::process::exit(1);
}

/// What the system call returned.
fn tried(attempt: &str) -> libc::c_long {
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: each call gets valid C strings or null, which the kernel refuses; the memory that is filled was mapped for that.
    unsafe {
        match attempt {
            "open" => libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY).into(),
            "socket" => libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into(),
            "ptrace" => libc::ptrace(libc::PTRACE_ATTACH, 1, 0, 0),
            "read-memory" => libc::process_vm_readv(1, none.cast(), 0, none.cast(), 0, 0) as i64,
            "exec" => libc::execv(c"/proc/self/exe".as_ptr(), [none].as_ptr()).into(),
            "mount" => libc::mount(none, c"/".as_ptr(), c"proc".as_ptr(), 0, none.cast()).into(),
            "kill" => libc::kill(1, libc::SIGKILL).into(),
            "memory" => {
                let length = 2 << 30;
                let (protection, flags) = (
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                );
                let area = libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0);
                if area == libc::MAP_FAILED {
                    return -1;
                }
                area.cast::<u8>().write_bytes(1, length);
                0
            }
            // No test expects that it is done.
            _ => 0,
        }
    }
}
