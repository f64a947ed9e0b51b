//! What a guest knows of a share, by names, so that another server can take this one's place.
//!
//! The numbers of files and of open files are the guest's for as long as its kernel runs; the server that takes over has
//! numbers of its own, and [`Numbers`] lies between the two. A snapshot's content is as trusted as a kernel's image, but
//! names that are none and numbers that contradict each other are refused like a guest's.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// More than any server gives out, and half of what fits.
const MAX_NUMBER: u64 = 1 << 62;

/// Why a share cannot be written down, or taken over.
#[derive(Debug, Error)]
pub enum HeldError {
    /// Its name was removed, or another file has it.
    #[error("{} is open in the guest and has no name any more", path.display())]
    Unnamed {
        /// The name that it had, below the share.
        path: PathBuf,
    },
    /// The kernel does not tell what it is.
    #[error("looking at {}, which is open in the guest", path.display())]
    Look {
        /// The file, below the share.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not there any more.
    #[error("{} was open in the guest and is not there any more", path.display())]
    Gone {
        /// The file, below the share.
        path: PathBuf,
    },
    /// What has its name now is another file, or it has grown or shrunk.
    #[error("{} was open in the guest and is not what it was: it was replaced, or written to", path.display())]
    Changed {
        /// The file, below the share.
        path: PathBuf,
    },
    /// It cannot be opened again.
    #[error("opening {} again, which was open in the guest", path.display())]
    Open {
        /// The file, below the share.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Numbers that no server gives out, or names that are none.
    #[error("what the guest knew of a share contradicts itself")]
    Contradiction,
}

/// All that a guest knows of a share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldTree {
    /// What the driver could do when it began; none if it has not.
    pub(super) options: Option<u64>,
    /// A directory comes before what is in it.
    pub(super) nodes: Vec<HeldNode>,
    pub(super) open: Vec<HeldFile>,
}

/// A file that the guest knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HeldNode {
    pub number: u64,
    /// Its directory's number.
    pub parent: u64,
    pub name: Vec<u8>,
    /// The type, as in `st_mode`.
    pub kind: u32,
    /// How often the guest was told of it.
    pub lookups: u64,
}

/// A file that the guest has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HeldFile {
    pub number: u64,
    /// The number of the file.
    pub node: u64,
    pub flags: u32,
    pub is_directory: bool,
    /// The host's number of it, and its length: by these another file under its name is noticed.
    pub inode: u64,
    pub length: u64,
}

impl HeldTree {
    /// Where a file is below the share, as far as that is known.
    pub(super) fn path(&self, node: u64) -> PathBuf {
        let nodes: HashMap<u64, &HeldNode> = self.nodes.iter().map(|n| (n.number, n)).collect();
        path_of(node, |number| {
            let node = nodes.get(&number)?;
            Some((node.parent, node.name.clone()))
        })
    }

    /// Checks what a server would rely on.
    pub(super) fn check(&self) -> Result<(), HeldError> {
        let numbers = self
            .nodes
            .iter()
            .flat_map(|node| [node.number, node.parent]);
        let files = self.open.iter().map(|file| file.number);
        match numbers.chain(files).all(|number| number < MAX_NUMBER) {
            true => Ok(()),
            false => Err(HeldError::Contradiction),
        }
    }
}

/// The path of a file whose directory and name, and those of its directories, `name_of` tells.
pub(super) fn path_of(mut node: u64, name_of: impl Fn(u64) -> Option<(u64, Vec<u8>)>) -> PathBuf {
    /// No path has more names, and what leads to itself has no end.
    const MOST: usize = 2048;
    let mut names = Vec::new();
    while node != ROOT_ID
        && names.len() < MOST
        && let Some((parent, name)) = name_of(node)
    {
        names.push(name);
        node = parent;
    }
    names
        .iter()
        .rev()
        .map(|name| OsStr::from_bytes(name))
        .collect()
}

/// What the guest calls the files of a server that has taken over, and what it calls those that are open.
#[derive(Debug)]
pub(super) struct Numbers {
    nodes: BTreeMap<u64, u64>,
    nodes_back: HashMap<u64, u64>,
    /// The guest's number of a new file is the server's and this.
    node_offset: u64,
    files: BTreeMap<u64, u64>,
    files_back: HashMap<u64, u64>,
    file_offset: u64,
}

impl Numbers {
    /// By the numbers of the guest, which are known to be below [`MAX_NUMBER`], with those of the server; `most` are the
    /// highest that the guest may know.
    pub(super) fn new(
        nodes: BTreeMap<u64, u64>,
        files: BTreeMap<u64, u64>,
        most: &HeldTree,
    ) -> Self {
        let back = |numbers: &BTreeMap<u64, u64>| numbers.iter().map(|(&g, &s)| (s, g)).collect();
        Self {
            node_offset: most.nodes.iter().map(|n| n.number).max().unwrap_or(0),
            file_offset: most.open.iter().map(|f| f.number).max().unwrap_or(0),
            nodes_back: back(&nodes),
            files_back: back(&files),
            nodes,
            files,
        }
    }

    /// The server's number of a file; none if it has none, as of one that was not found again.
    pub(super) fn node(&self, number: u64) -> Option<u64> {
        match self.nodes.get(&number) {
            Some(&own) => Some(own),
            None if number == ROOT_ID => Some(ROOT_ID),
            // A server's own number of a file is not 0.
            None => number
                .checked_sub(self.node_offset)
                .filter(|&own| own > ROOT_ID),
        }
    }

    /// What the guest calls a file of the server.
    pub(super) fn node_for_guest(&self, own: u64) -> u64 {
        match self.nodes_back.get(&own) {
            Some(&number) => number,
            None if own == ROOT_ID => ROOT_ID,
            None => own.saturating_add(self.node_offset),
        }
    }

    /// The server's number of an open file.
    pub(super) fn file(&self, number: u64) -> Option<u64> {
        match self.files.get(&number) {
            Some(&own) => Some(own),
            None => number.checked_sub(self.file_offset).filter(|&own| own > 0),
        }
    }

    /// What the guest calls an open file of the server.
    pub(super) fn file_for_guest(&self, own: u64) -> u64 {
        match self.files_back.get(&own) {
            Some(&number) => number,
            None => own.saturating_add(self.file_offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u64, parent: u64, name: &str) -> HeldNode {
        HeldNode {
            number,
            parent,
            name: name.into(),
            kind: libc::S_IFREG,
            lookups: 1,
        }
    }

    #[test]
    fn old_numbers_stay_and_new_ones_are_others() {
        let held = HeldTree {
            nodes: vec![node(7, 1, "a"), node(9, 7, "b")],
            ..HeldTree::default()
        };
        let numbers = Numbers::new(BTreeMap::from([(7, 2), (9, 3)]), BTreeMap::new(), &held);
        assert_eq!(
            [7, 9, 1].map(|n| numbers.node(n)),
            [Some(2), Some(3), Some(1)]
        );
        assert_eq!([2, 3, 1].map(|n| numbers.node_for_guest(n)), [7, 9, 1]);
        let new = numbers.node_for_guest(4);
        assert!(new > 9);
        assert_eq!(numbers.node(new), Some(4));
        // One that the guest knew and that was not found again, and one that nobody gave out.
        assert_eq!([8, 0, 10].map(|n| numbers.node(n)), [None, None, None]);
        assert_eq!(
            (numbers.file(0), numbers.file(1), numbers.file_for_guest(1)),
            (None, Some(1), 1)
        );
    }

    #[test]
    fn a_path_that_leads_to_itself_has_an_end() {
        let held = HeldTree {
            nodes: vec![
                node(2, 3, "a"),
                node(3, 2, "b"),
                node(4, 1, "c"),
                node(5, 4, "d"),
            ],
            ..HeldTree::default()
        };
        assert_eq!(held.path(5), PathBuf::from("c/d"));
        assert!(held.path(2).starts_with("b"));
    }

    #[test]
    fn numbers_that_no_server_gives_are_refused() {
        let held = HeldTree {
            nodes: vec![node(u64::MAX, 1, "a")],
            ..HeldTree::default()
        };
        assert!(matches!(held.check(), Err(HeldError::Contradiction)));
    }
}
