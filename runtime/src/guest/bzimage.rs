//! The bzImage format of the x86 boot protocol (kernel: Documentation/arch/x86/boot.rst): where the compressed
//! `vmlinux` lies, and unpacking it. Booting the uncompressed kernel saves the guest more than a second.

use std::io::{self, Read};

/// No kernel is larger; more is a corrupt or hostile stream.
const MAX_VMLINUX: u64 = 512 << 20;
/// Cap on a decoder's window, in KiB: kernels use at most 128 MiB.
const MAX_WINDOW_KIB: u32 = 256 << 10;

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;

/// A parsed bzImage: its release and its compressed payload.
pub(super) struct BzImage<'a> {
    /// The release, if the image tells it.
    pub release: Option<String>,
    payload: &'a [u8],
}

/// Why a payload did not unpack.
pub(super) enum UnpackError {
    /// A compression we do not read, by name.
    Format(&'static str),
    /// The stream is bad.
    Stream(&'static str, io::Error),
}

/// Whether `image` claims to be of the x86 boot protocol.
pub(super) fn is_bzimage(image: &[u8]) -> bool {
    image
        .get(HEADER_MAGIC..)
        .is_some_and(|rest| rest.starts_with(b"HdrS"))
}

/// Parses the setup header; says what is wrong if it cannot be used.
pub(super) fn parse(image: &[u8]) -> Result<BzImage<'_>, String> {
    let truncated = || "it is truncated".to_owned();
    if image.get(BOOT_FLAG..BOOT_FLAG + 2) != Some(&[0x55, 0xaa]) || !is_bzimage(image) {
        return Err("it has no Linux boot header".into());
    }
    let protocol = u16_at(image, PROTOCOL).ok_or_else(truncated)?;
    if protocol < 0x208 {
        return Err(format!(
            "its boot protocol {}.{:02} is older than 2.08",
            protocol >> 8,
            protocol & 0xff
        ));
    }
    let setup_sectors = match image.get(SETUP_SECTS).ok_or_else(truncated)? {
        0 => 4,
        &n => usize::from(n),
    };
    let payload = (|| {
        let start = (setup_sectors + 1)
            .checked_mul(SECTOR)?
            .checked_add(u32_at(image, PAYLOAD_OFFSET)?)?;
        let end = start.checked_add(u32_at(image, PAYLOAD_LENGTH)?)?;
        image.get(start..end)
    })()
    .ok_or_else(truncated)?;
    Ok(BzImage {
        release: release(image),
        payload,
    })
}

/// The word before the first space of the version string, to which the header points.
fn release(image: &[u8]) -> Option<String> {
    let at = usize::from(u16_at(image, KERNEL_VERSION)?);
    if at == 0 {
        return None;
    }
    let text = image.get(at.checked_add(0x200)?..)?;
    let word = text
        .iter()
        .take(128)
        .position(|b| matches!(b, b' ' | 0))
        .map(|end| &text[..end])?;
    word.iter()
        .all(u8::is_ascii_graphic)
        .then(|| String::from_utf8_lossy(word).into_owned())
}

impl BzImage<'_> {
    /// Unpacks the payload into memory.
    pub(super) fn unpack(&self) -> Result<Vec<u8>, UnpackError> {
        // All but gzip carry the unpacked size in four bytes behind the stream (scripts/Makefile.lib, size_append).
        let stream = self.payload;
        let sized = &stream[..stream.len().saturating_sub(4)];
        match stream {
            [0x1f, 0x8b, ..] => collect("gzip", flate2::read::GzDecoder::new(stream)),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => collect(
                "xz",
                lzma_rust2::XzReader::new_mem_limit(sized, false, MAX_WINDOW_KIB),
            ),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                let decoder = ruzstd::decoding::StreamingDecoder::new(sized)
                    .map_err(|e| UnpackError::Stream("zstd", io::Error::other(e)))?;
                collect("zstd", decoder)
            }
            [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => {
                let blocks = &blocks[..blocks.len().saturating_sub(4)];
                unpack_lz4_legacy(blocks).map_err(|e| UnpackError::Stream("lz4", e))
            }
            [0x7f, b'E', b'L', b'F', ..] => Ok(stream.to_vec()),
            [b'B', b'Z', b'h', ..] => Err(UnpackError::Format("bzip2")),
            [0x5d, 0, 0, ..] => Err(UnpackError::Format("lzma")),
            [0x89, b'L', b'Z', b'O', ..] => Err(UnpackError::Format("lzo")),
            _ => Err(UnpackError::Format("unknown")),
        }
    }
}

/// Reads a decoder to its end, but not beyond what a kernel can be.
fn collect(format: &'static str, decoder: impl Read) -> Result<Vec<u8>, UnpackError> {
    let mut image = Vec::new();
    decoder
        .take(MAX_VMLINUX + 1)
        .read_to_end(&mut image)
        .map_err(|e| UnpackError::Stream(format, e))?;
    if image.len() as u64 > MAX_VMLINUX {
        return Err(UnpackError::Stream(format, too_large()));
    }
    Ok(image)
}

/// LZ4's legacy frame, which the kernel uses: blocks of 8 MiB unpacked, each behind its packed size.
fn unpack_lz4_legacy(mut blocks: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut image = Vec::new();
    let mut unpacked = vec![0; BLOCK];
    while !blocks.is_empty() {
        let (size, rest) = blocks
            .split_at_checked(4)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        let size = u32_at(size, 0).ok_or(io::ErrorKind::UnexpectedEof)?;
        let (block, rest) = rest
            .split_at_checked(size)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        let len = lz4_flex::block::decompress_into(block, &mut unpacked)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        image.extend_from_slice(&unpacked[..len]);
        if image.len() as u64 > MAX_VMLINUX {
            return Err(too_large());
        }
        blocks = rest;
    }
    Ok(image)
}

fn too_large() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("it unpacks to more than {} MiB", MAX_VMLINUX >> 20),
    )
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        bytes.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let value = u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?);
    usize::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A bzImage of one setup sector more than the minimum, around `payload`.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let setup = 2 * SECTOR;
        let mut image = vec![0; setup + 16];
        image[SETUP_SECTS] = 1;
        image[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xaa]);
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0x180u16.to_le_bytes());
        let version = b"6.12.1-test (x@y)";
        image[0x380..0x380 + version.len()].copy_from_slice(version);
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn unpack(image: &[u8]) -> Result<Vec<u8>, String> {
        parse(image)?.unpack().map_err(|e| match e {
            UnpackError::Format(name) => format!("format {name}"),
            UnpackError::Stream(name, e) => format!("{name}: {e}"),
        })
    }

    #[test]
    fn gzip_payload_and_release_are_found() {
        let image = bzimage(&gzip(b"the kernel"));
        assert_eq!(
            parse(&image).unwrap().release.as_deref(),
            Some("6.12.1-test")
        );
        assert_eq!(unpack(&image).unwrap(), b"the kernel");
    }

    #[test]
    fn lz4_legacy_payload_unpacks_without_its_size_trailer() {
        // One block: a token for ten literals, then those.
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18, 11, 0, 0, 0, 0xa0];
        payload.extend_from_slice(b"the kernel");
        payload.extend_from_slice(&10u32.to_le_bytes());
        assert_eq!(unpack(&bzimage(&payload)).unwrap(), b"the kernel");
    }

    #[test]
    fn zstd_payload_unpacks_without_its_size_trailer() {
        // A frame with one raw, last block of ten bytes.
        let mut payload = vec![0x28, 0xb5, 0x2f, 0xfd, 0x20, 10, 0x51, 0, 0];
        payload.extend_from_slice(b"the kernel");
        payload.extend_from_slice(&10u32.to_le_bytes());
        assert_eq!(unpack(&bzimage(&payload)).unwrap(), b"the kernel");
    }

    #[test]
    fn formats_we_do_not_read_are_named() {
        for (magic, name) in [
            (&b"BZh9"[..], "bzip2"),
            (b"\x5d\0\0\x80", "lzma"),
            (b"\x89LZO", "lzo"),
        ] {
            assert_eq!(
                unpack(&bzimage(magic)).unwrap_err(),
                format!("format {name}")
            );
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let image = bzimage(&gzip(b"the kernel"));
        for len in 0..image.len() {
            unpack(&image[..len]).unwrap_err();
        }
    }

    #[test]
    fn a_payload_outside_the_file_is_refused() {
        for at in [PAYLOAD_OFFSET, PAYLOAD_LENGTH] {
            let mut image = bzimage(&gzip(b"the kernel"));
            image[at..at + 4].fill(0xff);
            unpack(&image).unwrap_err();
        }
    }

    #[test]
    fn a_damaged_lz4_block_is_an_error() {
        let payload = [
            0x02, 0x21, 0x4c, 0x18, 4, 0, 0, 0, 0x0f, 0xff, 0xff, 0xff, 0, 0, 0, 0,
        ];
        unpack(&bzimage(&payload)).unwrap_err();
    }
}
