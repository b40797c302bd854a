"""What HAT and HMANet share: everything but the blocks of a group.

A convolution lifts the image to features, groups of attention blocks refine them, a convolution closes the
body, and PixelShuffle stages enlarge. Scale 1 (restoration without upscaling) has the same reconstruction head without
such stages, as other programs have it; with `restoration_head: residual` conv_last reads the body instead and is added
to the input.

Axes in tensor names: b batch, h height, w width, c channels, n/m queries/keys of a window, g kinds of mask.
"""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.blocks import NUM_FEAT, STAGES, Float32Conv2d, UpscalingNetwork, upsampler
from model.init import published_init
from model.lean import Conv2d, Remake, add

Checkpoint = Literal["none", "block"]
RestorationHead = Literal["reconstruction", "residual"]
RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of DIV2K, subtracted from the input as published."""


@dataclass(frozen=True)
class FrameConfig:
    """Arguments that every network has; the defaults are published ones."""

    scale: int
    """Upscaling factor: 1, 2, 3, 4 or 8."""
    embed_dim: int = 180
    """Channels of the body."""
    depths: tuple[int, ...] = (6,) * 6
    """Attention blocks of each group."""
    num_heads: tuple[int, ...] = (6,) * 6
    """Attention heads of each group."""
    window_size: int = 16
    """Side of a window, in low-resolution pixels; even."""
    mlp_ratio: float = 2.0
    """Hidden channels of an MLP per channel."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block; grows from 0 at the first."""
    img_range: float = 1.0
    """Factor on the input after the mean is subtracted."""
    checkpoint: Checkpoint = "none"
    """`block` recomputes each block's activations in the backward pass: less memory, more time."""
    restoration_head: RestorationHead = "reconstruction"
    """How scale 1 ends (others do not ask): `reconstruction`, as at the other scales but without PixelShuffle, which is
    what other programs load; `residual`: one convolution of the body, added to the input."""

    def __post_init__(self) -> None:
        if self.scale not in STAGES:
            raise ValueError(f"scale={self.scale}: choose one of {', '.join(map(str, STAGES))}")
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} need one entry per group each")
        if min(*self.depths, *self.num_heads, self.embed_dim) < 1:
            raise ValueError(f"every size must be positive: {self}")
        for heads in self.num_heads:
            if self.embed_dim % heads:
                raise ValueError(f"embed_dim={self.embed_dim} is not divisible by num_heads={heads}")
        if self.window_size < 2 or self.window_size % 2:
            raise ValueError(f"window_size={self.window_size}: windows shift by half, so it must be even")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} is outside 0 <= rate < 1")
        if self.img_range <= 0 or self.mlp_dim < 1:
            raise ValueError(f"img_range={self.img_range} and mlp_ratio={self.mlp_ratio} must be positive")
        if self.checkpoint not in get_args(Checkpoint):
            raise ValueError(f"checkpoint={self.checkpoint!r}: choose one of {get_args(Checkpoint)}")
        if self.restoration_head not in get_args(RestorationHead):
            raise ValueError(f"restoration_head={self.restoration_head!r}: choose one of {get_args(RestorationHead)}")

    @property
    def has_residual_head(self) -> bool:
        """Whether what the network computes is added to its input."""
        return self.scale == 1 and self.restoration_head == "residual"

    @property
    def multiple(self) -> int:
        """What an input's height and width must be multiples of, in low-resolution pixels."""
        return self.window_size

    @property
    def mlp_dim(self) -> int:
        """Hidden channels of an MLP: the product rounded down, but not for its last digits (60 * (123 / 60) < 123)."""
        return int(round(self.embed_dim * self.mlp_ratio, 6))

    @property
    def drop_path_rates(self) -> list[list[float]]:
        """Stochastic depth of each attention block, per group."""
        rates = torch.linspace(0, self.drop_path_rate, sum(self.depths), device="cpu")
        return [group_rates.tolist() for group_rates in rates.split(self.depths)]


def run_block(block: nn.Module, recompute: bool, *tensors: Tensor) -> Tensor:
    """`block(*tensors)`; with `recompute` its activations are not kept for the backward pass but made again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *tensors, use_reentrant=False)
    return block(*tensors)


class ResidualGroup(nn.Module):
    """Attention blocks and a convolution, added to the group's input."""

    def __init__(self, blocks: nn.Module, dim: int) -> None:
        super().__init__()
        self.residual_group = blocks
        self.conv = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x_bhwc: Tensor, *tables: Tensor) -> Tensor:
        """(B, H, W, C) -> same; `tables` are what the blocks of the network need besides."""
        features_bhwc = self.residual_group(x_bhwc, *tables)
        features_bchw = self.conv(features_bhwc.permute(0, 3, 1, 2))
        return add(x_bhwc, features_bchw.permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """A layer norm; a module of its own only because its published name is `patch_embed.norm`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> same."""
        return self.norm(x_bhwc)


class Frame(UpscalingNetwork):
    """A network around given groups; images are RGB in 0..1.

    Under autocast the features between blocks and the final sum keep the dtype of the input.
    """

    mean: Tensor

    def __init__(self, config: FrameConfig, tables: dict[str, Tensor], groups: list[nn.Module]) -> None:
        """`tables`: buffers by name whose values `self.tables()` hands to each group."""
        super().__init__()
        dim = config.embed_dim
        self.scale = config.scale
        self.is_residual = config.has_residual_head
        self.multiple = config.multiple
        self.config = {"arch": self.arch, **asdict(config)}
        self.config.update(depths=list(config.depths), num_heads=list(config.num_heads))
        self.img_range = config.img_range
        self.register_buffer("mean", torch.tensor(RGB_MEAN).reshape(1, 3, 1, 1), persistent=False)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=name.startswith("relative_position_index"))

        self.conv_first = nn.Conv2d(3, dim, 3, padding=1)
        self.patch_embed = PatchEmbed(dim)
        self.layers = nn.ModuleList(ResidualGroup(blocks, dim) for blocks in groups)
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = Conv2d(dim, dim, 3, padding=1)
        if not self.is_residual:
            self.conv_before_upsample = nn.Sequential(
                nn.Conv2d(dim, NUM_FEAT, 3, padding=1), nn.LeakyReLU(0.01, inplace=True)
            )
            self.upsample = upsampler(config.scale)
        self.conv_last = Float32Conv2d(dim if self.is_residual else NUM_FEAT, 3, 3, padding=1)
        self.apply(published_init)

    def tables(self) -> tuple[Tensor, ...]:
        """What every group gets besides the features."""
        raise NotImplementedError

    def forward(self, low_res_bchw: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, scale H, scale W); ValueError unless H and W are multiples of the window."""
        self.check_input(low_res_bchw)
        x_bchw = (low_res_bchw - self.mean) * self.img_range
        # Features then keep their channels together, which convolutions and everything between them prefer.
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last)
        # `to`: under autocast a convolution returns bf16, and the trunk would inherit it.
        shallow_bchw = self.conv_first(x_bchw).to(x_bchw.dtype)
        body_bhwc = self._body(shallow_bchw)
        normed_bchw = self._normed_bchw(body_bhwc)
        body_bchw = self.conv_after_body(normed_bchw, Remake(body_bhwc, self._normed_bchw))
        features_bchw = add(shallow_bchw, body_bchw)
        if self.is_residual:
            return (x_bchw + self.conv_last(features_bchw)) / self.img_range + self.mean
        features_bchw = self.upsample(self.conv_before_upsample(features_bchw))
        return self.conv_last(features_bchw) / self.img_range + self.mean

    def _body(self, x_bchw: Tensor) -> Tensor:
        x_bhwc = self.patch_embed(x_bchw.permute(0, 2, 3, 1))
        for group in self.layers:
            x_bhwc = group(x_bhwc, *self.tables())
        return x_bhwc

    def _normed_bchw(self, x_bhwc: Tensor) -> Tensor:
        return self.norm(x_bhwc).permute(0, 3, 1, 2)
