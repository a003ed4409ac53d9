"""Triton kernels of the expansion, y = x W^T, over rows of channels: x (M, K), W (C, K), y (M, C).

Its BatchNorm's input gradient is A = s (g - plain) + p (y - mean), channel by channel: s = weight / deviation,
p = -s * times_x / deviation, g what reaches BatchNorm's output, `plain` and `times_x` the means of g and of g times
the normalised y. As y is x W^T, neither gradient needs y, or A written out:

    dx = A W   = g (s W) + x (W^T p W) - (s plain + p mean) W
    dW = A^T x = s (g^T x) + p W (x^T x) - (s plain + p mean) (1^T x)

So of the large tensors g alone is read, once, and by products of matrices only, of which dW needs [g x 1]^T [x 1].
As in `norm_kernels`, nothing is added atomically. `BK` is K filled up to a power of two, with room for the ones where
there are any.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.common_kernels import channel, counts, deviations, place, store_moments


@triton.jit
def filters(weight, cols, C, K: tl.constexpr, BK: tl.constexpr):
    """Load the weights of a block of channels, (BC, BK)."""
    ks = tl.arange(0, BK)[None, :]
    return tl.load(weight + cols[:, None] * K + ks, mask=(cols[:, None] < C) & (ks < K), other=0.0)


@triton.jit
def inputs(x, rows, stop, K: tl.constexpr, BK: tl.constexpr):
    """Load rows of x, (BM, BK)."""
    ks = tl.arange(0, BK)[None, :]
    return tl.load(x + rows.to(tl.int64) * K + ks, mask=(rows < stop) & (ks < K), other=0.0)


@triton.jit
def coefficients(statistics, norm_weight, sums, cols, C, count, ACC: tl.constexpr):
    """Return s, p, `plain` and the mean of y, a number a channel, as columns."""
    rstd = tl.trans(channel(statistics + 2 * C, cols, C, ACC))
    of_g = rstd * tl.trans(channel(norm_weight, cols, C, ACC))
    of_y = -of_g * rstd * tl.trans(channel(sums + C, cols, C, ACC)) / count
    plain = tl.trans(channel(sums, cols, C, ACC)) / count
    return of_g, of_y, plain, tl.trans(channel(statistics, cols, C, ACC))


@triton.jit
def expand(
    x,
    weight,
    y,
    partial,
    M,
    C,
    chunk,
    programs,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Write y = x W^T; a program has `chunk` rows, whose moments it leaves as `moments` would."""
    program, cols = place(C, BC)
    start = program * chunk
    stop = tl.minimum(start + chunk, M)
    w = filters(weight, cols, C, K, BK)
    # What the moments are told apart from: the first row, near enough.
    first_row = inputs(x, start + tl.arange(0, 1)[:, None], stop, K, BK)
    origin = tl.sum(w.to(ACC) * first_row.to(ACC), axis=1)[None, :]
    plain = tl.zeros([BM, BC], ACC)
    square = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        rows = first + tl.arange(0, BM)[:, None]
        product = tl.dot(inputs(x, rows, stop, K, BK), tl.trans(w), out_dtype=ACC)
        stored = product.to(y.dtype.element_ty)
        at = rows.to(tl.int64) * C + cols[None, :]
        tl.store(y + at, stored, mask=(rows < stop) & (cols[None, :] < C))
        # Of what was stored, not of what was computed: that is what will be normalised.
        plain, square = deviations(stored.to(ACC), rows < stop, origin, plain, square)
    count = counts(start, stop, ACC, BM)
    store_moments(partial, count, origin, plain, square, cols, C, program, programs)


@triton.jit
def expand_gradients(
    g,
    x,
    weight,
    statistics,
    norm_weight,
    sums,
    dx,
    partial,
    M,
    C,
    count,
    chunk,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write dx, and leave [g x 1]^T [x 1] of a program's `chunk` rows in `partial` (programs, C + K + 1, K + 1).

    Either may be None. The sums (2, C) are those of `norm_sums` over all `count` rows. A program has all channels:
    BLOCKS times BC.
    """
    start = tl.program_id(0) * chunk
    stop = tl.minimum(start + chunk, M)
    ks = tl.arange(0, BK)
    scaled = ()
    of_x = tl.zeros([BK, BK], ACC)
    taken = tl.zeros([1, BK], ACC)
    products = ()
    for block in tl.static_range(BLOCKS):
        cols = block * BC + tl.arange(0, BC)
        w = filters(weight, cols, C, K, BK)
        of_g, of_y, plain, mean = coefficients(statistics, norm_weight, sums, cols, C, count, ACC)
        of_part = (w.to(ACC) * of_g).to(w.dtype)
        scaled = scaled + (of_part,)
        # W^T p W in two numbers each, which have twice the digits, as x's mean is to vanish.
        wide = w.to(ACC) * of_y
        high = wide.to(w.dtype)
        of_x = tl.dot(tl.trans(w), high, of_x, out_dtype=ACC)
        of_x = tl.dot(tl.trans(w), (wide - high.to(ACC)).to(w.dtype), of_x, out_dtype=ACC)
        taken += tl.sum(of_part.to(ACC) * plain + wide * mean, axis=0)[None, :]
        products = products + (tl.zeros([BC, BK], ACC),)
    high_of_x = of_x.to(x.dtype.element_ty)
    low_of_x = (of_x - high_of_x.to(ACC)).to(x.dtype.element_ty)
    squares = tl.zeros([BK, BK], ACC)
    one = tl.where(ks[None, :] == K, tl.full([1, BK], 1.0, tl.float32), 0.0).to(x.dtype.element_ty)
    # The next rows of x are asked for here; Triton asks for those of g, which products alone read.
    coming = inputs(x, start + tl.arange(0, BM)[:, None], stop, K, BK)
    for first in range(start, stop, BM):
        rows = first + tl.arange(0, BM)[:, None]
        own = tl.where(ks[None, :] == K, one, coming)
        coming = inputs(x, rows + BM, stop, K, BK)
        grad = tl.dot(own, low_of_x, out_dtype=ACC)
        grad = tl.dot(own, high_of_x, grad, out_dtype=ACC)
        more = ()
        for block in tl.static_range(BLOCKS):
            cols = block * BC + tl.arange(0, BC)
            inside = (rows < stop) & (cols[None, :] < C)
            part = tl.load(g + rows.to(tl.int64) * C + cols[None, :], mask=inside, other=0.0)
            grad = tl.dot(part, scaled[block], grad, out_dtype=ACC)
            if partial is not None:
                more = more + (tl.dot(tl.trans(part), own, products[block], out_dtype=ACC),)
        if dx is not None:
            at = rows.to(tl.int64) * K + ks[None, :]
            tl.store(dx + at, grad - taken, mask=(rows < stop) & (ks[None, :] < K))
        if partial is not None:
            products = more
            squares = tl.dot(tl.trans(own), own, squares, out_dtype=ACC)
    if partial is not None:
        at_sum = partial + tl.program_id(0).to(tl.int64) * ((C + K + 1) * (K + 1)) + ks[None, :]
        for block in tl.static_range(BLOCKS):
            cols = (block * BC + tl.arange(0, BC))[:, None]
            tl.store(at_sum + cols * (K + 1), products[block], mask=(cols < C) & (ks[None, :] <= K))
        own_rows = tl.arange(0, BK)[:, None]
        tl.store(at_sum + (C + own_rows) * (K + 1), squares, mask=(own_rows <= K) & (ks[None, :] <= K))


@triton.jit
def expand_weight_gradient(
    products,
    weight,
    statistics,
    norm_weight,
    sums,
    sum_of_a,
    out,
    C,
    rows,
    count,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Write dW from what `expand_gradients` left of `rows` rows, added up: `products` (C + K + 1, K + 1).

    x is taken from its mean, and what that leaves away is A's sum over the rows times that mean. `sum_of_a` (C,) is
    known, or None for 0: y's mean and `plain` were rounded otherwise than the products that they are to cancel.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    ks = tl.arange(0, BK)[None, :]
    of_g, of_y, _, _ = coefficients(statistics, norm_weight, sums, cols, C, count, ACC)
    inside = cols[:, None] < C
    total = tl.load(products + cols[:, None] * (K + 1) + ks, mask=inside & (ks <= K), other=0.0) * of_g
    for k in range(K):
        w = tl.load(weight + cols * K + k, mask=cols < C, other=0.0).to(ACC)[:, None]
        total += w * of_y * tl.load(products + (C + k) * (K + 1) + ks, mask=ks <= K, other=0.0)
    column = tl.load(products + (C + K) * (K + 1) + ks, mask=ks <= K, other=0.0)
    surplus = tl.sum(tl.where(ks == K, total, 0.0), axis=1)[:, None]
    if sum_of_a is not None:
        surplus -= tl.trans(channel(sum_of_a, cols, C, ACC))
    total -= surplus / rows * column
    tl.store(out + cols[:, None] * K + ks, total, mask=inside & (ks < K))
