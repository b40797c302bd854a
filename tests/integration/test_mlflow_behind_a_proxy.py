"""A real MLflow server where people put it: behind a path, a login and TLS of a private CA, or by another name."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

from pipeline import tracking
from pipeline.cli import main
from pipeline.mlflow_server import CA, PASSWORD, USER
from pipeline.tracking import Tracker, TrackingError
from tests.integration.servers import MlflowServer
from tests.reverse_proxy import Certificates, Front, basic, make_certificates, reverse_proxy
from tests.unit.pipeline.test_faults import recipe_in

pytestmark = pytest.mark.integration

SECRET = "hunter2-of-the-proxy"
SLOW_S = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    found = MlflowServer(folder, str(folder / "artifacts"), proxied=True)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def slow_upload(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, "Future[None]"]]:
    """An upload, begun before the other tests, that the server takes long to put away."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "weights.pth").write_bytes(b"weights" * 1000)
    client = MlflowClient(server.uri)
    run_id = client.create_run(client.create_experiment("slow")).info.run_id
    front = Front(server.uri, slow_put_s=SLOW_S)
    with reverse_proxy(front) as address, ThreadPoolExecutor(1) as pool:
        # MLflow finds the way for artifacts by the address that the client has
        yield run_id, pool.submit(MlflowClient(address).log_artifact, run_id, str(folder / "weights.pth"))


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, slow_upload: object) -> None:
    for name in (USER, PASSWORD, CA):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def guarded(server: MlflowServer, certificates: Certificates) -> Iterator[str]:
    """The server behind a path, a Basic login and TLS."""
    front = Front(server.uri, "/team/mlflow", basic("me", SECRET))
    with reverse_proxy(front, certificates.context()) as address:
        yield address


@pytest.mark.parametrize("where", ["environment", "address"])
def test_a_tracker_behind_a_path_a_login_and_a_private_ca(
    guarded: str, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    with pytest.raises(TrackingError, match=f"is not trusted .* set {CA} to its CA's file"):
        tracking.connect(guarded)
    monkeypatch.setenv(CA, str(certificates.ca))
    with pytest.raises(TrackingError, match=rf"wants a login \(401\): set {USER} and {PASSWORD}"):
        tracking.connect(guarded)
    if where == "environment":
        monkeypatch.setenv(USER, "me")
        monkeypatch.setenv(PASSWORD, SECRET)
        uri = guarded
    else:
        uri = guarded.replace("://", f"://me:{SECRET}@")
    tracker = Tracker(recipe_in(tmp_path, f"tracking.uri={uri}", f"tracking.experiment={where}"))
    stage = tracker.stage_run("train", "f", {"uri": uri})
    tracker.log_bytes_later(stage, "pictures/a.png", b"picture")
    tracker.log_metrics(stage, {"loss": 0.5}, 1)
    tracker.finish(stage)
    assert tracker.uri == guarded
    assert mlflow.get_tracking_uri() == guarded
    assert tracker.how_to_look.startswith(f"{guarded}/#/experiments/")
    assert (
        Path(mlflow.artifacts.download_artifacts(run_id=stage, artifact_path="pictures/a.png")).read_bytes()
        == b"picture"
    )
    tracking.connect_default(guarded)  # a later call, by what is in the environment


def test_the_planted_secret_is_nowhere_in_what_the_server_keeps(server: MlflowServer) -> None:
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_host_that_mlflow_does_not_know_is_told_how_to_allow_it(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: real("127.0.0.1" if host == "mlflow" else host, *rest, **more),
    )
    uri = f"http://mlflow:{server.port}"
    with pytest.raises(SystemExit) as left:
        main(["history", "x-x2", "--tracking-uri", uri])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"hatchery: MLflow at {uri} refuses the Host 'mlflow:{server.port}' (403): start it with "
        f"--allowed-hosts mlflow:{server.port} (which replaces its own list)\n"
    )


def test_a_server_that_is_lost_ends_a_run_within_seconds(server: MlflowServer, tmp_path: Path) -> None:
    """Who presses Ctrl-C waits for no time-out of MLflow's, which is two minutes, several times."""
    front = Front(server.uri)
    with reverse_proxy(front) as address:
        tracker = Tracker(recipe_in(tmp_path, f"tracking.uri={address}", "tracking.experiment=lost"))
        run_id = tracker.begin()
        said: list[str] = []
        tracker.say = said.append
        front.silent_s, begin = 30, time.monotonic()
        tracker.abandon(run_id, KeyboardInterrupt())
        assert time.monotonic() - begin < 25
    (line,) = said
    assert line.startswith(f"MLflow run {run_id} is not marked as KILLED: MLflow at {address} does not answer within")


def test_an_artifact_that_takes_long_to_put_away_arrives(
    server: MlflowServer, slow_upload: tuple[str, "Future[None]"]
) -> None:
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() >= MLFLOW_HTTP_REQUEST_TIMEOUT.default
    run_id, upload = slow_upload
    upload.result(timeout=3 * SLOW_S)
    assert [item.path for item in MlflowClient(server.uri).list_artifacts(run_id)] == ["weights.pth"]
