"""HMANet, the Hybrid Multi-Axis Aggregation Network (Chu et al., CVPRW 2024, arXiv 2405.05001).

State-dict keys and shapes equal the published files, whose quirks are part of the weights and kept: see
`StripScores`, `unrolled` and `GridAttentionBlock`. Deviations, none of which changes a value: features stay
(B, H, W, C) throughout; the shift mask is kept per kind of window; unused dropout and position embedding are
left out.

Axes in tensor names: b batch, h height, w width, c channels, y/x row/column of a window or grid cell,
n/m queries/keys of a window or grid, a heads, d channels of a head, g kinds of mask.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model.attention import WindowScores, attend_image
from model.blocks import DropPath, Mlp, channel_means
from model.frame import Frame, FrameConfig, run_block
from model.lean import Conv2d, Linear, Remake, add, gelu, scale
from model.window_kernel import Attention
from model.windows import Grids, Runs, Squares, grid_rows, shift_masks, window_index

EXPANSION = 6
"""Middle channels of a fused convolution per channel, in every published HMANet."""
SQUEEZE = 2
"""Its gate's middle is that many times narrower than the middle."""


@dataclass(frozen=True)
class HmanetConfig(FrameConfig):
    """Arguments of HMANet; the defaults are the published HMANet."""

    interval_size: int = 4
    """Distance of the pixels that attend to each other across the image, px; leaves no trace in the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval_size < 1 or self.window_size % self.interval_size:
            raise ValueError(f"interval_size={self.interval_size} does not divide window_size={self.window_size}")
        for heads in self.num_heads:
            if heads % 2 or self.embed_dim % (2 * heads):
                raise ValueError(
                    f"num_heads={heads} with embed_dim={self.embed_dim}: grid attention halves the heads and "
                    "quarters the channels, so heads must be even and twice their number divide the channels"
                )
        if self.embed_dim < 32:
            raise ValueError(f"embed_dim={self.embed_dim}: grid attention's position network needs 32 or more")


class SqueezeExcitation(nn.Module):
    """A gate for each channel that sees the mean of all channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, dim // SQUEEZE, 1)
        self.act = nn.SiLU()
        self.fc2 = nn.Conv2d(dim // SQUEEZE, dim, 1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        return self.fc2(self.act(self.fc1(channel_means(x_bchw)))).sigmoid()


class FusedConvBlock(nn.Module):
    """A wide 3x3 convolution between layer norms, a channel gate, and back: added to the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim)
        self.fused_conv = Conv2d(dim, dim * EXPANSION, 3, padding=1)
        self.norm1 = nn.LayerNorm(dim * EXPANSION)
        self.se = SqueezeExcitation(dim * EXPANSION)
        self.conv3_1x1 = Conv2d(dim * EXPANSION, dim, 1)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> same; of the wide features only the convolution's result is kept for the backward pass."""
        wide_bchw = self.fused_conv(self._normed_bchw(x_bhwc), Remake(x_bhwc, self._normed_bchw))
        active_bchw = gelu(self._wide_normed(wide_bchw), Remake(wide_bchw, self._wide_normed))
        gate_bc11 = self.se(active_bchw)
        gated_bchw = scale(active_bchw, gate_bc11, Remake(wide_bchw, self._active))

        def gated(wide_bchw: Tensor) -> Tensor:
            return self._active(wide_bchw) * gate_bc11.detach()

        out_bchw = self.conv3_1x1(gated_bchw, Remake(wide_bchw, gated))
        return add(x_bhwc, out_bchw.permute(0, 2, 3, 1))

    def _normed_bchw(self, x_bhwc: Tensor) -> Tensor:
        return self.pre_norm(x_bhwc).permute(0, 3, 1, 2)

    def _wide_normed(self, wide_bchw: Tensor) -> Tensor:
        normed_bhwc = self.norm1(wide_bchw.permute(0, 2, 3, 1))
        return normed_bhwc.permute(0, 3, 1, 2)

    def _active(self, wide_bchw: Tensor) -> Tensor:
        return gelu(self._wide_normed(wide_bchw))


class FusedAttentionBlock(nn.Module):
    """FAB: (shifted) window attention, then an MLP."""

    def __init__(self, config: HmanetConfig, num_heads: int, shift: int, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.attn = WindowScores(dim, num_heads, Squares(config.window_size), shift)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_dim)

    def forward(self, x_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor) -> Tensor:
        """(B, H, W, C) -> same; the index and masks come from the network, which holds them once."""
        qkv_bhwc = self.qkv(self.norm1(x_bhwc), Remake(x_bhwc, self.norm1))
        attended_bhwc = self.attn(qkv_bhwc, index_nn, masks_gnn if self.shift else None)
        x_bhwc = add(x_bhwc, self.drop_path(attended_bhwc, 0))
        return add(x_bhwc, self.drop_path(self.mlp(self.norm2(x_bhwc), Remake(x_bhwc, self.norm2)), 1))


class PositionBias(nn.Module):
    """A small network from the offset of two grid points to a bias per head, for grids of any size."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = self._layer(dim, dim)
        self.pos2 = self._layer(dim, dim)
        self.pos3 = self._layer(dim, num_heads)

    @staticmethod
    def _layer(dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, out_dim))

    def forward(self, height: int, width: int) -> Tensor:
        """(P, A): the bias of every offset in a grid of height x width points, as `grid_index` counts them."""
        device, dtype = self.pos_proj.weight.device, self.pos_proj.weight.dtype
        rows = torch.arange(1 - height, height, device=device, dtype=dtype)
        columns = torch.arange(1 - width, width, device=device, dtype=dtype)
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets)))).flatten(0, 1)


class PositionedAttention(nn.Module):
    """Attention over a grid with the bias of its own position network."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.pos = PositionBias(dim // 16, num_heads)

    def forward(self, attention: Attention, size: tuple[int, int], *images_bhwc: Tensor) -> Tensor:
        """q, k and v, each (B, H, W, C) -> same; `size` is height and width of the grids."""
        return attend_image(attention, self.pos(*size), *images_bhwc)


class GridAttention(nn.Module):
    """Attention in two steps through a third projection: it asks the keys, then the queries ask it."""

    def __init__(self, dim: int, num_heads: int, interval: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cut = Grids(interval)
        self.attn_transform1 = PositionedAttention(dim, num_heads)
        self.attn_transform2 = PositionedAttention(dim, num_heads)

    def forward(self, qkv_bhwc: Tensor, grid_bhwc: Tensor) -> Tensor:
        """(B, H, W, 3 C) and (B, H, W, C) -> (B, H, W, C)."""
        height, width = grid_bhwc.shape[1] // self.cut.interval, grid_bhwc.shape[2] // self.cut.interval
        q, k, v = qkv_bhwc.chunk(3, dim=-1)
        attention = Attention(self.cut, self.num_heads, partial(grid_rows, height, width, q.device))
        gathered_bhwc = self.attn_transform1(attention, (height, width), grid_bhwc, k, v)
        return self.attn_transform2(attention, (height, width), q, grid_bhwc, gathered_bhwc)


def unrolled(x_bhwc: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C) -> same: as published, pixels move on along the rows and channels along their axis.

    The published block means to undo the roll of rows and columns, but does so after the image was flattened,
    so that half a window is taken along the run of all pixels and along the channels. Kept.
    """
    shift = window_size // 2
    return x_bhwc.flatten(1, 2).roll((shift, shift), (1, 2)).unflatten(1, x_bhwc.shape[1:3])


class StripScores(WindowScores[Runs]):
    """`WindowScores` of a rolled image that was never cut into squares.

    The published block rolls the image by half a window but then takes N consecutive pixels along the rows for
    a window, as if they were a square: bias, mask and the way back are those of squares. Published weights
    were trained with it: kept (and see `unrolled`).
    """

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, Runs(window_size))

    def forward(self, qkv_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor | None = None) -> Tensor:
        """(B, H, W, 3 C) -> (B, H, W, C)."""
        window = self.cut.side
        rolled_bhwc = qkv_bhwc.roll((-(window // 2), -(window // 2)), (1, 2))
        strips_bhwc = super().forward(rolled_bhwc, index_nn, masks_gnn)
        return unrolled(Squares(window).join(self.cut.windows(strips_bhwc)), window)


class GridAttentionBlock(nn.Module):
    """GAB: attention across the whole image at intervals, in windows, and in rolled strips; then an MLP.

    As published it norms what its branches return, not what they are given.
    """

    def __init__(self, config: HmanetConfig, num_heads: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.grid_proj = Linear(dim, dim // 2)
        self.grid_attn = GridAttention(dim // 2, num_heads // 2, config.interval_size)
        self.window_attn = WindowScores(dim // 4, num_heads // 2, Squares(config.window_size))
        self.window_attn_s = StripScores(dim // 4, config.window_size, num_heads // 2)
        self.fc = Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_dim)

    def forward(self, x_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor) -> Tensor:
        """(B, H, W, C) -> same."""
        quarter = 3 * x_bhwc.shape[3] // 4
        window_bhwc, strip_bhwc, grid_bhwc = self.qkv(x_bhwc).split((quarter, quarter, 2 * quarter), dim=-1)
        branches = (
            self.window_attn(window_bhwc, index_nn),
            self.window_attn_s(strip_bhwc, index_nn, masks_gnn),
            self.grid_attn(grid_bhwc, self.grid_proj(x_bhwc)),
        )
        x_bhwc = add(x_bhwc, self.norm1(self.fc(torch.cat(branches, dim=-1))))
        return add(x_bhwc, self.norm2(self.mlp(x_bhwc)))


class AttentionBlocks(nn.Module):
    """The blocks of one group: a fused convolution before every second window attention, then the grid's."""

    def __init__(self, config: HmanetConfig, num_heads: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.recompute = config.checkpoint == "block"
        self.blocks = nn.ModuleList()
        for position, rate in enumerate(drop_path_rates):
            if position % 2 == 0:
                self.blocks.append(FusedConvBlock(config.embed_dim))
            shift = config.window_size // 2 * (position % 2)
            self.blocks.append(FusedAttentionBlock(config, num_heads, shift, rate))
        self.gab = GridAttentionBlock(config, num_heads)
        self.scale = nn.Parameter(torch.empty(config.embed_dim))
        nn.init.trunc_normal_(self.scale, std=0.02)

    def forward(self, x_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor) -> Tensor:
        """(B, H, W, C) -> same."""
        for block in self.blocks:
            tables = () if isinstance(block, FusedConvBlock) else (index_nn, masks_gnn)
            x_bhwc = run_block(block, self.recompute, x_bhwc, *tables)
        return x_bhwc + run_block(self.gab, self.recompute, x_bhwc, index_nn, masks_gnn) * self.scale


class HMANet(Frame):
    """The Hybrid Multi-Axis Aggregation Network."""

    arch = "hmanet"
    relative_position_index_SA: Tensor
    shift_masks: Tensor

    def __init__(self, config: HmanetConfig) -> None:
        tables = {
            "relative_position_index_SA": window_index(config.window_size),
            "shift_masks": shift_masks(config.window_size),
        }
        groups = zip(config.num_heads, config.drop_path_rates, strict=True)
        super().__init__(config, tables, [AttentionBlocks(config, heads, rates) for heads, rates in groups])

    def tables(self) -> tuple[Tensor, ...]:
        """Position index and masks, which the blocks share."""
        return self.relative_position_index_SA, self.shift_masks
