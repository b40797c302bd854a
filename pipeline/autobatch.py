"""`micro_batch: auto`: as many samples per forward pass as fit, found by trying one and two.

Memory grows by the same amount with every sample, so two trials tell how many fit. On a GPU the answer is tried, too,
and lowered while it does not fit. The global batch does not move: accumulation follows from the micro-batch.
"""

import math
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from model.limits import free_memory_bytes
from model.losses import Loss
from model.memory import is_out_of_memory
from pipeline.config import ComputeConfig, PhaseConfig
from pipeline.memory import StateBytes, saved_bytes, training_pass

MARGIN = 0.15  # of the limit is left free: allocators fragment, and batches of other passes overlap
CPU_TEMPORARIES = 1.5  # of what a forward pass keeps for the backward pass, both passes need at their peak


def find_micro_batch(
    network: nn.Module, loss: Loss, phase: PhaseConfig, compute: ComputeConfig, scale: int, bf16: bool
) -> int:
    """Collective: the largest micro-batch that fits on every rank; the network is on its device, without gradients.

    ValueError on all ranks where not even one sample fits on some.
    """
    device, world_size = next(network.parameters()).device, dist.get_world_size()
    limit = (1 - MARGIN) * memory_limit(compute, device)
    limit -= StateBytes.of(network, compute, world_size).total
    one, two = (_needed(network, loss, phase, size, scale, bf16) for size in (1, 2))
    fitting = int((limit - (2 * one - two)) / max(two - one, 1)) if math.isfinite(two) else int(math.isfinite(one))
    share = -(-phase.global_batch // world_size)
    chosen = next((size for size in useful_sizes(share) if size <= fitting), 0)
    while chosen > 2 and device.type == "cuda" and math.isinf(_needed(network, loss, phase, chosen, scale, bf16)):
        chosen = next(size for size in useful_sizes(share) if size < chosen)
    vote = torch.tensor(chosen, device=device)
    dist.all_reduce(vote, dist.ReduceOp.MIN)
    if not vote.item():
        needed = f"{one / 1e9:.3f} GB needed here" if math.isfinite(one) else "out of memory when tried here"
        raise ValueError(
            f"not one sample of patch_px {phase.patch_px} fits in {max(limit, 0) / 1e9:.3f} GB beside the model's "
            f"state ({needed}): set compute.activation_checkpoint=block or a higher compute.zero_stage"
        )
    return int(vote.item())


def useful_sizes(share: int) -> Iterator[int]:
    """Micro-batches for a rank's share of the global batch, falling: the smallest for each number of passes."""
    sizes = {-(-share // passes) for passes in range(1, share + 1)}
    yield from sorted(sizes, reverse=True)


def memory_limit(compute: ComputeConfig, device: torch.device) -> float:
    """Bytes that a training process may use: as configured, the GPU's, or this process's share of the host's."""
    if compute.memory_limit_gb is not None:
        return compute.memory_limit_gb * 1e9
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", compute.max_workers))
    return free_memory_bytes() / here


def _needed(network: nn.Module, loss: Loss, phase: PhaseConfig, size: int, scale: int, bf16: bool) -> float:
    """What `_trial` finds; infinite where memory runs out. Raising would leave the other ranks waiting for a vote."""
    try:
        return _trial(network, loss, phase, size, scale, bf16)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    finally:
        torch.cuda.empty_cache()


def _trial(network: nn.Module, loss: Loss, phase: PhaseConfig, size: int, scale: int, bf16: bool) -> float:
    """Bytes beside the model's state that one forward and backward pass of `size` samples needs at its peak."""
    device = next(network.parameters()).device
    work = training_pass(network, loss, size, phase.patch_px, scale, bf16)
    try:
        if device.type != "cuda":
            return CPU_TEMPORARIES * saved_bytes(network, work)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
        return float(torch.cuda.max_memory_allocated(device) - before - gradients)
    finally:
        network.zero_grad(set_to_none=True)
