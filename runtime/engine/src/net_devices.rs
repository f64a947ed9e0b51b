//! `linux.netDevices`: network devices of the host that move into the container's network namespace.
//!
//! A device keeps its permanent addresses of global scope and comes up; when the namespace ends the kernel gives a
//! physical one back to the host, and a virtual one goes with it. libcontainer speaks netlink for us.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use libcontainer::network::address::AddressClient;
use libcontainer::network::link::LinkClient;
use libcontainer::network::network_device::{
    dev_change_net_namespace, resolve_device_name, setup_addresses_in_network_namespace,
};
use libcontainer::network::wrapper::create_network_client;
use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespaceType, LinuxNetDevice, Spec};

use crate::clone::Child;
use crate::error::{Context, Error};
use crate::handshake;
use crate::namespaces;
use crate::report::chain;
use crate::spec::namespace;

/// The longest name of a device, `IFNAMSIZ` without the final NUL.
const LONGEST_NAME: usize = 15;

/// The devices of one container, by their names on the host.
pub(crate) struct NetDevices<'a> {
    devices: Vec<(&'a str, &'a LinuxNetDevice)>,
    has_namespace: bool,
}

impl<'a> NetDevices<'a> {
    pub(crate) fn of_spec(spec: &'a Spec) -> Self {
        let linux = spec.linux().as_ref();
        let given: Option<&HashMap<String, LinuxNetDevice>> =
            linux.and_then(|linux| linux.net_devices().as_ref());
        let mut devices: Vec<_> = given
            .into_iter()
            .flatten()
            .map(|(name, device)| (name.as_str(), device))
            .collect();
        devices.sort_by_key(|(name, _)| *name);
        Self {
            devices,
            has_namespace: namespace(spec, LinuxNamespaceType::Network).is_some(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        let field = |name: &str| format!("linux.netDevices.{name}");
        let is_name = |name: &str| {
            !name.is_empty()
                && name.len() <= LONGEST_NAME
                && !matches!(name, "." | "..")
                && !name.contains(|letter: char| letter.is_whitespace() || "/:".contains(letter))
        };
        for (name, device) in &self.devices {
            if !self.has_namespace {
                return Err(Error::unsupported(
                    field(name),
                    "it needs a network namespace to move to (linux.namespaces)",
                ));
            }
            let inside = resolve_device_name(device, name);
            if let Some(wrong) = [*name, inside].into_iter().find(|name| !is_name(name)) {
                return Err(Error::unsupported(
                    field(name),
                    format!("{wrong:?} is no name of a network device"),
                ));
            }
        }
        Ok(())
    }

    /// Moves them to the network namespace of a process.
    pub(crate) fn move_to(&self, child: &Child) -> Result<(), Error> {
        let path = format!("/proc/{}/ns/net", child.pid);
        let target = File::open(&path).context(|| format!("cannot open {path}"))?;
        for (name, device) in &self.devices {
            let failed = |error: &dyn std::error::Error| {
                Error::Setup(format!("linux.netDevices.{name}: {}", chain(error)))
            };
            let addresses = dev_change_net_namespace(name, target.as_raw_fd(), device)
                .map_err(|error| failed(&error))?;
            let inside = resolve_device_name(device, name);
            let what = "the process that sets up network devices";
            let failure = handshake::in_child(what, None, || {
                namespaces::join(child.pidfd.as_fd(), CloneFlags::CLONE_NEWNET)?;
                let mut links =
                    LinkClient::new(create_network_client()).map_err(|error| failed(&error))?;
                let index = links
                    .get_by_name(inside)
                    .map_err(|error| failed(&error))?
                    .header
                    .index;
                let mut client =
                    AddressClient::new(create_network_client()).map_err(|error| failed(&error))?;
                setup_addresses_in_network_namespace(&addresses, index, inside, &mut client)
                    .map_err(|error| failed(&error))?;
                links.set_up(index).map_err(|error| failed(&error))
            })?;
            if let Some(failure) = failure {
                return Err(failure.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_devices_are_named() {
        let refused = |namespaces: &str, devices: &str| {
            let text = format!(
                r#"{{"ociVersion":"1.3.0","linux":{{"namespaces":{namespaces},"netDevices":{devices}}}}}"#
            );
            let spec: Spec = serde_json::from_str(&text).unwrap();
            NetDevices::of_spec(&spec)
                .validate()
                .unwrap_err()
                .to_string()
        };
        let text = refused("[]", r#"{"eth0":{}}"#);
        assert!(
            text.starts_with("linux.netDevices.eth0: it needs"),
            "{text}"
        );
        let network = r#"[{"type":"network"}]"#;
        for name in ["a/b", "much-too-long-name", "..", "a b"] {
            let text = refused(network, &format!(r#"{{"eth0":{{"name":"{name}"}}}}"#));
            assert!(text.ends_with("is no name of a network device"), "{text}");
        }
    }
}
