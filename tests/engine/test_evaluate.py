"""Every image counts once, and the scores are the formulas'."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session
from effnet_train.engine.evaluate import Interrupted, evaluate
from effnet_train.engine.scores import hits

PREPROCESS = Preprocess(resolution=2, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))


class FirstPixel(nn.Module):
    """The class is in the image: logits are a fixed random row for every value of the first pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table = torch.randn(256, classes, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].round().long()]


def batches(values: list[int], labels: list[int], size: int) -> list[Batch]:
    pixels = np.zeros((len(values), 2, 2, 3), np.uint8)
    pixels[:, 0, 0, 0] = values
    whole = torch.from_numpy(pixels), torch.tensor(labels), torch.zeros(len(labels), dtype=torch.int64)
    starts = range(0, len(values), size)
    return [Batch(*(part[start : start + size] for part in whole), []) for start in starts]


def score(model: nn.Module, parts: list[Batch], count: int) -> tuple[float, float, float]:
    found = evaluate({"m": model}, parts, num_images=count, preprocess=PREPROCESS, precision="fp32", session=Session())[
        "m"
    ]
    assert found.images == count
    return found.top1, found.top5, found.loss


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 17), classes=st.integers(2, 12))
def test_scores_are_the_formulas(count: int, size: int, classes: int) -> None:
    generator = np.random.default_rng(count)
    values, labels = generator.integers(0, 256, count).tolist(), generator.integers(0, classes, count).tolist()
    model = FirstPixel(classes)
    logits = model.table[values]
    ranks = (logits > logits[range(count), labels][:, None]).sum(1)
    top1, top5, loss = score(model, batches(values, labels, size), count)
    assert top1 == (ranks < 1).sum().item() / count
    assert top5 == (ranks < 5).sum().item() / count
    assert loss == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-5)


def test_a_lost_or_repeated_image_is_noticed() -> None:
    parts = batches([1, 2, 3], [0, 1, 0], 2)
    for count in (2, 4):
        with pytest.raises(AssertionError, match=f"3 images counted and 0 skipped of {count}"):
            score(FirstPixel(3), parts, count)


def test_skipped_images_are_counted_apart() -> None:
    first, second = batches([1, 2, 3], [0, 1, 0], 2)
    empty = Batch(second.images[:0], second.labels[:0], second.keys[:0], ["c.jpg: broken"])
    found = evaluate(
        {"m": FirstPixel(3)}, [first, empty], num_images=3, preprocess=PREPROCESS, precision="fp32", session=Session()
    )["m"]
    assert (found.images, found.skipped) == (2, 1)


def test_what_is_not_finite_hits_nothing() -> None:
    logits = torch.tensor([[torch.nan, 0.0, 1.0], [0.0, 1.0, 2.0]])
    assert hits(logits, torch.tensor([2, 2]), 1) == 1
    assert hits(logits, torch.tensor([0, 0]), 5) == 1


def test_modes_are_restored() -> None:
    model = FirstPixel(3).train()
    score(model, batches([1], [0], 1), 1)
    assert model.training


def test_an_evaluation_stops_where_it_is_told_to() -> None:
    model, asked = FirstPixel(3).train(), []

    def stopped() -> bool:
        asked.append(True)
        return len(asked) == 2

    parts = batches([1, 2, 3, 4], [0, 1, 0, 2], 1)
    with pytest.raises(Interrupted):
        evaluate(
            {"m": model},
            parts,
            num_images=4,
            preprocess=PREPROCESS,
            precision="fp32",
            session=Session(),
            stopped=stopped,
        )
    assert len(asked) == 2
    assert model.training


def test_a_log_tells_of_skipped_images_where_there_are_any() -> None:
    first, second = batches([1, 2, 3], [0, 1, 0], 2)
    empty = Batch(second.images[:0], second.labels[:0], second.keys[:0], ["c.jpg: broken"])
    arguments = {"preprocess": PREPROCESS, "precision": "fp32", "session": Session()}
    whole = evaluate({"m": FirstPixel(3)}, [first, second], num_images=3, **arguments)["m"]
    part = evaluate({"m": FirstPixel(3)}, [first, empty], num_images=3, **arguments)["m"]
    assert whole.scalars("val").keys() == {"val/top1", "val/top5", "val/loss"}
    assert part.scalars("val")["val/skipped"] == 1
