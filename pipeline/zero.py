"""DeepSpeed ZeRO: the engine, and its partitioned fp32 state as whole tensors, whatever the stage and world size.

DeepSpeed keeps each rank's share of the fp32 weights and of Adam's moments in flat partitions. The EMA lives on
the same partitions, so that it costs no communication. For a checkpoint each rank gives its partitions as they are,
without communication, and rank 0 their layout; `pipeline.checkpoint.assemble` makes whole tensors of them, which
`restore` cuts for any stage and number of ranks. Checked against DeepSpeed 0.19 by tests/integration/test_zero.py.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_prep.loader import micro_batches_per_step
from pipeline.checkpoint import MOMENTS, Group, Part, State, assemble
from pipeline.config import ComputeConfig, PhaseConfig
from pipeline.deepspeed import deepspeed, ops, utils
from pipeline.memory import bucket_elements
from pipeline.optimizer import GuardedAdam


def initialize(
    network: nn.Module, phase: PhaseConfig, compute: ComputeConfig, micro_batch: int, world_size: int, bf16: bool
) -> Any:
    """A DeepSpeed engine around a network whose weights are already those to start from, on the device to train on.

    bf16 means autocast over fp32 weights: the networks have 10 to 70 M parameters, activations are what weighs.
    Gradients are summed over the ranks in fp32.
    """
    # The shared-memory collective is compiled at first use: 30 s, a compiler, and a lock file that can hang.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = GuardedAdam(
        network.parameters(),
        max_norm=phase.grad_clip,
        partitioned=compute.zero_stage > 0,
        device=next(network.parameters()).device,
        lr=phase.lr,
        betas=phase.betas,
        weight_decay=phase.weight_decay,
    )
    bucket = bucket_elements(sum(p.numel() for p in network.parameters()))
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        config=_config(phase, compute, micro_batch, world_size, bf16, bucket),
        dist_init_required=False,
    )
    return engine


def _config(
    phase: PhaseConfig, compute: ComputeConfig, micro_batch: int, world_size: int, bf16: bool, bucket: int
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": compute.zero_stage, "reduce_bucket_size": bucket}
    if compute.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if compute.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    accumulation = micro_batches_per_step(phase.global_batch, micro_batch, world_size)
    return {
        # of DeepSpeed's own sums alone; where ranks have unequal numbers of samples the losses are weighted
        "train_batch_size": accumulation * micro_batch * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # the list names layers whose gradients (and at ZeRO 3 weights) DeepSpeed sends as bf16, by default all Linear
        # and Conv: sums over ranks would lose 16 bits. What autocast computes in bf16 does not depend on it.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def masters(engine: Any) -> list[Tensor]:
    """This rank's fp32 weights as the optimizer holds them: flat partitions, or the parameters at ZeRO 0."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        return list(optimizer.single_partition_of_fp32_groups)
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


class PartitionedEMA:
    """Exponential moving average of the weights, kept by each rank on its own partitions."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.partitions = [master.detach().clone() for master in masters(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights: ema = decay * ema + (1 - decay) * weights."""
        present = [master.detach() for master in masters(self.engine)]
        torch._foreach_lerp_(self.partitions, present, 1 - self.decay)


def gathered_ema(engine: Any, ema: PartitionedEMA, stage: int) -> dict[str, Tensor]:
    """Collective: the whole averaged weights by name, on every rank."""
    parts = [ema.partitions]
    if stage:
        device = next(engine.module.parameters()).device
        gathered = [_gather(partition.to(device)) for partition in ema.partitions]
        parts = [[ranks[rank] for ranks in gathered] for rank in range(dist.get_world_size())]
    return assemble(parts, layout(engine, stage), interleaved=stage == 3)


def _gather(partition: Tensor) -> list[Tensor]:
    whole = [torch.empty_like(partition) for _ in range(dist.get_world_size())]
    dist.all_gather(whole, partition)
    return whole


def optimizer_of(engine: Any) -> GuardedAdam:
    """The torch optimizer inside DeepSpeed's."""
    found = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert isinstance(found, GuardedAdam)
    return found


@torch.no_grad()
def local_part(engine: Any, ema: PartitionedEMA) -> Part:
    """This rank's partitions of weights, Adam's moments and EMA, copied to the CPU; no communication."""
    state = optimizer_of(engine).state
    partitions = masters(engine)
    part = {"params": [_copy(partition) for partition in partitions], "ema": [_copy(mean) for mean in ema.partitions]}
    for name in MOMENTS:
        part[name] = [_copy(state[p][name] if name in state[p] else torch.zeros_like(p)) for p in partitions]
    return part


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def optimizer_step(engine: Any) -> int:
    """Steps that Adam has taken: those refused for a non-finite gradient do not count."""
    states = optimizer_of(engine).state.values()
    return int(max((float(state["step"]) for state in states if "step" in state), default=0))


def layout(engine: Any, stage: int) -> list[Group]:
    """What lies in each flat partition, in order: (name, shape, elements per rank)."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if stage == 0:
        return [[(name, list(p.shape), p.numel())] for name, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 3:
        groups = engine.optimizer.fp16_groups
        return [[(names[id(p)], list(p.ds_shape), p.ds_tensor.ds_numel) for p in group] for group in groups]
    groups = engine.optimizer.bit16_groups
    return [[(names[id(p)], list(p.shape), p.numel()) for p in group] for group in groups]


@torch.no_grad()
def restore(engine: Any, ema: PartitionedEMA, state: State, steps_taken: int) -> None:
    """Put whole tensors back into this rank's partitions. The module must already hold state["params"]."""
    partitions, moments = masters(engine), optimizer_of(engine).state
    for name in (*MOMENTS, "ema"):
        _scatter(engine, state[name])
        for index, partition in enumerate(partitions):
            if name == "ema":
                ema.partitions[index].copy_(partition.detach())
            else:
                moments[partition][name] = partition.detach().clone()
    for partition in partitions:
        moments[partition]["step"] = torch.tensor(float(steps_taken))
    _scatter(engine, state["params"])


def _scatter(engine: Any, whole: dict[str, Tensor]) -> None:
    """Write whole tensors into the master partitions of this rank."""
    for name, parameter in engine.module.named_parameters():
        value = whole[name].to(torch.float32)
        if hasattr(parameter, "ds_id"):  # stage 3: the library's own setter errs on padded parameters
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            utils.safe_set_local_fp32_param(parameter, padded[dist.get_rank() * size :][:size])
        elif hasattr(parameter, "_hp_mapping"):
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            parameter.data.copy_(value)
