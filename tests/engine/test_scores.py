"""Sums over batches are what scikit-learn and the papers' formulas give for all images at once."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, recall_score, top_k_accuracy_score
from torch import Tensor, nn

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess, normalize
from effnet_train.distributed import Session
from effnet_train.engine.evaluate import ENSEMBLE, Member, OfClasses, evaluate_members
from effnet_train.engine.scores import (
    BINS,
    TRAINING,
    Measure,
    Metrics,
    average,
    batch_sums,
    calibration,
    confusion,
    no_sums,
    predictions,
    to_metrics,
)

CLASSES = 12
COUNT = 200
PREPROCESS = Preprocess(resolution=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made() -> tuple[Tensor, Tensor]:
    """Return logits of 200 images, which are right more often than not, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (COUNT,), generator=generator)
    logits = torch.randn(COUNT, CLASSES, generator=generator) * 2
    return logits + 3 * nn.functional.one_hot(labels, CLASSES), labels


def measured(logits: Tensor, labels: Tensor, measure: Measure, size: int = 33) -> Metrics:
    """Return the metrics of images in batches, as several ranks would add them."""
    total = no_sums(measure, CPU)
    for start in range(0, len(labels), size):
        part, keys = slice(start, start + size), torch.arange(len(labels))
        for name, tensor in batch_sums(logits[part], labels[part], keys[part], measure).items():
            total[name] += tensor
    return to_metrics(total, images=len(labels), skipped=0, images_per_s=1.0)


def test_scores_and_matrix_are_scikit_learns(made: tuple[Tensor, Tensor]) -> None:
    logits, labels = made
    found = measured(logits, labels, Measure(confusion=CLASSES))
    everything = {"labels": range(CLASSES)}
    assert found.top1 == top_k_accuracy_score(labels, logits, k=1, **everything)
    assert found.top5 == top_k_accuracy_score(labels, logits, k=5, **everything)
    assert found.loss == pytest.approx(log_loss(labels, logits.double().softmax(1), **everything), rel=1e-6)
    expected = confusion_matrix(labels, logits.argmax(1), **everything)
    assert found.confusion is not None
    np.testing.assert_array_equal(found.confusion[:, :CLASSES], expected)
    assert not found.confusion[:, CLASSES].any()
    assert found.confusion.dtype == np.int64
    assert 0.3 < found.top1 < 0.9  # the matrix has something off its diagonal


def test_calibration_is_the_papers_sum_over_bins(made: tuple[Tensor, Tensor]) -> None:
    logits, labels = made
    found = measured(logits, labels, Measure(calibration=True))
    probabilities = logits.double().softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    error = 0.0
    for m in range(1, BINS + 1):  # equation 3 of Guo et al.: bin m is ((m - 1) / M, m / M]
        chosen = (confidence > (m - 1) / BINS) & (confidence <= m / BINS)
        if chosen.any():
            error += chosen.sum() / COUNT * abs(right[chosen].mean() - confidence[chosen].mean())
    assert found.ece == pytest.approx(error, rel=1e-9)
    assert error > 0.02
    assert found.calibration is not None
    assert found.calibration[0].sum() == COUNT
    assert found.calibration[1].sum() == found.top1 * COUNT


def test_calibration_by_hand() -> None:
    # Two classes: confidences 0.8 (right), 0.8 (wrong), 0.6 (right), and exactly 2/3, the edge of a bin (wrong).
    confident = torch.tensor([0.8, 0.8, 0.6, 2 / 3], dtype=torch.float64)
    logits = torch.stack([confident, 1 - confident], 1).log()
    bins = calibration(logits, torch.tensor([True, False, True, False]))
    images = {place: count for place, count in enumerate(bins[0].tolist()) if count}
    assert images == {11: 2, 8: 1, 9: 1}  # 2/3 is 10/15: the upper end of the tenth bin
    hits, confidence = bins[1] - bins[2], bins[2]
    assert hits[11].item() == pytest.approx(1 - 1.6)
    assert confidence[9].item() == pytest.approx(2 / 3)
    found = to_metrics(
        {"scores": torch.zeros(3, dtype=torch.float64), "calibration": bins}, images=4, skipped=0, images_per_s=1
    )
    assert found.ece == pytest.approx((abs(1 - 1.6) + abs(1 - 0.6) + 2 / 3) / 4)


def test_what_is_not_finite_is_no_ones_hit() -> None:
    logits = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, 0, 1], [0, 1, 2]])
    labels = torch.tensor([1, 0, 2])
    assert predictions(logits).tolist() == [3, 3, 2]
    assert confusion(predictions(logits), labels, 3).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    found = measured(logits, labels, Measure(True, 3, torch.tensor([[1], [0], [2]])))
    assert found.top1 == found.real_top1 == pytest.approx(1 / 3)
    assert found.calibration is not None
    assert found.calibration[1].sum() == 1


def test_predictions_are_what_top1_counts_among_equals() -> None:
    logits = torch.zeros(64, 20)
    for label in range(20):
        labels = torch.full((64,), label)
        sums = batch_sums(logits, labels, labels, Measure(confusion=20))
        assert sums["confusion"].diagonal().sum() == sums["scores"][0]


def test_reassessed_labels_count_any_right_one_and_leave_out_images_without() -> None:
    right = torch.tensor([[2, -1], [0, 1], [-1, -1], [1, -1]])
    logits = torch.eye(3)[[2, 1, 0, 0]]
    keys = torch.tensor([0, 1, 2, 3])
    found = batch_sums(logits, torch.zeros(4, dtype=torch.int64), keys, Measure(real=right))["real"]
    assert found.tolist() == [2, 3]
    turned = batch_sums(logits[[3, 0]], torch.zeros(2, dtype=torch.int64), keys[[3, 0]], Measure(real=right))["real"]
    assert turned.tolist() == [1, 2]  # each by its own key


def test_a_sum_that_misses_an_image_is_noticed(made: tuple[Tensor, Tensor]) -> None:
    total = batch_sums(*made, torch.arange(COUNT), Measure(calibration=True, confusion=CLASSES))
    for lost, name in (("calibration", "calibration"), ("confusion", "confusion")):
        wrong = {**total, lost: torch.zeros_like(total[lost])}
        with pytest.raises(AssertionError, match=f"images in {name}, of {COUNT}"):
            to_metrics(wrong, images=COUNT, skipped=0, images_per_s=1)


def test_the_mean_over_classes_is_scikit_learns(made: tuple[Tensor, Tensor]) -> None:
    """Of classes with different numbers of images, and of one with none."""
    logits, labels = made
    few = (labels < 4) | (torch.arange(COUNT) % 3 == 0)
    logits, labels = logits[few & (labels != 7)], labels[few & (labels != 7)]
    found = measured(logits, labels, Measure(per_class=CLASSES))
    present = labels.unique().tolist()
    assert len(present) == CLASSES - 1
    expected = recall_score(labels, logits.argmax(1), labels=present, average="macro")
    assert found.per_class == pytest.approx(expected, rel=1e-12)
    assert found.per_class != pytest.approx(found.top1, rel=1e-3)
    assert found.scalars("val")["val/per_class"] == found.per_class
    assert "per_class" in found.record()


def test_training_asks_for_no_more_than_scores(made: tuple[Tensor, Tensor]) -> None:
    assert batch_sums(*made, torch.arange(COUNT), TRAINING).keys() == {"scores"}
    record = measured(*made, TRAINING).record()
    assert record.keys() == {"top1", "top5", "loss", "images", "skipped", "images_per_s"}


def test_the_average_is_of_probabilities() -> None:
    logits = torch.randn(4, 7, CLASSES, generator=torch.Generator().manual_seed(1)) * 3
    expected = np.exp(logits.double().numpy())
    expected = (expected / expected.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(average(logits).softmax(-1), expected, rtol=1e-4)
    # As the scores are logarithms of probabilities, their cross entropy is the averaged probability's.
    np.testing.assert_allclose(average(logits).exp(), expected, rtol=1e-4)
    assert abs(expected - logits.mean(0).softmax(-1).numpy()).max() > 0.01  # it is not that of logits


def test_one_view_stays_as_it_is() -> None:
    logits = torch.tensor([[[1e8, 1e8 + 8, 0.0]]])
    assert torch.equal(average(logits), logits[0])


# --- several views and members ---


class Mixer(nn.Module):
    """A fixed random linear layer of all pixels: views differ, and so do members of another seed."""

    def __init__(self, seed: int, size: int = 4) -> None:
        super().__init__()
        weight = torch.randn(CLASSES, 3 * size * size, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def batches(images: Tensor, labels: Tensor, size: int = 7, shift: int = 0) -> list[Batch]:
    keys = torch.arange(len(labels)) + shift
    starts = range(0, len(labels), size)
    return [Batch(images[s : s + size], labels[s : s + size], keys[s : s + size], []) for s in starts]


def pixels(seed: int, count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *shape, 3), dtype=torch.uint8, generator=generator)


def probabilities(model: nn.Module, images: Tensor, preprocess: Preprocess = PREPROCESS) -> np.ndarray:
    logits = model(normalize(images, preprocess.mean, preprocess.std)).double().numpy()
    shares: np.ndarray = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def assert_scores(found: Metrics, expected: np.ndarray, labels: Tensor) -> None:
    everything = {"labels": range(CLASSES)}
    assert found.top1 == top_k_accuracy_score(labels, expected, k=1, **everything)
    assert found.top5 == top_k_accuracy_score(labels, expected, k=5, **everything)
    assert found.loss == pytest.approx(-np.log(expected[np.arange(len(labels)), labels]).mean(), rel=1e-5)


def run(members: list[Member], count: int, **options: object) -> dict[str, Metrics]:
    arguments = {"num_images": count, "precision": "fp32", "session": Session(), **options}
    return evaluate_members(members, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crops", [1, 5])
def test_crops_and_mirror_images_are_averaged(flip: bool, crops: int) -> None:
    model, labels = Mixer(0), torch.arange(40) % CLASSES
    images = pixels(3, 40, crops, 4, 4)
    views = [images[:, place] for place in range(crops)]
    views += [view.flip(2) for view in views] if flip else []
    expected = np.mean([probabilities(model, view) for view in views], axis=0)
    parts = batches(images if crops > 1 else images[:, 0], labels)
    found = run([Member({"m": model}, parts, PREPROCESS)], 40, flip=flip)
    assert found.keys() == {"m"}
    assert_scores(found["m"], expected, labels)


def test_members_are_averaged_each_in_its_own_preprocessing() -> None:
    labels = torch.arange(30) % CLASSES
    other = Preprocess(resolution=6, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    parts = [
        (Mixer(1), pixels(5, 30, 4, 4), PREPROCESS),
        (Mixer(2, 6), pixels(6, 30, 6, 6), other),
        (Mixer(3, 6), pixels(7, 30, 6, 6), other),
    ]
    members = [
        Member({str(i): model}, batches(images, labels), preprocess)
        for i, (model, images, preprocess) in enumerate(parts)
    ]
    found = run(members, 30, measure=Measure(calibration=True))
    alone = [probabilities(*part) for part in parts]
    assert list(found) == ["0", "1", "2", ENSEMBLE]
    for i, shares in enumerate(alone):
        assert_scores(found[str(i)], shares, labels)
    assert_scores(found[ENSEMBLE], np.mean(alone, axis=0), labels)
    assert found[ENSEMBLE].calibration is not None
    np.testing.assert_allclose(found[ENSEMBLE].calibration[2].sum(), np.mean(alone, axis=0).max(1).sum(), rtol=1e-5)


def test_members_that_read_other_images_are_noticed() -> None:
    labels, images = torch.arange(9) % CLASSES, pixels(5, 9, 4, 4)
    first = Member({"a": Mixer(1)}, batches(images, labels), PREPROCESS)
    for other, message in (
        (batches(images, labels, shift=1), "the members' batches are of different images"),
        (batches(images, labels + 1), "the members' labels of the same images differ"),
    ):
        with pytest.raises(AssertionError, match=message):
            run([first, Member({"b": Mixer(2)}, other, PREPROCESS)], 9)


def test_a_view_at_a_time_goes_through_the_network() -> None:
    seen: list[tuple[int, ...]] = []
    model = Mixer(0)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    run([Member({"m": model}, batches(pixels(3, 14, 5, 4, 4), torch.zeros(14, dtype=torch.int64)), PREPROCESS)], 14)
    assert seen == [(7, 3, 4, 4)] * 10


def test_some_classes_are_scored_among_themselves() -> None:
    model, chosen = Mixer(0), [7, 2, 11]
    images, labels = pixels(3, 20, 4, 4), torch.arange(20) % 3
    found = run([Member({"m": OfClasses(model, chosen, CPU)}, batches(images, labels), PREPROCESS)], 20)["m"]
    shares = probabilities(model, images)[:, chosen]
    shares /= shares.sum(1, keepdims=True)
    assert found.top1 == (shares.argmax(1) == labels.numpy()).mean()
    assert found.loss == pytest.approx(-np.log(shares[np.arange(20), labels]).mean(), rel=1e-5)
