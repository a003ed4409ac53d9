"""Triton kernels of depthwise convolutions over tensors that lie as (N, H, W, C), with any padding and no copy for it.

As in `norm_kernels`, nothing is added atomically. `top` and `left` are the padding before the first pixel; what is
after the last follows from the output's size. Weights are (K * K, C), so that they are read in rows as pixels are.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.norm_kernels import activated, affine, slope, store_moments, welford


@triton.jit
def place(rows, height, width):
    """Return the sample, row and column of pixels that are numbered through."""
    return rows // (height * width), rows // width % height, rows % width


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
    """Convolve; of the M output pixels a program has `chunk`, whose moments it leaves as `moments` would."""
    program = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    count = tl.zeros([BM, 1], ACC)
    mean = tl.zeros([BM, BC], ACC)
    m2 = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        rows = first + tl.arange(0, BM)[:, None]
        inside = (rows < stop) & (cols[None, :] < C)
        sample, i, j = place(rows, out_height, out_width)
        row, column = i * STRIDE - top, j * STRIDE - left
        at = ((sample * height + row) * width + column).to(tl.int64) * C + cols[None, :]
        total = tl.zeros([BM, BC], ACC)
        for di in tl.static_range(K):
            in_row = inside & (row + di >= 0) & (row + di < height)
            for dj in tl.static_range(K):
                seen = in_row & (column + dj >= 0) & (column + dj < width)
                value = tl.load(x + at + (di * width + dj) * C, mask=seen, other=0.0).to(ACC)
                total += value * tl.load(weight + (di * K + dj) * C + cols, mask=cols < C, other=0.0)[None, :]
        stored = total.to(y.dtype.element_ty)
        tl.store(y + rows.to(tl.int64) * C + cols[None, :], stored, mask=inside)
        # Of what was stored, not of what was computed: that is what will be normalised.
        count, mean, m2 = welford(stored.to(ACC), rows < stop, count, mean, m2)
    store_moments(partial, count, mean, m2, cols, C, program, programs)


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
    """Write the gradient of the convolution's input, of M pixels.

    Where the input was a = act(b), b = BatchNorm(x), and `x` is given: `dx` is b's gradient, `a` is written anew for
    the weight's gradient, and sums for BatchNorm are left in `partial` as by `norm_sums`.
    """
    program = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    plain = tl.zeros([BM, BC], ACC)
    times_x = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        rows = first + tl.arange(0, BM)[:, None]
        sample, row, column = place(rows, height, width)
        inside = (rows < stop) & (cols[None, :] < C)
        grad = tl.zeros([BM, BC], ACC)
        for di in tl.static_range(K):
            # The output row that saw this one through the weights' row di, if there is one; and so the column.
            above = row + top - di
            i = above // STRIDE
            in_row = inside & (above >= 0) & (above % STRIDE == 0) & (i < out_height)
            at_row = ((sample * out_height + i) * out_width).to(tl.int64)
            for dj in tl.static_range(K):
                beside = column + left - dj
                j = beside // STRIDE
                seen = in_row & (beside >= 0) & (beside % STRIDE == 0) & (j < out_width)
                value = tl.load(dy + (at_row + j) * C + cols[None, :], mask=seen, other=0.0).to(ACC)
                grad += value * tl.load(weight + (di * K + dj) * C + cols, mask=cols < C, other=0.0)[None, :]
        own = rows.to(tl.int64) * C + cols[None, :]
        if x is not None:
            mean, rstd, w, b = affine(statistics, norm_weight, norm_bias, cols, C, ACC)
            normal = (tl.load(x + own, mask=inside, other=0.0).to(ACC) - mean) * rstd
            tl.store(a + own, activated(normal * w + b, ACT), mask=inside)
            grad = tl.where(inside, grad * slope(normal * w + b, ACT), 0.0)
            plain += grad
            times_x += grad * normal
        tl.store(dx + own, grad, mask=inside)
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
    LANES: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Leave sums over a program's share of the M output pixels in `partial` (K * K, programs, C).

    A program has one row of the weights. Programs of the same pixels follow one another, so that those are read from
    memory once. LANES is K rounded up to a power of two.
    """
    di = tl.program_id(0)
    program = tl.program_id(1)
    cols = tl.program_id(2) * BC + tl.arange(0, BC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    dj = tl.arange(0, LANES)[:, None, None]
    total = tl.zeros([LANES, BM, BC], ACC)
    for first in range(start, stop, BM):
        rows = first + tl.arange(0, BM)
        sample, i, j = place(rows, out_height, out_width)
        inside = (rows < stop)[:, None] & (cols < C)[None, :]
        grad = tl.load(dy + rows[:, None].to(tl.int64) * C + cols[None, :], mask=inside, other=0.0).to(ACC)
        row = i * STRIDE - top + di
        column = (j * STRIDE - left)[None, :, None] + dj
        seen = (inside & ((row >= 0) & (row < height))[:, None])[None, :, :]
        seen = seen & (column >= 0) & (column < width) & (dj < K)
        at = (((sample * height + row) * width)[None, :, None] + column).to(tl.int64)
        total += tl.load(x + at * C + cols[None, None, :], mask=seen, other=0.0).to(ACC) * grad[None, :, :]
    taps = di * K + tl.arange(0, LANES)[:, None]
    at_sum = partial + (taps.to(tl.int64) * programs + program) * C + cols[None, :]
    tl.store(at_sum, tl.sum(total, axis=1), mask=(tl.arange(0, LANES)[:, None] < K) & (cols[None, :] < C))
