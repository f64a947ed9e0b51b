#!/usr/bin/python3
"""Executes many processes in a container at once by containerd's own interface, and counts how their ends are told.

    exec_storm.py SOCKET NAMESPACE CONTAINER COUNT AT_ONCE > result.json

As a client of containerd's does it, each process is made known, waited for, started, and removed when it has ended; its exit
code is a number that nobody could guess. Each end must come once as the answer to the wait, with the right code, and once as
an event. Needs the packages python3-grpcio and python3-protobuf.
"""

import collections
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf import any_pb2

from protobuf_messages import message_classes

LIMIT_SECONDS = 60

MESSAGES = """
Spec: type_url string 1, value bytes 2
ExecRequest: container_id string 1, spec Spec 6, exec_id string 7
Process: container_id string 1, exec_id string 2
Started: pid uint32 1
Ended: exit_status uint32 1
Removed: pid uint32 2, exit_status uint32 3
Empty:
Filters: *filters string 1
Envelope: topic string 3, event Spec 4
TaskExit: container_id string 1, id string 2, pid uint32 3, exit_status uint32 4
"""

TASKS = "/containerd.services.tasks.v1.Tasks"
EVENTS = "/containerd.services.events.v1.Events"

PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"


def code_of(number):
    """The exit code of a process: no two neighbours have the same, and none is that of a failure."""
    return 3 + number * 7 % 101


def process_of(number):
    """What is executed, as a runtime's configuration has it."""
    process = {
        "args": ["/bin/sh", "-c", f"exit {code_of(number)}"],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
    }
    return json.dumps(process).encode()


class Containerd:
    """The daemon, asked for the processes of one container."""

    def __init__(self, socket, namespace, container):
        self.channel = grpc.insecure_channel(f"unix://{socket}")
        self.classes = message_classes(MESSAGES)
        self.metadata = [("containerd-namespace", namespace)]
        self.container = container
        self.methods = {
            name: self.method(f"{TASKS}/{name}", request, response)
            for name, request, response in [
                ("Exec", "ExecRequest", "Empty"),
                ("Start", "Process", "Started"),
                ("Wait", "Process", "Ended"),
                ("DeleteProcess", "Process", "Removed"),
            ]
        }

    def method(self, path, request, response):
        make = self.channel.unary_unary
        if response == "Envelope":
            make = self.channel.unary_stream
        return make(
            path,
            request_serializer=self.classes[request].SerializeToString,
            response_deserializer=self.classes[response].FromString,
        )

    def execute(self, number):
        """One process's life; returns the three exit codes that were told, which must be one."""
        name = f"e{number}"
        spec = self.classes["Spec"](type_url=PROCESS_TYPE, value=process_of(number))
        request = self.classes["ExecRequest"](container_id=self.container, spec=spec, exec_id=name)
        process = self.classes["Process"](container_id=self.container, exec_id=name)
        asked = {"metadata": self.metadata, "timeout": LIMIT_SECONDS}
        self.methods["Exec"](request, **asked)
        wait = self.methods["Wait"].future(process, **asked)
        self.methods["Start"](process, **asked)
        waited = wait.result().exit_status
        removed = self.methods["DeleteProcess"](process, **asked).exit_status
        return waited, removed

    def listen(self, ended):
        """Counts the events of ends, by process and code, until the channel is closed."""
        subscribe = self.method(f"{EVENTS}/Subscribe", "Filters", "Envelope")
        filters = self.classes["Filters"](filters=['topic=="/tasks/exit"'])
        try:
            for envelope in subscribe(filters, metadata=self.metadata):
                exit_event = self.classes["TaskExit"].FromString(envelope.event.value)
                if exit_event.container_id == self.container:
                    ended[exit_event.id, exit_event.exit_status] += 1
        except grpc.RpcError:
            pass


def main():
    socket, namespace, container, count, at_once = sys.argv[1:]
    count = int(count)
    containerd = Containerd(socket, namespace, container)
    ended = collections.Counter()
    threading.Thread(target=containerd.listen, args=[ended], daemon=True).start()
    # It does not say when it begins to listen.
    number = count
    while not ended:
        containerd.execute(number)
        number += 1
        time.sleep(0.05)
    expected = {(f"e{number}", code_of(number)) for number in range(count)}
    failures = []

    def execute(number):
        try:
            told = containerd.execute(number)
            if told != (code_of(number), code_of(number)):
                failures.append(f"e{number}: {told}, not {code_of(number)}")
        except grpc.RpcError as error:
            failures.append(f"e{number}: {error.code().name}: {error.details()}")

    begun = time.monotonic()
    with ThreadPoolExecutor(int(at_once)) as pool:
        list(pool.map(execute, range(count)))
    seconds = time.monotonic() - begun
    deadline = time.monotonic() + LIMIT_SECONDS
    while sum(ended[key] for key in expected) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    ours = {key: times for key, times in ended.items() if int(key[0][1:]) < count}
    failures += [f"{key}: told {ours.get(key, 0)} times" for key in sorted(expected) if ours.get(key, 0) != 1]
    failures += [f"{key}: told" for key in sorted(ours.keys() - expected)]
    print(json.dumps({"seconds": seconds, "failures": failures[:20], "failed": len(failures)}))


main()
