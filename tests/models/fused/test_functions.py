"""Every fused function against the plain layers, in float64; its gradients too."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_train.models.efficientnet import MBConv
from effnet_train.models.fused import functions, launch, layers
from effnet_train.models.layers import BatchNorm2d, Conv2d, ConvNorm, Style, drop_connect
from effnet_train.models.scaling import Stage


def randomised(module: nn.Module, device: torch.device, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.5, 0.4, generator=generator))
    return module.to(device, dtype).train()


def numbers(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)


def assert_same(
    plain: nn.Module, fused: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor], **tolerance: float
) -> None:
    """Hold output, the gradients of input and parameters, and running statistics of two equal modules together."""
    tolerance = tolerance or {"rtol": 1e-6, "atol": 1e-9}
    results = []
    for module in (plain, fused):
        leaf = x.detach().clone().requires_grad_()
        y = run(module, leaf)
        (y.double() * numbers(*y.shape, device=x.device, seed=7)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"y": y.detach(), "dx": leaf.grad, **gradients, **dict(module.named_buffers())})
    torch.testing.assert_close(results[1], results[0], check_dtype=False, **tolerance)


# --- BatchNorm and activation


def norm_act(module: ConvNorm, x: Tensor, *, fused: bool) -> Tensor:
    """Normalise and activate, without the convolution."""
    if fused:
        return layers.norm_act(module, x)
    return module.act(module.norm(x)) if hasattr(module, "act") else module.norm(x)


def conv_norm(act: str, channels: int = 5) -> ConvNorm:
    style = Style(activation="swish" if act == "none" else act, bn_momentum=0.3)
    return ConvNorm(channels, channels, style=style, activate=act != "none")


@pytest.mark.parametrize(
    ("act", "shape"),
    [
        ("swish", (3, 5, 7, 3)),
        ("relu6", (1, 5, 5, 5)),
        ("relu", (2, 5, 1, 1)),
        ("none", (1, 5, 1, 2)),
        ("swish", (2, 40, 12, 11)),  # several programs along rows and channels
    ],
)
def test_norm_and_activation(device: torch.device, act: str, shape: tuple[int, ...]) -> None:
    plain = randomised(conv_norm(act, shape[1]), device)
    x = 3 + 2 * numbers(*shape, device=device)
    fused = copy.deepcopy(plain)
    assert_same(plain, fused, x, lambda module, t: norm_act(module, t, fused=module is fused))


@pytest.mark.parametrize("memory", ["transposed", "sliced", "expanded"])
def test_memory_in_any_order(device: torch.device, memory: str) -> None:
    plain = randomised(conv_norm("swish"), device)
    fused = copy.deepcopy(plain)
    x = numbers(2, 5, 6, 10, device=device)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda t: t.transpose(2, 3),
        "sliced": lambda t: t[:, :, 1:, ::2],
        "expanded": lambda t: t[..., :1].expand(2, 5, 6, 4),
    }

    def run(module: nn.Module, t: Tensor) -> Tensor:
        return norm_act(module, views[memory](t), fused=module is fused)

    assert_same(plain, fused, x, run)


def test_a_gradient_in_any_order(device: torch.device) -> None:
    plain = randomised(conv_norm("swish"), device)
    fused = copy.deepcopy(plain)

    def run(module: nn.Module, t: Tensor) -> Tensor:
        return norm_act(module, t, fused=module is fused).sum((2, 3))  # whose gradient is expanded

    assert_same(plain, fused, numbers(2, 5, 4, 3, device=device), run)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropping_and_the_residual(device: torch.device, rate: float) -> None:
    plain = randomised(conv_norm("none"), device)
    fused = copy.deepcopy(plain)
    u = torch.tensor([0.1, 0.3, 0.9, 0.29], device=device)

    def run(module: ConvNorm, t: Tensor) -> Tensor:
        if module is fused:
            return layers.norm_act(module, t, residual=t, u=u if rate else None, rate=rate)
        y = module.norm(t)
        return t + (drop_connect(y, u, rate) if rate else y)

    # The rate reaches a kernel in float32.
    assert_same(plain, fused, numbers(4, 5, 3, 3, device=device), run, rtol=1e-6, atol=1e-6)


def test_what_is_dropped_may_be_infinite(device: torch.device) -> None:
    module = randomised(conv_norm("none", 1), device)
    module.norm.weight.data.fill_(torch.inf)
    u = torch.zeros(2, device=device)
    y = layers.norm_act(module, numbers(2, 1, 2, 2, device=device), u=u, rate=0.5)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("act", ["swish", "relu6", "relu", "none"])
def test_what_is_no_number_stays_none(device: torch.device, act: str) -> None:
    """A loss that is NaN stops a run: no activation may make a number of it."""
    module = randomised(conv_norm(act, 2), device)
    x = numbers(2, 2, 2, 2, device=device)
    x[0, 1, 0, 0] = torch.nan
    y = layers.norm_act(module, x)
    assert y[:, 1].isnan().all()
    assert y[:, 0].isfinite().all()


def test_many_parts_add_up(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PROGRAMS", 6)
    monkeypatch.setattr(launch, "_MOST_PARTS", 3)
    plain = randomised(conv_norm("swish", 20), device)
    fused = copy.deepcopy(plain)
    x = 100 + numbers(2, 20, 17, 19, device=device)  # far from 0: a sum of squares would lose digits
    assert_same(plain, fused, x, lambda m, t: norm_act(m, t, fused=m is fused), rtol=1e-6, atol=1e-7)


def test_the_variance_of_numbers_far_from_zero_in_float32(device: torch.device) -> None:
    x = (1000 + numbers(2, 3, 30, 30, device=device)).to(memory_format=torch.channels_last)
    norm = BatchNorm2d(3).to(device)
    _, variance, _ = launch.finish_moments(launch.moments(x.float()), x, norm, 0.0)
    torch.testing.assert_close(variance.double(), x.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_frozen_statistics_stay(device: torch.device) -> None:
    module = randomised(conv_norm("swish"), device)
    before = copy.deepcopy(dict(module.named_buffers()))
    module.norm.momentum = 0.0  # as `frozen_statistics` has it
    layers.norm_act(module, numbers(2, 5, 4, 4, device=device))
    torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)


def test_a_single_value_a_channel_is_refused_as_by_the_plain_layer(device: torch.device) -> None:
    module = randomised(conv_norm("swish"), device)
    for fused in (False, True):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            norm_act(module, numbers(1, 5, 1, 1, device=device), fused=fused)


# --- depthwise convolution


@pytest.mark.parametrize(
    ("kernel", "stride", "shape", "padding"),
    [
        *(
            (kernel, *rest)
            for kernel in (3, 5)
            for rest in (
                (1, (1, 3, 4, 6), "same"),
                (2, (2, 3, 6, 8), "same"),  # asymmetric
                (2, (2, 3, 7, 5), "same"),
                (2, (1, 3, 6, 6), "symmetric"),
                (2, (1, 20, 1, 2), "same"),  # smaller than the kernel
            )
        ),
        (7, 1, (1, 3, 5, 4), "same"),
        (7, 2, (2, 3, 6, 9), "same"),
        (1, 2, (1, 3, 4, 5), "same"),  # pixels that no weight sees
    ],
)
def test_depthwise(device: torch.device, kernel: int, stride: int, shape: tuple[int, ...], padding: str) -> None:
    channels = shape[1]
    options: dict[str, Any] = {"kernel": kernel, "stride": stride, "groups": channels, "padding": padding}
    plain = randomised(Conv2d(channels, channels, **options), device)
    fused = copy.deepcopy(plain)

    def run(module: Conv2d, t: Tensor) -> Tensor:
        if module is not fused:
            return module(t)
        arguments = None, None, module.weight, None, functions.NONE, layers.padding(module, t)
        return functions.NormActDepthwise.apply(t, *arguments)[0]

    assert_same(plain, fused, numbers(*shape, device=device), run)


def test_the_moments_of_a_depthwise_convolution(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_PARTS", 2)
    conv = randomised(Conv2d(6, 6, kernel=3, stride=2, groups=6), device)
    x = numbers(3, 6, 20, 14, device=device).to(memory_format=torch.channels_last)
    y, partial = launch.depthwise(x, conv.weight, layers.padding(conv, x))
    norm = BatchNorm2d(6, momentum=0.5).to(device, torch.float64)
    mean, variance, rstd = launch.finish_moments(partial, y, norm, norm.momentum)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(variance, y.var((0, 2, 3), correction=0))
    torch.testing.assert_close(rstd, (variance + norm.eps).rsqrt())
    torch.testing.assert_close(norm.running_var, 0.5 + 0.5 * variance)


# --- blocks


def run_block(block: MBConv, x: Tensor, *, fused: bool, u: Tensor | None = None) -> Tensor:
    for module in block.modules():
        if isinstance(module, MBConv | ConvNorm):
            module.fused = fused
    return block(x, u)


@pytest.mark.parametrize(
    ("stage", "se_ratio", "activation"),
    [
        pytest.param(Stage(3, 1, 6, 3, 3, 1), 0.25, "swish", id="skip"),
        pytest.param(Stage(5, 2, 2, 8, 6, 1), 0.25, "swish", id="stride"),
        pytest.param(Stage(3, 1, 1, 6, 4, 1), 0.25, "swish", id="no-expansion"),
        pytest.param(Stage(3, 1, 2, 4, 4, 1), 0.0, "relu6", id="lite"),
    ],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_block(device: torch.device, stage: Stage, se_ratio: float, activation: str, samples: int) -> None:
    style = Style(activation=activation, bn_momentum=0.3)
    plain = randomised(MBConv(stage, se_ratio=se_ratio, rate=0.25, style=style), device)
    fused = copy.deepcopy(plain)
    u = torch.tensor([0.1, 0.9, 0.4], device=device)[-samples:]
    x = numbers(samples, stage.in_channels, 7, 6, device=device)
    assert_same(plain, fused, x, lambda m, t: run_block(m, t, fused=m is fused, u=u), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_in_lower_precision(device: torch.device, dtype: torch.dtype) -> None:
    reference = randomised(MBConv(Stage(3, 1, 2, 8, 8, 1), se_ratio=0.25, rate=0.0, style=Style()), device)
    x = numbers(4, 8, 6, 5, device=device)
    errors = []
    expected = gradients(reference, x, fused=False)
    for fused in (False, True):
        module = copy.deepcopy(reference).float()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = gradients(module, x.to(torch.float32), fused=fused)
        errors.append(sum(relative_error(found[name], expected[name]) for name in expected) / len(expected))
    assert errors[0] > 0
    assert errors[1] < 2 * errors[0]  # no further from float64 than the plain layers, but for chance


def gradients(block: MBConv, x: Tensor, *, fused: bool) -> dict[str, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = run_block(block, leaf, fused=fused)
    block.zero_grad()
    (y.to(x.dtype) * numbers(*y.shape, device=x.device, seed=3).to(x.dtype)).sum().backward()
    found = {name: parameter.grad for name, parameter in block.named_parameters()}
    assert leaf.grad is not None
    assert all(gradient is not None and gradient.dtype == x.dtype for gradient in found.values())
    return {"y": y.detach(), "dx": leaf.grad, **found}  # type: ignore[dict-item]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def test_the_same_bits_twice(device: torch.device) -> None:
    block = randomised(MBConv(Stage(3, 1, 2, 4, 4, 1), se_ratio=0.25, rate=0.0, style=Style()), device).float()
    x = numbers(2, 4, 9, 9, device=device).float()
    once, twice = (gradients(copy.deepcopy(block), x, fused=True) for _ in range(2))
    torch.testing.assert_close(once, twice, rtol=0, atol=0)


# --- gradients by finite differences


def leaves(*shapes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    return [numbers(*shape, device=device, seed=i).add_(0.3).requires_grad_() for i, shape in enumerate(shapes)]


def test_gradcheck(device: torch.device) -> None:
    norm = BatchNorm2d(2, momentum=0.0).to(device, torch.float64)
    tensors = leaves((2, 2, 2, 3), (2,), (2,), (2, 2, 2, 3), device=device)
    u = torch.tensor([0.2, 0.7], device=device)

    def norm_act_dropped(*t: Tensor) -> Tensor:
        x, *rest = t
        return functions.NormAct.apply(x, None, *rest, u, norm, "swish", 0.5)

    assert torch.autograd.gradcheck(norm_act_dropped, tensors, fast_mode=True)
    padding = launch.Padding(3, 2, 0, 0)

    def depthwise(*t: Tensor) -> Tensor:
        return functions.NormActDepthwise.apply(*t, norm, "swish", padding)[0]

    tensors = leaves((1, 2, 4, 4), (2,), (2,), (2, 1, 3, 3), device=device)
    assert torch.autograd.gradcheck(depthwise, tensors, fast_mode=True)

    def project(x: Tensor, *t: Tensor) -> Tensor:
        moments = launch.moments(x.contiguous(memory_format=torch.channels_last))
        return functions.NormActProject.apply(x, moments, *t[:3], norm, "swish", *t[3:])[0]

    shapes = [(2, 2, 2, 3), (2,), (2,), (3, 2, 1, 1), (1, 2, 1, 1), (1,), (2, 1, 1, 1), (2,)]
    assert torch.autograd.gradcheck(project, leaves(*shapes, device=device), fast_mode=True)


def test_what_is_kept_for_the_backward_pass(device: torch.device) -> None:
    """Of the block's pixels, its input and the three convolutions' outputs."""
    block = randomised(MBConv(Stage(3, 1, 6, 8, 8, 1), se_ratio=0.25, rate=0.0, style=Style()), device)
    x = numbers(2, 8, 8, 8, device=device).to(memory_format=torch.channels_last).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and tensor.shape[-2:] == (8, 8):
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_block(block, x, fused=True)
    assert sum(kept.values()) == 2 * 8 * 8 * (8 + 48 + 48 + 8)


class Operators(TorchDispatchMode):
    """Note the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_zeros_are_made_for_moments() -> None:
    """As gradients that nothing reads they would be a kernel more for each convolution."""
    with torch.device("meta"):
        stem = ConvNorm(3, 8, kernel=3, stride=2, style=Style(fused=True)).train()
        block = MBConv(Stage(3, 1, 6, 8, 8, 1), se_ratio=0.25, rate=0.0, style=Style(fused=True)).train()
        for part in (stem, block):
            part.bfloat16()
        y = block(stem(torch.empty(2, 3, 16, 16, dtype=torch.bfloat16)))
    with Operators() as operators:
        y.backward(torch.empty_like(y))
    assert operators.names.count("traffic") > 8
    assert not [name for name in operators.names if "zero" in name or "fill" in name]


def test_evaluation_takes_the_plain_path(device: torch.device) -> None:
    block = randomised(MBConv(Stage(3, 1, 2, 4, 4, 1), se_ratio=0.25, rate=0.0, style=Style()), device).eval()
    x = numbers(1, 4, 4, 4, device=device)
    y = block(x)
    assert torch.equal(run_block(block, x, fused=True), y)
    z = F.silu(block.expand.norm(block.expand.conv(x)))
    assert torch.equal(block.expand(x), z)


# --- The stem


@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "stride", "pad"),
    [
        ((2, 3, 9, 8), 5, 3, 2, "same"),
        ((1, 3, 8, 13), 40, 3, 2, "same"),
        ((3, 3, 7, 7), 16, 3, 2, "symmetric"),
        ((2, 1, 6, 5), 33, 5, 1, "same"),
        ((2, 3, 41, 40), 8, 3, 2, "same"),  # several programs
    ],
)
def test_the_stem(
    device: torch.device, shape: tuple[int, ...], channels: int, kernel: int, stride: int, pad: str
) -> None:
    style = Style(bn_momentum=0.3, padding=pad)
    plain = randomised(ConvNorm(shape[1], channels, kernel=kernel, stride=stride, style=style), device)
    fused = copy.deepcopy(plain)
    x = 1 + numbers(*shape, device=device)
    found = []
    for module in (plain, fused):
        y = layers.conv_norm(module, x) if module is fused else module.act(module.norm(module.conv(x)))
        (y * numbers(*y.shape, device=device, seed=7)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append({"y": y.detach(), **gradients, **dict(module.named_buffers())})
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
