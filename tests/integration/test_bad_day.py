"""One training through everything that goes wrong in two weeks on a cluster, to the same weights as on a good day.

A worker is killed, another hangs, a node dies and a new one joins, S3 and MLflow are out of reach for a while.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from data_prep import storage
from model.weights import read_weights
from tests.integration.servers import BIN, MlflowServer, RayCluster, ray_cluster, session_of, stop
from tests.s3_server import s3_server
from tests.shared_data import ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif("HATCHERY_LONG" not in os.environ, reason="takes eight minutes: set HATCHERY_LONG=1 to run"),
    pytest.mark.timeout(1500),
]

STEPS, EVERY, OUTAGE_S = 220, 10, 30
RECIPE = [
    "--recipe",
    "tests/integration/tiny_pair.yaml",
    "--until",
    "pretrain-x2",
    *(
        word
        for override in (
            f"phases.pretrain.steps={STEPS}",
            f"phases.pretrain.checkpoint_every={EVERY}",
            "phases.pretrain.log_every=5",
            "phases.pretrain.global_batch=12",
            "phases.pretrain.patch_px=32",
            "phases.pretrain.precision=fp32",
        )
        for word in ("--set", override)
    ),
]


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


class Job:
    """`ray job submit` of the recipe, its output in a file."""

    def __init__(self, cluster: RayCluster, folder: Path, env: dict[str, str], *overrides: str) -> None:
        self.log = folder / "job.log"
        command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT)]
        command += ["--runtime-env-json", json.dumps({"env_vars": env}), "--", "python", "pipeline/pretrain.py"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *RECIPE, *sets(*overrides)], env=cluster.env, stdout=log, stderr=log
            )

    def wait_for(self, what: str, reached: Callable[[], object], timeout_s: float = 150) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"ended before {what}:\n{self.log.read_text()[-5000:]}"
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.log.read_text()[-5000:]}"
            time.sleep(0.3)

    def said(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log.read_text()))


def newest_checkpoint(base: str) -> int:
    steps = re.findall(r"step-(\d{8})-\d{8}/meta.json", "\n".join(f.uri for f in storage.list_files(base)))
    return max(map(int, steps), default=0)


def training_processes(cluster: RayCluster) -> list[int]:
    found = []
    for node in cluster.nodes:
        for pid in session_of(node.pid):
            title = Path(f"/proc/{pid}/cmdline")
            if title.exists() and b"RayTrainWorker" in title.read_bytes():
                found.append(pid)
    return found


def weights_of_a_good_day(folder: Path) -> dict[str, torch.Tensor]:
    command = [str(BIN / "python"), "pipeline/pretrain.py", *RECIPE, *sets(f"storage.uri={folder}/runs")]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = (folder / "runs" / "pretrain-x2").rglob("weights.pth")
    return read_weights(found)


def test_a_bad_day_ends_with_the_weights_of_a_good_one(tmp_path: Path) -> None:
    good = weights_of_a_good_day(tmp_path)
    with s3_server(tmp_path / "s3") as s3, ray_cluster(tmp_path) as cluster:
        mlflow = MlflowServer(tmp_path, f"{s3.uri}/mlflow")
        mlflow.start()
        try:
            job = Job(
                cluster,
                tmp_path,
                s3.environment,
                f"storage.uri={s3.uri}/runs",
                f"tracking.uri={mlflow.uri}",
                "compute.num_workers=[1,2]",
                "compute.hang_timeout_s=20",
                "compute.resize_every_s=5",
            )
            checkpoints = f"{s3.uri}/runs/pretrain-x2"

            def next_checkpoint(job: Job = job) -> int:
                before = newest_checkpoint(checkpoints)
                job.wait_for("a further checkpoint", lambda: newest_checkpoint(checkpoints) > before)
                return newest_checkpoint(checkpoints)

            def restarted(processes: str, job: Job = job) -> Callable[[], bool]:
                before = job.said(processes)
                return lambda: job.said(processes) > before

            next_checkpoint()
            again = restarted("2 processes from step")
            os.kill(training_processes(cluster)[0], signal.SIGKILL)
            job.wait_for("a restart after a killed worker", again)
            next_checkpoint()
            again = restarted("2 processes from step")
            os.kill(training_processes(cluster)[1], signal.SIGSTOP)
            job.wait_for("a restart after a hanging worker", again)
            next_checkpoint()
            fewer = restarted("1 process from step")
            lost = cluster.nodes.pop()
            for pid in session_of(lost.pid):
                os.kill(pid, signal.SIGKILL)
            job.wait_for("going on with one worker", fewer)
            again = restarted("2 processes from step")
            cluster.start_node(1, ip="127.0.0.3")
            job.wait_for("both workers again", again)
            next_checkpoint()
            server = int((tmp_path / "s3" / "run" / "weed.pid").read_text())
            os.kill(server, signal.SIGSTOP)
            mlflow.stop()
            time.sleep(OUTAGE_S)
            mlflow.start()
            os.kill(server, signal.SIGCONT)
            assert job.process.wait(timeout=300) == 0, job.log.read_text()[-6000:]
            (weights,) = [f for f in storage.list_files(checkpoints) if f.uri.endswith("/weights.pth")]
            storage.download(weights.uri, tmp_path / "weights.pth")
            assert_same_training(read_weights(tmp_path / "weights.pth"), good)
            assert_same_losses(losses(mlflow.uri), losses(f"sqlite:///{tmp_path}/runs/mlflow.db"))
        finally:
            mlflow.stop()
            for node in cluster.nodes[1:]:
                stop(node)


def losses(uri: str) -> list[tuple[int, float]]:
    """(step, mean loss of the five steps up to it), as MLflow has them; what was done twice occurs twice."""
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'hatchery'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`hatchery.stage` = 'pretrain-x2'")
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]


def assert_same_losses(found: list[tuple[int, float]], good: list[tuple[int, float]]) -> None:
    """Every metric arrived, and at every step the samples were the same.

    With as many workers as on the good day losses are equal. With one, sums are taken in another order, which each step
    makes grow; 0.8 % was the most seen. Other samples change such a mean by 5 to 20 %.
    """
    expected = dict(good)
    assert {step for step, _ in found} == set(expected) == set(range(5, STEPS + 1, 5))
    for step, loss in found:
        assert loss == pytest.approx(expected[step], rel=1e-6 if step <= 2 * EVERY else 0.02), f"step {step}"


def assert_same_training(found: dict[str, torch.Tensor], good: dict[str, torch.Tensor]) -> None:
    """By the distance of all weights together, relative to their size: 0.0003 was seen. Indices are equal."""
    assert found.keys() == good.keys()
    names = [name for name, value in good.items() if value.is_floating_point()]
    assert all(torch.equal(found[name], good[name]) for name in good.keys() - set(names))
    mine, others = (torch.cat([weights[name].flatten() for name in names]) for weights in (found, good))
    assert float((mine - others).norm() / others.norm()) < 0.002
