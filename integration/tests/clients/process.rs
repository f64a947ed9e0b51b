//! A process of this machine, as the kernel shows it below `/proc`.

use std::fs;
use std::path::Path;

/// A process that has not ended.
#[derive(Debug, Default)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    /// Its command as the kernel has it.
    pub name: String,
    /// Its command line.
    words: Vec<String>,
}

impl Process {
    /// None: it has ended.
    pub fn of(pid: i32) -> Option<Self> {
        let dir = Path::new("/proc").join(pid.to_string());
        let stat = fs::read_to_string(dir.join("stat")).ok()?;
        let (head, rest) = stat.rsplit_once(')')?;
        let mut rest = rest.split_whitespace();
        if rest.next()? == "Z" {
            return None;
        }
        let line = fs::read(dir.join("cmdline")).ok()?;
        let words = line.split(|byte| *byte == 0);
        Some(Self {
            pid,
            parent: rest.next()?.parse().ok()?,
            name: head.split_once('(')?.1.to_owned(),
            words: words
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect(),
        })
    }

    /// Whether a word of the command line is this one.
    pub fn has(&self, word: &str) -> bool {
        self.words.iter().any(|own| own == word)
    }
}
