"""Addresses that people give for Ray: each works, or is refused in one line before Ray tries it for half a minute."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env import packaging

from pipeline import cluster, ray_address
from pipeline.cluster import connected
from pipeline.config import ComputeConfig
from pipeline.lasting import IN_RAY_JOB
from tests.integration.servers import BIN, agent_ports, free_port, running
from tests.shared_data import ROOT


def refusal(address: str, origin: str = "--address") -> str:
    with pytest.raises(ValueError, match=r".+") as caught:
        ray_address.check_cluster(address, origin)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is where jobs are submitted (`ray job submit --address http://127.0.0.1:8265 -- "),
        ("HTTPS://ray.example.com", "is where jobs are submitted (`ray job submit --address HTTPS://ray.example.com "),
        ("ray://127.0.0.1:10001", "is for Ray's client, whose trainings end with its connection: run on a node"),
        ("gs://bucket", "scheme gs:// is unknown: give HOST:PORT of its head"),
        ("head", "is not of the form HOST:PORT"),
        ("head:", "is not of the form HOST:PORT"),
        ("head:http", "is not of the form HOST:PORT"),
        ("head:99999", "is not of the form HOST:PORT"),
        ("head:0", "is not of the form HOST:PORT"),
        ("::1:6379", "is not of the form HOST:PORT (IPv6: [::1]:PORT)"),
        ("[::1]", "is not of the form HOST:PORT (IPv6: [::1]:PORT)"),
        ("[::1:6379", "is not of the form HOST:PORT"),
        (" ", "is not of the form HOST:PORT"),
        ("two hosts:6379", "is not of the form HOST:PORT"),
    ],
)
def test_what_is_no_address_of_a_cluster_names_value_and_remedy(address: str, words: str) -> None:
    assert refusal(address).startswith(f"--address {address!r}")
    assert words in refusal(address)


def test_the_variable_for_job_submission_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(ValueError, match=r"^RAY_ADDRESS 'http://127\.0\.0\.1:8265' is where jobs"),
        connected(ComputeConfig(), None, debug=False),
    ):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_where_nothing_listens_is_said_at_once(host: str) -> None:
    message = refusal(f"{host}:{free_port()}")
    assert message.startswith(f"no Ray cluster at '{host}:")
    assert message.endswith("start one, or give --address local")


def test_another_service_is_not_taken_for_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        assert "no Ray cluster at '127.0.0.1:" in refusal(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_misspelt_mode_is_not_taken_for_no_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert refusal("127.0.0.1:6379") == "RAY_AUTH_MODE 'tokens' is unknown: set disabled or token"
    with (
        pytest.raises(ValueError, match=r"^RAY_AUTH_MODE 'tokens' is unknown"),
        connected(ComputeConfig(), "local", debug=False),
    ):
        pass


TOKEN = "0123456789abcdef0123456789abcdef"
TRY_ALL = """
import json, os, sys, ray
from ray._raylet import AuthenticationTokenLoader, Config
from pipeline.cluster import connected
from pipeline.config import ComputeConfig

def given():  # the packages that were uploaded; workers on this machine find this folder's as well
    folders = [path for path in sys.path if "py_modules_files" in path]
    return sorted(name for folder in folders for name in os.listdir(folder))

for address, env in json.loads(sys.argv[1]):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ.update(env)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        with connected(ComputeConfig(), address, debug=False):
            print(ray.get(ray.remote(num_cpus=0)(given).remote()))
    except ValueError as error:
        print(error)
"""


@pytest.fixture
def token_port(tmp_path: Path) -> Iterator[int]:
    """The port of a cluster that asks for a token."""
    port = free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--port", str(port), "--num-cpus", "1"]
    command += ["--include-dashboard", "false", "--disable-usage-stats", "--ray-client-server-port", str(free_port())]
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with (
        tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp", ignore_cleanup_errors=True) as short,
        running([*command, "--temp-dir", short, *agent_ports()], env, tmp_path / "log") as head,
    ):
        while "ray stop" not in (log := (tmp_path / "log").read_text()):
            assert head.poll() is None, log
            time.sleep(0.2)
        yield port


@pytest.mark.integration
def test_a_cluster_that_asks_for_a_token(token_port: int, tmp_path: Path) -> None:
    asks = {"RAY_AUTH_MODE": "token"}
    cases: list[tuple[str, dict[str, str], str]] = [
        (
            "127.0.0.1",
            asks | {"RAY_AUTH_TOKEN": "wrong"},
            "the token is not the cluster's: set RAY_AUTH_TOKEN, the file",
        ),
        ("127.0.0.1", asks, "RAY_AUTH_MODE is token, but there is no token: set RAY_AUTH_TOKEN"),
        ("127.0.0.1", asks | {"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "RAY_AUTH_MODE is token, but there is no token: set"),
        ("127.0.0.1", {}, "it asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ("[::1]", asks | {"RAY_AUTH_TOKEN": TOKEN}, "['data_prep', 'model', 'pipeline']"),
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL, json.dumps([(f"{host}:{token_port}", env) for host, env, _ in cases])],
        cwd=ROOT,
        env={**inherited, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [said in line for line, (_, _, said) in zip(lines, cases, strict=True)] == [True] * len(cases), lines
    assert "InvalidAuthToken" not in done.stderr  # Ray's own tries


def test_a_job_has_the_project_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IN_RAY_JOB, raising=False)
    names = [Path(module).name for module in cluster._project()["py_modules"]]
    assert names == ["data_prep", "model", "pipeline"]
    monkeypatch.setenv(IN_RAY_JOB, "{}")
    assert cluster._project() == {}


def test_data_weights_and_results_are_not_uploaded_with_the_project(tmp_path: Path) -> None:
    """Ray refuses more than 500 MB: a submit from a folder with a data set in it would fail."""
    project = tmp_path / "project"
    project.mkdir()
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, project)
    wanted = ["pipeline/pretrain.py", "configs/recipe/demo.yaml", "my_recipe.yaml", "images.txt", "model/build.py"]
    others = ["DF2K/0001.png", "weights/HAT.pth", "model/HAT.pth", "reports/images.json", "huge", "runs/a.yaml"]
    others += [".venv/lib/x.py", "pipeline/__pycache__/pretrain.cpython-311.pyc", "out.png"]
    for name in wanted + others:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    os.truncate(project / "huge", 600 * 2**20)  # without a block on the disk
    package = tmp_path / "package.zip"
    packaging.create_package(str(project), package, include_gitignore=True)
    packed = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert packed == set(wanted)
