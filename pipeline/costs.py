"""What a network costs beside another: time of one image, measured in turns in one process, and parameters."""

import statistics
import time

import torch

from model.blocks import UpscalingNetwork
from pipeline.gate import Costs

_ROUNDS, _SIDE_PX = 7, 64


def measure_costs(candidate: UpscalingNetwork, rival: UpscalingNetwork) -> Costs:
    """Ratios, candidate over rival. One 64 x 64 image; the median of rounds in which both take turns."""
    ratios = []
    for number in range(_ROUNDS + 1):
        mine, theirs = _seconds(candidate), _seconds(rival)
        if number:  # the first round compiles kernels and fills caches
            ratios.append(mine / theirs)
    return Costs(slowdown=statistics.median(ratios), growth=_parameters(candidate) / _parameters(rival))


@torch.inference_mode()
def _seconds(network: UpscalingNetwork) -> float:
    side = -(-_SIDE_PX // network.multiple) * network.multiple
    x_bchw = torch.zeros(1, 3, side, side, device=network.conv_first.weight.device)
    begin = time.perf_counter()
    network(x_bchw).sum().item()  # item() waits for a GPU
    return time.perf_counter() - begin


def _parameters(network: UpscalingNetwork) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
