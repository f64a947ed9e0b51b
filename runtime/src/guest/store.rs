//! The directory of installed guests.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Error, Kind, Record};

/// Where guests are installed if nothing else is said.
pub const DEFAULT_ROOT: &str = "/var/lib/rt/guests";

/// Overrides [`DEFAULT_ROOT`].
const ROOT_VARIABLE: &str = "RT_GUEST_DIR";

pub(super) const KERNEL: &str = "vmlinux";
pub(super) const MODULES: &str = "modules.cpio";
/// What a guest is: its directory is one when this is there.
pub const RECORD: &str = "guest.json";
/// Directories of this prefix are unfinished; a name cannot begin so.
pub(super) const UNFINISHED: &str = ".new-";

/// No `guest.json` is larger.
const MAX_RECORD: u64 = 1 << 20;

/// An installed guest whose kernel is there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Guest {
    dir: PathBuf,
    record: Record,
}

impl Guest {
    /// The guest installed in `dir`.
    ///
    /// # Errors
    /// If `guest.json` does not parse, or a file that it promises is not there.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let record = read_record(&dir.join(RECORD))?;
        let guest = Self {
            dir: dir.to_owned(),
            record,
        };
        let promised = [Some(guest.kernel()), guest.modules_cpio()];
        for path in promised.into_iter().flatten() {
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {}
                Ok(_) => return Err(guest.damaged(&path, "is not a file with content")),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(guest.damaged(&path, "is missing"));
                }
                Err(e) => return Err(Error::io("read", path)(e)),
            }
        }
        Ok(guest)
    }

    fn damaged(&self, path: &Path, what: &str) -> Error {
        let file = path
            .file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy();
        Error::Damaged {
            dir: self.dir.clone(),
            what: format!("{file} {what}"),
        }
    }

    /// What the guest says of itself.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// What `uname -r` prints in it.
    pub fn kernel_release(&self) -> &str {
        &self.record.kernel_release
    }

    /// The uncompressed kernel, an ELF file.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(KERNEL)
    }

    /// The archive of its modules (newc, uncompressed), if it needs any.
    pub fn modules_cpio(&self) -> Option<PathBuf> {
        self.record.modules.then(|| self.dir.join(MODULES))
    }
}

/// A directory of the store.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// The guest in it, or why it cannot be used.
    pub guest: Result<Guest, Error>,
}

/// The installed guests of one root directory, which need not exist.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The guests in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The store in force: `flag`, else the variable `RT_GUEST_DIR`, else `configured`, else [`DEFAULT_ROOT`].
    pub fn locate(flag: Option<&Path>, configured: Option<&Path>) -> Self {
        let variable = std::env::var_os(ROOT_VARIABLE)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from);
        let root = flag
            .map(Path::to_owned)
            .or(variable)
            .or_else(|| configured.map(Path::to_owned));
        Self::new(root.unwrap_or_else(|| DEFAULT_ROOT.into()))
    }

    /// The directory that holds the guests.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn dir(&self, name: &str) -> Result<PathBuf, Error> {
        let mut chars = name.chars();
        let valid = name.len() <= 128
            && chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
            && chars.all(|c| c.is_ascii_alphanumeric() || "._+-".contains(c));
        if valid {
            Ok(self.root.join(name))
        } else {
            Err(Error::BadName {
                name: name.to_owned(),
            })
        }
    }

    /// Every directory of a guest, sorted by name.
    ///
    /// # Errors
    /// If the root exists but cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io("read", &self.root)(e)),
        };
        let mut guests = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &self.root))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // `is_dir` follows a symbolic link: an administrator may point one at a build tree.
            if !name.starts_with('.') && entry.path().is_dir() {
                guests.push(Listed {
                    name,
                    guest: Guest::open(&entry.path()),
                });
            }
        }
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(guests)
    }

    /// The guest called `name`.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub fn get(&self, name: &str) -> Result<Guest, Error> {
        let dir = self.dir(name)?;
        if !dir.is_dir() {
            return Err(Error::UnknownGuest {
                name: name.to_owned(),
                root: self.root.clone(),
            });
        }
        Guest::open(&dir)
    }

    /// The guest to boot: the one `wanted` by the configuration, else the newest that was built, else the newest
    /// that was imported. Damaged ones are passed over unless nothing else is there.
    ///
    /// # Errors
    /// [`Error::NoGuest`] if nothing is installed; it says how to get one.
    pub fn select(&self, wanted: Option<&str>) -> Result<Guest, Error> {
        if let Some(name) = wanted {
            return self.get(name);
        }
        let mut damaged = None;
        let mut best: Option<Guest> = None;
        for listed in self.list()? {
            match listed.guest {
                Ok(guest) => {
                    let rank =
                        |guest: &Guest| (guest.record.kind == Kind::Built, guest.record.created);
                    if best.as_ref().is_none_or(|best| rank(&guest) > rank(best)) {
                        best = Some(guest);
                    }
                }
                Err(error) => damaged = Some(error),
            }
        }
        best.ok_or_else(|| {
            damaged.unwrap_or_else(|| Error::NoGuest {
                root: self.root.clone(),
            })
        })
    }

    /// Removes the guest called `name`, damaged or not.
    ///
    /// # Errors
    /// If there is none, or its files cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let dir = self.dir(name)?;
        let metadata = match fs::symlink_metadata(&dir) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::UnknownGuest {
                    name: name.to_owned(),
                    root: self.root.clone(),
                });
            }
            Err(e) => return Err(Error::io("read", dir)(e)),
        };
        if metadata.is_symlink() {
            return fs::remove_file(&dir).map_err(Error::io("remove", &dir));
        }
        // Out of sight first: whoever looks meanwhile sees a whole guest or none.
        let doomed = self
            .root
            .join(format!("{UNFINISHED}{name}.{}", std::process::id()));
        fs::rename(&dir, &doomed).map_err(Error::io("remove", &dir))?;
        fs::remove_dir_all(&doomed).map_err(Error::io("remove", &doomed))
    }
}

fn read_record(path: &Path) -> Result<Record, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().unwrap_or(path).to_owned();
            return Err(Error::Damaged {
                dir,
                what: format!("{RECORD} is missing"),
            });
        }
        Err(e) => return Err(Error::io("open", path)(e)),
    };
    let mut text = Vec::new();
    file.take(MAX_RECORD)
        .read_to_end(&mut text)
        .map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|source| Error::Record {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(root: &Path, name: &str, kind: Kind, created: u64) {
        let dir = root.join(name);
        fs::create_dir_all(&dir).unwrap();
        let record = Record {
            name: name.into(),
            kind,
            kernel_release: "6.12.1".into(),
            created,
            modules: false,
            drivers: Vec::new(),
            source: None,
        };
        fs::write(dir.join(KERNEL), b"kernel").unwrap();
        fs::write(dir.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
    }

    #[test]
    fn built_goes_before_imported_and_newer_before_older() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        install(root.path(), "stock-old", Kind::Imported, 10);
        install(root.path(), "stock-new", Kind::Imported, 90);
        assert_eq!(store.select(None).unwrap().name(), "stock-new");
        install(root.path(), "ours-new", Kind::Built, 30);
        install(root.path(), "ours-old", Kind::Built, 20);
        assert_eq!(store.select(None).unwrap().name(), "ours-new");
        assert_eq!(store.select(Some("stock-old")).unwrap().name(), "stock-old");
    }

    #[test]
    fn no_guest_names_both_ways_to_get_one() {
        let root = tempfile::tempdir().unwrap();
        for root in [root.path().to_owned(), root.path().join("absent")] {
            let text = Store::new(root).select(None).unwrap_err().to_string();
            assert!(
                text.contains("make guest") && text.contains("rt guest import"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_damaged_guest_is_passed_over_but_told_when_alone() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        install(root.path(), "broken", Kind::Built, 99);
        fs::remove_file(root.path().join("broken").join(KERNEL)).unwrap();
        assert!(matches!(store.select(None), Err(Error::Damaged { .. })));
        install(root.path(), "whole", Kind::Imported, 1);
        assert_eq!(store.select(None).unwrap().name(), "whole");
        fs::write(root.path().join("broken").join(RECORD), b"{").unwrap();
        assert!(matches!(store.get("broken"), Err(Error::Record { .. })));
    }

    #[test]
    fn promised_modules_must_be_there() {
        let root = tempfile::tempdir().unwrap();
        install(root.path(), "g", Kind::Imported, 1);
        let path = root.path().join("g").join(RECORD);
        let text = fs::read_to_string(&path)
            .unwrap()
            .replace("\"modules\":false", "\"modules\":true");
        fs::write(&path, text).unwrap();
        let text = Store::new(root.path()).get("g").unwrap_err().to_string();
        assert!(text.contains("modules.cpio is missing"), "{text}");
    }

    #[test]
    fn names_cannot_leave_the_root() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".new-x",
            "-x",
            &"x".repeat(129),
        ] {
            assert!(
                matches!(store.get(name), Err(Error::BadName { .. })),
                "{name}"
            );
            assert!(
                matches!(store.remove(name), Err(Error::BadName { .. })),
                "{name}"
            );
        }
    }

    #[test]
    fn remove_takes_the_guest_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        install(root.path(), "a", Kind::Built, 1);
        install(root.path(), "b", Kind::Built, 1);
        store.remove("a").unwrap();
        let left: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["b"]);
        assert!(matches!(store.remove("a"), Err(Error::UnknownGuest { .. })));
    }
}
