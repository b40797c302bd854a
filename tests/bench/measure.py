"""Times and bytes of two ways to do the same, measured in turn so that the machine's mood hits both alike."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline import memory


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


def race(runs: dict[str, Callable[[], object]], rounds: int = 7, limit_s: float = 120) -> dict[str, Samples]:
    """Time each in turn until all have `rounds` quiet samples, or for `limit_s`; a first round warms up."""
    for run in runs.values():
        run()
    samples = {name: Samples() for name in runs}
    stop = time.monotonic() + limit_s
    while time.monotonic() < stop and min(len(sample.quiet) for sample in samples.values()) < rounds:
        for name, run in runs.items():
            busy, own, start = _busy_s(), time.process_time(), time.perf_counter()
            run()
            taken = time.perf_counter() - start
            others = _busy_s() - busy - (time.process_time() - own)
            samples[name].all.append(taken)
            if others < 0.1 * taken + 0.02:
                samples[name].quiet.append(taken)
    return samples


def saved_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass: distinct storages, parameters and buffers excluded."""
    return memory.saved_bytes(network, lambda: network(x))
