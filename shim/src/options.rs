//! The runtime options of a container: what containerd's configuration says for our runtime handler.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Message};
use containerd_shim_protos::shim::oci::Options as RuncOptions;
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Kind};

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
        match any.type_url.rsplit('/').next() {
            Some("containerd.runc.v1.Options") => {
                let options = RuncOptions::parse_from_bytes(&any.value)
                    .map_err(|error| wrong(error.to_string()))?;
                Self::of_runc(options)
            }
            Some("runtimeoptions.v1.Options") => {
                let Generic { path, body } =
                    Generic::parse(&any.value).map_err(|error| wrong(error.to_string()))?;
                let mut options = Self::default();
                if !body.is_empty() {
                    options = toml::from_str(&body)
                        .map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
                }
                if !path.is_empty() {
                    options.config_path = Some(path.into());
                }
                Ok(options)
            }
            _ => Err(wrong(format!("their type {:?} is not known", any.type_url))),
        }
    }

    fn of_runc(options: RuncOptions) -> Result<Self, Failure> {
        for (name, value) in [
            (
                "BinaryName: this shim is the runtime itself",
                &options.binary_name,
            ),
            ("ShimCgroup", &options.shim_cgroup),
            ("TaskApiAddress", &options.task_api_address),
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

/// `runtimeoptions.v1.Options`: `type_url` (1), `config_path` (2), `config_body` (3).
#[derive(Default)]
struct Generic {
    path: String,
    body: String,
}

impl Generic {
    fn parse(bytes: &[u8]) -> Result<Self, Box<dyn std::error::Error>> {
        const LENGTH_DELIMITED: u32 = 2;
        let mut generic = Self::default();
        let mut stream = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            if tag & 7 != LENGTH_DELIMITED {
                return Err(format!("unexpected field {}", tag >> 3).into());
            }
            let value = stream.read_bytes()?;
            match tag >> 3 {
                2 => generic.path = String::from_utf8(value)?,
                3 => generic.body = String::from_utf8(value)?,
                _ => {}
            }
        }
        Ok(generic)
    }
}

#[cfg(test)]
mod tests {
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
    fn what_is_not_honoured_is_refused_by_name() {
        let runc = RuncOptions {
            binary_name: "crun".to_owned(),
            ..Default::default()
        };
        let options = any("containerd.runc.v1.Options", runc.write_to_bytes().unwrap());
        let failure = Options::of(Some(&options)).unwrap_err();
        assert!(failure.reason.contains("BinaryName"), "{failure}");
        assert!(Options::of(Some(&any("other.Options", Vec::new()))).is_err());
        for junk in [
            &[0xff; 4][..],
            &[1 << 3, 1],
            &[3 << 3 | 2, 3, b'a', b'=', b'b'],
        ] {
            let options = any("runtimeoptions.v1.Options", junk.to_vec());
            assert!(Options::of(Some(&options)).is_err(), "{junk:?}");
        }
    }
}
