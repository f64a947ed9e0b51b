#!/usr/bin/python3
"""Calls one method of the Kubernetes Container Runtime Interface (runtime.v1), for tests.

    cri_client.py SOCKET METHOD < request.json > response.json

The methods that answer with the address of a stream (Exec, Attach, PortForward) are followed there: `input` of the request,
beside the method's own fields, is sent, and the response is what came until the other side or `until` ended it.

Requests and responses are in protobuf's JSON. The messages below are the part of the interface that the tests use. Output of
processes, which the interface has as bytes, is text here: the same on the wire.
Needs the packages python3-grpcio and python3-protobuf.
"""

import base64
import json
import os
import socket
import struct
import sys
import urllib.parse

import grpc
from google.protobuf import json_format

from protobuf_messages import message_classes

LIMIT_SECONDS = 120

MESSAGES = """
Metadata: name string 1, uid string 2, namespace string 3, attempt uint32 4
ContainerMetadata: name string 1, attempt uint32 2
Namespaces: network int32 1, pid int32 2, ipc int32 3
SandboxSecurity: namespace_options Namespaces 1
LinuxSandbox: cgroup_parent string 1, security_context SandboxSecurity 2
Port: protocol int32 1, container_port int32 2, host_port int32 3
Dns: *servers string 1, *searches string 2
Sandbox: metadata Metadata 1, hostname string 2, log_directory string 3, dns_config Dns 4, *port_mappings Port 5,
    linux LinuxSandbox 8
Resources: cpu_shares int64 3, memory_limit_in_bytes int64 4
Id: value int64 1
Security: namespace_options Namespaces 3, run_as_user Id 5
Linux: resources Resources 1, security_context Security 2
Image: image string 1
Mount: container_path string 1, host_path string 2, readonly bool 3
Container: metadata ContainerMetadata 1, image Image 2, *command string 3, *mounts Mount 7, log_path string 11,
    stdin bool 12, stdin_once bool 13, linux Linux 15
Count: value uint64 1
Memory: usage_bytes Count 4
Stats: memory Memory 3
Status: id string 1, state int32 3, exit_code int32 7, reason string 10
Network: ip string 1
SandboxStatus: id string 1, state int32 3, network Network 5
Empty:
ContainerId: container_id string 1
SandboxId: pod_sandbox_id string 1
RunPodSandboxRequest: config Sandbox 1, runtime_handler string 2
CreateContainerRequest: pod_sandbox_id string 1, config Container 2, sandbox_config Sandbox 3
PodSandboxStatusResponse: status SandboxStatus 1
StopContainerRequest: container_id string 1, timeout int64 2
ExecSyncRequest: container_id string 1, *cmd string 2, timeout int64 3
ExecSyncResponse: stdout string 1, stderr string 2, exit_code int32 3
ContainerStatusResponse: status Status 1
ContainerStatsResponse: stats Stats 1
UpdateContainerResourcesRequest: container_id string 1, linux Resources 2
ExecRequest: container_id string 1, *cmd string 2, tty bool 3, stdin bool 4, stdout bool 5, stderr bool 6
AttachRequest: container_id string 1, stdin bool 2, tty bool 3, stdout bool 4, stderr bool 5
PortForwardRequest: pod_sandbox_id string 1, *port int32 2
Url: url string 1
ListedPod: id string 1
ListPodSandboxResponse: *items ListedPod 1
ListedContainer: id string 1
ListContainersResponse: *containers ListedContainer 1
"""

METHODS = {
    "RunPodSandbox": ("RunPodSandboxRequest", "SandboxId"),
    "ListPodSandbox": ("Empty", "ListPodSandboxResponse"),
    "PodSandboxStatus": ("SandboxId", "PodSandboxStatusResponse"),
    "StopPodSandbox": ("SandboxId", "Empty"),
    "RemovePodSandbox": ("SandboxId", "Empty"),
    "CreateContainer": ("CreateContainerRequest", "ContainerId"),
    "StartContainer": ("ContainerId", "Empty"),
    "StopContainer": ("StopContainerRequest", "Empty"),
    "RemoveContainer": ("ContainerId", "Empty"),
    "ListContainers": ("Empty", "ListContainersResponse"),
    "ContainerStatus": ("ContainerId", "ContainerStatusResponse"),
    "ContainerStats": ("ContainerId", "ContainerStatsResponse"),
    "ExecSync": ("ExecSyncRequest", "ExecSyncResponse"),
    "UpdateContainerResources": ("UpdateContainerResourcesRequest", "Empty"),
    "Exec": ("ExecRequest", "Url"),
    "Attach": ("AttachRequest", "Url"),
    "PortForward": ("PortForwardRequest", "Url"),
}

# Of a stream, as Kubernetes numbers them (v4.channel.k8s.io); of a port's 0 is the data in both directions.
CHANNELS = ["stdin", "stdout", "stderr", "error"]
SIZE_CHANNEL = 4


class WebSocket:
    """As much of RFC 6455 as a stream of containerd's takes."""

    def __init__(self, url):
        url = urllib.parse.urlsplit(url)
        self.socket = socket.create_connection((url.hostname, url.port), LIMIT_SECONDS)
        self.reader = self.socket.makefile("rb")
        target = url.path + (f"?{url.query}" if url.query else "")
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {url.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n".encode()
        )
        status = self.reader.readline().decode()
        if " 101 " not in status:
            sys.exit(f"{url.geturl()}: {status}{self.reader.read().decode()}")
        while self.reader.readline().strip():
            pass

    def send(self, data):
        length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        # A mask of zeros changes nothing, which is allowed and enough for a server that trusts us.
        self.socket.sendall(b"\x82" + length + bytes(4) + data)

    def messages(self):
        """What comes, until the other side closes."""
        while len(head := self.reader.read(2)) == 2:
            length = head[1] & 0x7F
            if length >= 126:
                form = ">H" if length == 126 else ">Q"
                (length,) = struct.unpack(form, self.reader.read(struct.calcsize(form)))
            data = self.reader.read(length)
            if head[0] & 0x0F == 8:
                return
            if head[0] & 0x0F in (1, 2):
                yield data


def follow(url, is_port, input="", size=None, until=None):
    """Sends the input down a stream, and returns what came, by channel."""
    stream = WebSocket(url)
    if size:
        stream.send(bytes([SIZE_CHANNEL]) + json.dumps(size).encode())
    if input:
        stream.send(b"\0" + input.encode())
    came = {name: "" for name in CHANNELS}
    # The first message of each channel of a port is the port's number.
    announced = set() if is_port else {0, 1, 2, 3}
    for message in stream.messages():
        if not message:
            continue
        if message[0] in announced:
            came[CHANNELS[message[0]]] += message[1:].decode()
        announced.add(message[0])
        if until and any(until in text for text in came.values()):
            break
    return came


def main():
    address, method = sys.argv[1:]
    classes = message_classes(MESSAGES)
    request_name, response_name = METHODS[method]
    given = json.load(sys.stdin)
    stream = {name: given.pop(name) for name in ("input", "size", "until") if name in given}
    request = json_format.ParseDict(given, classes[request_name]())
    channel = grpc.insecure_channel(f"unix://{address}")
    call = channel.unary_unary(
        f"/runtime.v1.RuntimeService/{method}",
        request_serializer=classes[request_name].SerializeToString,
        response_deserializer=classes[response_name].FromString,
    )
    try:
        response = call(request, timeout=LIMIT_SECONDS)
    except grpc.RpcError as error:
        sys.exit(f"{method}: {error.code().name}: {error.details()}")
    if response_name == "Url":
        query = f"?port={request.port[0]}" if method == "PortForward" else ""
        print(json.dumps(follow(response.url + query, method == "PortForward", **stream)))
    else:
        print(json_format.MessageToJson(response, preserving_proto_field_name=True))


main()
