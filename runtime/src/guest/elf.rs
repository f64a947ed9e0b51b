//! Enough of the ELF format to tell a whole x86-64 `vmlinux` from a truncated or foreign file.

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;

pub(super) const MAGIC: &[u8] = b"\x7fELF";

/// Checks that `image` is an x86-64 executable whose segments are all there; says what is wrong if not.
pub(super) fn check(image: &[u8]) -> Result<(), String> {
    if !image.starts_with(MAGIC) {
        return Err("it does not begin as an ELF file".into());
    }
    let truncated = || "it is truncated".to_owned();
    let header = image.get(..HEADER_LEN).ok_or_else(truncated)?;
    if header[4] != CLASS_64
        || header[5] != LITTLE_ENDIAN
        || u16_at(header, 18) != Some(MACHINE_X86_64)
    {
        return Err("it is for another machine than x86-64".into());
    }
    if !matches!(u16_at(header, 16), Some(TYPE_EXEC | TYPE_DYN)) {
        return Err("it is an ELF file, but not an executable".into());
    }
    let table = u64_at(header, 32).ok_or_else(truncated)?;
    let entry_size = usize::from(u16_at(header, 54).ok_or_else(truncated)?);
    let entries = usize::from(u16_at(header, 56).ok_or_else(truncated)?);
    if entry_size != PROGRAM_HEADER_LEN || entries == 0 {
        return Err("it has no program headers".into());
    }
    let mut loads = 0;
    for index in 0..entries {
        let program_header = usize::try_from(table)
            .ok()
            .and_then(|table| table.checked_add(index.checked_mul(entry_size)?))
            .and_then(|at| image.get(at..at.checked_add(PROGRAM_HEADER_LEN)?))
            .ok_or_else(truncated)?;
        if u32_at(program_header, 0) != Some(SEGMENT_LOAD) {
            continue;
        }
        let offset = u64_at(program_header, 8).ok_or_else(truncated)?;
        let size = u64_at(program_header, 32).ok_or_else(truncated)?;
        match offset.checked_add(size) {
            Some(end) if end <= image.len() as u64 => loads += 1,
            _ => return Err(truncated()),
        }
    }
    if loads == 0 {
        Err("it has nothing to load".into())
    } else {
        Ok(())
    }
}

/// The release in the kernel's banner, "Linux version <release> (...", which every kernel holds uncompressed.
pub(super) fn release(image: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut rest = image;
    while let Some(at) = find(rest, BANNER) {
        rest = &rest[at + BANNER.len()..];
        // The first match may be a format string; a release begins with a digit.
        let end = rest.iter().take(128).position(|&b| b == b' ');
        if let Some(word) = end.map(|end| &rest[..end])
            && word.first().is_some_and(u8::is_ascii_digit)
            && word.iter().all(u8::is_ascii_graphic)
        {
            return Some(String::from_utf8_lossy(word).into_owned());
        }
    }
    None
}

/// The place of `needle`, found by its first byte: quick enough for one pass over 50 MB.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, tail) = needle.split_first()?;
    let mut from = 0;
    while let Some(at) = haystack[from..].iter().position(|&b| b == first) {
        let at = from + at;
        if haystack[at + 1..].starts_with(tail) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        bytes.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A minimal executable with one loadable segment that holds `payload`.
    pub(in crate::guest) fn vmlinux(payload: &[u8]) -> Vec<u8> {
        let offset = HEADER_LEN + PROGRAM_HEADER_LEN;
        let mut image = vec![0; offset];
        image[..4].copy_from_slice(MAGIC);
        image[4] = CLASS_64;
        image[5] = LITTLE_ENDIAN;
        image[16..18].copy_from_slice(&TYPE_EXEC.to_le_bytes());
        image[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        image[32..40].copy_from_slice(&(HEADER_LEN as u64).to_le_bytes());
        image[54..56].copy_from_slice(&(PROGRAM_HEADER_LEN as u16).to_le_bytes());
        image[56..58].copy_from_slice(&1u16.to_le_bytes());
        image[64..68].copy_from_slice(&SEGMENT_LOAD.to_le_bytes());
        image[72..80].copy_from_slice(&(offset as u64).to_le_bytes());
        image[96..104].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn a_whole_executable_passes_and_every_truncation_fails() {
        let image = vmlinux(b"Linux version 6.12.1-test (x@y) #1");
        check(&image).unwrap();
        for len in 0..image.len() {
            check(&image[..len]).unwrap_err();
        }
    }

    #[test]
    fn header_numbers_out_of_range_are_refused() {
        for (at, len) in [(32, 8), (54, 2), (56, 2), (72, 8), (96, 8)] {
            let mut image = vmlinux(b"kernel");
            image[at..at + len].fill(0xff);
            check(&image).unwrap_err();
        }
    }

    #[test]
    fn another_machine_is_refused_by_name() {
        let mut image = vmlinux(b"kernel");
        image[18] = 183;
        assert!(check(&image).unwrap_err().contains("x86-64"));
    }

    #[test]
    fn release_skips_the_format_string() {
        let image = b"Linux version %s (\0Linux version 6.1.0-9-amd64 (who@where) #1";
        assert_eq!(release(image).as_deref(), Some("6.1.0-9-amd64"));
        assert_eq!(release(b"Linux version 6.1.0"), None);
    }
}
