"""What `hatchery plan` prints, for GPUs and for CPUs."""

import torch
from rich.console import Console

from model.precision import resolve_precision
from pipeline import capacity, cpu_capacity
from pipeline.config import Recipe

_USUAL_GPUS = 8


def gpus_wanted(recipe: Recipe) -> int | None:
    """GPUs of a machine that the recipe is planned for where nobody says; None: it trains on CPUs."""
    if recipe.compute.use_gpu is True:
        return _USUAL_GPUS
    return None if recipe.compute.use_gpu is False else torch.cuda.device_count() or None


def for_gpus(
    recipe: Recipe,
    nodes: int,
    gpus_per_node: int,
    gpu_memory_gb: float,
    step_time_s: float | None,
    image_kb: float,
    console: Console,
) -> None:
    """Print memory per ZeRO stage, time and traffic on GPUs. ValueError for more GPUs than samples in a batch."""
    machines = capacity.Machines(nodes, gpus_per_node, gpu_memory_gb)
    for phase in recipe.phases.values():
        if phase.global_batch < machines.gpus:
            raise ValueError(f"{machines.gpus} GPUs are more than the global batch {phase.global_batch}: use fewer")
    training = next(iter(recipe.trainings))
    bf16 = capacity.measures_in_bf16(recipe.phases[recipe.trainings[training].phase])
    sample = capacity.measure_sample(recipe, training, bf16)
    console.print(capacity.memory_table(recipe, training, machines, sample))
    console.print(capacity.training_table(recipe, machines, sample, step_time_s, image_kb))
    for line in capacity.notes(recipe, training, machines, sample, step_time_s is not None):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def for_cpus(recipe: Recipe, nodes: int, cpus: int | None, memory_gb: float | None, console: Console) -> None:
    """Print ways to spread the trainings over CPUs, and how long the best takes. ValueError for too many machines."""
    machines = cpu_capacity.CpuMachines.asked(nodes, cpus, memory_gb)
    smallest = min(phase.global_batch for phase in recipe.used_phases)
    if nodes > smallest:
        raise ValueError(f"{nodes} machines are more than the global batch {smallest}: use fewer")
    training = next(iter(recipe.trainings))
    precision = recipe.phases[recipe.trainings[training].phase].precision
    bf16 = resolve_precision(precision, torch.device("cpu")) == "bf16"
    sample = capacity.measure_sample(recipe, training, bf16)
    found = cpu_capacity.ways(recipe, training, machines, sample)
    best = cpu_capacity.best_of(found)
    console.print(cpu_capacity.ways_table(found, machines))
    if best is not None:
        console.print(cpu_capacity.trainings_table(recipe, best))
    for line in cpu_capacity.notes(recipe, training, best, sample, machines):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
