//! Images made by hand, honest and hostile.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde_json::json;
use tar::{EntryType, Header};

use super::*;
use crate::image::digest::tests::of as digest_of;

/// A layer's archive in the making.
struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// Appends an entry whose names are taken as they are: the builder would refuse the hostile ones.
    fn raw(mut self, kind: EntryType, name: &str, link: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.raw(EntryType::Regular, name, "", 0o644, content.as_bytes())
    }

    fn dir(self, name: &str) -> Self {
        self.raw(EntryType::Directory, name, "", 0o755, b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Symlink, name, target, 0o777, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Link, name, target, 0o644, b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    fn tar(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// `data` in raw blocks, behind a frame that is to be skipped.
fn zstd(data: &[u8]) -> Vec<u8> {
    let mut out = vec![0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    for chunk in data.chunks(4096) {
        out.extend_from_slice(&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58]);
        let header = (chunk.len() as u32) << 3 | 1;
        out.extend_from_slice(&header.to_le_bytes()[..3]);
        out.extend_from_slice(chunk);
    }
    out
}

/// An OCI layout in `dir` of these layers, packed by `pack`.
fn layout(dir: &Path, layers: &[Vec<u8>], pack: fn(&[u8]) -> Vec<u8>) {
    layout_of(dir, layers, pack, json!({"Cmd": ["/bin/sh"]}));
}

fn layout_of(
    dir: &Path,
    layers: &[Vec<u8>],
    pack: fn(&[u8]) -> Vec<u8>,
    config: serde_json::Value,
) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |content: &[u8]| {
        let digest = digest_of(content);
        fs::write(blobs.join(&digest[7..]), content).unwrap();
        json!({"mediaType": "application/octet-stream", "digest": digest, "size": content.len()})
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest_of(layer)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = put(config.to_string().as_bytes());
    let layers: Vec<serde_json::Value> = layers.iter().map(|layer| put(&pack(layer))).collect();
    let manifest = put(
        json!({"schemaVersion": 2, "config": config, "layers": layers})
            .to_string()
            .as_bytes(),
    );
    fs::write(
        dir.join("index.json"),
        json!({"schemaVersion": 2, "manifests": [manifest]}).to_string(),
    )
    .unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// A place to work in: an image, and a target beside it.
struct Place(tempfile::TempDir);

impl Place {
    /// None where we are not root: owners and devices cannot be made then.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: unpacking needs root");
            return None;
        }
        Some(Self(tempfile::tempdir().unwrap()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn rootfs(&self, name: &str) -> PathBuf {
        self.path("bundle/rootfs").join(name)
    }

    fn unpack(&self) -> Result<Unpacked, Error> {
        self.unpack_up_to(64 << 20)
    }

    fn unpack_up_to(&self, max_bytes: u64) -> Result<Unpacked, Error> {
        let (image, target) = (self.path("image"), self.path("bundle"));
        Unpack {
            image: &image,
            target: &target,
            tag: None,
            platform: None,
            max_bytes,
        }
        .run(Spec::default())
    }

    /// Unpacks these layers, which must work.
    fn unpack_layers(&self, layers: Vec<Layer>) {
        let layers: Vec<Vec<u8>> = layers.into_iter().map(Layer::tar).collect();
        layout(&self.path("image"), &layers, gzip);
        self.unpack().unwrap();
    }

    /// Unpacks this layer, which must fail and leave nothing but the image.
    fn refuse(&self, layer: Vec<u8>) -> Error {
        layout(&self.path("image"), &[layer], <[u8]>::to_vec);
        let error = self.unpack().unwrap_err();
        let left: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["image"], "after {error}");
        error
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.rootfs(name)).unwrap()
    }

    fn exists(&self, name: &str) -> bool {
        fs::symlink_metadata(self.rootfs(name)).is_ok()
    }
}

#[test]
fn every_kind_of_entry_keeps_owner_permissions_and_time() {
    let Some(place) = Place::new() else { return };
    place.unpack_layers(vec![
        Layer::new()
            .raw(EntryType::Directory, "./", "", 0o711, b"")
            .raw(EntryType::Directory, "etc", "", 0o750, b"")
            .raw(EntryType::Regular, "etc/su", "", 0o4755, b"program")
            .hard_link("etc/su2", "etc/su")
            .symlink("etc/link", "/etc/su")
            .raw(EntryType::Char, "null", "", 0o666, b"")
            .raw(EntryType::Fifo, "pipe", "", 0o600, b"")
            .file("deep/er/file", "x"),
    ]);
    let stat = |name: &str| fs::symlink_metadata(place.rootfs(name)).unwrap();
    for name in ["", "etc", "etc/su", "etc/link", "null", "pipe"] {
        let stat = stat(name);
        assert_eq!(
            (stat.uid(), stat.gid(), stat.mtime()),
            (7, 8, 1_000_000),
            "{name}"
        );
    }
    assert_eq!(stat("").mode() & 0o7777, 0o711);
    assert_eq!(stat("etc").mode() & 0o7777, 0o750);
    assert_eq!(stat("etc/su").mode() & 0o7777, 0o4755);
    assert_eq!(stat("etc/su").ino(), stat("etc/su2").ino());
    assert_eq!(
        fs::read_link(place.rootfs("etc/link")).unwrap(),
        Path::new("/etc/su")
    );
    assert!(stat("null").file_type().is_char_device());
    assert_eq!(stat("null").rdev(), nix::sys::stat::makedev(1, 3));
    assert!(stat("pipe").file_type().is_fifo());
    assert_eq!(place.read("deep/er/file"), "x");
    assert_eq!(
        fs::metadata(place.path("bundle")).unwrap().mode() & 0o777,
        0o700
    );
    assert!(place.path("bundle/config.json").is_file());
}

#[test]
fn zstd_layers_of_many_frames_are_read() {
    let Some(place) = Place::new() else { return };
    let content = "0123456789".repeat(3000);
    layout(
        &place.path("image"),
        &[Layer::new().file("f", &content).tar()],
        zstd,
    );
    place.unpack().unwrap();
    assert_eq!(place.read("f"), content);
}

#[test]
fn an_archive_and_a_docker_archive_are_read_in_place() {
    let Some(place) = Place::new() else { return };
    let layer = Layer::new().file("f", "content").tar();
    let scratch = place.path("scratch");
    layout(&scratch, std::slice::from_ref(&layer), gzip);
    let mut archive = tar::Builder::new(fs::File::create(place.path("image")).unwrap());
    archive.append_dir_all(".", &scratch).unwrap();
    archive.into_inner().unwrap();
    place.unpack().unwrap();
    assert_eq!(place.read("f"), "content");
    fs::remove_dir_all(place.path("bundle")).unwrap();

    // As docker 20.10 writes: layers uncompressed, a second one that links to the first.
    let diff = digest_of(&layer);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": null},
        "rootfs": {"type": "layers", "diff_ids": [diff, diff]},
    });
    let config = config.to_string();
    let config_name = format!("{}.json", &digest_of(config.as_bytes())[7..]);
    let manifest = json!([{"Config": config_name, "RepoTags": ["b:latest"], "Layers": ["a/layer.tar", "b/layer.tar"]}]);
    let mut archive = tar::Builder::new(fs::File::create(place.path("image")).unwrap());
    for (name, content) in [
        ("manifest.json", manifest.to_string().as_bytes()),
        (&config_name, config.as_bytes()),
        ("a/layer.tar", &layer),
    ] {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, content).unwrap();
    }
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    archive
        .append_link(&mut header, "b/layer.tar", "../a/layer.tar")
        .unwrap();
    archive.into_inner().unwrap();
    assert_eq!(
        place.unpack().unwrap(),
        Unpacked {
            layers: 2,
            has_command: false,
            skipped_xattrs: 0
        }
    );
    assert_eq!(place.read("f"), "content");
}

#[test]
fn whiteouts_hide_what_lies_below_and_nothing_of_their_own_layer() {
    let Some(place) = Place::new() else { return };
    place.unpack_layers(vec![
        Layer::new()
            .file("gone", "1")
            .file("tree/a/old", "1")
            .file("tree/keep", "1")
            .file("opaque/old", "1")
            .file("opaque/sub/old", "1")
            .file("both", "1"),
        Layer::new()
            .file(".wh.gone", "")
            .file("tree/.wh.a", "")
            .file("opaque/new", "2")
            .file("opaque/sub/new", "2")
            .file("opaque/.wh..wh..opq", "")
            .file("both", "2")
            .file(".wh.both", "")
            .file("nowhere/.wh.x", "")
            .file(".wh..wh.plnk", ""),
    ]);
    for gone in [
        "gone",
        "tree/a",
        "opaque/old",
        "opaque/sub/old",
        "nowhere",
        ".wh..wh.plnk",
        ".wh.gone",
    ] {
        assert!(!place.exists(gone), "{gone}");
    }
    for kept in ["tree/keep", "opaque/new", "opaque/sub/new", "both"] {
        assert!(place.exists(kept), "{kept}");
    }
}

#[test]
fn later_entries_replace_earlier_ones_of_any_kind() {
    let Some(place) = Place::new() else { return };
    place.unpack_layers(vec![
        Layer::new()
            .file("a", "1")
            .file("a", "2")
            .dir("b")
            .file("b/c", "1")
            .symlink("d", "a")
            .file("e", "1"),
        Layer::new()
            .file("b", "now a file")
            .file("d", "no link")
            .dir("e")
            .file("e/f", "1"),
    ]);
    assert_eq!(place.read("a"), "2");
    assert_eq!(place.read("b"), "now a file");
    assert_eq!(place.read("d"), "no link");
    assert_eq!(place.read("e/f"), "1");
}

#[test]
fn links_in_parent_directories_are_followed_inside() {
    let Some(place) = Place::new() else { return };
    place.unpack_layers(vec![
        Layer::new()
            .dir("usr")
            .dir("usr/lib")
            .symlink("lib", "usr/lib")
            .symlink("abs", "/usr/lib")
            .dir("etc"),
        Layer::new().file("lib/one", "1").file("abs/two", "2"),
    ]);
    assert_eq!(place.read("usr/lib/one"), "1");
    assert_eq!(place.read("usr/lib/two"), "2");
}

#[test]
fn writing_through_links_stays_inside() {
    let Some(place) = Place::new() else { return };
    let outside = place.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "untouched").unwrap();
    let up = "../".repeat(12);
    let outside_name = outside.to_str().unwrap();
    // The links lead to the same path below the root file system, where there may be no such directory.
    let layers = [
        Layer::new()
            .symlink("l", outside_name)
            .file("l/victim", "hit"),
        Layer::new()
            .symlink("l", &format!("{up}{outside_name}"))
            .file("l/victim", "hit"),
        Layer::new()
            .symlink("l", &format!("{outside_name}/victim"))
            .file("l", "replaces the link"),
        Layer::new()
            .symlink("l", outside_name)
            .file("l/.wh.victim", ""),
        Layer::new()
            .symlink("l", outside_name)
            .file("l/.wh..wh..opq", ""),
        Layer::new()
            .symlink("l", "/proc/self/cwd")
            .file("l/victim", "hit"),
        Layer::new()
            .symlink("l", &format!("{outside_name}/victim"))
            .hard_link("h", "l")
            .file("h", "hit"),
        Layer::new()
            .symlink("l", outside_name)
            .hard_link("h", "l/victim"),
    ];
    for (index, layer) in layers.into_iter().enumerate() {
        layout(&place.path("image"), &[layer.tar()], gzip);
        let _ = place.unpack();
        assert_eq!(
            fs::read_to_string(outside.join("victim")).unwrap(),
            "untouched",
            "layer {index}"
        );
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "layer {index}");
        assert_eq!(
            fs::metadata(outside.join("victim")).unwrap().nlink(),
            1,
            "layer {index}"
        );
        let _ = fs::remove_dir_all(place.path("bundle"));
        fs::remove_dir_all(place.path("image")).unwrap();
    }
}

#[test]
fn hostile_entries_are_refused_and_leave_nothing() {
    let Some(place) = Place::new() else { return };
    let cases = [
        (Layer::new().file("../escape", "x"), "'..'"),
        (Layer::new().file("a/../../escape", "x"), "'..'"),
        (Layer::new().file("/../escape", "x"), "'..'"),
        (Layer::new().hard_link("h", "../../etc/passwd"), "'..'"),
        (Layer::new().hard_link("h", "etc/passwd"), "link's target"),
        (Layer::new().file("f", "").hard_link("f", "f"), "itself"),
        (Layer::new().dir("d").hard_link("h", "d"), "directory"),
        (Layer::new().file(".wh...", ""), "hides no name"),
        (Layer::new().file(".wh..", ""), "hides no name"),
        (Layer::new().file(".wh.", ""), "hides no name"),
        (Layer::new().file("./", "x"), "names the root"),
        (
            Layer::new().symlink("l", "").file("x", ""),
            "without a target",
        ),
        (
            Layer::new().file("f", "x").file("f/below", "x"),
            "parent directory",
        ),
        (
            Layer::new().symlink("l", "l").file("l/x", "x"),
            "parent directory",
        ),
        (
            Layer::new().raw(EntryType::new(b'V'), "v", "", 0o644, b""),
            "type",
        ),
    ];
    for (layer, reason) in cases {
        let text = place.refuse(layer.tar()).to_string();
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn an_owner_that_means_unchanged_is_refused() {
    let Some(place) = Place::new() else { return };
    for (key, value) in [("uid", &b"4294967295"[..]), ("gid", b"4294967296")] {
        let error = place.refuse(Layer::new().pax(&[(key, value)]).file("f", "x").tar());
        assert!(error.to_string().contains("that cannot be"), "{error}");
    }
}

#[test]
fn long_names_of_both_kinds_and_their_bounds() {
    let Some(place) = Place::new() else { return };
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let mut gnu = Layer::new();
    let mut header = Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    gnu.0
        .append_data(&mut header, format!("gnu/{long}"), &b"g"[..])
        .unwrap();
    let gnu = gnu
        .pax(&[("path", format!("pax/{long}").as_bytes())])
        .file("short", "p");
    place.unpack_layers(vec![gnu]);
    assert_eq!(place.read(&format!("gnu/{long}")), "g");
    assert_eq!(place.read(&format!("pax/{long}")), "p");
    fs::remove_dir_all(place.path("bundle")).unwrap();

    // Two MiB of name, and of attributes, are more than is kept in memory.
    let name = vec![b'n'; 2 << 20];
    for kind in [
        EntryType::GNULongName,
        EntryType::GNULongLink,
        EntryType::XHeader,
    ] {
        let error = place.refuse(
            Layer::new()
                .raw(kind, "x", "", 0o644, &name)
                .file("f", "x")
                .tar(),
        );
        assert!(matches!(error, Error::Layer { .. }), "{error}");
    }
}

#[test]
fn attributes_are_kept_where_they_mean_the_same_everywhere() {
    let Some(place) = Place::new() else { return };
    // A version 2 capability: CAP_NET_RAW, permitted and effective.
    let capability: &[u8] = &[
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let records: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.security.selinux", b"label"),
        ("mtime", b"12345.678"),
    ];
    layout(
        &place.path("image"),
        &[Layer::new().pax(records).file("ping", "x").tar()],
        gzip,
    );
    assert_eq!(place.unpack().unwrap().skipped_xattrs, 3);
    let file = place.rootfs("ping");
    assert_eq!(fs::metadata(&file).unwrap().mtime(), 12345);
    let path = std::ffi::CString::new(file.to_str().unwrap()).unwrap();
    let mut value = [0u8; 64];
    // SAFETY: the names end with a zero, and the length is that of the buffer.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    assert_eq!(&value[..len as usize], capability);
}

#[test]
fn sizes_are_bounded_also_for_what_is_not_there() {
    let Some(place) = Place::new() else { return };
    layout(
        &place.path("image"),
        &[Layer::new().file("f", &"x".repeat(2 << 20)).tar()],
        gzip,
    );
    assert!(matches!(
        place.unpack_up_to(1 << 20),
        Err(Error::TooLarge { .. })
    ));
    assert!(!place.path("bundle").exists());

    // A sparse file of 4 GiB minus one block that holds nothing.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_path("sparse").unwrap();
    header.set_size(0);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].offset.copy_from_slice(b"37777777000\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
    gnu.realsize.copy_from_slice(b"37777777000\0");
    header.set_cksum();
    let mut layer = Layer::new();
    layer.0.append(&header, std::io::empty()).unwrap();
    let error = place.refuse(layer.tar());
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

#[test]
fn damage_is_found_by_the_digests_and_by_truncation() {
    let Some(place) = Place::new() else { return };
    let layer = Layer::new().file("f", "content").tar();
    layout(
        &place.path("image"),
        std::slice::from_ref(&layer),
        <[u8]>::to_vec,
    );
    let blob = place
        .path("image/blobs/sha256")
        .join(&digest_of(&layer)[7..]);

    let mut changed = layer.clone();
    changed[512] ^= 1;
    fs::write(&blob, &changed).unwrap();
    assert!(matches!(place.unpack(), Err(Error::Digest { .. })));
    for len in [0, 100, 512, 600, layer.len() - 1] {
        fs::write(&blob, &layer[..len]).unwrap();
        place.unpack().unwrap_err();
        assert!(!place.path("bundle").exists());
    }
    fs::remove_file(&blob).unwrap();
    assert!(matches!(place.unpack(), Err(Error::Missing { .. })));
}

#[test]
fn a_blob_that_is_a_link_out_of_the_layout_is_not_followed() {
    let Some(place) = Place::new() else { return };
    let layer = Layer::new().file("f", "content").tar();
    layout(
        &place.path("image"),
        std::slice::from_ref(&layer),
        <[u8]>::to_vec,
    );
    let blob = place
        .path("image/blobs/sha256")
        .join(&digest_of(&layer)[7..]);
    fs::rename(&blob, place.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(place.path("elsewhere"), &blob).unwrap();
    assert!(matches!(place.unpack(), Err(Error::Io { .. })));
}

#[test]
fn the_user_is_found_in_the_image_and_not_on_the_host() {
    let Some(place) = Place::new() else { return };
    let layer = Layer::new()
        .file("real", "app:x:55:66::/home/app:/bin/sh\n")
        .symlink("etc/passwd", "/real");
    layout_of(
        &place.path("image"),
        &[layer.tar()],
        gzip,
        json!({"Cmd": ["x"], "User": "app", "WorkingDir": "/w/d"}),
    );
    place.unpack().unwrap();
    let mut text = String::new();
    fs::File::open(place.path("bundle/config.json"))
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["process"]["user"]["uid"], 55);
    assert_eq!(config["process"]["user"]["gid"], 66);
    assert_eq!(config["root"]["path"], "rootfs");
    assert!(place.rootfs("w/d").is_dir());
    fs::remove_dir_all(place.path("bundle")).unwrap();
    fs::remove_dir_all(place.path("image")).unwrap();

    // The host's root is no help: the image has no such user.
    let outside = Layer::new().symlink("etc/passwd", "../../../../../../etc/passwd");
    layout_of(
        &place.path("image"),
        &[outside.tar()],
        gzip,
        json!({"Cmd": ["x"], "User": "daemon"}),
    );
    assert!(matches!(
        place.unpack(),
        Err(Error::NoSuchUser { .. } | Error::Io { .. })
    ));
}

#[test]
fn an_existing_target_is_left_alone() {
    let Some(place) = Place::new() else { return };
    layout(
        &place.path("image"),
        &[Layer::new().file("f", "x").tar()],
        gzip,
    );
    fs::create_dir(place.path("bundle")).unwrap();
    assert!(matches!(place.unpack(), Err(Error::Exists { .. })));
    assert_eq!(fs::read_dir(place.path("bundle")).unwrap().count(), 0);
}

#[test]
fn several_images_need_a_choice() {
    let Some(place) = Place::new() else { return };
    let image = place.path("image");
    layout(&image, &[Layer::new().file("f", "x").tar()], gzip);
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(image.join("index.json")).unwrap()).unwrap();
    let only = &index["manifests"][0];
    let named = |tag: &str, digest: &serde_json::Value| {
        let mut manifest = only.clone();
        manifest["digest"] = digest.clone();
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        manifest
    };
    let other = json!(digest_of(b"other"));
    let manifests = json!({"manifests": [named("one", &only["digest"]), named("two", &other)]});
    fs::write(image.join("index.json"), manifests.to_string()).unwrap();

    let error = place.unpack().unwrap_err().to_string();
    assert!(
        error.contains("--tag") && error.contains("one; two"),
        "{error}"
    );
    let target = place.path("bundle");
    let unpack = |tag| {
        Unpack {
            image: &image,
            target: &target,
            tag: Some(tag),
            platform: None,
            max_bytes: 1 << 20,
        }
        .run(Spec::default())
    };
    assert!(matches!(unpack("three"), Err(Error::Choice { .. })));
    assert!(matches!(unpack("two"), Err(Error::Missing { .. })));
    unpack("one").unwrap();
}
