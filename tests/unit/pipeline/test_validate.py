"""Validation in the memory that a training leaves."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from model import build
from model.memory import MEMORY_SHARE, bytes_per_px, output_bytes
from pipeline import validate
from pipeline.validate import Best, Validator

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


def test_weights_that_cannot_be_judged_are_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("hat", 2, **SIZES).eval()
    low_res = np.zeros((16, 16, 3), np.uint8)
    validator = Validator([("a", low_res, low_res.repeat(2, 0).repeat(2, 1))], "psnr_y", f"{tmp_path}/best", None)
    weights = {name: value.clone() for name, value in network.named_parameters()}
    validator.judge(network, weights, 1, 0)
    good = validator.best
    monkeypatch.setattr(validate, "psnr_y", lambda *images: float("nan"))
    record = validator.judge(network, weights, 2, 0)
    assert record["warning"] == "validation psnr_y is nan: its weights are not kept as the best"
    validator.wait()
    assert good is not None
    assert validator.best == validate.published_best(f"{tmp_path}/best", "psnr_y") == good
    assert validate.published_best(f"{tmp_path}/best", "ssim_y") is None
    assert validate.published_best(f"{tmp_path}/elsewhere", "psnr_y") is None


def candidate(step: int) -> validate.Candidate:
    return {}, Best(step=step, value=30.0 + step, metric="psnr_y")


def test_a_slow_upload_holds_up_nothing_and_the_newest_is_next() -> None:
    uploaded, storage_is_back = [], threading.Event()

    def upload(found: validate.Candidate) -> None:
        assert storage_is_back.wait(20)
        uploaded.append(found[1].step)

    uploads, alive = validate.NewestUpload(upload), []
    for step in (1, 2, 3, 4):
        uploads.put(candidate(step))
    threading.Timer(0.2, storage_is_back.set).start()
    uploads.wait(lambda: alive.append(1))
    assert uploaded in ([1, 4], [4])  # the thread may have begun late
    assert alive
    uploads.put(candidate(5))
    uploads.wait(lambda: None)
    assert uploaded[-1] == 5


def test_an_upload_that_fails_is_raised() -> None:
    def upload(found: validate.Candidate) -> None:
        raise OSError("the storage stays away")

    uploads = validate.NewestUpload(upload)
    uploads.put(candidate(1))
    with pytest.raises(OSError, match="stays away"):
        uploads.wait(lambda: None)
    with pytest.raises(OSError, match="stays away"):
        uploads.put(candidate(2))
