"""Cuts, index tables and masks against direct definitions."""

import pytest
import torch

from model.windows import Cut, Grids, Runs, Squares, grid_rows, key_image, overlap_index, shift_masks, window_index


def test_squares_hold_their_own_pixels() -> None:
    x_bhwc = torch.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    windows = Squares(4).windows(x_bhwc)
    assert windows.shape == (2, 2, 3, 4, 4, 3)
    assert torch.equal(windows[1, 1, 2], x_bhwc[1, 4:8, 8:12])


def test_overlapping_squares_reach_over_the_rim_and_see_zeros_outside() -> None:
    x_bhwc = torch.rand(1, 8, 8, 2) + 1
    cut = Squares(4, rim=1)
    windows = cut.key_windows(key_image(x_bhwc, cut))
    assert windows.shape == (1, 2, 2, 6, 6, 2)
    first = windows[0, 0, 0]
    assert torch.equal(first[1:, 1:], x_bhwc[0, :5, :5])
    assert not first[0].any()
    assert not first[:, 0].any()


def test_grids_hold_pixels_at_intervals() -> None:
    x_bhwc = torch.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    windows = Grids(4).windows(x_bhwc)
    assert windows.shape == (2, 4, 4, 2, 3, 3)
    assert torch.equal(windows[1, 2, 3], x_bhwc[1, 2::4, 3::4])


def test_runs_follow_the_rows() -> None:
    x_bhwc = torch.arange(8 * 12).reshape(1, 8, 12, 1)
    windows = Runs(4).windows(x_bhwc)
    assert windows.shape == (1, 2, 3, 4, 4, 1)
    assert windows[0, 1, 2].flatten().tolist() == list(range(80, 96))


@pytest.mark.parametrize("cut", [Squares(4), Grids(2), Runs(4)])
def test_windows_are_views_and_join_again(cut: Cut) -> None:
    x_bhwc = torch.rand(2, 8, 12, 3)
    windows = cut.windows(x_bhwc)
    assert windows.untyped_storage().data_ptr() == x_bhwc.untyped_storage().data_ptr()
    assert torch.equal(cut.key_windows(x_bhwc), windows)
    assert torch.equal(cut.join(windows.contiguous()), x_bhwc)


@pytest.mark.parametrize("window", [2, 4])
def test_window_index_depends_on_the_offset_alone(window: int) -> None:
    index = window_index(window)
    for query in range(window**2):
        for key in range(window**2):
            dy, dx = query // window - key // window, query % window - key % window
            assert index[query, key] == (dy + window - 1) * (2 * window - 1) + dx + window - 1


def test_grid_rows_are_parts_of_one_index_over_all_offsets() -> None:
    index = grid_rows(3, 5, torch.device("cpu"), 0, 15)
    assert index.shape == (15, 15)
    assert all(len(row.unique()) == 15 for row in index)
    assert (index.min(), index.max()) == (0, 5 * 9 - 1)
    assert torch.equal(grid_rows(3, 5, torch.device("cpu"), 4, 9), index[4:9])


def test_overlap_index_wraps_around_without_two_offsets_sharing_a_row() -> None:
    index = overlap_index(4, 6)
    assert index.min() < 0
    rows = index.remainder(81)
    offsets = {}
    for query in range(16):
        for key in range(36):
            offset = key // 6 - query // 4, key % 6 - query % 4
            assert offsets.setdefault(offset, rows[query, key].item()) == rows[query, key]
    assert len(set(offsets.values())) == len(offsets) == 81


@pytest.mark.parametrize("size", [(4, 4), (8, 12)])
def test_masks_are_those_of_swin(size: tuple[int, int]) -> None:
    """Swin numbers the regions of the whole shifted image and forbids pairs of different numbers."""
    region = torch.zeros(1, *size, 1)
    cuts = (slice(0, -4), slice(-4, -2), slice(-2, None))
    for row, rows in enumerate(cuts):
        for column, columns in enumerate(cuts):
            region[:, rows, columns] = 3 * row + column
    numbers = Squares(4).windows(region)[0].flatten(2)
    expected = (numbers[..., :, None] != numbers[..., None, :]).float() * -100
    masks = shift_masks(4)
    assert torch.equal(expected[-1, -1], masks[2])
    assert all(torch.equal(mask, masks[0]) for mask in expected[-1, :-1])
    assert all(torch.equal(mask, masks[1]) for mask in expected[:-1, -1])
    assert not expected[:-1, :-1].any()
