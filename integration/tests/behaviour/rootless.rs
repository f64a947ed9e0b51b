//! `rt` as an ordinary user: with one id of its own, with subordinate ids, and with a delegated cgroup.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use integration::snapshot::state_directories;
use integration::{Bundle, Claim, Fixture, copy_program, ensure, ensure_eq, wait_with_limit};
use serde_json::{Value, json};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "an_ordinary_user_has_containers",
        an_ordinary_user_has_containers,
    ),
    (
        "what_needs_a_cgroup_is_refused_by_name_without_one",
        what_needs_a_cgroup_is_refused_by_name_without_one,
    ),
    (
        "an_ordinary_user_has_its_subordinate_ids",
        an_ordinary_user_has_its_subordinate_ids,
    ),
    (
        "an_ordinary_user_has_limits_in_a_delegated_cgroup",
        an_ordinary_user_has_limits_in_a_delegated_cgroup,
    ),
];

/// `nobody`, which every system has.
const USER: u32 = 65_534;
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What the user has: a copy of `rt`, a bundle and a runtime directory.
struct Session<'a> {
    fixture: &'a Fixture,
    bundle: Bundle,
    /// A shell script that becomes the user; it is given the command.
    login: String,
}

fn reason_to_skip() -> Option<&'static str> {
    let limit = |name: &str| fs::read_to_string(format!("/proc/sys/{name}")).unwrap_or_default();
    let none = limit("user/max_user_namespaces").trim() == "0"
        || limit("kernel/unprivileged_userns_clone").trim() == "0";
    none.then_some("this machine lets no ordinary user make a user namespace")
}

impl<'a> Session<'a> {
    fn new(fixture: &'a Fixture) -> Result<Self, Failure> {
        fs::set_permissions(fixture.dir(), PermissionsExt::from_mode(0o755))?;
        let rt = fixture.rt::<&str>(&[]).get_program().to_owned();
        copy_program(Path::new(&rt), &fixture.dir().join("rt"))?;
        for name in ["runtime", "spec"] {
            let dir = fixture.dir().join(name);
            fs::create_dir(&dir)?;
            fs::set_permissions(&dir, PermissionsExt::from_mode(0o700))?;
            chown(&dir, Some(USER), Some(USER))?;
        }
        let session = Self {
            fixture,
            bundle: fixture.bundle()?,
            login: format!("exec setpriv --reuid={USER} --regid={USER} --clear-groups \"$@\""),
        };
        let spec = fixture.dir().join("spec");
        session.rt(&format!("spec --rootless --bundle {}", spec.display()))?;
        let mut session = session;
        session.bundle.spec = serde_json::from_slice(&fs::read(spec.join("config.json"))?)?;
        session.bundle.spec["process"]["terminal"] = json!(false);
        Ok(session)
    }

    /// Runs `rt` as the user: exit code, standard output, standard error.
    fn try_rt(&self, arguments: &str) -> Result<(i32, String, String), Failure> {
        let out = self.fixture.dir().join("out");
        let err = self.fixture.dir().join("err");
        let mut child = Command::new("unshare")
            .args(["--mount", "sh", "-ec", &self.login, "sh"])
            .arg(self.fixture.dir().join("rt"))
            .args(arguments.split(' '))
            .env("XDG_RUNTIME_DIR", self.runtime_dir())
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out)?)
            .stderr(fs::File::create(&err)?)
            .spawn()?;
        let status = wait_with_limit(&mut child, Duration::from_secs(60))?;
        Ok((
            status.code().unwrap_or(-1),
            fs::read_to_string(out)?,
            fs::read_to_string(err)?,
        ))
    }

    fn rt(&self, arguments: &str) -> Result<String, Failure> {
        match self.try_rt(arguments)? {
            (0, out, _) => Ok(out),
            (code, out, err) => Err(format!("rt {arguments}: {code}: {out}{err}").into()),
        }
    }

    fn run(&mut self, script: &str) -> Result<String, Failure> {
        self.bundle.script(script).save()?;
        let bundle = self.bundle.dir().display().to_string();
        self.rt(&format!("run --bundle {bundle} once"))
    }

    fn runtime_dir(&self) -> PathBuf {
        self.fixture.dir().join("runtime")
    }

    /// Every command of a container's life.
    fn live(&mut self, id: &str) -> Claim {
        self.bundle.args(&["/bin/sleep", "1000"]).save()?;
        let bundle = self.bundle.dir().display().to_string();
        self.rt(&format!("create --bundle {bundle} {id}"))?;
        ensure_eq!(self.status(id)?, "created", "after create");
        self.rt(&format!("start {id}"))?;
        ensure_eq!(self.status(id)?, "running", "after start");
        ensure!(
            self.runtime_dir().join("rt").join(id).exists(),
            "no state in XDG_RUNTIME_DIR"
        );
        let inside = self.rt(&format!("exec {id} /bin/id -u"))?;
        ensure_eq!(inside, "0\n", "the user of exec");
        let table = self.rt(&format!("ps {id}"))?;
        ensure!(table.contains("sleep 1000"), "ps: {table}");
        self.rt(&format!("exec --detach {id} /bin/sleep 2000"))?;
        let table = self.rt(&format!("ps --format json {id}"))?;
        let pids: Vec<i32> = serde_json::from_str(&table)?;
        ensure_eq!(pids.len(), 2, "processes");
        Ok(())
    }

    fn end(&self, id: &str) -> Claim {
        let pid = self.state(id)?["pid"].as_i64().unwrap_or_default();
        self.rt(&format!("kill {id} KILL"))?;
        let ended = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !ended() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        ensure_eq!(self.status(id)?, "stopped", "after kill");
        self.rt(&format!("delete {id}"))?;
        ensure!(self.status(id).is_err(), "there after delete");
        Ok(())
    }

    fn state(&self, id: &str) -> Result<Value, Failure> {
        Ok(serde_json::from_str(&self.rt(&format!("state {id}"))?)?)
    }

    fn status(&self, id: &str) -> Result<String, Failure> {
        let state = self.state(id)?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }
}

fn an_ordinary_user_has_containers(fixture: &Fixture) -> Claim {
    if let Some(reason) = reason_to_skip() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let mut session = Session::new(fixture)?;
    let seen =
        session.run("id -u; echo $$; cat /proc/self/uid_map; echo x > /dev/null && echo null")?;
    let words: Vec<&str> = seen.split_whitespace().collect();
    ensure_eq!(words, ["0", "1", "0", "65534", "1", "null"], "inside");
    session.live("c1")?;
    session.end("c1")?;
    // A second one, ended by force while it runs: nothing of it is left.
    session.live("c2")?;
    let pid = session.state("c2")?["pid"].to_string();
    session.rt("delete --force c2")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    ensure!(stat.is_empty() || stat.contains(") Z "), "alive: {stat}");
    let left = state_directories(&session.runtime_dir().join("rt"));
    ensure!(left.is_empty(), "left in the state root: {left:?}");
    Ok(())
}

fn what_needs_a_cgroup_is_refused_by_name_without_one(fixture: &Fixture) -> Claim {
    if let Some(reason) = reason_to_skip() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let mut session = Session::new(fixture)?;
    session.bundle.spec["linux"]["cgroupsPath"] = json!("/rt-not-permitted");
    session.run("true")?;
    session.live("c1")?;
    let (code, _, error) = session.try_rt("pause c1")?;
    ensure!(code != 0 && error.contains("cgroup"), "pause: {error}");
    session.end("c1")?;
    session.bundle.spec["linux"]["resources"] = json!({"pids": {"limit": 7}});
    let error = session.run("true").err().map(|error| error.to_string());
    ensure!(
        error
            .as_ref()
            .is_some_and(|error| error.contains("linux.resources.pids")),
        "a limit: {error:?}"
    );
    let flag = session.try_rt("--rootless=perhaps run x")?;
    ensure!(flag.2.contains("--rootless"), "a wrong flag: {}", flag.2);
    Ok(())
}

fn an_ordinary_user_has_its_subordinate_ids(fixture: &Fixture) -> Claim {
    let reason = reason_to_skip().or_else(|| {
        (!Path::new("/usr/bin/newuidmap").exists())
            .then_some("newuidmap (package uidmap) is not installed")
    });
    if let Some(reason) = reason {
        println!("skipped: {reason}");
        return Ok(());
    }
    let mut session = Session::new(fixture)?;
    let ranges = fixture.dir().join("ranges");
    fs::write(
        &ranges,
        format!("{USER}:200000:65536\nnobody:200000:65536\n"),
    )?;
    let ranges = ranges.display();
    session.login = format!(
        "mount --bind {ranges} /etc/subuid; mount --bind {ranges} /etc/subgid; {}",
        session.login
    );
    let maps = json!([
        {"containerID": 0, "hostID": USER, "size": 1},
        {"containerID": 1, "hostID": 200_000, "size": 65_536},
    ]);
    session.bundle.spec["linux"]["uidMappings"] = maps.clone();
    session.bundle.spec["linux"]["gidMappings"] = maps;
    session.bundle.spec["process"]["user"] =
        json!({"uid": 1000, "gid": 1000, "additionalGids": [5]});
    let seen = session.run("id -u; id -G; wc -l < /proc/self/uid_map")?;
    ensure_eq!(seen, "1000\n1000 5\n2\n", "inside");
    session.bundle.spec["process"]["user"] = json!({"uid": 0, "gid": 0});
    session.live("c1")?;
    session.end("c1")?;
    // Ids that were not granted.
    session.bundle.spec["linux"]["uidMappings"][1]["hostID"] = json!(900_000);
    let error = session.run("true").err().map(|error| error.to_string());
    ensure!(
        error
            .as_ref()
            .is_some_and(|error| error.contains("linux.uidMappings")),
        "foreign ids: {error:?}"
    );
    Ok(())
}

/// A cgroup that is the user's, with one below it for the user's own processes; removed when dropped.
struct Delegated(PathBuf);

impl Delegated {
    fn new(name: &str) -> Result<Self, Failure> {
        let path = Path::new("/sys/fs/cgroup").join(name);
        fs::create_dir(&path)?;
        let delegated = Self(path);
        let session = delegated.0.join("session");
        fs::write(delegated.0.join("cgroup.subtree_control"), "+memory +pids")?;
        fs::create_dir(&session)?;
        for dir in [&delegated.0, &session] {
            chown(dir, Some(USER), Some(USER))?;
            for file in ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
                chown(dir.join(file), Some(USER), Some(USER))?;
            }
        }
        Ok(delegated)
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.0.join("session"));
        let _ = fs::remove_dir(&self.0);
    }
}

fn an_ordinary_user_has_limits_in_a_delegated_cgroup(fixture: &Fixture) -> Claim {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control");
    let controllers = controllers.unwrap_or_default();
    let reason = reason_to_skip().or_else(|| {
        (!controllers.contains("memory") || !controllers.contains("pids"))
            .then_some("only cgroup version 2, with memory and pids, can be delegated")
    });
    if let Some(reason) = reason {
        println!("skipped: {reason}");
        return Ok(());
    }
    let mut session = Session::new(fixture)?;
    let name = fixture.id("delegated");
    let delegated = Delegated::new(&name)?;
    session.login = format!(
        "echo 0 > {}/session/cgroup.procs; {}",
        delegated.0.display(),
        session.login
    );
    session.bundle.spec["linux"]["cgroupsPath"] = json!(format!("/{name}/c1"));
    session.bundle.spec["linux"]["resources"] =
        json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 20}});
    session.live("c1")?;
    let cgroup = delegated.0.join("c1");
    ensure_eq!(
        fs::read_to_string(cgroup.join("memory.max"))?,
        "67108864\n",
        "memory"
    );
    ensure_eq!(fs::read_to_string(cgroup.join("pids.max"))?, "20\n", "pids");
    session.rt("pause c1")?;
    ensure_eq!(session.status("c1")?, "paused", "after pause");
    session.rt("resume c1")?;
    session.end("c1")?;
    ensure!(!cgroup.exists(), "the cgroup is left");
    Ok(())
}
