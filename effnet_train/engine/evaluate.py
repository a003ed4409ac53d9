"""Exact evaluation: every image counted once, over any number of ranks."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess, normalize
from effnet_train.distributed import Session
from effnet_train.engine.scores import TRAINING, Measure, Metrics, Sums, average, batch_sums, no_sums, to_metrics

ENSEMBLE = "ensemble"


def unchanged(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the images as they are: no attack."""
    return images


@dataclass(frozen=True)
class Member:
    """Models that see the same pixels: `batches` are this rank's share of the images, in the `preprocess` given.

    What each model is given of them is what `attack` makes of model, inputs and labels.
    """

    models: Mapping[str, nn.Module]
    batches: Iterable[Batch]
    preprocess: Preprocess
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] = unchanged


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass in `precision` (fp32, tf32, bf16 or fp16)."""
    return torch.autocast(device.type, dtype=HALVES.get(precision, torch.bfloat16), enabled=precision in HALVES)


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """An evaluation that was told to stop before its end."""


@contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put models into evaluation mode, and back into their own, which frozen parts may have of theirs."""
    models = list(models)
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class OfClasses(nn.Module):
    """A model's logits (N, len(classes)) of some of its classes, or of all in another order."""

    def __init__(self, model: nn.Module, classes: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.classes = torch.tensor(classes, device=device)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of these classes."""
        return self.model(images)[:, self.classes]


def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    num_images: int,
    preprocess: Preprocess,
    precision: str,
    session: Session,
    measure: Measure = TRAINING,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Metrics]:
    """Score each of `models` on `batches`, this rank's share of `num_images`; each image is read once for all.

    `stopped` is asked after every batch and must give all ranks, which have as many batches, the same answer.
    Raises Interrupted where it says yes, and AssertionError where all ranks' images do not add up to `num_images`.
    """
    members = [Member(models, batches, preprocess)]
    return evaluate_members(
        members, num_images=num_images, precision=precision, session=session, measure=measure, stopped=stopped
    )


@torch.inference_mode()
def evaluate_members(
    members: Sequence[Member],
    *,
    num_images: int,
    precision: str,
    session: Session,
    flip: bool = False,
    measure: Measure = TRAINING,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Metrics]:
    """Score the models of each member as `evaluate` does, and the average of all as ENSEMBLE where there are several.

    Several members read the same images, in batches of the same size, each in its own preprocessing. Averaged are
    probabilities: of an image's crops, of each and its mirror image with `flip`, and then of the members.
    """
    start = time.perf_counter()
    device, measure = session.device, measure.to(session.device)
    names = [name for member in members for name in member.models]
    several = [ENSEMBLE] if len(members) > 1 else []
    totals = {name: no_sums(measure, device) for name in (*names, *several)}
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # images, skipped images
    with _evaluating([model for member in members for model in member.models.values()]):
        for parts in zip(*(member.batches for member in members), strict=True):
            first = _the_same_images(parts)
            labels, keys = (tensor.to(device, non_blocking=True) for tensor in (first.labels, first.keys))
            counts += torch.tensor([len(first.labels), len(first.errors)]).to(device, non_blocking=True)
            scores: dict[str, Tensor] = {}
            for member, batch in zip(members, parts, strict=True) if len(first.labels) else ():
                scores |= _scores(member, batch.images, labels, flip=flip, precision=precision)
            if several and scores:
                scores[ENSEMBLE] = average(torch.stack(list(scores.values())))
            for name, logits in scores.items():
                _add(totals[name], batch_sums(logits, labels, keys, measure))
            if stopped():
                raise Interrupted
    session.sum_(counts)
    images, skipped = counts.tolist()
    assert images + skipped == num_images, f"{images} images counted and {skipped} skipped of {num_images}"
    rate = num_images / (time.perf_counter() - start)
    for total in totals.values():
        for tensor in total.values():
            session.sum_(tensor)
    return {
        name: to_metrics(total, images=images, skipped=skipped, images_per_s=rate) for name, total in totals.items()
    }


def _the_same_images(parts: Sequence[Batch]) -> Batch:
    """Return the first of the members' batches, having seen that all are of the same images."""
    first = parts[0]
    for other in parts[1:]:
        assert torch.equal(first.keys, other.keys), "the members' batches are of different images"
        assert torch.equal(first.labels, other.labels), "the members' labels of the same images differ"
    return first


def _scores(member: Member, pixels: Tensor, labels: Tensor, *, flip: bool, precision: str) -> dict[str, Tensor]:
    """Return each model's scores (N, K) of a batch: logits, or where there are several views their average."""
    pixels = pixels.to(labels.device, non_blocking=True)
    views: dict[str, list[Tensor]] = {name: [] for name in member.models}
    # A view at a time: what the networks need of the memory is that of one.
    for view in pixels.unbind(1) if pixels.ndim == 5 else (pixels,):
        inputs = normalize(view, member.preprocess.mean, member.preprocess.std)
        for images in (inputs, inputs.flip(-1)) if flip else (inputs,):
            for name, model in member.models.items():
                with autocast(labels.device, precision):
                    logits = model(member.attack(model, images, labels))
                views[name].append(logits.float())
    return {name: average(torch.stack(logits)) for name, logits in views.items()}


def _add(total: Sums, sums: Sums) -> None:
    assert total.keys() == sums.keys()
    for name, tensor in sums.items():
        total[name] += tensor
