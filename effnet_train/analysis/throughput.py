"""How fast networks train and evaluate, beside timm's and torchvision's: all in turn."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session
from effnet_train.engine.evaluate import autocast
from effnet_train.engine.graph import GraphStepper
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.train import Stepper
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.folding import PLAIN, folded
from effnet_train.models.turning import turn
from effnet_train.optim.ema import EMA
from effnet_train.optim.losses import CrossEntropy
from effnet_train.optim.one_pass import OnePass
from effnet_train.optim.param_groups import param_groups

LIBRARIES = ("ours", "timm", "torchvision")
# What `torch.compile` is told: "reduce-overhead" has CUDA graphs.
COMPILED: Mapping[str, Mapping[str, Any]] = {"compiled": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
MODES = ("eager", *COMPILED)
OWN_MODES = ("fused", "graph")  # our training by GPU kernels; and captured as CUDA graphs as well
_CLASSES = 1000
_FIRST_CALLS = {"cuda": 5, "cpu": 3}  # that count for nothing: on a GPU the fourth captures graphs
_LR, _DECAY, _SMOOTHING, _EMA_DECAY = 1e-3, 1e-5, 0.1, 0.9999
_RMSPROP: Mapping[str, Any] = {"alpha": 0.9, "momentum": 0.9, "eps": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: a library's network of a variant, in one mode, training or not. A plain value, for processes.

    `config` are the arguments of our network; the others know the variant by its name.
    """

    library: str
    variant: str
    config: Mapping[str, Any]
    training: bool
    resolution: int
    batch_size: int
    precision: str = "fp32"
    mode: str = "eager"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Return what tables call it."""
        return self.library if self.mode == "eager" else f"{self.library}, {self.mode}"


class Timed(Protocol):
    """What is measured in turn with others."""

    def prepared(self) -> float:
        """Do all that comes first, as compiling, and return the seconds of a call."""

    def timed(self, count: int) -> float:
        """Return the seconds of `count` calls."""


@dataclass(frozen=True)
class Work:
    """One step on a batch, or one forward pass of it, to be called again and again; `path`: what the network became."""

    run: Callable[[], object]
    device: str
    path: str = PLAIN

    def prepared(self) -> float:
        """Make the first calls, and return the seconds of the last of them."""
        for _ in range(_FIRST_CALLS[self.device]):
            once = self.timed(1)
        return once

    def timed(self, count: int) -> float:
        """Return the seconds of `count` calls."""
        start = perf_counter()
        for _ in range(count):
            self.run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start


def has(library: str, variant: str) -> bool:
    """Say whether a library has an EfficientNet of this name."""
    if library == "timm":
        import timm

        return bool(timm.is_model(f"tf_efficientnet_{variant}"))
    if library == "torchvision":
        from torchvision.models import list_models

        return f"efficientnet_{variant}" in list_models()
    return True


def default_batch_size(activations: int, device: str) -> int:
    """Return a power of two of images whose convolutions put out some 2 ** 31 numbers in all, on a CPU 2 ** 27."""
    images = 2 ** (31 if device == "cuda" else 27) / activations
    return min(1024, max(4, 2 ** round(math.log2(images))))


def build(case: Case) -> Work:
    """Build a case's network and batch, random and the same ones every time."""
    torch.manual_seed(0)
    device = torch.device(case.device)
    model = _network(case).to(device).to(memory_format=torch.channels_last)
    if case.training:
        return _training(case, model.train(), device)
    path = PLAIN
    model.eval()
    if case.library == "ours" and case.mode == "eager":
        model, path = folded(turn(model, case.device == "cpu"), "auto", device=device, precision=case.precision)
    if case.mode in COMPILED:
        model.compile(**COMPILED[case.mode])
    images = _images(case, device)

    @torch.inference_mode()
    def run() -> None:
        with autocast(device, case.precision):
            model(images)

    return Work(run, case.device, path)


def _network(case: Case) -> nn.Module:
    if case.library == "timm":
        import timm

        rates = {"drop_rate": case.config["dropout"], "drop_path_rate": case.config["drop_connect"]}
        return timm.create_model(f"tf_efficientnet_{case.variant}", num_classes=_CLASSES, **rates)
    if case.library == "torchvision":
        from torchvision.models import get_model

        return get_model(f"efficientnet_{case.variant}", num_classes=_CLASSES)
    return EfficientNet(**{**case.config, "fused": case.mode in OWN_MODES}, num_classes=_CLASSES)


def _images(case: Case, device: torch.device) -> torch.Tensor:
    images = torch.randn(case.batch_size, 3, case.resolution, case.resolution)
    return images.to(device).to(memory_format=torch.channels_last)


def _training(case: Case, model: nn.Module, device: torch.device) -> Work:
    """Return a whole optimizer step: forward, loss, backward, RMSProp, average."""
    labels = torch.randint(_CLASSES, (case.batch_size,)).to(device)
    if case.library == "ours":
        return _our_step(case, model, labels, device)
    criterion: nn.Module
    if case.library == "timm":
        from timm.loss import LabelSmoothingCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        optimizer = create_optimizer_v2(model, opt="rmsproptf", lr=_LR, weight_decay=_DECAY, **_RMSPROP)
        criterion, average = LabelSmoothingCrossEntropy(_SMOOTHING), ModelEmaV3(model, decay=_EMA_DECAY)
        update: Callable[[nn.Module], object] = average.update
    else:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        optimizer = torch.optim.RMSprop(param_groups(model, _DECAY), lr=_LR, **_RMSPROP)
        criterion = nn.CrossEntropyLoss(label_smoothing=_SMOOTHING)
        update = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_EMA_DECAY), use_buffers=True).update_parameters
    if case.mode in COMPILED:
        model.compile(**COMPILED[case.mode])
    images = _images(case, device)

    def run() -> None:
        with autocast(device, case.precision):
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(model)

    return Work(run, case.device)


def _our_step(case: Case, model: nn.Module, labels: torch.Tensor, device: torch.device) -> Work:
    """Return the training loop's own step, from bytes, which it normalises: what the others are spared."""
    from timm.optim.rmsprop_tf import RMSpropTF

    turn(model, case.device == "cpu")
    ema = EMA(model, _EMA_DECAY)
    if case.mode in COMPILED:
        model.compile(**COMPILED[case.mode])
    state = TrainState(
        model=model,
        ema=ema,
        optimizer=RMSpropTF(param_groups(model, _DECAY), lr=_LR, **_RMSPROP),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        statistics=no_statistics(device),
    )
    parts: dict[str, Any] = {
        "network": model,
        "loss": CrossEntropy(label_smoothing=_SMOOTHING),
        "preprocess": Preprocess(case.resolution),
        "num_classes": _CLASSES,
        "precision": case.precision,
        "session": Session(device=device),
    }
    graph = case.mode == "graph"
    step = GraphStepper(**parts, update=OnePass(state.optimizer, ema)) if graph else Stepper(**parts)
    pixels = torch.randint(256, (case.batch_size, case.resolution, case.resolution, 3), dtype=torch.uint8)
    batch = Batch(pixels.to(device), labels, torch.arange(case.batch_size).to(device), [])
    return Work(lambda: step(state, [batch], _LR), case.device)


def interleaved(
    works: Mapping[str, Timed],
    *,
    rounds: int,
    seconds: float,
    told: Callable[[str], None] = lambda _: None,
    quiet: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of one call of each work in each of `rounds`; in each, all are measured for `seconds` in turn.

    So a machine that gets slower does so for all. What comes first (compiling, choosing algorithms) does not count, and
    `quiet` waits, before the first round, for what else is at work. Who is not ready in time is left out.
    """
    counts = {}
    for name, work in works.items():
        try:
            counts[name] = max(1, round(seconds / work.prepared()))
            told(f"{name} is ready")
        except TimeoutError as error:
            warnings.warn(f"{error}: left out", stacklevel=2)
    quiet()
    times: dict[str, list[float]] = {name: [] for name in counts}
    for number in range(rounds):
        for name, count in counts.items():
            times[name].append(works[name].timed(count) / count)
        told(f"round {number + 1} of {rounds}")
    return times


def ratios(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Return how many times as fast as `reference` each is: the median over rounds of the ratio within a round."""
    return {
        name: median(other / own for own, other in zip(found, times[reference], strict=True))
        for name, found in times.items()
    }
