"""When a checkpoint is wanted beside the phase's own."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.preemption import PreemptionContext
from torch import nn, ones

from pipeline import saving
from pipeline.optimizer import GuardedAdam
from pipeline.saving import SaveWatch


def notice(*nodes: str) -> PreemptionInfo:
    return PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={node: [0] for node in nodes})


def test_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    watch, none = SaveWatch(10, lambda: None), SaveWatch(None, lambda: None)
    now[0] = 109
    assert not watch.poll()
    now[0] = 110
    assert watch.poll()
    assert watch.poll()  # until it is granted
    assert not none.poll()
    watch.saved()
    assert not watch.poll()


def test_the_clock_waits_for_the_upload_of_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is away for hours must not fill the disk; who is about to lose a node saves all the same."""
    now, told = [100.0], [None, notice("a")]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    watch, uploaded = SaveWatch(10, lambda: told[0]), threading.Event()
    watch.saved(uploaded)
    now[0] = 1000
    assert not watch.poll()
    told.reverse()
    assert watch.poll()
    told.reverse()
    uploaded.set()
    assert watch.poll()


def test_once_at_each_notice_of_preemption() -> None:
    told: list[PreemptionInfo | None] = [None]
    watch = SaveWatch(None, lambda: told[0])
    assert not watch.poll()
    told[0] = notice("a")
    assert watch.poll()
    watch.saved()
    told[0] = notice("a")  # the same, told again
    assert not watch.poll()
    told[0] = notice("a", "b")
    assert watch.poll()


def test_rays_own_notice_lies_where_it_is_looked_for() -> None:
    assert "preemption_context" in {field.name for field in dataclasses.fields(TrainContext)}
    assert PreemptionContext().preemption_info is None


def wishing(rank: int, folder: str) -> None:
    """One rank of two, of which the second alone has a notice."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    weight = nn.Parameter(ones(2))
    adam = GuardedAdam([weight], max_norm=None, partitioned=True, device=weight.device)
    watch = SaveWatch(None, lambda: None)
    watch.notice = lambda: notice("a") if rank == 1 else None
    for wanted in (True, False):
        weight.grad = ones(2)
        adam.begin_step(want_save=watch.poll())
        adam.step()
        assert adam.save_wanted == wanted
        watch.saved()
    dist.destroy_process_group()
    Path(folder, f"agreed-{rank}").touch()


def test_a_notice_on_one_rank_makes_all_save(tmp_path: Path) -> None:
    mp.spawn(wishing, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    assert {name for name in os.listdir(tmp_path) if name.startswith("agreed")} == {"agreed-0", "agreed-1"}
