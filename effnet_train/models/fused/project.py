"""The projection's kernels called on tensors: which products are theirs, and how these are divided among programs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_train.models import fused
from effnet_train.models.fused import launch, project_kernels
from effnet_train.models.fused.common_kernels import NATIVE

MOST_OUTPUTS = 128  # of a product that is made here: registers hold a row of them for each row of a tile
MOST_OUTPUTS_BEFORE_AMPERE = 64  # a program has 64 KiB of shared memory there, and needs 80 for more
MOST_OUTPUTS_WITH_MOMENTS = 64  # as these take as many registers again
MOST_PROGRAMS = 1024  # that leave a part of a sum
ROWS_OF_AN_OUTPUT = 16  # of a program, at least: the parts of the matrix's gradient are then an eighth of x, at most


class Blocks(NamedTuple):
    """Hold a tile's rows, a multiple of 64, and channels; a program's warps, and steps whose loads are on their way.

    Warps are four where moments or sums are made: see `project_kernels.add_own_rows`. `registers` are a thread's, at
    most, if above 0: a processor has them for four warps of 128 four times, of 168 three times.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    registers: int = 0


# By outputs, up to so many.
FORWARD = {
    MOST_OUTPUTS_WITH_MOMENTS: Blocks(64, 32, registers=128),
    MOST_OUTPUTS: Blocks(64, 64, stages=2, registers=128),
}
SUMS = {MOST_OUTPUTS: Blocks(64, 32, registers=168)}
INPUT_GRADIENT = {16: Blocks(128, 32, stages=1), MOST_OUTPUTS: Blocks(128, 32, registers=168)}


class _Split(NamedTuple):
    """Hold how samples are divided: `splits` of each, of `chunk` pixels, and `group` of all these to a program."""

    splits: int
    chunk: int
    group: int
    programs: int


def fits(x: Tensor, outputs: int) -> bool:
    """Say whether the product of x's channels is made here; under Triton's interpreter it is in any type."""
    return outputs <= _most_outputs(x.device) and (x.dtype.itemsize == 2 or x.device.type == "cpu")


def _most_outputs(device: torch.device) -> int:
    older = device.type == "cuda" and fused.capability(device) < (8, 0)
    return MOST_OUTPUTS_BEFORE_AMPERE if older else MOST_OUTPUTS


def forward(
    x: Tensor, affine: Sequence[Tensor], act: str, gate: Tensor | None, matrix: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return (act(BatchNorm(x)) * gate) @ matrix.T, and moments of its parts as `launch.moments`', if there is room.

    `matrix` is (D, C), of x's type; a gate (N, C).
    """
    outputs, channels = matrix.shape
    samples, pixels = _samples(x, gate)
    blocks = _blocks(FORWARD, outputs)
    tiles = samples * math.ceil(pixels / blocks.rows)
    programs, chunk = launch.shares(tiles, 1, launch._MOST_PARTS)
    y = x.new_empty(x.shape[0], *x.shape[2:], outputs).permute(0, 3, 1, 2)
    partial = None
    if outputs <= MOST_OUTPUTS_WITH_MOMENTS:
        partial = x.new_empty(3, programs, outputs, dtype=launch.accumulator(x))
    sizes = channels, pixels, tiles, chunk, programs
    arguments = x, *affine, gate, matrix, y, partial, *sizes
    launch._launch(project_kernels.project, (programs,), *arguments, ACT=act, **_constants(blocks, outputs))
    return y, partial


def sums(
    x: Tensor, affine: Sequence[Tensor], act: str, gate: Tensor | None, dy: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `launch.gated_sums` leaves of parts of samples, (5, N, splits, C), and the matrix's gradient (D, C).

    Without a gate the first is `launch.norm_sums`', (2, C).
    """
    outputs, channels = matrix.shape
    samples, pixels = _samples(x, gate)
    blocks = _blocks(SUMS, outputs)
    columns = math.ceil(channels / blocks.columns)
    split = _split(samples, pixels, blocks.rows, columns, outputs)
    acc = launch.accumulator(x)
    count = 2 if gate is None else 5
    partial = x.new_empty(count, samples, split.splits, channels, dtype=acc)
    products = x.new_empty(1, split.programs, outputs * channels, dtype=acc)
    sizes = channels, pixels, samples * split.splits, split.group, split.chunk, split.splits
    arguments = x, *affine, gate, matrix, dy, partial, products, *sizes
    grid = (split.programs * columns,)
    launch._launch(project_kernels.project_sums, grid, *arguments, ACT=act, **_constants(blocks, outputs))
    total = launch.add_rows(partial.squeeze(1)) if gate is None else partial
    return total, launch.add_rows(products).view(outputs, channels)


def input_gradient(
    x: Tensor,
    affine: Sequence[Tensor],
    act: str,
    gate: tuple[Tensor | None, Tensor | None],
    dy: Tensor,
    matrix: Tensor,
    over_all: tuple[Tensor, int],
) -> Tensor:
    """Return the gradient of x, given a gate and its shift as `launch.input_gradient`'s, and BatchNorm's sums."""
    outputs, channels = matrix.shape
    samples, pixels = _samples(x, gate[0])
    dx = torch.empty_like(x)
    blocks = _blocks(INPUT_GRADIENT, outputs)
    grid = (samples * math.ceil(pixels / blocks.rows),)
    total, count = over_all
    arguments = x, *affine, *gate, matrix, dy, total, dx, channels, pixels, count
    loop = {"BLOCKS": math.ceil(channels / blocks.columns), "STAGES": blocks.stages}
    constants = _constants(blocks, outputs) | loop
    launch._launch(project_kernels.project_input_gradient, grid, *arguments, ACT=act, **constants)
    return dx


def _samples(x: Tensor, gate: Tensor | None) -> tuple[int, int]:
    """Return samples and the pixels of each; without a gate all are as good as one."""
    pixels = x.shape[2] * x.shape[3]
    return (1, x.shape[0] * pixels) if gate is None else (x.shape[0], pixels)


def _blocks(kinds: Mapping[int, Blocks], outputs: int) -> Blocks:
    return next(blocks for most, blocks in kinds.items() if outputs <= most)


def _split(samples: int, pixels: int, rows: int, blocks: int, outputs: int) -> _Split:
    """Divide samples into tiles of so many rows; a program takes one of `blocks` of channels."""
    least = samples * pixels // (ROWS_OF_AN_OUTPUT * outputs)
    wanted = max(1, min(MOST_PROGRAMS, launch._PROGRAMS // blocks, least))
    splits, chunk = launch.shares(pixels, rows, wanted // samples)
    group = math.ceil(samples / wanted)
    return _Split(splits, chunk, group, math.ceil(samples * splits / group))


def _constants(blocks: Blocks, outputs: int) -> dict[str, Any]:
    return {
        "D": outputs,
        "BM": blocks.rows,
        "BC": blocks.columns,
        "BD": launch.filled(outputs),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        # An option of Nvidia's compiler alone: AMD's refuses it.
        **({"maxnreg": blocks.registers} if blocks.registers and NATIVE else {}),
    }
