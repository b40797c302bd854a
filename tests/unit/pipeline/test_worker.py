"""How a training process is set up, with stand-ins for what takes long: in which order, and that it shows life."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import worker
from pipeline.config import ModelConfig
from tests.unit.pipeline.test_launch import job

TINY = {"embed_dim": 12, "depths": [1], "num_heads": [3], "window_size": 8, "squeeze_factor": 6}


def test_signs_of_life_between_the_parts_and_the_batch_is_found_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def part(name: str, gives: Any = None) -> Any:
        return lambda *arguments, **options: done.append(name) or gives

    context = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_node_rank=lambda: 0, get_local_rank=lambda: 1
    )
    asked = job(tmp_path, compile=True, micro_batch="auto", cpus_per_worker=torch.get_num_threads())
    asked = asked.model_copy(update={"model": ModelConfig(arch="hat", options=TINY)})
    network = worker.fresh_network(asked)
    monkeypatch.setattr(network, "compile", part("compile"))
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(worker.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    for name, used in {
        "_agree": lambda mine, device: mine,
        "_mark": lambda device: "mark",
        "keep_freed_memory": lambda: None,
        "peak_macs_per_s": lambda device, bf16: 1.0,
        "_start": part("start", (network, None, {"step": 0, "data_step": 0}, None)),
        "find_micro_batch": part("batch", 4),
        "_loader": part("loader", []),
    }.items():
        monkeypatch.setattr(worker, name, used)
    engine = SimpleNamespace(train=lambda: None)
    monkeypatch.setattr(worker.zero, "initialize", part("engine", engine))
    monkeypatch.setattr(worker.zero, "PartitionedEMA", lambda engine, decay: None)
    monkeypatch.setattr(worker.zero, "optimizer_of", lambda engine: None)
    mailbox = SimpleNamespace(post=SimpleNamespace(remote=lambda record: None))
    worker.set_up(asked, mailbox, None, part("alive"))
    told = "alive start alive alive batch compile alive engine alive loader alive"
    assert done == told.split()
