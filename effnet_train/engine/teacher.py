"""Knowledge distillation: another network's outputs, on the very pixels that the student sees, as targets."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.data.classes import Match
from effnet_train.data.preprocess import Preprocess
from effnet_train.engine.objectives import Loss
from effnet_train.optim.losses import distillation


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Which teacher there is, if any, and how much it counts. Raises ValueError.

    The loss is `weight` x the teacher's, softened by `temperature`, + (1 - `weight`) x the labels'. `resolution` is
    that at which the teacher sees what the student sees: its own, the student's, or so many pixels.
    """

    teacher: str | None = None
    source: str | None = None
    weights: Literal["ema", "raw"] = "ema"
    classes: Match = "same"
    resolution: int | Literal["teacher", "student"] = "teacher"
    temperature: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature={self.temperature} must be more than 0")
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"distill.weight={self.weight} must be the teacher's share of the loss: above 0, at most 1"
            )
        if isinstance(self.resolution, int) and self.resolution < 1:
            raise ValueError(f"distill.resolution={self.resolution} must be at least 1, or teacher, or student")
        idle = [one for one in fields(self) if one.name != "teacher" and getattr(self, one.name) != one.default]
        if self.teacher is None and idle:
            raise ValueError(
                f"distill.{idle[0].name}={getattr(self, idle[0].name)} needs a teacher: give distill.teacher=..., a "
                "run's folder, a file, or a name as timm:tf_efficientnet_b4.aa_in1k"
            )


class Teacher(nn.Module):
    """A network in evaluation mode that takes the student's inputs: its logits of the student's classes.

    The inputs become pixels again by the `student`'s normalisation, are scaled to `resolution` (None: are as large as
    they are), and get the teacher's `own`. `classes` are the places of the student's classes among the teacher's.
    """

    def __init__(
        self, model: nn.Module, *, own: Preprocess, student: Preprocess, resolution: int | None, classes: Sequence[int]
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.resolution = resolution
        device = next(model.parameters()).device
        self.classes = torch.tensor(classes, device=device)
        self.mean, self.std, self.own_mean, self.own_std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (student.mean, student.std, own.mean, own.std)
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map the student's inputs (N, 3, H, W) to logits (N, K) in float32."""
        pixels = images * self.std + self.mean
        if self.resolution is not None and images.shape[-1] != self.resolution:
            size = (self.resolution, self.resolution)
            # Clipped as an image's pixels are: bicubic overshoots at edges.
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        inputs = (pixels - self.own_mean) / self.own_std
        return self.model(inputs)[:, self.classes].float()


@dataclass(frozen=True)
class Distillation:
    """The objective of a student."""

    teacher: Teacher
    temperature: float
    weight: float

    def __call__(
        self, network: nn.Module, loss: Loss, images: Tensor, targets: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the two losses' weighted sum, and the student's logits."""
        soft = self.teacher(images)
        logits = network(images, keys)
        taught = distillation(logits, soft, temperature=self.temperature)
        return self.weight * taught + (1 - self.weight) * loss(logits, targets), logits


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a network's weights: a run must not go on with another teacher than it began with."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
