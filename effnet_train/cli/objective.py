"""What a run minimises, from its configuration: the labels' loss, or with it a teacher's, or that of an attack."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from effnet_train.cli import build
from effnet_train.data.classes import match_classes
from effnet_train.data.datasets import Data
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session
from effnet_train.engine.adversarial import Adversarial, AdvProp
from effnet_train.engine.checkpoint import find_checkpoint
from effnet_train.engine.objectives import Objective, supervised
from effnet_train.engine.teacher import Distill, Distillation, Teacher, fingerprint
from effnet_train.models.pretrained import class_names
from effnet_train.models.published import is_name, is_other_of_timm, other_of_timm, timm_preprocess


def check_objective(cfg: DictConfig) -> None:
    """Check, before anything is built, what `build_objective` will be asked for.

    Raises ValueError; FileNotFoundError of a teacher that is not there.
    """
    teacher = _distill(cfg).teacher
    chosen = {"distill.teacher=": teacher, "advprop.epsilon=": _advprop(cfg).epsilon}
    keys = [key for key, value in chosen.items() if value]
    if len(keys) > 1:
        raise ValueError(f"{' and '.join(keys)} are two objectives: choose one")
    if keys and cfg.cuda_graph:
        raise ValueError(f"cuda_graph=true captures the labels' loss only: with {keys[0]} set cuda_graph=false")
    if cfg.advprop.epsilon and (cfg.freeze.up_to != 0 or cfg.freeze.batch_norm):
        raise ValueError("freeze= keeps BatchNorms as they are, and advprop.epsilon= trains two of each: choose one")
    if cfg.advprop.epsilon and cfg.model.get("fused") is True:
        raise ValueError(
            "model.fused=true: the fused kernels have no auxiliary BatchNorm: with advprop.epsilon= set "
            "model.fused=auto or false"
        )
    if teacher is not None and not is_name(teacher):
        find_checkpoint(Path(teacher), "distill.teacher")


def build_objective(
    cfg: DictConfig, model: nn.Module, data: Data, session: Session, former: Mapping[str, Any] | None
) -> tuple[Objective, dict[str, Any]]:
    """Return the objective of training `model`, and what the run's metadata are to say of it.

    `former` are the metadata of a run that goes on.
    Raises ValueError where the teacher knows other classes, or is another one than the run began with.
    """
    distill, advprop = _distill(cfg), _advprop(cfg)
    if advprop.epsilon:
        return Adversarial(model, advprop, data.preprocess), {}
    if distill.teacher is None:
        return supervised, {}
    name = f"distill.teacher={distill.teacher}"
    network, own, known_classes = _teacher(distill, session)
    try:
        # Of those that are the data set's: `index` has the others behind them.
        classes = match_classes(data.classes, known_classes, distill.classes)[: len(data.classes)]
    except ValueError as error:
        raise ValueError(f"{name}: {error} (the key is distill.classes)") from error
    known = {"distill": {"teacher": distill.teacher, "sha256": fingerprint(network)}}
    was = (former or {}).get("distill", known["distill"])
    if was["sha256"] != known["distill"]["sha256"]:
        raise ValueError(
            f"{name} holds other weights than those that this run began with: give them back, or begin another run "
            "(name=...)"
        )
    size = distill.resolution if isinstance(distill.resolution, int) else None
    size = own.resolution if distill.resolution == "teacher" else size
    teacher = Teacher(network, own=own, student=data.preprocess, resolution=size, classes=classes)
    return Distillation(teacher, distill.temperature, distill.weight), known


def _teacher(distill: Distill, session: Session) -> tuple[nn.Module, Preprocess, list[str]]:
    """Return a teacher's network, with the preprocessing and the classes that it was trained with."""
    name = distill.teacher
    assert name is not None
    if not is_other_of_timm(name):
        network, meta = build.load_model(name, session, which=distill.weights, source=distill.source)
        return network, Preprocess(**meta["preprocess"]), list(meta["classes"])
    if distill.source is not None:
        raise ValueError(f"distill.source={distill.source}: {name} says itself what it is; leave it away")
    with session.main_first():
        network, cfg = other_of_timm(name)
    network = network.to(session.device).to(memory_format=torch.channels_last)
    return network, Preprocess(**timm_preprocess(cfg)), class_names(cfg["num_classes"])


def _advprop(cfg: DictConfig) -> AdvProp:
    values: Any = OmegaConf.to_container(cfg.advprop, resolve=True)
    return AdvProp(**values)


def _distill(cfg: DictConfig) -> Distill:
    values: Any = OmegaConf.to_container(cfg.distill, resolve=True)
    return Distill(**values)
