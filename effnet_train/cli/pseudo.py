"""A run's images from its configuration: the labelled ones, and pseudo-labelled ones beside them."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from effnet_train.cli import build
from effnet_train.data.datasets import Data
from effnet_train.data.pseudo import (
    CHOSEN,
    SOFT,
    Joined,
    Mixture,
    Pseudo,
    PseudoLabelled,
    SoftLabels,
    hard,
    read_manifest,
)
from effnet_train.distributed import Session
from effnet_train.engine.label import names_digest


@dataclass(frozen=True)
class Reading:
    """What the steps read, and how their labels become targets; `known` is for the run's metadata."""

    data: Data  # whose `train` holds all of them
    mixture: Mixture
    targets: Callable[[Tensor], Tensor]
    known: Mapping[str, Any]


def pseudo_of(cfg: DictConfig) -> Pseudo:
    """Return the configuration's choice of pseudo-labels. Raises ValueError."""
    values: Any = OmegaConf.to_container(cfg.pseudo, resolve=True)
    return Pseudo(**values)


def check_pseudo(cfg: DictConfig) -> None:
    """Check, before anything is built, that there are the pseudo-labels asked for.

    Raises ValueError, FileNotFoundError.
    """
    labels = pseudo_of(cfg).labels
    if labels is not None:
        read_manifest(Path(labels))


def build_reading(cfg: DictConfig, data: Data, session: Session, former: Mapping[str, Any] | None) -> Reading:
    """Return what the steps read; `former` are the metadata of a run that goes on.

    Raises ValueError where the pseudo-labels are of other classes, of other images than lie there now, or not those
    that the run began with.
    """
    pseudo = pseudo_of(cfg)
    if pseudo.labels is None:
        return Reading(data, Mixture(data.train, len(data.train)), hard, {})
    folder, name = Path(pseudo.labels), f"pseudo.labels={pseudo.labels}"
    manifest = read_manifest(folder)
    if list(data.classes) != manifest["classes"]:
        raise ValueError(
            f"{name} are of the teacher's {len(manifest['classes'])} classes, and the data set has "
            f"{len(data.classes)}, or others: the teacher must have been trained on the same classes, in the same order"
        )
    known = {"pseudo": {"labels": pseudo.labels, "sha256": manifest["sha256"], "teacher": manifest["teacher"]}}
    if former is not None and former["pseudo"]["sha256"] != manifest["sha256"]:
        raise ValueError(f"{name} are others than this run began with: give those, or another name= for a new run")
    source = _images(manifest, pseudo, data, session)
    labelled = PseudoLabelled(source, np.load(folder / CHOSEN), data.classes, soft=pseudo.soft)
    everything = replace(data, train=Joined(data.train, labelled))
    targets = SoftLabels(np.load(folder / SOFT, mmap_mode="r")) if pseudo.soft else hard
    return Reading(everything, Mixture(everything.train, len(data.train), pseudo.ratio), targets, known)


def _images(manifest: Mapping[str, Any], pseudo: Pseudo, data: Data, session: Session) -> Any:
    """Return the source of the images that were labelled. Raises ValueError where others lie there."""
    build.check_targets({"data": manifest["data"]}, f"pseudo.labels={pseudo.labels}")
    given = {**manifest["data"], "root": pseudo.root or manifest["data"]["root"]}
    if "://" not in given["root"] and not given["root"].startswith("hub:") and not Path(given["root"]).exists():
        raise FileNotFoundError(
            f"pseudo.labels={pseudo.labels} are of the images in {given['root']}, which does not exist: give "
            "pseudo.root=, the place where they are now"
        )
    found = build.build_data(OmegaConf.create(given), session)
    source = found.val if manifest["split"] == "val" else found.train
    if len(source) != manifest["images"] or names_digest(source, given["root"]) != manifest["names_sha256"]:
        raise ValueError(
            f"pseudo.root={given['root']} holds {len(source):,} images and {manifest['images']:,} were labelled, or "
            "others: give the former folder, or run effnet-label again"
        )
    return source


def warn_of_size(cfg: DictConfig, model: nn.Module) -> None:
    """Say where the student is smaller than its teacher, which Noisy Student's is not."""
    if cfg.pseudo.labels is None:
        return
    theirs, ours = read_manifest(Path(cfg.pseudo.labels))["parameters"], sum(one.numel() for one in model.parameters())
    if ours < theirs:
        text = (
            f"the student has {ours:,} parameters and its teacher {theirs:,}: in Noisy Student it has as many or more"
        )
        print(f"warning: {text}", file=sys.stderr)
