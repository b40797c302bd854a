"""Attention with a learned position bias over any cut of an image: one function, the fastest way per device.

Axes in tensor names: b batch, h height, w width, c channels, y/x row/column of a window in the image,
n queries of a window, m keys a window sees, a attention heads, d channels of a head, p rows of a bias table,
g kinds of mask. Images are (B, H, W, C), cut into (B, Y, X, A, N, D) here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.lean import Linear, Remake, is_traced
from model.plain_attention import plain_attention
from model.window_kernel import Attention, gather_bias, window_attention
from model.windows import Runs, Squares, key_image

HEAD_MULTIPLE = 8
"""Of so many channels per head CUDA's kernels with a bias want a multiple (bf16; fp32: 4). HAT's heads have 30."""
PAIRS_AT_ONCE = 2**24
"""Pairs of query and key whose bias is made at a time, less than 1 GB with what it is made from. Only grids that span
a large image have more: HMANet's of 1024 x 1024 px have 2**32, whose bias would take 25 GB in bf16."""
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of PyTorch's attention on GPUs; the second serves what the first does not take."""


def attend_image(attention: Attention, table_pa: Tensor, *images_bhwc: Tensor) -> Tensor:
    """Softmax attention inside windows, scores scaled by D**-0.5 plus a bias: (B, H, W, C), cut as the queries.

    `table_pa` holds the bias of each pair's row and head; `images_bhwc` is one image with q, k and v in its
    channels or one image for each. On the CPU scores are never kept (`model.window_kernel`); elsewhere, and
    where the network is compiled, PyTorch's fused attention does it; exports take `model.plain_attention`.
    """
    if images_bhwc[0].device.type == "cpu" and not is_traced():
        return window_attention(attention, table_pa, *images_bhwc)
    way = plain_attention if torch.compiler.is_exporting() else fused_attention
    return rolled(way, attention, table_pa, *images_bhwc)


def rolled(way: Callable[..., Tensor], attention: Attention, table_pa: Tensor, *images_bhwc: Tensor) -> Tensor:
    """`way(attention, table, ...)` of images that are rolled by the attention's shift and back."""
    shift = attention.shift
    if not shift:
        return way(attention, table_pa, *images_bhwc)
    shifted = (image_bhwc.roll((-shift, -shift), (1, 2)) for image_bhwc in images_bhwc)
    return way(attention, table_pa, *shifted).roll((shift, shift), (1, 2))


def fused_attention(attention: Attention, table_pa: Tensor, *images_bhwc: Tensor) -> Tensor:
    """As `attend_image` without a shift, by `scaled_dot_product_attention`: its CUDA kernels keep no scores either."""
    multiple = 1 if images_bhwc[0].device.type == "cpu" else HEAD_MULTIPLE
    return filled_attention(multiple, attention, table_pa, *images_bhwc)


def filled_attention(multiple: int, attention: Attention, table_pa: Tensor, *images_bhwc: Tensor) -> Tensor:
    """As `fused_attention`, heads filled with zeros to a multiple of `multiple` channels: the results are the same.

    Unfilled, HAT's heads would make PyTorch take its math path on CUDA, which keeps all scores.
    """
    images = images_bhwc[0].chunk(3, dim=-1) if len(images_bhwc) == 1 else images_bhwc
    cut = attention.cut
    q = _split_heads(cut.windows(images[0]), attention.num_heads)
    k, v = (_split_heads(cut.key_windows(key_image(x, cut)), attention.num_heads) for x in images[1:])
    channels = q.shape[-1]
    if channels % multiple:
        q, k, v = (F.pad(x, (0, -channels % multiple)) for x in (q, k, v))
    with _backends(q.device):
        out_byxand = _attended(attention, table_pa, q, k, v, channels**-0.5)[..., :channels]
    rows, columns = cut.windows(images[0]).shape[3:5]
    out_byxijad = out_byxand.transpose(3, 4).unflatten(3, (rows, columns))
    return cut.join(out_byxijad.flatten(5, 6))


def _backends(device: torch.device) -> AbstractContextManager[None]:
    """On GPUs no cuDNN attention, which newer ones would take: it plans anew for every shape, so for every size."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(BACKENDS)


def _attended(attention: Attention, table_pa: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, Y, X, A, N, D): softmax attention of all windows, a piece of their queries at a time where they are large."""
    queries, masks = q.shape[4], attention.masks_gnm

    def bias(first: int, stop: int) -> Tensor:
        return gather_bias(table_pa, attention.index_rows(first, stop), q.dtype)

    if masks is not None:
        return attend_shifted(q, k, v, bias(0, queries), masks, scale)
    at_once = max(1, PAIRS_AT_ONCE // k.shape[4])
    pieces = []
    for first in range(0, queries, at_once):
        stop = min(first + at_once, queries)
        pieces.append(attend(q[:, :, :, :, first:stop], k, v, bias(first, stop), scale))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=4)


def attend(q_byxand: Tensor, k_byxamd: Tensor, v_byxamd: Tensor, bias_anm: Tensor, scale: float) -> Tensor:
    """Softmax attention inside each window, of scores times `scale` plus the bias: (B, Y, X, A, N, D)."""
    q, k, v = (x.flatten(0, 2) for x in (q_byxand, k_byxamd, v_byxamd))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_anm[None], scale=scale)
    return out.unflatten(0, q_byxand.shape[:3])


def attend_shifted(q: Tensor, k: Tensor, v: Tensor, bias_anm: Tensor, masks_gnm: Tensor, scale: float) -> Tensor:
    """`attend` after a cyclic shift: inner windows, last column, last row and corner each with its own mask.

    Four calls instead of a mask per window keep the memory for masks independent of the image's size.
    """
    biases = bias_anm + masks_gnm[:, None].to(bias_anm.dtype)
    body, last = slice(None, -1), slice(-1, None)

    def part(rows: slice, columns: slice, bias: Tensor) -> Tensor:
        return attend(q[:, rows, columns], k[:, rows, columns], v[:, rows, columns], bias, scale)

    # A single row or column of windows leaves the body empty, which the attention kernels do not accept.
    upper = [part(body, body, bias_anm)] if q.shape[1] > 1 and q.shape[2] > 1 else []
    upper += [part(body, last, biases[1])] if q.shape[1] > 1 else []
    lower = [part(last, body, biases[0])] if q.shape[2] > 1 else []
    lower += [part(last, last, biases[2])]
    rows = [torch.cat(parts, dim=2) for parts in (upper, lower) if parts]
    return torch.cat(rows, dim=1)


def _split_heads(windows_byxijc: Tensor, num_heads: int) -> Tensor:
    """(B, Y, X, I, J, C) -> (B, Y, X, A, N, D)."""
    x_byxnad = windows_byxijc.flatten(3, 4).unflatten(4, (num_heads, -1))
    return x_byxnad.transpose(3, 4)


def rows_of(index_nm: Tensor, first: int, stop: int) -> Tensor:
    """Rows of a position index, as `Attention.index_rows` asks for."""
    return index_nm[first:stop]


SideCut = TypeVar("SideCut", Squares, Runs)


class WindowScores(nn.Module, Generic[SideCut]):
    """Multi-head attention inside windows with a learned relative position bias, of given q, k and v."""

    def __init__(self, dim: int, num_heads: int, cut: SideCut, shift: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.shift = shift
        self.cut: SideCut = cut
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * cut.side - 1) ** 2, num_heads))
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, qkv_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor | None = None) -> Tensor:
        """(B, H, W, 3 C) -> (B, H, W, C); `masks_gnn` (see `shift_masks`): of a shifted image."""
        attention = Attention(self.cut, self.num_heads, partial(rows_of, index_nn), masks_gnn, self.shift)
        return self.proj(attend_image(attention, self.relative_position_bias_table, qkv_bhwc))


class WindowAttention(WindowScores[Squares]):
    """`WindowScores` with the projection to q, k and v."""

    def __init__(self, dim: int, window_size: int, num_heads: int, shift: int = 0) -> None:
        super().__init__(dim, num_heads, Squares(window_size), shift)
        self.qkv = Linear(dim, 3 * dim)

    def forward(
        self, x_bhwc: Tensor, index_nn: Tensor, masks_gnn: Tensor | None = None, remake: Remake | None = None
    ) -> Tensor:
        """(B, H, W, C) -> same; `remake` of the input."""
        return super().forward(self.qkv(x_bhwc, remake), index_nn, masks_gnn)
