import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.models.layers import (
    BatchNorm2d,
    Conv2d,
    Style,
    drop_connect,
    dropout,
    frozen_statistics,
    uniform,
)

# --- random numbers by key


def reference_uniform(key: int, row: int, salt: int = 0) -> float:
    """The definition in Python's integers, which have no sign to repeat and no width to exceed."""
    mask = 2**64 - 1

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    return (mixed((mixed((key & mask) ^ salt) + (row + 1) * 0x9E3779B97F4A7C15) & mask) >> 40) / 2**24


def test_uniform_equals_its_definition() -> None:
    keys = [0, 1, 2, -1, 2**63 - 1, -(2**63), 1234567890123]
    u = uniform(torch.tensor(keys), 3, salt=77)
    assert u.dtype == torch.float32
    assert u.tolist() == [[reference_uniform(key, row, 77) for key in keys] for row in range(3)]


def test_reference_is_splitmix64() -> None:
    # Source: the first outputs of splitmix64 with state 0, whose finaliser of a zero key is zero here too.
    assert reference_uniform(0, 0) == (0xE220A8397B1DCDAF >> 40) / 2**24
    assert reference_uniform(0, 1) == (0x6E789E6AA1B965F4 >> 40) / 2**24


def test_sequential_keys_give_independent_uniform_numbers() -> None:
    n, count = 20_000, 12
    u = uniform(torch.arange(n), count).double()
    assert u.min() >= 0
    assert u.max() < 1
    histogram = torch.stack([torch.histc(row, 50, 0, 1) for row in u])
    chi_square = ((histogram - n / 50) ** 2 / (n / 50)).sum(1)
    assert chi_square.max() < 100  # 49 degrees of freedom: one in 30,000 is above
    bound = 5 / math.sqrt(n)
    rows = torch.corrcoef(u) - torch.eye(count)
    assert rows.abs().max() < bound
    for lag in (1, 2, 64):  # neighbours in a batch, and the same place of the next batch
        lagged = torch.corrcoef(torch.cat([u[:, lag:], u[:, :-lag]]))
        assert lagged[:count, count:].abs().max() < bound


def test_salts_are_independent() -> None:
    keys = torch.arange(20_000)
    pair = torch.stack([uniform(keys, 1)[0], uniform(keys, 1, salt=5)[0]])
    assert torch.corrcoef(pair)[0, 1].abs() < 5 / math.sqrt(20_000)
    dropped = dropout(torch.ones(20_000, 1), keys, 0.5)[:, 0] == 0
    assert (dropped == (pair[0] < 0.5)).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_key_gives_the_same_whatever_the_batch() -> None:
    keys = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))
    u = uniform(keys, 9)
    assert torch.equal(uniform(keys[10:13], 9), u[:, 10:13])
    assert torch.equal(uniform(keys, 4), u[:4])
    assert torch.equal(dropout(torch.ones(64, 7), keys, 0.5)[20:30], dropout(torch.ones(10, 7), keys[20:30], 0.5))


# --- dropping


def test_drop_connect_zeroes_below_the_rate_and_divides_the_rest() -> None:
    x = torch.randn(4, 3, 2, 2)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.99])
    y = drop_connect(x, u, 0.25)
    assert torch.equal(y[:2], torch.zeros(2, 3, 2, 2))
    assert torch.equal(y[2:], x[2:] / 0.75)


def test_drop_connect_forgets_what_is_not_finite() -> None:
    x = torch.full((1, 1, 1, 1), math.inf, requires_grad=True)
    y = drop_connect(x, torch.tensor([0.1]), 0.5)
    y.sum().backward()
    assert y.item() == 0
    assert x.grad is not None
    assert x.grad.item() == 0


def test_dropping_keeps_the_mean_at_its_rate() -> None:
    n, features, rate = 2000, 40, 0.3
    y = dropout(torch.ones(n, features), torch.arange(n), rate)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
    dropped = (y == 0).double()
    assert dropped.mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / (n * features)))
    for counts in (dropped.mean(0), dropped.mean(1)):  # no feature and no sample is favoured
        assert (counts - rate).abs().max() < 5 * math.sqrt(rate * (1 - rate) / (n * features / len(counts)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dropping_keeps_the_precision(dtype: torch.dtype) -> None:
    keys = torch.arange(8)
    assert dropout(torch.ones(8, 4, dtype=dtype), keys, 0.5).dtype == dtype
    assert drop_connect(torch.ones(8, 1, 2, 2, dtype=dtype), uniform(keys, 1)[0], 0.5).dtype == dtype


# --- convolution


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_sees_what_tensorflow_sees(size: int, kernel: int, stride: int) -> None:
    # Source: "Notes on padding" of tf.nn: ceil(in / stride) outputs, the odd pixel of the total at the end.
    outputs = math.ceil(size / stride)
    total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
    x, weight = torch.randn(size), torch.randn(kernel)
    conv = Conv2d(1, 1, kernel=kernel, stride=stride)
    conv.weight.data = F.pad(weight.view(1, 1, kernel, 1), (kernel // 2, kernel // 2))  # sees its middle column only
    expected = torch.zeros(outputs)
    for i in range(outputs):
        for t in range(kernel):
            row = i * stride + t - total // 2
            expected[i] += weight[t] * x[row] if 0 <= row < size else 0
    torch.testing.assert_close(conv(x.view(1, 1, size, 1)).flatten(), expected)


@pytest.mark.parametrize(("size", "equal"), [(9, True), (8, False)])
def test_paddings_differ_at_even_sizes_only(size: int, equal: bool) -> None:
    same, symmetric = (Conv2d(2, 3, kernel=3, stride=2, padding=padding) for padding in ("same", "symmetric"))
    symmetric.load_state_dict(same.state_dict())
    x = torch.randn(1, 2, size, size)
    assert same(x).shape == symmetric(x).shape
    assert torch.equal(same(x), symmetric(x)) is equal
    assert torch.equal(symmetric(x), F.conv2d(x, same.weight, stride=2, padding=1))


def test_bad_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="padding='valid': choose one of same, symmetric"):
        Conv2d(1, 1, padding="valid")
    with pytest.raises(ValueError, match="kernel=4 must be odd"):
        Conv2d(1, 1, kernel=4)
    with pytest.raises(ValueError, match="activation='gelu': choose one of swish, relu6"):
        Style(activation="gelu")


# --- BatchNorm


def trained_pair(dtype: torch.dtype = torch.float32) -> tuple[nn.BatchNorm2d, BatchNorm2d, Tensor]:
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01), BatchNorm2d(6)
    for norm in (theirs, ours):
        norm.weight.data = torch.linspace(0.5, 2, 6)
        norm.bias.data = torch.linspace(-1, 1, 6)
    return theirs, ours, (torch.randn(3, 6, 2, 2) * 3 + 1).to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_normalises_as_torch_does(layout: torch.memory_format) -> None:
    theirs, ours, x = trained_pair()
    outputs, gradients = [], []
    for norm in (theirs, ours):
        leaf = x.clone(memory_format=layout).requires_grad_()
        y = norm(leaf)
        assert y.is_contiguous(memory_format=layout)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append([leaf.grad, norm.weight.grad, norm.bias.grad])
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


def test_batch_norm_keeps_the_biased_variance() -> None:
    _, ours, x = trained_pair()
    mean, variance = torch.zeros(6), torch.ones(6)
    for batch in (x, 2 * x + 1):
        ours(batch)
        mean = 0.99 * mean + 0.01 * batch.mean((0, 2, 3))
        variance = 0.99 * variance + 0.01 * batch.var((0, 2, 3), correction=0)
    torch.testing.assert_close(ours.running_mean, mean)
    torch.testing.assert_close(ours.running_var, variance)
    assert ours.num_batches_tracked == 0


def test_batch_norm_takes_bfloat16_with_parameters_in_float32() -> None:
    _, ours, x = trained_pair()
    reference = BatchNorm2d(6)
    reference.load_state_dict(ours.state_dict())
    y = ours(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(x.bfloat16().float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.running_var, reference.running_var)


def test_frozen_statistics_do_not_move() -> None:
    theirs, ours, x = trained_pair()
    both = nn.ModuleList([theirs, ours])
    before = {name: buffer.clone() for name, buffer in both.named_buffers() if "tracked" not in name}
    with frozen_statistics(both):
        y = ours(x)
        theirs(x)
    assert all(torch.equal(both.get_buffer(name), buffer) for name, buffer in before.items())
    assert (theirs.momentum, ours.momentum) == (0.01, 0.01)
    assert torch.equal(y, ours(x))
    assert not torch.equal(ours.running_mean, before["1.running_mean"])


def test_one_value_a_channel_is_refused_in_training() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BatchNorm2d(6)(torch.randn(1, 6, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_one_rank_are_the_batch_s(dtype: torch.dtype) -> None:
    _, plain, x = trained_pair(dtype)
    _, shared, _ = trained_pair()
    shared.reduce_statistics = lambda tensor: tensor
    results = []
    for norm in (plain, shared):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        assert y.dtype == dtype
        (y.float() ** 3).sum().backward()
        results.append([y, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*results, **tolerance)


def test_statistics_of_two_ranks_are_those_of_both_batches() -> None:
    _, whole, x = trained_pair(torch.float64)
    _, first, _ = trained_pair()
    whole, first = whole.double(), first.double()
    rest = x[1:]  # ranks of unequal batches: 1 and 2 images
    mean = rest.mean((0, 2, 3))
    theirs = torch.cat([mean, rest.square().mean((0, 2, 3)), torch.ones(1)]) * 8
    first.reduce_statistics = lambda tensor: tensor + theirs
    torch.testing.assert_close(first(x[:1]), whole(x)[:1])
    torch.testing.assert_close(first.running_var, whole.running_var)
    torch.testing.assert_close(first.running_mean, whole.running_mean)


def test_bad_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="bn_eps=0 must be above 0"):
        BatchNorm2d(1, eps=0)
    with pytest.raises(ValueError, match=r"bn_momentum=1.5 must lie between 0 and 1"):
        BatchNorm2d(1, momentum=1.5)
