"""Validation in the memory that a training leaves."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from model import build
from model.memory import MEMORY_SHARE, bytes_per_px, output_bytes
from pipeline.validate import Validator

SIZES = {"embed_dim": 12, "depths": (1,), "num_heads": (3,), "window_size": 8, "squeeze_factor": 6}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_images_are_tiled_where_memory_asks_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build("hat", 2, **SIZES).eval()
    low_res = np.random.default_rng(0).integers(0, 256, (96, 88, 3), np.uint8)
    validator = Validator([("a", low_res, low_res.repeat(2, 0).repeat(2, 1))], "psnr_y", f"{tmp_path}/best", None)
    weights = {name: value.clone() for name, value in network.named_parameters()}

    def judged(free: float, beside: int) -> dict[str, object]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
        monkeypatch.setattr("model.inference.free_bytes", lambda device: int(free))
        return validator.judge(network, weights, 1, 0)

    whole = judged(1e9, 1)
    assert "warning" not in whole
    left = 72**2 * bytes_per_px(network) / MEMORY_SHARE
    free = output_bytes(2, (96, 88, 3), False) + 2 * left + 100  # for two processes of one machine
    tiled = judged(free, 2)
    assert tiled["warning"] == (
        "validation in tiles of 72 px, as memory allows: its figures may differ slightly from those before"
    )
    assert "warning" not in judged(free, 2)
    assert "validation without tiles" in str(judged(1e9, 2)["warning"])
    validator.wait()
