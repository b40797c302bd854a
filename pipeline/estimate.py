"""How long stages would take, before they run: from a part of the network, measured here, and stated assumptions.

A network is a head and groups of equal blocks, so networks of one or two blocks tell the multiply-adds of all of it.
What one pass through two blocks takes here tells how many of them this machine does in a second.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from model import build
from model.losses import build_loss
from model.precision import resolve_precision
from model.presets import configure
from pipeline.arithmetic import TRAINING_PASSES, macs_per_sample
from pipeline.config import ComputeConfig, ModelConfig, PhaseConfig, Recipe
from pipeline.memory import training_pass
from pipeline.plan import Amount, Outside, Stage

A100_MACS_PER_S = 2.8e12
"""Of a training on one A100, as published: 800,000 steps of HAT-L, and of HAT, took 8 and 4 days on eight of them."""
SHARDING_BYTES_PER_S = 20e6
"""Of image files that one core decodes and packs."""
CUTTING_BYTES_PER_S = 1.5e6
"""Of image files that one core cuts into PNG crops."""
JUDGED_PX = 0.5e6
"""Of an image to judge by, taken for its true size, which only reading it would tell."""
START_S = 20.0
"""What a training's processes take to start, and an evaluation's."""
SHORT_S = 5.0
"""What any other stage takes."""
_TIMING_S = 0.3


@dataclass(frozen=True)
class Estimated:
    """Seconds by stage, and what they rest on, in a line each."""

    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pace:
    """Multiply-adds per second of one training process, and what that is known from."""

    macs_per_s: float
    source: str


def of_stages(recipe: Recipe, stages: Sequence[Stage], outside: Outside) -> Estimated:
    """How long each of the stages would take, one after the other, where the recipe's training processes run."""
    if not stages:
        return Estimated()
    pace = pace_of(recipe)
    macs = Macs(recipe.model)
    seconds = {stage.name: _seconds(recipe, stage, outside, pace, macs) for stage in stages}
    notes = [f"times are estimates: {pace.source}"]
    if {stage.kind for stage in stages} & {"shard", "evaluate"}:
        notes.append(
            f"assumed as well: {SHARDING_BYTES_PER_S / 1e6:g} MB of image files sharded a second and core "
            f"({CUTTING_BYTES_PER_S / 1e6:g} where they are cut), images of {JUDGED_PX / 1e6:g} megapixels to judge by"
        )
    return Estimated(seconds, notes)


def in_words(seconds: float) -> str:
    """A time as people say it: about 40 s, 7 min, 3 h, 8 days."""
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"about {seconds / length:.2g} {unit}"
    return f"about {max(1, round(seconds))} s"


def on_gpus(compute: ComputeConfig) -> bool:
    """Whether trainings take GPUs, as far as can be told without the cluster."""
    return torch.cuda.is_available() if compute.use_gpu == "auto" else compute.use_gpu


def pace_of(recipe: Recipe) -> Pace:
    """How fast one of the recipe's training processes is: measured on this machine's CPU, assumed for GPUs."""
    compute = recipe.compute
    if on_gpus(compute):
        text = f"{compute.max_workers} GPUs as fast as the A100s of the published trainings (HAT: 4 days on eight)"
        return Pace(A100_MACS_PER_S, text)
    phase = next(iter(recipe.used_phases))
    macs_per_s = measured_macs_per_s(recipe, phase, compute.cpus_per_worker)
    cores = available_cpus()
    crowd = max(1.0, compute.max_workers * compute.cpus_per_worker / cores)  # more threads than cores take turns
    text = (
        f"a pass through two blocks of the network, timed on {compute.cpus_per_worker} of this machine's {cores} "
        f"cores, for {compute.max_workers} processes"
    )
    return Pace(macs_per_s / crowd, text)


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measured_macs_per_s(recipe: Recipe, phase: PhaseConfig, threads: int) -> float:
    """Multiply-adds per second of a forward and backward pass through two blocks, on so many threads of this CPU."""
    scale = next(iter(recipe.trainings.values())).scale
    network = _small(recipe.model, scale, (1, 1))
    side = _side(recipe.model, scale, phase)
    bf16 = resolve_precision(phase.precision, torch.device("cpu")) == "bf16"
    with using_threads(threads):
        macs = TRAINING_PASSES * macs_per_sample(network, side)
        work = training_pass(network, build_loss(phase.loss), 1, side, scale, bf16)
        work()  # kernels are chosen, memory is fetched
        return macs / min(_timed(work))


def _timed(work: Callable[[], None]) -> Iterator[float]:
    """Seconds of a few calls; the best of them tells what is possible beside other programs."""
    begin, calls = time.perf_counter(), 0
    while calls < 2 or (calls < 5 and time.perf_counter() - begin < _TIMING_S):
        called = time.perf_counter()
        work()
        calls += 1
        yield time.perf_counter() - called


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """PyTorch computes with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Macs:
    """Multiply-adds of a model's networks per low-resolution pixel, from networks of one and two blocks.

    The body is the same at every scale and counted once. Networks whose levels differ (hat_unet) are counted whole.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.at_scale: dict[int, float] = {}
        self.body: float | None = None
        """Of all blocks but the first."""

    def per_px(self, scale: int) -> float:
        """At one scale."""
        if scale not in self.at_scale:
            self.at_scale[scale] = self._count(scale)
        return self.at_scale[scale]

    def _count(self, scale: int) -> float:
        config = configure(self.model.arch, scale, **self.model.options)
        one = _counted(_small(self.model, scale, (1,)), config.multiple)
        if _has_levels(self.model):
            return one
        if self.body is None:
            block = _counted(_small(self.model, scale, (2,)), config.multiple) - one
            group = _counted(_small(self.model, scale, (1, 1)), config.multiple) - one - block
            self.body = (sum(config.depths) - 1) * block + (len(config.depths) - 1) * group
        return one + self.body


def _has_levels(model: ModelConfig) -> bool:
    return model.arch == "hat_unet"


def _counted(network: Any, side: int) -> float:
    return macs_per_sample(network, side) / side**2


def _small(model: ModelConfig, scale: int, depths: tuple[int, ...]) -> Any:
    """The network with so few blocks, of the same width; one with levels as it is."""
    if _has_levels(model):
        return build(model.arch, scale, **model.options)
    heads = configure(model.arch, scale, **model.options).num_heads[:1] * len(depths)
    return build(model.arch, scale, **model.options | {"depths": list(depths), "num_heads": list(heads)})


def _side(model: ModelConfig, scale: int, phase: PhaseConfig) -> int:
    """Side of the sample that is timed, px: as in training, or four windows, which are enough."""
    return min(phase.patch_px, 4 * configure(model.arch, scale, **model.options).multiple)


def step_time_s(recipe: Recipe, training: str, pace: Pace, macs: Macs) -> float:
    """Seconds of one optimizer step of a training."""
    phase = recipe.phases[recipe.trainings[training].phase]
    samples = -(-phase.global_batch // recipe.compute.max_workers)
    per_px = macs.per_px(recipe.trainings[training].scale)
    return TRAINING_PASSES * per_px * phase.patch_px**2 * samples / pace.macs_per_s


def _seconds(recipe: Recipe, stage: Stage, outside: Outside, pace: Pace, macs: Macs) -> float:
    if stage.kind == "train":
        training = recipe.trainings[stage.name]
        phase = recipe.phases[training.phase]
        if phase.minutes is not None:
            return START_S + phase.minutes * 60
        assert phase.steps is not None
        return START_S + phase.steps * step_time_s(recipe, stage.name, pace, macs)
    if stage.kind == "shard":
        name = stage.name.removeprefix("shard-")
        rate = SHARDING_BYTES_PER_S if recipe.data[name].sub_image_px is None else CUTTING_BYTES_PER_S
        return SHORT_S + outside.amounts.get(name, Amount()).bytes / rate / available_cpus()
    if stage.kind == "evaluate":
        images = sum(outside.amounts.get(name, Amount()).images for name in recipe.evaluate.sets)
        scales = [recipe.trainings[name].scale for name in recipe.final_trainings]
        work = sum(images * macs.per_px(scale) * JUDGED_PX / scale**2 for scale in scales)
        return START_S + work / pace.macs_per_s / recipe.compute.max_workers
    return SHORT_S
