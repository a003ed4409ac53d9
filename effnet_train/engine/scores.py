"""From logits to sums over images, which ranks can add exactly, and from sums to metrics."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 15  # of confidence, as in Guo et al. 2017

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Measure:
    """What to find beyond top-1, top-5 and loss."""

    calibration: bool = False
    confusion: int = 0  # how many classes to make a matrix of; 0: none
    real: Tensor | None = None  # (images of the source, L) right classes, filled up with -1: `data.classes.real_labels`
    per_class: int = 0  # how many classes to find the mean accuracy of; 0: none

    @property
    def needs_predictions(self) -> bool:
        """Say whether anything here goes by the predicted class of each image."""
        return self.calibration or bool(self.confusion) or bool(self.per_class) or self.real is not None

    def to(self, device: torch.device) -> "Measure":
        """Return the same with its labels on `device`."""
        return replace(self, real=None if self.real is None else self.real.to(device))


TRAINING = Measure()  # a run asks for no more than these


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found: fractions, and `loss`, the mean cross entropy without smoothing.

    `ece` is the expected calibration error; `real_top1` is over the `real_images` that have reassessed labels.
    `per_class` is the mean, over the classes that have images, of each one's top-1.
    `confusion` (K, K + 1) int64 counts images by true and predicted class, the last column those whose logits are not
    finite; `calibration` (3, BINS) holds images, hits and summed confidence by confidence.
    """

    top1: float
    top5: float
    loss: float
    images: int
    skipped: int
    images_per_s: float
    ece: float | None = None
    real_top1: float | None = None
    real_images: int | None = None
    per_class: float | None = None
    confusion: np.ndarray | None = field(default=None, compare=False, repr=False)
    calibration: np.ndarray | None = field(default=None, compare=False, repr=False)

    def scalars(self, prefix: str) -> dict[str, float]:
        """Return the scores for a log, named `prefix/top1` and so on, and the images skipped, where there are any."""
        more = ["per_class"] * (self.per_class is not None) + ["skipped"] * bool(self.skipped)
        keys = ("top1", "top5", "loss", *more)
        return {f"{prefix}/{key}": float(getattr(self, key)) for key in keys}

    def record(self) -> dict[str, Any]:
        """Return all that was measured, but for the arrays."""
        arrays = ("confusion", "calibration")
        return {key: value for key, value in asdict(self).items() if value is not None and key not in arrays}


def average(logits: Tensor) -> Tensor:
    """Return scores (N, K) whose softmax is the mean of the softmax of each of the views' logits (V, N, K)."""
    if len(logits) == 1:  # as they are: the logarithm of their softmax would round, and could make classes equal
        return logits[0]
    # In float32 two views that are each sure of another class would tie.
    return logits.double().log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return how many labels (N,) are among the `k` largest logits (N, K); with fewer than k classes, all are.

    A row that is not finite hits nothing.
    """
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return ((top == labels[:, None]).any(dim=1) & logits.isfinite().all(dim=1)).sum()


def predictions(logits: Tensor) -> Tensor:
    """Return the class (N,) of the largest logit of (N, K), and K where a row is not finite."""
    top = logits.topk(1, dim=1).indices[:, 0]  # as `hits` does, which may choose otherwise among equals than argmax
    return torch.where(logits.isfinite().all(dim=1), top, logits.shape[1])


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count images by true and predicted class: (K, K + 1) int64. The host does not wait for the device."""
    counts = torch.zeros(classes * (classes + 1), dtype=torch.int64, device=labels.device)
    counts.scatter_add_(0, labels * (classes + 1) + predicted, torch.ones_like(labels))
    return counts.view(classes, classes + 1)


def calibration(logits: Tensor, correct: Tensor) -> Tensor:
    """Return images, hits and summed confidence (3, BINS) float64 by confidence: bin i is (i / BINS, (i + 1) / BINS].

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equations 1 to 3.
    """
    confidence = logits.double().softmax(dim=1).amax(dim=1).nan_to_num(0.0)
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    values = torch.stack([torch.ones_like(confidence), correct.double(), confidence])
    sums = torch.zeros(3, BINS, dtype=torch.float64, device=logits.device)
    return sums.scatter_add_(1, place.expand(3, -1), values)


def real_hits(predicted: Tensor, right: Tensor) -> Tensor:
    """Return hits and images that count, (2,) int64, of predictions (N,) against right classes (N, L), -1 for none."""
    hit = (right == predicted[:, None]).any(dim=1)
    return torch.stack([hit.sum(), (right >= 0).any(dim=1).sum()])


def class_hits(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return images and hits of each class, (2, K) int64, of predictions and labels (N,)."""
    counts = torch.zeros(2, classes, dtype=torch.int64, device=labels.device)
    rows = torch.stack([torch.ones_like(labels), (predicted == labels).long()])
    return counts.scatter_add_(1, labels.expand(2, -1), rows)


def no_sums(measure: Measure, device: torch.device) -> Sums:
    """Return the sums over no image of what `measure` asks for; all ranks hold the same ones, in the same order."""
    sums = {"scores": torch.zeros(3, dtype=torch.float64, device=device)}
    if measure.calibration:
        sums["calibration"] = torch.zeros(3, BINS, dtype=torch.float64, device=device)
    if measure.confusion:
        size = (measure.confusion, measure.confusion + 1)
        sums["confusion"] = torch.zeros(size, dtype=torch.int64, device=device)
    if measure.per_class:
        sums["per_class"] = torch.zeros(2, measure.per_class, dtype=torch.int64, device=device)
    if measure.real is not None:
        sums["real"] = torch.zeros(2, dtype=torch.int64, device=device)
    return sums


def batch_sums(logits: Tensor, labels: Tensor, keys: Tensor, measure: Measure) -> Sums:
    """Return what `measure` asks for, summed over a batch's logits (N, K), labels (N,) and keys (N,)."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    sums = {"scores": torch.stack([hits(logits, labels, 1), hits(logits, labels, 5), loss]).double()}
    if not measure.needs_predictions:
        return sums
    predicted = predictions(logits)
    if measure.calibration:
        sums["calibration"] = calibration(logits, predicted == labels)
    if measure.confusion:
        sums["confusion"] = confusion(predicted, labels, measure.confusion)
    if measure.per_class:
        sums["per_class"] = class_hits(predicted, labels, measure.per_class)
    if measure.real is not None:
        sums["real"] = real_hits(predicted, measure.real[keys])
    return sums


def to_metrics(total: Sums, *, images: int, skipped: int, images_per_s: float) -> Metrics:
    """Return the metrics of the sums over all images. Raises AssertionError where a sum is not over each one once."""
    top1, top5, loss = (total["scores"] / max(1, images)).tolist()
    more: dict[str, Any] = {}
    if "calibration" in total:
        more["calibration"] = total["calibration"].cpu().numpy()
        more["ece"] = calibration_error(more["calibration"])
        _check_count("calibration", more["calibration"][0].sum(), images)
    if "confusion" in total:
        more["confusion"] = total["confusion"].cpu().numpy()
        _check_count("confusion", more["confusion"].sum(), images)
    if "per_class" in total:
        counted, right = total["per_class"].double()
        more["per_class"] = (right / counted)[counted > 0].mean().item() if images else 0.0
        _check_count("per_class", counted.sum().item(), images)
    if "real" in total:
        right, more["real_images"] = total["real"].tolist()
        more["real_top1"] = right / max(1, more["real_images"])
    return Metrics(top1, top5, loss, images, skipped, images_per_s, **more)


def _check_count(name: str, counted: float, images: int) -> None:
    assert counted == images, f"{counted} images in {name}, of {images}"


def calibration_error(bins: np.ndarray) -> float:
    """Return the expected calibration error of images, hits and summed confidence (3, BINS)."""
    images, right, confidence = bins
    return float(np.abs(right - confidence).sum() / max(1, images.sum()))
