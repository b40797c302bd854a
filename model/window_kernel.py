"""Attention inside windows on the CPU, a few windows at a time, keeping no scores for the backward pass.

The scores of a window (heads x 256 x 256 numbers at window 16) are made in a buffer that stays in the cache,
turned into the output and forgotten; the backward pass makes them again. Kept are q, k, v and the bias table,
whose gradient is part of it. On other devices, and in compiled or exported networks, `model.attention` uses
PyTorch's own fused attention instead.

Axes in tensor names: b batch, h height, w width, c channels, y/x row/column of a window, i/j row and column
inside a window, n queries, m keys, a attention heads, d channels of a head, p rows of a bias table, v windows x
heads, g kinds of mask.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from model.windows import Cut, key_image

SCORES_BYTES = 2**21
"""Size of the buffer of scores, about: it shall stay in the processor's cache."""


@dataclass(frozen=True)
class Attention:
    """What an attention does, besides the tensors it does it with."""

    cut: Cut
    """How images are cut into windows."""
    num_heads: int
    """Heads, each with its own channels and bias."""
    index_rows: Callable[[int, int], Tensor]
    """(first query, last query + 1) -> (N, M) int64: the bias table's row for each pair."""
    masks_gnm: Tensor | None = None
    """Added to the scores of shifted windows (see `shift_masks`): last row, last column, corner."""


def window_attention(attention: Attention, table_pa: Tensor, *images_bhwc: Tensor) -> Tensor:
    """Softmax attention inside windows, scores scaled by D**-0.5 plus a bias: (B, H, W, C).

    `table_pa` holds the bias of each pair's row and head; `images_bhwc` is one image with q, k and v in its
    channels or one image for each. The output is cut like the queries.
    """
    if torch.is_grad_enabled():
        return _WindowAttention.apply(attention, table_pa, *images_bhwc)
    return _attend(_Work(attention, table_pa, images_bhwc), cached_bias)


class _Part(NamedTuple):
    """Neighbouring windows of one row of windows, with the same mask."""

    batch: int
    row: int
    columns: slice
    mask: int | None


class _Work:
    """The tensors of one attention as windows, and the order in which they are worked on."""

    def __init__(self, attention: Attention, table_pa: Tensor, images: tuple[Tensor, ...]) -> None:
        self.attention = attention
        cut, heads = attention.cut, (attention.num_heads, -1)
        q, k, v = _query_key_value(images)
        self.query_image = q
        self.q = cut.windows(q).unflatten(-1, heads)
        self.k, self.v = (cut.key_windows(key_image(x, cut)).unflatten(-1, heads) for x in (k, v))
        self.scale = self.q.shape[-1] ** -0.5
        self.table_pa = table_pa
        self.num_keys = self.k.shape[3] * self.k.shape[4]
        scores_per_row = attention.num_heads * self.q.shape[4] * self.num_keys
        scores = SCORES_BYTES // q.element_size()
        self.rows_at_once = max(1, min(self.q.shape[3], scores // scores_per_row))
        self.windows_at_once = max(1, min(self.q.shape[2], scores // (scores_per_row * self.rows_at_once)))
        self.buffer = q.new_empty(self.windows_at_once * self.rows_at_once * scores_per_row)

    def rows(self) -> Iterator[slice]:
        """Rows of queries inside the windows whose scores fit the buffer."""
        for start in range(0, self.q.shape[3], self.rows_at_once):
            yield slice(start, min(start + self.rows_at_once, self.q.shape[3]))

    def parts(self) -> Iterator[_Part]:
        """All windows, as many at once as fit the buffer."""
        batch, rows, columns = self.q.shape[:3]
        masked = self.attention.masks_gnm is not None
        inner = columns - 1 if masked else columns
        for b in range(batch):
            for row in range(rows):
                last = masked and row == rows - 1
                for start in range(0, inner, self.windows_at_once):
                    columns_here = slice(start, min(start + self.windows_at_once, inner))
                    yield _Part(b, row, columns_here, 0 if last else None)
                if masked:
                    yield _Part(b, row, slice(inner, columns), 2 if last else 1)

    def queries(self, rows: slice) -> tuple[int, int]:
        """First and last + 1 query of some rows of a window."""
        width = self.q.shape[4]
        return rows.start * width, rows.stop * width

    def biases(self, rows: slice, gather: "Gather") -> Callable[[_Part], Tensor]:
        """Per part the bias of its windows with their mask, (V, N, M)."""
        index_nm = self.attention.index_rows(*self.queries(rows))
        bias_anm = gather(self.table_pa, index_nm, self.q.dtype)
        made: dict[int | None, Tensor] = {None: bias_anm.repeat(self.windows_at_once, 1, 1)}

        def of(part: _Part) -> Tensor:
            masks_gnm = self.attention.masks_gnm
            if masks_gnm is not None and part.mask is not None and part.mask not in made:
                mask_nm = masks_gnm[part.mask, slice(*self.queries(rows))]
                made[part.mask] = made[None] + mask_nm.to(bias_anm.dtype)
            return made[part.mask][: (part.columns.stop - part.columns.start) * self.attention.num_heads]

        return of

    def weights(self, q_vnd: Tensor, k_vmd: Tensor, bias_vnm: Tensor) -> Tensor:
        """(V, N, M): softmax of the scores, in the buffer. In bf16 scores are rounded like all other products."""
        scores_vnm = self.buffer[: bias_vnm.numel()].view_as(bias_vnm)
        torch.baddbmm(bias_vnm, q_vnd, k_vmd.transpose(1, 2), alpha=self.scale, out=scores_vnm)
        return torch.softmax(scores_vnm, -1, out=scores_vnm)


Gather = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(bias table, rows (N, M), dtype) -> (A, N, M)."""


def gather_bias(table_pa: Tensor, index_nm: Tensor, dtype: torch.dtype) -> Tensor:
    """(A, N, M): the bias of each head and pair; negative rows count from the table's end."""
    rows = index_nm.flatten().remainder(len(table_pa))
    return table_pa.t().contiguous().index_select(1, rows).to(dtype).unflatten(1, index_nm.shape)


def cached_bias(table_pa: Tensor, index_nm: Tensor, dtype: torch.dtype) -> Tensor:
    """As `gather_bias`, but of a learned table remembered as long as its values stay the same.

    The table is compared by value (a few microseconds), so that no way of changing weights can go unnoticed.
    """
    if not isinstance(table_pa, nn.Parameter):
        return gather_bias(table_pa, index_nm, dtype)
    known = _GATHERED.get(table_pa)
    if known is None or not torch.equal(known.table_pa, table_pa):
        known = _Gathered(table_pa.detach().clone(), {})
        _GATHERED[table_pa] = known
    key = (dtype, index_nm.data_ptr(), index_nm.shape)
    if key not in known.biases:
        known.biases[key] = (index_nm, gather_bias(table_pa, index_nm, dtype))
    return known.biases[key][1]


class _Gathered(NamedTuple):
    """What was gathered from a table with these values; the index is kept so that its address stays its own."""

    table_pa: Tensor
    biases: dict[Any, tuple[Tensor, Tensor]]


_GATHERED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _query_key_value(images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return images[0].chunk(3, dim=-1) if len(images) == 1 else images


def _read(windows_byxijad: Tensor, part: _Part, rows: slice = slice(None)) -> Tensor:
    """(V, N, D) of a part; pixels are brought together by a copy, heads and channels only by strides."""
    x_xnad = windows_byxijad[part.batch, part.row, part.columns, rows].flatten(1, 2)
    return x_xnad.transpose(1, 2).flatten(0, 1)


def _write(windows_byxijad: Tensor, part: _Part, x_vnd: Tensor, rows: slice = slice(None), add: bool = False) -> None:
    """Put (V, N, D) of a part in its place, or add it there."""
    place_xijad = windows_byxijad[part.batch, part.row, part.columns, rows]
    x_xaijd = x_vnd.unflatten(0, (-1, place_xijad.shape[3])).unflatten(2, place_xijad.shape[1:3])
    x_xijad = x_xaijd.permute(0, 2, 3, 1, 4)
    place_xijad.add_(x_xijad) if add else place_xijad.copy_(x_xijad)


def _narrow_product(a_vnm: Tensor, b_vmd: Tensor) -> Tensor:
    """(V, N, D) with D of a few dozen. In float32 as b.T @ a.T: BLAS is twice as fast at short rows as at columns."""
    if a_vnm.dtype == torch.float32:
        return torch.bmm(b_vmd.transpose(1, 2), a_vnm.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(a_vnm, b_vmd)


def _attend(work: _Work, gather: Gather) -> Tensor:
    out_bhwc = torch.empty_like(work.query_image, memory_format=torch.contiguous_format)
    out = work.attention.cut.windows(out_bhwc).unflatten(-1, (work.attention.num_heads, -1))
    for rows in work.rows():
        biases = work.biases(rows, gather)
        for part in work.parts():
            weights_vnm = work.weights(_read(work.q, part, rows), _read(work.k, part), biases(part))
            _write(out, part, _narrow_product(weights_vnm, _read(work.v, part)), rows)
    return out_bhwc


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: Attention, table_pa: Tensor, *images: Tensor) -> Tensor:
        ctx.attention = attention
        ctx.save_for_backward(table_pa, *images)
        return _attend(_Work(attention, table_pa, images), gather_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bhwc: Tensor) -> tuple[Tensor | None, ...]:
        table_pa, *images = ctx.saved_tensors
        work = _Work(ctx.attention, table_pa, tuple(images))
        grads = _Gradients(work, tuple(images), grad_bhwc)
        grad_table_ap = torch.zeros_like(table_pa.t(), memory_format=torch.contiguous_format)
        for rows in work.rows():
            biases = work.biases(rows, gather_bias)
            grad_bias_anm = grad_table_ap.new_zeros(biases(next(work.parts())).shape)[: len(grad_table_ap)]
            for part in work.parts():
                grad_vnm = grads.add(part, rows, biases(part))
                for grad_anm in grad_vnm.split(len(grad_bias_anm)):
                    grad_bias_anm += grad_anm
            index_nm = ctx.attention.index_rows(*work.queries(rows))
            grad_table_ap.index_add_(1, index_nm.flatten().remainder(len(table_pa)), grad_bias_anm.flatten(1))
        return None, grad_table_ap.t(), *grads.images()


class _Gradients:
    """Sums up the gradients of q, k and v of one attention."""

    def __init__(self, work: _Work, images: tuple[Tensor, ...], grad_bhwc: Tensor) -> None:
        cut, heads = work.attention.cut, (work.attention.num_heads, -1)
        self.work = work
        self.out = cut.windows(grad_bhwc.contiguous()).unflatten(-1, heads)
        self.keys_meet = bool(cut.rim) or work.rows_at_once < work.q.shape[3]
        new = torch.zeros_like if self.keys_meet else torch.empty_like
        self.targets = tuple(new(image, memory_format=torch.contiguous_format) for image in images)
        q, k, v = _query_key_value(self.targets)
        self.keys, self.key_images = (k, v), (key_image(k, cut), key_image(v, cut))
        self.q = cut.windows(q).unflatten(-1, heads)
        self.k, self.v = (cut.key_windows(image).unflatten(-1, heads) for image in self.key_images)
        self.buffer = torch.empty_like(work.buffer)

    def add(self, part: _Part, rows: slice, bias_vnm: Tensor) -> Tensor:
        """Add what the queries in `rows` of a part contribute; returns the gradient of the scores, (V, N, M)."""
        work = self.work
        q_vnd, k_vmd, v_vmd = _read(work.q, part, rows), _read(work.k, part), _read(work.v, part)
        out_vnd = _read(self.out, part, rows)
        weights_vnm = work.weights(q_vnd, k_vmd, bias_vnm)
        _write(self.v, part, _narrow_product(weights_vnm.transpose(1, 2), out_vnd), add=self.keys_meet)
        grad_vnm = self.buffer[: bias_vnm.numel()].view_as(bias_vnm)
        torch.bmm(out_vnd, v_vmd.transpose(1, 2), out=grad_vnm)
        torch.ops.aten._softmax_backward_data.out(grad_vnm, weights_vnm, -1, grad_vnm.dtype, grad_input=grad_vnm)
        _write(self.q, part, _narrow_product(grad_vnm, k_vmd) * work.scale, rows)
        _write(self.k, part, _narrow_product(grad_vnm.transpose(1, 2), q_vnd) * work.scale, add=self.keys_meet)
        return grad_vnm

    def images(self) -> tuple[Tensor, ...]:
        """The gradients in the shape of the images."""
        rim = self.work.attention.cut.rim
        if rim:
            for key, image in zip(self.keys, self.key_images, strict=True):
                key.add_(image[:, rim:-rim, rim:-rim])
        return self.targets
