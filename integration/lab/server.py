"""The lab's init and command server.

Process 1 reaps orphans and powers off when its one child, the server, ends. The server takes connections
from the host (which QEMU forwards from a loopback port), checks the token, runs one command for each and
relays its streams. Whoever holds the token is root in the lab and can write to the checkout.
"""

import contextlib
import fcntl
import json
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import threading

PORT = 1024
HEARTBEAT = 5.0
# virtiofsd holds one descriptor for each inode that this kernel remembers.
CACHED_INODES = 8000
# <linux/kvm.h>
KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU = 0xAE01, 0xAE60, 0xAE41


def send(connection, lock, kind, payload=b""):
    with lock:
        connection.sendall(kind + struct.pack(">I", len(payload)) + payload)


def receive(stream):
    header = stream.read(5)
    if len(header) < 5:
        return None, b""
    (length,) = struct.unpack(">I", header[1:])
    payload = stream.read(length)
    return (header[:1], payload) if len(payload) == length else (None, b"")


def signal_group(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def relay_in(stream, process):
    """Client to command: stdin and signals; a `p` only wakes us. A client that goes away takes its command along."""
    try:
        while True:
            kind, payload = receive(stream)
            if kind is None:
                signal_group(process, 9)
                return
            if kind == b"k":
                signal_group(process, payload[0])
            elif kind == b"i" and not process.stdin.closed:
                try:
                    if payload:
                        process.stdin.write(payload)
                    else:
                        process.stdin.close()
                except BrokenPipeError:
                    process.stdin.close()
    except OSError:
        signal_group(process, 9)


def relay_out(connection, lock, process):
    """Command to client, until the command ends; what it wrote before its end is sent whole."""
    streams = {process.stdout.fileno(): b"o", process.stderr.fileno(): b"e"}
    pidfd = os.pidfd_open(process.pid)
    poll = select.poll()
    for descriptor in (*streams, pidfd):
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    ended = False
    while not ended:
        ready = poll.poll(HEARTBEAT * 1000)
        if not ready:
            send(connection, lock, b"h")
        ended = any(descriptor == pidfd for descriptor, _ in ready)
        for descriptor in list(streams):
            while ended or any(descriptor == other for other, _ in ready):
                try:
                    payload = os.read(descriptor, 65536)
                except BlockingIOError:
                    break
                if not payload:
                    poll.unregister(descriptor)
                    del streams[descriptor]
                    break
                send(connection, lock, streams[descriptor], payload)
                if not ended:
                    break
    os.close(pidfd)


def forget_inodes():
    with open("/proc/slabinfo", encoding="ascii") as slabs:
        for line in slabs:
            if line.startswith("fuse_inode") and int(line.split()[1]) > CACHED_INODES:
                with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as caches:
                    caches.write("2")


def serve(connection, token):
    lock = threading.Lock()
    stream = connection.makefile("rb")
    kind, payload = receive(stream)
    if kind != b"q":
        return
    request = json.loads(payload)
    if request.get("token") != token:
        return
    forget_inodes()
    try:
        process = subprocess.Popen(
            request["argv"],
            bufsize=0,
            cwd=request["cwd"],
            env=request["env"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        send(connection, lock, b"f", str(error).encode())
        return
    threading.Thread(target=relay_in, args=(stream, process), daemon=True).start()
    try:
        relay_out(connection, lock, process)
        code = process.wait()
        send(connection, lock, b"x", struct.pack(">i", code))
    except OSError:
        signal_group(process, 9)
        process.wait()
    finally:
        process.stdout.close()
        process.stderr.close()


def answer(connection, token):
    try:
        with connection:
            serve(connection, token)
    except (OSError, ValueError, KeyError) as error:
        print("lab: bad connection:", error, file=sys.stderr)


def hold_idle_vcpu():
    """A vCPU that never runs, for as long as the server lives.

    KVM patches its own code (the static key `apic_sw_disabled`) when the first vCPU appears whose local APIC
    is off, and when the last one is gone: a test that starts a virtual machine makes it do so twice. QEMU
    before 8.1 may run on with a stale translation of code that changed while it was translated; a processor
    then loops in KVM for good. With one such vCPU always there nothing is patched.
    """
    with contextlib.suppress(FileNotFoundError), open("/dev/kvm", "rb", buffering=0) as kvm:
        machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        fcntl.ioctl(machine, KVM_CREATE_IRQCHIP)
        fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)


def listen(token):
    hold_idle_vcpu()
    listener = socket.create_server(("0.0.0.0", PORT), backlog=64)
    with open("/dev/console", "w", encoding="ascii") as console:
        console.write("lab: ready\n")
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, token), daemon=True).start()


def main():
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1048576))
    server = os.fork()
    if server == 0:
        listen(sys.argv[1])
    while os.wait()[0] != server:
        pass
    # QEMU was told to end instead of starting anew.
    os.execv("/bin/busybox", ["busybox", "reboot", "-f"])


if __name__ == "__main__":
    main()
