"""A U-shaped network of hybrid blocks for restoration: window attention beside a convolutional branch.

The encoder halves height and width and doubles the channels from level to level, the decoder goes the way back and
takes in what the encoder had at each level. In every block the two branches see the same features and are fused by
concatenation, addition or a gate. The idea is that of HAT for image restoration (Chen et al., arXiv 2309.05239) laid
out as Restormer's U (Zamir et al., arXiv 2111.09881); no weights are published for it, sizes are this project's.

Axes in tensor names: b batch, h height, w width, c channels, n queries and keys of a window, g kinds of mask.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from model.attention import WindowAttention
from model.blocks import DropPath, Mlp
from model.frame import Frame, FrameConfig, RestorationHead, run_block
from model.init import published_init
from model.lean import Linear, Remake, add, gelu, in_compute_dtype
from model.windows import shift_masks, window_index

Fusion = Literal["concat", "add", "gate"]


@dataclass(frozen=True)
class HatUnetConfig(FrameConfig):
    """Arguments of the U-shaped network: `depths` and `num_heads` have an entry per level, the finest first.

    The decoder has as many blocks at a level as the encoder; the last level is the bottom, which both share.
    """

    embed_dim: int = 48
    """Channels of the finest level; every level below has twice as many."""
    depths: tuple[int, ...] = (4, 6, 6, 8)
    """Hybrid blocks of each level."""
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    """Attention heads of each level."""
    window_size: int = 8
    """Side of a window, in pixels of its level; even."""
    restoration_head: RestorationHead = "residual"
    """As in `FrameConfig`; a U for restoration adds what it computes to its input, and no other program reads it."""
    fusion: Fusion = "gate"
    """How a block joins its branches: a linear layer over both, their sum, or a learned mixture at every pixel."""
    refinement: int = 4
    """Hybrid blocks after the decoder, at the finest level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"fusion={self.fusion!r}: choose one of {get_args(Fusion)}")
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim={self.embed_dim} must be even: half of it goes up to the next level")
        if self.refinement < 0:
            raise ValueError(f"refinement={self.refinement} must not be negative")

    @property
    def multiple(self) -> int:
        """A window of the bottom level, in pixels of the finest one."""
        return int(self.window_size * 2 ** (len(self.depths) - 1))

    def dim(self, level: int) -> int:
        """Channels of a level, from 0."""
        return int(self.embed_dim * 2**level)


class LocalBranch(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear: what lies next to a pixel, across the borders of windows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = Linear(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.project = Linear(dim, dim)

    def forward(self, x_bhwc: Tensor, remake: Remake | None = None) -> Tensor:
        """(B, H, W, C) -> same; `remake` of the input."""
        spread_bchw = self.depthwise(self.expand(x_bhwc, remake).permute(0, 3, 1, 2))
        spread_bhwc = spread_bchw.permute(0, 2, 3, 1)
        return self.project(gelu(spread_bhwc), Remake(spread_bhwc, gelu))


class Fuse(nn.Module):
    """Two branches into one."""

    def __init__(self, dim: int, fusion: Fusion) -> None:
        super().__init__()
        self.mix = Linear(2 * dim, dim) if fusion == "concat" else None
        self.gate = Linear(2 * dim, dim) if fusion == "gate" else None

    def forward(self, attended_bhwc: Tensor, local_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) twice -> (B, H, W, C)."""
        if self.mix is not None:
            return self.mix(torch.cat([attended_bhwc, local_bhwc], dim=-1))
        if self.gate is not None:
            share_bhwc = self.gate(torch.cat([attended_bhwc, local_bhwc], dim=-1)).sigmoid()
            return torch.lerp(local_bhwc, attended_bhwc, share_bhwc)
        return attended_bhwc + local_bhwc


class HybridBlock(nn.Module):
    """(Shifted) window attention and a local branch beside it, fused; then an MLP."""

    def __init__(self, config: HatUnetConfig, level: int, shift: int, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.dim(level)
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, config.window_size, config.num_heads[level], shift)
        self.local = LocalBranch(dim)
        self.fuse = Fuse(dim, config.fusion)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_dim * 2**level)

    def forward(self, x_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor) -> Tensor:
        """(B, H, W, C) -> same; the index and masks come from the network, which holds them once."""
        normed_bhwc, remake = in_compute_dtype(self.norm1(x_bhwc)), Remake(x_bhwc, self.norm1)
        attended_bhwc = self.attn(normed_bhwc, index_nn, masks_gnn if self.shift else None, remake)
        fused_bhwc = self.fuse(attended_bhwc, self.local(normed_bhwc, remake))
        x_bhwc = add(x_bhwc, self.drop_path(fused_bhwc, 0))
        return add(x_bhwc, self.drop_path(self.mlp(self.norm2(x_bhwc), Remake(x_bhwc, self.norm2)), 1))


class Level(nn.Module):
    """Blocks of one resolution, plain and shifted windows in turn."""

    def __init__(self, config: HatUnetConfig, level: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.recompute = config.checkpoint == "block"
        shifts = [config.window_size // 2 * (block % 2) for block in range(len(drop_path_rates))]
        self.blocks = nn.ModuleList(
            HybridBlock(config, level, shift, rate) for shift, rate in zip(shifts, drop_path_rates, strict=True)
        )

    def forward(self, x_bhwc: Tensor, *tables: Tensor) -> Tensor:
        """(B, H, W, C) -> same."""
        for block in self.blocks:
            x_bhwc = run_block(block, self.recompute, x_bhwc, *tables)
        return x_bhwc


class Resampling(nn.Module):
    """To the next level (down: half the side, twice the channels) or back."""

    def __init__(self, dim: int, *, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim // 2 if down else 2 * dim, 3, padding=1)
        self.shuffle = nn.PixelUnshuffle(2) if down else nn.PixelShuffle(2)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, 2 C), or (B, 2 H, 2 W, C / 2); in the dtype of x."""
        x_bchw = self.shuffle(self.conv(x_bhwc.permute(0, 3, 1, 2)))
        return x_bchw.permute(0, 2, 3, 1).to(x_bhwc.dtype).contiguous()


class HatUnet(Frame):
    """The U-shaped network of hybrid blocks."""

    arch = "hat_unet"
    relative_position_index: Tensor
    shift_masks: Tensor

    def __init__(self, config: HatUnetConfig) -> None:
        window, bottom = config.window_size, len(config.depths) - 1
        tables = {"relative_position_index": window_index(window), "shift_masks": shift_masks(window)}
        super().__init__(config, tables, [])
        rates = config.drop_path_rates
        self.encoder = nn.ModuleList(Level(config, level, rates[level]) for level in range(bottom + 1))
        self.down = nn.ModuleList(Resampling(config.dim(level), down=True) for level in range(bottom))
        self.up = nn.ModuleList(Resampling(config.dim(level + 1), down=False) for level in range(bottom))
        self.merge = nn.ModuleList(Linear(2 * config.dim(level), config.dim(level)) for level in range(bottom))
        self.decoder = nn.ModuleList(Level(config, level, rates[level]) for level in range(bottom))
        self.refinement = Level(config, 0, [0.0] * config.refinement)
        for part in (self.encoder, self.down, self.up, self.merge, self.decoder, self.refinement):
            part.apply(published_init)

    def tables(self) -> tuple[Tensor, ...]:
        """Position index and masks, which all blocks share."""
        return self.relative_position_index, self.shift_masks

    def _body(self, x_bchw: Tensor) -> Tensor:
        x_bhwc = self.patch_embed(x_bchw.permute(0, 2, 3, 1))
        skipped = []
        for level, down in zip(self.encoder, self.down, strict=False):
            skipped.append(level(x_bhwc, *self.tables()))
            x_bhwc = down(skipped[-1])
        x_bhwc = self.encoder[-1](x_bhwc, *self.tables())
        for up, merge, level in zip(self.up[::-1], self.merge[::-1], self.decoder[::-1], strict=True):
            both_bhwc = torch.cat([skipped.pop(), up(x_bhwc)], dim=-1)
            x_bhwc = level(merge(both_bhwc).to(x_bhwc.dtype), *self.tables())
        return self.refinement(x_bhwc, *self.tables())
