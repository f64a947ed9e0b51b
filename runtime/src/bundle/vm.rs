//! The `vm` section of config.json (OCI runtime specification, "Virtual-machine-specific Configuration").
//!
//! Read here and not by oci-spec, which lacks 1.3's `hwConfig` and requires a kernel, though a bundle may leave the
//! kernel to the runtime. Paths in it come from the bundle's maker; who uses one decides whether it is trusted.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `vm`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VmSection {
    /// The hypervisor that the bundle asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<VmHypervisor>,
    /// The guest kernel; none: the configured guest's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<VmKernel>,
    /// The guest's root image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<VmImage>,
    /// The virtual hardware (since 1.3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hw_config: Option<HwConfig>,
}

/// `vm.hypervisor`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmHypervisor {
    /// Path of the hypervisor's binary on the host.
    pub path: PathBuf,
    /// Its parameters.
    #[serde(default)]
    pub parameters: Vec<String>,
}

/// `vm.kernel`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmKernel {
    /// Path of the kernel on the host.
    pub path: PathBuf,
    /// Words for the kernel's command line.
    #[serde(default)]
    pub parameters: Vec<String>,
    /// Path of an initial RAM disk on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
}

/// `vm.image`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmImage {
    /// Path of the image on the host.
    pub path: PathBuf,
    /// Its format: `raw`, `qcow2`, `vdi`, `vmdk` or `vhd`.
    pub format: String,
}

/// `vm.hwConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HwConfig {
    /// Path of a device tree, which x86 guests do not have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<PathBuf>,
    /// Number of virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
}
