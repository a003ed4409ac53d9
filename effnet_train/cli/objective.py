"""What a run minimises, from its configuration: the labels' loss, or a teacher's with it."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli import build
from effnet_train.data.classes import match_classes
from effnet_train.data.datasets import Data
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session
from effnet_train.engine.objectives import Objective, supervised
from effnet_train.engine.teacher import Distill, Distillation, Teacher, fingerprint


def check_objective(cfg: DictConfig) -> None:
    """Check, before anything is built, what `build_objective` will be asked for. Raises ValueError."""
    distill = _distill(cfg)
    if distill.teacher is not None and cfg.cuda_graph:
        raise ValueError("cuda_graph=true captures the labels' loss only: with distill.teacher= set cuda_graph=false")


def build_objective(
    cfg: DictConfig, data: Data, session: Session, former: Mapping[str, Any] | None
) -> tuple[Objective, dict[str, Any]]:
    """Return the objective, and what the run's metadata are to say of it; `former` are those of a run that goes on.

    Raises ValueError where the teacher knows other classes, or is another one than the run began with.
    """
    distill = _distill(cfg)
    if distill.teacher is None:
        return supervised, {}
    name = f"distill.teacher={distill.teacher}"
    model, meta = build.load_model(distill.teacher, session, which=distill.weights, source=distill.source)
    try:
        classes = match_classes(data.classes, meta["classes"], distill.classes)
    except ValueError as error:
        raise ValueError(f"{name}: {error} (the key is distill.classes)") from error
    known = {"distill": {"teacher": distill.teacher, "sha256": fingerprint(model)}}
    was = (former or {}).get("distill", known["distill"])
    if was["sha256"] != known["distill"]["sha256"]:
        raise ValueError(
            f"{name} holds other weights than those that this run began with: give them back, or begin another run "
            "(name=...)"
        )
    own = Preprocess(**meta["preprocess"])
    sizes = {"teacher": own.resolution, "student": data.preprocess.resolution}
    size = sizes.get(str(distill.resolution)) or int(distill.resolution)
    teacher = Teacher(model, own=own, student=data.preprocess, resolution=size, classes=classes)
    return Distillation(teacher, distill.temperature, distill.weight), known


def _distill(cfg: DictConfig) -> Distill:
    values: Any = OmegaConf.to_container(cfg.distill, resolve=True)
    return Distill(**values)
