//! An image without a registry: a busybox root file system in the archive
//! format that docker, podman and containerd all import.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::make_rootfs;

/// Writes the archive `archive` of an image called `name`, in docker's format, that runs `command` if it is not told
/// otherwise; `scratch` is a directory to work in.
///
/// # Errors
/// The file system's.
pub fn write_image(archive: &Path, name: &str, command: &[&str], scratch: &Path) -> io::Result<()> {
    let rootfs = scratch.join("image-rootfs");
    make_rootfs(&rootfs)?;
    let mut layer = tar::Builder::new(Vec::new());
    layer.follow_symlinks(false);
    layer.append_dir_all(".", &rootfs)?;
    let layer = layer.into_inner()?;
    fs::remove_dir_all(&rootfs)?;

    let digest: String = Sha256::digest(&layer)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": command},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    let mut image = tar::Builder::new(File::create(archive)?);
    for (path, content) in [
        ("config.json", config.to_string().as_bytes()),
        ("layer.tar", &layer),
        ("manifest.json", manifest.to_string().as_bytes()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        image.append_data(&mut header, path, content)?;
    }
    image.into_inner()?.sync_all()
}
