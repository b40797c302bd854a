"""Several hosts on this machine: network namespaces, joined by a switch that cuts, delays and loses what crosses it.

The switch is a thread of this process between TAP devices, since many kernels lack what `tc netem` needs. Host 0 is
this machine itself, where the servers run.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import socket
import socketserver
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.integration.servers import BIN, RayCluster, cluster_env, running, stop, wait_for

_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
_PREFIX = "10.213.77"


def lacking() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` (Debian: iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    name = f"hatchery-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


class Network:
    """The hosts and the switch between them.

    cut: hosts that nothing reaches. delay_s and loss: one way and as a share, of all between hosts other than 0.
    """

    def __init__(self, hosts: int) -> None:
        self.cut: set[int] = set()
        self.delay_s = 0.0
        self.loss = 0.0
        self.names = [""] + [f"hatchery-{os.getpid()}-{number}" for number in range(1, hosts)]
        self.ports: list[int] = []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._switch, daemon=True)

    def address(self, host: int) -> str:
        return f"{_PREFIX}.{host + 1}"

    def inside(self, host: int) -> list[str]:
        """What a command begins with that is to run on a host."""
        return ["ip", "netns", "exec", self.names[host]] if host else []

    def __enter__(self) -> "Network":
        for host, name in enumerate(self.names):
            device = f"hy{os.getpid() % 10**7}t{host}"
            port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(port, _TUNSETIFF, struct.pack("16sH", device.encode(), _TAP_WITHOUT_HEADER))
            self.ports.append(port)
            _ip("link", "set", device, "address", f"02:00:00:00:00:{host:02x}", "mtu", "9000")
            inside: list[str] = []
            if name:
                _ip("netns", "add", name)
                _ip("link", "set", device, "netns", name, "name", "eth0")
                inside, device = ["-n", name], "eth0"
                _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{self.address(host)}/24", "dev", device)
            _ip(*inside, "link", "set", device, "up")
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stopped.set()
        self.thread.join()
        for port in self.ports:
            os.close(port)  # the device goes with it
        for name in filter(None, self.names):
            _ip("netns", "del", name)

    def _switch(self) -> None:
        # else a frame waits for its turn on a busy processor, as on no network
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -15)
        on_the_way: list[tuple[float, int, int, bytes]] = []
        number, draw = itertools.count(), random.Random(0)
        while not self.stopped.is_set():
            wait_s = min(0.2, max(0.0, on_the_way[0][0] - time.monotonic())) if on_the_way else 0.2
            ready, _, _ = select.select(self.ports, [], [], wait_s)
            now = time.monotonic()
            for source in (self.ports.index(port) for port in ready):
                for frame in _frames(self.ports[source]):
                    for target in self._targets(source, frame):
                        between_nodes = bool(source and target)
                        if {source, target} & self.cut or (between_nodes and draw.random() < self.loss):
                            continue
                        due = now + (self.delay_s if between_nodes else 0)
                        heapq.heappush(on_the_way, (due, next(number), target, frame))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(on_the_way)
                with contextlib.suppress(OSError):  # its buffer is full: lost, as in any switch
                    os.write(self.ports[target], frame)

    def _targets(self, source: int, frame: bytes) -> list[int]:
        known = frame[:5] == b"\x02\0\0\0\0" and frame[5] < len(self.ports)
        return [frame[5]] if known else [host for host in range(len(self.ports)) if host != source]


def _frames(port: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        while True:
            yield os.read(port, 65536)


class _Relay(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        upstream = socket.create_connection(("127.0.0.1", self.server.server_address[1]))  # type: ignore[index]
        sides = {self.request: upstream, upstream: self.request}
        with upstream, contextlib.suppress(OSError):
            while True:
                for side in select.select(list(sides), [], [])[0]:
                    data = side.recv(2**16)
                    if not data:
                        return
                    sides[side].sendall(data)


@contextmanager
def reachable(network: Network, port: int) -> Iterator[str]:
    """A server that listens on 127.0.0.1 is reached by the hosts as well; yields HOST:PORT for them."""
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer((network.address(0), port), _Relay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{network.address(0)}:{port}"
        server.shutdown()


@contextmanager
def cluster_of(network: Network, folder: Path) -> Iterator[RayCluster]:
    """A head on host 1 and a node on each further one, with one CPU each."""
    env = cluster_env(folder) | {"GLOO_SOCKET_IFNAME": "eth0"}  # the name of this machine is one of the loopback's
    head = network.address(1)
    with ExitStack() as stack:
        temporary = tempfile.mkdtemp(prefix="hr-", dir="/tmp")  # paths of unix sockets must stay short
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        command = [*network.inside(1), str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", head]
        command += ["--port", "6379", "--dashboard-host", head, "--dashboard-port", "8265", "--disable-usage-stats"]
        command += ["--temp-dir", tempfile.mkdtemp(prefix="head-", dir=temporary), "--num-cpus", "1"]
        log = folder / "ray-head.log"
        process = stack.enter_context(running(command, env, log))
        wait_for(f"http://{head}:8265/api/version", process, log)
        cluster = RayCluster(f"{head}:6379", f"http://{head}:8265", [process], env, folder, temporary)
        stack.callback(lambda: [stop(node) for node in cluster.nodes[1:]])
        for host in range(2, len(network.names)):
            join(cluster, network, host)
        yield cluster


def join(cluster: RayCluster, network: Network, host: int) -> subprocess.Popen[bytes]:
    """Start a node on a host."""
    command = [*network.inside(host), str(BIN / "ray"), "start", "--block", "--address", cluster.address]
    command += ["--node-ip-address", network.address(host), "--num-cpus", "1"]
    command += ["--temp-dir", tempfile.mkdtemp(prefix="node-", dir=cluster.temporary)]
    with (cluster.folder / f"node-{len(cluster.nodes)}.log").open("ab") as log:
        node = subprocess.Popen(command, env=cluster.env, stdout=log, stderr=log, start_new_session=True)
    cluster.nodes.append(node)
    return node
