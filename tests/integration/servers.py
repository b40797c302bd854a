"""Real servers for the integration tests, as processes of this machine: a Ray cluster of several nodes, MLflow."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Python imports this before a program's first line: takes the installed project out of sight, so that only what
# `ray job submit --working-dir` uploads can be imported.
HIDE_PROJECT = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended early:\n{log.read_text()[-3000:]}"
        with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.3)
    raise AssertionError(f"{url} did not answer in {timeout_s} s:\n{log.read_text()[-3000:]}")


def session_of(leader: int) -> list[int]:
    """Every process of the session that `leader` leads, itself included."""
    found = []
    for entry in os.listdir("/proc"):
        with suppress(ProcessLookupError, ValueError):
            if os.getsid(int(entry)) == leader:
                found.append(int(entry))
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started: it leads a session of its own, which may hold several process groups."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    for pid in session_of(process.pid):  # what outlives its leader keeps its ports
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@contextmanager
def running(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        stop(process)


class MlflowServer:
    """`mlflow server` on SQLite whose artifacts go straight to `artifacts`; may be stopped and started again.

    proxied: clients send artifacts to the server, which puts them there.
    """

    def __init__(self, folder: Path, artifacts: str, proxied: bool = False) -> None:
        self.folder = folder
        self.artifacts = artifacts
        self.proxied = proxied
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination" if self.proxied else "--default-artifact-root", self.artifacts]
        command += [] if self.proxied else ["--no-serve-artifacts"]
        log = self.folder / "mlflow.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                # six processes less: nobody evaluates language models here
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_for(f"{self.uri}/health", self.process, log)

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)
            self.process = None


@contextmanager
def mlflow_server(folder: Path, artifacts: str) -> Iterator[str]:
    """A running MLflow server; yields its URI."""
    server = MlflowServer(folder, artifacts)
    try:
        server.start()
        yield server.uri
    finally:
        server.stop()


@dataclass
class RayCluster:
    """A running cluster: its GCS and dashboard addresses, the processes of its nodes, and their environment."""

    address: str
    dashboard: str
    nodes: list[subprocess.Popen[bytes]]
    env: dict[str, str]
    folder: Path
    temporary: str

    def start_node(self, cpus: int, ip: str | None = None) -> subprocess.Popen[bytes]:
        """Join another node, with an address of its own on the loopback."""
        ip = ip or f"127.0.0.{len(self.nodes) + 1}"
        command = [str(BIN / "ray"), "start", "--block", "--address", self.address, "--node-ip-address", ip]
        # a disk of its own, as it were: nodes that share one replace each other's working directories
        command += ["--temp-dir", tempfile.mkdtemp(prefix="node-", dir=self.temporary), *agent_ports()]
        log = (self.folder / f"node-{len(self.nodes)}.log").open("ab")
        node = subprocess.Popen(
            [*command, "--num-cpus", str(cpus)], env=self.env, stdout=log, stderr=log, start_new_session=True
        )
        self.nodes.append(node)
        return node


def agent_ports() -> list[str]:
    """Ports of a node's agents. Their defaults are fixed: an agent that finds them taken starts no jobs, silently."""
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    return [word for name in names for word in (f"--{name}", str(free_port()))]


def cluster_env(folder: Path) -> dict[str, str]:
    """The environment of cluster nodes where the project is not installed."""
    (folder / "hide").mkdir(exist_ok=True)
    (folder / "hide" / "sitecustomize.py").write_text(HIDE_PROJECT)
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",  # a job's `python` is the one that has the dependencies
        "PYTHONPATH": str(folder / "hide"),
        "PYTHONDONTWRITEBYTECODE": "",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    }


@contextmanager
def ray_cluster(folder: Path, cpus: tuple[int, ...] = (1, 1)) -> Iterator[RayCluster]:
    """A head node and others, each with its number of CPUs; job submission on the dashboard's port."""
    port, dashboard = free_port(), free_port()
    env = cluster_env(folder)
    temporary = tempfile.mkdtemp(prefix="hr-", dir="/tmp")  # paths of unix sockets must stay short
    head_folder = tempfile.mkdtemp(prefix="head-", dir=temporary)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--disable-usage-stats"]
    command += ["--temp-dir", head_folder, "--num-cpus", str(cpus[0]), "--ray-client-server-port", str(free_port())]
    command += agent_ports()
    log = folder / "ray-head.log"
    with running(command, env, log) as head:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", head, log)
        cluster = RayCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", [head], env, folder, temporary)
        try:
            for count in cpus[1:]:
                cluster.start_node(count)
            yield cluster
        finally:
            for node in cluster.nodes[1:]:
                stop(node)
            shutil.rmtree(temporary, ignore_errors=True)


def submission(cluster: RayCluster, script: str, *arguments: str, env: dict[str, str]) -> list[str]:
    """The command `ray job submit` of a script, which uploads the project's folder."""
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT)]
    command += ["--runtime-env-json", json.dumps({"env_vars": env})]
    return [*command, "--", "python", script, *arguments]


def submit(cluster: RayCluster, script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of a script from the project's folder; waits and gives the job's output."""
    command = submission(cluster, script, *arguments, env=env)
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=900)
        # the dashboard answers before the agents that start jobs have reported to it
        if "No available agent" not in done.stderr:
            return done
        assert time.monotonic() < deadline, f"{done.stderr[-500:]}\n{agent_log(cluster)}"
        time.sleep(2)


def agent_log(cluster: RayCluster) -> str:
    """What the cluster's agents wrote last."""
    logs = Path(cluster.temporary).glob("*/session_2*/logs/dashboard_agent.*")
    return "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(logs))
