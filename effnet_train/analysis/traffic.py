"""How many bytes a training step moves through memory, counted from the operations that it calls."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effnet_train.analysis.complexity import kept_numbers

# What reads its tensors twice: BatchNorm, for the statistics or sums first.
_TWICE = ("native_batch_norm", "native_batch_norm_backward")
# What moves nothing: allocations, and a copy to channels-last order, which convolutions lack on the meta device alone.
_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "clone")


@dataclass(frozen=True)
class Traffic:
    """Hold bytes an image: read and written by a forward and a backward pass, and kept from one to the other."""

    moved: int
    kept: int


def training_traffic(model: nn.Module, resolution: int, *, dtype: torch.dtype = torch.bfloat16) -> Traffic:
    """Count the traffic of training `model` on images of `resolution` pixels a side, all in `dtype`.

    It is what the operations ask for: each reads its inputs once (BatchNorm twice) and writes its outputs once, as if
    no cache held what the next one reads. Nothing is computed and `model` is not touched. What no image adds to, as the
    weights, is left out.
    """
    # So many that there are no more partial sums with more images: see `fused.launch`.
    few, more = (_moved(model, resolution, count, dtype) for count in (512, 1024))
    return Traffic((more - few) // 512, sum(kept_numbers(model, resolution).values()) * dtype.itemsize)


def _moved(model: nn.Module, resolution: int, count: int, dtype: torch.dtype) -> int:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {
        name: torch.empty_like(tensor, device="meta", dtype=dtype, requires_grad=False) for name, tensor in tensors
    }
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    images = torch.empty(count, 3, resolution, resolution, device="meta", dtype=dtype)
    images = images.to(memory_format=torch.channels_last)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with _Bytes() as total:
            functional_call(model, state, images).sum().backward()
    finally:
        for module, mode in modes:
            module.training = mode
    return total.moved


class _Bytes(TorchDispatchMode):
    """Add up what operations read and write; views and allocations do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        storages = {leaf.untyped_storage() for leaf in inputs}
        made = [leaf for leaf in outputs if leaf.untyped_storage() not in storages]
        if name not in _NOTHING and (made or func._schema.is_mutable or name == "traffic"):
            written = outputs if func._schema.is_mutable else made
            read = sum(leaf.nbytes for leaf in inputs) * (2 if name in _TWICE else 1)
            self.moved += read + sum(leaf.nbytes for leaf in written)
        return result
