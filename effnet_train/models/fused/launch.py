"""Kernels called on tensors: sizes of programs, and buffers for what they leave.

All tensors are channels-last. On the meta device nothing runs, but `traffic` is told which tensors a kernel would
touch, so that memory and traffic are counted from the same code that trains.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from effnet_train.models.fused import depthwise_kernels, norm_kernels

NONE = "none"  # no activation
# Programs that a reduction is divided among: fixed, as with them a sum's last digit would change.
_PROGRAMS = 2048
_WEIGHT_PROGRAMS = 1024  # of those that leave weights' gradients, too
_MOST_PARTS = 512  # partial sums of a channel
_WARPS = 4  # of a program that does not say otherwise
_COLUMNS = 2  # neighbouring ones of an image, that a lane of a depthwise convolution goes down together
# Numbers that a thread has at a time: so many are on their way, and registers hold what a kernel keeps for each. Where
# it goes down columns of images these are weights, too, by the convolution's size.
_NUMBERS: Mapping[str | int, int] = {"pointwise": 16, "sums": 16, "moments": 16, "many sums": 8, 3: 4, 5: 2}
_FEW_WARPS: Mapping[str | int, int] = {"moments": 2, "many sums": 2}  # where lanes are added up for little else


class Padding(NamedTuple):
    """Hold a depthwise convolution's kernel, stride, and padding above and on the left."""

    kernel: int
    stride: int
    top: int
    left: int


class Drop(NamedTuple):
    """Hold what drop connect draws for each sample (N,), and its rate."""

    u: Tensor
    rate: float


@torch.library.custom_op("effnet_train::traffic", mutates_args=())
def traffic(tensors: Sequence[Tensor]) -> None:
    """Do nothing; who counts a pass on the meta device sees here the tensors that a kernel reads or writes once."""


@traffic.register_fake
def _(tensors: Sequence[Tensor]) -> None:
    pass


def autocast_type(x: Tensor) -> torch.dtype:
    """Return the type that autocast would have a convolution of x compute in."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if on else x.dtype


def accumulator(x: Tensor) -> torch.dtype:
    """Return what is computed in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel; `constants` may hold Triton's own `num_warps` and `num_stages`, too."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if tensors[0].is_meta:
        traffic(tensors)
        return
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    acc = tl.float64 if wide else tl.float32
    kernel[grid](*_specialised(kernel, arguments), **{"num_warps": _WARPS, **constants}, ACC=acc)


def _specialised(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Build the number of channels into the kernel where it is no multiple of 16, which is all that Triton looks for.

    It then knows that rows begin at multiples of 8, say, and loads 8 numbers at once. There are few such layers.
    """
    place = kernel.arg_names.index("C")
    channels = arguments[place]
    if channels % 16 == 0:
        return arguments
    return *arguments[:place], tl.constexpr(channels), *arguments[place + 1 :]


def _columns(channels: int, most: int) -> int:
    """Return how many channels a program takes: as many as leave at most a tenth of its lanes idle."""
    for block in (128, 64, 32):
        if block <= most and math.ceil(channels / block) * block * 0.9 <= channels:
            return block
    return 16


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


class _Split(NamedTuple):
    """Hold how a reduction over rows is divided: programs, rows of each, and rows, channels and warps of a block."""

    programs: int
    chunk: int
    BM: int
    BC: int
    warps: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BM": self.BM, "BC": self.BC, "num_warps": self.warps}


def _block(channels: int, kind: str | int) -> tuple[int, int, int]:
    """Return how many rows and channels a program takes at a time, and its warps."""
    columns, warps = _columns(channels, 64), _FEW_WARPS.get(kind, _WARPS)
    return max(1, _NUMBERS.get(kind, 1) * 32 * warps // columns), columns, warps


def shares(rows: int, block: int, most: int) -> tuple[int, int]:
    """Divide rows among at most so many programs: their number, and the rows of each, a multiple of `block`."""
    tiles = math.ceil(rows / block)
    chunk = math.ceil(tiles / min(tiles, max(1, most))) * block
    return math.ceil(rows / chunk), chunk


def filled(size: int) -> int:
    """Return the least power of two that holds `size`, 16 or above: of so many a product's block is."""
    return max(16, 1 << (size - 1).bit_length())


def _split(rows: int, channels: int, *, kind: str | int = "sums", most: int | None = None) -> _Split:
    block, columns, warps = _block(channels, kind)
    programs = (most or _PROGRAMS) // math.ceil(channels / columns)
    return _Split(*shares(rows, block, min(_MOST_PARTS, programs)), block, columns, warps)


def _columns_of(
    x: Tensor, padding: Padding, *, shift: int = 0, most: int | None = None
) -> tuple[int, _Split, dict[str, int]]:
    """Divide the columns of x's images, and `shift` more of each, in groups: return how many, split and constants."""
    columns = max(_COLUMNS, padding.stride)  # a multiple of the stride, so that which weights see which column is known
    groups = x.shape[0] * math.ceil((x.shape[3] + shift) / columns)
    split = _split(groups, x.shape[1], kind=padding.kernel, most=most)
    return groups, split, {"K": padding.kernel, "STRIDE": padding.stride, "COLUMNS": columns, **split.blocks}


def _sample_split(samples: int, pixels: int, channels: int, *, kind: str = "sums") -> _Split:
    """Divide the pixels of each sample; `programs` is of one sample."""
    block, columns, warps = _block(channels, kind)
    programs = _PROGRAMS // (samples * math.ceil(channels / columns))
    return _Split(*shares(pixels, block, programs), block, columns, warps)


def _grid(split: _Split, channels: int, samples: int = 1) -> tuple[int]:
    return (samples * split.programs * math.ceil(channels / split.BC),)


def _pointwise(x: Tensor, *, by_sample: bool) -> tuple[tuple[int], dict[str, int], int]:
    """Return grid and blocks, none of which has rows of two samples if `by_sample`, and the rows that go together."""
    rows, channels = _rows(x), x.shape[1]
    samples = x.shape[0] if by_sample else 1
    block, columns, _ = _block(channels, "pointwise")
    programs = samples * math.ceil(rows // samples / block) * math.ceil(channels / columns)
    return (programs,), {"BM": block, "BC": columns}, rows // samples


def _at_once(rows: int) -> dict[str, Any]:
    """Return the block that holds all partial sums of 16 channels, and warps for 16 numbers a thread.

    To read them in turns would take a wait for memory each.
    """
    block = filled(rows)
    return {"BR": block, "BC": 16, "num_warps": max(1, min(16, block // 32))}


def add_rows(partial: Tensor) -> Tensor:
    """Add (K, rows, C) up to (K, C)."""
    count, rows, channels = partial.shape
    out = partial.new_empty(count, channels)
    grid = (count * math.ceil(channels / 16),)
    _launch(norm_kernels.add_rows, grid, partial, out, rows, channels, **_at_once(rows))
    return out


def moments(x: Tensor) -> Tensor:
    """Return the moments of parts of x's rows, (3, programs, C), for `finish_moments`."""
    channels = x.shape[1]
    split = _split(_rows(x), channels, kind="moments")
    partial = x.new_empty(3, split.programs, channels, dtype=accumulator(x))
    sizes = (_rows(x), channels, split.chunk, split.programs)
    _launch(norm_kernels.moments, _grid(split, channels), x, partial, *sizes, **split.blocks)
    return partial


def finish_moments(partial: Tensor, x: Tensor, norm: torch.nn.Module, momentum: float) -> Tensor:
    """Return mean, biased variance and 1 / deviation of x's channels, (3, C), from the moments of its parts.

    With a `momentum` above 0 the running statistics of `norm` move.
    """
    _, programs, channels = partial.shape
    statistics = partial.new_empty(3, channels)
    _launch(
        norm_kernels.finish_moments,
        (math.ceil(channels / 16),),
        *(partial, norm.running_mean, norm.running_var, statistics),
        *(_rows(x), channels, programs),
        EPS=norm.eps,
        MOMENTUM=momentum,
        **_at_once(programs),
    )
    return statistics


def normalise(
    x: Tensor, affine: Sequence[Tensor], act: str, *, gate: Tensor | None, drop: Drop | None, residual: Tensor | None
) -> Tensor:
    """Return act(BatchNorm(x)), gated, dropped, plus the residual; `affine` is statistics, weight and bias."""
    y = torch.empty_like(x)
    u, rate = drop or (None, 0.0)
    grid, blocks, pixels = _pointwise(x, by_sample=u is not None or gate is not None)
    sizes = (x.shape[1], pixels, rate, 1 - rate)
    _launch(norm_kernels.normalise, grid, x, *affine, gate, residual, u, y, *sizes, ACT=act, **blocks)
    return y


def pooled(x: Tensor, affine: Sequence[Tensor], act: str) -> Tensor:
    """Return sums of act(BatchNorm(x)) over parts of each sample's pixels, (N, splits, C)."""
    samples, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    split = _sample_split(samples, pixels, channels)
    partial = x.new_empty(samples, split.programs, channels, dtype=accumulator(x))
    sizes = (channels, pixels, split.chunk, split.programs)
    grid = _grid(split, channels, samples)
    _launch(norm_kernels.pool, grid, x, *affine, partial, *sizes, ACT=act, **split.blocks)
    return partial


def gated_sums(x: Tensor, affine: Sequence[Tensor], act: str, gate: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gated activation anew, and the kernel's five sums over parts of pixels, (5, N, splits, C)."""
    samples, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    split = _sample_split(samples, pixels, channels, kind="many sums")
    z = torch.empty_like(x)
    partial = x.new_empty(5, samples, split.programs, channels, dtype=accumulator(x))
    sizes = (samples, channels, pixels, split.chunk, split.programs)
    grid = _grid(split, channels, samples)
    _launch(norm_kernels.gated_sums, grid, x, *affine, gate, dz, z, partial, *sizes, ACT=act, **split.blocks)
    return z, partial


def norm_sums(x: Tensor, affine: Sequence[Tensor], act: str, dy: Tensor, drop: Drop | None) -> Tensor:
    """Return the sums that BatchNorm's backward pass needs: the gradients of its bias and its weight, (2, C)."""
    channels = x.shape[1]
    split = _split(_rows(x), channels)
    partial = x.new_empty(2, split.programs, channels, dtype=accumulator(x))
    u, rate = drop or (None, 0.0)
    sizes = (_rows(x), channels, x.shape[2] * x.shape[3], rate, 1 - rate, split.chunk, split.programs)
    grid = _grid(split, channels)
    _launch(norm_kernels.norm_sums, grid, x, *affine, dy, u, partial, *sizes, ACT=act, **split.blocks)
    return add_rows(partial)


def input_gradient(
    x: Tensor,
    affine: Sequence[Tensor],
    act: str,
    dy: Tensor,
    sums: Tensor,
    count: int,
    *,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """Return the gradient of BatchNorm's input from that of the activation's output, `dy * gate + shift`."""
    dx = torch.empty_like(x)
    u, rate = drop or (None, 0.0)
    grid, blocks, pixels = _pointwise(x, by_sample=u is not None or gate is not None)
    sizes = (x.shape[1], pixels, rate, 1 - rate, count)
    arguments = (x, *affine, dy, gate, shift, u, sums, dx)
    _launch(norm_kernels.input_gradient, grid, *arguments, *sizes, ACT=act, **blocks)
    return dx


def _geometry(x: Tensor, y: Tensor, padding: Padding) -> tuple[int, ...]:
    return *x.shape[2:], *y.shape[2:], padding.top, padding.left


def depthwise(x: Tensor, weight: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
    """Return the convolution, and the moments of its parts as `moments` gives them."""
    samples, channels = x.shape[:2]
    height, width = (math.ceil(side / padding.stride) for side in x.shape[2:])
    y = x.new_empty(samples, height, width, channels).permute(0, 3, 1, 2)
    groups, split, constants = _columns_of(y, padding)
    partial = x.new_empty(3, split.programs, channels, dtype=accumulator(x))
    sizes = (groups, channels, *_geometry(x, y, padding), split.chunk, split.programs)
    _launch(depthwise_kernels.forward, _grid(split, channels), x, weight.contiguous(), y, partial, *sizes, **constants)
    return y, partial


def depthwise_gradients(
    x: Tensor, affine: Sequence[Tensor | None], act: str, dy: Tensor, weight: Tensor, padding: Padding
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of the input and of the weights, the latter in `accumulator` (C, 1, K, K).

    With an `affine` the input was act(BatchNorm(x)): then the first is the gradient of BatchNorm's output, and the last
    are its sums (2, C).
    """
    channels, taps = x.shape[1], padding.kernel**2
    shift = padding.left % padding.stride
    groups, split, constants = _columns_of(x, padding, shift=shift, most=_WEIGHT_PROGRAMS)
    dx = torch.empty_like(x)
    sums = taps if affine[0] is None else taps + 2
    partial = x.new_empty(sums, split.programs, channels, dtype=accumulator(x))
    sizes = (groups, channels, *_geometry(x, dy, padding), split.chunk, split.programs)
    arguments = (dy, weight.contiguous(), x, *affine, dx, partial)
    _launch(depthwise_kernels.gradients, _grid(split, channels), *arguments, *sizes, ACT=act, **constants)
    found = add_rows(partial)
    return dx, found[:taps].T.reshape(weight.shape), None if affine[0] is None else found[taps:]
