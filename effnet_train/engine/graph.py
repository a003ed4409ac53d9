"""The step as CUDA graphs: the host starts two graphs instead of a few thousand kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn

from effnet_train.data.loader import Batch
from effnet_train.distributed import Session
from effnet_train.engine.evaluate import HALVES
from effnet_train.engine.state import TrainState
from effnet_train.engine.train import Stepper
from effnet_train.engine.working_weights import WorkingWeights
from effnet_train.optim.ema import ema_decay
from effnet_train.optim.one_pass import OnePass

_EAGER_STEPS = 3  # of a process, before it captures: libraries choose their algorithms, kernels are compiled


def check_graph(session: Session, *, precision: str, on_nan: str, compiled: bool, layer_decay: float = 1.0) -> None:
    """Raise ValueError, naming the key, where a step cannot be captured."""
    why = {
        f"device={session.device.type} has no CUDA graphs": session.device.type != "cuda",
        f"the {session.world_size} ranks meet within a step": session.world_size > 1,
        "precision=fp16 has the host read its scale in every step: bf16 has none": precision == "fp16",
        "on_nan=skip has the host wait in every step: stop and rollback do not": on_nan == "skip",
        f"layer_decay={layer_decay} asks for several learning rates": layer_decay != 1,
        "compile=true captures graphs of its own": compiled,
    }
    reasons = [reason for reason, holds in why.items() if holds]
    if reasons:
        raise ValueError(f"cuda_graph=true cannot be: {'; '.join(reasons)}. Change that, or use cuda_graph=false")


@cache
def _stream() -> torch.cuda.Stream:
    """Return the one stream for all that: each has memory of its own that it does not give back."""
    return torch.cuda.Stream()


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Return what repeats `run`, captured now and not executed, on the same memory."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, which fetch batches and write checkpoints, may go on meanwhile.
    with torch.cuda.graph(graph, stream=_stream(), capture_error_mode="thread_local"):
        run()
    return graph.replay


def aside(run: Callable[[], None]) -> None:
    """Execute `run` in the stream that will capture it, as that wants it done before."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


class Memory:
    """What graphs read, and the graphs; `eager` counts the steps that are left before they are captured."""

    def __init__(self) -> None:
        self.eager = _EAGER_STEPS
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self.scalars: dict[str, Tensor] = {}
        self.weights: WorkingWeights | None = None
        self._graphs: dict[str, Callable[[], None]] = {}

    def take(self, images: Tensor, targets: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put a micro-batch where the graphs read it, and return it from there."""
        if self.inputs is None:
            self.inputs = torch.empty_like(images), torch.empty_like(targets), torch.empty_like(keys)
        for own, tensor in zip(self.inputs, (images, targets, keys), strict=True):
            own.copy_(tensor)
        return self.inputs

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Do the work: by its graph, which is made first where it is time."""
        if self.eager > 0:
            aside(work)
            return
        if name not in self._graphs:
            self._graphs[name] = captured(work)
        self._graphs[name]()


@dataclass(frozen=True, kw_only=True)
class GraphStepper(Stepper):
    """A step in two graphs: of a micro-batch, forward and backward, and of what updates weights and averages.

    What differs from step to step they read from memory that stays where it is: images, targets and keys; the number of
    the step, its learning rate, and how far averages go.
    """

    update: OnePass
    memory: Memory = field(default_factory=Memory)

    def __call__(self, state: TrainState, batch: Sequence[Batch], lr: float) -> bool:
        """Train `state` on the equal micro-batches of `batch`; the host waits for nothing."""
        assert len(batch) == self.accumulate
        memory, device = self.memory, self.session.device
        if not memory.scalars:
            memory.scalars = {name: torch.zeros((), device=device) for name in ("number", "lr", "follow")}
            memory.weights = WorkingWeights(state.model, HALVES.get(self.precision))
        follow = 1.0 - ema_decay(state.step + 1, state.ema.decay)
        for name, value in (("number", state.step + 1), ("lr", lr), ("follow", follow)):
            memory.scalars[name].fill_(value)
        for part in batch:
            images, targets, keys = memory.take(*self.inputs(part))
            number = memory.scalars["number"]
            memory.run("learn", partial(self.learn, state, images, targets, keys, number))
            state.statistics[3] += len(part.errors)
        memory.run("update", partial(self._update, state))
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        self.update.count()
        state.step += 1
        memory.eager -= 1
        return True

    def learn(self, state: TrainState, images: Tensor, targets: Tensor, keys: Tensor, number: float | Tensor) -> None:
        """Add a micro-batch to gradients and statistics as `Stepper` does: the same numbers, by fewer kernels."""
        assert self.memory.weights is not None
        with self.memory.weights.at_work():
            super().learn(state, images, targets, keys, number)

    def _update(self, state: TrainState) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), self.clip_norm)
        self.update(self.memory.scalars["lr"], self.memory.scalars["follow"])
