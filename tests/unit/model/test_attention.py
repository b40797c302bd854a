"""Every way to compute an attention against its direct definition: values, gradients, and what is kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import model.attention
import model.window_kernel
from model.attention import HEAD_MULTIPLE, attend_image, filled_attention, fused_attention, rolled, rows_of
from model.window_kernel import Attention, gather_bias, window_attention
from model.windows import Cut, Grids, Runs, Squares, grid_rows, key_image, overlap_index, shift_masks, window_index
from tests.bench.measure import saved_bytes

HEADS, DIM = 2, 6
WAYS = {
    "window by window": window_attention,
    "fused": partial(rolled, fused_attention),
    "fused as on CUDA": partial(rolled, partial(filled_attention, HEAD_MULTIPLE)),
    "chosen by device": attend_image,
}


def direct(attention: Attention, table: Tensor, *images: Tensor) -> Tensor:
    """Window by window and head by head, with a mask per window made from pixel positions."""
    shift = attention.shift
    images = tuple(image.roll((-shift, -shift), (1, 2)) for image in images)
    q, k, v = images[0].chunk(3, dim=-1) if len(images) == 1 else images
    cut = attention.cut
    q6, k6, v6 = cut.windows(q), cut.key_windows(key_image(k, cut)), cut.key_windows(key_image(v, cut))
    _, rows, columns, side_i, side_j, _ = q6.shape
    index = attention.index_rows(0, side_i * side_j)
    out = torch.zeros_like(q6)
    for b, y, x in [(b, y, x) for b in range(len(q6)) for y in range(rows) for x in range(columns)]:
        tokens = [t[b, y, x].flatten(0, 1).unflatten(-1, (HEADS, -1)) for t in (q6, k6, v6)]
        for head in range(HEADS):
            q_nd, k_md, v_md = (t[:, head] for t in tokens)
            scores = q_nd @ k_md.T * q_nd.shape[1] ** -0.5 + table[index][..., head]
            if attention.masks_gnm is not None:
                scores = scores + mask_of(y == rows - 1, x == columns - 1, attention.masks_gnm).to(scores)
            channels = slice(head * v_md.shape[1], (head + 1) * v_md.shape[1])
            out[b, y, x, ..., channels] = (scores.softmax(-1) @ v_md).unflatten(0, (side_i, side_j))
    return cut.join(out).roll((shift, shift), (1, 2))


def mask_of(last_row: bool, last_column: bool, masks: Tensor) -> Tensor:
    if last_row and last_column:
        return masks[2]
    return masks[0] if last_row else masks[1] if last_column else torch.zeros_like(masks[0])


def case(name: str, size: tuple[int, int]) -> tuple[Attention, int, int]:
    """The attention, the rows of its bias table, and how many images its q, k and v come in."""
    table_side = 7
    if name == "overlapping squares":
        index, table_side = overlap_index(4, 6), 9
        return Attention(Squares(4, rim=1), HEADS, partial(rows_of, index)), table_side**2, 1
    if name == "grids":
        height, width = size[0] // 4, size[1] // 4
        rows = partial(grid_rows, height, width, torch.device("cpu"))
        return Attention(Grids(4), HEADS, rows), (2 * height - 1) * (2 * width - 1), 3
    cut: Cut = Runs(4) if name == "masked runs" else Squares(4)
    masks = None if name == "squares" else shift_masks(4).double()
    shift = {"shifted squares": 2, "oddly shifted squares": 1}.get(name, 0)
    return Attention(cut, HEADS, partial(rows_of, window_index(4)), masks, shift), table_side**2, 1


CASES = (
    "squares",
    "masked squares",
    "shifted squares",
    "oddly shifted squares",
    "masked runs",
    "overlapping squares",
    "grids",
)
SIZES = ((4, 4), (4, 8), (8, 4), (8, 12), (12, 16))


def tensors(num_rows: int, num_images: int, size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Bias table and images, leaves of a graph."""
    torch.manual_seed(0)
    channels = 3 * DIM if num_images == 1 else DIM
    made = [torch.randn(num_rows, HEADS)] + [torch.randn(2, *size, channels) for _ in range(num_images)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def gradients(way: Callable[..., Tensor], attention: Attention, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    out = way(attention, *leaves)
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients(way: str, name: str, size: tuple[int, int]) -> None:
    attention, num_rows, num_images = case(name, size)
    leaves = tensors(num_rows, num_images, size, torch.float64)
    assert torch.allclose(WAYS[way](attention, *leaves), direct(attention, *leaves), atol=1e-12)
    pairs = zip(gradients(WAYS[way], attention, leaves), gradients(direct, attention, leaves), strict=True)
    assert all(torch.allclose(ours, expected, atol=1e-12) for ours, expected in pairs)


@pytest.mark.parametrize("budget", [1, 700, 5000])
@pytest.mark.parametrize("name", CASES)
def test_any_size_of_the_buffer_gives_the_same(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one row of queries at a time to several windows at a time, in float32, whose products are transposed."""
    attention, num_rows, num_images = case(name, (12, 16))
    leaves = tensors(num_rows, num_images, (12, 16), torch.float32)
    for limit in ("SCORES_BYTES", "BAND_BYTES", "KEPT_BYTES"):
        monkeypatch.setattr(model.window_kernel, limit, budget)
    assert torch.allclose(window_attention(attention, *leaves), direct(attention, *leaves), atol=1e-5)
    pairs = zip(gradients(window_attention, attention, leaves), gradients(direct, attention, leaves), strict=True)
    assert all(torch.allclose(ours, expected, atol=1e-4) for ours, expected in pairs)


@pytest.mark.parametrize("pairs", [1, 40])
@pytest.mark.parametrize("name", ["squares", "overlapping squares", "grids"])
def test_queries_in_pieces_give_the_same(name: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, num_rows, num_images = case(name, (8, 12))
    leaves = tensors(num_rows, num_images, (8, 12), torch.float64)
    monkeypatch.setattr(model.attention, "PAIRS_AT_ONCE", pairs)
    assert torch.allclose(fused_attention(attention, *leaves), direct(attention, *leaves), atol=1e-12)
    given = (gradients(way, attention, leaves) for way in (fused_attention, direct))
    assert all(torch.allclose(ours, expected, atol=1e-12) for ours, expected in zip(*given, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_near_double(way: str) -> None:
    attention, num_rows, num_images = case("masked squares", (8, 12))
    leaves = tensors(num_rows, num_images, (8, 12), torch.float64)
    expected = direct(attention, *leaves)
    out = WAYS[way](attention, leaves[0].float(), *(leaf.bfloat16() for leaf in leaves[1:]))
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() <= 0.03 * expected.abs().max()


class Scores(torch.nn.Module):
    def __init__(self, name: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.attention, num_rows, self.num_images = case(name, size)
        self.table = torch.nn.Parameter(torch.zeros(num_rows, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        return window_attention(self.attention, self.table, *((x * 2).chunk(self.num_images, dim=-1)))


@pytest.mark.parametrize("name", CASES)
def test_only_q_k_and_v_are_kept(name: str) -> None:
    x = torch.rand(1, 16, 16, 3 * DIM, requires_grad=True)
    assert saved_bytes(Scores(name, (16, 16)), x) == x.nbytes


def test_without_gradients_the_bias_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, num_rows, num_images = case("masked squares", (8, 8))
    table, image = tensors(num_rows, num_images, (8, 8), torch.float32)
    table, calls = torch.nn.Parameter(table.detach()), []
    expected = window_attention(attention, table, image)

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return gather_bias(*arguments)

    monkeypatch.setattr(model.window_kernel, "gather_bias", counted)
    with torch.no_grad():
        assert all(torch.allclose(window_attention(attention, table, image), expected, atol=1e-6) for _ in range(3))
        assert len(calls) == 1
        table *= 2
        assert not torch.allclose(window_attention(attention, table, image), expected, atol=1e-6)


def test_frozen_tables_and_images_get_no_gradient() -> None:
    attention, num_rows, num_images = case("squares", (8, 8))
    table, image = tensors(num_rows, num_images, (8, 8), torch.float64)
    window_attention(attention, table.detach(), image).sum().backward()
    assert image.grad is not None
    assert table.grad is None


def test_what_inference_leaves_behind_serves_training() -> None:
    attention, num_rows, num_images = case("shifted squares", (8, 12))
    leaves = tensors(num_rows, num_images, (8, 12), torch.float32)
    with torch.inference_mode():
        window_attention(attention, *leaves)
    gradients(window_attention, attention, leaves)


def test_gathered_bias_counts_negative_rows_from_the_end() -> None:
    table = torch.arange(10.0).reshape(5, 2)
    bias: Any = gather_bias(table, torch.tensor([[0, -1]]), torch.float32)
    assert bias.tolist() == [[[0.0, 8.0]], [[1.0, 9.0]]]
