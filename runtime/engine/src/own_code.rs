//! The memory of a program that lives long and needed most of its code for its start alone.

/// The size of a page of x86-64.
const PAGE: usize = 4096;

/// Unmaps this program's code. What is run again is mapped again, from the file, in small pieces: a process that mostly
/// waits has a megabyte of it, not five. The kernel's cache of the file is the same as before.
pub fn give_back_code() {
    // Where the linker put the first byte of the program and the first one behind its code. What lies between is
    // read-only and is in memory as it is in the file; what is relocated lies behind.
    unsafe extern "C" {
        static __executable_start: u8;
        static etext: u8;
    }
    let first = &raw const __executable_start;
    let end = (&raw const etext).addr() & !(PAGE - 1);
    let length = end.saturating_sub(first.addr());
    // SAFETY: the pages are a private mapping of this program's file that nobody writes to, from its first page to the
    // last that has only code: their content comes back at the next access.
    // Refused, they stay where they are, which is no harm.
    let _ = unsafe { libc::madvise(first.cast_mut().cast(), length, libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident KiB of the mappings of this program's file that can be executed.
    fn resident_code() -> u64 {
        let own = std::env::current_exe().unwrap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut counts = false;
        let mut sum = 0;
        for line in maps.lines() {
            if line.contains(" r-xp ") {
                counts = line.ends_with(&*own.to_string_lossy());
            } else if counts && let Some(size) = line.strip_prefix("Rss:") {
                sum += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
                counts = false;
            }
        }
        sum
    }

    #[test]
    fn the_code_is_given_back_and_still_runs() {
        let before = resident_code();
        give_back_code();
        let after = resident_code();
        assert!(after < before, "{before} KiB before, {after} KiB after");
    }
}
