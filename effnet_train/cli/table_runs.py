"""The trainings that a table still lacks: planned, priced, and run one after another."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from effnet_train import distributed
from effnet_train.analysis.runs import DataSet, Run, without
from effnet_train.cli import build, paper, plan
from effnet_train.cli.launch import run_training
from effnet_train.cli.run_folder import FREE
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE

_FAILED = 1


@dataclass(frozen=True)
class Training:
    """Hold one training: the words of effnet-train, what they make, its length, and what an image costs."""

    name: str
    words: Sequence[str]
    cfg: DictConfig
    data: DataSet
    images: int
    steps: int
    multiply_adds: int

    @property
    def total(self) -> float:
        """Return the multiply-adds of forward passes over the whole training."""
        return float(self.steps * self.cfg.batch_size * self.multiply_adds)

    @property
    def length(self) -> str:
        """Word how many images it takes."""
        if self.cfg.max_steps is not None:
            return f"{self.steps:,} steps x {self.cfg.batch_size:,} images"
        return f"{self.cfg.epochs:g} epochs x {self.images:,} images"


def train_missing(table: Mapping[str, Any], prefix: str, config: Mapping[str, Any]) -> int:
    """Print what the table's rows lack and what that costs; with `run=true` train it, and return the exit status.

    What has been trained, by whatever name, is not trained again; what was begun goes on.
    """
    there = Path(config["run_root"]).exists()  # else the first training makes it
    length, told = steps_asked_for(config["overrides"]), config["run"] == "plan"
    runs = paper.finished_runs(config["run_root"], length, told=told) if there else []
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


def choice(overrides: Sequence[str], key: str) -> str | None:
    """Return what the overrides set a key, or choose of a group; None where they leave it."""
    return next((text.partition("=")[2] for text in reversed(overrides) if text.startswith(f"{key}=")), None)


def data_asked_for(overrides: Sequence[str]) -> DataSet | None:
    """Return the data set that the overrides choose, which is counted where no numbers are expected of it; None: none.

    Raises FileNotFoundError where it is not there to be counted.
    """
    if choice(overrides, "data") is None:
        return None
    cfg = paper.composed([text for text in overrides if text.startswith(("data=", "data."))]).data
    expected = cfg.get("expected") or {}
    if "classes" in expected and "train" in expected:
        return paper.known_data_set(cfg, expected["classes"], expected["train"])
    images, classes, _ = plan.counts(cfg)
    return paper.known_data_set(cfg, classes, images + cfg.minival)


def steps_asked_for(overrides: Sequence[str]) -> int | None:
    """Return the steps after which the overrides, `debug=` or a recipe end trainings, None where they don't."""
    steps = paper.composed([text.replace("{model}", "b0") for text in overrides]).max_steps
    if not (steps is None or isinstance(steps, int)):
        raise ValueError(f"max_steps={steps} must be a whole number or null")
    return steps


def _rows(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows whose networks are ours; of rows that ask for the same training, the first."""
    rows = [row for row in table["rows"] if "model" in row]
    return list({(row["name"], row["model"], row.get("scaling")): row for row in rows}.values())


def _training(row: Mapping[str, Any], prefix: str, seed: int, config: Mapping[str, Any]) -> Training:
    transfer = "other" in row
    own = next((known["data"] for known in paper.table(6)["rows"] if known["name"] == row["name"]), "imagenet")
    given = [text.replace("{model}", row["model"]) for text in config["overrides"]]
    data = choice(given, "data") or own
    recipe = choice(given, "recipe") or ("finetune" if transfer else _recipe(row["model"]))
    overrides = [text for text in given if not text.startswith(("data=", "recipe="))]
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
    steps = build.build_plan(cfg, images).total_steps
    data_set = paper.known_data_set(cfg.data, classes, images + cfg.data.minival)
    return Training(name, words, cfg, data_set, images, steps, cost.multiply_adds)


def _recipe(model: str) -> str:
    """Return the recipe of a network, which has the beginning of its name."""
    return next((recipe for recipe in ("mobilenet", "resnet") if model.startswith(recipe)), "efficientnet")


def _same(training: Training, run: Run) -> bool:
    """Say whether a finished run is of a training's configuration, data set and length, whatever its name and place."""
    asked: Any = OmegaConf.to_container(training.cfg, resolve=True)
    return (
        without(asked, ("name", *FREE)) == without(run.config, ("name", *FREE))
        and training.data == run.data
        and training.steps == run.steps
    )


def _priced(missing: Sequence[Training], rate: float | None) -> str:
    """Word the plan: each training's cost by its multiply-adds, at the rate of the cheapest network's real step."""
    if rate is None:
        rate, told = _measured(min(missing, key=lambda training: training.multiply_adds))
    else:
        told = f"rate={rate:g}"
    cells = [
        (
            training.name,
            training.length,
            f"{training.multiply_adds / 1e9:.3f}",
            plan.duration(training.total / 1e9 / rate / 3600),
        )
        for training in missing
    ]
    name, length, cost, time = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [f"  {a:{name}}  {b:>{length}} x {c:>{cost}} B multiply-adds: {d:>{time}}" for a, b, c, d in cells]
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
    accumulate = build.resolve_accumulate(cfg, ranks, session.device, training.data.classes, precision)
    micro = max(1, cfg.batch_size // ranks // accumulate)
    images_per_s, _ = plan.images_per_s(cfg, training.data.classes, precision, session, micro)
    return images_per_s * ranks * training.multiply_adds / 1e9, f"{training.name}'s step, timed here"
