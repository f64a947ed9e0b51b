//! The runtime options of a container: what containerd's configuration says for our runtime handler.

use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options as RuncOptions;
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Kind};
use crate::messages::runtimeoptions::Options as GenericOptions;

/// The types of options that are known.
const RUNC: &str = "containerd.runc.v1.Options";
const GENERIC: &str = "runtimeoptions.v1.Options";

/// What the options can ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "PascalCase")]
pub struct Options {
    /// The configuration file in place of `/etc/rt/config.toml`.
    pub config_path: Option<PathBuf>,
    /// The state root's parent.
    pub root: Option<PathBuf>,
    /// Have systemd make the cgroup.
    pub systemd_cgroup: bool,
    /// Do not use `pivot_root`.
    pub no_pivot_root: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// The user that the streams are to belong to.
    pub io_uid: u32,
    /// The group that the streams are to belong to.
    pub io_gid: u32,
}

impl Options {
    /// Reads them from a request. What we do not honour is refused.
    pub fn of(any: Option<&Any>) -> Result<Self, Failure> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        let wrong =
            |reason: String| Failure::new(Kind::Invalid, format!("runtime options: {reason}"));
        match type_of(any) {
            RUNC => {
                let options = RuncOptions::parse_from_bytes(&any.value)
                    .map_err(|error| wrong(error.to_string()))?;
                Self::of_runc(options)
            }
            GENERIC => {
                let generic = GenericOptions::parse_from_bytes(&any.value)
                    .map_err(|error| wrong(error.to_string()))?;
                let mut options: Self = toml::from_slice(&generic.config_body)
                    .map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
                if !generic.config_path.is_empty() {
                    options.config_path = Some(generic.config_path.into());
                }
                Ok(options)
            }
            _ => Err(wrong(format!("their type {:?} is not known", any.type_url))),
        }
    }

    /// Reads what `start` gets on its standard input: the options alone, or since containerd 2.3 the parameters of the
    /// start with the options among them.
    pub fn of_start(input: &[u8], id: &str, namespace: &str) -> Result<Self, Failure> {
        let wrong = |error: containerd_shim_protos::protobuf::Error| {
            Failure::new(Kind::Invalid, format!("standard input: {error}"))
        };
        // Both begin with two strings: only what they say tells them apart.
        if let Ok(parameters) = BootstrapParams::parse_from_bytes(input)
            && (parameters.instance_id == id && parameters.namespace == namespace)
        {
            let mut values = parameters.extensions.iter().map(|one| &one.value);
            let is_known = |any: &Any| [RUNC, GENERIC].contains(&type_of(any));
            let options = values.find_map(|value| value.as_ref().filter(|any| is_known(any)));
            return Self::of(options);
        }
        Self::of(Some(&Any::parse_from_bytes(input).map_err(wrong)?))
    }

    fn of_runc(options: RuncOptions) -> Result<Self, Failure> {
        for (name, value) in [
            (
                "BinaryName: this shim is the runtime itself",
                &options.binary_name,
            ),
            // `TaskApiAddress` is containerd's note of where it finds us.
            ("ShimCgroup", &options.shim_cgroup),
        ] {
            if !value.is_empty() {
                let reason = format!("runtime options: cannot honour {name}; remove it");
                return Err(Failure::new(Kind::Invalid, reason));
            }
        }
        Ok(Self {
            config_path: None,
            root: Some(options.root)
                .filter(|root| !root.is_empty())
                .map(PathBuf::from),
            systemd_cgroup: options.systemd_cgroup,
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            io_uid: options.io_uid,
            io_gid: options.io_gid,
        })
    }
}

/// The name of what is in it.
fn type_of(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;
    use containerd_shim_protos::protobuf::MessageField;

    use super::*;

    fn any(kind: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: kind.to_owned(),
            value,
            ..Default::default()
        }
    }

    #[test]
    fn both_forms_are_read() {
        assert_eq!(Options::of(None).unwrap(), Options::default());
        let runc = RuncOptions {
            systemd_cgroup: true,
            root: "/r".to_owned(),
            ..Default::default()
        };
        let options = any("containerd.runc.v1.Options", runc.write_to_bytes().unwrap());
        let options = Options::of(Some(&options)).unwrap();
        assert!(options.systemd_cgroup);
        assert_eq!(options.root, Some("/r".into()));

        let mut generic = vec![2 << 3 | 2, 2, b'/', b'c', 3 << 3 | 2, 20];
        generic.extend(b"SystemdCgroup = true");
        let options = any("runtimeoptions.v1.Options", generic);
        let options = Options::of(Some(&options)).unwrap();
        assert!(options.systemd_cgroup);
        assert_eq!(options.config_path, Some("/c".into()));
    }

    #[test]
    fn a_start_is_told_them_in_two_ways() {
        let runc = RuncOptions {
            root: "/r".to_owned(),
            ..Default::default()
        };
        let options = any("containerd.runc.v1.Options", runc.write_to_bytes().unwrap());
        let of = |input: &[u8]| Options::of_start(input, "p1", "k8s.io");
        assert_eq!(of(&[]).unwrap(), Options::default());
        assert_eq!(
            of(&options.write_to_bytes().unwrap()).unwrap().root,
            Some("/r".into())
        );
        let mut parameters = BootstrapParams {
            instance_id: "p1".to_owned(),
            namespace: "k8s.io".to_owned(),
            ..Default::default()
        };
        let with = |parameters: &BootstrapParams| of(&parameters.write_to_bytes().unwrap());
        assert_eq!(with(&parameters).unwrap(), Options::default());
        for value in [any("other", Vec::new()), options] {
            let mut extension = Extension::new();
            extension.value = MessageField::some(value);
            parameters.extensions.push(extension);
        }
        assert_eq!(with(&parameters).unwrap().root, Some("/r".into()));
        parameters.instance_id = "other".to_owned();
        assert!(with(&parameters).is_err());
        assert!(of(&[0xff; 4]).is_err());
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_name() {
        let runc = RuncOptions {
            binary_name: "crun".to_owned(),
            ..Default::default()
        };
        let options = any("containerd.runc.v1.Options", runc.write_to_bytes().unwrap());
        let failure = Options::of(Some(&options)).unwrap_err();
        assert!(failure.reason.contains("BinaryName"), "{failure}");
        assert!(Options::of(Some(&any("other.Options", Vec::new()))).is_err());
        for junk in [&[0xff; 4][..], &[3 << 3 | 2, 3, b'a', b'=', b'b']] {
            let options = any("runtimeoptions.v1.Options", junk.to_vec());
            assert!(Options::of(Some(&options)).is_err(), "{junk:?}");
        }
    }
}
