"""Triton kernels of squeeze-excite's gate: from means to gates and back, and sums over samples behind it.

They round where the plain layers do under autocast, whose type is that of the tensors which keep what was rounded:
inputs and outputs of both layers. Products are added up in `ACC`. Where a contraction is divided among programs, its
parts lie one after another, and who reads them adds them up, always in the same order. N is samples, C channels,
S squeezed channels; BN, BC and BS are blocks of these, of 16 at least as products of matrices want them.
"""

import triton
import triton.language as tl

from effnet_train.models.fused.common_kernels import activated, slope


@triton.jit
def matrix(pointer, rows, cols, height, width, TYPE: tl.constexpr):
    """Load a block of a matrix (height, width)."""
    at = rows[:, None] * width + cols[None, :]
    return tl.load(pointer + at, mask=(rows[:, None] < height) & (cols[None, :] < width), other=0.0).to(TYPE)


@triton.jit
def stack(pointer, rows, cols, height, width, step, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Load the same block of `COUNT` matrices that begin `step` apart, all at once: their sum is over the first axis.

    What else is wanted is asked for before it is added up, as that waits.
    """
    BLOCK: tl.constexpr = triton.next_power_of_2(COUNT)
    parts = tl.arange(0, BLOCK)[:, None, None]
    rows = rows[None, :, None]
    cols = cols[None, None, :]
    inside = (parts < COUNT) & (rows < height) & (cols < width)
    return tl.load(pointer + parts * step + rows * width + cols, mask=inside, other=0.0).to(ACC)


@triton.jit
def store(pointer, value, rows, cols, height, width):
    """Store a block of a matrix (height, width)."""
    at = rows[:, None] * width + cols[None, :]
    tl.store(pointer + at, value, mask=(rows[:, None] < height) & (cols[None, :] < width))


@triton.jit
def product(a, b, ACC: tl.constexpr):
    """Multiply two matrices; those in float32 as they are."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def squeeze(
    partial,
    reduce_weight,
    means,
    squeezed,
    N,
    C,
    S,
    pixels,
    chunk,
    parts,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Write means (N, C) of the sums over pixels (N, SPLITS, C), and the first layer's products without its bias.

    A program takes `chunk` channels: `squeezed` is (parts, N, S).
    """
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    rows = block * BN + tl.arange(0, BN)
    own = tl.program_id(1) * BS + tl.arange(0, BS)
    TYPE: tl.constexpr = means.dtype.element_ty
    value = tl.zeros([BN, BS], ACC)
    for first in tl.range(part * chunk, tl.minimum((part + 1) * chunk, C), BC, num_stages=2):
        cols = first + tl.arange(0, BC)
        splits = stack(partial, rows * SPLITS, cols, N * SPLITS, C, C, SPLITS, ACC)
        mean = (tl.sum(splits, axis=0) / pixels).to(TYPE)
        if tl.program_id(1) == 0:
            store(means, mean, rows, cols, N, C)
        value += product(mean, tl.trans(matrix(reduce_weight, own, cols, S, C, TYPE)), ACC)
    store(squeezed + part * N * S, value, rows, own, N, S)


@triton.jit
def excite(
    squeezed,
    reduce_bias,
    expand_weight,
    expand_bias,
    hidden,
    gate,
    N,
    C,
    S,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Write the first layer's output (N, S), not activated yet, and gates (N, C), from `squeezed` (PARTS, N, S)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    TYPE: tl.constexpr = hidden.dtype.element_ty
    value = tl.zeros([BN, BC], ACC)
    for first in tl.range(0, S, BS, num_stages=1):
        own = first + tl.arange(0, BS)
        parts = stack(squeezed, rows, own, N, S, N * S, PARTS, ACC)
        bias = tl.load(reduce_bias + own, mask=own < S, other=0.0).to(TYPE).to(ACC)
        weight = matrix(expand_weight, cols, own, C, S, TYPE)
        h = (tl.sum(parts, axis=0) + bias[None, :]).to(TYPE)
        if tl.program_id(1) == 0:
            store(hidden, h, rows, own, N, S)
        value += product(activated(h.to(ACC), ACT).to(TYPE), tl.trans(weight), ACC)
    value += tl.load(expand_bias + cols, mask=cols < C, other=0.0).to(TYPE).to(ACC)[None, :]
    store(gate, tl.sigmoid(value.to(TYPE).to(ACC)), rows, cols, N, C)


@triton.jit
def excite_gradient(
    partial,
    gate,
    expand_weight,
    d_output,
    d_activated,
    N,
    C,
    S,
    chunk,
    parts,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Write gradients of the second layer's output (N, C) and input (parts, N, S).

    The gate's own gradient is the first of `gated_sums`' sums over pixels, (5, N, SPLITS, C).
    """
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    rows = block * BN + tl.arange(0, BN)
    own = tl.program_id(1) * BS + tl.arange(0, BS)
    TYPE: tl.constexpr = d_output.dtype.element_ty
    value = tl.zeros([BN, BS], ACC)
    for first in tl.range(part * chunk, tl.minimum((part + 1) * chunk, C), BC, num_stages=2):
        cols = first + tl.arange(0, BC)
        splits = stack(partial, rows * SPLITS, cols, N * SPLITS, C, C, SPLITS, ACC)
        g = matrix(gate, rows, cols, N, C, ACC)
        grad = (tl.sum(splits, axis=0) * g * (1.0 - g)).to(TYPE)
        if tl.program_id(1) == 0:
            store(d_output, grad, rows, cols, N, C)
        value += product(grad, matrix(expand_weight, cols, own, C, S, TYPE), ACC)
    store(d_activated + part * N * S, value, rows, own, N, S)


@triton.jit
def squeeze_gradient(
    partial,
    gate,
    d_activated,
    hidden,
    reduce_weight,
    d_hidden,
    shift,
    of_blocks,
    N,
    C,
    S,
    pixels,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Write gradients of the first layer's output (N, S) and of each pixel through its mean, `shift` (N, C).

    With these, `gated_sums`' other sums over pixels give BatchNorm's over the samples of a block, (2, blocks, C).
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    TYPE: tl.constexpr = hidden.dtype.element_ty
    g = matrix(gate, rows, cols, N, C, ACC)
    step = N * SPLITS * C
    dz_slopes = tl.sum(stack(partial + step, rows * SPLITS, cols, N * SPLITS, C, C, SPLITS, ACC), axis=0)
    slopes = tl.sum(stack(partial + 2 * step, rows * SPLITS, cols, N * SPLITS, C, C, SPLITS, ACC), axis=0)
    dz_x_slopes = tl.sum(stack(partial + 3 * step, rows * SPLITS, cols, N * SPLITS, C, C, SPLITS, ACC), axis=0)
    x_slopes = tl.sum(stack(partial + 4 * step, rows * SPLITS, cols, N * SPLITS, C, C, SPLITS, ACC), axis=0)
    value = tl.zeros([BN, BC], ACC)
    for first in tl.range(0, S, BS, num_stages=1):
        own = first + tl.arange(0, BS)
        parts = stack(d_activated, rows, own, N, S, N * S, PARTS, ACC)
        h = matrix(hidden, rows, own, N, S, ACC)
        weight = matrix(reduce_weight, own, cols, S, C, TYPE)
        grad = (tl.sum(parts, axis=0).to(TYPE).to(ACC) * slope(h, ACT)).to(TYPE)
        if tl.program_id(1) == 0:
            store(d_hidden, grad, rows, own, N, S)
        value += product(grad, weight, ACC)
    value = value.to(TYPE).to(ACC) / pixels
    store(shift, value, rows, cols, N, C)
    at_sum = of_blocks + tl.program_id(0) * C + cols
    tl.store(at_sum, tl.sum(dz_slopes * g + slopes * value, axis=0), mask=cols < C)
    at_sum += tl.num_programs(0) * C
    tl.store(at_sum, tl.sum(dz_x_slopes * g + x_slopes * value, axis=0), mask=cols < C)


@triton.jit
def parameter_gradients(
    means,
    hidden,
    d_hidden,
    d_output,
    of_blocks,
    d_reduce_weight,
    d_reduce_bias,
    d_expand_weight,
    d_expand_bias,
    sums,
    N,
    C,
    S,
    blocks,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Write the gradients of both layers' weights and biases: (S, C), (S,), (C, S) and (C,).

    And add BatchNorm's sums of blocks of samples, (2, blocks, C), up to (2, C). BR is not below their number.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    own = tl.program_id(1) * BS + tl.arange(0, BS)
    TYPE: tl.constexpr = means.dtype.element_ty
    reduce_weight = tl.zeros([BS, BC], ACC)
    reduce_bias = tl.zeros([BS], ACC)
    expand_weight = tl.zeros([BC, BS], ACC)
    expand_bias = tl.zeros([BC], ACC)
    for first in tl.range(0, N, BN, num_stages=2):
        rows = first + tl.arange(0, BN)
        of_hidden = matrix(d_hidden, rows, own, N, S, TYPE)
        of_output = matrix(d_output, rows, cols, N, C, TYPE)
        a = activated(matrix(hidden, rows, own, N, S, ACC), ACT).to(TYPE)
        reduce_weight += product(tl.trans(of_hidden), matrix(means, rows, cols, N, C, TYPE), ACC)
        reduce_bias += tl.sum(of_hidden.to(ACC), axis=0)
        expand_weight += product(tl.trans(of_output), a, ACC)
        expand_bias += tl.sum(of_output.to(ACC), axis=0)
    store(d_reduce_weight, reduce_weight, own, cols, S, C)
    store(d_expand_weight, expand_weight, cols, own, C, S)
    if tl.program_id(0) == 0:
        tl.store(d_reduce_bias + own, reduce_bias, mask=own < S)
    if tl.program_id(1) == 0:
        tl.store(d_expand_bias + cols, expand_bias, mask=cols < C)
        for i in tl.static_range(2):
            parts = matrix(of_blocks + i * blocks * C, tl.arange(0, BR), cols, blocks, C, ACC)
            tl.store(sums + i * C + cols, tl.sum(parts, axis=0), mask=cols < C)
