//! Finding one image's configuration and layers among the files of an OCI layout or a `docker save` archive.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::Error;
use super::digest::{Digest, Verified};
use super::manifest::{Descriptor, DockerItem, ImageConfig, Index, Manifest, Platform};
use super::source::Source;

/// No document of an image is larger.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Indexes may hold indexes, this deep.
const MAX_DEPTH: usize = 4;
/// An image offers no more manifests.
const MAX_CANDIDATES: usize = 1000;
/// An image has no more layers; storage drivers stop at 128.
const MAX_LAYERS: usize = 512;

/// The annotations that name a manifest in `index.json`.
const NAME_ANNOTATIONS: [&str; 2] = [
    "org.opencontainers.image.ref.name",
    "io.containerd.image.name",
];

/// An image found: its configuration and where its layers are, lowest first.
pub(super) struct Image {
    pub config: ImageConfig,
    pub layers: Vec<Layer>,
}

/// A layer's place and digests.
#[derive(Debug)]
pub(super) struct Layer {
    /// Its file in the image.
    pub name: PathBuf,
    /// The digest of that file, where the image gives one.
    pub blob: Option<Digest>,
    /// The digest of its uncompressed archive.
    pub diff_id: Digest,
}

/// What to look for.
pub(super) struct Wanted<'a> {
    pub tag: Option<&'a str>,
    pub platform: Option<&'a Platform>,
}

/// Finds the image in `source`, which was opened at `path`.
pub(super) fn find(source: &Source, path: &Path, wanted: &Wanted<'_>) -> Result<Image, Error> {
    if let Some(index) = source.document(Path::new("index.json"), MAX_DOCUMENT)? {
        return find_oci(source, &parse("index.json", &index)?, wanted);
    }
    if let Some(list) = source.document(Path::new("manifest.json"), MAX_DOCUMENT)? {
        return find_docker(source, parse("manifest.json", &list)?, wanted);
    }
    let what = "it has neither index.json (an OCI layout) nor manifest.json (docker save)".into();
    Err(Error::NotAnImage {
        path: path.to_owned(),
        what,
    })
}

/// A manifest that might be meant.
struct Candidate {
    manifest: Descriptor,
    names: Vec<String>,
}

impl Candidate {
    fn describe(&self) -> String {
        let name = self.names.first().map_or("(no tag)", String::as_str);
        match &self.manifest.platform {
            Some(platform) => format!("{name} {platform}"),
            None => name.to_owned(),
        }
    }
}

fn find_oci(source: &Source, index: &Index, wanted: &Wanted<'_>) -> Result<Image, Error> {
    let mut all = Vec::new();
    collect(source, index, &[], MAX_DEPTH, &mut all)?;
    let available = list(all.iter().map(Candidate::describe));

    let mut left: Vec<&Candidate> = all.iter().collect();
    if let Some(tag) = wanted.tag {
        left.retain(|candidate| candidate.names.iter().any(|name| is_tagged(name, tag)));
    }
    // A manifest that does not tell its platform is judged by its configuration, below.
    let offers = |candidate: &&Candidate, platform: &Platform| {
        candidate
            .manifest
            .platform
            .as_ref()
            .is_none_or(|offered| platform.is_met_by(offered))
    };
    if let Some(platform) = wanted.platform {
        left.retain(|candidate| offers(candidate, platform));
    } else if left.len() > 1 {
        left.retain(|candidate| offers(candidate, &Platform::preferred()));
    }
    left.dedup_by(|a, b| a.manifest.digest == b.manifest.digest);
    let [chosen] = left.as_slice() else {
        return Err(undecided(left.len(), wanted, available));
    };

    let manifest: Manifest = blob_document(source, &chosen.manifest)?;
    let config: ImageConfig = blob_document(source, &manifest.config)?;
    check_platform(&config, wanted, &available)?;
    let blobs = manifest
        .layers
        .into_iter()
        .map(|layer| (blob_name(&layer.digest), Some(layer.digest)))
        .collect();
    Ok(Image {
        layers: pair(blobs, &config)?,
        config,
    })
}

/// Gathers the manifests below `index`; those of a nested index bear its names too.
fn collect(
    source: &Source,
    index: &Index,
    inherited: &[String],
    depth: usize,
    found: &mut Vec<Candidate>,
) -> Result<(), Error> {
    for manifest in &index.manifests {
        let annotations = manifest.annotations.iter().flatten();
        let own = annotations
            .filter(|(key, _)| NAME_ANNOTATIONS.contains(&key.as_str()))
            .map(|(_, name)| name);
        let names: Vec<String> = inherited.iter().chain(own).cloned().collect();
        match manifest.media_type.as_str() {
            "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json" => {
                let Some(depth) = depth.checked_sub(1) else {
                    let what = "is nested too deep".into();
                    return Err(Error::Invalid {
                        name: "index".into(),
                        what,
                    });
                };
                collect(
                    source,
                    &blob_document(source, manifest)?,
                    &names,
                    depth,
                    found,
                )?;
            }
            // An attestation is listed as an image of no platform.
            _ if manifest
                .platform
                .as_ref()
                .is_some_and(|platform| platform.os == "unknown") => {}
            _ => found.push(Candidate {
                manifest: manifest.clone(),
                names,
            }),
        }
        if found.len() > MAX_CANDIDATES {
            let what = format!("lists more than {MAX_CANDIDATES} manifests");
            return Err(Error::Invalid {
                name: "index".into(),
                what,
            });
        }
    }
    Ok(())
}

fn find_docker(
    source: &Source,
    items: Vec<DockerItem>,
    wanted: &Wanted<'_>,
) -> Result<Image, Error> {
    let tags = |item: &DockerItem| item.repo_tags.clone().unwrap_or_default();
    let available = list(items.iter().map(|item| {
        let tags = tags(item);
        if tags.is_empty() {
            "(no tag)".to_owned()
        } else {
            tags.join(", ")
        }
    }));
    let mut left = items;
    if let Some(wanted) = wanted.tag {
        left.retain(|item| tags(item).iter().any(|tag| is_tagged(tag, wanted)));
    }
    if left.len() != 1 {
        return Err(undecided(left.len(), wanted, available));
    }
    let item = left.swap_remove(0);
    let content = source
        .document(Path::new(&item.config), MAX_DOCUMENT)?
        .ok_or_else(|| Error::Missing {
            name: item.config.clone(),
        })?;
    // The configuration is named by its digest: "<hex>.json", newer "blobs/sha256/<hex>".
    let stem = Path::new(&item.config)
        .file_stem()
        .and_then(|stem| stem.to_str());
    if let Some(digest) = stem.and_then(Digest::sha256) {
        verify(&content, digest)?;
    }
    let config: ImageConfig = parse(&item.config, &content)?;
    check_platform(&config, wanted, &available)?;
    let blobs = item
        .layers
        .into_iter()
        .map(|name| (PathBuf::from(name), None))
        .collect();
    Ok(Image {
        layers: pair(blobs, &config)?,
        config,
    })
}

/// Joins each layer's file with its uncompressed digest, in the order both are given.
fn pair(blobs: Vec<(PathBuf, Option<Digest>)>, config: &ImageConfig) -> Result<Vec<Layer>, Error> {
    let diff_ids = &config.rootfs.diff_ids;
    let invalid = |what| {
        Err(Error::Invalid {
            name: "configuration".into(),
            what,
        })
    };
    if blobs.len() != diff_ids.len() {
        return invalid(format!(
            "has {} digests for {} layers",
            diff_ids.len(),
            blobs.len()
        ));
    }
    if blobs.len() > MAX_LAYERS {
        return invalid(format!("has more than {MAX_LAYERS} layers"));
    }
    let layers = blobs.into_iter().zip(diff_ids);
    Ok(layers
        .map(|((name, blob), diff_id)| Layer {
            name,
            blob,
            diff_id: diff_id.clone(),
        })
        .collect())
}

fn check_platform(config: &ImageConfig, wanted: &Wanted<'_>, available: &str) -> Result<(), Error> {
    let offered = Platform {
        os: config.os.clone(),
        architecture: config.architecture.clone(),
        variant: config.variant.clone(),
    };
    if let Some(platform) = wanted.platform
        && !platform.is_met_by(&offered)
    {
        let what = format!("the image is for {offered}, not {platform}");
        return Err(Error::Choice {
            what,
            available: available.to_owned(),
        });
    }
    if config.os != "linux" {
        let what = format!("is for {offered}; only Linux images can be unpacked");
        return Err(Error::Invalid {
            name: "configuration".into(),
            what,
        });
    }
    Ok(())
}

fn undecided(count: usize, wanted: &Wanted<'_>, available: String) -> Error {
    let mut what = match count {
        0 => "no image".to_owned(),
        count => format!("{count} images"),
    };
    what.push_str(if count == 0 { " matches" } else { " match" });
    match (wanted.tag, wanted.platform) {
        (None, None) => what.push_str(": name one with `--tag` or `--platform`"),
        (tag, platform) => {
            tag.iter()
                .for_each(|tag| what.push_str(&format!(" `--tag {tag}`")));
            platform
                .iter()
                .for_each(|platform| what.push_str(&format!(" `--platform {platform}`")));
        }
    }
    Error::Choice { what, available }
}

fn list(items: impl Iterator<Item = String>) -> String {
    const SHOWN: usize = 20;
    let items: Vec<String> = items.collect();
    let mut text = items
        .iter()
        .take(SHOWN)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join("; ");
    if items.is_empty() {
        text.push_str("none");
    } else if items.len() > SHOWN {
        text.push_str("; ...");
    }
    text
}

/// Whether `name` ("latest", "busybox:latest", "docker.io/library/busybox:latest") is meant by `tag`.
fn is_tagged(name: &str, tag: &str) -> bool {
    name == tag
        || name.rsplit_once(':').is_some_and(|(_, last)| last == tag)
        || name
            .strip_suffix(tag)
            .is_some_and(|before| before.ends_with('/'))
}

fn blob_name(digest: &Digest) -> PathBuf {
    Path::new("blobs")
        .join(digest.algorithm())
        .join(digest.hex())
}

/// Reads a document from the blob that `descriptor` refers to.
fn blob_document<T: DeserializeOwned>(
    source: &Source,
    descriptor: &Descriptor,
) -> Result<T, Error> {
    let name = blob_name(&descriptor.digest);
    let text = name.display().to_string();
    let content = source
        .document(&name, MAX_DOCUMENT)?
        .ok_or_else(|| Error::Missing { name: text.clone() })?;
    if content.len() as u64 != descriptor.size {
        let what = format!(
            "has {} bytes where its descriptor says {}",
            content.len(),
            descriptor.size
        );
        return Err(Error::Invalid { name: text, what });
    }
    verify(&content, descriptor.digest.clone())?;
    parse(&text, &content)
}

fn verify(content: &[u8], digest: Digest) -> Result<(), Error> {
    let mut reader = Verified::new(content, Some(digest));
    std::io::copy(&mut reader, &mut std::io::sink()).map_err(Error::io("read", "document"))?;
    reader.verify()
}

fn parse<T: DeserializeOwned>(name: &str, content: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(content).map_err(|source| Error::Json {
        name: name.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_means_the_whole_name_its_end_or_its_tag() {
        let name = "docker.io/library/busybox:latest";
        for tag in [name, "latest", "busybox:latest", "library/busybox:latest"] {
            assert!(is_tagged(name, tag), "{tag}");
        }
        for tag in ["box:latest", "test", "", "busybox"] {
            assert!(!is_tagged(name, tag), "{tag}");
        }
    }
}
