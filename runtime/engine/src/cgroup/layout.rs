//! Where this system has its cgroup hierarchies, from one reading of /proc/self/mountinfo.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, Result};

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
        let path = Path::new("/proc/self/mountinfo");
        let text = fs::read(path).map_err(|source| super::io_error("read", path, source))?;
        let layout = Self::parse(&String::from_utf8_lossy(&text));
        if layout.hierarchies.is_empty() {
            return Err(Error::NotMounted);
        }
        Ok(layout)
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
    fn a_cover_mount_wins() {
        let layout = Layout::parse(
            "25 23 0:22 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n\
             26 25 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(layout.name(), "v2");
    }
}
