"""Everything that changes while a model trains, and nothing that can be computed."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from effnet_train.distributed import Session
from effnet_train.models.auxiliary import auxiliary_tensors, main_tensors
from effnet_train.optim.ema import EMA


def no_statistics(device: torch.device) -> Tensor:
    """Return what the step adds up between two log lines, float64 (5,), when it has seen nothing.

    Summed loss, hits, images, images skipped; and the first step whose loss was not finite, infinity where none was.
    """
    return torch.tensor([0.0, 0.0, 0.0, 0.0, torch.inf], dtype=torch.float64, device=device)


@dataclass
class TrainState:
    """Weights, average, optimizer, scaler, step, the best score so far and the statistics since the last log line.

    `step` counts optimizer steps done; learning rate, sample order and all random numbers follow from it.
    `evaluated` is the last step that was evaluated.
    """

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    statistics: Tensor
    step: int = 0
    evaluated: int = 0
    best: dict[str, float] = field(default_factory=dict)

    @cached_property
    def running_statistics(self) -> list[Tensor]:
        """Return BatchNorm's running means and variances, but frozen ones: an average over ranks would round them."""
        trained = [module for module in self.model.modules() if module.training]
        buffers = [buffer for module in trained for buffer in module.buffers(recurse=False)]
        return [buffer for buffer in buffers if buffer.is_floating_point()]

    @property
    def summed(self) -> list[Tensor]:
        """Return what a forward pass changes: running statistics, and the sums between log lines."""
        return [*self.running_statistics, self.statistics]

    def is_finite(self) -> bool:
        """Say whether every weight, running statistic and average is a finite number. Waits for the device."""
        tensors = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        return bool(torch.stack([t.isfinite().all() for t in tensors if t.is_floating_point()]).all())

    def state_dict(self, session: Session) -> dict[str, Any]:
        """Return what a checkpoint holds, the same on every rank: tensors and plain values. Every rank must call it."""
        total = self.statistics.clone()
        session.sum_(total[:4])
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": dict(self.best),
            "model": main_tensors(self.model.state_dict()),
            "auxiliary": auxiliary_tensors(self.model.state_dict()),  # what only training needs of the model
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "statistics": total,
        }

    def load_state_dict(self, state: dict[str, Any], session: Session) -> None:
        """Take up the state of `state_dict`, saved by any number of ranks."""
        self.model.load_state_dict({**state["model"], **state.get("auxiliary", {})})
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.evaluated, self.best = state["step"], state["evaluated"], dict(state["best"])
        # The sums were taken over all ranks: one of them carries them on.
        self.statistics.copy_(state["statistics"] if session.is_main else no_statistics(self.statistics.device))
