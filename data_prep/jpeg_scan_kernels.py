"""Compiled loops of `jpeg_scans`: Huffman codes of a stretch of blocks, read for whether they are sound (ITU-T T.81).

`bits` are a stretch's bytes without their stuffing and with eight zeros behind them. A table has an entry for each 16
bits: the length of the code that they begin with times 256, and its symbol; 0 where there is no such code.
numba infers the types, so they are not written; its cache notices changes of this file alone, so all loops are here.
"""
# mypy: disable-error-code="no-untyped-def"

import numpy as np

from data_prep.compiled import compiled

DC_AND_AC, DC_FIRST, DC_AGAIN, AC_FIRST, AC_AGAIN = range(5)
_UNSOUND = -1
_ONE = np.uint64(1)


@compiled
def _peek(bits, at, count):
    """The next `count` <= 16 bits as a number."""
    p = at >> 3
    word = np.int64(bits[p]) << 16 | np.int64(bits[p + 1]) << 8 | np.int64(bits[p + 2])
    return word >> (24 - (at & 7) - count) & ((1 << count) - 1)


@compiled
def _run(bits, at, size):
    """Blocks in a run of ended blocks, this one included, whose length has `size` bits behind its code."""
    return (1 << size) + _peek(bits, at, size)


@compiled
def _dc(bits, at, table):
    """Where a block's first coefficient ends."""
    entry = np.int64(table[_peek(bits, at, 16)])
    return at + (entry >> 8) + (entry & 255) if entry and entry & 255 < 16 else _UNSOUND


@compiled
def _ac_first(bits, at, table, first, last, run, known, block, length):
    """(where a block's coefficients first..last end, blocks left in the run); which are not zero goes to `known`."""
    if run:
        return at, run - 1
    k = first
    while k <= last:
        entry = np.int64(table[_peek(bits, at, 16)])
        at += entry >> 8
        zeros, size = entry >> 4 & 15, entry & 15
        if entry == 0 or at > length:
            return _UNSOUND, 0
        if size:
            k += zeros
            at += size
            if k > last:
                return _UNSOUND, 0
            known[block] |= _ONE << np.uint64(k)
            k += 1
        elif zeros == 15:
            k += 16
        else:
            return at + zeros, _run(bits, at, zeros) - 1
    return at, 0


@compiled
def _ac_again(bits, at, table, first, last, run, known, block, length):
    """As `_ac_first`, for one more bit of the coefficients that are known, and the new ones among them."""
    k = first
    while run == 0 and k <= last:
        entry = np.int64(table[_peek(bits, at, 16)])
        at += entry >> 8
        zeros, size = entry >> 4 & 15, entry & 15
        if entry == 0 or size > 1 or at > length:
            return _UNSOUND, 0
        if size == 0 and zeros < 15:
            run = _run(bits, at, zeros)
            at += zeros
            break
        at += size
        while k <= last:
            if known[block] >> np.uint64(k) & _ONE:
                at += 1
            elif zeros == 0:
                break
            else:
                zeros -= 1
            k += 1
        if size:
            if k > last:
                return _UNSOUND, 0
            known[block] |= _ONE << np.uint64(k)
        k += 1
    if run:
        while k <= last:
            at += np.int64(known[block] >> np.uint64(k) & _ONE)
            k += 1
        run -= 1
    return at, run


@compiled
def parse(bits, kind, begin, end, columns, components, dc, ac, first, last, known):
    """Where the MCUs begin..end of a scan end, in bits; -1 where they are unsound.

    `columns` MCUs are a row of the scan. A component of `components` is (blocks across and down in an MCU, blocks in
    a row of `known`, where `known` begins for it); `dc` and `ac` are its tables.
    """
    at, run, length = np.int64(0), np.int64(0), np.int64(8 * (bits.size - 8))
    for mcu in range(begin, end):
        for c in range(components.shape[0]):
            across, down, stride, start = components[c]
            for part in range(across * down):
                row, column = mcu // columns * down + part // across, mcu % columns * across + part % across
                block = start + row * stride + column
                if kind == DC_AGAIN:
                    at += 1
                elif kind == DC_FIRST:
                    at = _dc(bits, at, dc[c])
                elif kind == DC_AND_AC:
                    at = _dc(bits, at, dc[c])
                    if 0 <= at <= length:
                        at, run = _ac_first(bits, at, ac[c], 1, 63, 0, known, block, length)
                    if run:
                        return _UNSOUND
                elif kind == AC_FIRST:
                    at, run = _ac_first(bits, at, ac[c], first, last, run, known, block, length)
                else:
                    at, run = _ac_again(bits, at, ac[c], first, last, run, known, block, length)
                if at < 0 or at > length:
                    return _UNSOUND
    return at if run == 0 else _UNSOUND
