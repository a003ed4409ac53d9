"""Triton kernels of a convolution of few channels, as the stem's: a row of what a pixel sees is a row of a matrix.

Images lie as (N, H, W, Cin), the output as (N, H, W, C), weights as (C, K * K * Cin). `BK` is K * K * Cin, filled up to
a power of two. As in `norm_kernels`, nothing is added atomically.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.common_kernels import counts, deviations, place, store_moments


@triton.jit
def patches(
    x,
    rows,
    stop,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    CIN: tl.constexpr,
    BK: tl.constexpr,
):
    """Load what the weights see of each of the output's pixels, numbered through: (BM, BK)."""
    ks = tl.arange(0, BK)[None, :]
    tap = ks // CIN
    sample, pixel = rows // (out_height * out_width), rows % (out_height * out_width)
    row, column = pixel // out_width * STRIDE - top, pixel % out_width * STRIDE - left
    seen_row, seen_column = row + tap // K, column + tap % K
    seen = (rows < stop) & (ks < K * K * CIN)
    seen = seen & (seen_row >= 0) & (seen_row < height) & (seen_column >= 0) & (seen_column < width)
    at = ((sample.to(tl.int64) * height + row) * width + column) * CIN
    return tl.load(x + at + ((tap // K) * width * CIN + (tap % K) * CIN + ks % CIN), mask=seen, other=0.0)


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
    CIN: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Convolve; of the output's M pixels a program has `chunk`, whose moments it leaves as `moments` would."""
    program, cols = place(C, BC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    ks = tl.arange(0, BK)[:, None]
    inside = (ks < K * K * CIN) & (cols[None, :] < C)
    w = tl.load(weight + cols[None, :] * (K * K * CIN) + ks, mask=inside, other=0.0)
    # What the moments are told apart from: the first row, near enough.
    one = start + tl.arange(0, 1)[:, None]
    first_row = patches(x, one, stop, height, width, out_height, out_width, top, left, K, STRIDE, CIN, BK)
    origin = tl.sum(tl.trans(first_row).to(ACC) * w.to(ACC), axis=0)[None, :]
    plain = tl.zeros([BM, BC], ACC)
    square = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        rows = first + tl.arange(0, BM)[:, None]
        seen = patches(x, rows, stop, height, width, out_height, out_width, top, left, K, STRIDE, CIN, BK)
        stored = tl.dot(seen.to(w.dtype), w, out_dtype=ACC, input_precision="ieee").to(y.dtype.element_ty)
        tl.store(y + rows.to(tl.int64) * C + cols[None, :], stored, mask=(rows < stop) & (cols[None, :] < C))
        # Of what was stored, not of what was computed: that is what will be normalised.
        plain, square = deviations(stored.to(ACC), rows < stop, origin, plain, square)
    count = counts(start, stop, ACC, BM)
    store_moments(partial, count, origin, plain, square, cols, C, program, programs)


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
    CIN: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Leave sums over a program's `chunk` of the output's M pixels in `partial` (programs, C, K * K * Cin)."""
    program, cols = place(C, BC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    total = tl.zeros([BC, BK], ACC)
    for first in range(start, stop, BM):
        rows = first + tl.arange(0, BM)[:, None]
        seen = patches(x, rows, stop, height, width, out_height, out_width, top, left, K, STRIDE, CIN, BK)
        mask = (rows < stop) & (cols[None, :] < C)
        grad = tl.load(dy + rows.to(tl.int64) * C + cols[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(grad), seen.to(grad.dtype), total, out_dtype=ACC, input_precision="ieee")
    ks = tl.arange(0, BK)[None, :]
    at = (program.to(tl.int64) * C + cols[:, None]) * (K * K * CIN) + ks
    tl.store(partial + at, total, mask=(cols[:, None] < C) & (ks < K * K * CIN))
