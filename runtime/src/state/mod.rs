//! The state root: one directory a container, with its record.
//!
//! A record is written before anything else of its container exists, in one rename with its directory, and replaced as
//! a whole from then on: whoever reads finds a valid record at any time, without a lock. Who changes a container holds
//! its lock, a POSIX record lock on the file `lock`. It is not `flock(2)`, because forked children share a `flock`
//! with us, and a container's init process would hold it while it waits for `start`.
//!
//! The root is writable for its owner alone. What others could write into it is parsed with suspicion all the same.

mod record;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use engine::fault;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

pub use record::{Phase, RECORD_VERSION, Record, Status};

use crate::id::ContainerId;
use crate::process::ProcessId;

const RECORD_FILE: &str = "state.json";
const LOCK_FILE: &str = "lock";
/// The directory in the root for what is being made or removed; no id begins so. It stays, for the next one.
const PENDING: &str = "~pending";

/// The bundle's configuration as it was used, in the container's directory.
pub const SAVED_CONFIG: &str = "config.json";

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// No such container.
    #[error("container does not exist: {id}")]
    NotFound {
        /// The id.
        id: ContainerId,
    },
    /// The id is taken.
    #[error("container with given ID already exists: {id}")]
    Exists {
        /// The id.
        id: ContainerId,
    },
    /// A file operation failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// As a verb.
        operation: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The record is junk.
    #[error("{}: not a state record: `rt delete --force` removes the container's directory", path.display())]
    Junk {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The record has another version.
    #[error("{}: a record of version {version}, this rt reads version {RECORD_VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version found.
        version: u64,
    },
    /// The record is another container's.
    #[error("{}: the record of {found:?}", path.display())]
    OtherId {
        /// The file.
        path: PathBuf,
        /// The id in it.
        found: ContainerId,
    },
}

impl StateError {
    /// Whether the record, as opposed to the file system, is what is bad.
    pub fn is_junk(&self) -> bool {
        match self {
            Self::Junk { .. } | Self::Version { .. } | Self::OtherId { .. } => true,
            Self::Io { source, path, .. } => {
                source.kind() == io::ErrorKind::NotFound && path.ends_with(RECORD_FILE)
            }
            Self::NotFound { .. } | Self::Exists { .. } => false,
        }
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io {
        operation,
        path,
        source,
    }
}

/// A container of the root: its id, and its record or what is wrong with it.
pub type Listed = (ContainerId, Result<Record, StateError>);

/// The directory of all containers.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store at `root`, which need not exist yet.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Makes a container's directory with its first record, and locks it.
    ///
    /// # Errors
    /// The id is taken, or the directory could not be made; nothing is left then.
    pub fn create(&self, record: Record) -> Result<LockedContainer, StateError> {
        let id = &record.id;
        let dir = self.root.join(id);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(io_error("create the state root", &self.root))?;
        if fs::symlink_metadata(&dir).is_ok() {
            return Err(StateError::Exists { id: id.clone() });
        }
        self.sweep();
        let pending = self.pending()?;
        DirBuilder::new()
            .mode(0o700)
            .create(&pending)
            .map_err(io_error("create", &pending))?;
        fault::point("state.directory-made");
        let made = Self::fill(&pending, &record).and_then(|lock| {
            renameat_with(CWD, &pending, CWD, &dir, RenameFlags::NOREPLACE).map_err(|errno| {
                match errno {
                    Errno::EXIST => StateError::Exists { id: id.clone() },
                    errno => StateError::Io {
                        operation: "create",
                        path: dir.clone(),
                        source: errno.into(),
                    },
                }
            })?;
            fault::point("state.id-taken");
            Ok(lock)
        });
        match made {
            Ok(lock) => Ok(LockedContainer {
                store: self.clone(),
                dir,
                record,
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_dir_all(&pending);
                Err(error)
            }
        }
    }

    fn fill(dir: &Path, record: &Record) -> Result<File, StateError> {
        let lock = lock(&dir.join(LOCK_FILE), true)?;
        write_record(dir, record)?;
        Ok(lock)
    }

    /// Reads a container's record, which may change as soon as this returns.
    ///
    /// # Errors
    /// There is no such container, or its record is junk.
    pub fn load(&self, id: &ContainerId) -> Result<Record, StateError> {
        read_record(&self.root.join(id), id)
    }

    /// Locks a container and reads its record. Waits while another process changes the container.
    ///
    /// # Errors
    /// There is no such container, or its record is junk.
    pub fn lock(&self, id: &ContainerId) -> Result<LockedContainer, StateError> {
        let dir = self.root.join(id);
        let path = dir.join(LOCK_FILE);
        loop {
            let lock = match lock(&path, false) {
                Ok(lock) => lock,
                Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    // No lock file: the directory is no container's or there is none. Reading it says which.
                    read_record(&dir, id)?;
                    return Err(StateError::Io {
                        operation: "lock",
                        path,
                        source,
                    });
                }
                Err(error) => return Err(error),
            };
            // While we waited the container may have been deleted, and even made again.
            let ours = lock.metadata().map_err(io_error("lock", &path))?;
            if fs::metadata(&path)
                .is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino()))
            {
                let record = read_record(&dir, id)?;
                return Ok(LockedContainer {
                    store: self.clone(),
                    dir,
                    record,
                    _lock: lock,
                });
            }
        }
    }

    /// Removes the directory of a container whose record cannot be read.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn discard(&self, id: &ContainerId) -> Result<(), StateError> {
        self.remove(&self.root.join(id))
    }

    /// The directory of a container, existing or not.
    pub fn dir(&self, id: &ContainerId) -> PathBuf {
        self.root.join(id)
    }

    /// All containers, sorted by id, each with its record or what is wrong with it.
    ///
    /// # Errors
    /// The state root cannot be read; that there is none means no containers.
    pub fn list(&self) -> Result<Vec<Listed>, StateError> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                return Err(StateError::Io {
                    operation: "read",
                    path: self.root.clone(),
                    source,
                });
            }
        };
        let mut containers = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("read", &self.root))?;
            let Some(id) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<ContainerId>().ok())
            else {
                continue;
            };
            match self.load(&id) {
                // Deleted since the directory was read.
                Err(StateError::NotFound { .. }) => {}
                loaded => containers.push((id, loaded)),
            }
        }
        containers.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(containers)
    }

    /// Moves the directory away, so that the id is free at once and nobody sees half a container, and removes it.
    fn remove(&self, dir: &Path) -> Result<(), StateError> {
        let pending = self.pending()?;
        fs::rename(dir, &pending).map_err(io_error("remove", dir))?;
        fault::point("state.id-free");
        fs::remove_dir_all(&pending).map_err(io_error("remove", &pending))?;
        fault::point("state.directory-removed");
        self.sweep();
        Ok(())
    }

    /// A name for a directory that this process makes or removes.
    fn pending(&self) -> Result<PathBuf, StateError> {
        let dir = self.root.join(PENDING);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(io_error("create", &dir))?;
        let me = ProcessId::of(std::process::id().cast_signed())
            .map_err(io_error("read", Path::new("/proc/self/stat")))?;
        // The time tells apart what threads of one process do at once.
        let now = crate::clock::now().as_nanos();
        Ok(dir.join(format!("{}-{}-{now}", me.pid, me.start_time)))
    }

    /// Removes what processes that were killed while they made or removed a directory left behind.
    pub fn sweep(&self) {
        let Ok(entries) = fs::read_dir(self.root.join(PENDING)) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let mut parts = name.to_str().into_iter().flat_map(|name| name.split('-'));
            let mut parts = parts.by_ref().map(str::parse::<u64>);
            let (Some(Ok(pid)), Some(Ok(start_time))) = (parts.next(), parts.next()) else {
                continue;
            };
            let Ok(pid) = i32::try_from(pid) else {
                continue;
            };
            if !(ProcessId { pid, start_time }).is_alive() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// A container whose lock we hold until this is dropped.
#[derive(Debug)]
pub struct LockedContainer {
    store: Store,
    dir: PathBuf,
    record: Record,
    _lock: File,
}

impl LockedContainer {
    /// The container's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The record as it is on disk.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes the record on disk, as a whole.
    ///
    /// # Errors
    /// It could not be written; the old one is still there.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), StateError> {
        let mut record = self.record.clone();
        change(&mut record);
        write_record(&self.dir, &record)?;
        self.record = record;
        Ok(())
    }

    /// Writes a file of the container's, as a whole.
    ///
    /// # Errors
    /// It could not be written.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), StateError> {
        write_atomically(&self.dir.join(name), content)
    }

    /// Removes the container's directory with all that is in it.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn remove(self) -> Result<(), StateError> {
        self.store.remove(&self.dir)
    }
}

/// Opens and locks a file. The lock belongs to this process alone and ends with it, or when the file is closed.
fn lock(path: &Path, create: bool) -> Result<File, StateError> {
    let file = OpenOptions::new()
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(io_error("open", path))?;
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    loop {
        match fcntl(file.as_raw_fd(), FcntlArg::F_SETLKW(&whole)) {
            Ok(_) => return Ok(file),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(io_error("lock", path)(errno.into())),
        }
    }
}

fn read_record(dir: &Path, id: &ContainerId) -> Result<Record, StateError> {
    let path = dir.join(RECORD_FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error)
            if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(dir).is_err() =>
        {
            return Err(StateError::NotFound { id: id.clone() });
        }
        Err(source) => {
            return Err(StateError::Io {
                operation: "read",
                path,
                source,
            });
        }
    };
    let junk = |source| StateError::Junk {
        path: path.clone(),
        source,
    };
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(junk)?;
    // The version first: what else a record of another version holds is not known.
    if let Some(version) = value.get("version").and_then(serde_json::Value::as_u64)
        && version != u64::from(RECORD_VERSION)
    {
        return Err(StateError::Version { path, version });
    }
    let record: Record = serde_json::from_value(value).map_err(junk)?;
    if record.id != *id {
        return Err(StateError::OtherId {
            path,
            found: record.id,
        });
    }
    Ok(record)
}

fn write_record(dir: &Path, record: &Record) -> Result<(), StateError> {
    let path = dir.join(RECORD_FILE);
    let text = serde_json::to_vec(record).map_err(|source| StateError::Junk {
        path: path.clone(),
        source,
    })?;
    write_atomically(&path, &text)
}

/// Writes a file beside `path` and renames it there: a reader finds the old content or the new one.
///
/// # Errors
/// It could not be written; the old content is still there.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<(), StateError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| {
            fault::point("state.file-written");
            fs::rename(&temporary, path)
        });
    fault::point("state.file-renamed");
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        StateError::Io {
            operation: "write",
            path: path.to_owned(),
            source,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isolation::Model;

    fn record(id: &str) -> Record {
        Record {
            version: RECORD_VERSION,
            id: id.parse().unwrap(),
            isolation: Model::Container,
            phase: Phase::Creating,
            creator: None,
            process: None,
            oci_version: "1.2.0".into(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            cgroup_path: "/rt-x".into(),
            scope: None,
            created: "2026-01-01T00:00:00.000000000Z".into(),
            owner: 0,
            annotations: [("a".to_owned(), "b".to_owned())].into(),
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().join("root"));
        (dir, store)
    }

    fn names(store: &Store) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&store.root)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != PENDING)
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_record_survives_the_way_through_the_disk() {
        let (_dir, store) = store();
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        let mut locked = store.create(record("a")).unwrap();
        locked
            .update(|record| {
                record.phase = Phase::Created;
                record.process = Some(me);
            })
            .unwrap();
        let loaded = store.load(&"a".parse().unwrap()).unwrap();
        assert_eq!(&loaded, locked.record());
        assert_eq!(loaded.status(), Status::Created);
        assert_eq!(loaded.live_pid(), Some(me.pid));
    }

    #[test]
    fn an_id_is_taken_once_and_nothing_else_is_left() {
        let (_dir, store) = store();
        let first = store.create(record("a")).unwrap();
        let error = store.create(record("a")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "container with given ID already exists: a"
        );
        assert_eq!(names(&store), ["a"]);
        first.remove().unwrap();
        assert!(names(&store).is_empty());
        assert_eq!(
            store.load(&"a".parse().unwrap()).unwrap_err().to_string(),
            "container does not exist: a"
        );
        assert!(store.lock(&"a".parse().unwrap()).is_err());
    }

    #[test]
    fn the_status_is_stopped_when_the_process_is_another_one() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        let mut stale = record("a");
        stale.phase = Phase::Running;
        stale.process = Some(ProcessId {
            start_time: me.start_time + 1,
            ..me
        });
        assert_eq!(stale.status(), Status::Stopped);
        assert_eq!(stale.live_pid(), None);
    }

    #[test]
    fn a_creation_goes_on_as_long_as_its_creator_lives() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        let mut record = record("a");
        record.creator = Some(me);
        assert_eq!(record.status(), Status::Creating);
        record.creator = Some(ProcessId {
            start_time: me.start_time + 1,
            ..me
        });
        assert_eq!(record.status(), Status::Stopped);
    }

    #[test]
    fn junk_is_an_error_that_names_the_file_and_never_a_panic() {
        let (_dir, store) = store();
        drop(store.create(record("a")).unwrap());
        let id: ContainerId = "a".parse().unwrap();
        let path = store.dir(&id).join(RECORD_FILE);
        let valid = fs::read(&path).unwrap();
        for end in 0..valid.len() {
            fs::write(&path, &valid[..end]).unwrap();
            let error = store.load(&id).unwrap_err();
            assert!(error.is_junk(), "{error}");
        }
        fs::write(&path, br#"{"version":2,"future":true}"#).unwrap();
        assert!(matches!(
            store.lock(&id),
            Err(StateError::Version { version: 2, .. })
        ));
        fs::remove_file(&path).unwrap();
        assert!(store.load(&id).unwrap_err().is_junk());
        assert_eq!(store.list().unwrap().len(), 1);
        store.discard(&id).unwrap();
        assert!(names(&store).is_empty());
    }

    #[test]
    fn a_record_of_another_container_is_refused() {
        let (_dir, store) = store();
        drop(store.create(record("a")).unwrap());
        fs::rename(store.root.join("a"), store.root.join("b")).unwrap();
        assert!(matches!(
            store.load(&"b".parse().unwrap()),
            Err(StateError::OtherId { .. })
        ));
    }

    #[test]
    fn what_a_killed_process_left_is_swept() {
        let (_dir, store) = store();
        drop(store.create(record("a")).unwrap());
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        let mine = format!("{}-{}-7", me.pid, me.start_time);
        for name in ["1-1-1", "999999999-1-1", &mine] {
            fs::create_dir(store.root.join(PENDING).join(name)).unwrap();
        }
        drop(store.create(record("b")).unwrap());
        assert_eq!(names(&store), ["a", "b"]);
        let pending = fs::read_dir(store.root.join(PENDING)).unwrap();
        let pending: Vec<_> = pending.map(|one| one.unwrap().file_name()).collect();
        assert_eq!(pending, [mine.as_str()]);
    }

    #[test]
    fn a_child_process_does_not_share_the_lock() {
        let (_dir, store) = store();
        let locked = store.create(record("a")).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        // SAFETY: the child only reads from a pipe and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(writer);
            let _ = io::Read::read(&mut reader, &mut [0]);
            // SAFETY: ends the child without running the test's destructors.
            unsafe { libc::_exit(0) };
        }
        drop(locked);
        drop(store.lock(&"a".parse().unwrap()).unwrap());
        drop(writer);
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap();
    }
}
