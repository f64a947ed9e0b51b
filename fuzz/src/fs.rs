//! The file system device over a directory of its own.
//!
//! The process may make no large file from then on: a request names any length.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Once;

use tempfile::TempDir;
use vmm::devices::virtio::fs::{Access, Cache, Share};
use vmm::fuzzing::InlineFs;

use crate::input::Input;
use crate::machine::{DATA, HIGH, Machine, READ, WRITE};

/// The most bytes that a file may have.
const FILE_LIMIT: u64 = 16 << 20;
/// The request queue; the other one has high priority.
const QUEUE: usize = 1;
const REQUEST: u64 = DATA;
const ANSWER: u64 = HIGH;
const ANSWER_SIZE: u32 = 0x2_0000;

const NAMES: [&str; 12] = [
    "file",
    "dir",
    "link",
    "up",
    "new",
    "inner",
    "",
    ".",
    "..",
    "dir/inner",
    "../outside/secret",
    "user.x",
];
/// Opcodes whose answer begins with a node's number.
const ENTRIES: [u32; 6] = [1, 6, 8, 9, 13, 35];
/// Opcodes whose answer begins with a handle.
const HANDLES: [u32; 2] = [14, 27];
const CREATE: u32 = 35;
const INIT: u32 = 26;

struct Place {
    directory: TempDir,
    machine: std::cell::RefCell<Machine>,
}

thread_local! {
    static PLACE: Place = Place::new();
}

impl Place {
    fn new() -> Self {
        static LIMIT: Once = Once::new();
        LIMIT.call_once(limit_files);
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("share");
        fs::create_dir(&root).unwrap();
        let share = Share {
            root,
            cache: Cache::Always,
            access: Access::ReadWrite,
        };
        let device = InlineFs::new(share).unwrap();
        Self {
            directory,
            machine: Machine::new(Box::new(device)).into(),
        }
    }

    /// The share as each input finds it, with one link to what is outside of it.
    fn furnish(&self) {
        let root = self.directory.path().join("share");
        empty(&root);
        fs::create_dir_all(self.directory.path().join("outside")).unwrap();
        fs::write(self.secret(), "secret").unwrap();
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join("dir/inner"), "inner").unwrap();
        fs::write(root.join("file"), "content").unwrap();
        symlink("../outside/secret", root.join("link")).unwrap();
        symlink("../outside", root.join("up")).unwrap();
    }

    fn secret(&self) -> std::path::PathBuf {
        self.directory.path().join("outside/secret")
    }

    /// No request reached what is outside.
    fn check(&self) {
        assert_eq!(fs::read(self.secret()).unwrap(), b"secret");
        let outside = self.directory.path().join("outside");
        assert_eq!(fs::read_dir(outside).unwrap().count(), 1);
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
    }
}

fn limit_files() {
    let limit = libc::rlimit {
        rlim_cur: FILE_LIMIT,
        rlim_max: FILE_LIMIT,
    };
    // SAFETY: the limit is a `rlimit` that outlives the call; the signal's disposition is a plain number.
    unsafe {
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
        // The call that passes the limit fails instead.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

fn empty(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => fs::remove_dir_all(entry.path()).unwrap(),
            false => fs::remove_file(entry.path()).unwrap(),
        }
    }
}

/// Runs `fuzz` over a fresh share.
fn with_share(fuzz: impl FnOnce(&mut Machine)) {
    PLACE.with(|place| {
        let mut machine = place.machine.borrow_mut();
        place.furnish();
        machine.reset();
        fuzz(&mut machine);
        place.check();
    });
}

/// The file system device's queues.
pub fn fs_queue(data: &[u8]) {
    let mut input = Input::new(data);
    with_share(|machine| {
        machine.bring_up(input.u64(), input.u16());
        while !input.is_empty() {
            machine.step(&mut input, &mut |_| {});
        }
    });
}

/// FUSE requests of any kind, with any content, in sound chains.
pub fn fs_requests(data: &[u8]) {
    let mut input = Input::new(data);
    with_share(|machine| {
        machine.bring_up(u64::MAX, 16);
        let mut guest = Guest {
            machine,
            nodes: vec![1],
            handles: vec![0],
        };
        if input.byte() & 1 == 0 {
            let body = [7, 38, 0, u32::MAX].map(u32::to_le_bytes).concat();
            guest.ask(INIT, 0, 0, &body, None);
        }
        while !input.is_empty() {
            guest.step(&mut input);
        }
    });
}

struct Guest<'a> {
    machine: &'a mut Machine,
    /// The numbers that the device gave files and open files.
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Guest<'_> {
    fn known(numbers: &[u64], input: &mut Input<'_>) -> u64 {
        match input.byte() {
            0xff => input.u64(),
            choice => numbers[usize::from(choice) % numbers.len()],
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let opcode = match input.byte() {
            0xff => input.u32(),
            opcode => opcode.into(),
        };
        let node = Self::known(&self.nodes, input);
        let shape = input.byte();
        let mut body = Vec::new();
        if shape & 1 != 0 {
            body.extend(Self::known(&self.handles, input).to_le_bytes());
        }
        if shape & 2 != 0 {
            body.extend(Self::known(&self.nodes, input).to_le_bytes());
        }
        let length = input.byte().into();
        body.extend(input.bytes(length));
        if shape & 4 != 0 {
            body.resize(body.len() + 4 * usize::from(input.byte()), 0);
        }
        for bit in [8, 16] {
            if shape & bit != 0 {
                body.extend(input.one_of(&NAMES).as_bytes());
                body.push(0);
            }
        }
        let uid = if shape & 32 != 0 { 1000 } else { 0 };
        let length = (shape & 64 != 0).then(|| input.u32());
        self.ask(opcode, node, uid, &body, length);
    }

    /// Sends one request, whose header may give a wrong `length`.
    fn ask(&mut self, opcode: u32, node: u64, uid: u32, body: &[u8], length: Option<u32>) {
        let real = 40 + body.len() as u32;
        let mut request = Vec::with_capacity(real as usize);
        request.extend(length.unwrap_or(real).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(7_u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        for number in [uid, uid, 1, 0] {
            request.extend(number.to_le_bytes());
        }
        request.extend(body);
        self.machine.poke(REQUEST, &request);
        self.machine.poke(ANSWER, &[0; 16]);
        let chain = [(REQUEST, real, READ), (ANSWER, ANSWER_SIZE, WRITE)];
        self.machine.offer(QUEUE, &chain);
        self.machine.notify(QUEUE as u32);
        // The device serves what it is notified of.
        let (_, used) = self.machine.take_used(QUEUE).unwrap();
        if used == 0 {
            return;
        }
        assert!((16..=ANSWER_SIZE).contains(&used));
        let [length, error, unique] =
            [0, 4, 8].map(|at| u32::from_le_bytes(self.machine.peek(ANSWER + at)));
        assert_eq!(length, used);
        assert_eq!(unique, 7);
        if error == 0 && used > 16 {
            let number = u64::from_le_bytes(self.machine.peek(ANSWER + 16));
            if ENTRIES.contains(&opcode) {
                self.nodes.push(number);
            }
            if HANDLES.contains(&opcode) {
                self.handles.push(number);
            }
            if opcode == CREATE {
                self.handles
                    .push(u64::from_le_bytes(self.machine.peek(ANSWER + 16 + 128)));
            }
        }
    }
}
