"""The Triton kernel of `one_pass`."""

import triton
import triton.language as tl


@triton.jit
def update(
    addresses,
    sizes,
    decays,
    owners,
    starts,
    rate,
    follow,
    alpha,
    momentum,
    eps,
    BLOCK: tl.constexpr,
):
    """Move one block of one tensor, and of what belongs to it.

    `addresses` (tensors, 5) are of weights, gradients, mean squares, momenta and averages; `rate` and `follow`, how far
    the averages go, are read from memory, so that a captured kernel sees new ones.
    """
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    at = tl.load(starts + program).to(tl.int64) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + tensor)
    weights = tl.load(addresses + tensor * 5).to(tl.pointer_type(tl.float32)) + at
    gradients = tl.load(addresses + tensor * 5 + 1).to(tl.pointer_type(tl.float32)) + at
    squares = tl.load(addresses + tensor * 5 + 2).to(tl.pointer_type(tl.float32)) + at
    momenta = tl.load(addresses + tensor * 5 + 3).to(tl.pointer_type(tl.float32)) + at
    averages = tl.load(addresses + tensor * 5 + 4).to(tl.pointer_type(tl.float32)) + at
    weight = tl.load(weights, mask=inside)
    gradient = tl.load(gradients, mask=inside) + tl.load(decays + tensor) * weight
    square = tl.load(squares, mask=inside)
    square += (1.0 - alpha) * (gradient * gradient - square)
    moved = momentum * tl.load(momenta, mask=inside) + tl.load(rate) * gradient / tl.sqrt(square + eps)
    weight -= moved
    average, way = tl.load(averages, mask=inside), tl.load(follow)
    # From the nearer end, as torch's lerp does it: with no average to keep, it is the weight to the last bit.
    near, far = average + way * (weight - average), weight - (1.0 - way) * (weight - average)
    tl.store(weights, weight, mask=inside)
    tl.store(squares, square, mask=inside)
    tl.store(momenta, moved, mask=inside)
    tl.store(averages, tl.where(way < 0.5, near, far), mask=inside)
    tl.store(gradients, tl.zeros([BLOCK], tl.float32), mask=inside)
