"""Whole tensors from the ranks' partitions, whatever the ZeRO stage laid where."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray.train
import torch

from data_prep import storage
from pipeline import checkpoint
from tests.shared_data import ROOT

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(10.0, 13.0)
LAYOUT: list[checkpoint.Group] = [[("a", [2, 3], 6), ("b", [3], 3)]]


def test_partitions_laid_end_to_end() -> None:
    flat = torch.cat([A.flatten(), B, torch.zeros(3)])  # padded to a multiple of the ranks
    whole = checkpoint.assemble([[flat[:4]], [flat[4:8]], [flat[8:]]], LAYOUT, interleaved=False)
    assert torch.equal(whole["a"], A)
    assert torch.equal(whole["b"], B)


def test_every_tensor_spread_over_the_ranks() -> None:
    layout: list[checkpoint.Group] = [[("a", [2, 3], 3), ("b", [3], 2)]]
    padded = torch.cat([B, torch.zeros(1)])
    parts = [[torch.cat([A.flatten()[3 * r : 3 * r + 3], padded[2 * r : 2 * r + 2]])] for r in range(2)]
    whole = checkpoint.assemble(parts, layout, interleaved=True)
    assert torch.equal(whole["a"], A)
    assert torch.equal(whole["b"], B)


def write(folder: Path, world_size: int, digest: str = "d") -> ray.train.Checkpoint:
    flat = torch.cat([A.flatten(), B, torch.zeros(1)])
    part = {name: [flat[:5]] for name in ("params", "exp_avg", "exp_avg_sq", "ema")}
    torch.save(part, folder / checkpoint.part_name(0))
    torch.save({name: [flat[5:]] for name in part}, folder / checkpoint.part_name(1))
    meta = {"job_digest": digest, "world_size": world_size, "zero_stage": 1, "layout": LAYOUT, "step": 3}
    (folder / checkpoint.META).write_text(json.dumps(meta))
    return ray.train.Checkpoint.from_directory(folder)


def test_a_checkpoint_is_read_back_whole(tmp_path: Path) -> None:
    saved = write(tmp_path, world_size=2)
    state, meta = checkpoint.load(saved, "d")
    assert meta["step"] == 3
    assert torch.equal(state["exp_avg"]["a"], A)
    assert torch.equal(checkpoint.ema_weights(saved)["b"], B)


def test_a_foreign_or_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to another training"):
        checkpoint.load(write(tmp_path, world_size=2), "other")
    with pytest.raises(ValueError, match=r"lacks rank-00002\.pt"):
        checkpoint.load(write(tmp_path, world_size=3), "d")


def listing(place: Path, *names: str) -> None:
    """Ray Train's list of checkpoints, as far as it is read here."""
    listed = {"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}
    (place / checkpoint.SNAPSHOT).write_text(json.dumps(listed))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three checkpoints; the newest lacks a rank's file."""
    for step in (2, 4, 6):
        folder = tmp_path / f"step-{step:08}-{step:08}"
        folder.mkdir()
        write(folder, world_size=3 if step == 6 else 2)
    return tmp_path


def test_a_sound_list_is_left_to_ray(place: Path) -> None:
    listing(place, "step-00000002-00000002")
    assert checkpoint.recover(str(place)) is None
    assert (place / checkpoint.SNAPSHOT).exists()


@pytest.mark.parametrize("lost", ["torn", "absent", "names a deleted one"])
def test_the_newest_whole_checkpoint_is_found_without_rays_list(place: Path, lost: str) -> None:
    listing(place, "step-00000004-00000004", "step-00000008-00000008")
    snapshot = place / checkpoint.SNAPSHOT
    if lost == "torn":
        snapshot.write_text(snapshot.read_text()[:30])
    elif lost == "absent":
        snapshot.unlink()
    assert checkpoint.recover(str(place)) == f"{place}/step-00000004-00000004"
    assert not snapshot.exists()  # Ray would refuse it
    assert checkpoint.recover(str(place)) == f"{place}/step-00000004-00000004"  # killed before the next one


def test_nothing_to_recover_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.recover(str(tmp_path / "absent")) is None


SAVE_AND_DIE = """
import os, signal, types
import ray.train, torch
from pipeline import checkpoint
ray.train.get_context = lambda: types.SimpleNamespace(get_world_rank=lambda: 0)
ray.train.report = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save({"params": [torch.ones(2)]}, {"step": 1, "data_step": 1}, {}, "s3://bucket/runs")
"""


def test_checkpoints_of_killed_workers_are_swept_and_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", SAVE_AND_DIE], cwd=ROOT, env=environment, check=False)
    assert killed.returncode < 0
    (left,) = tmp_path.glob("hatchery-checkpoint-*")
    assert (left / checkpoint.part_name(0)).exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = Path(tempfile.mkdtemp(prefix=storage.owned("hatchery-checkpoint-")))
    elsewhere, old = (tmp_path / f"hatchery-checkpoint-{name}" for name in ("another-host-1-x", "8xv_k3_1"))
    elsewhere.mkdir()
    old.mkdir()  # as earlier versions named them
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    checkpoint.sweep()
    assert sorted(tmp_path.glob("hatchery-checkpoint-*")) == sorted([mine, elsewhere])


def test_a_checkpoint_that_fails_again_gives_way_to_the_one_before(place: Path) -> None:
    listing(place, "step-00000002-00000002", "step-00000004-00000004")
    assert checkpoint.discard(str(place), "step-00000004-00000004")
    assert checkpoint.recover(str(place)) == f"{place}/step-00000002-00000002"
    assert not (place / checkpoint.SNAPSHOT).exists()


def test_the_only_checkpoint_is_kept(place: Path) -> None:
    listing(place, "step-00000002-00000002")
    assert not checkpoint.discard(str(place), "step-00000002-00000002")
    assert checkpoint.recover(str(place)) is None
    assert (place / "step-00000002-00000002" / checkpoint.META).exists()


def test_an_older_checkpoint_that_is_not_whole_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    for step, ranks in ((2, 3), (4, 2)):
        folder = tmp_path / f"step-{step:08}-{step:08}"
        folder.mkdir()
        write(folder, world_size=ranks)
    assert not checkpoint.discard(str(tmp_path), "step-00000004-00000004")
