"""`dry_run=true`: what a run would be, from its configuration alone; nothing is written."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from effnet_train.analysis.complexity import complexity, training_memory
from effnet_train.cli import build, run_folder
from effnet_train.cli.launch import is_remote
from effnet_train.cli.stages import build_stages, describe_stages, whole_size_steps
from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session, resolve_ranks
from effnet_train.engine.graph import check_graph
from effnet_train.engine.saving import Checkpoints
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.train import Plan, Stepper
from effnet_train.models.fused import check_possible
from effnet_train.optim.ema import EMA

# A step that takes longer than this is measured on no more images.
_PATIENCE_S = 1.0


def describe(cfg: DictConfig, folder: Path, device: str) -> str:
    """Return the plan as text: model, schedule, memory and time.

    The images are those of a complete copy, where it is known what that is; else they are counted.
    """
    ranks = resolve_ranks(cfg.ranks, device)
    session = Session(device=torch.device(device))
    build.check_batch(cfg, ranks)
    if cfg.cuda_graph:
        check_graph(
            Session(0, ranks, session.device),
            precision=cfg.precision,
            on_nan=cfg.on_nan,
            compiled=cfg.compile,
            layer_decay=cfg.layer_decay,
        )
    check_possible(cfg.model.get("fused", False), session.device, compiled=cfg.compile)
    Checkpoints(folder, **cfg.checkpoint)
    precision = build.resolve_precision(cfg.precision, session.device)
    images, classes, source = counts(cfg.data)
    if cfg.init_from is not None:
        weights = build.read_weights(cfg.init_from, session, source=cfg.init_source, key="init_from")
        model = build.build_model(cfg.model, classes)
        build.load_into(model, weights, f"init_from={cfg.init_from}", new_classifier=cfg.new_classifier)
        build.check_same_settings(cfg, weights.meta)
    plan, stages = build.build_plan(cfg, images), build_stages(cfg, images)
    meta_model = build.meta_model(cfg, classes, session.device)
    size = cfg.data.preprocess.resolution
    cost = complexity(meta_model, size)
    accumulate = build.resolve_accumulate(cfg, ranks, session.device, classes, precision)
    micro = cfg.batch_size // ranks // accumulate
    memory = training_memory(
        meta_model, size, micro * build.views(cfg), activation_bytes=4 if precision == "fp32" else 2
    )
    scarce = "" if memory < _memory(session.device) else "; MORE THAN THERE IS HERE: raise accumulate="
    too_large = f"; WARNING: {text}" if (text := build.check_size(cfg.batch_size, images)) else ""
    rate, timed = images_per_s(cfg, classes, precision, session, micro)
    hours = whole_size_steps(stages, plan.total_steps) * plan.batch_size * build.views(cfg) / (rate * ranks) / 3600
    rows = [
        ("folder", f"{folder} ({_would_be(folder, cfg)})"),
        ("model", f"{cfg.model._target_.rpartition('.')[2]} at {size} pixels, {classes:,} classes"),
        *_learned_from(cfg),
        ("parameters", f"{cost.parameters:,}"),
        ("multiply-adds", f"{cost.multiply_adds / 1e9:.3f} billion an image"),
        ("data", f"{images:,} training images ({source})"),
        (
            "batch",
            f"{cfg.batch_size:,} = {ranks} ranks x {accumulate} micro-batches x {micro:,} images{too_large}",
        ),
        ("precision", f"{precision} on {device}"),
        ("steps", f"{plan.steps_per_epoch:,.1f} an epoch, {plan.total_steps:,} in {plan.epochs:g} epochs"),
        ("learning rate", _learning_rates(plan)),
        *([("stages", describe_stages(stages))] if len(stages) > 1 else []),
        (
            "memory",
            f"about {memory / 2**30:.2f} GiB a rank: weights, gradients, optimizer, average, activations{scarce}",
        ),
        ("time", f"about {duration(hours)} without waiting for data ({timed}: {rate:,.1f} images/s a rank)"),
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


def _learned_from(cfg: DictConfig) -> list[tuple[str, str]]:
    """Return what a run begins with and learns from beside its images."""
    rows = {
        ("weights", f"from {cfg.init_from}"): cfg.init_from,
        ("teacher", f"{cfg.distill.teacher}; its memory and time come on top"): cfg.distill.teacher,
        ("attack", "its forward and backward passes come on top of the time"): cfg.advprop.epsilon,
        ("pseudo-labels", f"{cfg.pseudo.ratio} to a labelled image, of {cfg.pseudo.labels}"): cfg.pseudo.labels,
    }
    return [row for row, used in rows.items() if used]


def _would_be(folder: Path, cfg: DictConfig) -> str:
    if not (folder / "config.yaml").exists():
        return "new"
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    try:
        run_folder.check(folder, config)
    except ValueError as error:
        return f"REFUSED: {error}"
    return "holds a run: it would go on"


def counts(cfg: DictConfig) -> tuple[int, int, str]:
    """Return training images, classes, and where the numbers are from."""
    expected = cfg.get("expected")
    root = Path(cfg.root)
    downloads = expected and "dataset" in cfg  # torchvision would fetch what is absent
    if (root.is_dir() or "://" in cfg.root) and not downloads:
        reading = cfg.copy()  # which still knows its place in the configuration
        if "copy" in reading:
            reading["copy"] = False  # a plan writes nothing
        data = build.build_data(reading, Session())
        return len(data.train), len(data.classes), f"counted in {root}"
    if expected and "train" in expected:
        return expected.train - cfg.minival, expected.classes, f"of a complete copy; {root} was not read"
    if cfg.root.startswith("hub:"):
        raise FileNotFoundError(f"data.root={root}: a plan fetches nothing, set data.expected={{classes: , train: }}")
    raise FileNotFoundError(f"data.root={root} does not exist: set it to a folder with train/<class>/ and val/<class>/")


def of_trainings(cfg: DictConfig) -> tuple[Plan, int]:
    """Return the plan of the trainings that a search starts, and their classes.

    Raises, once and before any of them has been started, what each would of its data, epochs and schedule.
    """
    expected = cfg.data.get("expected") or {}
    # A cluster's nodes may have data that lie on no other machine.
    if cfg.dry_run or (is_remote() and {"classes", "train"} <= set(expected)):
        images, classes, _ = counts(cfg.data)
    else:
        data = build.build_data(cfg.data, Session())
        images, classes = len(data.train), len(data.classes)
    return build.build_plan(cfg, images), classes


def _learning_rates(plan: Plan) -> str:
    last = plan.total_steps - 1
    steps = {0, min(int(5 * plan.steps_per_epoch), last), *(plan.total_steps * i // 4 for i in (1, 2, 3)), last}
    return ", ".join(f"{plan.lr(step):.5g} at step {step:,}" for step in sorted(steps))


def images_per_s(cfg: DictConfig, classes: int, precision: str, session: Session, micro: int) -> tuple[float, str]:
    """Time the real step on this device, on as many random images as are quick to compute."""
    size = cfg.data.preprocess.resolution
    model = build.build_model(cfg.model, classes)
    model = build.for_training(cfg, model, session.device)
    state = TrainState(
        model,
        EMA(model, cfg.ema_decay),
        build.build_optimizer(cfg.optim, model, cfg.layer_decay),
        torch.amp.GradScaler(session.device.type, enabled=precision == "fp16"),
        no_statistics(session.device),
    )
    step = Stepper(
        network=model,
        loss=instantiate(cfg.loss),
        preprocess=Preprocess(resolution=size),
        num_classes=classes,
        precision=precision,
        session=session,
    )
    count, seconds = min(2, micro), 0.0
    while True:
        images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8)
        batch = [Batch(images, torch.arange(count) % classes, torch.arange(count), [])]
        times = []
        try:
            for _ in range(1 if seconds > _PATIENCE_S else 3):  # the first of each size warms up
                start = time.perf_counter()
                step(state, batch, 0.0)
                state.statistics.tolist()  # waits for the device
                times.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            if not seconds:
                raise
            return count // 4 / seconds, f"the step timed here on {count // 4} images, more do not fit"
        seconds = min(times)
        if count == micro or seconds > _PATIENCE_S:
            return count / seconds, f"the step timed here on {count} images"
        count = min(micro, count * 4)


def _memory(device: torch.device) -> int:
    """Return the bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def duration(hours: float) -> str:
    """Word a time in the unit that suits it."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
