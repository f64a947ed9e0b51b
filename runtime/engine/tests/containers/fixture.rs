//! A container of a test: its root file system, configuration and life.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use engine::{Cgroup, CreateRequest, Created, Engine, Error, ExecRequest, Stdio};
use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};
use tempfile::TempDir;

pub struct Container {
    pub directory: TempDir,
    pub id: String,
    pub config: Value,
    pub engine: Engine,
    pub cgroup: Cgroup,
    pub created: Option<Created>,
    output: Option<(File, File)>,
}

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

pub fn pipe() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_CLOEXEC).unwrap()
}

/// The exit code as a shell shows it.
pub fn wait(pid: Pid) -> i32 {
    match waitpid(pid, None).unwrap() {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("{other:?}"),
    }
}

fn read(mut file: File) -> String {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Container {
    pub fn new(args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("rootfs");
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "home"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
        for applet in String::from_utf8(list.stdout).unwrap().lines() {
            let _ = symlink("busybox", root.join("bin").join(applet));
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n",
        )
        .unwrap();
        let id = format!("engine-test-{}", std::process::id());
        let capabilities = [
            "CAP_CHOWN",
            "CAP_KILL",
            "CAP_NET_BIND_SERVICE",
            "CAP_SETUID",
        ];
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": root, "readonly": false},
            "hostname": "inside",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": args,
                "env": ["PATH=/bin", "TERM=xterm"],
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                },
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "mount"}, {"type": "cgroup"},
                ],
            },
        });
        let path = Cgroup::path_for(None, &id).unwrap();
        Self {
            engine: Engine::new(directory.path().join("engine")),
            directory,
            id,
            config,
            cgroup: Cgroup::new(&path).unwrap(),
            created: None,
            output: None,
        }
    }

    pub fn shell(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn spec(&self) -> Spec {
        serde_json::from_value(self.config.clone()).unwrap()
    }

    pub fn mount(&mut self, mount: Value) {
        self.config["mounts"].as_array_mut().unwrap().push(mount);
    }

    /// Creates the container with pipes; what it writes is read by `finish`.
    pub fn create(&mut self) -> Result<Created, Error> {
        let null = File::open("/dev/null").unwrap();
        self.create_with_input(null.into())
    }

    pub fn create_with_input(&mut self, stdin: OwnedFd) -> Result<Created, Error> {
        let (out, stdout) = pipe();
        let (err, stderr) = pipe();
        let created = self.create_with(Stdio::Files {
            stdin,
            stdout,
            stderr,
        })?;
        self.output = Some((out.into(), err.into()));
        Ok(created)
    }

    pub fn create_with(&mut self, stdio: Stdio) -> Result<Created, Error> {
        let spec = self.spec();
        let (created, hold) = self.engine.create(CreateRequest {
            id: &self.id,
            spec: &spec,
            bundle: self.directory.path(),
            cgroup: &self.cgroup,
            stdio,
            preserve_fds: 0,
            no_pivot: false,
            no_new_keyring: false,
        })?;
        hold.release().unwrap();
        self.created = Some(created);
        Ok(created)
    }

    /// Reads what the program writes, waits for it and deletes the container.
    pub fn finish(&mut self) -> Outcome {
        let (out, err) = self.output.take().unwrap();
        let (stdout, stderr) = (read(out), read(err));
        let code = wait(self.created.unwrap().pid);
        self.engine.delete(&self.cgroup).unwrap();
        self.assert_gone();
        Outcome {
            code,
            stdout,
            stderr,
        }
    }

    pub fn run(&mut self) -> Outcome {
        self.create().unwrap();
        self.engine.start().unwrap();
        self.finish()
    }

    /// Runs and takes the output for granted.
    pub fn output(&mut self) -> String {
        let outcome = self.run();
        assert_eq!(outcome.code, 0, "{outcome:?}");
        outcome.stdout
    }

    pub fn exec(&self, process: &Process) -> Result<(Created, File, File), Error> {
        let (out, stdout) = pipe();
        let (err, stderr) = pipe();
        let spec = self.spec();
        let init = self.created.unwrap();
        let created = self.engine.exec(ExecRequest {
            init: init.pid,
            init_start: init.start_time,
            process,
            linux: spec.linux().as_ref(),
            state: json!({"id": self.id}),
            cgroup: &self.cgroup,
            sub_cgroup: None,
            stdio: Stdio::Files {
                stdin: File::open("/dev/null").unwrap().into(),
                stdout,
                stderr,
            },
            preserve_fds: 0,
            ignore_paused: false,
            no_new_keyring: false,
        })?;
        Ok((created, out.into(), err.into()))
    }

    pub fn exec_shell(&self, script: &str, edit: impl FnOnce(&mut Value)) -> Outcome {
        let mut process = self.config["process"].clone();
        process["args"] = json!(["sh", "-c", script]);
        edit(&mut process);
        let process: Process = serde_json::from_value(process).unwrap();
        let (created, out, err) = self.exec(&process).unwrap();
        let (stdout, stderr) = (read(out), read(err));
        Outcome {
            code: wait(created.pid),
            stdout,
            stderr,
        }
    }

    /// Creates and starts a container that only waits.
    pub fn sleeping(edit: impl FnOnce(&mut Self)) -> Self {
        let mut container = Self::new(&["sleep", "1000"]);
        edit(&mut container);
        container.create().unwrap();
        container.engine.start().unwrap();
        container
    }

    pub fn kill_and_delete(&mut self) {
        self.engine.delete(&self.cgroup).unwrap();
        if let Some(created) = self.created {
            assert_eq!(wait(created.pid), 137);
        }
        self.assert_gone();
    }

    /// No process, cgroup, file or mount of the container is left.
    pub fn assert_gone(&self) {
        assert!(!self.cgroup.exists(), "cgroup {:?}", self.cgroup.path());
        assert!(!self.path("engine").exists());
        assert!(self.cgroup.pids().unwrap().is_empty());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let place = self.directory.path().to_str().unwrap();
        assert!(!mounts.contains(place), "{mounts}");
    }
}

/// The descriptors open in this process.
pub fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

pub fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}
