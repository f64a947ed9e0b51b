//! Writing the "newc" cpio format, the only one the kernel unpacks an initramfs from
//! (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

/// The type bits of a mode: a directory.
pub(super) const DIRECTORY: u32 = 0o040000;
/// The type bits of a mode: a regular file.
pub(super) const REGULAR: u32 = 0o100000;
/// The type bits of a mode: a character device.
pub(super) const CHARACTER: u32 = 0o020000;

const TRAILER: &str = "TRAILER!!!";

/// Appends members to a buffer. The owner is root and the time the epoch: an archive depends on its content alone.
#[derive(Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    inode: u32,
}

impl Writer {
    /// Appends a directory.
    pub(super) fn directory(&mut self, name: &str, permissions: u32) {
        self.header(name, DIRECTORY | permissions, 0, (0, 0));
    }

    /// Appends a character device.
    pub(super) fn character_device(&mut self, name: &str, permissions: u32, device: (u32, u32)) {
        self.header(name, CHARACTER | permissions, 0, device);
    }

    /// Appends a file with its content.
    pub(super) fn file(
        &mut self,
        name: &str,
        permissions: u32,
        content: &[u8],
    ) -> Result<(), TooLarge> {
        self.file_header(name, permissions, content.len() as u64)?;
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    /// Appends a file's header only: its `len` bytes come from elsewhere, and zeros up to a multiple of four.
    pub(super) fn file_header(
        &mut self,
        name: &str,
        permissions: u32,
        len: u64,
    ) -> Result<(), TooLarge> {
        let len = u32::try_from(len).map_err(|_| TooLarge)?;
        self.header(name, REGULAR | permissions, len, (0, 0));
        Ok(())
    }

    /// Appends the end mark and hands the archive out.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.header(TRAILER, 0, 0, (0, 0));
        self.bytes
    }

    /// Hands out what was written since the last call, to be followed by bytes from elsewhere.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    fn header(&mut self, name: &str, mode: u32, size: u32, (major, minor): (u32, u32)) {
        self.inode += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name.len() as u32 + 1,
            0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A file of 4 GiB or more, which the format cannot hold.
#[derive(Debug)]
pub(super) struct TooLarge;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_aligned_and_the_trailer_ends_the_archive() {
        let mut writer = Writer::default();
        writer.directory("lib", 0o755);
        writer.file("lib/five", 0o644, b"12345").unwrap();
        let archive = writer.finish();
        assert_eq!(archive.len() % 4, 0);
        // 110 bytes of header and "lib\0", padded to 116.
        assert_eq!(&archive[..6], b"070701");
        assert_eq!(&archive[110..114], b"lib\0");
        assert_eq!(&archive[116..122], b"070701");
        // The size is the seventh field behind the magic.
        assert_eq!(&archive[116 + 6 + 6 * 8..116 + 6 + 7 * 8], b"00000005");
        assert!(
            archive
                .windows(TRAILER.len())
                .any(|w| w == TRAILER.as_bytes())
        );
    }

    #[test]
    fn a_file_beyond_the_format_is_refused() {
        Writer::default()
            .file_header("big", 0o644, 1 << 32)
            .unwrap_err();
    }
}
