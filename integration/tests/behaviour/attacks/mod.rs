//! Attacks that other runtimes fell to, tried on this one. Each claim does what the attacker did, and names the CVE.
//!
//! Nearest to the attack as it was: with links, races and open files, not with a look at how `rt` is built. Where the
//! attacker needs a fast program inside the container it is this test program itself ([`program`]).

mod binary;
mod guest;
mod process;
pub mod program;
mod rootfs;

use std::fs;
use std::path::{Path, PathBuf};

use integration::{Bundle, Claim, Fixture, copy_program, ensure};

use crate::Entry;

pub const CLAIMS: &[&[Entry]] = &[binary::CLAIMS, rootfs::CLAIMS, process::CLAIMS];

/// Attacks that only a virtual machine has a place for.
pub const MICROVM_CLAIMS: &[Entry] = guest::CLAIMS;

/// What the attacker wants to reach: a directory of the host with one file, outside of every bundle.
struct Outside(PathBuf);

const KEPT: &str = "kept by the host";

impl Outside {
    fn new(fixture: &Fixture) -> std::io::Result<Self> {
        let dir = fixture.dir().join("outside");
        fs::create_dir(&dir)?;
        fs::write(dir.join("file"), KEPT)?;
        Ok(Self(dir))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    /// Nothing was made, changed or mounted there.
    fn is_untouched(&self) -> Claim {
        let names = integration::fault::names_in(&self.0)?;
        ensure!(names == ["file"], "outside of the root there is {names:?}");
        let text = fs::read_to_string(self.0.join("file"))?;
        ensure!(text == KEPT, "outside of the root a file says {text:?}");
        Ok(())
    }
}

/// Puts this program into the bundle as `/bin/attacker`.
fn put_attacker(bundle: &Bundle) -> std::io::Result<()> {
    copy_program(&std::env::current_exe()?, &bundle.in_rootfs(program::PATH))
}
