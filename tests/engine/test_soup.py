"""Averages of weights, and BatchNorm's statistics over many images, against NumPy and the definition."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess, normalize
from effnet_train.engine.precise_norm import estimate_statistics
from effnet_train.engine.soup import average, greedy
from effnet_train.models.efficientnet import EfficientNet


def test_the_mean_is_taken_in_float64_and_whole_numbers_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    members = [{"w": torch.randn(5, generator=generator), "n": torch.tensor(place)} for place in range(3)]
    found = average(members)
    expected = np.mean([member["w"].numpy().astype(np.float64) for member in members], axis=0)
    np.testing.assert_array_equal(found["w"].numpy(), expected.astype(np.float32))
    assert found["n"] == 0
    assert found["w"].dtype == torch.float32
    torch.testing.assert_close(average(members[:1])["w"], members[0]["w"], rtol=0, atol=0)


def test_greedy_keeps_what_does_not_lower_the_score() -> None:
    """On a line with the best at 0: 1 comes first, 2 away; -1.2 helps, 5 does not, and neither does what is worst."""
    members = [{"w": torch.tensor([value])} for value in (5.0, -1.2, 1.0, 9.0)]

    def score(tensors: Mapping[str, Tensor]) -> float:
        return -abs(tensors["w"].item())

    chosen, alone = greedy(members, score)
    assert chosen == [2, 1]
    np.testing.assert_allclose(alone, [-5, -1.2, -1, -9], rtol=1e-6)
    assert greedy(members, lambda _: 0.5)[0] == [0, 1, 2, 3]  # equals do not lower it


def batches(images: Tensor, size: int) -> list[Batch]:
    parts = images.split(size)
    return [Batch(part, torch.zeros(len(part)).long(), torch.arange(len(part)), []) for part in parts]


def test_statistics_are_those_of_all_images() -> None:
    torch.manual_seed(0)
    model = EfficientNet(width=0.25, depth=0.25, num_classes=3, resolution=32)
    images = torch.randint(256, (12, 32, 32, 3), dtype=torch.uint8)
    images[6:] //= 4  # batches whose means differ: the mean of their variances would be too small
    preprocess, cpu = Preprocess(resolution=32), torch.device("cpu")
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert estimate_statistics(model, batches(images, 6), preprocess, cpu) == 12
    with torch.no_grad():
        x = model.stem.conv(normalize(images, preprocess.mean, preprocess.std)).double()
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(model.stem.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.stem.norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    assert not any(module.training for module in model.modules())


def test_of_one_batch_evaluation_gives_what_training_does() -> None:
    torch.manual_seed(0)
    model = EfficientNet(width=0.25, depth=0.25, num_classes=3, resolution=32, dropout=0.0, drop_connect=0.0)
    images, preprocess = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8), Preprocess(resolution=32)
    inputs = normalize(images, preprocess.mean, preprocess.std)
    with torch.no_grad():
        expected = model.train()(inputs, torch.arange(8))
        estimate_statistics(model, batches(images, 8), preprocess, torch.device("cpu"))
        torch.testing.assert_close(model(inputs), expected, rtol=1e-3, atol=1e-3)
