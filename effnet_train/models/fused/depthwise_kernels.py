"""Triton kernels of depthwise convolutions over tensors that lie as (N, H, W, C), with any padding and no copy for it.

A program has a block of channels and some columns of images (a sample and a column, numbered through), and goes down
the rows. What it has begun of other rows, and the weights, it holds in registers: so a number is read K times, not
K * K, and all but once from the cache. It asks for rows ahead of time, as a row takes longer to come than to compute.
As in `norm_kernels`, nothing is added atomically.

`top` and `left` are the padding before the first pixel; what is after the last follows from the output's size. Weights
are (K * K, C), so that they are read in rows as pixels are.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.norm_kernels import (
    activated,
    affine,
    channel,
    counts,
    place,
    slope,
    store_moments,
    track,
)

ROWS_AHEAD = tl.constexpr(4)


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
def columns_seen(columns, cols, C, height, width, out_height, out_width, left, STRIDE: tl.constexpr):
    """Return the input's column that the weights first see from `columns` of the output, and where both begin."""
    sample, j = columns // out_width, columns % out_width
    column = j * STRIDE - left
    at = (sample.to(tl.int64) * height * width + column) * C + cols[None, :]
    return column, at, (sample.to(tl.int64) * out_height * out_width + j) * C + cols[None, :]


@triton.jit
def window(x, at, first, column, inside, height, width, C, ROWS: tl.constexpr, K: tl.constexpr):
    """Load what the weights see of rows from `first` on and of columns from `column` on: ROWS * K blocks."""
    blocks = ()
    for s in tl.static_range(ROWS):
        row = first + s
        in_row = inside & (row >= 0) & (row < height)
        for dj in tl.static_range(K):
            seen = in_row & (column + dj >= 0) & (column + dj < width)
            blocks = blocks + (tl.load(x + at + ((width * row).to(tl.int64) + dj) * C, mask=seen, other=0.0),)
    return blocks


@triton.jit
def seers(dy, at, t, column, inside, out_height, out_width, left, C, K: tl.constexpr, STRIDE: tl.constexpr):
    """Load, of the output's row t, what saw the input's `column` through each column of the weights: K blocks."""
    blocks = ()
    for dj in tl.static_range(K):
        beside = column + left - dj
        j = beside // STRIDE
        seen = inside & (t < out_height) & (beside >= 0) & (beside % STRIDE == 0) & (j < out_width)
        blocks = blocks + (tl.load(dy + at + (out_width * t + j).to(tl.int64) * C, mask=seen, other=0.0),)
    return blocks


@triton.jit
def own_rows(x, at, first, inside, height, width, C, ROWS: tl.constexpr):
    """Load rows from `first` on: ROWS blocks."""
    blocks = ()
    for s in tl.static_range(ROWS):
        row = first + s
        own = x + at + (width * row).to(tl.int64) * C
        blocks = blocks + (tl.load(own, mask=inside & (row >= 0) & (row < height), other=0.0),)
    return blocks


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
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Convolve; of the output's M columns a program has `chunk`, whose moments it leaves as `moments` would."""
    program, cols = place(C, BC)
    AHEAD: tl.constexpr = ROWS_AHEAD // STRIDE
    weights = all_weights(weight, cols, C, K, ACC)
    BEGUN: tl.constexpr = (K + STRIDE - 1) // STRIDE  # rows of the output that a row of the input goes into, at most
    first = program * chunk
    stop = tl.minimum(first + chunk, M)
    origin = tl.zeros([BM, BC], ACC)
    plain = tl.zeros([BM, BC], ACC)
    square = tl.zeros([BM, BC], ACC)
    for start in range(first, stop, BM):
        columns = start + tl.arange(0, BM)[:, None]
        inside = (columns < stop) & (cols[None, :] < C)
        column, at, at_output = columns_seen(columns, cols, C, height, width, out_height, out_width, left, STRIDE)
        sums = zeros(BEGUN, BM, BC, ACC)  # of the output's rows t, t - 1, ...
        coming = window(x, at, -top, column, inside, height, width, C, AHEAD * STRIDE, K)
        for t in range(out_height + BEGUN - 1):
            row = (t + AHEAD) * STRIDE - top
            coming = coming + window(x, at, row, column, inside, height, width, C, STRIDE, K)
            for s in tl.static_range(STRIDE):
                for dj in tl.static_range(K):
                    value = coming[s * K + dj].to(ACC)
                    more = ()
                    for q in tl.static_range(BEGUN):
                        if q * STRIDE + s < K:
                            more = more + (sums[q] + value * weights[(q * STRIDE + s) * K + dj],)
                        else:
                            more = more + (sums[q],)
                    sums = more
            coming = coming[STRIDE * K :]
            i = t - (BEGUN - 1)
            stored = sums[BEGUN - 1].to(y.dtype.element_ty)
            tl.store(y + at_output + (i * out_width).to(tl.int64) * C, stored, mask=inside & (i >= 0))
            # Of what was stored, not of what was computed: that is what will be normalised.
            valid = (columns < stop) & (i >= 0)
            begins = (start == first) & (i == 0)
            origin, plain, square = track(stored.to(ACC), valid, begins, origin, plain, square)
            sums = zeros(1, BM, BC, ACC) + sums[: BEGUN - 1]
    count = counts(first, stop, ACC, BM) * out_height
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
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the gradient of the convolution's input, of M columns.

    Where the input was a = act(b), b = BatchNorm(x), and `x` is given: `dx` is b's gradient, `a` is written anew for
    the weight's gradient, and sums for BatchNorm are left in `partial` as by `norm_sums`.
    """
    program, cols = place(C, BC)
    AHEAD: tl.constexpr = ROWS_AHEAD // STRIDE
    SUMS: tl.constexpr = max(K, STRIDE)
    weights = all_weights(weight, cols, C, K, ACC)
    if x is not None:
        mean, rstd, w, b = affine(statistics, norm_weight, norm_bias, cols, C, ACC)
    stop = tl.minimum(program * chunk + chunk, M)
    plain = tl.zeros([BM, BC], ACC)
    times_x = tl.zeros([BM, BC], ACC)
    for start in range(program * chunk, stop, BM):
        columns = start + tl.arange(0, BM)[:, None]
        inside = (columns < stop) & (cols[None, :] < C)
        sample, column = columns // width, columns % width
        at = (sample.to(tl.int64) * height * width + column) * C + cols[None, :]
        at_image = sample.to(tl.int64) * out_height * out_width * C + cols[None, :]
        sums = zeros(SUMS, BM, BC, ACC)  # of the input's rows t * STRIDE - top, and on
        coming = ()
        own_coming = ()
        for t in tl.static_range(AHEAD):
            coming = coming + seers(dy, at_image, t, column, inside, out_height, out_width, left, C, K, STRIDE)
        if x is not None:
            own_coming = own_rows(x, at, -top, inside, height, width, C, AHEAD * STRIDE)
        for t in range((height - 1 + top) // STRIDE + 1):
            coming = coming + seers(dy, at_image, t + AHEAD, column, inside, out_height, out_width, left, C, K, STRIDE)
            if x is not None:
                row = (t + AHEAD) * STRIDE - top
                own_coming = own_coming + own_rows(x, at, row, inside, height, width, C, STRIDE)
            for dj in tl.static_range(K):
                value = coming[dj].to(ACC)
                more = ()
                for di in tl.static_range(K):
                    more = more + (sums[di] + value * weights[di * K + dj],)
                sums = more + sums[K:]
            coming = coming[K:]
            for s in tl.static_range(STRIDE):
                row = t * STRIDE - top + s
                own = at + (width * row).to(tl.int64) * C
                valid = inside & (row >= 0) & (row < height)
                grad = sums[s]
                if x is not None:
                    normal = (own_coming[s].to(ACC) - mean) * rstd
                    tl.store(a + own, activated(normal * w + b, ACT), mask=valid)
                    grad = tl.where(valid, grad * slope(normal * w + b, ACT), 0.0)
                    plain += grad
                    times_x += grad * normal
                tl.store(dx + own, grad, mask=valid)
            if x is not None:
                own_coming = own_coming[STRIDE:]
            sums = sums[STRIDE:] + zeros(STRIDE, BM, BC, ACC)
    if x is not None:
        at_sum = partial + program * C + cols
        tl.store(at_sum, tl.sum(plain, axis=0), mask=cols < C)
        tl.store(at_sum + programs * C, tl.sum(times_x, axis=0), mask=cols < C)


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
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Leave sums over a program's share of the output's M columns in `partial` (K * K, programs, C)."""
    program, cols = place(C, BC)
    AHEAD: tl.constexpr = ROWS_AHEAD // STRIDE
    BEGUN: tl.constexpr = (K + STRIDE - 1) // STRIDE
    stop = tl.minimum(program * chunk + chunk, M)
    totals = zeros(K * K, BM, BC, ACC)
    for start in range(program * chunk, stop, BM):
        columns = start + tl.arange(0, BM)[:, None]
        inside = (columns < stop) & (cols[None, :] < C)
        column, at, at_output = columns_seen(columns, cols, C, height, width, out_height, out_width, left, STRIDE)
        grads = zeros(BEGUN, BM, BC, ACC)  # of the output's rows t, t - 1, ...
        coming = window(x, at, -top, column, inside, height, width, C, AHEAD * STRIDE, K)
        grads_coming = own_rows(dy, at_output, 0, inside, out_height, out_width, C, AHEAD)
        for t in range(out_height + BEGUN - 1):
            row = (t + AHEAD) * STRIDE - top
            coming = coming + window(x, at, row, column, inside, height, width, C, STRIDE, K)
            grads_coming = grads_coming + own_rows(dy, at_output, t + AHEAD, inside, out_height, out_width, C, 1)
            grads = (grads_coming[0].to(ACC),) + grads[: BEGUN - 1]
            for s in tl.static_range(STRIDE):
                for dj in tl.static_range(K):
                    value = coming[s * K + dj].to(ACC)
                    more = ()
                    for tap in tl.static_range(K * K):
                        # The weights' row is that of the input less that of the output; only those of dj change.
                        if tap % K == dj and tap // K % STRIDE == s:
                            more = more + (totals[tap] + value * grads[tap // K // STRIDE],)
                        else:
                            more = more + (totals[tap],)
                    totals = more
            coming = coming[STRIDE * K :]
            grads_coming = grads_coming[1:]
    for tap in tl.static_range(K * K):
        at_sum = partial + (tap * programs + program) * C + cols
        tl.store(at_sum, tl.sum(totals[tap], axis=0), mask=cols < C)
