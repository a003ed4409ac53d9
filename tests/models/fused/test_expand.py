"""The expansion with BatchNorm, activation and a depthwise convolution against plain PyTorch, in float64 and bf16."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.models.efficientnet import MBConv
from effnet_train.models.fused import expand, functions, launch
from effnet_train.models.layers import BatchNorm2d, Style
from effnet_train.models.scaling import Stage

PADDING = launch.Padding(3, 1, 1, 1)
NAMES = ("x", "norm_weight", "norm_bias", "weight", "expand_weight")


def numbers(*shape: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def leaves(inputs: int, channels: int, samples: int, height: int, width: int, *, mean: float = 0.3) -> list[Tensor]:
    """Return x, BatchNorm's weight and bias, the depthwise weights and the expansion's, in float64."""
    return [
        numbers(samples, inputs, height, width, seed=0, mean=mean),
        numbers(channels, seed=1, mean=1.0, scale=0.3),
        numbers(channels, seed=2),
        numbers(channels, 1, 3, 3, seed=3, scale=0.3),
        numbers(channels, inputs, 1, 1, seed=4, scale=inputs**-0.5),
    ]


def plain(tensors: list[Tensor], norm: BatchNorm2d, act: str) -> Tensor:
    x, norm_weight, norm_bias, weight, expand_weight = tensors
    norm.weight, norm.bias = nn.Parameter(norm_weight), nn.Parameter(norm_bias)
    parameters = {"weight": norm_weight, "bias": norm_bias}
    y = torch.func.functional_call(norm, parameters, F.conv2d(x, expand_weight))
    return F.conv2d({"swish": F.silu, "relu6": F.relu6}[act](y), weight, padding=1, groups=weight.shape[0])


def fused(tensors: list[Tensor], norm: BatchNorm2d, act: str) -> Tensor:
    x, *affine, weight, expand_weight = tensors
    return functions.NormActDepthwise.apply(x, *affine, weight, norm, act, PADDING, expand_weight)[0]


def found(run: Any, tensors: list[Tensor], device: torch.device, *, act: str = "swish") -> dict[str, Tensor]:
    """Return the output, the running statistics, and the gradients of the leaves that ask for one."""
    tensors = [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in tensors]
    norm = BatchNorm2d(tensors[1].shape[0], momentum=0.3).to(device, tensors[1].dtype).train()
    y = run(tensors, norm, act)
    y.backward(numbers(*y.shape, seed=5, mean=0.1).to(y))
    gradients = {name: t.grad for name, t in zip(NAMES, tensors, strict=True) if t.grad is not None}
    return {"y": y.detach(), **dict(norm.named_buffers()), **gradients}


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have programs go over several tiles, and tiles that do not divide the rows."""
    monkeypatch.setattr(expand, "_FORWARD_PROGRAMS", 6)
    monkeypatch.setattr(expand, "_BACKWARD_PROGRAMS", dict.fromkeys(expand._BACKWARD_PROGRAMS, 3))


@pytest.mark.parametrize(
    ("inputs", "channels", "samples", "height", "width", "act"),
    [
        (16, 96, 3, 11, 13, "swish"),
        (24, 144, 1, 19, 20, "swish"),
        (40, 240, 2, 9, 8, "relu6"),
        (32, 192, 1, 3, 5, "swish"),  # less than a tile
        (56, 336, 1, 5, 15, "swish"),  # backward by the libraries
        (63, 65, 2, 8, 8, "swish"),
        (3, 18, 2, 1, 1, "swish"),
        (64, 70, 2, 3, 4, "swish"),  # by the libraries
    ],
)
@pytest.mark.usefixtures("few_programs")
def test_output_and_gradients(
    device: torch.device, inputs: int, channels: int, samples: int, height: int, width: int, act: str
) -> None:
    tensors = [t.requires_grad_() for t in leaves(inputs, channels, samples, height, width)]
    expected, ours = (found(run, tensors, device, act=act) for run in (plain, fused))
    assert ours.keys() == expected.keys()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("missing", [("x",), ("expand_weight",), ("x", "expand_weight"), NAMES[1:]])
@pytest.mark.parametrize("inputs", [5, 64])
def test_what_needs_no_gradient(device: torch.device, missing: tuple[str, ...], inputs: int) -> None:
    tensors = leaves(inputs, 10, 2, 5, 4)
    tensors = [t.requires_grad_(name not in missing) for name, t in zip(NAMES, tensors, strict=True)]
    expected, ours = (found(run, tensors, device) for run in (plain, fused))
    torch.testing.assert_close({name: ours[name] for name in expected}, expected, rtol=1e-6, atol=1e-9)
    assert not {"x", "expand_weight"} & set(missing) & ours.keys()


@pytest.mark.usefixtures("few_programs")
def test_moments_are_of_what_is_stored(device: torch.device, low_precision: torch.dtype) -> None:
    """In bf16 a mean far from 0 is coarse, and BatchNorm has to normalise what came of it."""
    x = numbers(2, 24, 13, 11, seed=0, mean=20).to(device, low_precision).to(memory_format=torch.channels_last)
    weight = numbers(50, 24, 1, 1, seed=1).to(device, low_precision)
    y, partial = expand.expanded(x, weight)
    wanted = F.conv2d(x.double(), weight.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=1e-3)
    mean, variance, _ = launch.finish_moments(partial, y, BatchNorm2d(50).to(device), 0.0)
    torch.testing.assert_close(mean.double(), y.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), y.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert partial.shape[1] > 1


@pytest.mark.usefixtures("few_programs")
def test_the_variance_of_numbers_far_from_zero(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU float32 is left to cuDNN")
    monkeypatch.setitem(expand._TYPES, "cpu", torch.float32)
    x = numbers(2, 3, 30, 30, seed=0, mean=1000).float().to(memory_format=torch.channels_last)
    weight = torch.ones(4, 3, 1, 1)
    y, partial = expand.expanded(x, weight)
    _, variance, _ = launch.finish_moments(partial, y, BatchNorm2d(4), 0.0)
    torch.testing.assert_close(variance.double(), y.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@pytest.fixture
def low_precision(monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Have bf16 expanded by the kernels under the interpreter, too, as a GPU would."""
    monkeypatch.setitem(expand._TYPES, "cpu", torch.bfloat16)
    return torch.bfloat16


@pytest.mark.parametrize("of_y", [0.0, 1.0])
@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.usefixtures("few_programs")
def test_as_exact_in_bf16_as_the_libraries(
    device: torch.device, low_precision: torch.dtype, mean: float, of_y: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of the errors, to float64 on the same rounded numbers: below 1 %, and at most 1.1 times the libraries'.

    The gradient is random, and `of_y` times what BatchNorm is to take out of it again.
    """
    rows, inputs, channels = 4000, 24, 48
    x = numbers(rows, inputs, 1, 1, seed=0, mean=mean).to(device, low_precision)
    weight = numbers(channels, inputs, 1, 1, seed=1, scale=inputs**-0.5).to(device, low_precision)
    norm = BatchNorm2d(channels).to(device)
    y, partial = expand.expanded(x, weight)
    affine = launch.finish_moments(partial, y, norm, 0.0), norm.weight.detach(), norm.bias.detach()
    leaf = [t.double().requires_grad_() for t in (x, weight)]
    b = F.batch_norm(F.conv2d(*leaf), None, None, training=True, eps=norm.eps)
    g = (numbers(rows, channels, 1, 1, seed=2).to(device) + of_y * b.detach().tanh()).to(low_precision)
    expected = torch.autograd.grad(b, leaf, g.double())
    sums = launch.norm_sums(y, affine, launch.NONE, g, None)
    ours = expand.gradients(g, x, weight, y, affine, (sums, rows), (True, True))
    monkeypatch.setattr(expand, "_TYPES", {})
    theirs = expand.gradients(g, x, weight, y, affine, (sums, rows), (True, True))
    assert ours[0].dtype == low_precision
    assert ours[1].dtype == torch.float32
    for mine, usual, right in zip(ours, theirs, expected, strict=True):
        error, usual_error = ((some.double() - right).norm() / right.norm() for some in (mine, usual))
        assert error < 0.01
        assert error < 1.1 * usual_error


@pytest.mark.usefixtures("few_programs")
def test_as_exact_in_bf16_over_ranks(
    device: torch.device, low_precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks' weight gradients together, where x is far from 0: each alone has what only over all of them cancels."""
    shares, inputs, channels = (2500, 1500), 24, 48
    rows = sum(shares)
    x = numbers(rows, inputs, 1, 1, seed=0, mean=20.0).to(device, low_precision)
    x[: shares[0]] += 1
    weight = numbers(channels, inputs, 1, 1, seed=1, scale=inputs**-0.5).to(device, low_precision)
    norm = BatchNorm2d(channels).to(device)
    rest = norm.weight.detach(), norm.bias.detach()
    leaf = weight.double().requires_grad_()
    b = F.batch_norm(F.conv2d(x.double(), leaf), None, None, training=True, eps=norm.eps)
    g = (numbers(rows, channels, 1, 1, seed=2).to(device) + b.detach().tanh()).to(low_precision)
    (right,) = torch.autograd.grad(b, leaf, g.double())

    parts = list(zip(x.split(shares), g.split(shares), strict=True))
    ys = [expand.expanded(part, weight) for part, _ in parts]
    own = [launch.finish_moments(partial, y, norm, 0.0)[0] for y, partial in ys]
    whole = torch.cat([y for y, _ in ys])
    statistics = launch.finish_moments(launch.moments(whole), whole, norm, 0.0)
    affines = [(torch.cat([statistics, mean[None]]), *rest) for mean in own]
    sums = [launch.norm_sums(y, a, launch.NONE, g, None) for (y, _), a, (_, g) in zip(ys, affines, parts, strict=True)]
    means = (sums[0] + sums[1]) / rows

    def error() -> Tensor:
        found = torch.zeros_like(right)
        for (part, grad), (y, _), affine, of_rank in zip(parts, ys, affines, sums, strict=True):
            _, gradient = expand.gradients(grad, part, weight, y, affine, (means, 1), (False, True), of_rank)
            assert gradient is not None
            found += gradient
        return (found - right).norm() / right.norm()

    ours = error()
    monkeypatch.setattr(expand, "_TYPES", {})
    assert ours < 0.03
    assert ours < 1.1 * error()


@pytest.mark.usefixtures("few_programs")
def test_the_same_bits_twice(device: torch.device, low_precision: torch.dtype) -> None:
    x, *rest = leaves(5, 70, 2, 13, 9)
    tensors = [t.requires_grad_() for t in (x.to(low_precision), *(t.float() for t in rest))]
    once, twice = (found(fused, tensors, device) for _ in range(2))
    assert once["y"].dtype == once["x"].dtype == low_precision
    assert once["expand_weight"].dtype == torch.float32
    torch.testing.assert_close(once, twice, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("inputs", "dtype", "forward", "backward"),
    [
        (24, torch.bfloat16, True, True),
        (40, torch.bfloat16, True, True),
        (56, torch.bfloat16, True, False),  # 336 channels are too many sums
        (80, torch.bfloat16, False, False),
        (24, torch.float32, False, False),
        (24, torch.float64, False, False),
    ],
)
def test_what_the_kernels_expand_on_a_gpu(
    inputs: int, dtype: torch.dtype, forward: bool, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device takes the same way."""
    called = []
    monkeypatch.setattr(launch, "_launch", lambda kernel, *_, **__: called.append(kernel.__name__))
    with torch.device("meta"):
        block = MBConv(Stage(3, 1, 6, inputs, 8, 1), se_ratio=0.25, rate=0.0, style=Style(fused=True)).to(dtype)
        x = torch.empty(2, inputs, 4, 4, dtype=dtype, requires_grad=True)
        y = block.train()(x)
        assert called.count("expand") == forward
        projected = dtype == torch.bfloat16  # by kernels of its own, which leave moments
        assert called.count("moments") == 2 - forward - projected
        y.sum().backward()
    assert called.count("expand_gradients") == called.count("expand_weight_gradient") == backward
    assert called.count("input_gradient") == 3 - backward - projected  # a norm's goes into its neighbour's


def test_autocast_chooses_the_type(device: torch.device) -> None:
    x = torch.zeros(1, device=device)
    assert launch.autocast_type(x) == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        assert launch.autocast_type(x) == torch.bfloat16
        assert launch.autocast_type(x.double()) == torch.float64
        assert launch.autocast_type(torch.zeros(1, device="meta")) == torch.float32
