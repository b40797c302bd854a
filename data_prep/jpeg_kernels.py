"""Compiled loops of the JPEG region decoder: Huffman decoding, inverse DCT, upsampling, colour.

Every pixel equals libjpeg-turbo's with its default choices (the accurate integer DCT "islow", "fancy" upsampling),
which is what Pillow uses. The arithmetic follows the published definitions: ITU-T T.81 for the entropy coding and
Loeffler, Ligtenberg and Moschytz 1989 for the DCT, in fixed point with 13 fractional bits.

Blocks outside the region are parsed, not decoded: of their coefficients just the number of bits is looked up, several
at a time. Nothing below the region's last row of blocks is read.

A *reader* is (at, filled, source): the next bit's number in `clean`, the scan's bytes so far without their stuffing;
how many bytes that holds; where in the file they continue. Unsigned indices spare numba's test for negative ones.
numba infers the types, so they are not written; its cache notices changes of this file alone, so all loops are here.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

import numpy as np

from data_prep.compiled import compiled

_U = np.uint64
_PEEK = 10  # bits that one look-up of a single code resolves
_PEEK_MANY = 11  # bits that one look-up of several codes resolves
_LARGEST_L1 = 5000  # above this sum of |coefficients| in a block 16-bit SIMD code may overflow: not ours to imitate
_MCU_BYTES = 2048  # no MCU is longer: 6 blocks of 64 codes of at most 31 bits
CLEAN_BYTES = 2 * _MCU_BYTES
_LANES = 16  # blocks that are transformed at once, interleaved

_ZIGZAG = np.array(
    [
        *(0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48),
        *(41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23),
        *(30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63),
    ],
    np.int64,
)

# fixed-point constants of the DCT: round(x * 2**13)
_F_0_298, _F_0_390, _F_0_541, _F_0_765, _F_0_899, _F_1_175 = 2446, 3196, 4433, 6270, 7373, 9633
_F_1_501, _F_1_847, _F_1_961, _F_2_053, _F_2_562, _F_3_072 = 12299, 15137, 16069, 16819, 20995, 25172


@compiled
def _entry(length, value):
    """A code's entry: its length (5 bits), its value's size (4), run (4), from bit 16 both lengths, from 24 steps.

    Steps lead to the next coefficient; an end of block has 64.
    """
    run, size = value >> 4, value & 15
    steps = run + 1
    if size == 0 and run != 15:
        steps = 64
    return length | size << 5 | run << 9 | (length + size) << 16 | steps << 24


@compiled
def _read_table(data, start, table, single, long_codes):
    """Build Huffman table number `table` from the 16 counts and the symbols at `start`; False where it is no code.

    single[table * 1024 + the next 10 bits] is an entry, 0 for a longer code; long_codes[table * 17 + length] is
    (first code beyond this length, offset from code to symbol).
    """
    base = table << _PEEK
    single[base : base + (1 << _PEEK)] = 0
    code, symbol = 0, start + 16
    for length in range(1, 17):
        count = np.int64(data[start + length - 1])
        if code + count >= 1 << length or symbol + count > data.size:  # no code is all ones
            return False
        long_codes[table * 17 + length, 0] = code + count
        long_codes[table * 17 + length, 1] = symbol - code
        for _ in range(count):
            if table % 2 == 0 and data[symbol] > 15:  # no size of a first coefficient
                return False
            if length <= _PEEK:
                entry = _entry(length, np.int64(data[symbol]))
                first = base + (code << (_PEEK - length))
                for index in range(first, first + (1 << (_PEEK - length))):
                    single[index] = entry
            code += 1
            symbol += 1
        code <<= 1
    return True


@compiled
def _combine(single, table, many, start):
    """many[start + the next 12 bits] says all the codes and values that end in them; 0 where none does.

    An entry holds their bits (8 bits), from bit 8 the steps before the last of them, from bit 16 all their steps.
    """
    for index in range(1 << _PEEK_MANY):
        bits, before, steps = 0, 0, 0
        while steps < 64:
            rest = (index << bits & ((1 << _PEEK_MANY) - 1)) >> (_PEEK_MANY - _PEEK)
            entry = np.int64(single[(table << _PEEK) + rest])
            longer = bits + (entry >> 16 & 63)
            if entry == 0 or longer > _PEEK_MANY:
                break
            bits, before, steps = longer, steps, steps + (entry >> 24)
        many[start + index] = bits | before << 8 | steps << 16


@compiled
def _long_entry(data, long_codes, table, next16):
    """The entry of a code of more than 10 bits; 0 where there is none."""
    for length in range(_PEEK + 1, 17):
        code = next16 >> (16 - length)
        if code < long_codes[table * 17 + length, 0]:
            return _entry(length, np.int64(data[long_codes[table * 17 + length, 1] + code]))
    return 0


@compiled
def _fill(data, clean, reader):
    """Room for an MCU: drop what was read, append bytes without stuffing. Stops at a marker, with zeros behind it."""
    at, filled, source = reader
    start = at >> 3
    for k in range(filled - start):
        clean[k] = clean[start + k]
    filled -= start
    while filled < CLEAN_BYTES - 8 and source + 1 < data.size:
        marked = source + 8 >= data.size
        if not marked:
            for k in range(8):
                marked |= data[_U(source + k)] == 0xFF
                clean[_U(filled + k)] = data[_U(source + k)]
        if not marked:
            filled, source = filled + 8, source + 8
            continue
        for _ in range(8):
            ended = source + 1 >= data.size
            if ended or (data[_U(source)] == 0xFF and data[_U(source + 1)] != 0):
                clean[filled : filled + _MCU_BYTES] = 0
                return at & 7, filled, source
            stuffed = data[_U(source)] == 0xFF
            clean[_U(filled)] = data[_U(source)]
            filled, source = filled + 1, source + 1 + stuffed
    clean[filled : filled + 8] = 0
    return at & 7, filled, source


@compiled
def _peek(clean, at):
    """The next 57 bits and more, uppermost."""
    p = _U(at >> 3)
    word = _U(clean[p]) << _U(56) | _U(clean[p + _U(1)]) << _U(48) | _U(clean[p + _U(2)]) << _U(40)
    word |= _U(clean[p + _U(3)]) << _U(32) | _U(clean[p + _U(4)]) << _U(24) | _U(clean[p + _U(5)]) << _U(16)
    return (word | _U(clean[p + _U(6)]) << _U(8) | _U(clean[p + _U(7)])) << _U(at & 7)


@compiled
def _code(data, single, long_codes, table, word):
    """The entry of the code that `word` begins with, 0 where there is none."""
    entry = np.int64(single[_U(table << _PEEK) + (word >> _U(64 - _PEEK))])
    if entry == 0:
        entry = np.int64(_long_entry(data, long_codes, table, np.int64(word >> _U(48))))
    return entry


@compiled
def _value(entry, word):
    """The signed number behind the code of `entry` that `word` begins with."""
    size = entry >> 5 & 15
    bits = word << _U(entry & 31)
    positive = np.int64(bits >> _U(63))
    # two shifts, for a size of 0; no branch, for signs cannot be predicted
    return np.int64(bits >> _U(1) >> _U(63 - size)) - (1 - positive) * ((1 << size) - 1)


@compiled
def _skip_ac(data, clean, at, single, long_codes, table, many):
    """Where a block ends whose coefficients after the first begin at bit `at`; -1 where it is unsound."""
    k = 1
    base = _U((table >> 1) << _PEEK_MANY)
    while k < 64:
        word = _peek(clean, at)
        entry = np.int64(many[base + (word >> _U(64 - _PEEK_MANY))])
        if entry and k + (entry >> 8 & 255) < 64:
            at += entry & 255
            k += entry >> 16
            if k < 64:
                entry = np.int64(many[base + (word << _U(entry & 255) >> _U(64 - _PEEK_MANY))])
                if entry and k + (entry >> 8 & 255) < 64:
                    at += entry & 255
                    k += entry >> 16
            continue
        entry = _code(data, single, long_codes, table, word)
        if entry == 0:
            return np.int64(-1)
        at += entry >> 16 & 63
        k += entry >> 24
    return at


@compiled
def _read_ac(data, clean, at, single, long_codes, table, quantizers, blocks, block):
    """As `_skip_ac`, and the dequantized coefficients go to `blocks` from `block`; -1 also for too large ones."""
    k, l1, base = 1, abs(np.int64(blocks[block])), (table >> 1) * 64
    while k < 64:
        word = _peek(clean, at)
        entry = _code(data, single, long_codes, table, word)
        if entry == 0:
            return np.int64(-1)
        at += entry >> 16 & 63
        if entry >> 5 & 15:
            k += entry >> 9 & 15
            if k > 63:
                return np.int64(-1)
            value = _value(entry, word) * quantizers[_U(base + k)]
            l1 += abs(value)
            blocks[_U(block + _ZIGZAG[_U(k)] * _LANES)] = value
            k += 1
        else:
            k += entry >> 24
    return at if l1 <= _LARGEST_L1 else np.int64(-1)


@compiled
def _pass(source, start, step, target, to, to_step, shift):
    """16 one-dimensional inverse DCTs at once, rounded and shifted down: 8 inputs `step` apart to 8 outputs."""
    half = np.int32(1) << (shift - np.int32(1))
    for n in range(_LANES):
        in0, in1 = source[_U(start + n)], source[_U(start + step + n)]
        in2, in3 = source[_U(start + 2 * step + n)], source[_U(start + 3 * step + n)]
        in4, in5 = source[_U(start + 4 * step + n)], source[_U(start + 5 * step + n)]
        in6, in7 = source[_U(start + 6 * step + n)], source[_U(start + 7 * step + n)]
        z1 = (in2 + in6) * np.int32(_F_0_541)
        even2 = z1 - in6 * np.int32(_F_1_847)
        even3 = z1 + in2 * np.int32(_F_0_765)
        even0 = ((in0 + in4) << np.int32(13)) + half
        even1 = ((in0 - in4) << np.int32(13)) + half
        y1, y2, y3, y4 = in7 + in1, in5 + in3, in7 + in3, in5 + in1
        y5 = (y3 + y4) * np.int32(_F_1_175)
        y1 = y1 * np.int32(-_F_0_899)
        y2 = y2 * np.int32(-_F_2_562)
        y3 = y5 - y3 * np.int32(_F_1_961)
        y4 = y5 - y4 * np.int32(_F_0_390)
        odd0 = in7 * np.int32(_F_0_298) + y1 + y3
        odd1 = in5 * np.int32(_F_2_053) + y2 + y4
        odd2 = in3 * np.int32(_F_3_072) + y2 + y3
        odd3 = in1 * np.int32(_F_1_501) + y1 + y4
        target[_U(to + n)] = (even0 + even3 + odd3) >> shift
        target[_U(to + to_step + n)] = (even1 + even2 + odd2) >> shift
        target[_U(to + 2 * to_step + n)] = (even1 - even2 + odd1) >> shift
        target[_U(to + 3 * to_step + n)] = (even0 - even3 + odd0) >> shift
        target[_U(to + 4 * to_step + n)] = (even0 - even3 - odd0) >> shift
        target[_U(to + 5 * to_step + n)] = (even1 - even2 - odd1) >> shift
        target[_U(to + 6 * to_step + n)] = (even1 + even2 - odd2) >> shift
        target[_U(to + 7 * to_step + n)] = (even0 + even3 - odd3) >> shift


@compiled
def _inverse_dcts(blocks, first, num, work, plane, row):
    """`num` dequantized blocks side by side, 16 interleaved from `first`, to eight rows of pixels at plane[row].

    They are zeroed. `work` is scratch for 1,152 int32.
    """
    for group in range(0, num, _LANES):
        start = first + group * 64
        for c in range(8):
            _pass(blocks, start + c * _LANES, 8 * _LANES, work, c * _LANES, 8 * _LANES, np.int32(11))
        blocks[start : start + 64 * _LANES] = 0
        for y in range(8):
            _pass(work, y * 8 * _LANES, _LANES, work, 64 * _LANES, _LANES, np.int32(18))
            line = plane[row + y]
            for n in range(min(_LANES, num - group)):
                for x in range(8):
                    pixel = work[_U((64 + x) * _LANES + n)] + np.int32(128)
                    line[_U(8 * (group + n) + x)] = min(max(pixel, np.int32(0)), np.int32(255))


@compiled
def read_tables(data, quantization, dc, ac):
    """(sound, singles and long codes by table 2 * component + is AC, many by component, quantizers by component)."""
    num = dc.size
    single, many = np.empty(2 * num << _PEEK, np.int32), np.empty(num << _PEEK_MANY, np.int32)
    long_codes, quantizers = np.empty((2 * num * 17, 2), np.int64), np.empty(num * 64, np.int64)
    sound = True
    for c in range(num):
        for k in range(64):
            quantizers[c * 64 + k] = data[quantization[c] + k]
        sound = sound and _read_table(data, dc[c], 2 * c, single, long_codes)
        sound = sound and _read_table(data, ac[c], 2 * c + 1, single, long_codes)
        if c == 2 and ac[1] == ac[2]:
            many[2 << _PEEK_MANY :] = many[1 << _PEEK_MANY : 2 << _PEEK_MANY]
        elif sound:
            _combine(single, 2 * c + 1, many, c << _PEEK_MANY)
    return sound, single, long_codes, many, quantizers


@compiled
def _mcu(data, clean, at, single, long_codes, many, quantizers, previous, h, v, column, blocks, line_size):
    """One MCU from bit `at`; with column >= 0 its coefficients go to `blocks`, a line has `line_size`. -1: unsound."""
    for c in range(previous.size):
        across, down = (h, v) if c == 0 else (1, 1)
        for part in range(across * down):
            word = _peek(clean, at)
            entry = _code(data, single, long_codes, 2 * c, word)
            if entry == 0 or entry >> 9 & 15 or entry >> 5 & 15 > 11:
                return np.int64(-1)
            at += entry >> 16 & 63
            previous[c] += _value(entry, word)
            if column < 0:
                at = _skip_ac(data, clean, at, single, long_codes, 2 * c + 1, many)
            else:
                if abs(previous[c]) > _LARGEST_L1:
                    return np.int64(-1)
                line = part // across if c == 0 else v - 1 + c
                slot = column * across + part % across
                block = line * line_size + slot // _LANES * 64 * _LANES + slot % _LANES
                blocks[block] = previous[c] * quantizers[c * 64]
                at = _read_ac(data, clean, at, single, long_codes, 2 * c + 1, quantizers, blocks, block)
            if at < 0:
                return at
    return at


@compiled
def _restart(data, reader, number):
    """(sound, the reader behind restart marker `number` and the fill bytes before it)."""
    at, filled, source = reader
    sound = 0 <= 8 * filled - at < 8 and source + 1 < data.size and data[source] == 0xFF
    while sound and source + 2 < data.size and data[source + 1] == 0xFF:
        source += 1
    return sound and data[source + 1] == 0xD0 + number % 8, (np.int64(0), np.int64(0), source + 2)


@compiled
def _advance(clean, first, last, source):
    """Where in the file clean[last] lies, when clean[first] lies at `source`."""
    for k in range(first, last):
        source += 1 + (clean[_U(k)] == 0xFF)
    return source


@compiled
def parse_scan(data, scan, tables, h, v, rows, columns, restart_interval, step, bits, previous_values):
    """Parse the whole scan. Returns where in the file the last block's byte ends, -1 where the scan is unsound.

    Before each `step`-th MCU of a row the position goes to `bits`, counted from the scan's start, and the components'
    last DC values to `previous_values` (points, components), for `decode_planes`.
    """
    _, single, long_codes, many, quantizers = tables
    previous, blocks = np.zeros(previous_values.shape[1], np.int64), np.zeros(0, np.int32)
    clean = np.empty(CLEAN_BYTES + _MCU_BYTES, np.uint8)
    at, filled, source = np.int64(0), np.int64(0), np.int64(scan)
    known, known_source, point = np.int64(0), np.int64(scan), 0
    for number in range(rows * columns):
        if restart_interval and number and number % restart_interval == 0:
            sound, (at, filled, source) = _restart(data, (at, filled, source), number // restart_interval - 1)
            if not sound:
                return np.int64(-1)
            previous[:] = 0
            known, known_source = np.int64(0), source
        if (at >> 3) + _MCU_BYTES > filled:
            known_source = _advance(clean, known, at >> 3, known_source)
            known = np.int64(0)
            at, filled, source = _fill(data, clean, (at, filled, source))
        if number % columns % step == 0:
            known_source = _advance(clean, known, at >> 3, known_source)
            known = at >> 3
            bits[point] = 8 * (known_source - scan) + (at & 7)
            previous_values[point] = previous
            point += 1
        at = _mcu(data, clean, at, single, long_codes, many, quantizers, previous, h, v, -1, blocks, 0)
        if at < 0 or at > 8 * filled:
            return np.int64(-1)
    return np.int64(_advance(clean, known, (at + 7) >> 3, known_source))


@compiled
def decode_planes(
    data, scan, tables, h, v, columns, restart_interval, window, luma, chroma, step, bits, previous_values
):
    """Decode the MCUs of `window` = (first row, end row, first column, end column) into component planes.

    `columns` are the MCUs in a row, `h` and `v` the luma blocks in an MCU along each axis. `luma` (height, width) and
    `chroma` (2, height, width) are uint8 and just hold the window. With points from `parse_scan` the MCUs before the
    window are not parsed. Returns whether what was parsed was sound.
    """
    _, single, long_codes, many, quantizers = tables
    first_row, end_row, first_column, end_column = window
    wide, num = end_column - first_column, quantizers.size // 64
    line_size = (wide * h + _LANES - 1) // _LANES * _LANES * 64
    blocks = np.zeros((v + 2) * line_size, np.int32)  # lines of luma blocks, then Cb, then Cr
    work, previous = np.empty(72 * _LANES, np.int32), np.zeros(num, np.int64)
    clean = np.empty(CLEAN_BYTES + _MCU_BYTES, np.uint8)
    at, filled, source = np.int64(0), np.int64(0), np.int64(scan)
    for row in range(first_row if bits.size else 0, end_row):
        start = 0
        if bits.size:
            point = row * ((columns + step - 1) // step) + first_column // step
            start = first_column // step * step
            at, filled, source = np.int64(bits[point]) & 7, np.int64(0), scan + (np.int64(bits[point]) >> 3)
            previous[:] = previous_values[point]
        for mx in range(start, end_column if bits.size or row == end_row - 1 else columns):
            number = row * columns + mx
            if restart_interval and number and number % restart_interval == 0:
                sound, (at, filled, source) = _restart(data, (at, filled, source), number // restart_interval - 1)
                if not sound:
                    return False
                previous[:] = 0
            if (at >> 3) + _MCU_BYTES > filled:
                at, filled, source = _fill(data, clean, (at, filled, source))
            column = mx - first_column if row >= first_row and mx < end_column else -1
            at = _mcu(data, clean, at, single, long_codes, many, quantizers, previous, h, v, column, blocks, line_size)
            if at < 0 or at > 8 * filled:
                return False
        if row >= first_row:
            for line in range(v):
                _inverse_dcts(blocks, line * line_size, wide * h, work, luma, ((row - first_row) * v + line) * 8)
            for c in range(num - 1):
                _inverse_dcts(blocks, (v + c) * line_size, wide, work, chroma[c], (row - first_row) * 8)
    return True


@compiled
def _clamp(value, last):
    return min(max(value, 0), last)


@compiled
def _upsampled_row(plane, y, left, full, offset, luma_h, luma_v, sums, row):
    """One row of chroma at luma size: output row `y`, into `row` from column `left` rounded down to even.

    A pixel is 3/4 of its sample and 1/4 of the next nearest along each halved axis, with libjpeg's alternating
    rounding. `plane` begins at `offset` = (row, column) of the whole chroma plane, whose size is `full`.
    """
    near = y // luma_v
    far = _clamp(near - 1 + 2 * (y % luma_v), full[0] - 1)
    first = left // 2
    line, other = plane[near - offset[0]], plane[(far if luma_v == 2 else near) - offset[0]]
    lowest, highest = _clamp(first - 1, full[1] - 1), _clamp(first + sums.size - 2, full[1] - 1)
    start = lowest - (first - 1)  # 1 where the sample before the first one is outside the image
    weight = np.int32(3 if luma_v == 2 else 0)
    used = sums[start : start + highest - lowest + 1]
    for j in range(used.size):
        used[j] = line[lowest - offset[1] + j]
    if luma_v == 2:
        for j in range(used.size):
            used[j] = weight * used[j] + other[lowest - offset[1] + j]
    if start:
        sums[0] = sums[1]
    if start + used.size < sums.size:
        sums[start + used.size] = sums[start + used.size - 1]
    low, high, shift = (8, 7, 4) if luma_v == 2 else (1, 2, 2)
    for j in range(sums.size - 2):
        row[2 * j] = (np.int32(3) * sums[j + 1] + sums[j] + np.int32(low)) >> np.int32(shift)
        row[2 * j + 1] = (np.int32(3) * sums[j + 1] + sums[j + 2] + np.int32(high)) >> np.int32(shift)


@compiled
def _to_rgb_row(luma, cb, cr, red, green, blue):
    """One row of colours; 1.402, 0.34414, 0.71414 and 1.772 times 2**16."""
    half, sixteen, middle = np.int32(1 << 15), np.int32(16), np.int32(128)
    lowest, highest = np.int32(0), np.int32(255)
    for x in range(luma.size):
        shade = np.int32(luma[x]) + ((np.int32(91881) * (cr[x] - middle) + half) >> sixteen)
        red[x] = min(max(shade, lowest), highest)
    for x in range(luma.size):
        shade = np.int32(-22554) * (cb[x] - middle) - np.int32(46802) * (cr[x] - middle)
        green[x] = min(max(np.int32(luma[x]) + ((shade + half) >> sixteen), lowest), highest)
    for x in range(luma.size):
        shade = np.int32(luma[x]) + ((np.int32(116130) * (cb[x] - middle) + half) >> sixteen)
        blue[x] = min(max(shade, lowest), highest)


@compiled
def to_rgb(luma, chroma, luma_offset, chroma_offset, full_chroma, luma_h, luma_v, top, left, rgb):
    """Fill `rgb` (3, h, w) uint8 with the region at (top, left) from the planes, which begin at their offsets."""
    _, height, width = rgb.shape
    sums = np.empty((left + width - 1) // 2 - left // 2 + 3, np.int32)
    cb, cr = np.empty(2 * sums.size, np.int32), np.empty(2 * sums.size, np.int32)
    skip = left % 2 if luma_h == 2 else 0
    for y in range(height):
        if luma_h == 2:
            _upsampled_row(chroma[0], top + y, left, full_chroma, chroma_offset, luma_h, luma_v, sums, cb)
            _upsampled_row(chroma[1], top + y, left, full_chroma, chroma_offset, luma_h, luma_v, sums, cr)
        else:
            row, column = top + y - chroma_offset[0], left - chroma_offset[1]
            cb[:width] = chroma[0, row, column : column + width]
            cr[:width] = chroma[1, row, column : column + width]
        line = luma[top + y - luma_offset[0], left - luma_offset[1] : left - luma_offset[1] + width]
        _to_rgb_row(line, cb[skip : skip + width], cr[skip : skip + width], rgb[0, y], rgb[1, y], rgb[2, y])
