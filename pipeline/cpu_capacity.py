"""`hatchery plan` for machines without GPUs: how many processes on how many cores, memory, hours, on this processor."""

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from rich.table import Table

from pipeline import capacity, estimate
from pipeline.autobatch import CPU_TEMPORARIES, MARGIN, useful_sizes
from pipeline.capacity import GB, Sample
from pipeline.config import PhaseConfig, Recipe

PROCESS_GB = 0.8
"""Of a training process before any tensor: Python, PyTorch, DeepSpeed, the loader."""


@dataclass(frozen=True)
class CpuMachines:
    """The machines asked about; cores and memory in GB of each."""

    nodes: int
    cpus: int
    memory_gb: float

    @classmethod
    def asked(cls, nodes: int, cpus: int | None, memory_gb: float | None) -> "CpuMachines":
        """As given, else as this machine."""
        here_gb = psutil.virtual_memory().available / GB
        return cls(nodes, cpus or estimate.available_cpus(), memory_gb or here_gb)


@dataclass(frozen=True)
class Way:
    """One way to spread a training over the machines. hours: of all trainings; memory_gb: of each machine."""

    processes: int
    threads: int
    micro_batch: int
    memory_gb: float
    macs_per_s: float
    hours: float
    fits: bool


def ways(recipe: Recipe, training: str, machines: CpuMachines, sample: Sample) -> list[Way]:
    """Every sensible number of processes, from one on each machine to one on each core."""
    macs, phase = estimate.Macs(recipe.model), recipe.phases[recipe.trainings[training].phase]
    smallest = min(used.global_batch for used in recipe.used_phases)
    return [
        _way(recipe, training, machines, sample, count, _measured(recipe, phase, machines.cpus // count), macs)
        for count in _counts(machines.cpus)
        if count * machines.nodes <= smallest or count == 1
    ]


def _counts(cpus: int) -> Iterator[int]:
    """Processes on a machine: 1, 2, 4 ... and its cores."""
    count = 1
    while count < cpus:
        yield count
        count *= 2
    yield cpus


def _measured(recipe: Recipe, phase: PhaseConfig, threads: int) -> float:
    """Multiply-adds per second of a process on so many cores; beyond those that are here, in proportion."""
    here = min(threads, estimate.available_cpus())
    return estimate.measured_macs_per_s(recipe, phase, here) * threads / here


def _way(
    recipe: Recipe,
    training: str,
    machines: CpuMachines,
    sample: Sample,
    count: int,
    macs_per_s: float,
    macs: estimate.Macs,
) -> Way:
    processes = count * machines.nodes
    phase = recipe.phases[recipe.trainings[training].phase]
    state = capacity.states(
        recipe, training, capacity.Machines(machines.nodes, count, machines.memory_gb), recipe.compute.zero_stage
    )
    fixed_gb = PROCESS_GB + (state.total + state.host) / GB
    sample_gb = sample.kept[recipe.compute.activation_checkpoint] * CPU_TEMPORARIES / GB
    free_gb = (1 - MARGIN) * machines.memory_gb / count - fixed_gb
    sizes = list(useful_sizes(-(-phase.global_batch // processes)))
    fitting = next((size for size in sizes if size * sample_gb <= free_gb), 0)
    hours = sum(_hours(recipe, name, processes, macs_per_s, macs) for name in recipe.trainings)
    memory_gb = count * (fixed_gb + max(fitting, 1) * sample_gb)
    return Way(processes, machines.cpus // count, fitting, memory_gb, macs_per_s, hours, bool(fitting))


def _step_s(recipe: Recipe, training: str, processes: int, macs_per_s: float, macs: estimate.Macs) -> float:
    compute = recipe.compute.model_copy(update={"num_workers": processes})
    pace = estimate.Pace(macs_per_s, "")
    return estimate.step_time_s(recipe.model_copy(update={"compute": compute}), training, pace, macs)


def _hours(recipe: Recipe, training: str, processes: int, macs_per_s: float, macs: estimate.Macs) -> float:
    step_s = _step_s(recipe, training, processes, macs_per_s, macs)
    phase = recipe.phases[recipe.trainings[training].phase]
    return (phase.minutes or capacity.steps_of(phase, step_s) * step_s / 60) / 60


def ways_table(found: list[Way], machines: CpuMachines) -> Table:
    """The ways beside one another."""
    each = f"{machines.cpus} cores and {machines.memory_gb:.1f} GB"
    table = Table(title=f"processes on {machines.nodes} x {each}", title_justify="left")
    for name in ("processes", "cores each", "samples at a time", "GB per machine", "hours in all"):
        table.add_column(name, justify="right")
    for way in found:
        fits = str(way.micro_batch) if way.fits else "none fits"
        table.add_row(str(way.processes), str(way.threads), fits, f"{way.memory_gb:.1f}", f"{way.hours:.3g}")
    return table


def trainings_table(recipe: Recipe, way: Way) -> Table:
    """Per training, the best way: steps, seconds per step, hours, checkpoint traffic."""
    macs = estimate.Macs(recipe.model)
    table = Table(title="time and traffic", title_justify="left")
    for name in ("training", "steps", "global batch", "s/step", "hours", "GB uploaded"):
        table.add_column(name, justify="left" if name == "training" else "right")
    for name, training in recipe.trainings.items():
        phase = recipe.phases[training.phase]
        step_s = _step_s(recipe, name, way.processes, way.macs_per_s, macs)
        saves = capacity.num_checkpoints(phase, step_s, recipe.compute.checkpoint_every_s)
        table.add_row(
            name,
            str(capacity.steps_of(phase, step_s)),
            str(phase.global_batch),
            f"{step_s:.3g}",
            f"{_hours(recipe, name, way.processes, way.macs_per_s, macs):.3g}",
            f"{saves * capacity.checkpoint_bytes(recipe, name) / GB:.1f}",
        )
    return table


def best_of(found: list[Way]) -> Way | None:
    """The fastest way that fits, of equal ones the one with fewer processes; None where none fits."""
    return min((way for way in found if way.fits), key=lambda way: (round(way.hours, 3), way.processes), default=None)


def notes(recipe: Recipe, training: str, best: Way | None, sample: Sample, machines: CpuMachines) -> list[str]:
    """What the tables leave out, and the settings of the best way."""
    lines = [
        f"one sample keeps {sample.kept['none'] / GB:.3f} GB for the backward pass, {sample.kept['block'] / GB:.3f} GB "
        f"with activation_checkpoint=block, and takes {sample.gmacs:.1f} GMACs forward",
        "times come from a pass through two blocks of the network on this processor, each process alone: several at "
        "once share its memory and may take longer",
    ]
    if machines.cpus > estimate.available_cpus():
        lines.append(f"this machine has {estimate.available_cpus()} cores: more are taken to be as much faster")
    phase = recipe.phases[recipe.trainings[training].phase]
    if phase.perceptual or phase.adversarial:
        lines.append("perceptual and adversarial losses are left out: VGG's activations, the discriminator, their time")
    if best is None:
        lines.append(
            f"not one sample fits in {machines.memory_gb:.1f} GB: set compute.activation_checkpoint=block, a smaller "
            f"phase patch_px, or take machines with more memory"
        )
    else:
        asked = {"num_workers": best.processes, "cpus_per_worker": best.threads, "micro_batch": best.micro_batch}
        settings = " ".join(f"--set compute.{key}={value}" for key, value in asked.items())
        lines.append(f"fastest of these: {settings} --set compute.use_gpu=false")
    return lines
