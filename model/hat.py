"""HAT, the Hybrid Attention Transformer (Chen et al., CVPR 2023, arXiv 2205.04437).

State-dict keys and shapes equal the published files. Deviations, none of which changes a value: features
stay (B, H, W, C) throughout; the shift mask is kept per kind of window instead of per image size; dropout
inside attention and the absolute position embedding, both off in every published model, are left out.

Axes in tensor names: b batch, h height, w width, c channels, n/m queries/keys of a window, g kinds of mask.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model.attention import WindowAttention, attend_image, rows_of
from model.blocks import ChannelAttentionBlock, DropPath, Mlp
from model.frame import Frame, FrameConfig, run_block
from model.lean import Linear, Remake, add, in_compute_dtype
from model.window_kernel import Attention
from model.windows import Squares, overlap_index, shift_masks, window_index


@dataclass(frozen=True)
class HatConfig(FrameConfig):
    """Arguments of HAT; the defaults are the published HAT."""

    compress_ratio: int = 3
    """The channel attention block's middle has embed_dim // compress_ratio channels."""
    squeeze_factor: int = 30
    """The channel gate's middle has embed_dim // squeeze_factor channels."""
    conv_scale: float = 0.01
    """Weight of the channel attention block in the sum."""
    overlap_ratio: float = 0.5
    """Rim of an overlapping window, both sides together, in windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compress_ratio", "squeeze_factor"):
            if not 1 <= getattr(self, name) <= self.embed_dim:
                raise ValueError(f"{name}={getattr(self, name)} leaves no channel of embed_dim={self.embed_dim}")
        rim = self.window_size * self.overlap_ratio
        if rim < 1 or abs(rim - round(rim)) > 1e-6 or round(rim) % 2:
            raise ValueError(
                f"overlap_ratio={self.overlap_ratio} with window_size={self.window_size} gives no even rim"
            )

    @property
    def overlap_size(self) -> int:
        """Side of the square of keys that a window sees in overlapping attention, px."""
        return self.window_size + round(self.window_size * self.overlap_ratio)


class HybridAttentionBlock(nn.Module):
    """HAB: (shifted) window attention and, beside it, convolution with channel attention; then an MLP."""

    def __init__(self, config: HatConfig, num_heads: int, shift: int, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.shift = shift
        self.conv_scale = config.conv_scale
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, config.window_size, num_heads, shift)
        self.conv_block = ChannelAttentionBlock(dim, config.compress_ratio, config.squeeze_factor)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_dim)

    def forward(self, x_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor) -> Tensor:
        """(B, H, W, C) -> same; the index and masks come from the network, which holds them once."""
        normed_bhwc = in_compute_dtype(self.norm1(x_bhwc))
        conv_bchw, gate_bc11 = self.conv_block(_channels_first(normed_bhwc), Remake(x_bhwc, self._normed_bchw))
        masks = masks_gnn if self.shift else None
        attended_bhwc = self.attn(normed_bhwc, index_nn, masks, Remake(x_bhwc, self.norm1))
        conv_bhwc = _channels_last(conv_bchw) * _channels_last(gate_bc11 * self.conv_scale)
        x_bhwc = add(x_bhwc, self.drop_path(attended_bhwc, 0), conv_bhwc)
        return add(x_bhwc, self.drop_path(self.mlp(self.norm2(x_bhwc), Remake(x_bhwc, self.norm2)), 1))

    def _normed_bchw(self, x_bhwc: Tensor) -> Tensor:
        return _channels_first(self.norm1(x_bhwc))


def _channels_first(x_bhwc: Tensor) -> Tensor:
    return x_bhwc.permute(0, 3, 1, 2)


def _channels_last(x_bchw: Tensor) -> Tensor:
    return x_bchw.permute(0, 2, 3, 1)


class OverlappingAttentionBlock(nn.Module):
    """OCAB: each window's queries attend to a larger window around it; then an MLP."""

    def __init__(self, config: HatConfig, num_heads: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.cut = Squares(config.window_size, rim=(config.overlap_size - config.window_size) // 2)
        self.num_heads = num_heads
        num_offsets = (config.window_size + config.overlap_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_dim)

    def forward(self, x_bhwc: Tensor, index_nm: Tensor) -> Tensor:
        """(B, H, W, C) -> same; beyond the image keys and values are zero, yet take part in the softmax."""
        attention = Attention(self.cut, self.num_heads, partial(rows_of, index_nm))
        qkv_bhwc = self.qkv(self.norm1(x_bhwc), Remake(x_bhwc, self.norm1))
        x_bhwc = add(x_bhwc, self.proj(attend_image(attention, self.relative_position_bias_table, qkv_bhwc)))
        return add(x_bhwc, self.mlp(self.norm2(x_bhwc), Remake(x_bhwc, self.norm2)))


class AttentionBlocks(nn.Module):
    """The blocks of one group: plain and shifted window attention in turn, then overlapping attention."""

    def __init__(self, config: HatConfig, num_heads: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.recompute = config.checkpoint == "block"
        shifts = [config.window_size // 2 * (block % 2) for block in range(len(drop_path_rates))]
        self.blocks = nn.ModuleList(
            HybridAttentionBlock(config, num_heads, shift, rate)
            for shift, rate in zip(shifts, drop_path_rates, strict=True)
        )
        self.overlap_attn = OverlappingAttentionBlock(config, num_heads)

    def forward(self, x_bhwc: Tensor, index_nn: Tensor, index_nm: Tensor, masks_gnn: Tensor) -> Tensor:
        """(B, H, W, C) -> same."""
        for block in self.blocks:
            x_bhwc = run_block(block, self.recompute, x_bhwc, index_nn, masks_gnn)
        return run_block(self.overlap_attn, self.recompute, x_bhwc, index_nm)


class HAT(Frame):
    """The Hybrid Attention Transformer."""

    arch = "hat"
    relative_position_index_SA: Tensor
    relative_position_index_OCA: Tensor
    shift_masks: Tensor

    def __init__(self, config: HatConfig) -> None:
        window = config.window_size
        tables = {
            "relative_position_index_SA": window_index(window),
            "relative_position_index_OCA": overlap_index(window, config.overlap_size),
            "shift_masks": shift_masks(window),
        }
        groups = zip(config.num_heads, config.drop_path_rates, strict=True)
        super().__init__(config, tables, [AttentionBlocks(config, heads, rates) for heads, rates in groups])

    def tables(self) -> tuple[Tensor, ...]:
        """Position indices and masks, which the blocks share."""
        return self.relative_position_index_SA, self.relative_position_index_OCA, self.shift_masks
