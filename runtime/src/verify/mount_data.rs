//! The options of a file system that bound what it shows and holds, against those that were asked for.
//!
//! The kernel writes them in a form of its own, and leaves out what is the default.

use oci_spec::runtime::Mount;

use super::config::{bytes, is_bind};
use super::mount_table::Line;

/// The rights of the root of a tmpfs for which nothing else is said.
const TMPFS_MODE: u32 = 0o1777;
/// Those of a terminal (`DEVPTS_DEFAULT_MODE`).
const DEVPTS_MODE: u32 = 0o600;

/// A size is rounded up to whole pages.
const PAGE: u64 = 4096;

/// The options of `asked` that are not in force in what is mounted.
pub(super) fn missing(asked: &Mount, line: &Line) -> Vec<String> {
    if is_bind(asked) {
        return Vec::new();
    }
    let options = asked.options().iter().flatten();
    let options = options.flat_map(|option| option.split(','));
    let mut last: Vec<(&str, &str)> = Vec::new();
    for (key, value) in options.filter_map(|option| option.split_once('=')) {
        last.retain(|(known, _)| *known != key);
        last.push((key, value));
    }
    let missing = last
        .into_iter()
        .filter(|(key, value)| !is_in_force(key, value, line));
    missing
        .map(|(key, value)| format!("{key}={value}"))
        .collect()
}

fn is_in_force(key: &str, asked: &str, line: &Line) -> bool {
    let mut data = line.data.iter().filter_map(|option| option.split_once('='));
    let found = data.find_map(|(name, value)| (name == key).then_some(value));
    // A number of what there may be at most; without one, and with 0, there is no bound.
    let at_most = |asked: Option<u64>| match asked {
        None | Some(0) => true,
        Some(asked) => {
            let found = found.and_then(bytes).filter(|found| *found > 0);
            found.is_some_and(|found| found <= asked)
        }
    };
    match (line.kind.as_str(), key) {
        ("proc", "hidepid") => hides(found.unwrap_or("off"), asked),
        ("proc", "subset") => found == Some(asked),
        // A share of the machine's memory is not known here.
        ("tmpfs", "size") => at_most(bytes(asked).map(|bytes| bytes.next_multiple_of(PAGE))),
        ("tmpfs", "nr_inodes") | ("devpts", "max") => at_most(bytes(asked)),
        ("tmpfs", "nr_blocks") => true,
        ("tmpfs", "mode") => is_no_wider(found, asked, TMPFS_MODE),
        ("devpts", "mode") => is_no_wider(found, asked, DEVPTS_MODE),
        _ => true,
    }
}

/// How much of other users' processes is hidden (the kernel's proc.rst): numbers or names, of which the last one hides in
/// another way.
fn hides(found: &str, asked: &str) -> bool {
    let level = |text: &str| match text {
        "off" | "0" => Some(0),
        "noaccess" | "1" => Some(1),
        "invisible" | "2" => Some(2),
        "ptraceable" | "4" => Some(4),
        _ => None,
    };
    let (found, asked) = (level(found), level(asked));
    asked.is_none_or(|asked| asked == 0 || found.is_some_and(|found| found >= asked))
}

/// Whether nobody may do more than was asked for.
fn is_no_wider(found: Option<&str>, asked: &str, default: u32) -> bool {
    let mode = |text: &str| u32::from_str_radix(text, 8).ok();
    let found = found.map_or(Some(default), mode);
    // Whether only an owner may remove a file is a right that the bit takes.
    let rights = |mode: u32| (mode & 0o777) | (!mode & 0o1000);
    let (found, asked) = (found.map(rights), mode(asked).map(rights));
    asked.is_none_or(|asked| found.is_some_and(|found| found & !asked == 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::mount_table::parse;

    fn missing_of(kind: &str, asked: &[&str], found: &str) -> Vec<String> {
        let asked =
            serde_json::json!({"destination": "/x", "type": kind, "source": "x", "options": asked});
        let line = format!("51 50 0:51 / /x rw - {kind} x rw{found}");
        missing(&serde_json::from_value(asked).unwrap(), &parse(&line)[0])
    }

    #[test]
    fn an_option_is_in_force_or_told() {
        for (kind, asked, found) in [
            ("proc", "hidepid=2", ",hidepid=invisible"),
            ("proc", "hidepid=invisible", ",hidepid=2"),
            ("proc", "hidepid=1", ",hidepid=invisible"),
            ("proc", "subset=pid", ",subset=pid"),
            ("tmpfs", "size=65536k", ",size=65536k"),
            (
                "tmpfs",
                "size=64m,nr_inodes=1k",
                ",size=65536k,nr_inodes=1024",
            ),
            ("tmpfs", "size=5000", ",size=8k"),
            ("tmpfs", "mode=1777", ""),
            ("tmpfs", "mode=755", ",mode=755"),
            ("devpts", "mode=0620", ",mode=620"),
            ("devpts", "max=8", ",max=8"),
        ] {
            assert_eq!(missing_of(kind, &[asked], found), [""; 0], "{asked}");
        }
        for (kind, asked, found) in [
            ("proc", "hidepid=2", ""),
            ("proc", "hidepid=2", ",hidepid=noaccess"),
            ("proc", "hidepid=ptraceable", ",hidepid=invisible"),
            ("proc", "subset=pid", ""),
            ("tmpfs", "size=64k", ""),
            ("tmpfs", "size=64k", ",size=68k"),
            ("tmpfs", "nr_inodes=8", ",nr_inodes=9"),
            ("tmpfs", "mode=700", ",mode=755"),
            ("tmpfs", "mode=1777", ",mode=777"),
            ("devpts", "mode=600", ",mode=620"),
            ("devpts", "max=8", ""),
        ] {
            assert_eq!(missing_of(kind, &[asked], found), [asked]);
        }
        // The last one counts, and what is of no such file system is none.
        assert_eq!(
            missing_of("tmpfs", &["size=1k", "size=8k"], ",size=8k"),
            [""; 0]
        );
        assert_eq!(missing_of("sysfs", &["size=1k"], ""), [""; 0]);
    }
}
