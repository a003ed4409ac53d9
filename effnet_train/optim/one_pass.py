"""RMSProp's step and the average's in one kernel, which reads and writes every number once."""

from typing import Any

import torch
from timm.optim.rmsprop_tf import RMSpropTF
from torch import Tensor

from effnet_train.optim.ema import EMA

_BLOCK = 1024
# What the kernel computes, of what the optimizer could be asked for.
_PLAIN = {"centered": False, "decoupled_decay": False, "lr_in_momentum": True, "caution": False}


class OnePass:
    """Update weights by `optimizer`'s settings and the averages of `ema`, then zero the gradients.

    All state stays where it is: in the optimizer's and the average's tensors, under the names of their state dicts.
    From the first call on, the gradients have to stay where they are, too.
    Raises ValueError for another optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ema: EMA) -> None:
        groups = optimizer.param_groups
        other = [name for name, value in _PLAIN.items() for group in groups if group.get(name, value) != value]
        if not isinstance(optimizer, RMSpropTF) or other or any(group["momentum"] == 0 for group in groups):
            found = ", ".join(other) or "its momentum of 0" if isinstance(optimizer, RMSpropTF) else "another optimizer"
            raise ValueError(f"cuda_graph=true works with optim=rmsprop, without {found}: or use cuda_graph=false")
        self.optimizer = optimizer
        self.ema = ema
        self._kernel: Any = None
        self._parts: list[tuple[int, tuple[Any, ...]]] = []
        self._rest: list[tuple[Tensor, Tensor]] = []  # averages of what the optimizer does not have

    @torch.no_grad()
    def __call__(self, rate: Tensor, follow: Tensor) -> None:
        """Take a step of the learning rate `rate`; averages go `follow` of their way to the weights: both scalars.

        The optimizer's own count of steps is on the host and is left to `count`, which no graph can capture.
        """
        if self._kernel is None:
            self._prepare()
        for programs, arguments in self._parts:
            tables, scalars = arguments
            self._kernel[(programs,)](*tables, rate, follow, *scalars, BLOCK=_BLOCK)
        if self._rest:
            averages, sources = map(list, zip(*self._rest, strict=True))
            differences = torch._foreach_sub(sources, averages)
            torch._foreach_mul_(differences, follow)
            torch._foreach_add_(averages, differences)

    def count(self) -> None:
        """Count a step, as the optimizer does for each of its tensors."""
        torch._foreach_add_([state["step"] for state in self.optimizer.state.values()], 1)

    def _prepare(self) -> None:
        from effnet_train.optim.one_pass_kernel import update

        averages = {source.data_ptr(): average for average, source in self.ema.pairs()}
        for group in self.optimizer.param_groups:
            if not group["params"]:  # all frozen
                continue
            tensors = [(p, p.grad, *self._state(p), averages.pop(p.data_ptr())) for p in group["params"]]
            for parts in tensors:
                assert all(part.dtype == torch.float32 and _order(part) == _order(parts[0]) for part in parts)
            device = group["params"][0].device
            blocks = [(i, start) for i, (p, *_) in enumerate(tensors) for start in range(0, p.numel(), _BLOCK)]
            owners, starts = torch.tensor(blocks, dtype=torch.int32, device=device).T.contiguous()
            addresses = torch.tensor([[part.data_ptr() for part in parts] for parts in tensors], device=device)
            sizes = torch.tensor([p.numel() for p, *_ in tensors], device=device)
            decays = torch.full((len(tensors),), group["weight_decay"], dtype=torch.float32, device=device)
            scalars = group["alpha"], group["momentum"], group["eps"]
            self._parts.append((len(blocks), ((addresses, sizes, decays, owners, starts), scalars)))
        self._rest = [(average, source) for average, source in self.ema.pairs() if source.data_ptr() in averages]
        self._kernel = update

    def _state(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean square and the momentum of a parameter, made as the optimizer makes them."""
        state = self.optimizer.state[p]
        if not state:
            state |= {
                "step": torch.tensor(0.0),
                "square_avg": torch.ones_like(p),
                "momentum_buffer": torch.zeros_like(p),
            }
        for name in ("square_avg", "momentum_buffer"):
            if _order(state[name]) != _order(p):  # as a checkpoint may have left it
                state[name] = torch.empty_like(p).copy_(state[name])
        return state["square_avg"], state["momentum_buffer"]


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Return what tells how a dense tensor's numbers follow one another: strides, but of single numbers."""
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
