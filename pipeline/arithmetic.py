"""How much of the processor's arithmetic a training uses: multiply-adds of the network against a measured peak."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import WindowScores
from model.hat import OverlappingAttentionBlock
from model.hmanet import PositionedAttention

TRAINING_PASSES = 3  # forward, gradients of the inputs, gradients of the weights
_SIZE = {"cpu": 1024, "cuda": 8192}


def macs_per_sample(network: nn.Module, patch_px: int) -> float:
    """Multiply-adds of one forward pass of one (3, patch_px, patch_px) sample: linear layers, convolutions, attention.

    Counted in a real forward pass; elementwise work, normalization and softmax are left out, as usual.
    """
    counted = 0.0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal counted
        if isinstance(module, nn.Conv2d):
            counted += module.weight[0].numel() * output.numel()
        elif isinstance(module, nn.Linear):
            counted += module.in_features * output.numel()
        elif isinstance(module, WindowScores | OverlappingAttentionBlock):
            keys = inputs[1].shape[-1]  # of the index from queries to keys
            counted += 2 * keys * output.numel()
        elif isinstance(module, PositionedAttention):
            height, width = inputs[1]
            counted += 2 * height * width * output.numel()

    kinds = (nn.Conv2d, nn.Linear, WindowScores, OverlappingAttentionBlock, PositionedAttention)
    handles = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, kinds)]
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, patch_px, patch_px, device=next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return counted


def peak_macs_per_s(device: torch.device, bf16: bool) -> float:
    """What a plain matrix product reaches on this device and its present number of threads."""
    size = _SIZE["cuda" if device.type == "cuda" else "cpu"]
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best_s = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - begin)
    return size**3 / best_s
