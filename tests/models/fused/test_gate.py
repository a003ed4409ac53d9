"""Squeeze-excite's gate and its gradients against the plain layers, in float64 and to rounding in lower precision."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from effnet_train.models.fused import gate, launch
from effnet_train.models.layers import SqueezeExcite, Style

PIXELS = 7  # that the sums are of: not a power of two, by which one divides without rounding


class Sizes(NamedTuple):
    samples: int
    splits: int
    channels: int
    squeezed: int


def numbers(*shape: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)


def squeeze_excite(sizes: Sizes, act: str, device: torch.device, dtype: torch.dtype = torch.float64) -> SqueezeExcite:
    module = SqueezeExcite(sizes.channels, sizes.squeezed, style=Style(activation=act)).to(device, dtype)
    for seed, parameter in enumerate(module.parameters()):
        spread = 3 / parameter[0].numel() ** 0.5  # so that ReLU6 meets both its ends
        parameter.data = numbers(*parameter.shape, device=device, seed=seed, dtype=dtype) * spread
    return module


def plain(module: SqueezeExcite, means: Tensor) -> Tensor:
    """Return the gates (N, C) as `SqueezeExcite` computes them of means (N, C)."""
    return (module.expand(module.act(module.reduce(means[..., None, None])))).sigmoid().flatten(1)


def weights(module: SqueezeExcite) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


@pytest.mark.parametrize(
    ("sizes", "act"),
    [
        (Sizes(1, 1, 5, 1), "swish"),
        (Sizes(3, 2, 40, 3), "relu6"),
        (Sizes(16, 1, 64, 16), "relu"),
        (Sizes(17, 3, 33, 10), "swish"),  # one more than a block
        (Sizes(2, 9, 20, 4), "swish"),  # more sums than are read at once
        (Sizes(70, 1, 65, 65), "relu6"),  # several blocks of everything
        (Sizes(3, 1, 590, 6), "swish"),  # a contraction in parts, the last one shorter
    ],
)
def test_gates_and_their_gradients(device: torch.device, sizes: Sizes, act: str) -> None:
    module = squeeze_excite(sizes, act, device)
    partial = numbers(*sizes[:3], device=device, seed=5) * PIXELS
    means = (partial.sum(1) / PIXELS).requires_grad_()
    expected = plain(module, means)
    found = gate.forward(partial, PIXELS, weights(module), torch.float64, act)
    torch.testing.assert_close(found.gate, expected.detach())
    torch.testing.assert_close(found.means, means.detach())

    sums = numbers(5, *sizes[:3], device=device, seed=6)
    of_pixels = sums.sum(2)
    gradients = torch.autograd.grad(expected, [means, *module.parameters()], of_pixels[0])
    shift = gradients[0] / PIXELS
    of_norm = torch.stack([(expected.detach() * of_pixels[i] + shift * of_pixels[i + 1]).sum(0) for i in (1, 3)])
    result = gate.backward(sums, PIXELS, found, weights(module), act)
    torch.testing.assert_close(result, (shift, of_norm, gradients[1:]), rtol=1e-9, atol=1e-12)


def test_weights_in_any_order_of_memory(device: torch.device) -> None:
    sizes = Sizes(2, 1, 6, 4)
    dense = weights(squeeze_excite(sizes, "swish", device))
    views = [torch.stack([weight, weight], -1)[..., 0] for weight in dense]
    assert not any(view.is_contiguous() for view in views)
    results = []
    for given in (dense, views):
        found = gate.forward(numbers(*sizes[:3], device=device), PIXELS, given, torch.float64, "swish")
        results.append((found, gate.backward(numbers(5, *sizes[:3], device=device), PIXELS, found, given, "swish")))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sizes", "act"), [(Sizes(20, 2, 96, 12), "swish"), (Sizes(5, 1, 200, 7), "relu6")])
def test_rounding_as_of_the_plain_layers(device: torch.device, dtype: torch.dtype, sizes: Sizes, act: str) -> None:
    """What is rounded is at most a unit of its last place from the plain layers', and for 95 % the same.

    Sums in another order come out on the other side of a tie now and then. Gates are within two units of 1, gradients
    within 1 % of the largest, as the plain ones are rounded at their ends, too.
    """
    module = squeeze_excite(sizes, act, device, torch.float32)
    partial = numbers(*sizes[:3], device=device, seed=5, dtype=torch.float32) * PIXELS
    means = (partial.sum(1) / PIXELS).requires_grad_()
    with torch.autocast(device.type, dtype):
        hidden = module.reduce(means[..., None, None])
        output = module.expand(module.act(hidden.clone())).flatten(1)  # ReLU6 is in place
    assert output.dtype == dtype
    expected = output.float().sigmoid()
    found = gate.forward(partial, PIXELS, weights(module), dtype, act)
    step = torch.finfo(dtype).eps
    assert_rounded(found.means, means.detach().to(dtype), step)
    assert_rounded(found.hidden, hidden.detach().flatten(1), step)
    assert found.gate.dtype == torch.float32
    torch.testing.assert_close(found.gate, expected.detach(), rtol=0, atol=2 * step)

    sums = numbers(5, *sizes[:3], device=device, seed=6, dtype=torch.float32)
    gradients = torch.autograd.grad(expected, [means, *module.parameters()], sums[0].sum(1))
    shift, _, of_weights = gate.backward(sums, PIXELS, found, weights(module), act)
    for mine, theirs in zip((shift * PIXELS, *of_weights), gradients, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.01 * theirs.abs().max().item())


def assert_rounded(found: Tensor, expected: Tensor, step: float) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=step, atol=step / 4)
    assert (found == expected).double().mean() > 0.95


def test_a_sample_that_is_no_number_leaves_the_others_alone(device: torch.device) -> None:
    sizes = Sizes(3, 1, 5, 2)
    partial = numbers(*sizes[:3], device=device)
    partial[1, 0, 2] = torch.nan
    found = gate.forward(partial, PIXELS, weights(squeeze_excite(sizes, "swish", device)), torch.float64, "swish")
    assert found.gate[1].isnan().all()
    assert found.gate[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 16, 17, 512, 700])
def test_rows_are_added_up(device: torch.device, rows: int) -> None:
    partial = numbers(2, rows, 20, device=device)
    torch.testing.assert_close(launch.add_rows(partial), partial.sum(1))
