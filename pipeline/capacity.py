"""`hatchery plan` for GPUs: what a recipe needs on a cluster, before anything is rented: memory, traffic, days."""

import math
import time
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from data_prep.loader import micro_batches_per_step
from model import build
from model.losses import build_loss
from model.precision import has_bf16
from pipeline.arithmetic import macs_per_sample
from pipeline.autobatch import CPU_TEMPORARIES, MARGIN
from pipeline.config import PhaseConfig, Recipe
from pipeline.memory import FP32, MOMENTS, StateBytes, parameter_count, saved_bytes, training_pass

GB = 1e9
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Machines:
    """The cluster asked about; memory in GB per GPU."""

    nodes: int
    gpus_per_node: int
    gpu_memory_gb: float

    @property
    def gpus(self) -> int:
        """Training processes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Sample:
    """What one sample of one training costs: bytes kept for the backward pass by checkpointing, seconds, GMACs."""

    kept: dict[str, float]
    time_s: float
    gmacs: float


def measures_in_bf16(phase: PhaseConfig) -> bool:
    """Whether a sample is measured in bf16: where the phase may use it, and this machine's CPU computes in it.

    Where bf16 is only emulated it would take minutes, and its time would say nothing.
    """
    return phase.precision != "fp32" and has_bf16(torch.device("cpu"))


def measure_sample(recipe: Recipe, training: str, bf16: bool) -> Sample:
    """Forward and backward pass of one small sample on this machine's CPU, scaled to the recipe's patch."""
    scale, phase = recipe.trainings[training].scale, recipe.phases[recipe.trainings[training].phase]
    kept: dict[str, float] = {}
    time_s = gmacs = 0.0
    for checkpointing in ("none", "block"):
        network = build(recipe.model.arch, scale, **recipe.model.options | {"checkpoint": checkpointing})
        side = min(2 * network.multiple, phase.patch_px)
        area = (phase.patch_px / side) ** 2
        work = training_pass(network, build_loss(phase.loss), 1, side, scale, bf16)
        kept[checkpointing] = area * saved_bytes(network, work)
        if checkpointing == "none":
            begin = time.perf_counter()
            work()
            time_s = area * (time.perf_counter() - begin)
            gmacs = area * macs_per_sample(network, side) / 1e9
    return Sample(kept, time_s, gmacs)


def states(recipe: Recipe, training: str, machines: Machines, stage: int, *, offload: bool = False) -> StateBytes:
    """The model's state per GPU at a ZeRO stage."""
    asked = {"zero_stage": stage, "offload": "optimizer" if offload else "none"}
    return StateBytes.of(_weightless(recipe, training), recipe.compute.model_copy(update=asked), machines.gpus)


def _weightless(recipe: Recipe, training: str) -> nn.Module:
    """A training's network on the meta device: its shapes alone."""
    with torch.device("meta"):
        return build(recipe.model.arch, recipe.trainings[training].scale, **recipe.model.options)


def samples_that_fit(state: float, per_sample: float, machines: Machines) -> int:
    """How many samples a GPU can take at a time beside the state."""
    free = (1 - MARGIN) * machines.gpu_memory_gb * GB - state
    return max(0, int(free / (per_sample * CPU_TEMPORARIES)))


def memory_table(recipe: Recipe, training: str, machines: Machines, sample: Sample) -> Table:
    """Per ZeRO stage: bytes of each kind on each GPU, and how many samples fit with and without checkpointing."""
    table = Table(title=f"{training}: memory per GPU in GB (of {machines.gpu_memory_gb:g})", title_justify="left")
    for name in ("ZeRO", "weights", "gradients", "optimizer", "EMA", "state", "on host", "samples", "checkpointed"):
        table.add_column(name, justify="right")
    for stage in ZERO_STAGES:
        for offload in (False, True) if stage else (False,):
            found = states(recipe, training, machines, stage, offload=offload)
            parts = (found.weights, found.gradients, found.optimizer, found.ema, found.total, found.host)
            fits = [samples_that_fit(found.total, sample.kept[kind], machines) for kind in ("none", "block")]
            name = f"{stage}{' + offload' if offload else ''}"
            table.add_row(name, *(f"{part / GB:.2f}" for part in parts), *(str(fit or "none") for fit in fits))
    return table


def training_table(
    recipe: Recipe, machines: Machines, sample: Sample, step_time_s: float | None, image_kb: float
) -> Table:
    """Per training: steps, days, images read per node, checkpoint traffic."""
    table = Table(title="time and traffic", title_justify="left")
    for name in ("training", "steps", "global batch", "s/step", "days", "MB/s read per node", "GB uploaded"):
        table.add_column(name, justify="left" if name == "training" else "right")
    for name, training in recipe.trainings.items():
        phase = recipe.phases[training.phase]
        step_s = step_time_s or sample.time_s * -(-phase.global_batch // machines.gpus)
        saves = num_checkpoints(phase, step_s, recipe.compute.checkpoint_every_s)
        table.add_row(
            name,
            str(steps_of(phase, step_s)),
            str(phase.global_batch),
            f"{step_s:.3g}",
            f"{steps_of(phase, step_s) * step_s / 86400:.2f}",
            f"{phase.global_batch / step_s / machines.nodes * image_kb / 1e3:.2f}",
            f"{saves * checkpoint_bytes(recipe, name) / GB:.1f}",
        )
    return table


def num_checkpoints(phase: PhaseConfig, step_s: float, every_s: float | None) -> int:
    """Checkpoints of a training: at its phase's steps, and by the clock where those are further apart."""
    between = min(phase.checkpoint_every, every_s / step_s) if every_s else phase.checkpoint_every
    return math.ceil(steps_of(phase, step_s) / max(between, 1))


def steps_of(phase: PhaseConfig, step_s: float) -> int:
    """The steps of a training: those of its phase, or as many as its minutes hold."""
    return phase.steps or max(1, round((phase.minutes or 0) * 60 / step_s))


def checkpoint_bytes(recipe: Recipe, training: str) -> float:
    """A checkpoint of all ranks together: weights, Adam's moments, averages, in fp32."""
    return float(FP32 * (2 + MOMENTS) * parameter_count(_weightless(recipe, training)))


def notes(recipe: Recipe, training: str, machines: Machines, sample: Sample, given: bool) -> list[str]:
    """What the tables leave out, in a line each."""
    phase = recipe.phases[recipe.trainings[training].phase]
    lines = [
        f"one sample keeps {sample.kept['none'] / GB:.3f} GB for the backward pass, {sample.kept['block'] / GB:.3f} GB "
        f"with activation_checkpoint=block, and takes {sample.gmacs:.1f} GMACs forward; measured on this machine",
        f"a checkpoint has {checkpoint_bytes(recipe, training) / GB:.2f} GB in the storage, "
        f"{checkpoint_bytes(recipe, training) / machines.gpus / GB:.3f} GB from each GPU",
        "step times are given by --step-time"
        if given
        else "step times are one process of this machine's CPU for each GPU: measure yours and give --step-time",
    ]
    if phase.precision != "fp32" and not measures_in_bf16(phase):
        lines.append("measured in fp32, since this CPU has no bf16: in bf16, as GPUs take it, a sample keeps less")
    if phase.perceptual or phase.adversarial:
        lines.append("perceptual and adversarial losses are left out: VGG's activations, the discriminator, their time")
    passes = micro_batches_per_step(phase.global_batch, 1, machines.gpus)
    if phase.global_batch % machines.gpus:
        used = phase.global_batch / (passes * machines.gpus)
        lines.append(
            f"{machines.gpus} GPUs do not divide the global batch {phase.global_batch}: at most {used:.0%} of them work"
        )
    return lines
