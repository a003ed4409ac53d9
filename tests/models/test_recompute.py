import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from effnet_train.models import recompute
from effnet_train.models.layers import BatchNorm2d, ConvNorm, Style, frozen_statistics
from effnet_train.models.recompute import norm_swish

SHAPES = [(3, 5, 7, 6), (1, 4, 3, 5), (9, 8, 1, 1), (2, 3, 64, 48)]


def made_norm(channels: int, dtype: torch.dtype = torch.float64) -> BatchNorm2d:
    norm = BatchNorm2d(channels).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_equals_batch_norm_and_swish_in_values_gradients_and_statistics(shape, layout):
    torch.manual_seed(0)
    plain = made_norm(shape[1])
    fused = copy.deepcopy(plain)
    x = torch.randn(shape, dtype=torch.float64)
    first, second = (laid_out(x.clone(), layout).requires_grad_() for _ in range(2))
    expected, found = F.silu(plain(first)), norm_swish(second, fused)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(x)
    expected.backward(gradient)
    found.backward(gradient)
    for own, other in ((second, first), (fused.weight, plain.weight), (fused.bias, plain.bias)):
        torch.testing.assert_close(own.grad, other.grad)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))


def test_gradcheck():
    torch.manual_seed(0)
    norm = made_norm(3)

    def function(x, weight, bias):
        norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
        return recompute._NormSwish.apply(x, weight, bias, norm.eps)[0]

    inputs = (torch.randn(3, 3, 5, 4), torch.randn(3), torch.randn(3))
    assert torch.autograd.gradcheck(function, [x.double().requires_grad_() for x in inputs])


def test_a_gradient_that_is_one_number_repeated_is_taken():
    x, norm = torch.randn(4, 3, 6, 5, dtype=torch.float64, requires_grad=True), made_norm(3)
    norm_swish(x, norm).mean((2, 3)).square().sum().backward()
    found, x.grad = x.grad, None
    F.silu(norm(x)).mean((2, 3)).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_in_bf16_statistics_are_float32_ones():
    torch.manual_seed(0)
    plain = made_norm(8, torch.float32)
    fused = copy.deepcopy(plain)
    x = torch.randn(4, 8, 9, 9).bfloat16().contiguous(memory_format=torch.channels_last)
    expected, found = F.silu(plain(x)), norm_swish(x, fused)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fused.running_var, plain.running_var)


def kept(function) -> int:
    """Return how many different numbers autograd keeps."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(storages.values())


def test_half_of_what_plain_layers_keep_is_kept_and_only_where_it_can_be(monkeypatch):
    part = ConvNorm(3, 4, kernel=3, style=Style()).train()
    images, numbers = torch.randn(2, 3, 16, 16), 2 * 4 * 16 * 16
    fused = kept(lambda: part(images))
    calls = []
    monkeypatch.setattr("effnet_train.models.layers.norm_swish", lambda *a: calls.append(a) or norm_swish(*a))
    monkeypatch.setattr(ConvNorm, "_recomputes", lambda *_: False)
    assert kept(lambda: part(images)) - fused == pytest.approx(numbers, abs=100)
    monkeypatch.undo()
    monkeypatch.setattr("effnet_train.models.layers.norm_swish", lambda *a: calls.append(a) or norm_swish(*a))
    part.eval()(images)
    ConvNorm(3, 4, style=Style(activation="relu6")).train()(images)
    ConvNorm(3, 4, style=Style(), activate=False).train()(images)
    shared = ConvNorm(3, 4, style=Style()).train()
    shared.norm.reduce_statistics = lambda total: total
    shared(images)
    with torch.no_grad():
        part.train()(images)
    assert not calls
    part(images)
    assert len(calls) == 1


def test_one_value_a_channel_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ConvNorm(3, 4, style=Style()).train()(torch.randn(1, 3, 1, 1))


def test_frozen_statistics_stay():
    part = ConvNorm(3, 4, style=Style()).train()
    before = {name: buffer.clone() for name, buffer in part.named_buffers()}
    with frozen_statistics(part):
        part(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(dict(part.named_buffers()), before, rtol=0, atol=0)
