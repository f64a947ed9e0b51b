//! The initial file system of a guest: its modules, then the agent as `/init` with the directories it needs.
//!
//! It is described, not built: the bytes of the agent and the modules stay in their files, so that the VMM reads
//! them straight into guest memory and no second copy exists. The kernel unpacks archives one behind the other.

use std::fs;
use std::io;
use std::path::Path;

use vmm::boot::Segment;

use super::{Error, cpio};

/// The initramfs with the agent binary `agent`, behind the guest's `modules` archive.
///
/// The VMM begins each piece at a multiple of four bytes, as the format wants it.
///
/// # Errors
/// If a file cannot be read, or is empty.
pub fn segments(modules: Option<&Path>, agent: &Path) -> Result<Vec<Segment>, Error> {
    let mut segments = Vec::new();
    if let Some(path) = modules {
        length(path)?;
        segments.push(Segment::File(path.to_owned()));
    }
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
    // The kernel opens the console for PID 1 if there is one; if not, Rust's start opens /dev/null, or aborts.
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.character_device("dev/null", 0o666, (1, 3));
    archive
        .file_header("init", 0o755, length(agent)?)
        .map_err(|_| Error::Io {
            action: "pack agent",
            path: agent.to_owned(),
            source: io::ErrorKind::FileTooLarge.into(),
        })?;
    segments.push(Segment::Bytes(archive.take()));
    segments.push(Segment::File(agent.to_owned()));
    segments.push(Segment::Bytes(archive.finish()));
    Ok(segments)
}

fn length(path: &Path) -> Result<u64, Error> {
    let metadata = fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_file() || metadata.len() == 0 {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a file with content");
        return Err(Error::io("use", path)(source));
    }
    Ok(metadata.len())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// What the VMM makes of the segments.
    fn laid_out(segments: &[Segment]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for segment in segments {
            match segment {
                Segment::Bytes(more) => bytes.extend_from_slice(more),
                Segment::File(path) => bytes.extend_from_slice(&fs::read(path).unwrap()),
            }
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn members_are_aligned_and_follow_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        let modules = dir.path().join("modules");
        fs::write(&agent, b"agent").unwrap();
        fs::write(&modules, b"0123456").unwrap();
        for modules in [None, Some(modules.as_path())] {
            let bytes = laid_out(&segments(modules, &agent).unwrap());
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
        let bytes = laid_out(&segments(None, &agent).unwrap());

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
            segments(None, &agent)
                .unwrap_err()
                .to_string()
                .contains("rt-agent")
        );
        fs::write(&agent, b"").unwrap();
        segments(None, &agent).unwrap_err();
    }
}
