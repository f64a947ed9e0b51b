//! Machines with a "kernel" of a few instructions: they run wherever KVM runs at all, also where
//! it only emulates.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use tempfile::TempDir;
use vm_memory::Bytes;

use super::*;
use crate::memory::MemorySize;
use crate::snapshot::Snapshot;

/// An ELF file whose one segment, at 1 MiB, is `code`.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 120];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    let length = code.len() as u64;
    let fields: [(usize, u64, usize); 11] = [
        (16, 2, 2),
        (18, 62, 2),
        (24, 0x10_0000, 8),
        (32, 64, 8),
        (54, 56, 2),
        (56, 1, 2),
        (64, 1, 4),
        (64 + 8, 120, 8),
        (64 + 24, 0x10_0000, 8),
        (64 + 32, length, 8),
        (64 + 40, length, 8),
    ];
    for (at, value, size) in fields {
        file[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    file.extend(code);
    file
}

/// `mov dx, port; mov al, value; out dx, al`.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `out dx, al` of what is in al, to the serial port.
fn print_al() -> Vec<u8> {
    vec![0x66, 0xba, 0xf8, 0x03, 0xee]
}

fn power_off() -> Vec<u8> {
    out(layout::POWER_PORT, 0x34)
}

/// `jmp` to itself.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `hlt`, and again should it wake up.
const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

fn config(vcpus: u8, kernel: PathBuf) -> VmConfig {
    VmConfig {
        vcpus,
        memory: MemorySize::from_mib(16).unwrap(),
        origin: Origin::Kernel(KernelConfig {
            path: kernel,
            ..KernelConfig::default()
        }),
        console: Box::new(io::sink()),
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
    }
}

/// A machine that is about to run `code`; none where there is no KVM.
fn machine(code: &[u8], vcpus: u8) -> Option<(TempDir, RunningVm)> {
    let directory = TempDir::new().unwrap();
    let kernel = directory.path().join("vmlinux");
    fs::write(&kernel, elf(code)).unwrap();
    match Vm::new(config(vcpus, kernel)) {
        Ok(vm) => Some((directory, vm.start().unwrap())),
        Err(Error::Kvm(error @ (KvmError::NoDevice | KvmError::Denied(_)))) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

fn outcome(code: &[u8]) -> Option<(VmExit, Vec<String>)> {
    let (_directory, mut vm) = machine(code, 1)?;
    let exit = vm.wait().unwrap();
    assert_eq!(vm.exit_event().read().unwrap(), 1);
    Some((exit, vm.console().lines()))
}

#[test]
fn a_guest_prints_and_powers_off() {
    let code = [out(0x3f8, b'h'), out(0x3f8, b'i'), power_off(), SPIN.into()].concat();
    if let Some((exit, console)) = outcome(&code) {
        assert_eq!(exit, VmExit::Shutdown);
        assert_eq!(console, ["hi"]);
    }
}

#[test]
fn resets_and_faults_are_told_apart() {
    for (code, expected) in [
        (out(layout::POWER_PORT + 2, 1), VmExit::Reset),
        (out(layout::I8042_COMMAND_PORT, 0xfe), VmExit::Reset),
        // An invalid instruction without a table of handlers.
        (vec![0x0f, 0x0b], VmExit::TripleFault),
    ] {
        let code = [code, SPIN.into()].concat();
        if let Some((exit, _)) = outcome(&code) {
            assert_eq!(exit, expected);
        }
    }
}

#[test]
fn devices_answer_at_their_registers_and_nothing_elsewhere() {
    // Maps the last 2 MiB of the first GiB to the devices: mov [last PD entry], address | flags.
    let entry = (layout::PAGE_TABLES + 2 * 4096 + 511 * 8) as u32;
    let mut code = vec![0xc7, 0x04, 0x25];
    code.extend(entry.to_le_bytes());
    code.extend((layout::VIRTIO_MMIO_BASE as u32 | 0x83).to_le_bytes());
    // The first device's magic value: mov eax, [first register].
    code.extend([0x8b, 0x04, 0x25]);
    code.extend(0x3fe0_0000u32.to_le_bytes());
    code.extend(print_al());
    // The port 0x80 has no device: in al, 0x80; then 0xff + 'B'.
    code.extend([0xe4, 0x80, 0x04, 0x42]);
    code.extend(print_al());
    code.extend(power_off());
    code.extend(SPIN);
    if let Some((exit, console)) = outcome(&code) {
        assert_eq!(exit, VmExit::Shutdown);
        assert_eq!(console, ["vA"]);
    }
}

#[test]
fn a_machine_that_spins_or_sleeps_is_stopped_at_once() {
    for code in [&SPIN[..], &HALT] {
        let Some((_directory, mut vm)) = machine(code, 3) else {
            return;
        };
        assert_eq!(vm.stop(), VmExit::Stopped);
        assert_eq!(vm.wait().unwrap(), VmExit::Stopped);
        assert!(vm.threads.is_empty());
    }
}

#[test]
fn stopping_races_with_nothing() {
    // Stop at whatever point of its start the machine is. An emulated processor has hung at it.
    let count = if std::env::var_os("RT_LAB").is_some() {
        4
    } else {
        20
    };
    for _ in 0..count {
        let Some((_directory, vm)) = machine(&HALT, 2) else {
            return;
        };
        let (done, wait) = mpsc::channel();
        let stopper = thread::spawn(move || {
            drop(vm);
            done.send(()).unwrap();
        });
        let limit = std::time::Duration::from_secs(20);
        assert!(
            wait.recv_timeout(limit).is_ok(),
            "a vCPU was not kicked out"
        );
        stopper.join().unwrap();
    }
}

#[test]
fn exits_are_counted() {
    let code = [out(0x3f8, b'x'), power_off(), SPIN.into()].concat();
    let Some((_directory, mut vm)) = machine(&code, 1) else {
        return;
    };
    vm.wait().unwrap();
    assert_eq!(vm.user_exits(), 2);
    // The kernel counts at least as many, where it counts.
    assert!(
        vm.exits().is_none_or(|exits| exits >= 2),
        "{:?}",
        vm.exits()
    );
    let timeline = vm.timeline();
    assert!(timeline.entered.unwrap() >= timeline.loaded);
    assert!(timeline.loaded >= timeline.begun);
}

#[test]
fn impossible_machines_are_refused() {
    for (vcpus, kernel) in [(0, "x"), (255, "x"), (1, "/nonexistent/vmlinux")] {
        match Vm::new(config(vcpus, kernel.into())).unwrap_err() {
            Error::VcpuCount { count } => assert_eq!(count, vcpus),
            Error::Boot(error) => assert!(error.to_string().contains(kernel), "{error}"),
            Error::Kvm(error) => println!("skipped: {error}"),
            error => panic!("{error}"),
        }
    }
}

/// Tells when a line of the console is complete.
struct Lines(mpsc::Sender<()>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where [`waiting_code`] looks for what it waits for.
const FLAG: u32 = 0x20_0000;

/// Prints a line, waits until the byte at [`FLAG`] is not zero, then prints what a register held all the while.
fn waiting_code() -> Vec<u8> {
    // mov esi, 'k'
    let mut code = vec![0xbe, b'k', 0, 0, 0];
    code.extend(out(0x3f8, b'w'));
    code.extend(out(0x3f8, b'\n'));
    // cmp byte [FLAG], 0; je to itself
    code.extend([0x80, 0x3c, 0x25]);
    code.extend(FLAG.to_le_bytes());
    code.extend([0, 0x74, 0xf6]);
    // mov eax, esi
    code.extend([0x89, 0xf0]);
    code.extend(print_al());
    code.extend(power_off());
    code.extend(SPIN);
    code
}

/// Writes a machine that runs [`waiting_code`] down in the second directory; none where there is no KVM.
fn snapshot(vcpus: u8) -> Option<(TempDir, TempDir)> {
    let [boot, directory] = [(); 2].map(|()| TempDir::new().unwrap());
    let kernel = boot.path().join("vmlinux");
    fs::write(&kernel, elf(&waiting_code())).unwrap();
    let (line, waits) = mpsc::channel();
    let config = VmConfig {
        console: Box::new(Lines(line)),
        ..config(vcpus, kernel)
    };
    match Vm::new(config) {
        Ok(vm) => {
            let mut vm = vm.start().unwrap();
            waits.recv().unwrap();
            let files = SnapshotFiles::create(directory.path()).unwrap();
            vm.pause().unwrap().write(&files).unwrap();
            Some((boot, directory))
        }
        Err(Error::Kvm(error @ (KvmError::NoDevice | KvmError::Denied(_)))) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

fn restored(vcpus: u8, directory: &Path) -> Result<Vm, Error> {
    Vm::new(VmConfig {
        origin: Origin::Snapshot(Snapshot::open(directory)?),
        ..config(vcpus, PathBuf::new())
    })
}

#[test]
fn machines_go_on_where_another_was_written_down() {
    for vcpus in [1, 2] {
        let Some((_boot, directory)) = snapshot(vcpus) else {
            return;
        };
        let memory = directory.path().join("memory");
        let file = File::options().write(true).open(&memory).unwrap();
        file.write_all_at(&[1], FLAG.into()).unwrap();
        let before = fs::read(&memory).unwrap();
        for _ in 0..2 {
            let mut vm = restored(vcpus, directory.path()).unwrap().start().unwrap();
            assert_eq!(vm.wait().unwrap(), VmExit::Shutdown);
            assert_eq!(vm.console().lines(), ["k"]);
        }
        assert!(
            fs::read(&memory).unwrap() == before,
            "a machine wrote to the file"
        );
    }
}

#[test]
fn pages_of_zeros_take_no_room_in_a_snapshot() {
    let Some((_boot, directory)) = snapshot(1) else {
        return;
    };
    let memory = fs::metadata(directory.path().join("memory")).unwrap();
    assert_eq!(memory.len(), 16 << 20);
    // In units of 512 bytes.
    assert!(memory.blocks() < 1 << 10, "{} blocks", memory.blocks());
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_by_name() {
    let Some((_boot, directory)) = snapshot(1) else {
        return;
    };
    let refused = |vcpus| restored(vcpus, directory.path()).unwrap_err().to_string();
    assert_eq!(
        refused(2),
        "the snapshot is of another machine: 1 vCPUs, not 2"
    );
    let other = VmConfig {
        origin: Origin::Snapshot(Snapshot::open(directory.path()).unwrap()),
        rng: false,
        balloon: false,
        hotplug: false,
        ..config(1, PathBuf::new())
    };
    assert_eq!(
        Vm::new(other).unwrap_err().to_string(),
        "the snapshot is of another machine: its virtio devices differ"
    );

    let path = directory.path().join("machine.json");
    let text = fs::read_to_string(&path).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from));
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        refused(1)
    };
    assert_eq!(
        with("\"frequency\":", "\"frequency\":1"),
        "the snapshot was made on a host with another processor, kernel or KVM: make it anew"
    );
    assert!(
        with("\"format\":2", "\"format\":1")
            .ends_with("machine.json has format 1, and this rt reads 2: make the snapshot anew")
    );
    assert!(
        with("\"clock\"", "\"clack\"")
            .ends_with("machine.json is not the state of a machine: make the snapshot anew")
    );
    fs::write(&path, &text).unwrap();
    let memory = File::options()
        .write(true)
        .open(directory.path().join("memory"))
        .unwrap();
    memory.set_len((16 << 20) - 4096).unwrap();
    assert!(
        refused(1)
            .ends_with("memory has 16773120 bytes in place of 16777216: make the snapshot anew")
    );
}

#[test]
fn only_what_runs_is_written_down() {
    let code = [power_off(), SPIN.into()].concat();
    let Some((_directory, mut vm)) = machine(&code, 1) else {
        return;
    };
    let event = vm.exit_event().try_clone().unwrap();
    while event.read().is_err() {
        thread::yield_now();
    }
    let error = vm.pause().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the machine has ended: the guest powered off"
    );
}

#[test]
fn a_guest_without_a_driver_gets_no_memory() {
    let Some((_directory, mut vm)) = machine(&HALT, 1) else {
        return;
    };
    let before = vm.memory();
    assert_eq!((before.0, before.1.requested), (16 << 20, 0));
    let error = vm.request_memory(32 << 20, Box::new(|| panic!("it has arrived")));
    assert!(matches!(error, Err(Error::NoMemoryDriver)), "{error:?}");
    assert_eq!(vm.memory(), before);
    let (arrived, has_arrived) = mpsc::channel();
    vm.request_memory(16 << 20, Box::new(move || arrived.send(()).unwrap()))
        .unwrap();
    has_arrived.try_recv().unwrap();
}

#[test]
fn a_machine_goes_on_after_a_pause() {
    // Counts in the byte at FLAG: inc byte [FLAG]; jmp to it.
    let mut code = vec![0xfe, 0x04, 0x25];
    code.extend(FLAG.to_le_bytes());
    code.extend([0xeb, 0xf7]);
    let Some((_directory, mut vm)) = machine(&code, 2) else {
        return;
    };
    let memory = Arc::clone(vm.parts.memory.ram());
    let count = || {
        let count: u8 = memory
            .read_obj(vm_memory::GuestAddress(FLAG.into()))
            .unwrap();
        count
    };
    for _ in 0..3 {
        let paused = vm.pause().unwrap();
        let still = count();
        thread::sleep(Duration::from_millis(10));
        assert_eq!(count(), still);
        paused.resume();
        let limit = Instant::now() + Duration::from_secs(20);
        while count() == still {
            assert!(Instant::now() < limit, "it stands still");
        }
    }
    assert_eq!(vm.stop(), VmExit::Stopped);
}
