"""Triton kernels of the projection: act(BatchNorm(x)), gated, times a matrix, and its gradients.

What is multiplied is made of x (M, C) where it is needed, tile by tile, and never written. The matrix is (D, C). D is
small, so that it costs less to read the output's gradient (M, D) for each block of channels and to multiply again than
to write the product. A tile has BM rows of one sample, whose gates are then a row. A program goes through tiles and
blocks of channels in one loop, so that what it needs next is on its way. As in `norm_kernels`, nothing is added
atomically.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.common_kernels import NATIVE, activated, affine, channel, place, sigmoid, slope


@triton.jit
def activated_and_slope(b, ACT: tl.constexpr):
    """Return the activation of `b` and its derivative there."""
    if ACT == "swish":
        s = sigmoid(b)
        return b * s, s + b * s * (1.0 - s)
    else:
        return activated(b, ACT), slope(b, ACT)


@triton.jit
def alike(a, b):
    """Return `a`, in float32, which Triton then has the threads hold as they hold `b`, and not once more otherwise."""
    if NATIVE and a.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=1)
    else:
        return a


@triton.jit
def add_own_rows(sums, block, BM: tl.constexpr, BN: tl.constexpr):
    """Add the rows of a product's block that one thread of four warps has, of every 64 two: 32 sums a column."""
    one, other = tl.split(tl.permute(tl.reshape(block, [BM // 64, 4, 2, 8, BN]), 0, 1, 3, 4, 2))
    return sums + tl.sum(one, axis=0) + tl.sum(other, axis=0)


@triton.jit
def over_rows(sums):
    """Add up what `add_own_rows` left, to a row."""
    return tl.sum(tl.sum(sums, axis=1), axis=0)


@triton.jit
def project(
    x,
    statistics,
    norm_weight,
    norm_bias,
    gate,
    matrix,
    y,
    partial,
    C,
    pixels,
    tiles,
    chunk,
    programs,
    D: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """Write y = (act(BatchNorm(x)) * gate) @ matrix.T, and leave its moments as `moments` would.

    A program has `chunk` of all `tiles`.
    """
    program = tl.program_id(0)
    outs = tl.arange(0, BD)[None, :]
    lanes = tl.arange(0, BM)[:, None]
    within = tl.arange(0, BC)
    tiles_of_sample = tl.cdiv(pixels, BM)
    first = program * chunk
    sample, start, block = first // tiles_of_sample, first % tiles_of_sample * BM, 0
    sums = tl.zeros([BM, BD], ACC)
    count = 0
    origin = tl.zeros([1, BD], ACC)
    plain = tl.zeros([4, 8, BD], ACC)
    square = tl.zeros([4, 8, BD], ACC)
    for _ in range((tl.minimum(first + chunk, tiles) - first) * tl.cdiv(C, BC)):
        row = sample.to(tl.int64) * pixels + start
        inside = lanes < pixels - start
        cols = block + within
        channels = cols < C
        own = tl.load(x + row * C + block + (lanes * C + within[None, :]), mask=inside & channels[None, :], other=0.0)
        seen = (outs < D) & channels[:, None]
        part = tl.load(matrix + block + (outs * C + within[:, None]), mask=seen, other=0.0)
        mean, rstd, w, b = affine(statistics, norm_weight, norm_bias, cols, C, ACC)
        value = activated((own.to(ACC) - mean) * (rstd * w) + b, ACT)
        if gate is not None:
            value *= channel(gate + sample * C, cols, C, ACC)
        sums = tl.dot(value.to(x.dtype.element_ty), part, sums, out_dtype=ACC)
        block += BC
        if block >= C:
            stored = sums.to(y.dtype.element_ty)
            tl.store(y + row * D + (lanes * D + outs), stored, mask=inside & (outs < D))
            if partial is not None:
                # Of what was stored, not of what was computed: that is what will be normalised.
                number = tl.minimum(pixels - start, BM)
                result = alike(stored.to(ACC), sums)
                if count == 0:
                    origin = tl.sum(tl.where(inside, result, 0.0), axis=0)[None, :] * (1.0 / number)
                apart = tl.where(inside, result - origin, 0.0)
                plain = add_own_rows(plain, apart, BM, BD)
                square = add_own_rows(square, apart * apart, BM, BD)
                count += number
            sums = tl.zeros([BM, BD], ACC)
        start = tl.where(block >= C, start + BM, start)
        block = tl.where(block >= C, 0, block)
        sample = tl.where(start >= pixels, sample + 1, sample)
        start = tl.where(start >= pixels, 0, start)
    if partial is not None:
        shift = over_rows(plain)[None, :] / count
        at = partial + program * D + outs
        tl.store(at, tl.zeros([1, BD], ACC) + count, mask=outs < D)
        tl.store(at + programs * D, origin + shift, mask=outs < D)
        tl.store(at + 2 * programs * D, over_rows(square)[None, :] - count * shift * shift, mask=outs < D)


@triton.jit
def project_sums(
    x,
    statistics,
    norm_weight,
    norm_bias,
    gate,
    matrix,
    dy,
    partial,
    d_matrix,
    C,
    pixels,
    items,
    group,
    chunk,
    splits,
    D: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """Leave the sums of `gated_sums`, or without a gate of `norm_sums`, and the matrix's gradient, given dy (M, D).

    An item is `chunk` pixels of a sample, or what is left of it; there are `splits` a sample, and a program has `group`
    of all `items`: with splits just one. `partial` is (5, items, C) or (2, items, C), and `d_matrix` (programs, D, C).
    """
    program, cols = place(C, BC)
    channels = cols[None, :] < C
    outs = tl.arange(0, BD)
    mean, rstd, w, b = affine(statistics, norm_weight, norm_bias, cols, C, ACC)
    within = (outs[:, None] < D) & channels
    part = tl.load(matrix + outs[:, None] * C + cols[None, :], mask=within, other=0.0)
    products = tl.zeros([BD, BC], ACC)
    for_gate = tl.zeros([4, 8, BC], ACC)
    slopes = tl.zeros([4, 8, BC], ACC)
    dz_slopes = tl.zeros([4, 8, BC], ACC)
    x_slopes = tl.zeros([4, 8, BC], ACC)
    dz_x_slopes = tl.zeros([4, 8, BC], ACC)
    lanes = tl.arange(0, BM)[:, None]
    item = program * group
    sample, start = item // splits, item % splits * chunk
    stop = start + chunk
    for _ in range((tl.minimum(item + group, items) - item) * (chunk // BM)):
        row = sample.to(tl.int64) * pixels + start
        inside = lanes < pixels - start
        own = tl.load(x + row * C + (lanes * C + cols[None, :]), mask=inside & channels, other=0.0)
        grads = tl.load(dy + row * D + (lanes * D + outs[None, :]), mask=inside & (outs[None, :] < D), other=0.0)
        dz = tl.dot(grads, part, out_dtype=ACC)
        apart = alike(own.to(ACC), dz) - mean
        s, d = activated_and_slope(apart * (rstd * w) + b, ACT)
        d = tl.where(inside, d, 0.0)
        z = s
        if gate is not None:
            z = s * channel(gate + sample * C, cols, C, ACC)
            for_gate = add_own_rows(for_gate, dz * s, BM, BC)
            slopes = add_own_rows(slopes, d, BM, BC)
            x_slopes = add_own_rows(x_slopes, d * apart, BM, BC)
        dz_slopes = add_own_rows(dz_slopes, dz * d, BM, BC)
        dz_x_slopes = add_own_rows(dz_x_slopes, dz * d * apart, BM, BC)
        if x.dtype.element_ty == tl.float16:  # beyond the sample z is not 0, and may be infinite, which times 0 is NaN
            z = tl.where(inside, z, 0.0)
        products = tl.dot(tl.trans(grads), z.to(x.dtype.element_ty), products, out_dtype=ACC)
        start += BM
        if start >= stop:
            scale = tl.reshape(rstd, [BC])
            at = item
            if gate is not None:
                tl.store(partial + at.to(tl.int64) * C + cols, over_rows(for_gate), mask=cols < C)
                at += items
            tl.store(partial + at.to(tl.int64) * C + cols, over_rows(dz_slopes), mask=cols < C)
            at += items
            if gate is not None:
                tl.store(partial + at.to(tl.int64) * C + cols, over_rows(slopes), mask=cols < C)
                at += items
            tl.store(partial + at.to(tl.int64) * C + cols, over_rows(dz_x_slopes) * scale, mask=cols < C)
            at += items
            if gate is not None:
                tl.store(partial + at.to(tl.int64) * C + cols, over_rows(x_slopes) * scale, mask=cols < C)
            for_gate = tl.zeros([4, 8, BC], ACC)
            slopes = tl.zeros([4, 8, BC], ACC)
            x_slopes = tl.zeros([4, 8, BC], ACC)
            dz_slopes = tl.zeros([4, 8, BC], ACC)
            dz_x_slopes = tl.zeros([4, 8, BC], ACC)
            item += 1
        sample = tl.where(start >= stop, sample + 1, sample)
        start = tl.where(start >= stop, 0, start)
    at = d_matrix + (program.to(tl.int64) * D + outs[:, None]) * C + cols[None, :]
    tl.store(at, products, mask=within)


@triton.jit
def project_input_gradient(
    x,
    statistics,
    norm_weight,
    norm_bias,
    gate,
    shift,
    matrix,
    dy,
    sums,
    dx,
    C,
    pixels,
    count,
    D: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write BatchNorm's input gradient as `norm_kernels.input_gradient` does, given dy (M, D).

    A program has one tile, and goes through BLOCKS blocks of channels.
    """
    tile = tl.program_id(0)
    tiles_of_sample = tl.cdiv(pixels, BM)
    sample = tile // tiles_of_sample
    start = tile % tiles_of_sample * BM
    row = sample.to(tl.int64) * pixels + start
    lanes = tl.arange(0, BM)[:, None]
    inside = lanes < pixels - start
    outs = tl.arange(0, BD)
    grads = tl.load(dy + row * D + (lanes * D + outs[None, :]), mask=inside & (outs[None, :] < D), other=0.0)
    within = tl.arange(0, BC)
    for block in tl.range(0, BLOCKS * BC, BC, num_stages=STAGES):
        cols = block + within
        channels = cols < C
        at = row * C + block
        own = tl.load(x + at + (lanes * C + within[None, :]), mask=inside & channels[None, :], other=0.0)
        seen = (outs[:, None] < D) & channels[None, :]
        part = tl.load(matrix + block + (outs[:, None] * C + within[None, :]), mask=seen, other=0.0)
        mean, rstd, w, b = affine(statistics, norm_weight, norm_bias, cols, C, ACC)
        plain = channel(sums, cols, C, ACC) / count
        times_x = channel(sums + C, cols, C, ACC) / count
        grad = tl.dot(grads, part, out_dtype=ACC)
        apart = alike(own.to(ACC), grad) - mean
        if gate is not None:
            grad = grad * channel(gate + sample * C, cols, C, ACC) + channel(shift + sample * C, cols, C, ACC)
        grad *= slope(apart * (rstd * w) + b, ACT)
        value = (rstd * w) * (grad - plain) - apart * (rstd * w * rstd * times_x)
        tl.store(dx + at + (lanes * C + within[None, :]), value, mask=inside & channels[None, :])
