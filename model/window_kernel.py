"""Attention inside windows on the CPU, a few windows at a time, keeping no scores for the backward pass.

The scores of a window (heads x 256 x 256 numbers at window 16) are made in a buffer that stays in the cache,
turned into the output and forgotten; the backward pass makes them again. Kept are q, k, v and the bias table,
whose gradient is part of it. On other devices, and in compiled or exported networks, `model.attention` uses
PyTorch's own fused attention instead.

Axes in tensor names: b batch, h height, w width, c channels, y/x row/column of a window, i/j row and column
inside a window, n queries, m keys, a attention heads, d channels of a head, p rows of a bias table, v windows x
heads, g kinds of mask.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from model.windows import Cut, key_image

SCORES_BYTES = 2**21
"""Size of the buffer of scores, about: it shall stay in the processor's cache.

A window whose scores take up to twice as much is not split, and bf16 scores may take twice as much: both measured.
"""
BAND_BYTES = 2**25
"""Of queries, keys and values about so much is brought into the order of windows at a time."""
KEPT_BYTES = BAND_BYTES
"""Larger rooms are given back (see `room`)."""


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
    shift: int = 0
    """Pixels by which the image is rolled up and left before it is cut into squares without a rim, and back after."""


def window_attention(attention: Attention, table_pa: Tensor, *images_bhwc: Tensor) -> Tensor:
    """Softmax attention inside windows, scores scaled by D**-0.5 plus a bias: (B, H, W, C).

    `table_pa` holds the bias of each pair's row and head; `images_bhwc` is one image with q, k and v in its
    channels or one image for each. The output is cut like the queries.
    """
    if torch.is_grad_enabled():
        return _WindowAttention.apply(attention, table_pa, *images_bhwc)
    return _attend(_Work(attention, table_pa, images_bhwc), cached_bias)


class _Band(NamedTuple):
    """Rows of windows of one image, or all of several images: what is brought together at a time."""

    images: slice
    rows: slice


class _Part(NamedTuple):
    """Windows that follow each other in a band, all their heads together."""

    heads: slice
    masks: tuple[int | None, ...]
    """Of each window."""


class _Windows:
    """An image as windows, which are views of its memory; where it is shifted, in pieces."""

    def __init__(self, image_bhwc: Tensor, windows_byxijc: Tensor, shift: int) -> None:
        self.image = image_bhwc
        self.all = windows_byxijc
        self.shift = shift

    def pieces(self, band: _Band) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """(which windows of a band and pixels of these, along b, y, x, i and j; a view of them, (B, Y, X, I, J, C))."""
        if not self.shift:
            yield (slice(None),) * 5, self.all[band.images, band.rows]
            return
        rows, columns, side = self.all.shape[1:4]
        down = _shifted(slice(0, columns), columns, side, self.shift)
        for (x, j, w), (y, i, h) in itertools.product(down, _shifted(band.rows, rows, side, self.shift)):
            x_byiwc = self.image[band.images, h, w].unflatten(1, (-1, i.stop - i.start))
            x_byixjc = x_byiwc.unflatten(3, (-1, j.stop - j.start))
            yield (slice(None), y, x, i, j), x_byixjc.permute(0, 1, 3, 2, 4, 5)


def _shifted(some: slice, count: int, side: int, shift: int) -> Iterator[tuple[slice, slice, slice]]:
    """Where some of `count` windows of an axis lie in the image that was not shifted.

    Yields (which of these windows, which of their pixels, these pixels in the image). The last window comes in two
    pieces: it holds the image's end and its beginning.
    """
    whole = min(some.stop, count - 1) - some.start
    if whole > 0:
        start = shift + some.start * side
        yield slice(0, whole), slice(0, side), slice(start, start + whole * side)
    if some.stop == count:
        last = slice(whole, whole + 1)
        yield last, slice(0, side - shift), slice(count * side - side + shift, count * side)
        yield last, slice(side - shift, side), slice(0, shift)


class _Work:
    """The tensors of one attention as windows, and the order in which they are worked on."""

    def __init__(self, attention: Attention, table_pa: Tensor, images: tuple[Tensor, ...]) -> None:
        self.attention, self.table_pa = attention, table_pa
        q, k, v = _query_key_value(images)
        cut = attention.cut
        self.query_image, self.q = q, cut.windows(q)
        self.k = cut.key_windows(key_image(k, cut))
        keys = [_Windows(x, cut.key_windows(x), attention.shift) for x in (key_image(k, cut), key_image(v, cut))]
        self.given = {"q": _Windows(q, self.q, attention.shift), "k": keys[0], "v": keys[1]}
        self.scale = (self.q.shape[-1] // attention.num_heads) ** -0.5
        self.num_keys = self.k.shape[3] * self.k.shape[4]
        scores_per_row = attention.num_heads * self.q.shape[4] * self.num_keys
        most, num_rows = 2 * SCORES_BYTES // q.element_size(), self.q.shape[3]
        shares = -(-num_rows // max(1, min(num_rows, most // scores_per_row)))
        self.rows_at_once = -(-num_rows // shares)
        scores = most if q.element_size() < 4 else most // 2
        windows = scores // (scores_per_row * self.rows_at_once)
        self.windows_at_once = max(1, min(windows, self.q.shape[:3].numel()))
        self.buffer = room("scores", (self.windows_at_once * self.rows_at_once * scores_per_row,), q.dtype)

    def bands(self) -> Iterator[_Band]:
        """All windows, about BAND_BYTES at a time."""
        images, rows, columns = self.q.shape[:3]
        row_bytes = columns * (self.q[0, 0, 0].numel() + 2 * self.k[0, 0, 0].numel()) * self.q.element_size()
        at_once = max(1, BAND_BYTES // row_bytes)
        if at_once >= rows:
            for some in _slices(images, at_once // rows):
                yield _Band(some, slice(0, rows))
        else:
            for image, some in itertools.product(_slices(images, 1), _slices(rows, at_once)):
                yield _Band(image, some)

    def rows(self) -> Iterator[slice]:
        """Rows of queries inside the windows whose scores fit the buffer."""
        return _slices(self.q.shape[3], self.rows_at_once)

    def parts(self, band: _Band) -> Iterator[_Part]:
        """The windows of a band, as many at once as fit the buffer."""
        columns, rows = self.q.shape[2], band.rows.stop - band.rows.start
        heads = self.attention.num_heads
        for some in _slices((band.images.stop - band.images.start) * rows * columns, self.windows_at_once):
            windows = range(some.start, some.stop)
            masks = tuple(self._mask(band.rows.start + w // columns % rows, w % columns) for w in windows)
            yield _Part(slice(some.start * heads, some.stop * heads), masks)

    def _mask(self, row: int, column: int) -> int | None:
        """The mask of the window in this place."""
        if self.attention.masks_gnm is None:
            return None
        in_last = (row == self.q.shape[1] - 1, column == self.q.shape[2] - 1)
        return {(False, False): None, (True, False): 0, (False, True): 1, (True, True): 2}[in_last]

    def together(self, name: str, windows: _Windows, band: _Band) -> Tensor:
        """(V, N, D): a copy of a band in the order of its windows and heads, in the room of this name."""
        batch, rows, columns, i, j, channels = windows.all[band.images, band.rows].shape
        heads = self.attention.num_heads
        x_byxaijd = room(name, (batch, rows, columns, heads, i, j, channels // heads), windows.all.dtype)
        for index, piece_byxijc in windows.pieces(band):
            piece_byxijad = piece_byxijc.unflatten(-1, (heads, -1))
            x_byxaijd[(*index[:3], slice(None), *index[3:])] = piece_byxijad.permute(0, 1, 2, 5, 3, 4, 6)
        return x_byxaijd.flatten(0, 3).flatten(1, 2)

    def apart(self, x_vnd: Tensor, windows: _Windows, band: _Band) -> Tensor:
        """What `together` brought together, as (B, Y, X, I, J, A, D) again."""
        batch, rows, columns, i, j, _ = windows.all[band.images, band.rows].shape
        x_byxaijd = x_vnd.unflatten(1, (i, j)).unflatten(0, (batch, rows, columns, self.attention.num_heads))
        return x_byxaijd.permute(0, 1, 2, 4, 5, 3, 6)

    def put(self, windows: _Windows, band: _Band, x_vnd: Tensor, scale: float = 1) -> None:
        """Write `scale` times what `together` would read."""
        x_byxijad = self.apart(x_vnd, windows, band)
        for index, piece_byxijc in windows.pieces(band):
            place_byxijad = piece_byxijc.unflatten(-1, (self.attention.num_heads, -1))
            if scale == 1:
                place_byxijad.copy_(x_byxijad[index])
            else:
                torch.mul(x_byxijad[index], scale, out=place_byxijad)

    def queries(self, rows: slice) -> slice:
        """The queries of some rows of a window."""
        width = self.q.shape[4]
        return slice(rows.start * width, rows.stop * width)

    def bias(self, rows: slice, gather: "Gather") -> Tensor:
        """(A, N, M): of the queries in some rows of any window, without its mask."""
        queries = self.queries(rows)
        return gather(self.table_pa, self.attention.index_rows(queries.start, queries.stop), self.q.dtype)

    def weights(self, part: _Part, rows: slice, q_vnd: Tensor, k_vmd: Tensor, bias_anm: Tensor) -> Tensor:
        """(V, N, M): softmax of the scores, in the buffer. In bf16 scores are rounded like all other products."""
        shape = len(part.masks), *bias_anm.shape
        scores_wanm = self.buffer[: math.prod(shape)].view(shape)
        masks_gnm, queries = self.attention.masks_gnm, self.queries(rows)
        if masks_gnm is None or set(part.masks) == {None}:
            scores_wanm.copy_(bias_anm)
        else:
            for mask, scores_anm in zip(part.masks, scores_wanm, strict=True):
                if mask is None:
                    scores_anm.copy_(bias_anm)
                else:
                    torch.add(bias_anm, masks_gnm[mask, queries].to(bias_anm.dtype), out=scores_anm)
        scores_vnm = scores_wanm.flatten(0, 1)
        scores_vnm.baddbmm_(q_vnd, k_vmd.transpose(1, 2), alpha=self.scale)
        return torch.softmax(scores_vnm, -1, out=scores_vnm)


class _Rooms(threading.local):
    """See `room`."""

    def __init__(self) -> None:
        self.by_name: dict[tuple[str, torch.dtype], Tensor] = {}


_ROOMS = _Rooms()


def room(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for what one call writes and reads again: kept, since fresh memory costs as much time as a copy.

    Of a name every thread has one room per dtype, as large as was ever needed, up to KEPT_BYTES; what lies in it is
    not defined.
    """
    size, rooms = math.prod(shape), _ROOMS.by_name
    if size * dtype.itemsize > KEPT_BYTES:
        return torch.empty(shape, dtype=dtype)
    if (name, dtype) not in rooms or len(rooms[name, dtype]) < size:
        with torch.inference_mode(False):  # else it could not be used in training later
            rooms[name, dtype] = torch.empty(size, dtype=dtype)
    return rooms[name, dtype][:size].view(shape)


def _cast(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, in the room of this name."""
    return x if x.dtype == dtype else room(name, x.shape, dtype).copy_(x)


def _slices(count: int, at_once: int) -> Iterator[slice]:
    """0 .. count in slices of at most `at_once`."""
    for start in range(0, count, at_once):
        yield slice(start, min(start + at_once, count))


Gather = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(bias table, rows (N, M), dtype) -> (A, N, M)."""


def gather_bias(table_pa: Tensor, index_nm: Tensor, dtype: torch.dtype) -> Tensor:
    """(A, N, M): the bias of each head and pair; negative rows count from the table's end."""
    rows = index_nm.flatten().remainder(len(table_pa))
    # cast last: rows of bf16 are slow to select
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


def _narrow_room(name: str, x_vnd: Tensor) -> Tensor:
    """Room for a result of `_narrow_product` as large as x, (V, N, D)."""
    if x_vnd.dtype == torch.float32:
        return room(name, x_vnd.transpose(1, 2).shape, x_vnd.dtype).transpose(1, 2)
    return room(name, x_vnd.shape, x_vnd.dtype)


def _narrow_product(out_vnd: Tensor, a_vnm: Tensor, b_vmd: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or added to it. In float32 as b.T @ a.T: BLAS is twice as fast at short rows as at columns."""
    if a_vnm.dtype == torch.float32:
        out_vnd, a_vnm, b_vmd = (x.transpose(1, 2) for x in (out_vnd, b_vmd, a_vnm))
    if add:
        out_vnd.baddbmm_(a_vnm, b_vmd)
    elif out_vnd.is_contiguous():
        torch.bmm(a_vnm, b_vmd, out=out_vnd)
    else:  # BLAS would take one matrix at a time
        out_vnd.copy_(torch.bmm(a_vnm, b_vmd))


def _attend(work: _Work, gather: Gather) -> Tensor:
    out_bhwc = torch.empty_like(work.query_image, memory_format=torch.contiguous_format)
    out = _Windows(out_bhwc, work.attention.cut.windows(out_bhwc), work.attention.shift)
    for band in work.bands():
        q_vnd, k_vmd, v_vmd = (work.together(name, windows, band) for name, windows in work.given.items())
        out_vnd = _narrow_room("out", q_vnd)
        for rows in work.rows():
            bias_anm, queries = work.bias(rows, gather), work.queries(rows)
            for part in work.parts(band):
                weights_vnm = work.weights(part, rows, q_vnd[part.heads, queries], k_vmd[part.heads], bias_anm)
                _narrow_product(out_vnd[part.heads, queries], weights_vnm, v_vmd[part.heads])
        work.put(out, band, out_vnd)
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
        for band in work.bands():
            grads.add(band)
        return None, grads.table_ap.t(), *grads.images()


class _Gradients:
    """Sums up the gradients of q, k, v and the bias table of one attention."""

    def __init__(self, work: _Work, images: tuple[Tensor, ...], grad_bhwc: Tensor) -> None:
        cut, shift = work.attention.cut, work.attention.shift
        self.work = work
        grad_bhwc = grad_bhwc.contiguous()
        self.given = work.given | {"out": _Windows(grad_bhwc, cut.windows(grad_bhwc), shift)}
        new = torch.zeros_like if cut.rim else torch.empty_like
        self.targets = tuple(new(image, memory_format=torch.contiguous_format) for image in images)
        q, k, v = _query_key_value(self.targets)
        self.keys, self.key_images = (k, v), (key_image(k, cut), key_image(v, cut))
        self.q = _Windows(q, cut.windows(q), shift)
        self.k, self.v = (_Windows(image, cut.key_windows(image), shift) for image in self.key_images)
        self.table_ap = torch.zeros_like(work.table_pa.t(), memory_format=torch.contiguous_format)
        self.buffer = room("score gradients", work.buffer.shape, work.buffer.dtype)

    def add(self, band: _Band) -> None:
        """Add what a band contributes."""
        work, heads = self.work, self.work.attention.num_heads
        given = [work.together(name, windows, band) for name, windows in self.given.items()]
        keys_meet = work.rows_at_once < work.q.shape[3]
        made = [_narrow_room(f"{name} gradients", x) for name, x in zip(work.given, given[:3], strict=True)]
        if keys_meet:
            for keys in made[1:]:
                keys.zero_()
        for rows in work.rows():
            bias_anm, queries = work.bias(rows, gather_bias), work.queries(rows)
            grad_bias_anm = self.table_ap.new_zeros(heads, queries.stop - queries.start, work.num_keys)
            for part in work.parts(band):
                grad_vnm = self._add_part(part, rows, bias_anm, given, made, keys_meet)
                for grad_anm in grad_vnm.split(heads):
                    grad_bias_anm += _cast("bias gradient", grad_anm, grad_bias_anm.dtype)
            index_nm = work.attention.index_rows(queries.start, queries.stop)
            index = index_nm.flatten().remainder(len(work.table_pa))
            self.table_ap.index_add_(1, index, grad_bias_anm.flatten(1))
        work.put(self.q, band, made[0], work.scale)
        self._put_keys(self.k, band, made[1], work.scale)
        self._put_keys(self.v, band, made[2], 1)

    def _add_part(
        self,
        part: _Part,
        rows: slice,
        bias_anm: Tensor,
        given: list[Tensor],
        made: list[Tensor],
        keys_meet: bool,
    ) -> Tensor:
        """Add what some queries of a part contribute; returns the gradient of the scores, (V, N, M)."""
        here, queries = part.heads, self.work.queries(rows)
        q_vnd, k_vmd, v_vmd, out_vnd = given[0][here, queries], given[1][here], given[2][here], given[3][here, queries]
        weights_vnm = self.work.weights(part, rows, q_vnd, k_vmd, bias_anm)
        _narrow_product(made[2][here], weights_vnm.transpose(1, 2), out_vnd, add=keys_meet)
        grad_vnm = self.buffer[: weights_vnm.numel()].view_as(weights_vnm)
        torch.bmm(out_vnd, v_vmd.transpose(1, 2), out=grad_vnm)
        torch.ops.aten._softmax_backward_data.out(grad_vnm, weights_vnm, -1, grad_vnm.dtype, grad_input=grad_vnm)
        _narrow_product(made[0][here, queries], grad_vnm, k_vmd)
        _narrow_product(made[1][here], grad_vnm.transpose(1, 2), q_vnd, add=keys_meet)
        return grad_vnm

    def _put_keys(self, windows: _Windows, band: _Band, x_vmd: Tensor, scale: float) -> None:
        """Write a band of keys or values where windows do not overlap, else add it there."""
        cut = self.work.attention.cut
        if not cut.rim:
            self.work.put(windows, band, x_vmd, scale)
            return
        place = windows.all[band.images, band.rows].unflatten(-1, (self.work.attention.num_heads, -1))
        x_byxijad = self.work.apart(x_vmd, windows, band)
        side = windows.all.shape[3]
        apart = -(-side // (side - 2 * cut.rim))  # windows so far from each other share no pixel
        for y, x in itertools.product(range(apart), repeat=2):
            place[:, y::apart, x::apart].add_(x_byxijad[:, y::apart, x::apart], alpha=scale)

    def images(self) -> tuple[Tensor, ...]:
        """The gradients in the shape of the images."""
        rim = self.work.attention.cut.rim
        if rim:
            for key, image in zip(self.keys, self.key_images, strict=True):
                key.add_(image[:, rim:-rim, rim:-rim])
        return self.targets
