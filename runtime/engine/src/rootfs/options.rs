//! The options of a mount in config.json (runtime-spec, "Linux mount options"), parsed once.
//!
//! They are the bundle author's. An option that is of no mount is data for the file system, whose kernel code judges it;
//! on a bind mount, which has no file system of its own, it is an error.

use nix::mount::MsFlags;
use oci_spec::runtime::Mount;

use crate::error::Error;
use crate::spec::is_bind;

/// What is set and cleared of a mount's attributes, as mount_setattr(2) takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
}

impl Attributes {
    pub(crate) const READ_ONLY: Self = Self {
        set: libc::MOUNT_ATTR_RDONLY,
        clear: 0,
    };

    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// A later option wins over an earlier one.
    fn apply(&mut self, change: Self) {
        self.set = self.set & !change.clear | change.set;
        self.clear = self.clear & !change.set | change.clear;
        // The kernel wants the access time modes, which are one field, cleared as a whole.
        if change.clear & libc::MOUNT_ATTR__ATIME != 0 {
            self.clear |= libc::MOUNT_ATTR__ATIME;
        }
    }
}

/// What a mount is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bind {
    /// A file system.
    No,
    /// A directory or file of the host.
    Single,
    /// The same with all mounts below it.
    Recursive,
}

/// How the ids of a bind mount's files are shifted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdMap {
    /// Not at all.
    No,
    /// Those of the mount itself.
    Single,
    /// Those of the mounts below it too.
    Recursive,
}

/// One argument for a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Flag(String),
    Value(String, String),
}

/// The options of one mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) bind: Bind,
    pub(crate) id_map: IdMap,
    /// Attributes of the mount itself.
    pub(crate) attributes: Attributes,
    /// Attributes of the mount and all below it.
    pub(crate) recursive: Attributes,
    /// Propagation, as mount(2) spells it.
    pub(crate) propagation: Option<MsFlags>,
    /// A tmpfs begins with what its mount point has.
    pub(crate) copy_up: bool,
    pub(crate) data: Vec<Data>,
}

impl Options {
    /// Parses the options of `mounts[index]`.
    pub(crate) fn parse(index: usize, mount: &Mount) -> Result<Self, Error> {
        let refuse = |reason: String| {
            Err(Error::unsupported(
                format!("mounts[{index}].options"),
                reason,
            ))
        };
        let mut parsed = Self {
            bind: if is_bind(mount) {
                Bind::Single
            } else {
                Bind::No
            },
            id_map: IdMap::No,
            attributes: Attributes::default(),
            recursive: Attributes::default(),
            propagation: None,
            copy_up: false,
            data: Vec::new(),
        };
        let has_mappings = |map: &Option<Vec<_>>| map.as_ref().is_some_and(|map| !map.is_empty());
        if has_mappings(mount.uid_mappings()) || has_mappings(mount.gid_mappings()) {
            parsed.id_map = IdMap::Single;
        }
        let kind = mount.typ().as_deref().unwrap_or_default();
        for option in mount.options().iter().flatten() {
            // Several may come joined by commas; a quoted value may contain them.
            let whole = option.contains('"');
            let parts = option
                .split(move |letter| letter == ',' && !whole)
                .filter(|part| !part.is_empty());
            for part in parts {
                match part {
                    "bind" if parsed.bind != Bind::Recursive => parsed.bind = Bind::Single,
                    "bind" => {}
                    "rbind" => parsed.bind = Bind::Recursive,
                    "idmap" if parsed.id_map != IdMap::Recursive => parsed.id_map = IdMap::Single,
                    "idmap" => {}
                    "ridmap" => parsed.id_map = IdMap::Recursive,
                    "tmpcopyup" => parsed.copy_up = true,
                    // The first asks for nothing, the others only for quiet or loud kernel messages.
                    "defaults" | "silent" | "loud" => {}
                    "remount" => {
                        return refuse(
                            "\"remount\" is not supported; give the options to the mount itself"
                                .into(),
                        );
                    }
                    _ => {
                        if let Some(change) = attribute(part) {
                            parsed.attributes.apply(change);
                        } else if let Some(change) = part.strip_prefix('r').and_then(attribute) {
                            parsed.recursive.apply(change);
                        } else if let Some(flag) = propagation(part) {
                            parsed.propagation = Some(flag);
                        } else if parsed.bind == Bind::No {
                            parsed.data.push(match part.split_once('=') {
                                Some((key, value)) => Data::Value(key.into(), value.into()),
                                None => Data::Flag(part.into()),
                            });
                        } else {
                            return refuse(format!("{part:?} is no option of a bind mount"));
                        }
                    }
                }
            }
        }
        if parsed.copy_up && kind != "tmpfs" {
            return refuse("\"tmpcopyup\" is for a tmpfs only".into());
        }
        if parsed.id_map != IdMap::No && parsed.bind == Bind::No {
            return refuse("only a bind mount can be id-mapped".into());
        }
        Ok(parsed)
    }

    pub(crate) fn is_read_only(&self) -> bool {
        (self.attributes.set | self.recursive.set) & libc::MOUNT_ATTR_RDONLY != 0
    }
}

/// The change of attributes that an option without its `r` asks for.
fn attribute(option: &str) -> Option<Attributes> {
    let set = |flag| Attributes {
        set: flag,
        clear: 0,
    };
    let clear = |flag| Attributes {
        set: 0,
        clear: flag,
    };
    // Access times are one field of several values, of which zero is relatime.
    let access_time = |value| Attributes {
        set: value,
        clear: libc::MOUNT_ATTR__ATIME,
    };
    Some(match option {
        "ro" => set(libc::MOUNT_ATTR_RDONLY),
        "rw" => clear(libc::MOUNT_ATTR_RDONLY),
        "nosuid" => set(libc::MOUNT_ATTR_NOSUID),
        "suid" => clear(libc::MOUNT_ATTR_NOSUID),
        "nodev" => set(libc::MOUNT_ATTR_NODEV),
        "dev" => clear(libc::MOUNT_ATTR_NODEV),
        "noexec" => set(libc::MOUNT_ATTR_NOEXEC),
        "exec" => clear(libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => set(libc::MOUNT_ATTR_NODIRATIME),
        "diratime" => clear(libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => set(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => clear(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => access_time(libc::MOUNT_ATTR_NOATIME),
        "strictatime" => access_time(libc::MOUNT_ATTR_STRICTATIME),
        "relatime" | "norelatime" | "atime" | "nostrictatime" => {
            access_time(libc::MOUNT_ATTR_RELATIME)
        }
        _ => return None,
    })
}

/// The propagation that an option asks for; also the names that `linux.rootfsPropagation` takes.
pub(crate) fn propagation(option: &str) -> Option<MsFlags> {
    let (name, recursive) = match option {
        "private" | "slave" | "shared" | "unbindable" => (option, MsFlags::empty()),
        _ => (option.strip_prefix('r')?, MsFlags::MS_REC),
    };
    let flag = match name {
        "private" => MsFlags::MS_PRIVATE,
        "slave" => MsFlags::MS_SLAVE,
        "shared" => MsFlags::MS_SHARED,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

/// Every option that is not data for a file system, for `rt features`.
pub const KNOWN: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Options, Error> {
        Options::parse(3, &serde_json::from_str(text).unwrap())
    }

    #[test]
    fn a_later_option_wins() {
        let options = parse(
            r#"{"destination":"/x","type":"bind","source":"/y",
                "options":["rbind","bind","ro","rw","noatime","strictatime","rro","nosuid"]}"#,
        )
        .unwrap();
        assert_eq!(options.bind, Bind::Recursive);
        assert_eq!(
            options.attributes,
            Attributes {
                set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME,
                clear: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR__ATIME,
            }
        );
        assert_eq!(options.recursive, Attributes::READ_ONLY);
    }

    #[test]
    fn what_is_no_option_of_a_mount_is_the_file_systems() {
        let options = parse(
            r#"{"destination":"/x","type":"overlay","source":"overlay",
                "options":["lowerdir=/a:/b,upperdir=/c","index=off","rslave","relatime","userxattr"]}"#,
        )
        .unwrap();
        let value = |key: &str, value: &str| Data::Value(key.into(), value.into());
        assert_eq!(
            options.data,
            [
                value("lowerdir", "/a:/b"),
                value("upperdir", "/c"),
                value("index", "off"),
                Data::Flag("userxattr".into()),
            ]
        );
        assert_eq!(
            options.propagation,
            Some(MsFlags::MS_SLAVE | MsFlags::MS_REC)
        );
    }

    #[test]
    fn an_option_that_cannot_be_honoured_is_named() {
        for (mount, reason) in [
            (
                r#"{"destination":"/x","type":"bind","source":"/y","options":["bind","size=1"]}"#,
                "\"size=1\" is no option of a bind mount",
            ),
            (
                r#"{"destination":"/x","type":"proc","options":["tmpcopyup"]}"#,
                "\"tmpcopyup\" is for a tmpfs only",
            ),
            (
                r#"{"destination":"/x","type":"tmpfs","options":["ridmap"]}"#,
                "only a bind mount can be id-mapped",
            ),
        ] {
            assert_eq!(
                parse(mount).unwrap_err().to_string(),
                format!("mounts[3].options: {reason}")
            );
        }
    }
}
