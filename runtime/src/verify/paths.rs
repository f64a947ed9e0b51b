//! Where the paths of a configuration lead on this host, and the patterns by which a policy names the host's paths.
//!
//! The paths are a hostile bundle's: links are read one by one and in bounded number, and nothing is opened. The patterns
//! are the policy's, which is trusted, and lead through the same links.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Component, Path, PathBuf};

/// How many links are followed in a path, as in the kernel.
const LINK_LIMIT: usize = 40;

/// The path that an absolute `path` leads to, as far as it exists; what does not exist is taken by its text.
pub fn resolve(path: &Path) -> PathBuf {
    let parts = |path: &Path| -> Vec<OsString> {
        let parts = path.components().rev();
        parts.map(|part| part.as_os_str().to_owned()).collect()
    };
    // Those still to go, the next one last.
    let mut rest = parts(path);
    let mut resolved = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = rest.pop() {
        match Path::new(&part).components().next() {
            Some(Component::ParentDir) => drop(resolved.pop()),
            Some(Component::RootDir) => resolved = PathBuf::from("/"),
            Some(Component::Normal(name)) => {
                resolved.push(name);
                let is_short = resolved.as_os_str().len() < libc::PATH_MAX as usize;
                let link = (is_short && links < LINK_LIMIT)
                    .then(|| link_at(&resolved))
                    .flatten();
                if let Some(target) = link {
                    links += 1;
                    resolved.pop();
                    rest.extend(parts(&target));
                }
            }
            _ => {}
        }
    }
    resolved
}

/// What a link says, if it is one that leads to another path.
fn link_at(path: &Path) -> Option<PathBuf> {
    let is_in_proc = path.starts_with("/proc");
    match std::fs::read_link(path) {
        // The text of a link to a namespace, a pipe or a socket is no path: `net:[4026531840]`.
        Ok(target) => (!is_in_proc || !target.to_string_lossy().contains(":[")).then_some(target),
        // The root of a process that we may not look at is taken for the host's.
        Err(error) if is_in_proc && error.kind() == io::ErrorKind::PermissionDenied => {
            (path.file_name() == Some(OsStr::new("root"))).then(|| PathBuf::from("/"))
        }
        Err(_) => None,
    }
}

/// A policy's name for paths of the host: absolute, or with `**/` before it for "in any directory". A component `*` is any
/// one; a slash at the end stands for all that is below too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    is_anywhere: bool,
    is_tree: bool,
    /// `None` is any one component.
    parts: Vec<Option<OsString>>,
}

/// How a pattern meets a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// The path is named, or lies below what is named.
    Named,
    /// What is named lies below the path.
    Below,
}

impl Pattern {
    /// The pattern of a text, with the links in it resolved.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_tree = text.ends_with('/');
        let anywhere = text.strip_prefix("**/");
        let path = match anywhere {
            Some(rest) => Path::new("/").join(rest.trim_start_matches('/')),
            None => PathBuf::from(text),
        };
        if !path.is_absolute() {
            return Err(format!("{text:?} is neither absolute nor begins with **/"));
        }
        let mut names = Vec::new();
        for part in path.components() {
            match part {
                Component::Normal(name) if name == "**" => {
                    return Err(format!("{text:?} has ** not at its beginning"));
                }
                Component::Normal(name) => names.push(name),
                Component::ParentDir => return Err(format!("{text:?} contains ..")),
                _ => {}
            }
        }
        if anywhere.is_some() && names.is_empty() {
            return Err(format!("{text:?} names nothing"));
        }
        let is_any = |name: &&OsStr| *name == "*";
        let plain = names.iter().position(is_any).unwrap_or(names.len());
        let (plain, rest) = names.split_at(plain);
        let mut parts: Vec<Option<OsString>> = if anywhere.is_some() {
            plain.iter().map(|name| Some((*name).to_owned())).collect()
        } else {
            let plain = resolve(&Path::new("/").join(plain.iter().collect::<PathBuf>()));
            components(&plain)
                .map(|name| Some(name.to_owned()))
                .collect()
        };
        parts.extend(
            rest.iter()
                .map(|name| (!is_any(name)).then(|| (*name).to_owned())),
        );
        Ok(Self {
            is_anywhere: anywhere.is_some(),
            is_tree,
            parts,
        })
    }

    /// Whether it meets a path that was resolved.
    pub fn meets(&self, path: &Path) -> Option<Match> {
        let names: Vec<&OsStr> = components(path).collect();
        if self.is_anywhere {
            let mut places = names.windows(self.parts.len()).enumerate();
            let is_met = places.any(|(index, place)| {
                let is_end = index + place.len() == names.len();
                (self.is_tree || is_end) && self.fits(place)
            });
            return is_met.then_some(Match::Named);
        }
        if !self.fits(&names) {
            return None;
        }
        match names.len().cmp(&self.parts.len()) {
            std::cmp::Ordering::Less => Some(Match::Below),
            std::cmp::Ordering::Equal => Some(Match::Named),
            std::cmp::Ordering::Greater => self.is_tree.then_some(Match::Named),
        }
    }

    /// Whether it names `path` itself.
    pub fn is(&self, path: &Path) -> bool {
        !self.is_anywhere
            && components(path).count() == self.parts.len()
            && self.meets(path) == Some(Match::Named)
    }

    /// Whether the names are those of the pattern, as far as there are both.
    fn fits(&self, names: &[&OsStr]) -> bool {
        let mut pairs = self.parts.iter().zip(names);
        pairs.all(|(part, name)| part.as_ref().is_none_or(|part| part == name))
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_anywhere {
            f.write_str("**")?;
        }
        for part in &self.parts {
            let name = part.as_deref().unwrap_or(OsStr::new("*"));
            write!(f, "/{}", name.to_string_lossy())?;
        }
        Ok(())
    }
}

fn components(path: &Path) -> impl Iterator<Item = &OsStr> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_path_is_resolved_as_far_as_it_exists_and_no_link_keeps_it() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().canonicalize().unwrap();
        symlink("/proc/1/none-such", top.join("dangling")).unwrap();
        symlink("loop", top.join("loop")).unwrap();
        symlink("..", top.join("up")).unwrap();
        let resolved = |path: &str| resolve(&top.join(path));
        assert_eq!(resolved("dangling/x"), Path::new("/proc/1/none-such/x"));
        assert_eq!(resolved("a/./b/../c/"), top.join("a/c"));
        assert_eq!(resolved("up"), top.parent().unwrap());
        assert_eq!(resolved("loop"), top.join("loop"));
        assert_eq!(resolve(Path::new("/../..")), Path::new("/"));
        assert_eq!(
            resolve(Path::new("/proc/1/root/proc/1/ns/net")),
            Path::new("/proc/1/ns/net")
        );
        let own = format!("/proc/{}/ns/net", std::process::id());
        assert_eq!(resolve(Path::new("/proc/self/ns/net")), Path::new(&own));
    }

    #[test]
    fn a_pattern_meets_what_it_names() {
        let meets = |pattern: &str, path: &str| {
            let pattern = Pattern::parse(pattern).unwrap();
            pattern.meets(Path::new(path))
        };
        let (named, below) = (Some(Match::Named), Some(Match::Below));
        assert_eq!(meets("/a/b", "/a/b"), named);
        assert_eq!(meets("/a/b", "/a"), below);
        assert_eq!(meets("/a/b", "/"), below);
        assert_eq!(meets("/a/b", "/a/b/c"), None);
        assert_eq!(meets("/a/b/", "/a/b/c"), named);
        assert_eq!(meets("/a/b/", "/a/bc"), None);
        assert_eq!(meets("/a/*/b/", "/a/1/b/c"), named);
        assert_eq!(meets("/a/*/b/", "/a/1"), below);
        assert_eq!(meets("/a/*/b/", "/a/1/c"), None);
        assert_eq!(meets("**/.b/", "/a/.b/c"), named);
        assert_eq!(meets("**/.b/", "/a"), None);
        assert_eq!(meets("**/.b", "/a/.b"), named);
        assert_eq!(meets("**/.b", "/a/.b/c"), None);
        for wrong in ["", "a", "a/b", "/a/../b", "/a/**/b", "**/"] {
            assert!(Pattern::parse(wrong).is_err(), "{wrong}");
        }
    }
}
