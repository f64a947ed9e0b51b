//! Where this system has its cgroup hierarchies.
//!
//! The usual places are asked first. The table of mounts, which grows with every container of the host, is read only
//! where a hierarchy is somewhere else.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::{Error, Result};

const ROOT: &str = "/sys/fs/cgroup";

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The controllers of a version 1 hierarchy (`cpu`, `cpuacct`, `name=systemd`); `None` for version 2.
    pub controllers: Option<Vec<String>>,
}

impl Hierarchy {
    /// Whether this is the version 2 hierarchy.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        self.controllers.is_none()
    }

    /// Whether this version 1 hierarchy has a controller.
    #[must_use]
    pub fn has(&self, controller: &str) -> bool {
        self.controllers
            .as_ref()
            .is_some_and(|names| names.iter().any(|name| name == controller))
    }
}

/// The hierarchies of a system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) hierarchies: Vec<Hierarchy>,
}

impl Layout {
    /// Reads the layout of this system.
    ///
    /// # Errors
    /// No hierarchy is mounted below /sys/fs/cgroup.
    pub fn detect() -> Result<Self> {
        let is = |place: &Path, kind: FsType| {
            statfs(place).is_ok_and(|found| found.filesystem_type() == kind)
        };
        if is(Path::new(ROOT), CGROUP2_SUPER_MAGIC) {
            return Ok(Self {
                hierarchies: vec![Hierarchy {
                    mount: ROOT.into(),
                    controllers: None,
                }],
            });
        }
        let own = Path::new("/proc/self/cgroup");
        let text =
            fs::read_to_string(own).map_err(|source| super::io_error("read", own, source))?;
        if let Some(layout) = Self::at_usual_places(&text, is) {
            return Ok(layout);
        }
        let path = Path::new("/proc/self/mountinfo");
        let text = fs::read(path).map_err(|source| super::io_error("read", path, source))?;
        let layout = Self::parse(&String::from_utf8_lossy(&text));
        if layout.hierarchies.is_empty() {
            return Err(Error::NotMounted);
        }
        Ok(layout)
    }

    /// No hierarchy at all.
    pub(super) fn none() -> &'static Self {
        static NONE: Layout = Layout {
            hierarchies: Vec::new(),
        };
        &NONE
    }

    /// The layout of this system, found out once.
    ///
    /// # Errors
    /// As [`Layout::detect`].
    pub fn of_system() -> Result<&'static Self> {
        static FOUND: OnceLock<Layout> = OnceLock::new();
        match FOUND.get() {
            Some(layout) => Ok(layout),
            None => {
                let layout = Self::detect()?;
                Ok(FOUND.get_or_init(|| layout))
            }
        }
    }

    /// cgroups(7): `number:controllers:path` a line; each hierarchy of version 1 is mounted by its controllers' names,
    /// version 2 as `unified`, if at all.
    fn at_usual_places(own: &str, is: impl Fn(&Path, FsType) -> bool) -> Option<Self> {
        let mut hierarchies = Vec::new();
        for line in own.lines() {
            let names = line.split(':').nth(1)?;
            let place = match names {
                "" => "unified",
                named => named.strip_prefix("name=").unwrap_or(named),
            };
            let mount = Path::new(ROOT).join(place);
            if names.is_empty() {
                if is(&mount, CGROUP2_SUPER_MAGIC) {
                    hierarchies.push(Hierarchy {
                        mount,
                        controllers: None,
                    });
                }
                continue;
            }
            if !is(&mount, CGROUP_SUPER_MAGIC) {
                return None;
            }
            let controllers = Some(names.split(',').map(str::to_owned).collect());
            hierarchies.push(Hierarchy { mount, controllers });
        }
        (!hierarchies.is_empty()).then_some(Self { hierarchies })
    }

    /// The hierarchies as they were mounted.
    #[must_use]
    pub fn hierarchies(&self) -> &[Hierarchy] {
        &self.hierarchies
    }

    /// `v1`, `hybrid` or `v2`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        let unified = self.unified().is_some();
        let legacy = self.hierarchies.iter().any(|one| !one.is_unified());
        match (unified, legacy) {
            (true, true) => "hybrid",
            (true, false) => "v2",
            _ => "v1",
        }
    }

    /// The version 2 hierarchy.
    #[must_use]
    pub fn unified(&self) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|one| one.is_unified())
    }

    /// The version 1 hierarchy that has a controller.
    #[must_use]
    pub fn v1(&self, controller: &str) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|one| one.has(controller))
    }

    /// proc(5): `id parent major:minor root mountpoint options [tags...] - type source superoptions`.
    fn parse(mountinfo: &str) -> Self {
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let mount = left.split(' ').nth(4).unwrap_or_default();
            if mount != "/sys/fs/cgroup" && !mount.starts_with("/sys/fs/cgroup/") {
                continue;
            }
            let mut right = right.split(' ');
            let kind = right.next().unwrap_or_default();
            let options = right.nth(1).unwrap_or_default();
            let controllers = match kind {
                "cgroup2" => None,
                "cgroup" => Some(
                    options
                        .split(',')
                        .filter(|option| {
                            // The other options of a cgroup superblock, see cgroup1_show_options().
                            !matches!(
                                *option,
                                "rw" | "ro"
                                    | "noprefix"
                                    | "xattr"
                                    | "cpuset_v2_mode"
                                    | "favordynmods"
                            ) && !option.starts_with("release_agent=")
                        })
                        .map(str::to_owned)
                        .collect::<Vec<_>>(),
                ),
                _ => continue,
            };
            let hierarchy = Hierarchy {
                mount: PathBuf::from(mount),
                controllers,
            };
            let again = hierarchies.iter_mut().find(|one| {
                one.mount == hierarchy.mount || one.controllers == hierarchy.controllers
            });
            match again {
                // A later mount on the same place covers the earlier one.
                Some(one) if one.mount == hierarchy.mount => *one = hierarchy,
                Some(_) => {}
                None => hierarchies.push(hierarchy),
            }
        }
        Self { hierarchies }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
42 31 0:39 / /other/cgroup rw - cgroup cgroup rw,memory
";

    #[test]
    fn a_hybrid_system_has_both_versions() {
        let layout = Layout::parse(HYBRID);
        assert_eq!(layout.name(), "hybrid");
        assert_eq!(
            layout.v1("cpuacct").unwrap().mount,
            Path::new("/sys/fs/cgroup/cpu,cpuacct")
        );
        assert!(layout.v1("name=systemd").is_some());
        assert!(layout.v1("memory").is_none(), "mounted elsewhere");
        assert_eq!(
            layout.unified().unwrap().mount,
            Path::new("/sys/fs/cgroup/unified")
        );
    }

    #[test]
    fn a_unified_system_has_one_hierarchy() {
        let layout =
            Layout::parse("25 23 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n");
        assert_eq!(layout.name(), "v2");
        assert_eq!(layout.hierarchies().len(), 1);
    }

    #[test]
    fn the_usual_places_are_known_without_the_table_of_mounts() {
        let own = "4:cpu,cpuacct:/x\n1:name=systemd:/\n0::/x\n";
        let all = Layout::at_usual_places(own, |_, _| true).unwrap();
        let usual = Layout::parse(HYBRID);
        for hierarchy in usual.hierarchies() {
            assert!(all.hierarchies().contains(hierarchy), "{hierarchy:?}");
        }
        let without_v2 = |_: &Path, kind| kind != CGROUP2_SUPER_MAGIC;
        let layout = Layout::at_usual_places(own, without_v2).unwrap();
        assert_eq!(layout.name(), "v1");
        let elsewhere = |place: &Path, _| !place.ends_with("cpu,cpuacct");
        assert_eq!(Layout::at_usual_places(own, elsewhere), None);
    }

    #[test]
    fn a_cover_mount_wins() {
        let layout = Layout::parse(
            "25 23 0:22 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n\
             26 25 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(layout.name(), "v2");
    }
}
