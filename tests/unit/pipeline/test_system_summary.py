"""How much of a training MLflow is told."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import stages, system_summary, train
from pipeline.config import ComputeConfig, PhaseConfig
from pipeline.system_summary import SystemSummary
from tests.unit.pipeline.loop import run_of

NODE = ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage")
GPU = ("memory_usage_percentage", "utilization_percentage")
METRICS = 16  # of a training with a discriminator on a GPU


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(system_summary, "time", clock)
    return clock


def usage(node: int, gpus: int) -> dict[str, float]:
    names = [*NODE, *(f"gpu_{gpu}_{name}" for gpu in range(gpus) for name in GPU)]
    return {f"system/node{node}/{name}": float(node + 1) for name in names}


def test_nodes_and_gpus_are_told_of_together(clock: Clock) -> None:
    summary = SystemSummary()
    assert summary.add({"system/node0/cpu_utilization_percentage": 30.0}, 1, 100) == {
        "system/cpu_utilization_percentage": 30.0
    }
    for node in (0, 1, 2):
        clock.now += 30
        found = summary.add(usage(node, 2), 10 * node + 10, 100)
        assert bool(found) == (node == 1)
        if found:
            gpus = {f"system/gpu_utilization_percentage{end}": value for end, value in (("_min", 1), ("_max", 2))}
            assert found.items() >= {"system/disk_usage_percentage": 1.5, **gpus}.items()
            assert len(found) == 3 * (len(NODE) + len(GPU))
    clock.now += 1000  # the others have left the cluster meanwhile
    assert summary.add(usage(1, 2), 90, 100)["system/gpu_utilization_percentage_max"] == 2


def rows(clock: Clock, nodes: int, steps: int, step_s: float, every: int) -> int:
    """Metrics sent by a training, every node telling its own at each log."""
    sent: list[int] = []
    tracker = SimpleNamespace(log_metrics=lambda run_id, metrics, step: sent.append(len(metrics)))
    display = SimpleNamespace(update=lambda *told: None)
    work: Any = SimpleNamespace(tracker=tracker, run_id="r", stage=SimpleNamespace(name="t"), display=display)
    handle = stages._training_records(work, {})
    for step in range(every, steps + 1, every):
        clock.now += every * step_s
        handle({"step": step, "metrics": {f"m{number}": 1.0 for number in range(METRICS)}, "steps": steps})
        for node in range(nodes):
            handle({"step": step, "system": usage(node, 8)})
    return sum(sent)


def test_rows_grow_with_steps_alone(clock: Clock) -> None:
    few, many = (rows(clock, nodes, 20_000, 1.5, 100) for nodes in (2, 8))
    assert few == many
    assert rows(clock, 2, 40_000, 1.5, 100) == pytest.approx(2 * few, rel=0.02)


@pytest.mark.parametrize(("log_every", "step_s"), [(1, 1.5), (100, 1.5), (1, 600.0)])
def test_no_setting_makes_more_rows_than_a_training_may_have(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, log_every: int, step_s: float
) -> None:
    """On a two-hundredth of 800,000 steps and of the limits."""
    series = 3 * (len(NODE) + len(GPU))
    assert train.MOST_LOGS * METRICS + system_summary.MOST_POINTS * 3 * 8 < 2e6
    monkeypatch.setattr(train, "MOST_LOGS", train.MOST_LOGS // 200)
    monkeypatch.setattr(system_summary, "MOST_POINTS", system_summary.MOST_POINTS // 200)
    phase = PhaseConfig(data="d", steps=4000, log_every=log_every)
    every = train.log_interval(run_of(phase, ComputeConfig(), {}))
    assert rows(clock, 8, 4000, step_s, every) <= train.MOST_LOGS * METRICS + system_summary.MOST_POINTS * series
