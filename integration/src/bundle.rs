//! A bundle under test: the default configuration of `rt spec`, edited, over a
//! root file system that holds a static busybox and its applets.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::finish;

/// The applets that the claims use, as links to `/bin/busybox`.
const APPLETS: &[&str] = &[
    "awk",
    "cat",
    "chmod",
    "chown",
    "cut",
    "dd",
    "df",
    "domainname",
    "echo",
    "env",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "httpd",
    "id",
    "ip",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mkfifo",
    "mknod",
    "mount",
    "mv",
    "nc",
    "nproc",
    "ping",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sh",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tee",
    "test",
    "touch",
    "tr",
    "true",
    "tty",
    "ulimit",
    "umount",
    "uname",
    "wc",
    "yes",
];

/// Makes a root file system of busybox, its applets and two users in the new directory `rootfs`.
///
/// # Errors
/// Whatever the file system says; most likely that busybox-static is missing.
pub fn make_rootfs(rootfs: &Path) -> io::Result<()> {
    for folder in [
        "bin", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var",
    ] {
        fs::create_dir_all(rootfs.join(folder))?;
    }
    copy_program(Path::new("/bin/busybox"), &rootfs.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", rootfs.join("bin").join(applet))?;
    }
    fs::write(
        rootfs.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )?;
    fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n")
}

/// Copies an executable, by a process of its own: a child that another thread forks meanwhile would have our copy open for
/// writing, and it could not be executed.
///
/// # Errors
/// What `cp` said.
pub fn copy_program(from: &Path, to: &Path) -> io::Result<()> {
    finish(Command::new("cp").arg(from).arg(to), None)?
        .success()
        .map_err(io::Error::other)?;
    Ok(())
}

/// A bundle directory and its configuration, which is written out by [`Bundle::save`].
pub struct Bundle {
    dir: PathBuf,
    /// The configuration, free to edit.
    pub spec: Value,
}

impl Bundle {
    /// Makes a bundle in the new directory `dir` from the configuration `spec`.
    ///
    /// The default command is `/bin/true`, without a terminal.
    ///
    /// # Errors
    /// Whatever the file system says; most likely that busybox-static is missing.
    pub fn create(dir: &Path, spec: Value) -> io::Result<Self> {
        make_rootfs(&dir.join("rootfs"))?;
        let mut bundle = Self {
            dir: dir.to_owned(),
            spec,
        };
        bundle.spec["process"]["terminal"] = json!(false);
        bundle.spec["root"] = json!({"path": "rootfs", "readonly": false});
        bundle.args(&["/bin/true"]);
        Ok(bundle)
    }

    /// The bundle's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path inside the bundle's root file system, as the host sees it.
    pub fn in_rootfs(&self, path: &str) -> PathBuf {
        self.dir.join("rootfs").join(path.trim_start_matches('/'))
    }

    /// Sets the command.
    pub fn args(&mut self, args: &[&str]) -> &mut Self {
        self.spec["process"]["args"] = json!(args);
        self
    }

    /// Sets the command to a shell script.
    pub fn script(&mut self, script: &str) -> &mut Self {
        self.args(&["/bin/sh", "-c", script])
    }

    /// Adds a mount.
    pub fn mount(&mut self, mount: Value) -> &mut Self {
        if let Some(mounts) = self.spec["mounts"].as_array_mut() {
            mounts.push(mount);
        }
        self
    }

    /// Adds a bind mount of `source` with further `options`.
    pub fn bind(&mut self, source: &Path, destination: &str, options: &[&str]) -> &mut Self {
        let mut all = vec!["bind"];
        all.extend(options);
        self.mount(
            json!({"destination": destination, "source": source, "type": "bind", "options": all}),
        )
    }

    /// Removes the namespace of one kind.
    pub fn without_namespace(&mut self, kind: &str) -> &mut Self {
        if let Some(namespaces) = self.spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != kind);
        }
        self
    }

    /// Writes `config.json`.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn save(&self) -> io::Result<&Self> {
        fs::write(
            self.dir.join("config.json"),
            serde_json::to_vec_pretty(&self.spec)?,
        )?;
        Ok(self)
    }
}
