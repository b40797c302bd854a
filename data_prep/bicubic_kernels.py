"""The compiled loops of bicubic shrinking: the sums of the plain code in `bicubic`, in the same order.

numba infers the types, so they are not written.
"""
# mypy: disable-error-code="no-untyped-def"

import numpy as np

from data_prep.compiled import compiled

_PADDING = 8  # rows of 512 bytes would fall on a few lines of the processor's cache


@compiled
def shrink(pixels, rows, row_weights, columns, column_weights, rounded):
    """Resample (3, h, w) uint8 down its rows, then its columns; `rounded` rounds to 0..255 after each pass.

    `rows` (height, taps) and `columns` (width, taps) index `pixels`. Returns (3, width, height) float64.
    """
    height, width, wide = rows.shape[0], columns.shape[0], pixels.shape[2]
    result = np.empty((pixels.shape[0], width, height))
    lines, sums = np.empty((pixels.shape[1], wide)), np.empty(wide)
    turned = np.empty((wide, height + _PADDING))
    for channel in range(pixels.shape[0]):
        for y in range(pixels.shape[1]):
            lines[y] = pixels[channel, y]
        for y in range(height):
            _weighted_sum(lines, rows[y], row_weights[y], rounded, sums)
            for x in range(wide):
                turned[x, y] = sums[x]
        for x in range(width):
            _weighted_sum(turned, columns[x], column_weights[x], rounded, result[channel, x])
    return result


@compiled
def _weighted_sum(lines, indices, weights, rounded, total):
    """total = sum of weights[t] * lines[indices[t]], added in order."""
    taps = indices.size
    weight, line = weights[0], lines[indices[0]]
    for x in range(total.size):
        total[x] = line[x] * weight
    for t in range(1, taps - 3, 4):  # four at once spare loads and stores; the order of the additions is the same
        line0, line1, line2, line3 = (
            lines[indices[t]],
            lines[indices[t + 1]],
            lines[indices[t + 2]],
            lines[indices[t + 3]],
        )
        weight0, weight1, weight2, weight3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for x in range(total.size):
            part = total[x] + line0[x] * weight0 + line1[x] * weight1
            total[x] = part + line2[x] * weight2 + line3[x] * weight3
    for t in range(taps - (taps - 1) % 4, taps):
        weight, line = weights[t], lines[indices[t]]
        for x in range(total.size):
            total[x] += line[x] * weight
    if rounded:
        for x in range(total.size):
            total[x] = min(max(np.floor(total[x] + 0.5), 0.0), 255.0)
