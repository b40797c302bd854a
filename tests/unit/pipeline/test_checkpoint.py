"""Whole tensors from the ranks' partitions, whatever the ZeRO stage laid where."""

import json
from pathlib import Path

import pytest
import ray.train
import torch

from pipeline import checkpoint

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
