"""The time of DeepSpeed's collectives, by its own hook around them."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

WINDOWS, CALLS, CALL_S = 50, 4, 0.25


@pytest.fixture
def collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`deepspeed.comm` in a process group of one, whose all-reduce takes a quarter of a second by the clock."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from pipeline import communication
    from pipeline.deepspeed import comm, ops

    monkeypatch.setitem(ops.__compatible_ops__, "deepspeed_shm_comm", False)  # else it is compiled
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    comm.init_distributed("gloo", dist_init_required=False, verbose=False)
    clock = SimpleNamespace(now=0.0)

    def all_reduce(*arguments: object, **options: object) -> None:
        clock.now += CALL_S

    monkeypatch.setattr(type(comm.cdb), "all_reduce", all_reduce)
    monkeypatch.setattr(communication, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    yield comm
    dist.destroy_process_group()
    comm.cdb = None


def test_equal_windows_give_equal_figures_and_nothing_piles_up(collectives: Any) -> None:
    from pipeline.communication import CommunicationProbe

    probe, figures = CommunicationProbe(), []
    for _ in range(WINDOWS):
        probe.begin()
        for _ in range(CALLS):
            collectives.all_reduce(torch.ones(8))
        figures.append(probe.end())
        collectives.all_reduce(torch.ones(8))  # not timed
    assert figures == [CALLS * CALL_S] * WINDOWS
    assert sum(len(timer.event_timers) for timer in collectives.timers.get_timers().values()) == 0
    assert not collectives.comms_logger.enabled
    assert collectives.comms_logger.comms_dict == {}


def test_a_collective_within_another_counts_once(collectives: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.communication import CommunicationProbe

    @collectives.timed_op
    def all_reduce_of_all(tensor: torch.Tensor, log_name: str = "a name that DeepSpeed's log does not know") -> None:
        collectives.all_reduce(tensor)

    monkeypatch.setattr("deepspeed.comm.comm.get_msg_size_from_args", lambda *arguments, **options: 8)
    probe = CommunicationProbe()
    probe.begin()
    all_reduce_of_all(torch.ones(8))
    assert probe.end() == CALL_S
