"""Squeeze-excite's gate between the kernels that read pixels: from their sums to gates, and back."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_train.models.fused import gate_kernels, launch

_SAMPLES = 16  # of a program: the fewest that a product of matrices takes, as programs are few
_PARTS = 8  # at most, of a contraction or of a sum over pixels: they are read at once
_WARPS = 8  # of a program, for what it reads at once to have room in registers


class Gate(NamedTuple):
    """Hold gates (N, C), and what their gradients need: means (N, C), and the first layer's output (N, S)."""

    gate: Tensor
    means: Tensor
    hidden: Tensor


def forward(partial: Tensor, pixels: int, weights: Sequence[Tensor], dtype: torch.dtype, act: str) -> Gate:
    """Return the gates of sums over `pixels` (N, splits, C), rounded to `dtype` as the plain layers' would be.

    `weights` are those of both layers, each with its bias: (S, C, 1, 1), (S,), (C, S, 1, 1) and (C,).
    """
    reduce_weight, reduce_bias, expand_weight, expand_bias = (weight.contiguous() for weight in weights)
    partial = _few(partial)
    samples, splits, channels = partial.shape
    sizes, blocks = (samples, channels, len(reduce_bias)), _blocks(channels, len(reduce_bias))
    means = partial.new_empty(samples, channels, dtype=dtype)
    hidden = partial.new_empty(samples, len(reduce_bias), dtype=dtype)
    gate = partial.new_empty(samples, channels)
    chunk, parts = _chunks(channels, blocks["BC"])
    squeezed = partial.new_empty(parts, *hidden.shape)
    launch._launch(
        gate_kernels.squeeze,
        _contraction_grid(sizes, parts, blocks),
        *(partial, reduce_weight, means, squeezed, *sizes, pixels, chunk, parts),
        SPLITS=splits,
        **blocks,
    )
    arguments = squeezed, reduce_bias, expand_weight, expand_bias, hidden, gate, *sizes
    launch._launch(gate_kernels.excite, _grid(sizes, blocks), *arguments, PARTS=parts, ACT=act, **blocks)
    return Gate(gate, means, hidden)


def backward(
    partial: Tensor, pixels: int, gate: Gate, weights: Sequence[Tensor], act: str
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return what follows from `gated_sums`' sums over pixels (5, N, splits, C), once through the gate's layers.

    They are the gradient of each pixel through its mean (N, C), BatchNorm's sums (2, C), and the weights' gradients.
    """
    reduce_weight, _, expand_weight, _ = (weight.contiguous() for weight in weights)
    partial = _few(partial)
    _, samples, splits, channels = partial.shape
    sizes = samples, channels, gate.hidden.shape[1]
    blocks = _blocks(*sizes[1:])
    chunk, parts = _chunks(channels, blocks["BC"])
    d_output, d_hidden = torch.empty_like(gate.means), torch.empty_like(gate.hidden)
    d_activated = partial.new_empty(parts, *d_hidden.shape)
    launch._launch(
        gate_kernels.excite_gradient,
        _contraction_grid(sizes, parts, blocks),
        *(partial, gate.gate, expand_weight, d_output, d_activated, *sizes, chunk, parts),
        SPLITS=splits,
        **blocks,
    )
    grid = _grid(sizes, blocks)
    shift, of_blocks = torch.empty_like(gate.gate), partial.new_empty(2, grid[0], channels)
    launch._launch(
        gate_kernels.squeeze_gradient,
        grid,
        *(partial, gate.gate, d_activated, gate.hidden, reduce_weight, d_hidden, shift, of_blocks, *sizes, pixels),
        SPLITS=splits,
        PARTS=parts,
        ACT=act,
        **blocks,
    )
    sums = partial.new_empty(2, channels)
    # Rounded as those of layers that autocast casts.
    gradients = tuple(gate.means.new_empty(weight.shape) for weight in weights)
    narrow = _blocks(*sizes[1:], most=32) | {"BN": launch.filled(min(samples, 64)), "BR": launch.filled(grid[0])}
    launch._launch(
        gate_kernels.parameter_gradients,
        (math.ceil(channels / narrow["BC"]), math.ceil(sizes[2] / narrow["BS"])),
        *(gate.means, gate.hidden, d_hidden, d_output, of_blocks, *gradients, sums, *sizes, grid[0]),
        ACT=act,
        **narrow,
    )
    return shift, sums, tuple(found.to(weight.dtype) for found, weight in zip(gradients, weights, strict=True))


def _few(partial: Tensor) -> Tensor:
    """Add up (..., splits, C) where it is more than a program reads at once: where samples are few."""
    *outer, splits, channels = partial.shape
    return partial if splits <= _PARTS else launch.add_rows(partial.flatten(0, -3)).view(*outer, 1, channels)


def _blocks(channels: int, squeezed: int, most: int = 64) -> dict[str, int]:
    columns, own = launch.filled(min(channels, most)), launch.filled(min(squeezed, 64))
    return {"BN": _SAMPLES, "BC": columns, "BS": own, "num_warps": _WARPS}


def _chunks(channels: int, block: int) -> tuple[int, int]:
    """Return how many channels a program contracts over, a multiple of `block`, and the number of such parts."""
    parts, chunk = launch.shares(channels, block, _PARTS)
    return chunk, parts


def _contraction_grid(sizes: tuple[int, ...], parts: int, blocks: dict[str, int]) -> tuple[int, int]:
    return math.ceil(sizes[0] / blocks["BN"]) * parts, math.ceil(sizes[2] / blocks["BS"])


def _grid(sizes: tuple[int, ...], blocks: dict[str, int]) -> tuple[int, int]:
    return math.ceil(sizes[0] / blocks["BN"]), math.ceil(sizes[1] / blocks["BC"])
