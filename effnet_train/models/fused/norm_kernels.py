"""Triton kernels of BatchNorm and what follows it, over tensors that lie as rows of channels: (N * H * W, C).

No kernel adds atomically: programs leave partial sums, which another kernel adds in one order. So the same input gives
the same bits. `chunk` is the rows of a program.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.common_kernels import (
    activated,
    affine,
    channel,
    counts,
    place,
    rows_of_sample,
    slope,
    store_moments,
    tiles,
    track,
)

TILES_AHEAD = tl.constexpr(2)  # that reductions ask for before they have added up the last


@triton.jit
def moments(x, partial, M, C, chunk, programs, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Leave how many rows each program has, their mean and their squared deviations in `partial` (3, programs, C)."""
    program, cols = place(C, BC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    origin = tl.zeros([BM, BC], ACC)
    plain = tl.zeros([BM, BC], ACC)
    square = tl.zeros([BM, BC], ACC)
    coming = tiles(x, 0, start, stop, cols, C, TILES_AHEAD, BM)
    for first in range(start, stop, BM):
        coming = coming + tiles(x, 0, first + TILES_AHEAD * BM, stop, cols, C, 1, BM)
        inside = first + tl.arange(0, BM)[:, None] < stop
        origin, plain, square = track(coming[0].to(ACC), inside, first == start, origin, plain, square)
        coming = coming[1:]
    count = counts(start, stop, ACC, BM)
    store_moments(partial, count, origin, plain, square, cols, C, program, programs)


@triton.jit
def finish_moments(
    partial,
    running_mean,
    running_var,
    statistics,
    M,
    C,
    programs,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Merge the programs' moments of M rows: mean, biased variance and 1 / deviation in `statistics` (3, C).

    BR is not below the number of programs, so that all is asked for at once. With a MOMENTUM above 0 the running
    statistics move, too.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    channels = cols < C
    rows = tl.arange(0, BR)[:, None]
    inside = (rows < programs) & channels[None, :]
    at = partial + rows * C + cols[None, :]
    count = tl.load(at, mask=inside, other=0.0)
    means = tl.load(at + programs * C, mask=inside, other=0.0)
    squares = tl.load(at + 2 * programs * C, mask=inside, other=0.0)
    mean = tl.sum(count * means, axis=0) / M
    apart = means - mean[None, :]
    variance = tl.sum(squares + count * apart * apart, axis=0) / M
    tl.store(statistics + cols, mean, mask=channels)
    tl.store(statistics + C + cols, variance, mask=channels)
    tl.store(statistics + 2 * C + cols, tl.rsqrt(variance + EPS), mask=channels)
    if MOMENTUM > 0:
        old_mean = tl.load(running_mean + cols, mask=channels, other=0.0).to(ACC)
        old_var = tl.load(running_var + cols, mask=channels, other=0.0).to(ACC)
        tl.store(running_mean + cols, old_mean + MOMENTUM * (mean - old_mean), mask=channels)
        tl.store(running_var + cols, old_var + MOMENTUM * (variance - old_var), mask=channels)


@triton.jit
def normalise(
    x,
    statistics,
    weight,
    bias,
    gate,
    residual,
    u,
    y,
    C,
    pixels,
    rate,
    survival,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write act(BatchNorm(x)), times a gate (N, C), dropped where `u` (N,) is below the rate, plus a residual.

    `pixels` are those of a sample; without gate and `u` all samples may be taken for one.
    """
    sample, rows, cols, at = rows_of_sample(C, pixels, BM, BC)
    mean, rstd, w, b = affine(statistics, weight, bias, cols, C, ACC)
    inside = (rows < pixels) & (cols[None, :] < C)
    value = activated((tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean) * (rstd * w) + b, ACT)
    if gate is not None:
        value *= channel(gate + sample * C, cols, C, ACC)
    if u is not None:
        value = tl.where(tl.load(u + sample) >= rate, value * (1.0 / survival), 0.0)
    if residual is not None:
        value += tl.load(residual + at, mask=inside, other=0.0).to(ACC)
    tl.store(y + at, value, mask=inside)


@triton.jit
def pool(
    x,
    statistics,
    weight,
    bias,
    partial,
    C,
    pixels,
    chunk,
    splits,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Leave sums of act(BatchNorm(x)) over a sample's pixels in `partial` (N, splits, C)."""
    program, cols = place(C, BC)
    sample, split = program // splits, program % splits
    mean, rstd, w, b = affine(statistics, weight, bias, cols, C, ACC)
    stop = tl.minimum((split + 1) * chunk, pixels)
    total = tl.zeros([BM, BC], ACC)
    base = sample.to(tl.int64) * pixels
    coming = tiles(x, base, split * chunk, stop, cols, C, TILES_AHEAD, BM)
    for first in range(split * chunk, stop, BM):
        coming = coming + tiles(x, base, first + TILES_AHEAD * BM, stop, cols, C, 1, BM)
        inside = first + tl.arange(0, BM)[:, None] < stop
        total += tl.where(inside, activated((coming[0].to(ACC) - mean) * (rstd * w) + b, ACT), 0.0)
        coming = coming[1:]
    tl.store(partial + program * C + cols, tl.sum(total, axis=0), mask=cols < C)


@triton.jit
def add_rows(partial, out, rows_of_each, C, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Add (K, rows, C) up to `out` (K, C), always in the same order. BR is not below the number of rows."""
    program, cols = place(C, BC)
    one = program.to(tl.int64)
    rows = tl.arange(0, BR)[:, None]
    inside = (rows < rows_of_each) & (cols[None, :] < C)
    value = tl.load(partial + (one * rows_of_each + rows) * C + cols[None, :], mask=inside, other=0.0)
    tl.store(out + one * C + cols, tl.sum(value, axis=0), mask=cols < C)


@triton.jit
def gated_sums(
    x,
    statistics,
    weight,
    bias,
    gate,
    dz,
    z,
    partial,
    N,
    C,
    pixels,
    chunk,
    splits,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write z = s * gate anew, where s = act(b) and b = BatchNorm(x), and all sums that its backward pass needs.

    With the gradient `dz`, `partial` (5, N, splits, C) gets sums over pixels of dz * s, the gate's gradient, and of
    dz * s'(b), s'(b), and both times the normalised x. As b's gradient is (dz * gate + the mean's gradient) * s'(b),
    BatchNorm's sums follow from these once the mean's gradient is known, and x need not be read again for them.
    """
    program, cols = place(C, BC)
    sample, split = program // splits, program % splits
    mean, rstd, w, b = affine(statistics, weight, bias, cols, C, ACC)
    own = channel(gate + sample * C, cols, C, ACC)
    stop = tl.minimum((split + 1) * chunk, pixels)
    for_gate = tl.zeros([BM, BC], ACC)
    slopes = tl.zeros([BM, BC], ACC)
    dz_slopes = tl.zeros([BM, BC], ACC)
    x_slopes = tl.zeros([BM, BC], ACC)
    dz_x_slopes = tl.zeros([BM, BC], ACC)
    base = sample.to(tl.int64) * pixels
    coming = tiles(x, base, split * chunk, stop, cols, C, TILES_AHEAD, BM)
    grads_coming = tiles(dz, base, split * chunk, stop, cols, C, TILES_AHEAD, BM)
    for first in range(split * chunk, stop, BM):
        coming = coming + tiles(x, base, first + TILES_AHEAD * BM, stop, cols, C, 1, BM)
        grads_coming = grads_coming + tiles(dz, base, first + TILES_AHEAD * BM, stop, cols, C, 1, BM)
        rows = first + tl.arange(0, BM)[:, None]
        inside = (rows < stop) & (cols[None, :] < C)
        apart = coming[0].to(ACC) - mean
        grad = grads_coming[0].to(ACC)
        s = activated(apart * (rstd * w) + b, ACT)
        d = tl.where(inside, slope(apart * (rstd * w) + b, ACT), 0.0)
        tl.store(z + (base + rows) * C + cols[None, :], s * own, mask=inside)
        for_gate += grad * s
        slopes += d
        dz_slopes += grad * d
        x_slopes += d * apart
        dz_x_slopes += grad * d * apart
        coming = coming[1:]
        grads_coming = grads_coming[1:]
    at_sum = partial + program * C + cols
    step = N * splits * C
    tl.store(at_sum, tl.sum(for_gate, axis=0), mask=cols < C)
    tl.store(at_sum + step, tl.sum(dz_slopes, axis=0), mask=cols < C)
    tl.store(at_sum + 2 * step, tl.sum(slopes, axis=0), mask=cols < C)
    tl.store(at_sum + 3 * step, tl.sum(dz_x_slopes * rstd, axis=0), mask=cols < C)
    tl.store(at_sum + 4 * step, tl.sum(x_slopes * rstd, axis=0), mask=cols < C)


@triton.jit
def norm_sums(
    x,
    statistics,
    weight,
    bias,
    dy,
    u,
    partial,
    M,
    C,
    pixels,
    rate,
    survival,
    chunk,
    programs,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Leave sums of b's gradient, and of it times the normalised x, in `partial` (2, programs, C)."""
    program, cols = place(C, BC)
    mean, rstd, w, b = affine(statistics, weight, bias, cols, C, ACC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    plain = tl.zeros([BM, BC], ACC)
    times_x = tl.zeros([BM, BC], ACC)
    coming = tiles(x, 0, start, stop, cols, C, TILES_AHEAD, BM)
    grads_coming = tiles(dy, 0, start, stop, cols, C, TILES_AHEAD, BM)
    for first in range(start, stop, BM):
        coming = coming + tiles(x, 0, first + TILES_AHEAD * BM, stop, cols, C, 1, BM)
        grads_coming = grads_coming + tiles(dy, 0, first + TILES_AHEAD * BM, stop, cols, C, 1, BM)
        rows = first + tl.arange(0, BM)[:, None]
        apart = coming[0].to(ACC) - mean
        grad = grads_coming[0].to(ACC)
        if u is not None:
            kept = tl.load(u + rows // pixels, mask=rows < stop, other=0.0) >= rate
            grad = tl.where(kept, grad * (1.0 / survival), 0.0)
        grad = tl.where(rows < stop, grad * slope(apart * (rstd * w) + b, ACT), 0.0)
        plain += grad
        times_x += grad * apart
        coming = coming[1:]
        grads_coming = grads_coming[1:]
    at_sum = partial + program * C + cols
    tl.store(at_sum, tl.sum(plain, axis=0), mask=cols < C)
    tl.store(at_sum + programs * C, tl.sum(times_x * rstd, axis=0), mask=cols < C)


@triton.jit
def input_gradient(
    x,
    statistics,
    weight,
    bias,
    dy,
    gate,
    shift,
    u,
    sums,
    dx,
    C,
    pixels,
    rate,
    survival,
    count,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Write BatchNorm's input gradient, given the sums (2, C) of `norm_sums` over all `count` rows.

    The gradient of the activation's output is dy, dropped as it was, times the gate, plus a shift (N, C). `pixels` are
    as in `normalise`.
    """
    sample, rows, cols, at = rows_of_sample(C, pixels, BM, BC)
    mean, rstd, w, b = affine(statistics, weight, bias, cols, C, ACC)
    plain = channel(sums, cols, C, ACC) / count
    times_x = channel(sums + C, cols, C, ACC) / count
    inside = (rows < pixels) & (cols[None, :] < C)
    apart = tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean
    grad = tl.load(dy + at, mask=inside, other=0.0).to(ACC)
    if u is not None:
        grad = tl.where(tl.load(u + sample) >= rate, grad * (1.0 / survival), 0.0)
    if gate is not None:
        grad = grad * channel(gate + sample * C, cols, C, ACC) + channel(shift + sample * C, cols, C, ACC)
    grad *= slope(apart * (rstd * w) + b, ACT)
    tl.store(dx + at, (rstd * w) * (grad - plain) - apart * (rstd * w * rstd * times_x), mask=inside)
