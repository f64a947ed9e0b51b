//! Two network namespaces that a cable joins: one for the container under test, and one that is its world outside.
//!
//! Made with ip(8), as CNI's `bridge` plugin leaves a namespace: an `eth0` with addresses, a default route, and a route
//! of another metric.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns};

use crate::fixture::finish;

/// The container's addresses; those outside end in 1.
pub const INSIDE: &str = "10.99.0.2";
/// Where the container's default route leads.
pub const OUTSIDE: &str = "10.99.0.1";
/// The link address of `eth0`.
pub const LINK_ADDRESS: &str = "02:00:5e:00:53:01";

/// The namespaces; they go with it.
pub struct Cable {
    name: String,
}

impl Cable {
    /// Makes the namespaces and joins them; `name` must be unique on the machine.
    ///
    /// # Errors
    /// What ip(8) said.
    pub fn new(name: &str) -> io::Result<Self> {
        let cable = Self {
            name: name.to_owned(),
        };
        for end in [cable.inside(), cable.outside()] {
            cable.ip(&["netns", "add", &end])?;
            cable.ip(&["-n", &end, "link", "set", "lo", "up"])?;
        }
        cable.add_cable("eth0")?;
        cable.ip_inside(&[
            "link",
            "set",
            "eth0",
            "address",
            LINK_ADDRESS,
            "mtu",
            "1400",
            "up",
        ])?;
        for address in ["10.99.0.2/24", "fd99::2/64"] {
            let nodad: &[&str] = if address.contains(':') {
                &["nodad"]
            } else {
                &[]
            };
            cable.ip_inside(&[&["addr", "add", address, "dev", "eth0"], nodad].concat())?;
        }
        for address in ["10.99.0.1/24", "fd99::1/64", "192.0.2.1/32"] {
            let nodad: &[&str] = if address.contains(':') {
                &["nodad"]
            } else {
                &[]
            };
            let outside = cable.outside();
            let add = ["-n", &outside, "addr", "add", address, "dev", "peer-eth0"];
            cable.ip(&[&add, nodad].concat())?;
        }
        cable.ip_inside(&["route", "add", "default", "via", OUTSIDE])?;
        cable.ip_inside(&["-6", "route", "add", "default", "via", "fd99::1"])?;
        cable.ip_inside(&[
            "route",
            "add",
            "192.0.2.0/24",
            "via",
            OUTSIDE,
            "metric",
            "50",
        ])?;
        Ok(cable)
    }

    /// Joins the namespaces once more, by an interface of this name inside that is down and has no address.
    ///
    /// # Errors
    /// What ip(8) said.
    pub fn add_cable(&self, interface: &str) -> io::Result<()> {
        let (inside, outside) = (self.inside(), self.outside());
        let peer = format!("peer-{interface}");
        self.ip(&[
            "-n", &inside, "link", "add", interface, "type", "veth", "peer", "name", &peer,
            "netns", &outside,
        ])?;
        self.ip(&["-n", &outside, "link", "set", &peer, "up"])
    }

    fn inside(&self) -> String {
        format!("{}-in", self.name)
    }

    fn outside(&self) -> String {
        format!("{}-out", self.name)
    }

    /// The container's namespace.
    pub fn path(&self) -> PathBuf {
        format!("/run/netns/{}", self.inside()).into()
    }

    /// ip(8) in the container's namespace.
    ///
    /// # Errors
    /// What it said.
    pub fn ip_inside(&self, arguments: &[&str]) -> io::Result<()> {
        let inside = self.inside();
        self.ip(&[&["-n", &inside], arguments].concat())
    }

    /// What a command in the container's namespace writes, that being on this host.
    ///
    /// # Errors
    /// What it said.
    pub fn output_inside(&self, command: &[&str]) -> io::Result<String> {
        output_in(&self.inside(), command)
    }

    /// What a command in the namespace outside writes, that being on this host.
    ///
    /// # Errors
    /// What it said.
    pub fn output_outside(&self, command: &[&str]) -> io::Result<String> {
        output_in(&self.outside(), command)
    }

    fn ip(&self, arguments: &[&str]) -> io::Result<()> {
        let outcome = finish(Command::new("ip").args(arguments), None)?.success();
        outcome.map(drop).map_err(io::Error::other)
    }

    /// Runs `f` in a thread that is in the namespace outside.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn outside_of<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<thread::JoinHandle<io::Result<T>>> {
        let namespace = File::open(format!("/run/netns/{}", self.outside()))?;
        Ok(thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(f())
        }))
    }
}

fn output_in(namespace: &str, command: &[&str]) -> io::Result<String> {
    let mut all = Command::new("ip");
    all.args(["netns", "exec", namespace]).args(command);
    let outcome = finish(&mut all, None)?.success();
    Ok(outcome.map_err(io::Error::other)?.stdout)
}

impl Drop for Cable {
    fn drop(&mut self) {
        for end in [self.inside(), self.outside()] {
            let _ = self.ip(&["netns", "delete", &end]);
        }
    }
}
