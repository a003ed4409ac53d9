"""Mixup and CutMix, on the device, by the samples' keys."""

import math

import torch
from torch import Tensor

from effnet_train.data.keys import integer, rng

# The keys' first stream has already drawn the augmentation.
_STREAM = 1


class Mixing:
    """Mix image 2k of a batch with image 2k + 1, which the order of an epoch has made a random one.

    The pair's mixture is drawn from the key of 2k: ranks and micro-batches of even size do not change it. Each alpha is
    the parameter of Beta(alpha, alpha), 0 for none; with both, a pair is cut with probability `switch_prob`. `prob` is
    the share of the pairs that are mixed. Source: Zhang et al., "mixup", 2018; Yun et al., "CutMix", 2019.
    Raises ValueError.
    """

    def __init__(
        self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, *, prob: float = 1.0, switch_prob: float = 0.5
    ) -> None:
        for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= value < math.inf:
                raise ValueError(f"mixing.{name}={value} must be 0, for none, or positive")
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"mixing.{name}={value} must be a probability: from 0 to 1")
        self.mixup_alpha, self.cutmix_alpha, self.prob, self.switch_prob = mixup_alpha, cutmix_alpha, prob, switch_prob

    @property
    def enabled(self) -> bool:
        """Tell whether anything is mixed; then batches must be even."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def __call__(self, images: Tensor, labels: Tensor, keys: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets: float images (N, 3, H, W), labels (N,), keys (N,) int64 on the CPU.

        Labels may be probabilities (N, num_classes) too.

        The targets are probabilities (N, num_classes) float32; where nothing is mixed, the labels themselves.
        The host does not wait for the device. Raises ValueError for an odd N.
        """
        if not self.enabled:
            return images, labels
        if len(images) % 2:
            raise ValueError(
                f"mixup and cutmix pair the images of a batch, and this one has {len(images)}: make batch_size "
                "divisible by 2 x ranks x accumulate, or set mixing.mixup_alpha=0 mixing.cutmix_alpha=0"
            )
        height, width = images.shape[2:]
        drawn = torch.tensor([self.draw(key, height, width) for key in keys[::2].tolist()], dtype=torch.float32)
        if images.is_cuda:
            drawn = drawn.pin_memory()
        # Each (pairs, 1, 1, 1), to meet rows and columns.
        share, top, left, bottom, right = drawn.to(images.device, non_blocking=True)[:, :, None, None, None].unbind(1)
        rows = torch.arange(height, device=images.device)[:, None]
        columns = torch.arange(width, device=images.device)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        # A cut pair keeps the whole of its own pixels outside the box, and none inside.
        weight = torch.where(bottom > top, (~inside).to(images.dtype), share.to(images.dtype))[:, :, None]
        pairs = images.unflatten(0, (-1, 2))
        mixed = torch.lerp(pairs.flip(1), pairs, weight).flatten(0, 1)
        classes = torch.arange(num_classes, device=labels.device)
        probabilities = labels if labels.ndim == 2 else (labels[:, None] == classes).to(torch.float32)
        one_hot = probabilities.unflatten(0, (-1, 2))
        targets = torch.lerp(one_hot.flip(1), one_hot, share[:, 0]).flatten(0, 1)
        return mixed, targets

    def draw(self, key: int, height: int, width: int) -> tuple[float, int, int, int, int]:
        """Return a pair's mixture: the share of its own that an image keeps, and the box (top, left, bottom, right).

        The box is empty for mixup.
        """
        generator = rng(key, _STREAM)
        if generator.random() >= self.prob:
            return 1.0, 0, 0, 0, 0
        cut = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or generator.random() < self.switch_prob)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        # Python promises random()'s sequence only, but has never changed this method, which is built upon it.
        share = generator.betavariate(alpha, alpha)
        if not cut:
            return share, 0, 0, 0, 0
        half_height, half_width = (int(size * math.sqrt(1 - share)) // 2 for size in (height, width))
        y, x = integer(generator, height), integer(generator, width)
        top, bottom = max(0, y - half_height), min(height, y + half_height)
        left, right = max(0, x - half_width), min(width, x + half_width)
        # The share of the pixels, which the image's border may have made more.
        return 1 - (bottom - top) * (right - left) / (height * width), top, left, bottom, right
