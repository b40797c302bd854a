"""A real S3 server for tests: SeaweedFS from its wheel; Ceph where S3_ENGINE=ceph (infra/s3-start.sh)."""

import contextlib
import os
import shlex
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.shared_data import ROOT


@dataclass(frozen=True)
class S3Server:
    """`uri` is a fresh prefix in the server's bucket; `environment` the AWS_* variables that reach it."""

    uri: str
    endpoint: str
    environment: dict[str, str]
    folder: Path
    engine: str

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The server is stopped during the block: connections are refused. It comes back with all it held."""
        _stop(self.folder)
        try:
            yield
        finally:
            _start(self.folder, self.engine, urlsplit(self.endpoint).port)


@contextlib.contextmanager
def s3_server(folder: Path, engine: str = "seaweedfs") -> Iterator[S3Server]:
    """Run a server with its data in `folder`, and set AWS_* for this process and its children meanwhile."""
    environment = _start(folder, engine, _free_port())
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        uri = f"s3://test/prefix-{uuid.uuid4().hex[:8]}"
        yield S3Server(uri, environment["AWS_ENDPOINT_URL"], environment, folder, engine)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _stop(folder)


def _start(folder: Path, engine: str, port: int | None) -> dict[str, str]:
    """Start a server; the variables that reach it."""
    started = subprocess.run(
        [str(ROOT / "infra" / "s3-start.sh"), str(folder)],
        env={**os.environ, "S3_PORT": str(port), "S3_BUCKET": "test", "S3_ENGINE": engine},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return _exports(started.stdout)


def _stop(folder: Path) -> None:
    subprocess.run([str(ROOT / "infra" / "s3-stop.sh"), str(folder)], check=True, timeout=60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _exports(text: str) -> dict[str, str]:
    """The variables of the shell lines `export A=1 B=2`."""
    words = [word for line in text.splitlines() for word in shlex.split(line) if word != "export"]
    return dict(word.split("=", 1) for word in words)
