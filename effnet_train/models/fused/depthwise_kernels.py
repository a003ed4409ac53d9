"""Triton kernels of depthwise convolutions over tensors that lie as (N, H, W, C), with any padding and no copy for it.

A lane of a program has a few channels of some neighbouring columns of an image (`columns` of them; samples and groups
of columns are numbered through), and goes down the rows. What it has begun of other rows, and the weights, it holds in
registers: so a row is read once, and a number of it by the lanes that see it, K + 1 times for two columns. It asks for
rows ahead of time, as a row takes longer to come than to compute. Rows of the padding cost nothing.
As in `norm_kernels`, nothing is added atomically.

`top` and `left` are the padding before the first pixel; what is after the last follows from the output's size. Weights
are (K * K, C), so that they are read in rows as pixels are.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.norm_kernels import activated, affine, channel, place, slope, store_moments, track

ROWS_AHEAD = tl.constexpr(2)


@triton.jit
def all_weights(weight, cols, C, K: tl.constexpr, ACC: tl.constexpr):
    """Return the weights of a block of channels: K * K rows."""
    rows = ()
    for tap in tl.static_range(K * K):
        rows = rows + (channel(weight + tap * C, cols, C, ACC),)
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
    """Convolve; of M groups of the output's columns a program has `chunk`, whose moments it leaves as `moments` would."""
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
        for t in range(begin, out_height + BEGUN - 1):
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
                valid = inside & (i >= 0) & (j + c < out_width)
                stored = sums[(BEGUN - 1) * COLUMNS + c].to(y.dtype.element_ty)
                tl.store(y + at_output + ((i * out_width).to(tl.int64) + c) * C, stored, mask=valid)
                # Of what was stored, not of what was computed: that is what will be normalised.
                begins = (start == first) & (i == 0) & (c == 0)
                origin, plain, square = track(stored.to(ACC), valid, begins, origin, plain, square)
            sums = zeros(COLUMNS, BM, BC, ACC) + sums[: (BEGUN - 1) * COLUMNS]
    store_moments(partial, count, origin, plain, square, cols, C, program, programs)


@triton.jit
def input_gradient(
    dy,
    weight,
    x,
    statistics,
    norm_weight,
    norm_bias,
    dx,
    a,
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

    Where the input was a = act(b), b = BatchNorm(x), and `x` is given: `dx` is b's gradient, `a` is written anew for
    the weight's gradient, and sums for BatchNorm are left in `partial` as by `norm_sums`.
    """
    program, cols = place(C, BC)
    AHEAD: tl.constexpr = (ROWS_AHEAD + STRIDE - 1) // STRIDE
    ROWS: tl.constexpr = max(K, STRIDE)
    BEFORE: tl.constexpr = (
        K - 1
    ) // STRIDE  # columns of the output that see a column, besides the one that begins there
    SEEING: tl.constexpr = BEFORE + (COLUMNS - 1) // STRIDE + 1
    weights = all_weights(weight, cols, C, K, ACC)
    if x is not None:
        mean, rstd, w, b = affine(statistics, norm_weight, norm_bias, cols, C, ACC)
    odd = left % STRIDE  # groups begin there where the weights do
    groups = tl.cdiv(width + odd, COLUMNS)
    stop = tl.minimum(program * chunk + chunk, M)
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
        sums = zeros(ROWS * COLUMNS, BM, BC, ACC)  # of the input's rows t * STRIDE - top, and on
        coming = rows_of(dy, at_output, 0, j, inside, out_height, out_width, C, AHEAD, SEEING)
        own_coming = ()
        if x is not None:
            own_coming = rows_of(x, at, -top, column, inside, height, width, C, AHEAD * STRIDE, COLUMNS)
        for t in range((height - 1 + top) // STRIDE + 1):
            coming = coming + rows_of(dy, at_output, t + AHEAD, j, inside, out_height, out_width, C, 1, SEEING)
            if x is not None:
                row = (t + AHEAD) * STRIDE - top
                own_coming = own_coming + rows_of(x, at, row, column, inside, height, width, C, STRIDE, COLUMNS)
            if t < out_height:
                for o in tl.static_range(SEEING):
                    value = coming[o].to(ACC)
                    more = ()
                    for di in tl.static_range(ROWS):
                        for c in tl.static_range(COLUMNS):
                            if di < K and c >= (o - BEFORE) * STRIDE and c < (o - BEFORE) * STRIDE + K:
                                tap = weights[di * K + c - (o - BEFORE) * STRIDE]
                                more = more + (sums[di * COLUMNS + c] + value * tap,)
                            else:
                                more = more + (sums[di * COLUMNS + c],)
                    sums = more
            coming = coming[SEEING:]
            if (t + 1) * STRIDE > top:
                for s in tl.static_range(STRIDE):
                    row = t * STRIDE - top + s
                    in_row = inside & (row >= 0) & (row < height)
                    own = at + (width * row).to(tl.int64) * C
                    for c in tl.static_range(COLUMNS):
                        valid = in_row & (column + c >= 0) & (column + c < width)
                        grad = sums[s * COLUMNS + c]
                        if x is not None:
                            apart = own_coming[s * COLUMNS + c].to(ACC) - mean
                            tl.store(a + own + c * C, activated(apart * (rstd * w) + b, ACT), mask=valid)
                            grad = tl.where(valid, grad * slope(apart * (rstd * w) + b, ACT), 0.0)
                            plain += grad
                            times_x += grad * apart
                        tl.store(dx + own + c * C, grad, mask=valid)
            if x is not None:
                own_coming = own_coming[STRIDE * COLUMNS :]
            sums = sums[STRIDE * COLUMNS :] + zeros(STRIDE * COLUMNS, BM, BC, ACC)
    if x is not None:
        at_sum = partial + program * C + cols
        tl.store(at_sum, tl.sum(plain, axis=0), mask=cols < C)
        tl.store(at_sum + programs * C, tl.sum(times_x * rstd, axis=0), mask=cols < C)


@triton.jit
def weight_gradient(
    x,
    dy,
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
    """Leave sums over a program's share of M groups of the output's columns in `partial` (K * K, programs, C)."""
    program, cols = place(C, BC)
    AHEAD: tl.constexpr = (ROWS_AHEAD + STRIDE - 1) // STRIDE
    BEGUN: tl.constexpr = (K + STRIDE - 1) // STRIDE
    SEEN: tl.constexpr = (COLUMNS - 1) * STRIDE + K
    groups = tl.cdiv(out_width, COLUMNS)
    stop = tl.minimum(program * chunk + chunk, M)
    totals = zeros(K * K, BM, BC, ACC)
    for start in range(program * chunk, stop, BM):
        lanes = start + tl.arange(0, BM)[:, None]
        inside = (lanes < stop) & (cols[None, :] < C)
        sample, j = lanes // groups, lanes % groups * COLUMNS
        column = j * STRIDE - left
        at = place_of(sample, column, height, width, C, cols)
        at_output = place_of(sample, j, out_height, out_width, C, cols)
        begin = top // STRIDE  # rows before are all padding
        coming = rows_of(x, at, begin * STRIDE - top, column, inside, height, width, C, AHEAD * STRIDE, SEEN)
        grads = ()  # of the output's rows t - 1, t - 2, ... and, coming, t and on
        for q in tl.static_range(1, BEGUN):
            grads = grads + rows_of(dy, at_output, begin - q, j, inside, out_height, out_width, C, 1, COLUMNS)
        grads_coming = rows_of(dy, at_output, begin, j, inside, out_height, out_width, C, AHEAD, COLUMNS)
        for t in range(begin, tl.minimum(tl.cdiv(height + top, STRIDE), out_height + BEGUN - 1)):
            row = (t + AHEAD) * STRIDE - top
            coming = coming + rows_of(x, at, row, column, inside, height, width, C, STRIDE, SEEN)
            more = rows_of(dy, at_output, t + AHEAD, j, inside, out_height, out_width, C, 1, COLUMNS)
            grads_coming = grads_coming + more
            grads = grads_coming[:COLUMNS] + grads
            for s in tl.static_range(STRIDE):
                for e in tl.static_range(SEEN):
                    value = coming[s * SEEN + e].to(ACC)
                    more = ()
                    for tap in tl.static_range(K * K):
                        # The weights' row is that of the input less that of the output; so is their column.
                        total = totals[tap]
                        for c in tl.static_range(COLUMNS):
                            if tap // K % STRIDE == s and tap % K == e - c * STRIDE:
                                total += value * grads[tap // K // STRIDE * COLUMNS + c].to(ACC)
                        more = more + (total,)
                    totals = more
            coming = coming[STRIDE * SEEN :]
            grads_coming = grads_coming[COLUMNS:]
            grads = grads[: (BEGUN - 1) * COLUMNS]
    for tap in tl.static_range(K * K):
        at_sum = partial + (tap * programs + program) * C + cols
        tl.store(at_sum, tl.sum(totals[tap], axis=0), mask=cols < C)
