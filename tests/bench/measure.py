"""Times and bytes of two ways to do the same, measured in turn so that the machine's mood hits both alike."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline import memory

PASSES = 3
"""Of each side in a turn."""


@dataclass
class Samples:
    """Wall times of one thing, in seconds."""

    quiet: list[float] = field(default_factory=list)
    """While other processes took less than a tenth of one core."""
    all: list[float] = field(default_factory=list)

    @property
    def time_s(self) -> float:
        """Median of the quiet samples; without any, the shortest of all."""
        return sorted(self.quiet)[len(self.quiet) // 2] if self.quiet else min(self.all)


def _busy_s() -> float:
    """CPU time that all processes of the machine have used."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, file.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def race(
    makers: dict[str, Callable[[], Callable[[], object]]], rounds: int = 7, limit_s: float = 120
) -> dict[str, Samples]:
    """Time what each maker makes in turn until all have `rounds` quiet samples, or for `limit_s`.

    Each has a process of its own, as it would in use: in one process, what one side asks of the allocator decides
    what the other's memory costs. In its turn it runs PASSES times, of which the first, with cold caches, is not
    counted. A first round warms up.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        lanes = {
            name: stack.enter_context(ProcessPoolExecutor(1, context, initializer=_take_up, initargs=(make,)))
            for name, make in makers.items()
        }
        for lane in lanes.values():
            lane.submit(_turn).result()
        samples = {name: Samples() for name in makers}
        stop = time.monotonic() + limit_s
        while time.monotonic() < stop and min(len(sample.quiet) for sample in samples.values()) < rounds:
            for name, lane in lanes.items():
                for taken, others in lane.submit(_turn).result():
                    samples[name].all.append(taken)
                    if others < 0.1 * taken + 0.02:
                        samples[name].quiet.append(taken)
    return samples


_RUNS: list[Callable[[], object]] = []
"""What this process runs in its turn."""


def _take_up(make: Callable[[], Callable[[], object]]) -> None:
    _RUNS.append(make())


def _turn() -> list[tuple[float, float]]:
    """Of each counted pass: seconds that it took, CPU seconds that other processes had meanwhile."""
    (run,) = _RUNS
    run()
    passes = []
    for _ in range(PASSES - 1):
        busy, own, start = _busy_s(), time.process_time(), time.perf_counter()
        run()
        taken = time.perf_counter() - start
        passes.append((taken, _busy_s() - busy - (time.process_time() - own)))
    return passes


def saved_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass: distinct storages, parameters and buffers excluded."""
    return memory.saved_bytes(network, lambda: network(x))
