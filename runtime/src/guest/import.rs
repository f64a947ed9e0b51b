//! Making a guest of a distribution's kernel.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::store::{KERNEL, MODULES, RECORD, UNFINISHED};
use super::{Error, Guest, Kind, Record, Store, bzimage, elf, modules};

/// No kernel file is larger, packed or not.
const MAX_KERNEL_FILE: u64 = 1 << 30;

/// What to import.
#[derive(Clone, Debug)]
pub struct Import {
    /// A bzImage, as `/boot/vmlinuz-<release>`, or an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// The kernel's modules; by default `/lib/modules/<release>`.
    pub modules: Option<PathBuf>,
    /// The guest's name; by default the kernel's release.
    pub name: Option<String>,
}

/// An imported guest.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The guest.
    pub guest: Guest,
    /// Drivers a microVM would use but this kernel lacks.
    pub missing: Vec<&'static str>,
}

impl Import {
    /// Unpacks the kernel, packs the modules it needs and installs both in `store` as one guest, all or nothing.
    ///
    /// # Errors
    /// If the kernel is not usable, a required driver is missing, or the name is taken.
    pub fn run(&self, store: &Store) -> Result<Imported, Error> {
        let image = read_kernel(&self.kernel)?;
        let (vmlinux, release) = self.unpack(image)?;
        let name = self.name.as_deref().unwrap_or(&release);
        let target = store.dir(name)?;
        if fs::symlink_metadata(&target).is_ok() {
            return Err(Error::Exists {
                name: name.to_owned(),
            });
        }

        let tree = self
            .modules
            .clone()
            .unwrap_or_else(|| Path::new("/lib/modules").join(&release));
        if !tree.is_dir() {
            let what =
                format!("not a directory; name the modules of kernel {release} with `--modules`");
            return Err(Error::Modules { path: tree, what });
        }
        let selection = modules::select(&tree)?;
        let archive = match selection.load.as_slice() {
            [] => None,
            load => Some(modules::pack(&tree, load)?),
        };

        let record = Record {
            name: name.to_owned(),
            kind: Kind::Imported,
            kernel_release: release.clone(),
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs()),
            modules: archive.is_some(),
            drivers: selection.drivers.iter().map(|&d| d.to_owned()).collect(),
            source: Some(self.kernel.to_string_lossy().into_owned()),
        };
        install(store, &target, &record, &vmlinux, archive.as_deref())?;
        Ok(Imported {
            guest: Guest::open(&target)?,
            missing: selection.missing,
        })
    }

    /// The uncompressed kernel in `image`, and its release.
    fn unpack(&self, image: Vec<u8>) -> Result<(Vec<u8>, String), Error> {
        let unusable = |what: String| Error::Kernel {
            path: self.kernel.clone(),
            what,
        };
        let (vmlinux, release) = if image.starts_with(elf::MAGIC) {
            (image, None)
        } else if bzimage::is_bzimage(&image) {
            let packed = bzimage::parse(&image).map_err(unusable)?;
            let vmlinux = packed.unpack().map_err(|error| match error {
                bzimage::UnpackError::Format(name) => unusable(format!(
                    "its payload is compressed with {name}; gzip, xz, zstd and lz4 are read. Give an uncompressed vmlinux"
                )),
                bzimage::UnpackError::Stream(format, source) => {
                    Error::Unpack { path: self.kernel.clone(), format, source }
                }
            })?;
            (vmlinux, packed.release)
        } else {
            return Err(unusable(
                "it is neither a bzImage nor an ELF vmlinux".into(),
            ));
        };
        elf::check(&vmlinux).map_err(unusable)?;
        let release = release
            .or_else(|| elf::release(&vmlinux))
            .ok_or_else(|| unusable("it does not tell its release".into()))?;
        // It becomes a folder's name, here and under /lib/modules.
        if release.contains('/') || release.starts_with('.') {
            return Err(unusable(format!(
                "its release {release:?} cannot be a name"
            )));
        }
        Ok((vmlinux, release))
    }
}

fn read_kernel(path: &Path) -> Result<Vec<u8>, Error> {
    let file = File::open(path).map_err(Error::io("open kernel", path))?;
    let metadata = file.metadata().map_err(Error::io("read kernel", path))?;
    if !metadata.is_file() {
        return Err(Error::Kernel {
            path: path.to_owned(),
            what: "it is not a file".into(),
        });
    }
    if metadata.len() > MAX_KERNEL_FILE {
        return Err(Error::Kernel {
            path: path.to_owned(),
            what: "it is larger than a kernel can be".into(),
        });
    }
    let mut image = Vec::new();
    file.take(MAX_KERNEL_FILE)
        .read_to_end(&mut image)
        .map_err(Error::io("read kernel", path))?;
    Ok(image)
}

/// Writes the guest's files beside their place and moves them there: a reader sees all of it or nothing.
fn install(
    store: &Store,
    target: &Path,
    record: &Record,
    vmlinux: &[u8],
    modules: Option<&[u8]>,
) -> Result<(), Error> {
    let root = store.root();
    fs::create_dir_all(root).map_err(Error::io("create", root))?;
    let unfinished = Unfinished(root.join(format!(
        "{UNFINISHED}{}.{}",
        record.name,
        std::process::id()
    )));
    fs::create_dir(&unfinished.0).map_err(Error::io("create", &unfinished.0))?;

    let mut json = serde_json::to_vec_pretty(record).map_err(|source| Error::Record {
        path: unfinished.0.join(RECORD),
        source,
    })?;
    json.push(b'\n');
    let files = [
        (KERNEL, Some(vmlinux)),
        (MODULES, modules),
        (RECORD, Some(json.as_slice())),
    ];
    for (name, content) in files {
        if let Some(content) = content {
            let path = unfinished.0.join(name);
            write_synced(&path, content).map_err(Error::io("write", path))?;
        }
    }
    // A rename onto an empty directory would succeed; `run` refused an existing target, and a race for the name can
    // only meet a whole guest, which is not empty.
    fs::rename(&unfinished.0, target).map_err(|e| match e.kind() {
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => Error::Exists {
            name: record.name.clone(),
        },
        _ => Error::io("create", target)(e),
    })
}

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Removes an unfinished guest when import fails; after the rename there is nothing left to remove.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A module tree with everything built in.
    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.dep"), "").unwrap();
        let builtin =
            "k/virtio_mmio.ko\nk/vmw_vsock_virtio_transport.ko\nk/virtiofs.ko\nk/overlay.ko\n";
        fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        dir
    }

    fn import(kernel: &[u8], store: &Store, name: Option<&str>) -> Result<Imported, Error> {
        let tree = tree();
        let file = tree.path().join("kernel");
        fs::write(&file, kernel).unwrap();
        Import {
            kernel: file,
            modules: Some(tree.path().to_owned()),
            name: name.map(str::to_owned),
        }
        .run(store)
    }

    #[test]
    fn a_vmlinux_is_taken_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path().join("guests"));
        let kernel = elf::tests::vmlinux(b"Linux version 6.12.1-x (a@b) #1");
        let imported = import(&kernel, &store, None).unwrap();
        assert_eq!(imported.guest.name(), "6.12.1-x");
        assert_eq!(imported.guest.kernel_release(), "6.12.1-x");
        assert_eq!(imported.guest.modules_cpio(), None);
        assert_eq!(fs::read(imported.guest.kernel()).unwrap(), kernel);
        assert!(imported.missing.contains(&"erofs"));
        assert!(matches!(
            import(&kernel, &store, None),
            Err(Error::Exists { .. })
        ));
        import(&kernel, &store, Some("second")).unwrap();
    }

    #[test]
    fn a_failed_import_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let kernel = elf::tests::vmlinux(b"Linux version 6.12.1-x (a@b) #1");
        for bad in [
            &b""[..],
            b"text",
            &kernel[..100],
            &elf::tests::vmlinux(b"no banner"),
        ] {
            assert!(matches!(
                import(bad, &store, None),
                Err(Error::Kernel { .. })
            ));
        }
        let hostile = elf::tests::vmlinux(b"Linux version 6/../../x (a@b) #1");
        assert!(matches!(
            import(&hostile, &store, None),
            Err(Error::Kernel { .. })
        ));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn missing_modules_name_the_flag() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("kernel");
        fs::write(
            &file,
            elf::tests::vmlinux(b"Linux version 0.0.0-none (a@b) #1"),
        )
        .unwrap();
        let import = Import {
            kernel: file,
            modules: None,
            name: None,
        };
        let text = import
            .run(&Store::new(root.path()))
            .unwrap_err()
            .to_string();
        assert!(text.contains("--modules"), "{text}");
    }
}
