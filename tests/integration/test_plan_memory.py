"""What `hatchery plan` says of the model's state, against what DeepSpeed holds in two real processes."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from model import build
from pipeline.config import ComputeConfig, PhaseConfig
from pipeline.memory import StateBytes

pytestmark = pytest.mark.integration

PHASE = PhaseConfig(data="d", steps=2, global_batch=4, patch_px=8)
OPTIONS: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2], "num_heads": [4, 4], "window_size": 8}
STAGES = (0, 1, 2, 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return build("hat", 2, drop_path_rate=0.0, **OPTIONS)


def living_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            if thing.is_leaf and thing.grad is not None:
                storages[thing.grad.untyped_storage().data_ptr()] = thing.grad.untyped_storage().nbytes()
    return sum(storages.values())


def worker(rank: int, folder: Path, stage: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{stage}", rank=rank, world_size=2)
    from pipeline import zero

    before = living_bytes()
    compute = ComputeConfig(num_workers=2, zero_stage=stage)  # type: ignore[arg-type]
    engine = zero.initialize(network(), PHASE, compute, 1, 2, bf16=False)
    ema = zero.PartitionedEMA(engine, 0.9)
    measured = []
    for _ in range(4):  # two passes to a step
        x = torch.rand(1, 3, 8, 8, requires_grad=True)
        x.register_hook(lambda grad: measured.append(living_bytes()))  # the end of the backward pass
        engine.backward(engine(x).square().mean())
        engine.step()
        ema.update()
    if rank == 0:
        (folder / f"measured-{stage}").write_text(str(measured[-1] - before))
    dist.destroy_process_group()


@pytest.mark.parametrize("stage", STAGES)
def test_the_plan_agrees_with_deepspeed(tmp_path: Path, stage: int) -> None:
    mp.spawn(worker, (tmp_path, stage), nprocs=2)  # type: ignore[no-untyped-call]
    measured = int((tmp_path / f"measured-{stage}").read_text())
    planned = StateBytes.of(network(), ComputeConfig(num_workers=2, zero_stage=stage), 2).total  # type: ignore[arg-type]
    assert planned == pytest.approx(measured, rel=0.05)
