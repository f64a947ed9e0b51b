//! A node that a container makes ready: `rt install node` on the root directory of another machine, whose containerd then
//! says what it makes of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use integration::{Claim, Outcome, ensure, ensure_eq, finish};

use crate::{CONTAINER, Entry, Reason, Start};

pub const CLAIMS: &[Entry<Node>] = &[
    Entry::further("is_made_ready", CONTAINER, is_made_ready),
    Entry::further(
        "keeps_its_configuration",
        CONTAINER,
        keeps_its_configuration,
    ),
    Entry::further("that_is_none_is_told", CONTAINER, that_is_none_is_told),
];

/// Where this machine's root is seen once more, with what is changed kept apart.
pub struct Node {
    start: Start,
}

pub fn start(start: Start) -> Result<Node, Reason> {
    Ok(Node { start })
}

impl Node {
    /// A node of its own, as this machine was installed, with this configuration of containerd.
    fn host(&self, name: &str, config: Option<&str>) -> Result<PathBuf, Reason> {
        let dir = self.start.world.dir().join(name);
        for part in ["upper", "work", "host"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let options = format!(
            "lowerdir=/,upperdir={0}/upper,workdir={0}/work",
            dir.display()
        );
        // With the devices that a node has.
        let mount = "mount -t overlay overlay -o $1 $2 && mount --rbind /dev $2/dev";
        let mut shell = self.start.world.command("sh");
        shell
            .args(["-c", mount, "sh", &options])
            .arg(dir.join("host"));
        finish(&mut shell, None)?.success()?;
        let config_path = dir.join("host/etc/containerd/config.toml");
        let write = match config {
            Some(text) => format!("mkdir -p \"${{1%/*}}\" && cat > \"$1\" <<'EOF'\n{text}EOF\n"),
            None => "rm -f \"$1\"".to_owned(),
        };
        let mut shell = self.start.world.command("sh");
        shell.args(["-c", &write, "sh"]).arg(config_path);
        finish(&mut shell, None)?.success()?;
        Ok(dir.join("host"))
    }

    fn install(&self, host: &Path) -> Result<Outcome, Reason> {
        let mut rt = self.start.world.command(&self.start.rt);
        rt.args(["install", "node", "--host"]).arg(host);
        Ok(finish(&mut rt, None)?)
    }

    /// A command on the node.
    fn on(&self, host: &Path, script: &str) -> Result<String, Reason> {
        let mut chroot = self.start.world.command("chroot");
        chroot.arg(host).args(["sh", "-c", script]);
        Ok(finish(&mut chroot, None)?.success()?.stdout)
    }
}

fn is_made_ready(node: &Node) -> Claim {
    let host = node.host("bare", None)?;
    let told = node.install(&host)?.success()?.stdout;
    ensure!(told.contains("wrote /usr/local/bin/rt\n"), "{told}");
    for name in ["rt", "rt-agent", "containerd-shim-rt-v2"] {
        let ours = fs::read(node.start.rt.with_file_name(name))?;
        let installed = host.join("usr/local/bin").join(name);
        let there = node.start.world.path(&installed.to_string_lossy());
        ensure!(fs::read(&there)? == ours, "{name} is another");
        let mode = fs::metadata(&there)?.permissions().mode();
        ensure_eq!(mode & 0o7777, 0o755, "mode of {name}");
    }
    let links = node.on(
        &host,
        "cd /usr/local/bin && readlink rt-microvm containerd-shim-rt-microvm-v2",
    )?;
    ensure_eq!(links, "rt\ncontainerd-shim-rt-v2\n", "links");
    let settings = node.on(&host, "containerd config dump")?;
    for handler in ["io.containerd.rt.v2", "io.containerd.rt-microvm.v2"] {
        ensure!(settings.contains(handler), "no {handler} in {settings}");
    }
    let version = node.on(&host, "/usr/local/bin/containerd-shim-rt-microvm-v2 -v")?;
    ensure!(version.contains("containerd-shim-rt"), "{version}");
    // Once more, as each start of the pod does.
    let again = node.install(&host)?.success()?.stdout;
    ensure!(
        again.contains("/etc/containerd/conf.d/rt.toml is so already")
            && !again.contains("config.toml"),
        "{again}"
    );
    Ok(())
}

fn keeps_its_configuration(node: &Node) -> Claim {
    let config = "# ours\nversion = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"ours:1\"\n";
    let host = node.host("configured", Some(config))?;
    node.install(&host)?.success()?;
    let own = node.on(&host, "cat /etc/containerd/config.toml")?;
    ensure_eq!(
        own,
        format!("imports = [\"/etc/containerd/conf.d/*.toml\"]\n{config}"),
        "containerd's own configuration"
    );
    let settings = node.on(&host, "containerd config dump")?;
    for expected in ["ours:1", "io.containerd.rt.v2"] {
        ensure!(settings.contains(expected), "no {expected} in {settings}");
    }
    Ok(())
}

fn that_is_none_is_told(node: &Node) -> Claim {
    let empty = node.start.world.dir().join("empty");
    fs::create_dir(&empty)?;
    let refused = node.install(&empty)?;
    ensure!(
        refused.code() == 1 && refused.stderr.contains("/etc/containerd/config.toml"),
        "{refused:?}"
    );
    let refused = node.install(&empty.join("nothing"))?;
    ensure!(
        refused.code() == 1
            && refused.stderr.contains("enter")
            && refused.stderr.contains("empty/nothing"),
        "{refused:?}"
    );
    Ok(())
}
