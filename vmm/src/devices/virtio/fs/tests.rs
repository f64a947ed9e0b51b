//! The file system device under a fake driver that speaks FUSE to it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::devices::virtio::testing::{Descriptor, Driver, READ, WRITE};

const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x40_0000;
const ANSWER_SIZE: u32 = 0x2_0000;
const QUEUE: usize = 1;
const ROOT: u64 = 1;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const OPEN: u32 = 14;
const FUSE_READ: u32 = 15;
const FUSE_WRITE: u32 = 16;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const READDIRPLUS: u32 = 44;

struct Guest {
    driver: Driver,
    device: Fs,
    directory: TempDir,
    asked: u16,
    uid: u32,
}

/// The bytes after the header of an answer, or an errno.
type Answer = Result<Vec<u8>, i32>;

impl Guest {
    fn new(access: Access, cache: Cache) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let share = Share {
            root: directory.path().to_owned(),
            cache,
            access,
        };
        let tag = Tag::new("test").unwrap();
        let mut device = Fs::new(tag, share, 1, &ThreadHook::none()).unwrap();
        let driver = Driver::new(&[256, 256]);
        device.activate(driver.queues(), 0);
        let mut guest = Self {
            driver,
            device,
            directory,
            asked: 0,
            uid: 0,
        };
        guest.init();
        guest
    }

    fn init(&mut self) -> Vec<u8> {
        let body = words(&[7, 38, 0, !(1 << 30)]);
        self.ask(INIT, 0, &body).unwrap()
    }

    fn raw(&mut self, descriptors: &[Descriptor]) -> u32 {
        self.driver.write(ANSWER, &[0; 512]);
        let before = self.driver.used_index(QUEUE);
        self.driver.offer(QUEUE, descriptors);
        self.device.queue_events()[QUEUE].write(1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.driver.used_index(QUEUE) == before {
            assert!(Instant::now() < deadline, "no answer");
            std::thread::yield_now();
        }
        self.driver.used_entry(QUEUE, before).1
    }

    fn request(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut request = words(&[40 + u32::try_from(body.len()).unwrap(), opcode]);
        request.extend(u64::from(self.asked).to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(words(&[self.uid, self.uid, 1, 0]));
        request.extend(body);
        request
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        self.asked += 1;
        let unique = u64::from(self.asked);
        let request = self.request(opcode, node, body);
        self.driver.write(REQUEST, &request);
        let length = u32::try_from(request.len()).unwrap();
        let used = self.raw(&[(REQUEST, length, READ), (ANSWER, ANSWER_SIZE, WRITE)]);
        let answer = self.driver.read(ANSWER, usize::try_from(used).unwrap());
        assert_eq!(word(&answer, 0), used);
        assert_eq!(answer[8..16], unique.to_le_bytes());
        match word(&answer, 4) as i32 {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.ask(LOOKUP, parent, &text(name)).map(Entry)
    }

    fn create(&mut self, name: &str, flags: i32) -> Result<(Entry, u64), i32> {
        let mut body = words(&[flags as u32, 0o644, 0o022, 0]);
        body.extend(text(name));
        let answer = self.ask(CREATE, ROOT, &body)?;
        let handle = long(&answer, 128);
        Ok((Entry(answer), handle))
    }

    /// The number and the mode of a file.
    fn attributes(&mut self, node: u64) -> (u64, u32) {
        let answer = self.ask(GETATTR, node, &[0; 16]).unwrap();
        (long(&answer, 16), word(&answer, 76))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let answer = self.ask(OPEN, node, &words(&[flags as u32, 0]))?;
        Ok(long(&answer, 0))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[size, 0, 0, 0, 0, 0]));
        self.ask(FUSE_READ, node, &body)
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let mut body = longs(&[handle, offset]);
        let length = u32::try_from(data.len()).unwrap();
        body.extend(words(&[length, 0, 0, 0, libc::O_RDWR as u32, 0]));
        body.extend(data);
        Ok(word(&self.ask(FUSE_WRITE, node, &body)?, 0))
    }
}

struct Entry(Vec<u8>);

impl Entry {
    fn node(&self) -> u64 {
        long(&self.0, 0)
    }
    fn seconds_valid(&self) -> u64 {
        long(&self.0, 16)
    }
    fn size(&self) -> u64 {
        long(&self.0, 48)
    }
    fn mode(&self) -> u32 {
        word(&self.0, 100)
    }
    fn owner(&self) -> (u32, u32) {
        (word(&self.0, 108), word(&self.0, 112))
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn text(name: &str) -> Vec<u8> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    text
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn the_configuration_has_the_tag_and_the_number_of_queues() {
    let guest = Guest::new(Access::ReadWrite, Cache::Always);
    let mut config = [0xff; 44];
    guest.device.read_config(0, &mut config);
    assert_eq!(&config[..5], b"test\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    for name in ["", "a\0b", &"x".repeat(37)] {
        assert!(Tag::new(name).is_none());
    }
    assert!(Tag::new(&"x".repeat(36)).is_some());
}

#[test]
fn init_offers_large_requests_and_no_writeback() {
    const AUTO_INVAL_DATA: u32 = 1 << 12;
    const DO_READDIRPLUS: u32 = 1 << 13;
    const READDIRPLUS_AUTO: u32 = 1 << 14;
    const WRITEBACK: u32 = 1 << 16;
    const NO_OPEN: u32 = 1 << 17;
    const POSIX_ACL: u32 = 1 << 20;
    const KILLPRIV_V2: u32 = 1 << 28;
    for (cache, invalidates) in [(Cache::Always, false), (Cache::None, true)] {
        let answer = Guest::new(Access::ReadWrite, cache).init();
        let flags = word(&answer, 12);
        assert_eq!(flags & (WRITEBACK | NO_OPEN), 0);
        assert_ne!(flags & KILLPRIV_V2, 0);
        assert_ne!(flags & POSIX_ACL, 0);
        assert_eq!(flags & AUTO_INVAL_DATA != 0, invalidates);
        assert_eq!(flags & DO_READDIRPLUS != 0, !invalidates);
        assert_eq!(flags & READDIRPLUS_AUTO, 0);
        assert_eq!(word(&answer, 20), 1 << 20);
    }
}

#[test]
fn files_are_found_read_and_written() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let path = guest.directory.path().join("file");
    fs::write(&path, "old content").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(file.size(), 11);
    assert!(file.seconds_valid() > 3600);
    let handle = guest.open(file.node(), libc::O_RDWR).unwrap();
    let data = guest.read(file.node(), handle, 4, 100).unwrap();
    assert_eq!(data, b"content");
    let node = file.node();
    assert_eq!(guest.write(node, handle, 0, b"new"), Ok(3));
    assert_eq!(fs::read(&path).unwrap(), b"new content");
    assert_eq!(guest.lookup(ROOT, "none").err(), Some(libc::ENOENT));
    assert_eq!(guest.read(node, 999, 0, 1).err(), Some(libc::EBADF));
    assert_eq!(guest.open(999, 0).err(), Some(libc::EBADF));
}

#[test]
fn a_directory_is_read_with_itself_and_its_parent_from_any_place() {
    /// The length of what READDIRPLUS says of an entry before its name.
    const ENTRY: usize = 128;
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let path = guest.directory.path().to_owned();
    for name in ["one", "two"] {
        fs::write(path.join(name), "").unwrap();
    }
    let handle = long(&guest.ask(OPENDIR, ROOT, &[0; 8]).unwrap(), 0);
    for (opcode, prefix) in [(READDIR, 0), (READDIRPLUS, ENTRY)] {
        // One entry at a time, and all at once.
        for size in [prefix + 32, 4096] {
            let (mut names, mut offset) = (Vec::new(), 0);
            loop {
                let mut body = longs(&[handle, offset]);
                body.extend(words(&[u32::try_from(size).unwrap(), 0, 0, 0, 0, 0]));
                let mut rest = &guest.ask(opcode, ROOT, &body).unwrap()[..];
                if rest.is_empty() {
                    break;
                }
                while !rest.is_empty() {
                    let entry = &rest[prefix..];
                    let length = word(entry, 16) as usize;
                    let name = String::from_utf8(entry[24..24 + length].to_vec()).unwrap();
                    let number = if name.starts_with('.') {
                        // The share's root has no other above it.
                        guest.attributes(ROOT).0
                    } else {
                        let node = guest.lookup(ROOT, &name).unwrap().node();
                        guest.attributes(node).0
                    };
                    assert_eq!(long(entry, 0), number, "{name}");
                    offset = long(entry, 8);
                    names.push(name);
                    rest = &rest[prefix + (24 + length).next_multiple_of(8)..];
                }
            }
            names.sort();
            assert_eq!(names, [".", "..", "one", "two"], "{opcode}, {size}");
        }
    }
}

#[test]
fn what_the_host_may_change_is_not_believed_for_any_time() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::None);
    let path = guest.directory.path().join("file");
    fs::write(&path, "1").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(file.seconds_valid(), 0);
    fs::write(&path, "22").unwrap();
    let answer = guest.ask(GETATTR, file.node(), &[0; 16]).unwrap();
    assert_eq!((long(&answer, 0), long(&answer, 24)), (0, 2));
}

#[test]
fn an_unlinked_file_stays_readable_while_it_is_open() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let (file, handle) = guest.create("file", libc::O_RDWR).unwrap();
    guest.write(file.node(), handle, 0, b"kept").unwrap();
    guest.ask(UNLINK, ROOT, &text("file")).unwrap();
    assert!(guest.directory.path().read_dir().unwrap().next().is_none());
    let data = guest.read(file.node(), handle, 0, 10).unwrap();
    assert_eq!(data, b"kept");
}

#[test]
fn what_a_user_makes_is_his_even_where_the_host_would_not_let_him() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root makes files for others");
        return;
    }
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let root = guest.directory.path().to_owned();
    // As if the guest's kernel had found the permission in a supplementary group.
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    guest.uid = 1234;
    let (file, _) = guest.create("file", libc::O_RDWR).unwrap();
    assert_eq!(file.owner(), (1234, 1234));
    assert_eq!(file.mode(), libc::S_IFREG | 0o644);
    let mut body = words(&[0o1777, 0]);
    body.extend(text("dir"));
    let dir = Entry(guest.ask(MKDIR, ROOT, &body).unwrap());
    assert_eq!(dir.owner(), (1234, 1234));
    assert_eq!(dir.mode(), libc::S_IFDIR | 0o1777);
    let mut body = text("link");
    body.extend(text("target"));
    let link = Entry(guest.ask(SYMLINK, ROOT, &body).unwrap());
    assert_eq!(link.owner(), (1234, 1234));
    // An existing file, by the same way.
    guest.create("file", libc::O_RDWR).unwrap();
    guest.uid = 0;
    let (file, _) = guest.create("roots", libc::O_RDWR).unwrap();
    assert_eq!(file.owner(), (0, 0));
    assert_eq!(root.join("dir").metadata().unwrap().uid(), 1234);
}

#[test]
fn no_symbolic_link_is_followed_and_no_name_leaves_the_share() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let root = guest.directory.path().to_owned();
    symlink(outside.path(), root.join("dir")).unwrap();
    symlink(outside.path().join("secret"), root.join("file")).unwrap();
    symlink(outside.path().join("new"), root.join("dangling")).unwrap();
    fs::create_dir(root.join("sub")).unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    assert_eq!(dir.mode() & libc::S_IFMT, libc::S_IFLNK);
    let node = dir.node();
    assert_eq!(guest.lookup(node, "secret").err(), Some(libc::ENOTDIR));
    let target = guest.ask(READLINK, node, &[]).unwrap();
    assert_eq!(target, outside.path().as_os_str().as_encoded_bytes());
    let file = guest.lookup(ROOT, "file").unwrap().node();
    assert_eq!(guest.open(file, libc::O_RDONLY).err(), Some(libc::EBADF));
    assert_eq!(guest.open(node, libc::O_DIRECTORY).err(), Some(libc::EBADF));
    assert!(guest.create("file", libc::O_RDWR | libc::O_TRUNC).is_err());
    assert!(guest.create("dangling", libc::O_RDWR).is_err());
    let sub = guest.lookup(ROOT, "sub").unwrap().node();
    for name in ["", ".", "..", "/", "sub/../..", "/etc"] {
        for parent in [ROOT, sub] {
            let found = guest.lookup(parent, name);
            assert_eq!(found.err(), Some(libc::EINVAL), "{name:?}");
        }
        assert!(guest.create(name, libc::O_RDWR).is_err());
        assert!(guest.ask(UNLINK, sub, &text(name)).is_err());
        let mut body = longs(&[ROOT]);
        body.extend(text("sub"));
        body.extend(text(name));
        assert!(guest.ask(RENAME, ROOT, &body).is_err());
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    let secret = fs::read(outside.path().join("secret")).unwrap();
    assert_eq!(secret, b"secret");
}

#[test]
fn a_read_only_share_is_read_and_nothing_else() {
    let mut guest = Guest::new(Access::ReadOnly, Cache::Always);
    let path = guest.directory.path().join("file");
    fs::write(&path, "content").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle, 0, 99).unwrap(), b"content");
    for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags).err(), Some(libc::EROFS));
    }
    assert_eq!(guest.write(node, handle, 0, b"x").err(), Some(libc::EROFS));
    let created = guest.create("new", libc::O_RDWR);
    assert_eq!(created.err(), Some(libc::EROFS));
    let unlinked = guest.ask(UNLINK, ROOT, &text("file"));
    assert_eq!(unlinked.err(), Some(libc::EROFS));
    assert_eq!(fs::read(&path).unwrap(), b"content");
}

#[test]
fn nonsense_gets_no_answer_and_the_next_request_does() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let end = guest.driver.memory_size();
    guest.driver.write(REQUEST, &[0xff; 64]);
    for descriptors in [
        [(REQUEST, 64, READ), (ANSWER, 4, WRITE)].as_slice(),
        &[(REQUEST, 64, READ)],
        &[(REQUEST, 3, READ), (ANSWER, 64, WRITE)],
        &[(ANSWER, 64, WRITE)],
        &[(end, 64, READ), (ANSWER, 64, WRITE)],
        &[(REQUEST, 64, READ), (end - 8, 64, WRITE)],
        &[(REQUEST, u32::MAX, READ), (u64::MAX, 64, WRITE)],
        // The same memory over and over: more than a request can be.
        &[(0, 0x7f_0000, READ); 200],
    ] {
        assert_eq!(guest.raw(descriptors), 0);
    }
    for opcode in [999, GETXATTR, FORGET, FUSE_READ, FUSE_WRITE, INIT, CREATE] {
        let mut request = words(&[u32::MAX, opcode]);
        request.extend([0xff; 100]);
        guest.driver.write(REQUEST, &request);
        guest.raw(&[(REQUEST, 108, READ), (ANSWER, 256, WRITE)]);
    }
    // A size that is no attribute's.
    let mut body = words(&[u32::MAX, 0]);
    body.extend(text("user.none"));
    let answer = guest.ask(GETXATTR, ROOT, &body);
    assert!(answer.is_err());
    guest.init();
    assert_eq!(guest.lookup(ROOT, "none").err(), Some(libc::ENOENT));
}

#[test]
fn the_processs_umask_stays_and_a_reset_forgets_the_guests_files() {
    let umask = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("Umask")).unwrap();
        line.to_owned()
    };
    let before = umask();
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    assert_eq!(umask(), before);
    let (file, _) = guest.create("file", libc::O_RDWR).unwrap();
    guest.device.reset();
    guest.driver = Driver::new(&[256, 256]);
    guest.device.activate(guest.driver.queues(), 0);
    guest.init();
    assert_eq!(guest.open(file.node(), 0).err(), Some(libc::EBADF));
    assert_eq!(guest.lookup(ROOT, "file").unwrap().size(), 0);
    assert_eq!(umask(), before);
}

/// The descriptors of this process that are of `path` or of a directory above it.
fn descriptors_above(path: &std::path::Path) -> usize {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap();
    let links = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| path.starts_with(link)).count()
}

#[test]
fn a_guest_that_begins_anew_costs_no_descriptor() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let root = guest.directory.path().to_owned();
    fs::write(root.join("file"), "content").unwrap();
    let before = descriptors_above(&root);
    for _ in 0..100 {
        let file = guest.lookup(ROOT, "file").unwrap().node();
        guest.open(file, libc::O_RDONLY).unwrap();
        let request = guest.request(DESTROY, 0, &[]);
        guest.driver.write(REQUEST, &request);
        // Its answer is not counted.
        guest.raw(&[(REQUEST, 40, READ), (ANSWER, 64, WRITE)]);
        guest.init();
        assert_eq!(guest.open(file, 0).err(), Some(libc::EBADF));
    }
    // Other tests have devices, too, but not so many.
    assert!(descriptors_above(&root) < before + 50);
}

#[test]
fn a_directory_that_is_none_is_not_shared() {
    let directory = tempfile::tempdir().unwrap();
    let share = Share {
        root: directory.path().join("none"),
        cache: Cache::None,
        access: Access::ReadWrite,
    };
    let tag = Tag::new("test").unwrap();
    let error = Fs::new(tag, share.clone(), 1, &ThreadHook::none()).unwrap_err();
    assert!(matches!(error, FsError::Share(ShareError::Open { .. })));
    let error = Fs::new(tag, share, 0, &ThreadHook::none()).unwrap_err();
    assert!(matches!(error, FsError::RequestQueues(0)));
}

impl Guest {
    /// What the guest knows of the share, as it comes out of a file.
    fn held(&mut self) -> Result<Held, PauseError> {
        let held = self.device.pause();
        self.device.resume();
        let text = serde_json::to_string(&held?).unwrap();
        Ok(serde_json::from_str(&text).unwrap())
    }

    /// The same guest with another server.
    fn served_by_another(mut self) -> Result<Self, PauseError> {
        let held = self.held()?;
        let share = Share {
            root: self.directory.path().to_owned(),
            cache: Cache::Always,
            access: Access::ReadWrite,
        };
        let tag = Tag::new("test").unwrap();
        self.device = Fs::new(tag, share, 1, &ThreadHook::none()).unwrap();
        self.device.take_over(&held)?;
        self.driver = Driver::new(&[256, 256]);
        self.device.activate(self.driver.queues(), 0);
        Ok(self)
    }
}

#[test]
fn a_server_that_takes_over_knows_what_the_guest_knows() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let root = guest.directory.path().to_owned();
    for name in ["seen", "forgotten", "renamed", "gone"] {
        fs::write(root.join(name), name).unwrap();
    }
    fs::create_dir(root.join("dir")).unwrap();
    fs::write(root.join("dir/inner"), "inner").unwrap();
    let [seen, forgotten, renamed, gone, dir] =
        ["seen", "forgotten", "renamed", "gone", "dir"].map(|n| guest.lookup(ROOT, n).unwrap());
    let inner = guest.lookup(dir.node(), "inner").unwrap();
    let handle = guest.open(inner.node(), libc::O_RDWR).unwrap();
    let body = [longs(&[dir.node()]), text("renamed"), text("moved")].concat();
    guest.ask(RENAME, ROOT, &body).unwrap();
    let forget = guest.request(FORGET, forgotten.node(), &longs(&[1]));
    guest.driver.write(REQUEST, &forget);
    guest.raw(&[(REQUEST, 48, READ)]);
    fs::remove_file(root.join("gone")).unwrap();

    let mut guest = guest.served_by_another().unwrap();
    let data = guest.read(inner.node(), handle, 1, 10).unwrap();
    assert_eq!(data, b"nner");
    assert_eq!(guest.write(inner.node(), handle, 0, b"I"), Ok(1));
    for (node, content) in [(&seen, "seen"), (&renamed, "renamed")] {
        let handle = guest.open(node.node(), libc::O_RDONLY).unwrap();
        let data = guest.read(node.node(), handle, 0, 10).unwrap();
        assert_eq!(data, content.as_bytes());
    }
    assert_eq!(guest.lookup(ROOT, "seen").unwrap().node(), seen.node());
    // A new number is nobody's old one, and what was not found again is looked for again.
    let (new, _) = guest.create("new", libc::O_RDWR).unwrap();
    assert!(new.node() > inner.node());
    assert_eq!(guest.open(gone.node(), 0).err(), Some(libc::ESTALE));
    assert_eq!(guest.open(forgotten.node(), 0).err(), Some(libc::ESTALE));

    // Once more, with numbers of both.
    let (handle, before) = (guest.open(new.node(), libc::O_RDWR).unwrap(), handle);
    let mut guest = guest.served_by_another().unwrap();
    assert_eq!(guest.write(new.node(), handle, 0, b"new"), Ok(3));
    let data = guest.read(inner.node(), before, 0, 10).unwrap();
    assert_eq!(data, b"Inner");
}

#[test]
fn an_open_file_without_a_name_is_not_written_down() {
    let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
    let (file, handle) = guest.create("file", libc::O_RDWR).unwrap();
    guest.ask(UNLINK, ROOT, &text("file")).unwrap();
    let error = guest.held().unwrap_err().to_string();
    assert_eq!(error, "file is open in the guest and has no name any more");
    // It goes on.
    assert_eq!(guest.write(file.node(), handle, 0, b"kept"), Ok(4));
}

#[test]
fn an_open_file_that_is_not_what_it_was_is_refused_by_its_path() {
    type Change = (fn(&std::path::Path), &'static str);
    let changes: [Change; 3] = [
        (
            |path| fs::remove_file(path).unwrap(),
            "dir/file was open in the guest and is not there any more",
        ),
        (
            |path| fs::write(path, "longer").unwrap(),
            "dir/file was open in the guest and is not what it was: it was replaced, or written to",
        ),
        (
            |path| {
                fs::write(path.with_file_name("other"), "").unwrap();
                fs::rename(path.with_file_name("other"), path).unwrap();
            },
            "dir/file was open in the guest and is not what it was: it was replaced, or written to",
        ),
    ];
    for (change, expected) in changes {
        let mut guest = Guest::new(Access::ReadWrite, Cache::Always);
        let path = guest.directory.path().join("dir/file");
        fs::create_dir(guest.directory.path().join("dir")).unwrap();
        fs::write(&path, "").unwrap();
        let dir = guest.lookup(ROOT, "dir").unwrap();
        let file = guest.lookup(dir.node(), "file").unwrap();
        guest.open(file.node(), libc::O_RDONLY).unwrap();
        let held = guest.held().unwrap();
        change(&path);
        let share = Share {
            root: guest.directory.path().to_owned(),
            cache: Cache::Always,
            access: Access::ReadWrite,
        };
        let tag = Tag::new("test").unwrap();
        let mut next = Fs::new(tag, share, 1, &ThreadHook::none()).unwrap();
        let error = next.take_over(&held).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
}
