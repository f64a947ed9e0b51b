//! Compiled seccomp profiles, kept in a directory: the compiler takes longer than all the rest of a container's creation,
//! and a host has few profiles.
//!
//! Who can write there decides what containers may do. So the directory must be ours and nobody else's to write, its files
//! are reached through it alone, and a file's name is a hash of the profile and of the code that compiled it: what another
//! version made is never found.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::LinuxSeccomp;
use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::seccomp::Filter;

/// How many are kept. More are a sign of profiles that are made for one container each.
const MOST: usize = 64;

/// The longest file: the kernel takes programs of 4096 instructions (`BPF_MAXINSNS`).
const LONGEST: u64 = 4 + 4096 * 8;

/// The compiled profile, from the directory `cache` or for it.
///
/// # Errors
/// The profile cannot be compiled. A cache that cannot be used is no error.
pub(crate) fn compile(profile: &LinuxSeccomp, cache: Option<&Path>) -> Result<Filter, Error> {
    let cache = cache.and_then(Cache::open);
    let Some((cache, name)) = cache.zip(name_of(profile)) else {
        return Filter::compile(profile);
    };
    if let Some(filter) = cache.read(&name) {
        return Ok(filter);
    }
    let filter = Filter::compile(profile)?;
    // The next container will compile it again then.
    let _ = cache.write(&name, &filter);
    Ok(filter)
}

fn name_of(profile: &LinuxSeccomp) -> Option<String> {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(profile).ok()?);
    hash.update(include_bytes!("seccomp.rs"));
    if let Ok(version) = libseccomp::ScmpVersion::current() {
        hash.update(format!("{version}"));
    }
    let bytes = hash.finalize();
    Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

struct Cache(OwnedFd);

impl Cache {
    fn open(path: &Path) -> Option<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::open(path, flags, Mode::empty());
        let directory = match open() {
            Err(rustix::io::Errno::NOENT) => {
                let _ = rustix::fs::mkdir(path, Mode::RWXU);
                open()
            }
            opened => opened,
        };
        let directory = directory.ok()?;
        let stat = rustix::fs::fstat(&directory).ok()?;
        let is_ours = stat.st_uid == rustix::process::geteuid().as_raw()
            && Mode::from_raw_mode(stat.st_mode).bits() & 0o022 == 0;
        is_ours.then_some(Self(directory))
    }

    fn read(&self, name: &str) -> Option<Filter> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.0, name, flags, Mode::empty()).ok()?;
        let mut bytes = Vec::new();
        let file = std::fs::File::from(file);
        file.take(LONGEST + 1).read_to_end(&mut bytes).ok()?;
        if bytes.len() as u64 > LONGEST {
            return None;
        }
        Filter::from_bytes(&bytes)
    }

    fn write(&self, name: &str, filter: &Filter) -> std::io::Result<()> {
        self.make_room()?;
        // Whole or not at all, for who reads it meanwhile.
        let temporary = format!(".{}", std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let _ = rustix::fs::unlinkat(&self.0, &temporary, AtFlags::empty());
        let file = rustix::fs::openat(&self.0, &temporary, flags, mode)?;
        std::fs::File::from(file).write_all(&filter.to_bytes())?;
        Ok(rustix::fs::renameat(&self.0, &temporary, &self.0, name)?)
    }

    /// Empties a directory that is full.
    fn make_room(&self) -> std::io::Result<()> {
        let entries: Vec<_> = Dir::read_from(&self.0)?.flatten().collect();
        if entries.len() < MOST + 2 {
            return Ok(());
        }
        for entry in entries {
            let _ = rustix::fs::unlinkat(&self.0, entry.file_name(), AtFlags::empty());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn profile(action: &str) -> LinuxSeccomp {
        let text = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["mkdir"],"action":"{action}"}}]}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_profile_is_compiled_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let first = compile(&profile("SCMP_ACT_ERRNO"), Some(&cache)).unwrap();
        let files = || fs::read_dir(&cache).unwrap().count();
        assert_eq!(files(), 1);
        let again = compile(&profile("SCMP_ACT_ERRNO"), Some(&cache)).unwrap();
        assert_eq!(first.to_bytes(), again.to_bytes());
        assert_eq!(files(), 1);
        let other = compile(&profile("SCMP_ACT_KILL"), Some(&cache)).unwrap();
        assert_ne!(first.to_bytes(), other.to_bytes());
        assert_eq!(files(), 2);
    }

    #[test]
    fn what_is_damaged_or_others_could_write_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let profile = profile("SCMP_ACT_ERRNO");
        let compiled = compile(&profile, None).unwrap().to_bytes();
        let cached = || compile(&profile, Some(&cache)).unwrap().to_bytes();
        assert_eq!(cached(), compiled);
        let file = cache.join(name_of(&profile).unwrap());
        for damaged in [vec![], vec![0; 3], vec![0; 13], vec![0; 1 << 20]] {
            fs::write(&file, damaged).unwrap();
            assert_eq!(cached(), compiled);
        }
        // A program that allows everything, where anybody could have put it.
        let allow_all = Filter::compile(
            &serde_json::from_str(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap(),
        );
        fs::write(&file, allow_all.unwrap().to_bytes()).unwrap();
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(cached(), compiled);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&cache, &link).unwrap();
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(compile(&profile, Some(&link)).unwrap().to_bytes(), compiled);
    }

    #[test]
    fn a_full_cache_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..MOST {
            fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        compile(&profile("SCMP_ACT_ERRNO"), Some(dir.path())).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
