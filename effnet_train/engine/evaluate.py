"""Exact evaluation: every image counted once, over any number of ranks."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess, normalize
from effnet_train.distributed import Session


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found: `top1` and `top5` are fractions, `loss` the mean cross entropy without smoothing."""

    top1: float
    top5: float
    loss: float
    images: int
    skipped: int
    images_per_s: float

    def scalars(self, prefix: str) -> dict[str, float]:
        """Return the scores for a log, named `prefix/top1` and so on."""
        return {
            f"{prefix}/{key}": float(value) for key, value in asdict(self).items() if key in ("top1", "top5", "loss")
        }


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass in `precision` (fp32, tf32, bf16 or fp16)."""
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=halves.get(precision, torch.bfloat16), enabled=precision in halves)


def hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return how many labels (N,) are among the `k` largest logits (N, K); with fewer than k classes, all are.

    A row that is not finite hits nothing.
    """
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return ((top == labels[:, None]).any(dim=1) & logits.isfinite().all(dim=1)).sum()


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """An evaluation that was told to stop before its end."""


@contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put models into evaluation mode, and back into their own."""
    modes = [(model, model.training) for model in models]
    try:
        for model, _ in modes:
            model.eval()
        yield
    finally:
        for model, training in modes:
            model.train(training)


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[Batch],
    *,
    num_images: int,
    preprocess: Preprocess,
    precision: str,
    session: Session,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Metrics]:
    """Score each of `models` on `batches`, this rank's share of `num_images`; each image is read once for all.

    `stopped` is asked after every batch and must give all ranks, which have as many batches, the same answer.
    Raises Interrupted where it says yes, and AssertionError where all ranks' images do not add up to `num_images`.
    """
    start = time.perf_counter()
    device = session.device
    # For each model: hits at 1, hits at 5, summed loss; and for all: images, skipped images.
    sums = {name: torch.zeros(3, dtype=torch.float64, device=device) for name in models}
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    with _evaluating(models.values()):
        for batch in batches:
            images = normalize(batch.images.to(device, non_blocking=True), preprocess.mean, preprocess.std)
            labels = batch.labels.to(device, non_blocking=True)
            counts += torch.tensor([len(labels), len(batch.errors)]).to(device, non_blocking=True)
            for name, model in models.items() if len(labels) else ():
                with autocast(device, precision):
                    logits = model(images)
                logits = logits.float()
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums[name] += torch.stack([hits(logits, labels, 1), hits(logits, labels, 5), loss]).double()
            if stopped():
                raise Interrupted
    session.sum_(counts)
    count, skipped = counts.tolist()
    assert count + skipped == num_images, f"{count} images counted and {skipped} skipped of {num_images}"
    rate = num_images / (time.perf_counter() - start)
    results = {}
    for name, total in sums.items():
        top1, top5, loss_sum = session.sum_(total).tolist()
        share = max(1, count)
        results[name] = Metrics(top1 / share, top5 / share, loss_sum / share, count, skipped, rate)
    return results
