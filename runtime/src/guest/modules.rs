//! The modules that a stock kernel needs to be a microVM's guest, in the order in which they load.
//!
//! The order comes from the tree's own indexes (`modules.dep`, `modules.softdep`, `modules.builtin`), not from a list
//! of ours: dependencies differ between releases and distributions.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Error, cpio};

/// Drivers without which no microVM starts.
const REQUIRED: &[&str] = &["virtio_mmio", "vmw_vsock_virtio_transport", "virtiofs"];
/// Drivers that a microVM uses when the kernel has them.
const OPTIONAL: &[&str] = &[
    "overlay",
    "virtio_net",
    "virtio_blk",
    "erofs",
    "virtio_rng",
    "virtio_console",
    "virtio_balloon",
    "virtio_mem",
];

/// No index file is larger.
const MAX_INDEX: u64 = 64 << 20;
/// No module is larger, unpacked.
const MAX_MODULE: u64 = 256 << 20;
/// Cap on an xz decoder's window, in KiB.
const MAX_WINDOW_KIB: u32 = 128 << 10;

/// Where the archive holds the modules and their list.
const DIR: &str = "lib/modules";

/// What was found in a module tree.
pub(super) struct Selection {
    /// The modules to load, in order, as paths relative to the tree.
    pub load: Vec<String>,
    /// The drivers that the kernel has, built in or in `load`.
    pub drivers: Vec<&'static str>,
    /// The optional drivers that it has not.
    pub missing: Vec<&'static str>,
}

/// Finds the drivers in `tree` (`/lib/modules/<release>`) and orders what must be loaded for them.
pub(super) fn select(tree: &Path) -> Result<Selection, Error> {
    let index = Index::read(tree)?;
    let mut selection = Selection {
        load: Vec::new(),
        drivers: Vec::new(),
        missing: Vec::new(),
    };
    let mut seen = HashSet::new();
    for &driver in REQUIRED.iter().chain(OPTIONAL) {
        if index.builtin.contains(driver) {
            selection.drivers.push(driver);
        } else if let Some(path) = index.paths.get(driver) {
            index.visit(path, &mut seen, &mut selection.load);
            selection.drivers.push(driver);
        } else if REQUIRED.contains(&driver) {
            return Err(Error::MissingDriver {
                driver,
                path: tree.to_owned(),
            });
        } else {
            selection.missing.push(driver);
        }
    }
    Ok(selection)
}

/// Packs the modules, unpacked, and their list in load order (`modules.list`: one absolute path a line).
pub(super) fn pack(tree: &Path, load: &[String]) -> Result<Vec<u8>, Error> {
    let mut archive = cpio::Writer::default();
    archive.directory("lib", 0o755);
    archive.directory(DIR, 0o755);
    let mut list = String::new();
    for relative in load {
        let path = tree.join(relative);
        let module = read_module(&path).map_err(Error::io("read module", &path))?;
        let name = format!("{DIR}/{}.ko", name_of(relative));
        archive
            .file(&name, 0o644, &module)
            .map_err(|_| too_large(&path))?;
        list.push_str(&format!("/{name}\n"));
    }
    let name = format!("{DIR}/modules.list");
    archive
        .file(&name, 0o644, list.as_bytes())
        .map_err(|_| too_large(tree))?;
    Ok(archive.finish())
}

fn too_large(path: &Path) -> Error {
    Error::Modules {
        path: path.to_owned(),
        what: "it does not fit into an initramfs".into(),
    }
}

/// What the tree's index files say. Modules are named as the kernel names them, with `_` for `-`.
struct Index {
    /// Path, relative to the tree, by name.
    paths: HashMap<String, String>,
    /// The paths each path needs loaded before it.
    dependencies: HashMap<String, Vec<String>>,
    /// The names each name asks to have loaded before it.
    soft: HashMap<String, Vec<String>>,
    /// Names by alias, where the alias is a plain word.
    aliases: HashMap<String, Vec<String>>,
    /// Names that are built in.
    builtin: HashSet<String>,
}

impl Index {
    fn read(tree: &Path) -> Result<Self, Error> {
        let required = |name: &str| {
            read_index(&tree.join(name))?.ok_or_else(|| Error::Modules {
                path: tree.to_owned(),
                what: format!("it has no {name}; give a /lib/modules/<release> directory on which depmod has run"),
            })
        };
        let optional = |name: &str| Ok(read_index(&tree.join(name))?.unwrap_or_default());

        let mut paths = HashMap::new();
        let mut dependencies = HashMap::new();
        for line in required("modules.dep")?.lines() {
            let Some((path, needs)) = line.split_once(':') else {
                continue;
            };
            let needs: Vec<&str> = needs.split_ascii_whitespace().collect();
            for path in needs.iter().chain([&path]) {
                if !stays_inside(path) {
                    let what = format!("modules.dep names {path:?}, which is not inside the tree");
                    return Err(Error::Modules {
                        path: tree.to_owned(),
                        what,
                    });
                }
            }
            paths.insert(name_of(path), path.to_owned());
            dependencies.insert(
                path.to_owned(),
                needs.into_iter().map(str::to_owned).collect(),
            );
        }

        let mut soft = HashMap::new();
        for line in optional("modules.softdep")?.lines() {
            let mut words = line.split_ascii_whitespace();
            if words.next() != Some("softdep") {
                continue;
            }
            let Some(name) = words.next() else { continue };
            let pre: Vec<String> = words
                .skip_while(|&word| word != "pre:")
                .skip(1)
                .take_while(|&word| word != "post:")
                .map(str::to_owned)
                .collect();
            soft.entry(normal(name))
                .or_insert_with(Vec::new)
                .extend(pre);
        }

        let mut aliases = HashMap::new();
        for line in optional("modules.alias")?.lines() {
            let mut words = line.split_ascii_whitespace();
            if let (Some("alias"), Some(alias), Some(name)) =
                (words.next(), words.next(), words.next())
                && !alias.contains('*')
            {
                aliases
                    .entry(normal(alias))
                    .or_insert_with(Vec::new)
                    .push(normal(name));
            }
        }

        let builtin = required("modules.builtin")?.lines().map(name_of).collect();
        // What is built in says its aliases as "<name>.alias=<alias>", ended by zeros.
        for entry in optional("modules.builtin.modinfo")?.split('\0') {
            if let Some((name, alias)) = entry.split_once(".alias=")
                && !alias.contains('*')
            {
                aliases
                    .entry(normal(alias))
                    .or_insert_with(Vec::new)
                    .push(normal(name));
            }
        }
        Ok(Self {
            paths,
            dependencies,
            soft,
            aliases,
            builtin,
        })
    }

    /// Adds `path` to `load` behind everything it needs. A module seen before is not entered again, so a cycle ends.
    fn visit(&self, path: &str, seen: &mut HashSet<String>, load: &mut Vec<String>) {
        if !seen.insert(path.to_owned()) {
            return;
        }
        for name in self.soft.get(&name_of(path)).into_iter().flatten() {
            if let Some(soft) = self.resolve(name) {
                self.visit(soft, seen, load);
            }
        }
        for needed in self.dependencies.get(path).into_iter().flatten() {
            self.visit(needed, seen, load);
        }
        load.push(path.to_owned());
    }

    /// The module for a soft dependency, which may be an alias that several modules offer. Of these the generic one
    /// is taken: the others ask for a processor feature that the guest may lack.
    fn resolve(&self, name: &str) -> Option<&str> {
        let name = normal(name);
        if self.builtin.contains(&name) {
            return None;
        }
        if let Some(path) = self.paths.get(&name) {
            return Some(path);
        }
        let candidates = self.aliases.get(&name)?;
        if candidates.iter().any(|name| self.builtin.contains(name)) {
            return None;
        }
        let chosen = candidates
            .iter()
            .find(|name| name.ends_with("_generic"))
            .or_else(|| candidates.first())?;
        self.paths.get(chosen).map(String::as_str)
    }
}

/// The kernel's name for the module at `path`: without folders and suffixes, `_` for `-`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split_once(".ko").map_or(file, |(stem, _)| stem))
}

fn normal(name: &str) -> String {
    name.trim().replace('-', "_")
}

fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|c| matches!(c, std::path::Component::Normal(_)))
}

/// Reads an index; none if it is not there.
fn read_index(path: &Path) -> Result<Option<String>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_INDEX)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Reads a module and unpacks it, as its suffix says.
fn read_module(path: &PathBuf) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut module = Vec::new();
    let mut reader: Box<dyn Read> = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => Box::new(lzma_rust2::XzReader::new_mem_limit(
            io::BufReader::new(file),
            true,
            MAX_WINDOW_KIB,
        )),
        Some("zst") => Box::new(
            ruzstd::decoding::StreamingDecoder::new(io::BufReader::new(file))
                .map_err(io::Error::other)?,
        ),
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
        _ => Box::new(file),
    };
    reader
        .by_ref()
        .take(MAX_MODULE + 1)
        .read_to_end(&mut module)?;
    if module.len() as u64 > MAX_MODULE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it unpacks to an unbelievable size",
        ));
    }
    if !module.starts_with(super::elf::MAGIC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is not a kernel module",
        ));
    }
    Ok(module)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A tree whose indexes say `dep`, `builtin` and `softdep`.
    fn tree(dep: &str, builtin: &str, softdep: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.dep"), dep).unwrap();
        fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        fs::write(dir.path().join("modules.softdep"), softdep).unwrap();
        fs::write(
            dir.path().join("modules.alias"),
            "alias sum sum_fast\nalias sum sum_generic\n",
        )
        .unwrap();
        dir
    }

    const REST: &str = "kernel/v/vmw_vsock_virtio_transport.ko\nkernel/fs/virtiofs.ko\n";

    #[test]
    fn dependencies_load_first_and_once() {
        let dir = tree(
            "kernel/virtio_mmio.ko.xz: kernel/virtio.ko.xz kernel/virtio_ring.ko.xz\n\
             kernel/virtio.ko.xz: kernel/virtio_ring.ko.xz\n\
             kernel/virtio_ring.ko.xz:\n\
             kernel/net/virtio_net.ko.xz: kernel/net/net_failover.ko.xz kernel/virtio.ko.xz kernel/virtio_ring.ko.xz\n\
             kernel/net/net_failover.ko.xz:\n",
            REST,
            "",
        );
        let selection = select(dir.path()).unwrap();
        let names: Vec<String> = selection.load.iter().map(|p| name_of(p)).collect();
        assert_eq!(
            names,
            [
                "virtio_ring",
                "virtio",
                "virtio_mmio",
                "net_failover",
                "virtio_net"
            ]
        );
        assert_eq!(
            selection.drivers,
            [
                "virtio_mmio",
                "vmw_vsock_virtio_transport",
                "virtiofs",
                "virtio_net"
            ]
        );
        assert!(selection.missing.contains(&"erofs"));
    }

    #[test]
    fn soft_dependencies_load_first_and_prefer_the_generic_one() {
        let dir = tree(
            "kernel/erofs.ko: kernel/libsum.ko\nkernel/libsum.ko:\nkernel/sum_fast.ko:\nkernel/sum-generic.ko:\n",
            &format!("{REST}kernel/virtio_mmio.ko\n"),
            "softdep libsum pre: sum post: nothing\n",
        );
        let selection = select(dir.path()).unwrap();
        assert_eq!(
            selection.load,
            [
                "kernel/sum-generic.ko",
                "kernel/libsum.ko",
                "kernel/erofs.ko"
            ]
        );
    }

    #[test]
    fn a_soft_dependency_that_is_built_in_under_an_alias_loads_nothing() {
        let builtin = format!("{REST}kernel/virtio_mmio.ko\nkernel/sum-generic.ko\n");
        let dir = tree(
            "kernel/erofs.ko:\nkernel/sum_fast.ko:\n",
            &builtin,
            "softdep erofs pre: sum\n",
        );
        fs::write(dir.path().join("modules.alias"), "alias sum sum_fast\n").unwrap();
        fs::write(
            dir.path().join("modules.builtin.modinfo"),
            "a.license=GPL\0sum_generic.alias=sum\0",
        )
        .unwrap();
        assert_eq!(select(dir.path()).unwrap().load, ["kernel/erofs.ko"]);
    }

    #[test]
    fn a_missing_required_driver_is_named() {
        let dir = tree("", REST, "");
        assert!(matches!(
            select(dir.path()),
            Err(Error::MissingDriver {
                driver: "virtio_mmio",
                ..
            })
        ));
    }

    #[test]
    fn a_cycle_ends() {
        let builtin = format!("{REST}kernel/virtio_mmio.ko\n");
        let dir = tree(
            "kernel/erofs.ko: kernel/a.ko\nkernel/a.ko: kernel/erofs.ko\n",
            &builtin,
            "",
        );
        assert_eq!(
            select(dir.path()).unwrap().load,
            ["kernel/a.ko", "kernel/erofs.ko"]
        );
    }

    #[test]
    fn paths_that_leave_the_tree_are_refused() {
        for path in ["../../etc/shadow", "/etc/shadow"] {
            let dir = tree(&format!("kernel/erofs.ko: {path}\n"), REST, "");
            assert!(
                matches!(select(dir.path()), Err(Error::Modules { .. })),
                "{path}"
            );
        }
    }

    #[test]
    fn a_tree_without_depmod_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let Err(error) = select(dir.path()) else {
            panic!("selected from an empty tree")
        };
        assert!(error.to_string().contains("depmod"));
    }

    #[test]
    fn packed_modules_are_unpacked_and_listed_in_order() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("b.ko"), b"\x7fELF plain").unwrap();
        let gz = fs::File::create(dir.path().join("a-x.ko.gz")).unwrap();
        let mut gz = flate2::write::GzEncoder::new(gz, flate2::Compression::fast());
        gz.write_all(b"\x7fELF packed").unwrap();
        gz.finish().unwrap();

        let archive = pack(dir.path(), &["b.ko".into(), "a-x.ko.gz".into()]).unwrap();
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("\x7fELF packed"));
        assert!(text.contains("/lib/modules/b.ko\n/lib/modules/a_x.ko\n"));

        fs::write(dir.path().join("c.ko"), b"text").unwrap();
        assert!(pack(dir.path(), &["c.ko".into()]).is_err());
    }
}
