//! The mounts of a container as its processes see them: which of them can be reached, and what each shows.
//!
//! The text is the kernel's, the mount points are paths that a hostile container chose. What is at a point was looked up in
//! its root by the kernel, and is known by the number of the mount, not by its name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use engine::observation::{Observation, Visible, unescape};

/// `linux/major.h`: the null device.
const NULL: (u32, u32) = (1, 3);

/// What an empty directory of a tmpfs says of its size (mm/shmem.c); each entry adds to it.
const EMPTY_SIZE: u64 = 40;

/// A line of mountinfo (proc(5)).
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub id: u64,
    parent: u64,
    pub device: String,
    pub root: PathBuf,
    pub point: PathBuf,
    pub options: BTreeSet<String>,
    /// The options of the file system, which all its mounts have in common.
    pub data: Vec<String>,
    pub peers: Option<u32>,
    pub kind: String,
    pub is_read_only: bool,
}

impl Line {
    /// Whether it is of a kind that the kernel makes one of for all.
    pub(super) fn is_cgroup(&self) -> bool {
        matches!(self.kind.as_str(), "cgroup" | "cgroup2")
    }

    /// Whether it is a cgroup in whose top nobody in a cgroup namespace of its own can change a limit: there are none
    /// without a controller, or such a namespace is the boundary (the kernel's cgroup-v2.rst, "nsdelegate").
    pub(super) fn is_delegated(&self) -> bool {
        let has = |name: &str| self.data.iter().any(|option| option == name);
        // All cgroups of the host are below the root.
        if self.root == Path::new("/") {
            return false;
        }
        match self.kind.as_str() {
            "cgroup" => has("none") || self.data.iter().any(|option| option.starts_with("name=")),
            "cgroup2" => has("nsdelegate"),
            _ => false,
        }
    }
}

pub(super) fn parse(text: &str) -> Vec<Line> {
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let mut right = right.split(' ');
        let id = left.next()?.parse().ok()?;
        let parent = left.next()?.parse().ok()?;
        let device = left.next()?.to_owned();
        let root = unescape(left.next()?);
        let point = unescape(left.next()?);
        let options: BTreeSet<String> = left.next()?.split(',').map(str::to_owned).collect();
        let peers = left.find_map(|tag| tag.strip_prefix("shared:")?.parse().ok());
        let kind = right.next()?.to_owned();
        let data: Vec<String> = right.nth(1)?.split(',').map(str::to_owned).collect();
        let is_read_only = options.contains("ro") || data.iter().any(|option| option == "ro");
        Some(Line {
            id,
            parent,
            device,
            root,
            point,
            options,
            data,
            peers,
            kind,
            is_read_only,
        })
    };
    text.lines().filter_map(line).collect()
}

/// What there is at a path of the container.
pub(super) enum At<'a> {
    /// Nothing.
    Absent,
    /// Nothing that could be read: the null device, or an empty directory.
    Masked,
    /// A file, and the mount that it is in.
    File(&'a Visible, &'a Line),
    /// It is not known, and why.
    Unknown(&'a str),
}

/// The mounts of a container, and those of the host.
pub(super) struct Table<'a> {
    pub pid: i32,
    /// Those that can be reached.
    visible: Vec<Line>,
    /// Those that others are mounted over.
    covered: Vec<Line>,
    host: Vec<Line>,
    places: BTreeMap<&'a str, &'a Result<Option<Visible>, String>>,
}

impl<'a> Table<'a> {
    pub(super) fn new(seen: &'a Observation) -> Self {
        let places = seen.places.iter();
        let mut table = Self {
            pid: seen.pid,
            visible: Vec::new(),
            covered: Vec::new(),
            host: parse(&seen.host_mounts),
            places: places.map(|one| (one.path.as_str(), &one.found)).collect(),
        };
        for line in parse(&seen.mounts) {
            // The kernel's own word, where it was asked.
            let place = line
                .point
                .to_str()
                .and_then(|point| table.places.get(point));
            let is_visible = match place {
                Some(Ok(Some(file))) => file.mount == line.id,
                Some(Ok(None)) => false,
                Some(Err(_)) | None => true,
            };
            if is_visible {
                table.visible.push(line);
            } else {
                table.covered.push(line);
            }
        }
        table
    }

    fn visible_at(&self, path: &str) -> Option<&'a Visible> {
        self.places.get(path)?.as_ref().ok()?.as_ref()
    }

    /// The mounts that can be reached, without the root.
    pub(super) fn mounts(&self) -> impl Iterator<Item = &Line> {
        let root = self.root().map(|root| root.id);
        self.visible
            .iter()
            .filter(move |line| Some(line.id) != root)
    }

    /// The root file system's.
    pub(super) fn root(&self) -> Option<&Line> {
        let mut lines = self.visible.iter().rev();
        lines.find(|line| line.point == Path::new("/"))
    }

    /// How many mounts there are on a point, those below others among them.
    pub(super) fn count_at(&self, point: &Path) -> usize {
        let all = self.visible.iter().chain(&self.covered);
        all.filter(|line| line.point == point).count()
    }

    /// The mount that `line` is mounted in.
    pub(super) fn parent(&self, line: &Line) -> Option<&Line> {
        let mut all = self.visible.iter().chain(&self.covered);
        all.find(|one| one.id == line.parent)
    }

    /// What is at a path that was looked at.
    pub(super) fn at(&self, path: &str) -> At<'_> {
        let file = match self.places.get(path) {
            None => return At::Unknown("it was not looked at"),
            Some(Err(reason)) => return At::Unknown(reason),
            Some(Ok(None)) => return At::Absent,
            Some(Ok(Some(file))) => file,
        };
        let mut all = self.visible.iter().chain(&self.covered);
        match all.find(|line| line.id == file.mount) {
            None => At::Unknown("its mount is not told"),
            Some(line) if is_mask(file, line) => At::Masked,
            Some(line) => At::File(file, line),
        }
    }

    /// The path without links, for one that was looked at.
    pub(super) fn real(&self, path: &Path) -> PathBuf {
        let found = path.to_str().and_then(|path| self.visible_at(path));
        found.map_or_else(|| path.to_owned(), |file| file.path.clone().into())
    }

    /// What is at a mount's point.
    pub(super) fn file_of(&self, line: &Line) -> Option<&'a Visible> {
        let file = self.visible_at(line.point.to_str()?)?;
        (file.mount == line.id).then_some(file)
    }

    /// Whether a mount shows nothing.
    pub(super) fn hides(&self, line: &Line) -> bool {
        self.file_of(line).is_some_and(|file| is_mask(file, line))
    }

    /// Whether a mount shows the files that are there without it.
    pub(super) fn is_of_itself(&self, line: &Line) -> bool {
        self.parent(line).is_some_and(|above| {
            let rest = line.point.strip_prefix(&above.point);
            above.device == line.device
                && rest.is_ok_and(|rest| line.root == joined(&above.root, rest))
        })
    }

    /// Whether nothing can be written at a path, nor in what is mounted below it but for where `is_meant`.
    pub(super) fn is_read_only(
        &self,
        file: &Visible,
        line: &Line,
        is_meant: impl Fn(&Line) -> bool,
    ) -> bool {
        let below = |one: &&Line| one.point.starts_with(&file.path) && one.id != line.id;
        let mut below = self.visible.iter().filter(below);
        line.is_read_only && below.all(|one| one.is_read_only || self.hides(one) || is_meant(one))
    }

    /// The paths that were looked at, with what is there.
    pub(super) fn paths(&self) -> impl Iterator<Item = (&'a str, At<'_>)> {
        self.places.keys().map(|path| (*path, self.at(path)))
    }

    /// Whether the host has a mount in the same group: what is mounted in one appears in the other.
    pub(super) fn is_shared(&self, line: &Line) -> bool {
        line.peers.is_some() && self.host.iter().any(|one| one.peers == line.peers)
    }

    /// What a mount shows, as a path of the host: where the host has the same file system.
    pub(super) fn source(&self, line: &Line) -> Option<PathBuf> {
        let same = self.host.iter().filter(|one| one.device == line.device);
        // The last of several mounts on a place covers the others; a path that is on the way is the better one.
        let reaching = same.filter_map(|one| {
            let rest = line.root.strip_prefix(&one.root).ok()?;
            Some((one.root.as_os_str().len(), joined(&one.point, rest)))
        });
        reaching
            .max_by_key(|(length, _)| *length)
            .map(|(_, path)| path)
    }

    /// The mount that brought this one along, whose directory it is in on the host too.
    pub(super) fn whole_of(&self, line: &Line) -> Option<&Line> {
        let source = self.source(line)?;
        self.visible.iter().find(|above| {
            let rest = line.point.strip_prefix(&above.point);
            let rest = rest.ok().filter(|rest| !rest.as_os_str().is_empty());
            rest.zip(self.source(above)).is_some_and(|(rest, whole)| {
                source == whole.join(rest) && above.point != Path::new("/")
            })
        })
    }
}

/// Joining an empty rest would leave a slash.
fn joined(path: &Path, rest: &Path) -> PathBuf {
    path.join(rest).components().collect()
}

fn is_mask(file: &Visible, line: &Line) -> bool {
    match file.file {
        libc::S_IFCHR => file.device == NULL,
        libc::S_IFDIR => line.kind == "tmpfs" && line.is_read_only && file.size == EMPTY_SIZE,
        _ => false,
    }
}
