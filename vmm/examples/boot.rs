//! Boots a kernel with an initramfs and prints what it did: the first tool to see a kernel come up.
//!
//! `boot [OPTIONS] KERNEL [INITRAMFS...] [-- WORDS]` with the options `--pvh`, `--linux64`,
//! `--verbose` (console), `--vcpus N`, `--memory MIB`, `--vsock`, `--share DIR` (tag `share`),
//! `--seccomp-log` and `--seccomp-off`. WORDS are added to the kernel's command line.

use std::error::Error;
use std::io;
use std::time::Instant;

use vmm::boot::{BootProtocol, Segment};
use vmm::devices::virtio::fs::{Access, Cache, Share, Tag};
use vmm::devices::virtio::vsock::GuestCid;
use vmm::memory::MemorySize;
use vmm::seccomp::Policy;
use vmm::{KernelConfig, Origin, SharedDirectory, Vm, VmConfig, VsockConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut config = VmConfig {
        vcpus: 1,
        memory: MemorySize::from_mib(128)?,
        origin: Origin::Kernel(KernelConfig::default()),
        console: Box::new(io::stdout()),
        rng: true,
        balloon: true,
        hotplug: true,
        vsock: None,
        shares: Vec::new(),
        interfaces: Vec::new(),
        disks: Vec::new(),
        leave_host: Box::new(|| Ok(())),
        seccomp: Policy::Enforce,
        intruder: None,
    };
    let mut kernel = KernelConfig::default();
    let mut files = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().unwrap_or_default().parse::<u64>();
        match argument.as_str() {
            "--linux64" => kernel.protocol = Some(BootProtocol::Linux64),
            "--pvh" => kernel.protocol = Some(BootProtocol::Pvh),
            "--verbose" => kernel.verbose_console = true,
            "--vcpus" => config.vcpus = number()?.try_into()?,
            "--memory" => config.memory = MemorySize::from_mib(number()?)?,
            "--vsock" => {
                let cid = GuestCid::DEFAULT;
                config.vsock = Some(VsockConfig { cid, socket: None });
            }
            "--share" => {
                let root = arguments.next().ok_or("--share wants a directory")?.into();
                let share = Share {
                    root,
                    cache: Cache::Always,
                    access: Access::ReadWrite,
                };
                let tag = Tag::new("share").ok_or("a tag")?;
                config.shares.push(SharedDirectory { tag, share });
            }
            "--seccomp-log" => config.seccomp = Policy::Log,
            "--seccomp-off" => config.seccomp = Policy::Off,
            "--" => kernel.parameters = arguments.by_ref().collect::<Vec<_>>().join(" "),
            _ => files.push(argument),
        }
    }
    let mut files = files.into_iter();
    kernel.path = files.next().ok_or("no kernel given")?.into();
    kernel.initramfs = files.map(|path| Segment::File(path.into())).collect();
    println!("command line: {}", kernel.command_line());
    config.origin = Origin::Kernel(kernel);

    let mut vm = Vm::new(config)?.start()?;
    let exit = vm.wait()?;
    let ended = Instant::now();
    let timeline = vm.timeline();
    println!("\nended: {exit}");
    if let Some(message) = vm.console().panic_message() {
        println!("panic: {message}");
    }
    println!("load: {:?}", timeline.loaded - timeline.begun);
    if let Some(entered) = timeline.entered {
        println!("run: {:?}", ended - entered);
    }
    println!(
        "exits: {:?}, to user space: {}",
        vm.exits(),
        vm.user_exits()
    );
    Ok(())
}
