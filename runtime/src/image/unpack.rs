//! Unpacking an image into a bundle, all or nothing.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::layer::{self, Limits};
use super::layout::{self, Wanted};
use super::root::Root;
use super::source::Source;
use super::{Error, Platform, config, users};

/// All layers together hold no more entries.
const MAX_ENTRIES: u64 = 4_000_000;

/// What to unpack, and where to.
#[derive(Clone, Debug)]
pub struct Unpack<'a> {
    /// An OCI layout (directory or archive) or an archive of `docker save`.
    pub image: &'a Path,
    /// The bundle, which must not exist yet.
    pub target: &'a Path,
    /// The image's tag, where there are several.
    pub tag: Option<&'a str>,
    /// The platform, where there are several.
    pub platform: Option<&'a Platform>,
    /// The most that the layers may hold together, in bytes.
    pub max_bytes: u64,
}

/// What was unpacked.
#[derive(Debug, Eq, PartialEq)]
pub struct Unpacked {
    /// The number of layers.
    pub layers: usize,
    /// Whether the image names a command.
    pub has_command: bool,
    /// Extended attributes that mean nothing here, or that the file system cannot hold.
    pub skipped_xattrs: u64,
}

impl Unpack<'_> {
    /// Makes the bundle; `base` is what its configuration says where the image does not.
    ///
    /// # Errors
    /// If the image is damaged or hostile, or the target cannot be made. Nothing is left then.
    pub fn run(&self, base: Spec) -> Result<Unpacked, Error> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        if fs::symlink_metadata(self.target).is_ok() {
            return Err(Error::Exists {
                path: self.target.to_owned(),
            });
        }
        let source = Source::open(self.image)?;
        let wanted = Wanted {
            tag: self.tag,
            platform: self.platform,
        };
        let image = layout::find(&source, self.image, &wanted)?;

        let unfinished = Unfinished::create(self.target)?;
        let rootfs = unfinished.path.join("rootfs");
        fs::create_dir(&rootfs).map_err(Error::io("create", &rootfs))?;
        fs::set_permissions(&rootfs, Permissions::from_mode(0o755))
            .map_err(Error::io("create", &rootfs))?;
        let root = Root::open(&rootfs).map_err(Error::io("open", &rootfs))?;

        let mut limits = Limits {
            bytes: self.max_bytes,
            bytes_allowed: self.max_bytes,
            entries: MAX_ENTRIES,
            skipped_xattrs: 0,
        };
        for (index, layer) in image.layers.iter().enumerate() {
            layer::apply(&source, layer, index + 1, &root, &mut limits)?;
        }

        let process = image.config.config.as_ref();
        let user = users::find(
            &root,
            process
                .and_then(|process| process.user.as_deref())
                .unwrap_or_default(),
        )?;
        let cwd = config::working_dir(&image.config)?.trim_start_matches('/');
        root.make_directories(Path::new(cwd))
            .map_err(Error::io("create the image's working directory", cwd))?;
        let spec = config::apply(base, &image.config, &user)?;
        write_config(&unfinished.path.join("config.json"), &spec)?;
        unfinished.commit(self.target)?;

        let is_given =
            |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
        Ok(Unpacked {
            layers: image.layers.len(),
            has_command: process
                .is_some_and(|process| is_given(&process.entrypoint) || is_given(&process.cmd)),
            skipped_xattrs: limits.skipped_xattrs,
        })
    }
}

fn write_config(path: &Path, spec: &Spec) -> Result<(), Error> {
    let mut json = serde_json::to_vec_pretty(spec).map_err(|source| Error::Json {
        name: "configuration".into(),
        source,
    })?;
    json.push(b'\n');
    let mut file = File::create_new(path).map_err(Error::io("create", path))?;
    file.write_all(&json).map_err(Error::io("write", path))
}

/// A bundle in the making, beside its place. It is removed unless it was committed.
struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    fn create(target: &Path) -> Result<Self, Error> {
        let name = target.file_name().ok_or_else(|| Error::Exists {
            path: target.to_owned(),
        })?;
        let mut unfinished = std::ffi::OsString::from(".");
        unfinished.push(name);
        unfinished.push(format!(".unpacking.{}", std::process::id()));
        let path = target.with_file_name(unfinished);
        // Nobody else may enter: the image's set-user-ID programs are no business of other users.
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(Error::io("create", &path))?;
        Ok(Self { path })
    }

    fn commit(self, target: &Path) -> Result<(), Error> {
        let exists = || Error::Exists {
            path: target.to_owned(),
        };
        match renameat_with(CWD, &self.path, CWD, target, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            // The file system has no such rename; an empty directory of that name is the most it can replace.
            Err(Errno::INVAL | Errno::NOSYS) => {
                fs::rename(&self.path, target).map_err(|e| match e.kind() {
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => exists(),
                    _ => Error::io("create", target)(e),
                })
            }
            Err(Errno::EXIST) => Err(exists()),
            Err(e) => Err(Error::io("create", target)(e.into())),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a commit nothing is there.
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
