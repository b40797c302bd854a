"""What a window of steps measures."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.window import Window


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_memory_is_that_of_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of trials before the first one, nor of a validation between two."""
    held = {"now": 70e9}  # by trials
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(now=0.0))

    def figure(window: Window, step_bytes: float) -> float:
        window.add(torch.ones(()))
        window.steps += 1
        held["now"] = max(held["now"], step_bytes)
        return window.close(1)["gpu_memory_gb"]

    window = Window(torch.device("cuda"))
    assert figure(window, 20e9) == 20
    held["now"] = 60e9  # by a validation
    window.forget_memory()
    assert figure(window, 21e9) == 21
    assert figure(window, 19e9) == 19
