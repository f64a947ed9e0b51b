"""What the scripts that set a microVM beside QEMU's have in common: a lab that counts, and what they start in it."""

import argparse
import json
import os
import shutil
import subprocess
import sys

CHECKOUT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
LAB = os.path.join(CHECKOUT, "integration", "lab", "lab")
GUESTS = "/var/lib/rt/guests"


def compare(description, inside, timeout, runs):
    """Runs `inside(options)` in a lab with instructions counted, which is booted for it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--rt", default=os.path.join(CHECKOUT, "target/x86_64-unknown-linux-musl/release"),
                        help="directory with rt and rt-agent")  # fmt: skip
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    environment = {**os.environ, "LAB_NAME": "icount"}
    subprocess.run([LAB, "start", "--icount"], env=environment, check=True)
    try:
        command = [LAB, "exec", "--timeout", str(timeout), os.path.realpath(sys.argv[0]), "--inside"]
        command += ["--runs", str(options.runs), "--rt", os.path.realpath(options.rt)]
        return subprocess.run(command, env=environment, check=False).returncode
    finally:
        subprocess.run([LAB, "stop"], env=environment, check=True)


def exits():
    """The exits of all guests since the lab's boot, as KVM counts them."""
    with open("/sys/kernel/debug/kvm/exits", encoding="ascii") as file:
        return int(file.read())


def from_memory(rt, work):
    """Copies the programs and a guest to `work`: the checkout and the host's files go through the emulated machine
    page by page. The paths of rt, of the guests and of the guest's kernel there."""
    shutil.rmtree(work, ignore_errors=True)
    guests = os.path.join(work, "guests")
    os.makedirs(guests)
    for name in ("rt", "rt-agent"):
        shutil.copy(os.path.join(rt, name), work)
    guest = sorted(os.listdir(GUESTS))[0]
    shutil.copytree(os.path.join(GUESTS, guest), os.path.join(guests, guest))
    return os.path.join(work, "rt"), guests, os.path.join(guests, guest, "vmlinux")


def make_spec(rt, bundle, arguments, change=lambda spec: None):
    """Writes the configuration of a bundle that runs `arguments`, as rt makes it but without a terminal and limits."""
    subprocess.run([rt, "spec", "--bundle", bundle], check=True)
    config = os.path.join(bundle, "config.json")
    with open(config, encoding="utf-8") as file:
        spec = json.load(file)
    spec["process"].update(terminal=False, args=arguments)
    spec["linux"].pop("resources", None)
    change(spec)
    with open(config, "w", encoding="utf-8") as file:
        json.dump(spec, file)


def rt_command(rt, guests, settings, templates, memory):
    """`rt` with settings of its own, for machines of `memory` MiB."""
    with open(settings, "w", encoding="utf-8") as file:
        file.write(f"[microvm]\nguests = \"{guests}\"\ntemplates = \"{templates}\"\nmemory_mib = {memory}\n")
    return [rt, "--config", settings]


def pack_initramfs(tree, init, archive):
    """Packs an initramfs with `/busybox`, a console, the empty directories of `tree` and the script `init`."""
    os.makedirs(os.path.join(tree, "dev"), exist_ok=True)
    shutil.copy("/bin/busybox", os.path.join(tree, "busybox"))
    with open(os.path.join(tree, "init"), "w", encoding="ascii") as file:
        file.write(init)
    os.chmod(os.path.join(tree, "init"), 0o755)
    if not os.path.exists(os.path.join(tree, "dev", "console")):
        os.mknod(os.path.join(tree, "dev", "console"), 0o20600, os.makedev(5, 1))
    names = subprocess.run(["find", "."], cwd=tree, capture_output=True, check=True).stdout
    with open(archive, "wb") as file:
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=tree, input=names, stdout=file, check=True)


def qemu_command(kernel, initramfs, memory, machine="microvm", devices=()):
    """QEMU's microVM with one virtual CPU, whose serial console is the process's input and output."""
    return [
        "qemu-system-x86_64", "-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", str(memory),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", *devices,
        "-kernel", kernel, "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1 rdinit=/init",
    ]  # fmt: skip
