"""The stages of a run: what each trains with, from the configuration."""

from collections.abc import Sequence
from functools import partial

from hydra.utils import instantiate
from omegaconf import DictConfig

from effnet_train.cli import build
from effnet_train.distributed import Session
from effnet_train.engine.progressive import Stage, Strength
from effnet_train.engine.train import whole_steps


def build_stages(cfg: DictConfig, num_images: int) -> list[Stage]:
    """Return the stages of a run over `num_images`, of which `max_steps` moves none. Raises ValueError."""
    policy = cfg.augment.policy
    final = Strength(
        resolution=cfg.data.preprocess.resolution,
        dropout=cfg.model.dropout,
        magnitude=policy.get("magnitude") if policy is not None else None,
        mixup_alpha=cfg.mixing.mixup_alpha,
    )
    stages = instantiate(cfg.progressive)(final, whole_steps(cfg.epochs, num_images, cfg.batch_size))
    if cfg.cuda_graph and len(stages) > 1:
        raise ValueError(
            f"cuda_graph=true cannot be with progressive.stages={cfg.progressive.stages}: a graph has one size and one "
            "strength; use cuda_graph=false"
        )
    return stages


def micro_batches(
    cfg: DictConfig, stages: Sequence[Stage], classes: int, precision: str, session: Session
) -> list[int]:
    """Return the micro-batches of each stage: with `accumulate=auto`, as few as the memory asks for at its pixels."""
    fit = partial(build.resolve_accumulate, cfg, session.world_size, session.device, classes, precision)
    return [fit(stage.strength.resolution) for stage in stages]


def whole_size_steps(stages: Sequence[Stage], total_steps: int) -> float:
    """Return how many steps at the last stage's pixels take as long as the first `total_steps`, by their pixels."""
    last = stages[-1].strength.resolution
    steps = [max(0, min(stage.stop, total_steps) - stage.start) for stage in stages]
    return sum(n * (stage.strength.resolution / last) ** 2 for n, stage in zip(steps, stages, strict=True))


def describe_stages(stages: Sequence[Stage]) -> str:
    """Word what changes from stage to stage."""
    parts = []
    for stage in stages:
        strength = stage.strength
        words = [f"{strength.resolution} pixels", f"dropout {strength.dropout:.3g}"]
        words += [f"magnitude {strength.magnitude:.3g}"] if strength.magnitude is not None else []
        words += [f"mixup {strength.mixup_alpha:.3g}"] if any(s.strength.mixup_alpha for s in stages) else []
        parts.append(f"{', '.join(words)} from step {stage.start:,}")
    return "; ".join(parts)
