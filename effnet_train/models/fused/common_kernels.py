"""What Triton's kernels here have in common: activations, where a program's numbers lie, moments.

`ACC` is what is computed in: float32, or float64 for float64 tensors. Rows are numbered in 32 bits, in which one
divides fast, elements in 64.
"""

import os

import torch
import triton
import triton.language as tl

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
    plain, square = deviations(value, mask, origin, plain, square)
    return origin, plain, square


@triton.jit
def deviations(value, mask, origin, plain, square):
    """Take `value` into running sums of its distance from `origin`, and of that squared, element by element."""
    apart = tl.where(mask, value - origin, 0.0)
    return plain + apart, square + apart * apart


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
def rows_of_sample(C, pixels, BM: tl.constexpr, BC: tl.constexpr):
    """Return this program's sample, its rows of that, its channels, and where all that lies; rows may be too many."""
    program, cols = place(C, BC)
    blocks = tl.cdiv(pixels, BM)
    sample, rows = program // blocks, program % blocks * BM + tl.arange(0, BM)[:, None]
    return sample, rows, cols, (sample.to(tl.int64) * pixels + rows) * C + cols[None, :]
