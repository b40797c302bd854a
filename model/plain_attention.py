"""Attention in the plainest operations, for exports: every size is a symbol there, so nothing may depend on one.

The same values as `model.attention`, with all scores of an image at once.

Axes in tensor names: b batch, h height, w width, c channels, y/x row/column of a window in the image, i/j row
and column inside a window, n queries of a window, m keys a window sees, a heads, d channels of a head, g kinds of
mask.
"""

import torch
from torch import Tensor

from model.window_kernel import Attention
from model.windows import Grids, key_image


def plain_attention(attention: Attention, table_pa: Tensor, *images_bhwc: Tensor) -> Tensor:
    """As `model.attention.attend_image`."""
    images = images_bhwc[0].chunk(3, dim=-1) if len(images_bhwc) == 1 else images_bhwc
    cut = attention.cut
    q_byxijc = cut.windows(images[0])
    rows, columns = q_byxijc.shape[3:5]
    q = _split_heads(q_byxijc, attention.num_heads)
    k, v = (_split_heads(cut.key_windows(key_image(x, cut)), attention.num_heads) for x in images[1:])
    is_grid = isinstance(cut, Grids)
    index_nm = _grid_rows(rows, columns, q.device) if is_grid else attention.index_rows(0, rows * columns)
    bias_anm = table_pa[index_nm].permute(2, 0, 1)
    scores_byxanm = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias_anm
    if attention.masks_gnm is not None:
        scores_byxanm = scores_byxanm + _masks(attention.masks_gnm, q.shape[1], q.shape[2])
    out_byxand = scores_byxanm.softmax(-1) @ v
    out_byxijad = out_byxand.transpose(3, 4).unflatten(3, (rows, columns))
    return cut.join(out_byxijad.flatten(5, 6))


def _split_heads(windows_byxijc: Tensor, num_heads: int) -> Tensor:
    """(B, Y, X, I, J, C) -> (B, Y, X, A, N, D)."""
    x_byxnad = windows_byxijc.flatten(3, 4).unflatten(4, (num_heads, -1))
    return x_byxnad.transpose(3, 4)


def _grid_rows(height: int, width: int, device: torch.device) -> Tensor:
    """`model.windows.grid_rows` of all queries, without dividing by a size, which the ONNX exporter cannot take."""
    row = torch.arange(height, device=device)[:, None].expand(height, width).reshape(-1)
    column = torch.arange(width, device=device)[None, :].expand(height, width).reshape(-1)
    rows = row[:, None] - row[None, :] + height - 1
    return rows * (2 * width - 1) + column[:, None] - column[None, :] + width - 1


def _masks(masks_gnm: Tensor, rows: int, columns: int) -> Tensor:
    """(Y, X, 1, N, M): nothing inside, and the masks of the last row, the last column and the corner."""
    device = masks_gnm.device
    last_row = (torch.arange(rows, device=device) == rows - 1).long()
    last_column = (torch.arange(columns, device=device) == columns - 1).long()
    with_none_gnm = torch.cat([torch.zeros_like(masks_gnm[:1]), masks_gnm])
    return with_none_gnm[last_row[:, None] + 2 * last_column[None, :]][:, :, None]
