//! The smallest programs that a container can run: what is measured is then the runtime, not the workload.

/// `write(1, …, 1); exit(0)`: the byte shows when the program began.
const WRITE_AND_EXIT: &[u8] = &[
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
    0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, 1
    0xbe, 0x00, 0x00, 0x40, 0x00, // mov esi, the file's begin in memory
    0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1
    0x0f, 0x05, // syscall
    0xb8, 0x3c, 0x00, 0x00, 0x00, // mov eax, 60
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
];

/// `for (;;) pause()`.
const PAUSE: &[u8] = &[
    0xb8, 0x22, 0x00, 0x00, 0x00, // mov eax, 34
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to the begin
];

/// A program that writes a byte and succeeds, as a static x86-64 executable.
pub fn succeed() -> Vec<u8> {
    executable(WRITE_AND_EXIT)
}

/// A program that waits for a signal for ever.
pub fn wait() -> Vec<u8> {
    executable(PAUSE)
}

/// An ELF file of one segment, which is the whole file, entered behind its headers (System V ABI, AMD64).
fn executable(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let length = HEADERS + code.len() as u64;
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2_u16, 62] {
        file.extend_from_slice(&half.to_le_bytes()); // an executable, for x86-64
    }
    file.extend_from_slice(&1_u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes()); // entry, program headers, no sections
    }
    file.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes()); // sizes and numbers of headers
    }
    for half in [1_u32, 5] {
        file.extend_from_slice(&half.to_le_bytes()); // to be loaded, readable and executable
    }
    for word in [0, BASE, BASE, length, length, 0x1000] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn install(program: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        std::fs::write(&path, program).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    /// Starts a file that was just written. A child that another test forked meanwhile has it open for writing too, until
    /// it executes its own program.
    fn spawn(path: &Path) -> Child {
        loop {
            match Command::new(path).stdout(Stdio::piped()).spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                other => return other.unwrap(),
            }
        }
    }

    #[test]
    fn one_succeeds_and_the_other_waits() {
        let (_dir, path) = install(&succeed());
        let output = spawn(&path).wait_with_output().unwrap();
        assert!(output.status.success() && output.stdout.len() == 1);
        let (_dir, path) = install(&wait());
        let mut child = spawn(&path);
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()),
            Some(9)
        );
    }
}
