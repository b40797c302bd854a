"""Where a training's memory goes: state by ZeRO stage, and what a forward pass keeps for the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.losses import Loss
from pipeline.config import ComputeConfig

FP32 = 4  # bytes
MOMENTS = 2  # of Adam


def bucket_elements(count: int) -> int:
    """The size of DeepSpeed's buffer for gradients on their way; its default of 5e8 elements takes 2 GB."""
    return min(16 * 2**20, count)


@dataclass(frozen=True)
class StateBytes:
    """Bytes per training process of all that does not depend on the batch; weights are fp32, as in `pipeline.zero`.

    weights: the network's; gradients: with DeepSpeed's buffer; optimizer: fp32 partitions and moments; ema: averages;
    host: what offloading moves to the host's memory.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the training device."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @classmethod
    def of(cls, network: nn.Module, compute: ComputeConfig, world_size: int) -> "StateBytes":
        """What training this network takes (also one on the meta device)."""
        fixed = sum(b.nbytes for b in network.buffers())
        count, offload = parameter_count(network), compute.offload == "optimizer"
        return state_bytes(count, compute.zero_stage, world_size, offload=offload, fixed=fixed)


def state_bytes(count: int, zero_stage: int, world_size: int, *, offload: bool = False, fixed: int = 0) -> StateBytes:
    """The state of `count` trained parameters, and `fixed` bytes of buffers, for a ZeRO stage.

    Checked against what DeepSpeed allocates in two processes by tests/integration/test_plan_memory.py.
    """
    whole, part = FP32 * count, FP32 * count / (world_size if zero_stage else 1)
    bucket = FP32 * bucket_elements(count)
    weights = (part if zero_stage == 3 else whole) + fixed
    gradients = (whole if zero_stage < 2 else part) + (bucket if zero_stage else 0)
    master = part if zero_stage else 0.0
    if offload:
        return StateBytes(weights, bucket, 0.0, 0.0, host=2 * part + master + MOMENTS * part)
    return StateBytes(weights, gradients, master + MOMENTS * part, part)


def training_pass(
    network: nn.Module, loss: Loss, size: int, side_px: int, scale: int, bf16: bool
) -> Callable[[], None]:
    """To be called: forward and backward pass of `size` samples of zeros, side_px a side, on the network's device."""
    device = next(network.parameters()).device
    low_res = torch.zeros(size, 3, side_px, side_px, device=device)
    high_res = torch.zeros(size, 3, scale * side_px, scale * side_px, device=device)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = network(low_res)
        loss(output.float(), high_res).backward()

    return work


def parameter_count(network: nn.Module) -> int:
    """Trained parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def saved_bytes(network: nn.Module, work: Callable[[], object]) -> int:
    """Bytes that autograd keeps while `work` runs: unique storages, the network's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = max(storage.nbytes(), seen.get(storage.data_ptr(), 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(seen.values())
