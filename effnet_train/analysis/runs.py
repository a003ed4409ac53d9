"""Finished runs: found below a folder, known by what their configurations hold, averaged over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Classes and training images of a complete copy; those of the paper's other data sets stand in its Table 6.
IMAGENET = ("ImageNet", 1000, 1281167)
# What of a model's configuration changes neither its parameters nor its multiply-adds.
_NO_SHAPE = ("dropout", "drop_connect", "bn_eps", "bn_momentum", "checkpointing", "fused", "padding", "num_classes")
_DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError)


@dataclass(frozen=True)
class Run:
    """Hold a finished run: its configuration, and the scores of the weights that it selected.

    `data` is the data set's name, by the number of its classes and training images where the paper has such a one, else
    by its folder. `shape` is what settles parameters and multiply-adds, see `shape_of`. `minival` says that the scores
    are those of images which selection never saw.
    """

    folder: Path
    config: Mapping[str, Any]
    seed: int
    data: str
    classes: int
    shape: Mapping[str, Any]
    top1: float
    top5: float | None
    minival: bool


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
        return f"{run.data}, {run.config['epochs']:g} epochs, {name}"


def shape_of(model: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Return the part of a model's configuration that makes its shape, at the resolution that it is given."""
    return {**{key: value for key, value in model.items() if key not in _NO_SHAPE}, "resolution": resolution}


def same_shape(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two shapes are the same; a factor that was computed may differ in its last digits."""
    return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)


def _alike(one: Any, other: Any) -> bool:
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)]
    return math.isclose(one, other, rel_tol=1e-6) if all(numbers) else bool(one == other)


def find_runs(root: Path, known: Iterable[tuple[str, int, int]] = ()) -> tuple[list[Run], list[str]]:
    """Return the finished runs in `root` and below it, by their folders' names, and what is wrong with others.

    A run is a folder with a `config.yaml` and, once it has ended, a `summary.json`; what has not ended is left out.
    `known` are data sets, as IMAGENET is one.
    """
    names = {(classes, images): name for name, classes, images in (*known, IMAGENET)}
    found, wrong = [], []
    for summary in sorted(root.rglob("summary.json")):
        if not (summary.parent / "config.yaml").exists():
            continue
        try:
            found.append(_read(summary.parent, names))
        except _DAMAGED as error:
            reason = str(error).splitlines()[0] if isinstance(error, ValueError | OSError) else repr(error)
            wrong.append(f"{summary.parent} is left out, as it cannot be read as a run ({reason})")
    return found, wrong


def _read(folder: Path, names: Mapping[tuple[int, int], str]) -> Run:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    meta = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    minival = int(config["data"].get("minival") or 0)
    prefix = str(config["select_by"]).rpartition("/")[0]
    scores, prefix = (summary["test"], "test") if "test" in summary else (summary["best"], prefix)
    classes = len(meta["classes"])
    return Run(
        folder=folder,
        config=config,
        seed=int(config["seed"]),
        data=names.get((classes, int(meta["images"]) + minival), Path(str(config["data"]["root"])).name),
        classes=classes,
        shape=shape_of(config["model"], int(config["data"]["preprocess"]["resolution"])),
        top1=float(scores[f"{prefix}/top1"]),
        top5=scores.get(f"{prefix}/top5"),
        minival="test" in summary,
    )


def over_seeds(runs: Iterable[Run], free: Sequence[str] = ()) -> list[Scores]:
    """Put together the runs that differ in nothing but the seed and the keys `free`, which change no result."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kept = without(run.config, ("seed", "name", "run_root", *free))
        groups.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    return [Scores(tuple(sorted(group, key=lambda run: run.seed))) for group in groups.values()]


def without(config: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Return a configuration without the dotted keys."""
    left: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" not in keys:
            left[key] = without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return left
