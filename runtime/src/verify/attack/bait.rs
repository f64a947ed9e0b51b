//! What an attacker should not reach: a file, a process, sockets and a key of this host, each with a word that nobody
//! inside can guess.
//!
//! All of it is gone when the [`Bait`] is dropped.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

/// What the attacker is told, so that it does not have to search.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Told {
    /// The word.
    pub token: String,
    /// A file that holds it.
    pub file: PathBuf,
    /// A process whose name is it.
    pub pid: u32,
    /// The name of an abstract socket that says it.
    pub socket: String,
    /// A port of 127.0.0.1 that says it.
    pub port: u16,
    /// The description of a key in the user's keyring that holds it.
    pub key: Option<String>,
    /// The inode numbers of the host's namespaces, by the names of /proc/pid/ns.
    pub namespaces: Vec<(String, u64)>,
    /// The numbers of a disk.
    pub disk: Option<(u64, u64)>,
}

/// The bait.
pub struct Bait {
    told: Told,
    process: Child,
    key: Option<i64>,
}

const USER_KEYRING: libc::c_long = -4;
const KEYCTL_UNLINK: libc::c_long = 9;

impl Bait {
    /// Lays it; the file goes into the new directory `directory`.
    pub fn lay(directory: &Path) -> io::Result<Self> {
        let mut bytes = [0_u8; 16];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        fs::create_dir_all(directory)?;
        let file = directory.join("file");
        fs::write(&file, &token)?;
        // It is the walls that keep the attacker away, not the owner.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
        let socket = format!("rt-bait-{token}");
        let abstract_socket =
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(socket.as_bytes())?)?;
        let port = TcpListener::bind(("127.0.0.1", 0))?;
        let number = port.local_addr()?.port();
        let word = token.clone();
        // They end with this process.
        thread::spawn(move || {
            for stream in abstract_socket.incoming().flatten() {
                let _ = (&stream).write_all(word.as_bytes());
            }
        });
        let word = token.clone();
        thread::spawn(move || {
            for stream in port.incoming().flatten() {
                let _ = (&stream).write_all(word.as_bytes());
            }
        });
        let process = Command::new("/proc/self/exe")
            .arg0(super::program::WAITS)
            .arg(&token)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let key = add_key(&socket, &token);
        let namespaces = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"].into_iter();
        let namespaces = namespaces.filter_map(|name| {
            let file = fs::metadata(format!("/proc/self/ns/{name}")).ok()?;
            Some((name.to_owned(), file.ino()))
        });
        let told = Told {
            token,
            file,
            pid: process.id(),
            key: key.map(|_| socket.clone()),
            socket,
            port: number,
            namespaces: namespaces.collect(),
            disk: disk(),
        };
        Ok(Self { told, process, key })
    }

    /// What the attacker is told.
    pub fn told(&self) -> &Told {
        &self.told
    }
}

impl Drop for Bait {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(key) = self.key {
            // SAFETY: no memory is passed.
            unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_UNLINK, key, USER_KEYRING) };
        }
    }
}

/// Adds a key to the user's keyring; `None` where there is none.
fn add_key(description: &str, word: &str) -> Option<i64> {
    let description = CString::new(description).ok()?;
    // SAFETY: the strings end in NUL, and the word has the length given; the kernel only reads them.
    let key = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            description.as_ptr(),
            word.as_ptr(),
            word.len(),
            USER_KEYRING,
        )
    };
    (key > 0).then_some(key)
}

/// The first disk of this system.
fn disk() -> Option<(u64, u64)> {
    let entries = fs::read_dir("/sys/block").ok()?.flatten();
    let mut disks = entries.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        !["loop", "ram", "zram", "dm-", "md"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    });
    let text = fs::read_to_string(disks.next()?.path().join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
