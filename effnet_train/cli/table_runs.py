"""The trainings that a table still lacks: planned, priced, and run one after another."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from effnet_train import distributed
from effnet_train.analysis.runs import Run, without
from effnet_train.cli import build, paper, plan
from effnet_train.cli.launch import run_training
from effnet_train.cli.run_folder import FREE
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE

_FAILED = 1


@dataclass(frozen=True)
class Training:
    """Hold one training: the words of effnet-train, what they make, and what it costs in multiply-adds."""

    name: str
    words: Sequence[str]
    cfg: DictConfig
    classes: int
    images: int
    multiply_adds: int

    @property
    def total(self) -> float:
        """Return the multiply-adds of forward passes over the whole training."""
        return float(self.cfg.epochs) * self.images * self.multiply_adds


def train_missing(table: Mapping[str, Any], prefix: str, config: Mapping[str, Any]) -> int:
    """Print what the table's rows lack and what that costs; with `run=true` train it, and return the exit status.

    What has been trained, by whatever name, is not trained again; what was begun goes on.
    """
    runs = paper.finished_runs(config["run_root"])
    trainings = [_training(row, prefix, seed, config) for row in _rows(table) for seed in config["seeds"]]
    missing = [training for training in trainings if not any(_same(training, run) for run in runs)]
    print(f"{prefix}: {len(trainings)} trainings, {len(trainings) - len(missing)} finished, {len(missing)} to do")
    if not missing:
        return 0
    print(_priced(missing, config["rate"]), flush=True)
    if config["run"] == "plan":
        return 0
    failed = []
    for number, training in enumerate(missing, 1):
        print(f"{prefix}: training {number} of {len(missing)}, {training.name}", flush=True)
        status = run_training(training.words)
        if status == PREEMPTED_EXIT_CODE:
            print(f"{prefix}: stopped in {training.name}: the same command goes on", file=sys.stderr)
            return PREEMPTED_EXIT_CODE
        if status:
            failed.append(training.name)
    if failed:
        print(f"{prefix}: failed, as said above: {', '.join(failed)}", file=sys.stderr)
    return _FAILED if failed else 0


def data_asked_for(overrides: Sequence[str]) -> str | None:
    """Return the name of the data set that the overrides choose, as runs have it; None where they choose none."""
    words = [text for text in overrides if text.startswith(("data=", "data."))]
    return paper.data_name(paper.composed(words).data) if _choice(overrides, "data") else None


def _choice(overrides: Sequence[str], group: str) -> str | None:
    """Return what the overrides choose of a group; None where they leave it."""
    return next((text.partition("=")[2] for text in reversed(overrides) if text.startswith(f"{group}=")), None)


def _rows(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows whose networks are ours; of rows that ask for the same training, the first."""
    rows = [row for row in table["rows"] if "model" in row]
    return list({(row["name"], row["model"], row.get("scaling")): row for row in rows}.values())


def _training(row: Mapping[str, Any], prefix: str, seed: int, config: Mapping[str, Any]) -> Training:
    transfer = "other" in row
    own = next((known["data"] for known in paper.table(6)["rows"] if known["name"] == row["name"]), "imagenet")
    overrides = [text.replace("{model}", row["model"]) for text in config["overrides"]]
    data = _choice(overrides, "data") or own
    recipe = _choice(overrides, "recipe") or ("finetune" if transfer else "efficientnet")
    name = "-".join(
        [prefix, row["model"], *([row["scaling"]] if "scaling" in row else []), data, recipe, f"seed{seed}"]
    )
    run = [f"data={data}", f"recipe={recipe}", *overrides, f"seed={seed}"]
    words = [*paper.row_words(row, run), f"run_root={config['run_root']}", f"name={name}"]
    cfg = paper.composed(words)
    build.check_start(cfg)
    absent = sorted(OmegaConf.missing_keys(cfg))
    if absent:
        raise ValueError(f"{absent[0]} has no value: give it to the trainings, at the end: -- {absent[0]}=...")
    images, classes, _ = plan.counts(cfg.data)
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    cost = paper.count_model(model, cfg.data.preprocess.resolution, classes, source="")
    return Training(name, words, cfg, classes, images, cost.multiply_adds)


def _same(training: Training, run: Run) -> bool:
    """Say whether a finished run is of a training's configuration, whatever its name and place."""
    asked: Any = OmegaConf.to_container(training.cfg, resolve=True)
    return without(asked, ("name", *FREE)) == without(run.config, ("name", *FREE))


def _priced(missing: Sequence[Training], rate: float | None) -> str:
    """Word the plan: each training's cost by its multiply-adds, at the rate of the cheapest network's real step."""
    if rate is None:
        rate, told = _measured(min(missing, key=lambda training: training.multiply_adds))
    else:
        told = f"rate={rate:g}"
    lines = [
        f"  {training.name:56} {training.cfg.epochs:g} epochs x {training.images:,} images x "
        f"{training.multiply_adds / 1e9:.3f} B multiply-adds: {plan.duration(training.total / 1e9 / rate / 3600)}"
        for training in missing
    ]
    hours = sum(training.total for training in missing) / 1e9 / rate / 3600
    return "\n".join(
        [*lines, f"  in all about {plan.duration(hours)} at {rate:,.1f} B multiply-adds a second ({told})"]
    )


def _measured(training: Training) -> tuple[float, str]:
    """Return the billion multiply-adds a second of a training here, by a few real steps, over all its ranks."""
    cfg = training.cfg
    device = distributed.resolve_device(cfg.device)
    session = distributed.Session(device=torch.device(device))
    ranks = distributed.resolve_ranks(cfg.ranks, device)
    build.set_threads(cfg.threads)
    precision = build.resolve_precision(cfg.precision, session.device)
    accumulate = build.resolve_accumulate(cfg, ranks, session.device, training.classes, precision)
    micro = max(1, cfg.batch_size // ranks // accumulate)
    images_per_s, _ = plan.images_per_s(cfg, training.classes, precision, session, micro)
    return images_per_s * ranks * training.multiply_adds / 1e9, f"{training.name}'s step, timed here"
