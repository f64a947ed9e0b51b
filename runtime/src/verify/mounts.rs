//! The mounts and paths that a configuration asks for against those that a container's processes see.
//!
//! The configuration is what the container was made from; the mounts are a hostile container's.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use engine::observation::IdMaps;
use oci_spec::runtime::{LinuxIdMapping, Mount as SpecMount};

use super::config::is_set;
use super::conformance::{Comparison, Property};
use super::live;
use super::mount_data;
use super::mount_table::{At, Line, Table};
use super::posture::{Fact, IdRange, Mount, Sharing};

/// File systems whose type is told as it is asked for.
const KINDS: [&str; 11] = [
    "bpf",
    "configfs",
    "debugfs",
    "devpts",
    "hugetlbfs",
    "mqueue",
    "proc",
    "ramfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// What runtimes mount without being asked: the point, and the type of file system.
const USUAL: [(&str, &str); 5] = [
    ("/dev/pts", "devpts"),
    ("/dev/ptmx", "devpts"),
    ("/dev/console", "devpts"),
    ("/dev/shm", "tmpfs"),
    ("/dev/mqueue", "mqueue"),
];

/// The devices of every container, which a user namespace makes mounts of: null, zero, full, random, urandom, tty, ptmx.
const USUAL_DEVICES: [(u32, u32); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];

/// A mount that was asked for.
struct Asked<'a> {
    spec: &'a SpecMount,
    fact: &'a Mount,
    /// Where it is, without links.
    point: PathBuf,
}

impl Asked<'_> {
    fn is_noexec(&self) -> bool {
        is_set(self.spec, &["noexec", "rnoexec"], &["exec", "rexec"])
    }

    fn is_nosymfollow(&self) -> bool {
        let (on, off) = (["nosymfollow", "rnosymfollow"], ["symfollow", "rsymfollow"]);
        is_set(self.spec, &on, &off)
    }

    /// Whether the ids of its files are to be others than those on the disk.
    fn is_id_mapped(&self) -> bool {
        let has = |maps: &Option<Vec<_>>| maps.as_ref().is_some_and(|maps| !maps.is_empty());
        has(self.spec.uid_mappings())
            || has(self.spec.gid_mappings())
            || is_set(self.spec, &["idmap", "ridmap"], &[])
    }

    /// Whether these are the maps that were asked for, if any were named.
    fn has_maps(&self, found: &IdMaps) -> bool {
        let is_same = |asked: &Option<Vec<LinuxIdMapping>>, found: &str| {
            let asked = asked.iter().flatten().map(|one| IdRange {
                inside: one.container_id(),
                outside: one.host_id(),
                size: one.size(),
            });
            let (mut asked, mut found): (Vec<_>, _) = (asked.collect(), live::ranges(found));
            asked.sort_by_key(|range| range.inside);
            found.sort_by_key(|range| range.inside);
            asked.is_empty() || asked == found
        };
        is_same(self.spec.uid_mappings(), &found.users)
            && is_same(self.spec.gid_mappings(), &found.groups)
    }

    fn is_recursive(&self) -> bool {
        is_set(self.spec, &["rbind"], &["bind"])
    }

    fn is_of_cgroups(&self) -> bool {
        matches!(self.fact.kind.as_str(), "cgroup" | "cgroup2")
    }

    fn flags(&self) -> String {
        let flags = [
            (self.fact.is_read_only, "ro"),
            (self.fact.is_nosuid, "nosuid"),
            (self.fact.is_nodev, "nodev"),
            (self.is_noexec(), "noexec"),
            (self.is_nosymfollow(), "nosymfollow"),
            (self.is_id_mapped(), "idmapped"),
        ];
        let flags = flags
            .into_iter()
            .filter_map(|(is_set, name)| is_set.then_some(name));
        described(&self.fact.kind, self.fact.source.as_deref(), flags)
    }
}

fn described<'a>(
    kind: &str,
    source: Option<&Path>,
    flags: impl Iterator<Item = &'a str>,
) -> String {
    let flags: Vec<&str> = flags.collect();
    let mut text = match source {
        Some(source) => format!("{kind} of {}", source.display()),
        None => kind.to_owned(),
    };
    if !flags.is_empty() {
        text.push_str(", ");
        text.push_str(&flags.join(","));
    }
    text
}

fn flags(table: &Table<'_>, line: &Line) -> String {
    let names = ["nosuid", "nodev", "noexec", "nosymfollow", "idmapped"].into_iter();
    let set = names.filter(|name| line.options.contains(*name));
    let flags = line.is_read_only.then_some("ro").into_iter().chain(set);
    let source = table.source(line).filter(|_| !line.is_cgroup());
    described(&line.kind, source.as_deref(), flags)
}

/// The properties of the root file system, the paths and the mounts.
pub(super) fn properties(one: &Comparison<'_>) -> Vec<Property> {
    let table = Table::new(one.seen);
    let specs = one.spec.mounts().iter().flatten();
    let facts = one.asked.mounts.iter().map(|fact| &fact.value);
    let asked: Vec<Asked<'_>> = specs
        .zip(facts)
        .map(|(spec, fact)| Asked {
            spec,
            fact,
            point: table.real(spec.destination()),
        })
        .collect();
    let at = format!("/proc/{}/mountinfo", table.pid);
    let mut all = vec![
        masked(one, &table, &at),
        read_only(one, &table, &asked, &at),
    ];
    all.extend(root(one, &table, &at));
    for (index, mount) in asked.iter().enumerate() {
        // One that a later one is mounted over is not seen.
        let is_last = !asked
            .iter()
            .skip(index + 1)
            .any(|later| later.point == mount.point);
        if is_last {
            all.push(of_asked(one, &table, &asked, mount, &at));
        }
    }
    for line in table.mounts() {
        if let Some(why) = unasked(one, &table, &asked, line) {
            let at = format!("{at}: {}", line.point.display());
            let found = Fact::new(at, format!("{}{why}", flags(&table, line)));
            let name = format!("mount {}", line.point.display());
            all.push(Property::new(name, "none", &found, false));
        }
    }
    all
}

/// The paths of a list for which something does not hold, and those for which that is not known.
fn paths(
    name: &str,
    asked: &[PathBuf],
    at: &str,
    holds: impl Fn(&str) -> Result<bool, String>,
) -> Property {
    let (mut missing, mut unknown) = (Vec::new(), Vec::new());
    for path in asked {
        match holds(&path.to_string_lossy()) {
            Ok(true) => {}
            Ok(false) => missing.push(path.display().to_string()),
            Err(why) => unknown.push(format!("{} ({why})", path.display())),
        }
    }
    let count = match asked.len() {
        1 => "1 path".to_owned(),
        count => format!("{count} paths"),
    };
    let (said, holds) = if !missing.is_empty() {
        (format!("all but {}", missing.join(", ")), Some(false))
    } else if !unknown.is_empty() {
        (format!("not known: {}", unknown.join(", ")), None)
    } else {
        ("all of them".to_owned(), Some(true))
    };
    Property {
        holds,
        ..Property::new(name, count, &Fact::new(at, said), true)
    }
}

fn masked(one: &Comparison<'_>, table: &Table<'_>, at: &str) -> Property {
    paths(
        "masked-paths",
        &one.asked.masked.value,
        at,
        |path| match table.at(path) {
            At::Absent | At::Masked => Ok(true),
            At::File(..) => Ok(false),
            At::Unknown(why) => Err(why.to_owned()),
        },
    )
}

fn read_only(one: &Comparison<'_>, table: &Table<'_>, asked: &[Asked<'_>], at: &str) -> Property {
    let is_asked = |line: &Line| asked.iter().any(|mount| mount.point == line.point);
    let list = &one.asked.read_only.value;
    paths("read-only-paths", list, at, |path| match table.at(path) {
        At::Absent | At::Masked => Ok(true),
        At::File(file, line) => Ok(table.is_read_only(file, line, is_asked)),
        At::Unknown(why) => Err(why.to_owned()),
    })
}

fn root(one: &Comparison<'_>, table: &Table<'_>, at: &str) -> Vec<Property> {
    let line = table.root();
    let is_read_only = line.is_some_and(|line| line.is_read_only);
    let asked = one.asked.root_is_read_only.value;
    let found = Fact::new(at, is_read_only.to_string());
    let mut all = vec![Property::new(
        "root-read-only",
        asked.to_string(),
        &found,
        is_read_only || !asked,
    )];
    let place = format!("/proc/{}/root", table.pid);
    let (said, holds) = match &one.seen.root_is_top {
        Err(why) => (why.clone(), None),
        Ok(false) => ("more is above it, or over it".to_owned(), Some(false)),
        Ok(true) => {
            let source = line.and_then(|line| table.source(line));
            let other = source.filter(|_| !is_root_asked(one, table));
            match other {
                Some(path) => (format!("it is {} of the host", path.display()), Some(false)),
                None => ("nothing is above it".to_owned(), Some(true)),
            }
        }
    };
    all.push(Property {
        holds,
        ..Property::new(
            "root",
            "the root of its mounts",
            &Fact::new(place, said),
            true,
        )
    });
    let asked = one.asked.root_is_shared.value;
    let is_shared = line.is_some_and(|line| table.is_shared(line));
    let text = |is_shared| {
        if is_shared {
            "with the host"
        } else {
            "not with the host"
        }
    };
    let found = Fact::new(at, text(is_shared).to_owned());
    let holds = !is_shared || asked;
    all.push(Property::new(
        "root-propagation",
        text(asked),
        &found,
        holds,
    ));
    all
}

/// Whether the root is the directory that was asked for, if that can be told from here.
fn is_root_asked(one: &Comparison<'_>, table: &Table<'_>) -> bool {
    let Some(asked) = one.asked.root.value.as_deref().filter(|_| !one.is_in_guest) else {
        return true;
    };
    let source = table.root().and_then(|line| table.source(line));
    source.as_deref() == Some(asked) || is_same(table, Path::new("/"), asked)
}

/// Whether a path of the container is the same file as a path of the host.
fn is_same(table: &Table<'_>, path: &Path, of_host: &Path) -> bool {
    let At::File(file, _) = table.at(&path.to_string_lossy()) else {
        // A volume may be the null device.
        return matches!(table.at(&path.to_string_lossy()), At::Masked);
    };
    let Ok(host) = std::fs::metadata(of_host) else {
        return false;
    };
    let device = (rustix::fs::major(host.dev()), rustix::fs::minor(host.dev()));
    (device, host.ino()) == (file.of, file.inode)
}

fn of_asked(
    one: &Comparison<'_>,
    table: &Table<'_>,
    all: &[Asked<'_>],
    asked: &Asked<'_>,
    at: &str,
) -> Property {
    let destination = asked.spec.destination();
    let name = format!("mount {}", destination.display());
    let new = |said: String, holds| Property {
        holds,
        ..Property::new(name.clone(), asked.flags(), &Fact::new(at, said), true)
    };
    let path = destination.to_string_lossy();
    // A volume may be the null device: that it shows nothing is then no fault.
    let line = match table.at(&path) {
        At::Unknown(why) => return new(why.to_owned(), None),
        At::Absent => return new("nothing at this path".to_owned(), Some(false)),
        At::Masked => table.mounts().find(|line| line.point == asked.point),
        At::File(_, line) => Some(line).filter(|line| line.point == asked.point),
    };
    let Some(line) = line else {
        // Below masks nothing is seen, whatever it is.
        let is_masked = matches!(table.at(&path), At::Masked);
        return new("no mount at this path".to_owned(), Some(is_masked));
    };
    let mut said = flags(table, line);
    // With version 1 the cgroup file systems are below one in memory, in which nothing is the kernel's.
    let are_read_only = asked.is_of_cgroups()
        && line.kind == "tmpfs"
        && table
            .mounts()
            .filter(|below| below.is_cgroup() && below.point.starts_with(&asked.point))
            .filter(|below| !all.iter().any(|mount| mount.point == below.point))
            .all(|below| below.is_read_only);
    let mut holds = (line.is_read_only || are_read_only || !asked.fact.is_read_only)
        && (line.options.contains("nosuid") || !asked.fact.is_nosuid)
        && (line.options.contains("nodev") || !asked.fact.is_nodev)
        && (line.options.contains("noexec") || !asked.is_noexec())
        && (line.options.contains("nosymfollow") || !asked.is_nosymfollow())
        && (line.options.contains("idmapped") || !asked.is_id_mapped());
    let mut differs = |what: &str| {
        said.push_str("; ");
        said.push_str(what);
        holds = false;
    };
    if table.is_shared(line) && !asked.fact.is_shared {
        differs("what is mounted in it appears on the host");
    }
    if let Some(what) = other_content(one, table, asked, line) {
        differs(what);
    }
    for option in mount_data::missing(asked.spec, line) {
        differs(&format!("{option} is not in force"));
    }
    let maps = table.file_of(line).and_then(|file| file.maps.as_ref());
    if maps.is_some_and(|maps| !asked.has_maps(maps)) {
        differs("it maps other ids");
    }
    let wanted = all
        .iter()
        .filter(|mount| mount.point == asked.point)
        .count();
    // With version 1 each hierarchy has a mount point below that of the cgroups, which another one may be asked for at.
    let has_hierarchies = |mount: &Asked<'_>| {
        mount.is_of_cgroups() && asked.point.parent() == Some(mount.point.as_path())
    };
    let brought = usize::from(line.is_cgroup() && all.iter().any(has_hierarchies));
    if table.count_at(&asked.point) > wanted + brought {
        differs("it is mounted over another");
    }
    let below = table.mounts().find(|one| {
        one.point.starts_with(&asked.point)
            && !one.is_read_only
            && !table.hides(one)
            && !all.iter().any(|mount| mount.point == one.point)
    });
    if let Some(below) = below.filter(|_| is_set(asked.spec, &["rro"], &["rw", "rrw", "ro"])) {
        differs(&format!("{} can be written", below.point.display()));
    }
    new(said, Some(holds))
}

/// How what is at a mount differs from what was asked for, if it is seen to.
fn other_content(
    one: &Comparison<'_>,
    table: &Table<'_>,
    asked: &Asked<'_>,
    line: &Line,
) -> Option<&'static str> {
    let kind = asked.fact.kind.as_str();
    if KINDS.contains(&kind) {
        let is_shared = |kind: &str| {
            let found = one.asked.namespaces.get(kind);
            found.is_none_or(|fact| fact.value == Sharing::Host)
        };
        let is_new = kind == "tmpfs" || (kind == "proc" && !is_shared("pid"));
        return if line.kind != kind {
            Some("another type of file system")
        } else if is_new && !one.is_in_guest && table.source(line).is_some() {
            Some("it is the host's")
        } else {
            None
        };
    }
    let source = asked.fact.source.as_deref().filter(|_| kind == "bind")?;
    // A machine's volumes are shared with it, and have other numbers there. A path that is gone cannot be compared.
    if one.is_in_guest || !source.exists() || is_same(table, &asked.point, source) {
        return None;
    }
    let found = table.source(line)?;
    // It may have been replaced on the host since.
    let found = found.to_string_lossy();
    let found = found.strip_suffix("//deleted").unwrap_or(&found);
    (Path::new(found) != source).then_some("it is another")
}

/// Why a mount is none that was asked for, or that runtimes make for what was.
fn unasked(
    one: &Comparison<'_>,
    table: &Table<'_>,
    asked: &[Asked<'_>],
    line: &Line,
) -> Option<&'static str> {
    let is_usual = USUAL
        .iter()
        .any(|(point, kind)| line.point == Path::new(point) && line.kind == *kind);
    if asked.iter().any(|mount| mount.point == line.point)
        || (is_usual && table.count_at(&line.point) == 1)
        || table.hides(line)
        || is_device(one, table, line)
    {
        return None;
    }
    if table.is_of_itself(line) {
        let is_weaker = table
            .parent(line)
            .is_some_and(|above| above.is_read_only && !line.is_read_only);
        return is_weaker.then_some("; what it is in is read-only");
    }
    let above = asked
        .iter()
        .filter(|mount| line.point.starts_with(&mount.point));
    let above = above.max_by_key(|mount| mount.point.as_os_str().len());
    let Some(above) = above else {
        return Some("");
    };
    let is_part = if above.is_of_cgroups() {
        line.is_cgroup() && (line.is_read_only || !above.fact.is_read_only)
    } else if one.is_in_guest {
        above.is_recursive()
    } else {
        above.is_recursive() && table.whole_of(line).is_some()
    };
    (!is_part).then_some("")
}

/// Whether it is a device that every container has, or that was asked for.
fn is_device(one: &Comparison<'_>, table: &Table<'_>, line: &Line) -> bool {
    let Some(file) = table.file_of(line) else {
        return false;
    };
    if !matches!(file.file, libc::S_IFCHR | libc::S_IFBLK) {
        return false;
    }
    let linux = one.spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.devices().as_ref());
    let mut devices = devices.into_iter().flatten();
    let is_usual = file.file == libc::S_IFCHR && USUAL_DEVICES.contains(&file.device);
    is_usual
        || devices.any(|device| {
            let (major, minor) = file.device;
            device.path() == &line.point
                && (device.major(), device.minor()) == (i64::from(major), i64::from(minor))
        })
}
