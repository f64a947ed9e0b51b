//! The initial file system of a guest: its modules, then the agent as `/init` with the directories it needs.
//!
//! It is described, not built: the bytes of the agent and the modules stay in their files, so that the VMM reads
//! them straight into guest memory and no second copy exists. The kernel unpacks archives one behind the other.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use super::{Error, cpio};

/// A piece of the initramfs.
#[derive(Debug)]
pub enum Segment {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The first `len` bytes of this file, which is at its start.
    File {
        /// The file.
        file: File,
        /// How many bytes of it.
        len: u64,
    },
}

impl Segment {
    /// The size in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The initramfs of one guest, to be read once.
#[derive(Debug)]
pub struct Initramfs {
    segments: Vec<Segment>,
}

impl Initramfs {
    /// Describes the initramfs of the agent binary `agent`, behind the guest's `modules` archive.
    ///
    /// # Errors
    /// If a file cannot be opened, or the agent is none.
    pub fn new(modules: Option<&Path>, agent: &Path) -> Result<Self, Error> {
        let mut segments = Vec::new();
        if let Some(path) = modules {
            let (file, len) = open(path)?;
            segments.push(Segment::File { file, len });
            segments.push(Segment::Bytes(vec![0; cpio::padding(len)]));
        }
        let (file, len) = open(agent)?;
        let mut archive = cpio::Writer::default();
        for (name, permissions) in [
            ("dev", 0o755),
            ("proc", 0o555),
            ("sys", 0o555),
            ("run", 0o755),
            ("tmp", 0o1777),
        ] {
            archive.directory(name, permissions);
        }
        // PID 1's first output goes here, before the agent can make a device of its own.
        archive.character_device("dev/console", 0o600, (5, 1));
        archive
            .file_header("init", 0o755, len)
            .map_err(|_| Error::Io {
                action: "pack agent",
                path: agent.to_owned(),
                source: io::ErrorKind::FileTooLarge.into(),
            })?;
        segments.push(Segment::Bytes(archive.take()));
        segments.push(Segment::File { file, len });
        let mut end = vec![0; cpio::padding(len)];
        end.extend_from_slice(&archive.finish());
        segments.push(Segment::Bytes(end));
        segments.retain(|segment| !segment.is_empty());
        Ok(Self { segments })
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Whether it has no bytes, which is never so.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The pieces, to be laid one behind the other.
    pub fn into_segments(self) -> Vec<Segment> {
        self.segments
    }

    /// Writes the whole to `out`.
    ///
    /// # Errors
    /// If reading or writing fails, or a file has become shorter.
    pub fn write_to(self, out: &mut impl Write) -> io::Result<()> {
        use std::io::Read;
        for segment in self.segments {
            match segment {
                Segment::Bytes(bytes) => out.write_all(&bytes)?,
                Segment::File { file, len } => {
                    if io::copy(&mut file.take(len), out)? != len {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<(File, u64), Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("read", path))?;
    if !metadata.is_file() || metadata.len() == 0 {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a file with content");
        return Err(Error::io("use", path)(source));
    }
    Ok((file, metadata.len()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_length_is_that_of_what_is_written_and_members_are_aligned() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        let modules = dir.path().join("modules");
        fs::write(&agent, b"agent").unwrap();
        fs::write(&modules, b"0123456").unwrap();
        for modules in [None, Some(modules.as_path())] {
            let initramfs = Initramfs::new(modules, &agent).unwrap();
            let len = initramfs.len();
            let mut bytes = Vec::new();
            initramfs.write_to(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, len);
            assert_eq!(len % 4, 0);
            let at = bytes.windows(8).position(|w| w == b"agent\0\0\0").unwrap();
            assert_eq!(at % 4, 0);
            assert_eq!(&bytes[at + 8..at + 14], b"070701");
        }
    }

    #[test]
    fn cpio_reads_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        fs::write(&agent, b"agent").unwrap();
        let mut bytes = Vec::new();
        Initramfs::new(None, &agent)
            .unwrap()
            .write_to(&mut bytes)
            .unwrap();

        let child = Command::new("cpio")
            .arg("-itv")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            println!("skipped: there is no cpio command here");
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listing = child.wait_with_output().unwrap();
        let listing = String::from_utf8(listing.stdout).unwrap();
        for line in ["dev/console", "drwxrwxrwt", "-rwxr-xr-x", " init"] {
            assert!(listing.contains(line), "{line} in {listing}");
        }
    }

    #[test]
    fn an_empty_or_missing_agent_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("rt-agent");
        assert!(
            Initramfs::new(None, &agent)
                .unwrap_err()
                .to_string()
                .contains("rt-agent")
        );
        fs::write(&agent, b"").unwrap();
        Initramfs::new(None, &agent).unwrap_err();
        Initramfs::new(None, dir.path()).unwrap_err();
    }
}
