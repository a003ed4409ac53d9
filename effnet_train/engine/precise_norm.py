"""Precise BatchNorm: running statistics computed anew, over many images instead of the last few batches."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess, normalize


@torch.no_grad()
def estimate_statistics(
    model: nn.Module, batches: Iterable[Batch], preprocess: Preprocess, device: torch.device
) -> int:
    """Set every running mean and (biased) variance to those of the layer's input over all images; return their number.

    Each batch passes through normalised by itself, as in training; nothing is dropped. The sums are in float64.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3; weighted by images.
    """
    sums: dict[nn.Module, Tensor] = {}

    def add(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        count = x.new_full((x.shape[1],), x.numel() / x.shape[1])
        found = torch.stack([count, x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        sums[norm] = sums[norm] + found if norm in sums else found

    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.train().register_forward_pre_hook(add) for norm in norms]
    images = 0
    try:
        for batch in batches:
            model(normalize(batch.images.to(device), preprocess.mean, preprocess.std))
            images += len(batch.labels)
    finally:
        for hook in hooks:
            hook.remove()
        model.eval()
    for norm, (count, total, squares) in sums.items():
        mean = total / count
        norm.running_mean.copy_(mean)  # type: ignore[operator]
        norm.running_var.copy_((squares / count - mean.square()).clamp(min=0))  # type: ignore[operator]
    return images
