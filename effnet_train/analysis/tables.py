"""The paper's tables: its numbers beside what is computed and what was trained here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from effnet_train.analysis.complexity import complexity
from effnet_train.analysis.runs import Run, Scores, over_seeds, same_shape
from effnet_train.analysis.sheets import FROM_PAPER, Column, Sheet

Row = Mapping[str, Any]
_PAPER_NOTE = f"{FROM_PAPER} the paper's: no finished run of this network was found"
_TRAINED_ON = Column("run", "data, epochs, run", "trained here")


@dataclass(frozen=True)
class Network:
    """Hold what was counted of a row's network, and what it is.

    `shape` is None where it is no network of ours, so that no run can be of it; `note` says how it is not the paper's.
    """

    parameters: int
    multiply_adds: int
    source: str
    shape: Mapping[str, Any] | None = None
    note: str = ""


def read_table(file: Path) -> dict[str, Any]:
    """Read one of `configs/tables/*.yaml`: `title` and `rows`."""
    table: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return table


def data_sets(table6: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Return name, classes and training images of each data set of Table 6."""
    return [(row["name"], row["classes"], row["train"]) for row in table6["rows"]]


def timm_network(name: str) -> nn.Module:
    """Build a network of timm on the meta device, without weights."""
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def counted(model: nn.Module, resolution: int, source: str, **rest: Any) -> Network:
    """Count a network's parameters and multiply-adds."""
    cost = complexity(model, resolution)
    return Network(cost.parameters, cost.multiply_adds, source, **rest)


def scores_of(network: Network | None, runs: Sequence[Run], data: str, free: Sequence[str]) -> list[Scores]:
    """Return the scores of a network's trainings, over seeds, best first; on the data set `data` alone if there are.

    Each is a way of training, by another recipe perhaps.
    """
    if network is None or network.shape is None:
        return []
    shape = network.shape
    groups = over_seeds((run for run in runs if same_shape(run.shape, shape)), free)
    here = [scores for scores in groups if scores.first.data.name == data]
    return sorted(here or groups, key=lambda scores: -scores.top1)


def stage_table(table: Mapping[str, Any], stages: Sequence[Any]) -> Sheet:
    """Return Table 1 beside a network's own description of its stages, `EfficientNet.table()`."""
    rows = [
        {
            "stage": row["stage"],
            **{f"{key}_paper": row[key] for key in _STAGE_KEYS},
            **{f"{key}_here": getattr(stage, key) for key in _STAGE_KEYS},
            "same": "yes" if all(row[key] == getattr(stage, key) for key in _STAGE_KEYS[1:]) else "NO",
        }
        for row, stage in zip(table["rows"], stages, strict=True)
    ]
    columns = [
        Column("stage", "stage", form="d"),
        *(
            Column(f"{key}_{whose}", whose, key, "" if key == "operator" else "d")
            for key in _STAGE_KEYS
            for whose in ("paper", "here")
        ),
        Column("same", "same numbers"),
    ]
    return Sheet(table["title"], columns, rows)


_STAGE_KEYS = ("operator", "kernel", "resolution", "channels", "layers")


def network_table(
    table: Mapping[str, Any],
    networks: Sequence[Network | None],
    runs: Sequence[Run],
    *,
    free: Sequence[str] = (),
    changed: bool = False,
    notes: Sequence[str] = (),
) -> Sheet:
    """Return Table 2, 3, 5 or 7: paper, computed, trained here and the differences, a row for each of the table's.

    `networks` are the rows', None where there is none. With `changed` they are not the paper's, and there are no
    differences; nor is there one from scores on another data set than the paper's.
    """
    rows = []
    for row, network in zip(table["rows"], networks, strict=True):
        data = table.get("data", row["name"])
        usable = runs if "data" in table else [run for run in runs if run.data.name == data]
        found = scores_of(network, usable, data, free)
        rows.append(_network_row(row, network, found, data, changed))
    keys = {key for row in rows for key in row}
    columns = [column for column in _NETWORK_COLUMNS if column.key in keys]
    texts = [f"{_named(row)}: {row['note']}" for row in rows if row.get("note")]
    marked = [_PAPER_NOTE] if any(row["from_paper"] for row in rows) else []
    return Sheet(table["title"], columns, rows, [*marked, *texts, *notes])


def _network_row(
    row: Row, network: Network | None, found: Sequence[Scores], data: str, changed: bool
) -> dict[str, Any]:
    scores = found[0] if found else None
    made: dict[str, Any] = {key: row[key] for key in ("name", "scaling", "depth", "width", "resolution") if key in row}
    if "timm" in row:
        del made["resolution"]  # in pixels, not a factor
    if "other" in row:
        made |= {"network": row["model"].upper(), "other": row["other"]["name"], "other_top1": row["other"]["top1"]}
        made["other_parameters_m"] = row["other"].get("parameters_m")
    note = network.note if network else row.get("absent", "")
    made |= {"from_paper": [], "note": note, "source": network.source if network else None}
    for key, unit in (("parameters_m", 1e6), ("multiply_adds_b", 1e9)):
        counted_here = getattr(network, key[:-2]) / unit if network else None
        made |= {f"{key}_paper": row.get(key), f"{key}_here": counted_here}
        if counted_here and row.get(key) and not changed:
            made[f"{key}_difference"] = counted_here / row[key] - 1
    same_data = scores is not None and scores.first.data.name == data and not changed
    for key in ("top1", "top5"):
        if key not in row:
            continue
        here = getattr(scores, key) if scores else None
        made |= {f"{key}_paper": row[key], f"{key}_here": here}
        if here is None and not (changed and network and network.shape):  # of which the paper knows nothing
            made[f"{key}_here"] = row[key]
            made["from_paper"].append(f"{key}_here")
        elif same_data:
            made[f"{key}_difference"] = here - row[key]
    if scores:
        made |= {"top1_here_spread": scores.spread, "run": scores.describe()}
        made["run"] += f", the best of {len(found)} trainings" if len(found) > 1 else ""
    return made


def _named(row: Row) -> str:
    return " ".join(row[key] for key in ("name", "scaling") if key in row)


_NETWORK_COLUMNS = (
    *(Column(key, key) for key in ("name", "scaling")),
    *(Column(key, key, form="g") for key in ("depth", "width", "resolution")),
    Column("network", "EfficientNet"),
    *(
        Column(f"{key}_{part}", head, group, form, percent)
        for key, group, size in (
            ("parameters_m", "parameters, M", ".3g"),
            ("multiply_adds_b", "multiply-adds, B", ".3g"),
        )
        for part, head, form, percent in (
            ("paper", "paper", "g", False),
            ("here", "here", size, False),
            ("difference", "diff %", "+.1f", True),
        )
    ),
    *(
        Column(f"{key}_{part}", head, f"{key.replace('p', 'p-')}, %", form, True)
        for key in ("top1", "top5")
        for part, head, form in (("paper", "paper", ".1f"), ("here", "here", ".1f"), ("difference", "diff", "+.1f"))
    ),
    Column("other", "network", "compared with, as published"),
    Column("other_top1", "top-1, %", "compared with, as published", ".1f", True),
    Column("other_parameters_m", "parameters, M", "compared with, as published", "g"),
    _TRAINED_ON,
    Column("source", "counted"),
)


def data_table(table: Mapping[str, Any], here: Sequence[Mapping[str, int]]) -> Sheet:
    """Return Table 6 beside the `expected` counts of our configurations: classes, train and val."""
    rows = [
        {
            "name": row["name"],
            "config": f"data={row['data']}",
            **{f"{key}_paper": row[key] for key in ("train", "test", "classes")},
            **{f"{key}_here": counts["val" if key == "test" else key] for key in ("train", "test", "classes")},
            "difference": _count_difference(row, counts),
        }
        for row, counts in zip(table["rows"], here, strict=True)
    ]
    columns = [
        Column("name", "data set"),
        Column("config", "choice"),
        *(
            Column(f"{key}_{whose}", whose, group, ",d")
            for key, group in (("train", "training images"), ("test", "test images"), ("classes", "classes"))
            for whose in ("paper", "here")
        ),
        Column("difference", "difference"),
    ]
    return Sheet(table["title"], columns, rows)


def _count_difference(row: Row, counts: Mapping[str, int]) -> str | None:
    pairs = (("train", "train"), ("test", "val"), ("classes", "classes"))
    return ", ".join(f"{key} {counts[ours] - row[key]:+,d}" for key, ours in pairs if counts[ours] != row[key]) or None


def latency_table(table: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]], notes: Sequence[str]) -> Sheet:
    """Return Table 4; `measured` holds `mean_s` and `median_s` by the networks' names, as `latency.measure` does."""
    rows = []
    for row in table["rows"]:
        against = row["against"]
        ours, theirs = measured[row["name"]], measured[against["name"]]
        speedup = {"speedup_paper": row["speedup"], "speedup_here": theirs["mean_s"] / ours["mean_s"]}
        for part, times, rest in ((row, ours, {}), (against, theirs, speedup)):
            stands = part.get("timm") if "stands_for" in part else None
            rows.append({"name": part["name"], "stands": stands, "paper_s": part["latency_s"], **times, **rest})
    columns = [
        Column("name", "network"),
        Column("stands", "measured in its place"),
        Column("paper_s", "paper", "seconds an image", "g"),
        Column("mean_s", "mean", "seconds an image", ".3f"),
        Column("median_s", "median", "seconds an image", ".3f"),
        Column("speedup_paper", "paper", "EfficientNet is faster by", ".1f"),
        Column("speedup_here", "here", "EfficientNet is faster by", ".1f"),
    ]
    stands_for = [row["against"]["stands_for"] for row in table["rows"] if "stands_for" in row["against"]]
    return Sheet(table["title"], columns, rows, [*stands_for, *notes])
