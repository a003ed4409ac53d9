"""The projection's kernels against the plain layers: BatchNorm, activation, squeeze-excite and a 1x1 convolution."""

import copy
from typing import NamedTuple

import pytest
import torch
import triton.language as tl
from torch import Tensor, nn

from effnet_train.models import fused as kernels
from effnet_train.models.fused import functions, launch, project
from effnet_train.models.layers import ACTIVATIONS, BatchNorm2d, Conv2d, SqueezeExcite, Style


class Sizes(NamedTuple):
    samples: int
    channels: int
    outputs: int
    height: int
    width: int


class Projection(nn.Module):
    """BatchNorm, activation, squeeze-excite if `gated`, projection, and the BatchNorm that follows it."""

    def __init__(self, sizes: Sizes, act: str, *, gated: bool) -> None:
        super().__init__()
        self.norm = BatchNorm2d(sizes.channels, momentum=0.3)
        self.act, self.name = ACTIVATIONS[act](), act
        self.gate = SqueezeExcite(sizes.channels, 3, style=Style(activation=act)) if gated else nn.Identity()
        self.conv = Conv2d(sizes.channels, sizes.outputs, kernel=1)
        self.last = BatchNorm2d(sizes.outputs, momentum=0.3)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.empty(parameter.shape).normal_(0.3, 0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.gate(self.act(self.norm(x)))))

    def fused(self, x: Tensor) -> Tensor:
        gate = [*self.gate.reduce.parameters(), *self.gate.expand.parameters()] if [*self.gate.parameters()] else []
        moments = launch.moments(x.detach().contiguous(memory_format=torch.channels_last))
        arguments = self.norm.weight, self.norm.bias, self.conv.weight, self.norm, self.name, *gate
        y, moments = functions.NormActProject.apply(x, moments, *arguments)
        norm = self.last
        return functions.NormAct.apply(y, moments, norm.weight, norm.bias, None, None, norm, functions.NONE, 0.0)


def numbers(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)


def results(module: Projection, x: Tensor, wanted: Tensor, *, fused: bool) -> dict[str, Tensor]:
    """Return the output, all gradients and running statistics."""
    leaf = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module.fused(leaf) if fused else module(leaf)
    (y * wanted).sum().backward()
    assert leaf.grad is not None
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "dx": leaf.grad, **found, **{name: b.clone() for name, b in module.named_buffers()}}


def compare(sizes: Sizes, act: str, device: torch.device, *, gated: bool) -> None:
    samples, channels, outputs, height, width = sizes
    x = 0.5 + numbers(samples, channels, height, width, device=device)
    wanted = numbers(samples, outputs, height, width, device=device, seed=1)
    plain, fused = (
        results(Projection(sizes, act, gated=gated).to(device, torch.float64).train(), x, wanted, fused=choice)
        for choice in (False, True)
    )
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("sizes", "act"),
    [
        (Sizes(1, 5, 3, 7, 6), "swish"),
        (
            Sizes(3, 40, 24, 12, 11),
            "swish",
        ),  # four pixels more than two tiles; blocks of channels, the last one shorter
        (Sizes(2, 33, 40, 9, 9), "relu6"),
        (Sizes(5, 48, 16, 5, 5), "swish"),  # several samples to a program
        (Sizes(2, 32, 16, 33, 30), "relu"),  # several programs to a sample
        (Sizes(2, 70, 80, 10, 13), "swish"),  # so many outputs that their moments are not made
        (Sizes(3, 20, 24, 1, 1), "swish"),  # more rows in a tile than there are
        (Sizes(1, 130, 112, 8, 8), "swish"),  # one whole tile
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_projection(device: torch.device, sizes: Sizes, act: str, gated: bool) -> None:
    assert project.fits(torch.empty(0), sizes.outputs)
    compare(sizes, act, device, gated=gated)


@pytest.mark.parametrize("gated", [True, False])
def test_many_parts_add_up(device: torch.device, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program has tiles of several samples, of each its gate, and the last one fewer than the others."""
    monkeypatch.setattr(launch, "_MOST_PARTS", 2)
    monkeypatch.setattr(project, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(project, "ROWS_OF_AN_OUTPUT", 1)
    compare(Sizes(5, 36, 24, 12, 12), "swish", device, gated=gated)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(device: torch.device, dtype: torch.dtype, gated: bool) -> None:
    """On average no further from float64 than the plain layers, but for chance; and nothing further than 2 %."""
    sizes = Sizes(3, 40, 24, 12, 11)
    x = numbers(*sizes[:2], *sizes[3:], device=device).to(dtype)
    wanted = numbers(sizes.samples, sizes.outputs, *sizes[3:], device=device, seed=1).to(dtype)
    module = Projection(sizes, "swish", gated=gated).to(device).train()
    expected = results(copy.deepcopy(module).double(), x.double(), wanted.double(), fused=False)
    errors = []
    for fused in (False, True):
        with torch.autocast(device.type, dtype):
            found = results(copy.deepcopy(module), x, wanted, fused=fused)
        compared = [name for name in found if not name.endswith("num_batches_tracked") and name != "conv.bias"]
        errors.append({name: relative_error(found[name], expected[name]) for name in compared})
    plain, kernels = (sum(found.values()) / len(found) for found in errors)
    assert kernels < 1.2 * plain
    assert max(errors[1].values()) < 0.02, errors[1]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_beyond_a_sample_may_be_infinite(device: torch.device, dtype: torch.dtype) -> None:
    """A zero there, normalised, is more than float16 holds where a channel is far from 0 and always the same."""
    x = torch.full((1, 20, 5, 5), 3000.0, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    statistics = torch.tensor([x.float().mean().item(), 0.0, 1e-3**-0.5], device=device)[:, None].expand(3, 20)
    affine = statistics.contiguous(), torch.ones(20, device=device), torch.ones(20, device=device)
    dy = numbers(1, 16, 5, 5, device=device).to(dtype).to(memory_format=torch.channels_last)
    _, d_matrix = project.sums(x, affine, functions.NONE, None, dy, torch.ones(16, 20, device=device, dtype=dtype))
    expected = dy.float().sum((0, 2, 3))[:, None].expand(16, 20)
    torch.testing.assert_close(d_matrix, expected, rtol=1e-3, atol=1e-3)


def test_moments_far_from_zero_in_float32(device: torch.device) -> None:
    x = numbers(2, 3, 30, 30, device=device).float().to(memory_format=torch.channels_last)
    statistics = torch.tensor([[0.0], [1.0], [1.0]], device=device).expand(3, 3).contiguous()
    affine = statistics, torch.ones(3, device=device), torch.full((3,), 1000.0, device=device)
    y, partial = project.forward(x, affine, functions.NONE, None, torch.ones(4, 3, device=device))
    assert partial is not None
    _, variance, _ = launch.finish_moments(partial, y, BatchNorm2d(4).to(device), 0.0)
    torch.testing.assert_close(variance, y.double().var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)


def test_the_same_bits_twice(device: torch.device) -> None:
    sizes = Sizes(3, 40, 24, 12, 11)
    module = Projection(sizes, "swish", gated=True).to(device).train()
    x, wanted = (numbers(3, channels, 12, 11, device=device).float() for channels in (40, 24))
    once, twice = (results(copy.deepcopy(module), x, wanted, fused=True) for _ in range(2))
    torch.testing.assert_close(once, twice, rtol=0, atol=0)


def test_which_products_are_made_here() -> None:
    half, single = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    assert project.fits(half, 112)
    assert not project.fits(half, 192)
    assert not project.fits(single, 16)  # tensor cores would round it


@pytest.mark.parametrize(("capability", "most"), [((7, 5), 64), ((8, 0), 128), ((9, 0), 128)])
def test_older_gpus_have_less_shared_memory(
    capability: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "capability", lambda _: capability)
    assert project._most_outputs(torch.device("cuda")) == most


@pytest.mark.parametrize("native", [True, False])
def test_registers_are_limited_by_nvidias_compiler_alone(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's raises KeyError for an option that it does not know."""
    monkeypatch.setattr(project, "NATIVE", tl.constexpr(native))
    options = project._constants(project.FORWARD[project.MOST_OUTPUTS], 80)
    assert ("maxnreg" in options) == native


@pytest.mark.parametrize("gated", [True, False])
def test_other_products(device: torch.device, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "MOST_OUTPUTS", 8)
    compare(Sizes(3, 20, 9, 5, 4), "swish", device, gated=gated)
