"""Triton kernels of depthwise convolutions over tensors that lie as (N, H, W, C), with any padding and no copy for it.

A lane of a program has a few channels of some neighbouring columns of an image (`columns` of them; samples and groups
of columns are numbered through), and goes down the rows. What it has begun of other rows, and the weights, it holds in
registers: so a row is read once, and a number of it by the lanes that see it, K + 1 times for two columns. It asks for
rows ahead of time, as a row takes longer to come than to compute. Rows of the padding cost nothing.
As in `norm_kernels`, nothing is added atomically.

`top` and `left` are the padding before the first pixel; what is after the last follows from the output's size. Weights
are (C, K * K).
"""

import triton
import triton.language as tl

from effnet_train.models.fused.common_kernels import activated, affine, place, slope, store_moments, track

ROWS_AHEAD = tl.constexpr(2)
UNROLLED = tl.constexpr(2)  # rows in a turn of a loop, between which what is begun moves from register to register


@triton.jit
def all_weights(weight, cols, C, K: tl.constexpr, ACC: tl.constexpr):
    """Return the weights of a block of channels: K * K rows."""
    rows = ()
    for tap in tl.static_range(K * K):
        rows = rows + (tl.load(weight + cols * (K * K) + tap, mask=cols < C, other=0.0).to(ACC)[None, :],)
    return rows


@triton.jit
def zeros(count: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """Return `count` blocks of zeros."""
    blocks = ()
    for _ in tl.static_range(count):
        blocks = blocks + (tl.zeros([BM, BC], ACC),)
    return blocks


@triton.jit
def rows_of(x, at, first, column, inside, height, width, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load ROWS rows from `first` on and COLUMNS columns from `column` on, where `at` is: ROWS * COLUMNS blocks."""
    blocks = ()
    for s in tl.static_range(ROWS):
        row = first + s
        in_row = inside & (row >= 0) & (row < height)
        start = x + at + (width * row).to(tl.int64) * C
        for e in tl.static_range(COLUMNS):
            seen = in_row & (column + e >= 0) & (column + e < width)
            blocks = blocks + (tl.load(start + e * C, mask=seen, other=0.0),)
    return blocks


@triton.jit
def place_of(sample, column, height, width, C, cols):
    """Return where an image's column begins, counted in numbers."""
    return (sample.to(tl.int64) * height * width + column) * C + cols[None, :]


@triton.jit
def forward(
    x,
    weight,
    y,
    partial,
    M,
    C,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    chunk,
    programs,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Convolve; a program has `chunk` of M groups of the output's columns, and leaves moments as `moments` would."""
    program, cols = place(C, BC)
    AHEAD: tl.constexpr = (ROWS_AHEAD + STRIDE - 1) // STRIDE
    BEGUN: tl.constexpr = (K + STRIDE - 1) // STRIDE  # rows of the output that a row of the input goes into, at most
    SEEN: tl.constexpr = (COLUMNS - 1) * STRIDE + K
    weights = all_weights(weight, cols, C, K, ACC)
    groups = tl.cdiv(out_width, COLUMNS)
    first = program * chunk
    stop = tl.minimum(first + chunk, M)
    count = tl.zeros([BM, 1], ACC)
    origin = tl.zeros([BM, BC], ACC)
    plain = tl.zeros([BM, BC], ACC)
    square = tl.zeros([BM, BC], ACC)
    for start in range(first, stop, BM):
        lanes = start + tl.arange(0, BM)[:, None]
        inside = (lanes < stop) & (cols[None, :] < C)
        sample, j = lanes // groups, lanes % groups * COLUMNS
        column = j * STRIDE - left
        at = place_of(sample, column, height, width, C, cols)
        at_output = place_of(sample, j, out_height, out_width, C, cols)
        count += tl.where(lanes < stop, tl.minimum(out_width - j, COLUMNS) * out_height, 0).to(ACC)
        sums = zeros(BEGUN * COLUMNS, BM, BC, ACC)  # of the output's rows t, t - 1, ...
        begin = top // STRIDE  # rows before are all padding
        coming = rows_of(x, at, begin * STRIDE - top, column, inside, height, width, C, AHEAD * STRIDE, SEEN)
        for turn in range(begin, out_height + BEGUN - 1, UNROLLED):
            for r in tl.static_range(UNROLLED):
                t = turn + r
                row = (t + AHEAD) * STRIDE - top
                coming = coming + rows_of(x, at, row, column, inside, height, width, C, STRIDE, SEEN)
                if t * STRIDE - top < height:
                    for s in tl.static_range(STRIDE):
                        for e in tl.static_range(SEEN):
                            value = coming[s * SEEN + e].to(ACC)
                            more = ()
                            for q in tl.static_range(BEGUN):
                                for c in tl.static_range(COLUMNS):
                                    if q * STRIDE + s < K and e >= c * STRIDE and e < c * STRIDE + K:
                                        tap = weights[(q * STRIDE + s) * K + e - c * STRIDE]
                                        more = more + (sums[q * COLUMNS + c] + value * tap,)
                                    else:
                                        more = more + (sums[q * COLUMNS + c],)
                            sums = more
                coming = coming[STRIDE * SEEN :]
                i = t - (BEGUN - 1)
                for c in tl.static_range(COLUMNS):
                    valid = inside & (i >= 0) & (i < out_height) & (j + c < out_width)
                    stored = sums[(BEGUN - 1) * COLUMNS + c].to(y.dtype.element_ty)
                    tl.store(y + at_output + ((i * out_width).to(tl.int64) + c) * C, stored, mask=valid)
                    # Of what was stored, not of what was computed: that is what will be normalised.
                    begins = (start == first) & (i == 0) & (c == 0)
                    origin, plain, square = track(stored.to(ACC), valid, begins, origin, plain, square)
                sums = zeros(COLUMNS, BM, BC, ACC) + sums[: (BEGUN - 1) * COLUMNS]
    store_moments(partial, count, origin, plain, square, cols, C, program, programs)


@triton.jit
def gradients(
    dy,
    weight,
    x,
    statistics,
    norm_weight,
    norm_bias,
    dx,
    partial,
    M,
    C,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    chunk,
    programs,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the gradient of the convolution's input, of M groups of columns; COLUMNS is a multiple of STRIDE.

    In `partial` (K * K + 2, programs, C) are left sums for the weights' gradient. Where the input was act(b),
    b = BatchNorm(x), and there are `statistics`, `dx` is b's gradient, and the last two are sums for BatchNorm as of
    `norm_sums`.
    """
    program, cols = place(C, BC)
    AHEAD: tl.constexpr = (ROWS_AHEAD + STRIDE - 1) // STRIDE
    BEGUN: tl.constexpr = (K + STRIDE - 1) // STRIDE  # rows of the output that see a row, at most
    BEFORE: tl.constexpr = (K - 1) // STRIDE  # columns of the output that see one, besides that which begins there
    SEEING: tl.constexpr = BEFORE + (COLUMNS - 1) // STRIDE + 1
    weights = all_weights(weight, cols, C, K, ACC)
    if statistics is not None:
        mean, rstd, w, b = affine(statistics, norm_weight, norm_bias, cols, C, ACC)
    odd = left % STRIDE  # groups begin there where the weights do
    groups = tl.cdiv(width + odd, COLUMNS)
    stop = tl.minimum(program * chunk + chunk, M)
    totals = zeros(K * K, BM, BC, ACC)
    plain = tl.zeros([BM, BC], ACC)
    times_x = tl.zeros([BM, BC], ACC)
    for start in range(program * chunk, stop, BM):
        lanes = start + tl.arange(0, BM)[:, None]
        inside = (lanes < stop) & (cols[None, :] < C)
        sample, group = lanes // groups, lanes % groups
        column = group * COLUMNS - odd
        j = group * (COLUMNS // STRIDE) + left // STRIDE - BEFORE
        at = place_of(sample, column, height, width, C, cols)
        at_output = place_of(sample, j, out_height, out_width, C, cols)
        seeing = zeros((BEGUN - 1) * SEEING, BM, BC, ACC)  # gradients of the output's rows t - 1, t - 2, ...
        coming = rows_of(dy, at_output, 0, j, inside, out_height, out_width, C, AHEAD, SEEING)
        own_coming = rows_of(x, at, -top, column, inside, height, width, C, AHEAD * STRIDE, COLUMNS)
        for turn in range(0, (height - 1 + top) // STRIDE + 1, UNROLLED):
            for r in tl.static_range(UNROLLED):
                t = turn + r
                coming = coming + rows_of(dy, at_output, t + AHEAD, j, inside, out_height, out_width, C, 1, SEEING)
                row = (t + AHEAD) * STRIDE - top
                own_coming = own_coming + rows_of(x, at, row, column, inside, height, width, C, STRIDE, COLUMNS)
                newest = ()
                for o in tl.static_range(SEEING):
                    newest = newest + (coming[o].to(ACC),)
                seeing = newest + seeing
                coming = coming[SEEING:]
                if (t + 1) * STRIDE > top:
                    for s in tl.static_range(STRIDE):
                        row = t * STRIDE - top + s
                        in_row = inside & (row >= 0) & (row < height)
                        own = at + (width * row).to(tl.int64) * C
                        for c in tl.static_range(COLUMNS):
                            valid = in_row & (column + c >= 0) & (column + c < width)
                            value = own_coming[s * COLUMNS + c].to(ACC)  # 0 where it is not valid
                            if statistics is not None:  # not rounded, as it was when it was convolved
                                apart = value - mean
                                before = apart * (rstd * w) + b
                                value = tl.where(valid, activated(before, ACT), 0.0)
                            grad = tl.zeros([BM, BC], ACC)
                            more = ()
                            for tap in tl.static_range(K * K):
                                if tap // K % STRIDE == s and (c - tap % K) % STRIDE == 0:
                                    seer = seeing[tap // K // STRIDE * SEEING + (c - tap % K) // STRIDE + BEFORE]
                                    grad += seer * weights[tap]
                                    more = more + (totals[tap] + seer * value,)
                                else:
                                    more = more + (totals[tap],)
                            totals = more
                            if statistics is not None:
                                grad = tl.where(valid, grad * slope(before, ACT), 0.0)
                                plain += grad
                                times_x += grad * apart
                            tl.store(dx + own + c * C, grad, mask=valid)
                own_coming = own_coming[STRIDE * COLUMNS :]
                seeing = seeing[: (BEGUN - 1) * SEEING]
    for tap in tl.static_range(K * K):
        store_sum(partial, totals[tap], tap, cols, C, program, programs)
    if statistics is not None:
        store_sum(partial, plain, K * K, cols, C, program, programs)
        store_sum(partial, times_x * rstd, K * K + 1, cols, C, program, programs)


@triton.jit
def store_sum(partial, lanes, number, cols, C, program, programs):
    """Add up the lanes, and store that as a program's part of the sum of this `number`."""
    tl.store(partial + (number * programs + program) * C + cols, tl.sum(lanes, axis=0), mask=cols < C)
