//! What an attacker should not reach: a file, a process, sockets and a key of this host, each with a word that nobody
//! inside can guess; and two volumes that it is given, beside that file.
//!
//! All of it is gone when the [`Bait`] is dropped, and its directory.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::program::VOLUMES;

/// What the attacker is told, so that it does not have to search.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Told {
    /// The word.
    pub token: String,
    /// A file that holds it.
    pub file: PathBuf,
    /// A process whose name is it, and whose standard output is the file.
    pub pid: u32,
    /// The name of an abstract socket that says it, and hands over a descriptor of the file.
    pub socket: String,
    /// A socket in the file system that does the same.
    pub socket_file: PathBuf,
    /// A port of 127.0.0.1 that says it.
    pub port: u16,
    /// The description of a key in the user's keyring that holds it.
    pub key: Option<String>,
    /// The inode numbers of the host's namespaces, by the names of /proc/pid/ns.
    pub namespaces: Vec<(String, u64)>,
    /// The numbers of a disk.
    pub disk: Option<(u64, u64)>,
    /// The size of the disk that the root file system is on.
    pub disk_below: Disk,
    /// Where the attacker sees a volume, which is beside the directory of the file.
    pub volume: PathBuf,
    /// Where it sees the directory `inner` of that as another volume.
    pub inner: PathBuf,
}

/// How much a file system can hold (statvfs(3)).
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Disk {
    bytes: u64,
    inodes: u64,
}

impl Disk {
    /// The one that `path` is on.
    pub fn of(path: &Path) -> io::Result<Self> {
        let size = nix::sys::statvfs::statvfs(path)?;
        Ok(Self {
            bytes: size.blocks() * size.fragment_size(),
            inodes: size.files(),
        })
    }

    /// Whether it is smaller than another.
    pub fn is_part_of(&self, whole: &Self) -> bool {
        self.bytes < whole.bytes || self.inodes < whole.inodes
    }
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
    /// Lays it, in directories of their own in `place`.
    pub fn lay(place: &Path) -> io::Result<Self> {
        let mut bytes = [0_u8; 16];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let directory = place.join("bait");
        fs::create_dir(&directory)?;
        let file = directory.join("file");
        fs::write(&file, &token)?;
        let socket_file = directory.join("socket");
        let named = engine::with_short_path(&socket_file, |short| UnixListener::bind(short))?;
        let [volume, _] = Self::volumes(place);
        fs::create_dir_all(volume.join("inner"))?;
        // It is the walls that keep the attacker away, not the owner.
        for (path, mode) in [
            (place, 0o711),
            (&file, 0o644),
            (&socket_file, 0o666),
            (&volume, 0o777),
            (&volume.join("inner"), 0o777),
        ] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        let socket = format!("rt-bait-{token}");
        let unnamed = UnixListener::bind_addr(&SocketAddr::from_abstract_name(socket.as_bytes())?)?;
        let port = TcpListener::bind(("127.0.0.1", 0))?;
        let number = port.local_addr()?.port();
        // They end with this process.
        for listener in [unnamed, named] {
            let word = token.clone();
            let handed = File::open(&file)?;
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let _ = hand_over(&stream, &word, &handed);
                }
            });
        }
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
            .stdout(File::open(&file)?)
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
            socket_file,
            port: number,
            namespaces: namespaces.collect(),
            disk: disk(),
            disk_below: Disk::of(place)?,
            volume: VOLUMES[0].into(),
            inner: VOLUMES[1].into(),
        };
        Ok(Self { told, process, key })
    }

    /// The volumes on the host, in the order of [`VOLUMES`].
    pub fn volumes(place: &Path) -> [PathBuf; 2] {
        let volume = place.join("volume");
        [volume.clone(), volume.join("inner")]
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

/// Says the word, and hands over the file with it.
fn hand_over(stream: &UnixStream, word: &str, file: &File) -> io::Result<()> {
    engine::send_with_files(stream, word.as_bytes(), &[file.as_raw_fd()])
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

#[cfg(test)]
pub mod tests {
    use super::*;

    /// What an attacker in no container is told, of a file and of volumes that are plain directories.
    pub fn told(place: &Path) -> Told {
        let [volume, inner] = Bait::volumes(place);
        let file = place.join("bait/file");
        fs::create_dir_all(&inner).unwrap();
        fs::create_dir(place.join("bait")).unwrap();
        fs::write(&file, "word").unwrap();
        Told {
            token: "word".to_owned(),
            file,
            pid: 0,
            socket: String::new(),
            socket_file: PathBuf::new(),
            port: 0,
            key: None,
            namespaces: Vec::new(),
            disk: None,
            disk_below: Disk::of(place).unwrap(),
            volume,
            inner,
        }
    }
}
