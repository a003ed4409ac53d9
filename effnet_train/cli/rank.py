"""What one rank of a training run needs, built from its configuration."""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from effnet_train.cli import build, run_folder
from effnet_train.cli.objective import build_objective
from effnet_train.cli.provenance import provenance
from effnet_train.cli.pseudo import Reading, build_reading, warn_of_size
from effnet_train.cli.stages import build_stages, micro_batches
from effnet_train.data.augment import Augment
from effnet_train.data.datasets import Data
from effnet_train.data.device_batches import check_device
from effnet_train.data.loader import Batch, eval_batches, listing, train_batches
from effnet_train.data.pseudo import Mixture
from effnet_train.data.sources import Source
from effnet_train.distributed import Session, sync_batch_norm
from effnet_train.engine.checkpoint import (
    BEST,
    EXPORT,
    Weights,
    export_safetensors,
    load_weights,
    write_bytes,
)
from effnet_train.engine.evaluate import evaluate
from effnet_train.engine.faults import Faults, RollBackError, passed_over
from effnet_train.engine.faults import read as read_faults
from effnet_train.engine.graph import GraphStepper, check_graph
from effnet_train.engine.loggers import Logger
from effnet_train.engine.progressive import StagedStepper, staged
from effnet_train.engine.saving import Checkpoints
from effnet_train.engine.scores import Measure, Metrics
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.train import Plan, Run, Stepper
from effnet_train.models.auxiliary import add_auxiliary, main_tensors
from effnet_train.models.fused import check_possible
from effnet_train.optim.ema import EMA
from effnet_train.optim.one_pass import OnePass

BAD_IMAGES = "bad_images.txt"


def prepare(
    cfg: DictConfig, folder: Path, session: Session, fault: RollBackError | None = None
) -> tuple[Run, Callable[[Callable[[], bool]], None]]:
    """Build a run in `folder`, at its newest good checkpoint, and what is to be done when it has ended.

    `fault` sent it back there: the batches that led to it are passed over from now on.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    checkpoints = Checkpoints(folder, **config["checkpoint"])
    if cfg.timeout_s is not None:
        # A disk that hangs is to be told of before the watchdog takes it for a rank that does.
        checkpoints.patience_s = min(checkpoints.patience_s, cfg.timeout_s / 2)
    former = _newest(checkpoints, config, session)
    precision = build.resolve_precision(
        cfg.precision, session.device, former["meta"].get("precision") if former else None
    )
    build.set_threads(cfg.threads)
    build.set_arithmetic(precision, cfg.deterministic, session.device)
    mixing, loss, augment = (instantiate(part, _convert_="all") for part in (cfg.mixing, cfg.loss, cfg.augment))
    data = build.build_data(cfg.data, session)
    known = former and former["meta"]
    reading = build_reading(cfg, data, session, known)
    check_device(data.backend, session.device, data.preprocess, augment)
    plan = _plan(cfg, data, session)
    stages = build_stages(cfg, len(data.train))
    pieces = micro_batches(cfg, stages, len(data.classes), precision, session)
    build.check_batch(cfg, session.world_size, pieces[-1])
    state, network = _state(cfg, data, precision, session, start=former is None)
    objective, taught = build_objective(cfg, state.model, data, session, known)
    parts = {"network": network, "objective": objective, "loss": loss, "mixing": mixing, "targets": reading.targets}
    step = staged(_stepper(cfg, state, parts, data, precision, session), stages, pieces)
    # Only now that every part accepts its arguments: a slip of the keyboard must not be what the folder holds.
    with session.main_first():
        run_folder.claim(folder, config)
        if session.is_main:
            checkpoints.clear_unfinished()
            checkpoints.announce()
    if former is not None:
        _check_same_data(former["meta"], data, folder)
        _go_on(former, state, plan, checkpoints, session)
    faults = _faults(cfg, folder, plan, reading.mixture, session, fault, state.step)
    made_with = provenance(session.device)
    loggers = _open_loggers({**config, "provenance": made_with}, plan, folder, state) if session.is_main else []
    score = partial(_evaluate, cfg, data, precision, folder, session)
    run = Run(
        state=state,
        plan=plan,
        step=step,
        batches=partial(_batches, cfg, reading, augment, step, plan, folder, passed_over(faults.known)),
        evaluate=partial(score, data.val),
        checkpoints=checkpoints,
        meta={**build.metadata(cfg, data, precision), **taught, **reading.known},
        select_by=cfg.select_by,
        faults=faults,
        provenance=made_with,
        loggers=loggers,
        session=session,
    )
    return run, partial(_finish, run, data, score)


def _stepper(
    cfg: DictConfig, state: TrainState, built: Mapping[str, Any], data: Data, precision: str, session: Session
) -> Stepper:
    """Return the step, in one piece; as CUDA graphs, where that is asked for. Raises ValueError where it cannot be."""
    parts: dict[str, Any] = {
        **built,
        "preprocess": data.preprocess,
        "num_classes": len(data.classes),
        "precision": precision,
        "clip_norm": cfg.clip_norm,
        "skip_bad": cfg.on_nan == "skip",
        "session": session,
    }
    if not cfg.cuda_graph:
        return Stepper(**parts)
    check_graph(session, precision=precision, on_nan=cfg.on_nan, compiled=cfg.compile, layer_decay=cfg.layer_decay)
    return GraphStepper(**parts, update=OnePass(state.optimizer, state.ema))


def _newest(checkpoints: Checkpoints, config: dict[str, Any], session: Session) -> dict[str, Any] | None:
    """Return the newest good checkpoint of a run, from its folder or the copy of it elsewhere, to all ranks.

    Raises ValueError where the run is of another configuration, FileNotFoundError where ranks find different ones.
    """
    run_folder.check(checkpoints.folder, config)
    with session.main_first():  # the others come when rank 0 has written, and fetched, what all are about to read
        if session.is_main:
            checkpoints.fetch(partial(run_folder.check, config=config))
    former = checkpoints.newest()
    step = former["step"] if former else 0
    if session.broadcast(step) != step:
        raise FileNotFoundError(
            f"rank 0 goes on from another step than rank {session.rank}, which is at {step}: "
            f"the folder {checkpoints.folder.absolute()} must be on a file system that all machines share"
        )
    return former


def _plan(cfg: DictConfig, data: Data, session: Session) -> Plan:
    plan = build.build_plan(cfg, len(data.train))
    too_large = build.check_size(cfg.batch_size, len(data.train))
    if too_large and session.is_main:
        print(f"warning: {too_large}", file=sys.stderr)
    return plan


def _go_on(former: dict[str, Any], state: TrainState, plan: Plan, checkpoints: Checkpoints, session: Session) -> None:
    """Take up the state of a checkpoint. Raises ValueError where it is past the plan's end."""
    state.load_state_dict(former, session)
    if session.is_main:
        print(f"going on from step {state.step:,} of {plan.total_steps:,}", file=sys.stderr)
    if state.step > plan.total_steps:
        raise ValueError(
            f"the run in {checkpoints.folder} is at step {state.step} already, past the last of this plan, "
            f"{plan.total_steps}: raise max_steps, or give the former data"
        )
    kept = session.broadcast(checkpoints.best_step() if session.is_main else None)
    if state.best and kept != state.best["step"]:
        if session.is_main:
            text = f"is not that of step {state.best['step']:.0f}: that one's score is forgotten"
            print(f"warning: {checkpoints.folder / BEST} {text}", file=sys.stderr)
        # If an evaluation is due at this step, it is made again.
        state.best, state.evaluated = {}, min(state.evaluated, state.step - 1)


def _check_same_data(meta: Mapping[str, Any], data: Data, folder: Path) -> None:
    """Check that a run goes on with the images it began with. Raises ValueError."""
    if meta["classes"] != list(data.classes) or meta["images"] != len(data.train):
        raise ValueError(
            f"the run in {folder} began with {meta['images']:,} training images of {len(meta['classes'])} classes; "
            f"data.root now holds {len(data.train):,} of {len(data.classes)}, or other names: give the former data"
        )


def _state(
    cfg: DictConfig, data: Data, precision: str, session: Session, *, start: bool
) -> tuple[TrainState, nn.Module]:
    """Build what training changes, and the network to call on each batch; at a run's start, from `init_from`."""
    check_possible(cfg.model.get("fused", False), session.device, compiled=cfg.compile)
    torch.manual_seed(cfg.seed)
    model = build.build_model(cfg.model, len(data.classes))
    if start and cfg.init_from is not None:  # a run that goes on has no more need of it
        weights = build.read_weights(cfg.init_from, session, source=cfg.init_source, key="init_from")
        build.load_into(model, weights, f"init_from={cfg.init_from}", new_classifier=cfg.new_classifier)
        build.check_same_settings(cfg, weights.meta)
    if start and session.is_main:
        warn_of_size(cfg, model)
    model = build.for_training(cfg, model, session.device)
    ema = EMA(model, cfg.ema_decay)
    if cfg.advprop.epsilon:  # after the average, which is of what is kept of the model
        add_auxiliary(model)
    sync_batch_norm(model, session, session.world_size if cfg.sync_bn == "all" else cfg.sync_bn)
    if cfg.compile:
        model.compile()
    state = TrainState(
        model=model,
        ema=ema,
        optimizer=build.build_optimizer(cfg.optim, model, cfg.layer_decay),
        scaler=torch.amp.GradScaler(session.device.type, enabled=precision == "fp16"),
        statistics=no_statistics(session.device),
    )
    return state, session.parallel(model)


def _open_loggers(config: dict[str, Any], plan: Plan, folder: Path, state: TrainState) -> list[Logger]:
    loggers = [instantiate(part, _convert_="all") for part in config["loggers"].values() if part is not None]
    try:
        for logger in loggers:
            known = {**config, "total_steps": plan.total_steps}
            logger.open(folder, step=state.step, evaluated=state.evaluated, config=known)
    except BaseException:
        for logger in loggers:
            logger.close()
        raise
    return loggers


def _faults(
    cfg: DictConfig,
    folder: Path,
    plan: Plan,
    mixture: Mixture,
    session: Session,
    new: RollBackError | None,
    step: int,
) -> Faults:
    """Return what the run knows of its faults, with `new`, which sent it back to `step`."""
    known = session.broadcast(read_faults(folder) if session.is_main else [])

    def images(step: int) -> list[str]:
        order = mixture.order(plan.batch_size, cfg.seed, passed_over=passed_over(known))
        return [mixture.source.name(index) for index in order.batch(step - 1)[0].tolist()]

    faults = Faults(folder, cfg.on_nan, images, lambda step: plan.lr(step - 1), session.is_main, known)
    if new is not None:
        faults.record(new.step, new.what, action="rollback", from_step=step)
    return faults


def _batches(
    cfg: DictConfig,
    reading: Reading,
    augment: Augment,
    step: StagedStepper,
    plan: Plan,
    folder: Path,
    passed_over: Sequence[tuple[int, int]],
    start: int,
) -> Iterator[tuple[Batch, ...]]:
    session = step.steppers[0].session
    place = {"rank": session.rank, "world_size": session.world_size, "passed_over": passed_over}
    order = reading.mixture.order(plan.batch_size, cfg.seed, **place)
    workers = build.resolve_workers(cfg.workers, session.device)
    for stage, stepper in zip(step.stages, step.steppers, strict=True):
        first, stop = max(start, stage.start), min(stage.stop, plan.total_steps)
        if first >= stop:
            continue
        batches = train_batches(
            stage.data(reading.data),
            stage.augment(augment),
            order,
            start=first,
            stop=stop,
            accumulate=stepper.accumulate,
            workers=workers,
            device=session.device,
        )
        listed = listing(batches, folder / BAD_IMAGES)
        yield from zip(*[listed] * stepper.accumulate, strict=True)


def _evaluate(
    cfg: DictConfig,
    data: Data,
    precision: str,
    folder: Path,
    session: Session,
    source: Source,
    models: dict[str, nn.Module],
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Metrics]:
    batches = eval_batches(
        source,
        data,
        batch_size=cfg.eval_batch_size,
        rank=session.rank,
        world_size=session.world_size,
        workers=build.resolve_workers(cfg.workers, session.device),
        device=session.device,
    )
    return evaluate(
        models,
        listing(batches, folder / BAD_IMAGES),
        num_images=len(source),
        preprocess=data.preprocess,
        precision=precision,
        session=session,
        measure=Measure(per_class=len(data.classes) if data.per_class else 0),
        stopped=stopped,
    )


def _finish(run: Run, data: Data, score: Callable[..., dict[str, Metrics]], stopped: Callable[[], bool]) -> None:
    """Export the selected weights, score them on what selection never saw, and say where everything lies.

    Raises Interrupted where `stopped`, asked now and then, says yes: the next start does it anew.
    """
    session, folder = run.session, run.checkpoints.folder
    if data.test is None and not session.is_main:
        return
    weights = _selected(run) if session.is_main else None
    lines = [
        f"{key} {value:.2%}" for key, value in run.state.best.items() if key.endswith(("top1", "top5", "per_class"))
    ]
    summary: dict[str, Any] = {"best": run.state.best, "steps": run.state.step}
    if data.test is not None:
        metrics = score(data.test, {"test": _shared(run, weights)}, stopped)["test"]
        summary["test"] = metrics.scalars("test")
        lines.append(f"test/top1 {metrics.top1:.2%}")
    if weights is None:
        return
    export_safetensors(folder / EXPORT, weights)
    write_bytes(folder / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
    print(f"done: {run.state.step:,} steps; best at step {int(run.state.best.get('step', 0)):,}: {', '.join(lines)}")
    print(f"  checkpoint  {folder / BEST}")
    print(f"  weights     {folder / 'model.safetensors'}")
    for words, name in (("curves      tensorboard --logdir ", "tensorboard"), ("numbers     ", "metrics.csv")):
        if (folder / name).exists():
            print(f"  {words}{folder / name}")


def _selected(run: Run) -> Weights:
    """Return the weights that the run's scores chose: of `best.pt`, or where nothing was scored the last."""
    which, best = "ema" if run.select_by.startswith("val_ema/") else "raw", run.checkpoints.folder / BEST
    if best.exists():
        return load_weights(best, which)
    kept = run.state.ema if which == "ema" else run.state.model
    return Weights(main_tensors(kept.state_dict()), {**run.meta, "step": run.state.step})


def _shared(run: Run, weights: Weights | None) -> nn.Module:
    """Return a network with the weights that rank 0 gives, on all ranks.

    They read no file: on a file system that machines share, another one may see the former `best.pt` for a minute yet.
    """
    model = copy.deepcopy(run.state.ema.module)
    if weights is not None:
        model.load_state_dict(weights.tensors)
    for tensor in model.state_dict().values():
        run.session.sum_(tensor if weights is not None else tensor.zero_())
    return model
