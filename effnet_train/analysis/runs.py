"""Finished runs: found below a folder, known by what their configurations hold, averaged over seeds."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from effnet_train.engine.train import whole_steps

# Classes and training images of a complete copy; those of the paper's other data sets stand in its Table 6.
IMAGENET = ("ImageNet", 1000, 1281167)
# What of a model's configuration changes neither its parameters nor its multiply-adds.
_NO_SHAPE = ("dropout", "drop_connect", "bn_eps", "bn_momentum", "checkpointing", "fused", "padding", "num_classes")
# What a run learns from beside labelled images, as another network's outputs.
HELP = ("distill.teacher", "pseudo.labels", "advprop.epsilon")


@dataclass(frozen=True)
class DataSet:
    """Tell a data set from others: by the numbers of its classes and training images where the paper has such a one.

    Its name is the paper's then, wherever it lies, and `root` None; else that of its folder, and `root` tells it apart.
    """

    name: str
    classes: int
    images: int
    root: str | None


@dataclass(frozen=True)
class Run:
    """Hold a finished run: its configuration, its length, and the scores of the weights that it selected.

    `shape` is what settles parameters and multiply-adds, see `shape_of`; `whole_steps` is as long as its
    epochs ask for.
    """

    folder: Path
    config: Mapping[str, Any]
    seed: int
    data: DataSet
    shape: Mapping[str, Any]
    steps: int
    whole_steps: int
    top1: float
    top5: float | None

    @property
    def transferred(self) -> bool:
        """Say whether it began with weights of another training."""
        return self.config.get("init_from") is not None

    @property
    def helped(self) -> bool:
        """Say whether it learned from more than labelled images, which the paper's runs did not."""
        return any((self.config.get(part) or {}).get(key) for part, key in (name.split(".") for name in HELP))


@dataclass(frozen=True)
class Scores:
    """Hold the runs that differ in their seeds only."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Return one of the runs, for all that they have in common."""
        return self.runs[0]

    @property
    def top1(self) -> float:
        """Return the mean."""
        return statistics.fmean(run.top1 for run in self.runs)

    @property
    def top5(self) -> float | None:
        """Return the mean, None where a run has none."""
        values = [run.top5 for run in self.runs if run.top5 is not None]
        return statistics.fmean(values) if len(values) == len(self.runs) else None

    @property
    def spread(self) -> float | None:
        """Return the standard deviation of top-1 over seeds (N - 1), None of a single run."""
        return statistics.stdev(run.top1 for run in self.runs) if len(self.runs) > 1 else None

    def describe(self) -> str:
        """Word where the scores are from: data set, epochs, folder, number of seeds."""
        run = self.first
        name = run.folder.name if len(self.runs) == 1 else f"{run.folder.name} and {len(self.runs) - 1} more"
        cut = f" cut short at step {run.steps:,}" if run.steps < run.whole_steps else ""
        start = f" from {run.config['init_from']}" if run.transferred else ""
        return f"{run.data.name}, {run.config['epochs']:g} epochs{cut}{start}, {name}"


def shape_of(model: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Return the part of a model's configuration that makes its shape, at the resolution that it is given."""
    return {**{key: value for key, value in model.items() if key not in _NO_SHAPE}, "resolution": resolution}


def same_shape(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two shapes are the same; a factor that was computed may differ in its last digits."""
    return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)


def _alike(one: Any, other: Any) -> bool:
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)]
    return math.isclose(one, other, rel_tol=1e-6) if all(numbers) else bool(one == other)


def data_set(classes: int, images: int, root: str, known: Iterable[tuple[str, int, int]]) -> DataSet:
    """Return which data set it is; `known` are others than ImageNet, as IMAGENET is one."""
    for name, *numbers in (*known, IMAGENET):
        if numbers == [classes, images]:
            return DataSet(name, classes, images, None)
    remote = "://" in root or root.startswith("hub:")
    return DataSet(Path(root).name, classes, images, root if remote else os.path.realpath(root))


def find_runs(root: Path, known: Iterable[tuple[str, int, int]] = ()) -> tuple[list[Run], list[str]]:
    """Return the finished runs in `root` and below it, by their folders' names, and what is wrong with others.

    A run is a folder with a `config.yaml` and, once it has ended, a `summary.json`; what has not ended is left out.
    `known` are data sets, as IMAGENET is one.
    """
    known = tuple(known)
    found, wrong = [], []
    for summary in sorted(root.rglob("summary.json")):
        if not (summary.parent / "config.yaml").exists():
            continue
        try:
            found.append(_read(summary.parent, known))
        except OSError as error:
            wrong.append(f"{summary.parent} is left out, as {error.filename} cannot be read ({error.strerror})")
        except (ValueError, yaml.YAMLError):  # the parsers', who tell of letters and columns
            wrong.append(f"{summary.parent} is left out, as its config.yaml or a .json file is damaged")
        except (TypeError, KeyError, AttributeError) as error:
            lacks = f"lack {error}, which a run's have" if isinstance(error, KeyError) else "are not what a run's are"
            wrong.append(f"{summary.parent} is left out, as its files {lacks}")
    return found, wrong


def _read(folder: Path, known: Sequence[tuple[str, int, int]]) -> Run:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    meta = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    held_out = int(config["data"].get("minival") or 0)
    prefix = str(config["select_by"]).rpartition("/")[0]
    scores, prefix = (summary["test"], "test") if "test" in summary else (summary["best"], prefix)
    classes, images = len(meta["classes"]), int(meta["images"])
    return Run(
        folder=folder,
        config=config,
        seed=int(config["seed"]),
        data=data_set(classes, images + held_out, str(config["data"]["root"]), known),
        shape=shape_of(config["model"], int(config["data"]["preprocess"]["resolution"])),
        steps=int(summary["steps"]),
        whole_steps=whole_steps(config["epochs"], images, config["batch_size"]),
        # Where a data set's convention is the mean over classes, tables hold that.
        top1=float(scores.get(f"{prefix}/per_class", scores[f"{prefix}/top1"])),
        top5=scores.get(f"{prefix}/top5"),
    )


def of_length(runs: Iterable[Run], max_steps: int | None) -> tuple[list[Run], list[str]]:
    """Return the runs that are whole, or of `max_steps` where their epochs ask for more, and what is said of others."""
    kept, told = [], []
    for run in runs:
        wanted = run.whole_steps if max_steps is None else min(run.whole_steps, max_steps)
        if run.steps == wanted:
            kept.append(run)
        else:
            told.append(f"{run.folder} is left out, as it ended after {run.steps:,} steps, not {wanted:,} (max_steps)")
    return kept, told


def distinct(runs: Iterable[Run], free: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Return the runs without those that repeat a former one under another name, and what is said of these.

    Runs are the same that differ in keys `free` only, which change no result.
    """
    first: dict[str, Run] = {}
    told = []
    for run in runs:
        former = first.setdefault(what_it_computes(run, free), run)
        if former is not run:
            told.append(f"{run.folder} is left out, as {former.folder} is of the same configuration and seed")
    return list(first.values()), told


def over_seeds(runs: Iterable[Run], free: Sequence[str] = ()) -> list[Scores]:
    """Put together the runs that differ in nothing but the seed and the keys `free`, which change no result."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(what_it_computes(run, ("seed", *free)), []).append(run)
    return [Scores(tuple(sorted(group, key=lambda run: run.seed))) for group in groups.values()]


def what_it_computes(run: Run, free: Sequence[str]) -> str:
    """Word a run's configuration without its name and the keys `free`, its data set and its length."""
    kept = without(run.config, ("name", "run_root", *free))
    return json.dumps([kept, asdict(run.data), run.steps], sort_keys=True, default=str)


def without(config: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Return a configuration without the dotted keys."""
    left: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" not in keys:
            left[key] = without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return left
