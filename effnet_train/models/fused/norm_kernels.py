"""Triton kernels of BatchNorm and what follows it, over tensors that lie as rows of channels: (N * H * W, C).

No kernel adds atomically: programs leave partial sums, which another kernel adds in one order. So the same input gives
the same bits. `ACC` is what is computed in: float32, or float64 for float64 tensors. `chunk` is the rows of a program.
Rows are numbered in 32 bits, in which one divides fast, elements in 64.
"""

import os

import torch
import triton
import triton.language as tl

TILES_AHEAD = tl.constexpr(2)
# Whether one may speak to the GPU in its own words: it is Nvidia's, and no interpreter.
NATIVE = tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def sigmoid(b):
    """Return 1 / (1 + exp(-b)); in float32 within a few units of the last place, for a third of the instructions."""
    if NATIVE and b.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;  // -log2(e)
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t; }""",
            "=f,f",
            [b],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sigmoid(b)


@triton.jit
def activated(b, ACT: tl.constexpr):
    """Return the activation of `b`; any name but these three stands for none."""
    if ACT == "swish":
        return b * sigmoid(b)
    elif ACT == "relu6":  # not `tl.maximum`, which makes a number of NaN
        return tl.where(b < 0.0, 0.0, tl.where(b > 6.0, 6.0, b))
    elif ACT == "relu":
        return tl.where(b < 0.0, 0.0, b)
    else:
        return b


@triton.jit
def slope(b, ACT: tl.constexpr):
    """Return the derivative of the activation at `b`."""
    if ACT == "swish":
        s = sigmoid(b)
        return s * (1.0 + b * (1.0 - s))
    elif ACT == "relu6":
        return tl.where((b > 0.0) & (b < 6.0), b * 0.0 + 1.0, 0.0)
    elif ACT == "relu":
        return tl.where(b > 0.0, b * 0.0 + 1.0, 0.0)
    else:
        return b * 0.0 + 1.0


@triton.jit
def place(C, BC: tl.constexpr):
    """Return this program's number among those of its channels, and these; the next has others of the same rows."""
    blocks = tl.cdiv(C, BC)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BC + tl.arange(0, BC)


@triton.jit
def channel(pointer, cols, C, ACC: tl.constexpr):
    """Load a number a channel, as a row."""
    return tl.load(pointer + cols, mask=cols < C, other=0.0).to(ACC)[None, :]


@triton.jit
def affine(statistics, weight, bias, cols, C, ACC: tl.constexpr):
    """Return what BatchNorm needs of each channel: its mean, 1 / deviation, weight and bias, as rows."""
    mean = channel(statistics, cols, C, ACC)
    rstd = channel(statistics + 2 * C, cols, C, ACC)
    return mean, rstd, channel(weight, cols, C, ACC), channel(bias, cols, C, ACC)


@triton.jit
def track(value, mask, begins, origin, plain, square):
    """Take `value` into running sums of its distance from the first one, and of that squared, element by element.

    As the first, where it `begins`, is among those that are counted, the variance loses no digits wherever they lie.
    """
    origin = tl.where(begins, value, origin)
    apart = tl.where(mask, value - origin, 0.0)
    return origin, plain + apart, square + apart * apart


@triton.jit
def store_moments(partial, count, origin, plain, square, cols, C, program, programs):
    """Merge the sums of lanes that took `count` values each: a program's part of `partial` (3, programs, C).

    They are how many values there were, their mean, and the sum of their squared deviations.
    """
    shift = plain / tl.maximum(count, 1.0)
    mean = origin + shift
    total = tl.sum(count + mean * 0.0, axis=0)[None, :]
    merged = tl.sum(count * mean, axis=0)[None, :] / total
    squares = tl.sum(square - plain * shift + count * (mean - merged) * (mean - merged), axis=0)[None, :]
    at = partial + program * C + cols[None, :]
    inside = cols[None, :] < C
    tl.store(at, total, mask=inside)
    tl.store(at + programs * C, merged, mask=inside)
    tl.store(at + 2 * programs * C, squares, mask=inside)


@triton.jit
def counts(start, stop, ACC: tl.constexpr, BM: tl.constexpr):
    """Return how many of the rows from `start` to `stop` each of the BM lanes of a block takes, as a column."""
    return (tl.maximum(stop - start - tl.arange(0, BM)[:, None] + (BM - 1), 0) // BM).to(ACC)


@triton.jit
def tiles(x, base, first, stop, cols, C, COUNT: tl.constexpr, BM: tl.constexpr):
    """Load COUNT blocks of BM rows from `first` on, of those before `stop`; they are counted from the row `base`."""
    blocks = ()
    for i in tl.static_range(COUNT):
        rows = first + i * BM + tl.arange(0, BM)[:, None]
        at = (base + rows.to(tl.int64)) * C + cols[None, :]
        blocks = blocks + (tl.load(x + at, mask=(rows < stop) & (cols[None, :] < C), other=0.0),)
    return blocks


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
def rows_of_sample(C, pixels, BM: tl.constexpr, BC: tl.constexpr):
    """Return this program's sample, its rows of that, its channels, and where all that lies; rows may be too many."""
    program, cols = place(C, BC)
    blocks = tl.cdiv(pixels, BM)
    sample, rows = program // blocks, program % blocks * BM + tl.arange(0, BM)[:, None]
    return sample, rows, cols, (sample.to(tl.int64) * pixels + rows) * C + cols[None, :]


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
