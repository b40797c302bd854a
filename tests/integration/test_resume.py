"""A killed run continues from its last checkpoint, to the same weights as a run that was left alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from model.weights import read_weights
from tests.shared_data import ROOT

pytestmark = pytest.mark.integration

STEPS = 60


def command(folder: Path, *more: str) -> list[str]:
    overrides = [
        f"storage.uri={folder}/runs",
        f"phases.pretrain.steps={STEPS}",
        "phases.pretrain.checkpoint_every=10",
        "phases.pretrain.log_every=5",
        "phases.pretrain.precision=fp32",
        "phases.pretrain.adversarial={channels: 4}",  # its state must survive as well
        *more,
    ]
    sets = [word for override in overrides for word in ("--set", override)]
    base = [sys.executable, "-m", "pipeline.pretrain", "--recipe", "tests/integration/tiny_pair.yaml"]
    return [*base, "--until", "pretrain-x2", *sets]


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "RAY_AUTH_MODE": "disabled"}


def run(folder: Path, *more: str) -> str:
    done = subprocess.run(command(folder, *more), cwd=ROOT, env=env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def committed(folder: Path, stage: str = "pretrain-x2") -> bool:
    """Whether Ray Train has written down a checkpoint: all ranks' files are there, and a new start will find it."""
    for snapshot in (folder / "runs" / stage).rglob("checkpoint_manager_snapshot.json"):
        with suppress(ValueError):  # it is being written
            return bool(json.loads(snapshot.read_text())["checkpoint_results"])
    return False


def signal_after_a_checkpoint(folder: Path, kind: signal.Signals) -> "subprocess.Popen[bytes]":
    """Start a run and end it when its first checkpoint is committed: SIGKILL for all its processes at once."""
    with (folder / "ended.log").open("wb") as log:
        process = subprocess.Popen(command(folder), cwd=ROOT, env=env(), stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 180
    while not committed(folder):
        assert process.poll() is None, (folder / "ended.log").read_text()
        assert time.monotonic() < deadline, (folder / "ended.log").read_text()
        time.sleep(0.05)
    if kind is signal.SIGKILL:
        os.killpg(process.pid, kind)
    else:
        process.send_signal(kind)
    process.wait(timeout=120)
    return process


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = list((folder / "runs" / "pretrain-x2").rglob("weights.pth"))
    assert len(found) == 1
    return read_weights(found[0])


def continues(folder: Path, num_workers: int = 2) -> int:
    """Run again to the end; gives the step that it went on from."""
    output = run(folder, f"compute.num_workers={num_workers}")
    first = re.search(r"pretrain-x2: (\d) process\w* from step (\d+)", output)
    assert first, output
    assert int(first[1]) == num_workers
    assert "shard-photographs: done before" in output
    return int(first[2])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that was left alone."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder)
    return weights(folder)


def assert_equal_weights(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], slack: float = 1) -> None:
    """slack: factor on the tolerances, for sums in another order."""
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=slack * 1e-4, atol=slack * 1e-6, msg=name)


def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    signal_after_a_checkpoint(tmp_path, signal.SIGKILL)
    assert 10 <= continues(tmp_path) < STEPS
    assert_equal_weights(weights(tmp_path), alone)


def test_sigterm_saves_a_checkpoint_that_one_worker_continues(tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    ended = signal_after_a_checkpoint(tmp_path, signal.SIGTERM)
    log = (tmp_path / "ended.log").read_text()
    assert ended.returncode == 143, log
    stopped = re.search(r"asked to stop at step (\d+) and saved a checkpoint; the same command continues", log)
    assert stopped, log
    (snapshot,) = (tmp_path / "runs" / "pretrain-x2").rglob("checkpoint_manager_snapshot.json")
    snapshot.write_text(snapshot.read_text()[:50])  # as a crash of the disk's machine leaves it
    assert continues(tmp_path, num_workers=1) == int(stopped[1])
    assert_equal_weights(weights(tmp_path), alone, slack=10)


def test_a_diverging_run_names_its_samples_goes_back_and_stops(tmp_path: Path) -> None:
    hopeless = ["phases.pretrain.lr=1e30", "phases.pretrain.warmup_steps=0", "phases.pretrain.milestones=[]"]
    # one process: that all refuse what one cannot take is in test_zero
    limits = ["compute.bad_steps_tolerated=1", "compute.max_rollbacks=1", "compute.num_workers=1"]
    tried = subprocess.run(
        command(tmp_path, *hopeless, *limits), cwd=ROOT, env=env(), capture_output=True, text=True, timeout=300
    )
    assert tried.returncode == 2, tried.stdout + tried.stderr
    assert "after going back 1 times: lower the learning rate" in tried.stderr
    assert tried.stdout.count("going back to the last checkpoint") == 2
    assert re.search(r"step \d+ not applied: gradient norm nan; rank 0 had \w+", tried.stdout)
    assert not list((tmp_path / "runs" / "pretrain-x2").rglob("weights.pth"))
