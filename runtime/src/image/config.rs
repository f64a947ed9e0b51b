//! From an image's configuration to a bundle's (OCI image specification, conversion.md).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use oci_spec::runtime::{Process, Root, Spec, User};

use super::Error;
use super::manifest::ImageConfig;
use super::users;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Annotations that steer this runtime. An image must not choose its own isolation.
const OWN_ANNOTATIONS: &str = "dev.rt.";

/// Lays what the image says of its process, as `user`, over `base`.
pub(super) fn apply(
    mut base: Spec,
    image: &ImageConfig,
    user: &users::User,
) -> Result<Spec, Error> {
    let empty = Default::default();
    let config = image.config.as_ref().unwrap_or(&empty);
    let mut process: Process = base.process().clone().unwrap_or_default();

    let lists = [&config.entrypoint, &config.cmd];
    let args: Vec<String> = lists.into_iter().flatten().flatten().cloned().collect();
    if !args.is_empty() {
        process.set_args(Some(args));
    }

    let mut env = config.env.clone().unwrap_or_default();
    let has =
        |env: &[String], key: &str| env.iter().any(|item| item.split('=').next() == Some(key));
    if !has(&env, "PATH") {
        env.insert(0, PATH.to_owned());
    }
    if !has(&env, "HOME") {
        env.push(format!("HOME={}", user.home.as_deref().unwrap_or("/")));
    }
    process.set_env(Some(env));

    process.set_cwd(working_dir(image)?.into());
    let mut identity = User::default();
    identity.set_uid(user.uid);
    identity.set_gid(user.gid);
    if !user.additional_gids.is_empty() {
        identity.set_additional_gids(Some(user.additional_gids.clone()));
    }
    process.set_user(identity);
    process.set_terminal(Some(false));
    base.set_process(Some(process));

    let mut root = Root::default();
    root.set_path("rootfs".into());
    root.set_readonly(Some(false));
    base.set_root(Some(root));

    let mut annotations = base.annotations().clone().unwrap_or_default();
    annotations.extend(annotations_of(image));
    base.set_annotations(Some(annotations));
    Ok(base)
}

/// The directory that the image's process starts in.
pub(super) fn working_dir(image: &ImageConfig) -> Result<&str, Error> {
    let dir = image
        .config
        .as_ref()
        .and_then(|config| config.working_dir.as_deref())
        .unwrap_or_default();
    match dir {
        "" => Ok("/"),
        dir if Path::new(dir).is_absolute() && !dir.contains('\0') => Ok(dir),
        dir => Err(Error::Invalid {
            name: "configuration".into(),
            what: format!("has the working directory {dir:?}, which is not absolute"),
        }),
    }
}

fn annotations_of(image: &ImageConfig) -> HashMap<String, String> {
    let mut annotations = HashMap::new();
    let mut say = |key: &str, value: &str| {
        annotations.insert(format!("org.opencontainers.image.{key}"), value.to_owned());
    };
    say("os", &image.os);
    say("architecture", &image.architecture);
    if let Some(variant) = &image.variant {
        say("variant", variant);
    }
    if let Some(config) = &image.config {
        if let Some(signal) = &config.stop_signal {
            say("stopSignal", signal);
        }
        if let Some(ports) = config
            .exposed_ports
            .as_ref()
            .filter(|ports| !ports.is_empty())
        {
            say(
                "exposedPorts",
                &ports
                    .keys()
                    .map(String::as_str)
                    .collect::<Vec<_>>()
                    .join(","),
            );
        }
        // A label goes before what was derived.
        let none = BTreeMap::new();
        let labels = config.labels.as_ref().unwrap_or(&none).iter();
        let labels = labels.filter(|(key, _)| !key.is_empty() && !key.starts_with(OWN_ANNOTATIONS));
        annotations.extend(labels.map(|(key, value)| (key.clone(), value.clone())));
    }
    annotations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(config: &str) -> ImageConfig {
        let text = format!(
            "{{\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{{}},\"config\":{config}}}"
        );
        serde_json::from_str(&text).unwrap()
    }

    fn root() -> users::User {
        users::User {
            uid: 0,
            gid: 0,
            additional_gids: Vec::new(),
            home: Some("/root".into()),
        }
    }

    fn process(config: &str) -> Process {
        apply(Spec::default(), &image(config), &root())
            .unwrap()
            .process()
            .clone()
            .unwrap()
    }

    #[test]
    fn entrypoint_goes_before_cmd() {
        let process =
            process(r#"{"Entrypoint":["/init","-x"],"Cmd":["serve"],"WorkingDir":"/srv"}"#);
        assert_eq!(process.args().as_ref().unwrap(), &["/init", "-x", "serve"]);
        assert_eq!(process.cwd(), Path::new("/srv"));
    }

    #[test]
    fn path_and_home_are_added_where_missing() {
        let env = |config| process(config).env().clone().unwrap();
        assert_eq!(env(r#"{"Env":["A=1"]}"#), [PATH, "A=1", "HOME=/root"]);
        assert_eq!(
            env(r#"{"Env":["PATH=/b","HOME=/h"]}"#),
            ["PATH=/b", "HOME=/h"]
        );
        assert_eq!(env(r#"{"Env":null,"Cmd":null}"#), [PATH, "HOME=/root"]);
    }

    #[test]
    fn labels_become_annotations_but_do_not_steer_the_runtime() {
        let config = r#"{"Labels":{"a":"b","dev.rt.isolation":"container"},"StopSignal":"SIGQUIT","ExposedPorts":{"80/tcp":{}}}"#;
        let spec = apply(Spec::default(), &image(config), &root()).unwrap();
        let annotations = spec.annotations().as_ref().unwrap();
        assert_eq!(annotations["a"], "b");
        assert_eq!(
            annotations["org.opencontainers.image.stopSignal"],
            "SIGQUIT"
        );
        assert_eq!(
            annotations["org.opencontainers.image.exposedPorts"],
            "80/tcp"
        );
        assert!(!annotations.contains_key("dev.rt.isolation"));
    }

    #[test]
    fn a_relative_working_directory_is_refused() {
        assert!(apply(Spec::default(), &image(r#"{"WorkingDir":"srv"}"#), &root()).is_err());
    }
}
