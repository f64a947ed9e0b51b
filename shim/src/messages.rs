//! Messages that containerd hands on and that no crate has: the build script makes them of `proto/`.

include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
