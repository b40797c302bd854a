"""Parts that every network here shares: MLP, channel attention, stochastic depth, the upsampling head.

Axes in tensor names: b batch, h height, w width, c channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.lean import Conv2d, Linear, Remake, gelu

NUM_FEAT = 64
"""Channels of the reconstruction head in every published network."""

STAGES: dict[int, tuple[int, ...]] = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}
"""Scale -> factors of its PixelShuffle stages."""


class UpscalingNetwork(nn.Module):
    """What the rest of Hatchery may rely on in a network: low_res (B, 3, H, W) -> high_res (B, 3, sH, sW)."""

    arch: str
    """Name that `build` knows."""
    scale: int
    """Upscaling factor."""
    multiple: int
    """Pixels that height and width of the input must be divisible by."""
    is_residual: bool
    """Whether conv_last reads the body and is added to the input: there is no conv_before_upsample then."""
    config: dict[str, Any]
    """All arguments, JSON-able: `build(**network.config)` makes the same network."""

    conv_first: nn.Conv2d
    conv_after_body: nn.Conv2d
    conv_before_upsample: nn.Sequential
    upsample: nn.Sequential
    conv_last: nn.Conv2d

    def check_input(self, x_bchw: Tensor) -> None:
        """ValueError unless x is (B, 3, H, W) with H and W positive multiples of `multiple`."""
        if x_bchw.ndim != 4 or x_bchw.shape[1] != 3:
            raise ValueError(f"input has shape {tuple(x_bchw.shape)}: expected (B, 3, H, W)")
        height, width = x_bchw.shape[2:]
        if height % self.multiple or width % self.multiple or not height or not width:
            raise ValueError(
                f"input is {height} x {width} px, not multiples of {self.multiple}: "
                "pad it, or use model.inference, which pads and crops"
            )


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on the last axis."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        """(..., C) -> (..., C); `remake` of the input."""
        if not torch.is_grad_enabled():
            return self.fc2(self.fc1(x, activation="gelu"))
        hidden = self.fc1(x, remake)
        return self.fc2(gelu(hidden), Remake(hidden, gelu))


def channel_means(x_bchw: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1); the gradient has the channels together, as features have."""
    mean_b11c = x_bchw.permute(0, 2, 3, 1).mean((1, 2), keepdim=True)
    return mean_b11c.permute(0, 3, 1, 2)


class ChannelMeans(nn.Module):
    """`channel_means` as a module; it stands where the published keys count a pooling layer."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        return channel_means(x_bchw)


class ChannelAttention(nn.Module):
    """Squeeze and excitation: a gate for each channel that sees the mean of all channels."""

    def __init__(self, dim: int, squeeze_factor: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            ChannelMeans(),
            nn.Conv2d(dim, dim // squeeze_factor, 1),
            nn.ReLU(),
            nn.Conv2d(dim // squeeze_factor, dim, 1),
            nn.Sigmoid(),
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        return self.attention(x_bchw)


class ChannelAttentionBlock(nn.Module):
    """Two 3x3 convolutions through a narrow middle, then channel attention (CAB of the HAT paper)."""

    def __init__(self, dim: int, compress_ratio: int, squeeze_factor: int) -> None:
        super().__init__()
        self.cab = nn.Sequential(
            Conv2d(dim, dim // compress_ratio, 3, padding=1),
            nn.GELU(),
            Conv2d(dim // compress_ratio, dim, 3, padding=1),
            ChannelAttention(dim, squeeze_factor),
        )

    def forward(self, x_bchw: Tensor, remake: Remake | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> features (B, C, H, W) and their gate (B, C, 1, 1), to be multiplied."""
        narrow, _, wide, attention = self.cab
        middle = narrow(x_bchw, remake)
        features = wide(gelu(middle), Remake(middle, gelu))
        return features, attention(features)


class DropPath(nn.Module):
    """Stochastic depth: in training drops the whole branch of a sample with probability `rate`.

    What is dropped follows torch's generator, or numbers that were set for each sample (`set_drop_path_draws`).
    """

    BRANCHES = 2
    """Branches of a block that share one module: attention and MLP."""

    dropped_kept: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # in the form of a tensor, else each block and each recipe's rate would be compiled by itself
        self.register_buffer("dropped_kept", torch.tensor([rate, 1 - rate]), persistent=False)
        self.draws: Tensor | None = None

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        """(B, ...) -> same; what is kept is divided by 1 - rate."""
        if not self.training or self.rate == 0:
            return x
        draws = torch.rand(len(x), device=x.device) if self.draws is None else self.draws[:, branch]
        dropped, kept = self.dropped_kept.unbind()
        is_kept = draws.reshape((-1,) + (1,) * (x.ndim - 1)) >= dropped
        return x * (is_kept / kept).to(x.dtype)


def drop_paths(network: nn.Module) -> list[DropPath]:
    """All stochastic depth of a network, from its first block to its last."""
    return [module for module in network.modules() if isinstance(module, DropPath)]


def set_drop_path_draws(paths: Sequence[DropPath], draws: Tensor | None) -> None:
    """What the next passes drop: numbers in 0..1, (B, blocks, branches); None: whatever torch's generator gives.

    paths: a network's `drop_paths`, found once: it takes a walk through all its modules. With numbers that belong to
    the samples, a sample trains the same network in whichever batch it lies.
    """
    for number, module in enumerate(paths):
        module.draws = None if draws is None else draws[:, number]


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast leaves alone: the last one, whose rounding would be seen in the image."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W) in the dtype of the weights."""
        with torch.autocast(x_bchw.device.type, enabled=False):
            return super().forward(x_bchw.to(self.weight.dtype))


def upsampler(scale: int) -> nn.Sequential:
    """Per stage of `scale` a 3x3 convolution and a PixelShuffle; no activation between (as published)."""
    layers: list[nn.Module] = []
    for factor in STAGES[scale]:
        layers += [nn.Conv2d(NUM_FEAT, NUM_FEAT * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


def stages_of(state_dict: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Factors of the PixelShuffle stages that a state dict was trained with; () where it has no upsampler."""
    weights = (state_dict.get(f"upsample.{2 * stage}.weight") for stage in range(3))
    return tuple(round((len(weight) / weight.shape[1]) ** 0.5) for weight in weights if weight is not None)


def restoration_head_of(state_dict: Mapping[str, Tensor]) -> str:
    """How the network of a state dict of scale 1 ends, as `restoration_head` names it."""
    return "reconstruction" if "conv_before_upsample.0.weight" in state_dict else "residual"
