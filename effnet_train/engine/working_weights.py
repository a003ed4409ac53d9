"""The weights that a captured step computes with, and the way of their gradients: a few kernels for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Pairs = list[tuple[nn.Parameter, nn.Parameter]]


class WorkingWeights:
    """Stand-ins for the parameters of `model`: in `half` (None: nothing is) where autocast would cast them.

    Autocast casts each weight by itself, and autograd casts each gradient back and adds it up: three kernels a weight.
    Here one call casts all weights, one their gradients, and one adds these up. A stand-in that is not cast shares its
    parameter's memory. The parameters' own gradients are made, zero, and stay where they are.
    """

    def __init__(self, model: nn.Module, half: torch.dtype | None) -> None:
        cast = {id(p) for m in model.modules() if half and _is_cast(m) for p in m.parameters(recurse=False)}
        self._cast: Pairs = []
        self._same: Pairs = []
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
            if id(p) in cast:
                self._cast.append((p, nn.Parameter(torch.empty_like(p, dtype=half), p.requires_grad)))
            else:
                self._same.append((p, nn.Parameter(p.detach(), p.requires_grad)))
        stand_ins = {id(p): stand_in for p, stand_in in (*self._cast, *self._same)}
        self._places = [
            (module, name, p, stand_ins[id(p)])
            for module in model.modules()
            for name, p in module.named_parameters(recurse=False)
        ]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the model compute with the stand-ins, forward and backward; then add up their gradients."""
        if self._cast:
            with torch.no_grad():
                torch._foreach_copy_([stand_in for _, stand_in in self._cast], [p for p, _ in self._cast])
        try:
            for module, name, _, stand_in in self._places:
                setattr(module, name, stand_in)
            yield
        finally:
            for module, name, p, _ in self._places:
                setattr(module, name, p)
        self._take_gradients()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        """Add the stand-ins' gradients to the parameters' own, and drop them."""
        cast_totals, cast = _gradients(self._cast)
        totals, gradients = _gradients(self._same)
        if cast:
            wide = [torch.empty_like(total) for total in cast_totals]
            torch._foreach_copy_(wide, cast)
            totals, gradients = totals + cast_totals, gradients + wide
        torch._foreach_add_(totals, gradients)
        for _, stand_in in self._cast + self._same:
            stand_in.grad = None  # where there is none, autograd leaves the next as it is, and adds nothing


def _gradients(pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    """Return the own gradients of parameters, and those of their stand-ins; what was not used has none."""
    found = [(p.grad, s.grad) for p, s in pairs if p.grad is not None and s.grad is not None]
    return [total for total, _ in found], [gradient for _, gradient in found]


def _is_cast(module: nn.Module) -> bool:
    """Say whether autocast casts the layer's parameters, whatever computes it.

    Not of depthwise convolutions, which `models.fused` computes with their weights as they are; without it, autocast
    sees to these.
    """
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
