"""What searches have found: tables, Pareto fronts, rewards over trials."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from effnet_train.analysis.figures import dress, new_figure
from effnet_train.analysis.plots import COLORS
from effnet_train.analysis.runs import without
from effnet_train.analysis.sheets import Column, Sheet
from effnet_train.search.journal import Entry, Journal
from effnet_train.search.run import JOURNAL
from effnet_train.search.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By kind of cost: what it is called, and by how much it is divided.
_COSTS: Mapping[str, tuple[str, float]] = {
    "flops": ("multiply-adds, millions", 1e6),
    "params": ("parameters, millions", 1e6),
    "latency_ms": ("latency, ms", 1.0),
}
_CSV = ("search", "trial", "status", "same_as", "reward", "top1", *_COSTS, "seconds", "reason", "network")


@dataclass(frozen=True)
class Found:
    """Hold a search: its folder, configuration, space, the model that its networks build on, and its entries."""

    folder: Path
    config: Mapping[str, Any]
    space: Space
    base: str
    entries: tuple[Entry, ...]

    @property
    def networks(self) -> list[Entry]:
        """Return the entries of trained networks, each once, the highest reward first."""
        own = [entry for entry in self.entries if entry.status == "trained" and entry.same_as is None]
        return sorted(own, key=lambda entry: (-(entry.reward or 0.0), entry.number))

    @property
    def rewards(self) -> list[float]:
        """Return the rewards by the trials' numbers; without those that failed."""
        return [e.reward for e in sorted(self.entries, key=lambda entry: entry.number) if e.reward is not None]

    def entry(self, trial: int | str) -> Entry:
        """Return the best entry, or that of a number. Raises ValueError where there is none."""
        if trial == "best":
            if not self.networks:
                raise ValueError(f"search={self.folder} holds no trained network yet")
            return self.networks[0]
        known = {entry.number: entry for entry in self.entries}
        if trial not in known:
            raise ValueError(f"trial={trial} is none of the {len(known)} trials of {self.folder}")
        return known[int(trial)]


def read(folder: Path) -> Found:
    """Read a search's folder, also while it is at work. Raises FileNotFoundError, ValueError."""
    if not (folder / JOURNAL).is_file():
        raise FileNotFoundError(f"search={folder} holds no {JOURNAL}: give the folder of an effnet-search run")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    space = Space(**{key: value for key, value in config["space"].items() if key != "_target_"})
    entries = tuple(Journal(folder / JOURNAL, readonly=True).entries.values())
    return Found(folder, config, space, str(config["base"]), entries)


def pareto(entries: Sequence[Entry], kind: str) -> list[Entry]:
    """Return the networks than which none is both cheaper, or as cheap, and better; the cheapest first."""
    front: list[Entry] = []
    for entry in sorted(entries, key=lambda one: (one.costs[kind], -(one.top1 or 0.0))):
        if not front or (entry.top1 or 0.0) > (front[-1].top1 or 0.0):
            front.append(entry)
    return front


def text(searches: Sequence[Found], top: int) -> str:
    """Return tables of the best networks and of the very best one's stages."""
    pairs = [(found, entry) for found in searches for entry in found.networks]
    pairs.sort(key=lambda pair: (-(pair[1].reward or 0.0), pair[1].number))
    rows = [
        {
            "rank": rank,
            "search": found.folder.name if len(searches) > 1 else None,
            **{"trial": entry.number, "reward": entry.reward, "top1": entry.top1},
            **{kind: cost / _COSTS[kind][1] for kind, cost in entry.costs.items()},
        }
        for rank, (found, entry) in enumerate(pairs[:top], 1)
    ]
    columns = [
        Column("rank", "rank", form="d"),
        Column("search", "search"),
        Column("trial", "trial", form="d"),
        Column("reward", "reward", form=".4f"),
        Column("top1", "top-1 %", form=".2f", percent=True),
        *(Column(kind, word, form=".4g") for kind, (word, _) in _COSTS.items()),
    ]
    sheets = [Sheet("The best networks", columns, rows), searches_sheet(searches)]
    sheets += [stages_sheet(*pairs[0])] if pairs else []
    return "\n\n".join(sheet.render("terminal") for sheet in sheets if sheet.rows) or "no trial has a reward yet"


def searches_sheet(searches: Sequence[Found]) -> Sheet:
    """Return a row a search, and one of means for those that differ in their seeds alone.

    `last` is the mean reward of the last round's number of trials, `front` the trials than which none is both cheaper
    and better.
    """
    rows: list[dict[str, Any]] = []
    for name, members in groups(searches).items():
        own = [_search_row(found) for found in members if found.rewards]
        rows += own
        if len(own) > 1:
            means = {key: statistics.fmean(row[key] for row in own) for key in ("best", "last")}
            rows.append({"search": f"{name}, mean of {len(own)}", **means})
    columns = [
        Column("search", "search"),
        Column("trials", "trials", form="d"),
        Column("trained", "networks trained", form="d"),
        Column("best", "best reward", form=".4f"),
        Column("last", "mean of the last round", form=".4f"),
        Column("front", "front of top-1 and cost"),
    ]
    return Sheet("The searches" if len(rows) > 1 else "The search", columns, rows)


def _search_row(found: Found) -> dict[str, Any]:
    front = pareto(found.networks, found.config["reward"]["cost"])
    return {
        **{"search": found.folder.name, "trials": len(found.entries), "trained": len(found.networks)},
        **{"best": max(found.rewards), "last": moving_mean(found.rewards, int(found.config["round"]))[-1]},
        "front": " ".join(str(entry.number) for entry in front),
    }


def stages_sheet(found: Found, entry: Entry) -> Sheet:
    """Return a network's stages as a table like the paper's Table 1."""
    size = -(-int(found.config["data"]["preprocess"]["resolution"]) // 2)
    rows = []
    for number, stage in enumerate(found.space.decode(entry.tokens), 2):
        words = {"separable": "MBConv1", "conv": "Conv"}
        name = words.get(stage["op"]) or stage["op"].replace("mbconv", "MBConv")
        operator = f"{name}, k{stage['kernel']}x{stage['kernel']}"
        gate = f"{stage['se_ratio']:g}" if stage["se_ratio"] else "none"
        own = {"operator": operator, "resolution": f"{size} x {size}", "gate": gate}
        rows.append({"stage": number, **own, **{key: stage[key] for key in ("skip", "channels", "repeats")}})
        size = -(-size // stage["stride"])
    columns = [
        Column("stage", "stage", form="d"),
        *(Column(key, key) for key in ("operator", "resolution")),
        Column("channels", "channels", form="d"),
        Column("repeats", "layers", form="d"),
        Column("gate", "squeeze-excite"),
        Column("skip", "skip"),
    ]
    ends = f"stem of {found.space.stem_channels}, head of {found.space.head_channels} channels"
    return Sheet(f"Trial {entry.number} of {found.folder.name} ({ends})", columns, rows)


def csv_text(searches: Sequence[Found]) -> str:
    """Return all trials, a line each."""
    file = io.StringIO()
    writer = csv.DictWriter(file, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for found in searches:
        for entry in sorted(found.entries, key=lambda one: one.number):
            writer.writerow({**vars(entry), **entry.costs, "search": found.folder.name, "trial": entry.number})
    return file.getvalue()


def groups(searches: Sequence[Found]) -> dict[str, list[Found]]:
    """Return searches by what they are called, those together that differ in their seeds alone."""
    same: dict[str, list[Found]] = {}
    for found in searches:
        kept = without(found.config, ("seed", "name", "run_root"))
        same.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(found)
    kinds = [str(members[0].config["searcher"]["_target_"]).rpartition(".")[2] for members in same.values()]
    names = [
        kind if kinds.count(kind) == 1 else members[0].folder.name
        for kind, members in zip(kinds, same.values(), strict=True)
    ]
    return dict(zip(names, same.values(), strict=True))


def rewards_figure(searches: Sequence[Found]) -> "Figure":
    """Draw the best reward so far, and the mean reward of the last round's number of trials, over trials."""
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    for (name, members), color in zip(groups(searches).items(), COLORS, strict=False):
        label = name if len(members) == 1 else f"{name}, mean of {len(members)} seeds"
        curves = [list(accumulate(found.rewards, max)) for found in members]
        means = [moving_mean(found.rewards, int(found.config["round"])) for found in members]
        _curves(left, curves, color, label)
        _curves(right, means, color, label)
        if len(searches) == 1:
            rewards = members[0].rewards
            right.plot(range(1, len(rewards) + 1), rewards, ".", color=color, alpha=0.4, markersize=4)
    left.set_title("best so far", fontsize=11, loc="left")
    right.set_title("mean of the last round", fontsize=11, loc="left")
    for axes in (left, right):
        axes.set_xlabel("trials")
        axes.set_ylabel("reward")
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower right", frameon=False)
    return figure


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and of up to `width - 1` before it."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def _curves(axes: "Axes", curves: Sequence[Sequence[float]], color: str, label: str) -> None:
    shortest = min(len(curve) for curve in curves)  # also of none, where a search has but begun
    mean = [statistics.fmean(curve[i] for curve in curves) for i in range(shortest)]
    axes.plot(range(1, shortest + 1), mean, color=color, linewidth=2, label=label)
    if len(curves) > 1:
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=color, linewidth=0.7, alpha=0.6)


def pareto_figure(searches: Sequence[Found]) -> "Figure":
    """Draw top-1 against the cost of all networks, and through those a line than which none is cheaper and better."""
    kind = searches[0].config["reward"]["cost"]
    word, unit = _COSTS[kind]
    figure = new_figure(7.5, 5)
    axes = figure.subplots()
    for (name, members), color in zip(groups(searches).items(), COLORS, strict=False):
        networks = [entry for found in members for entry in found.networks if kind in entry.costs]
        points = [(entry.costs[kind] / unit, 100 * (entry.top1 or 0.0)) for entry in networks]
        front = [(entry.costs[kind] / unit, 100 * (entry.top1 or 0.0)) for entry in pareto(networks, kind)]
        axes.plot(*_columns(points), ".", color=color, alpha=0.45, markersize=5)
        axes.plot(*_columns(front), color=color, linewidth=1.6, marker="o", markersize=4, label=name)
    target = searches[0].config["reward"]["target"] / unit
    axes.axvline(target, color="#777777", linestyle="--", linewidth=1, label="target")
    axes.set_xscale("log")
    dress(axes, word[0].upper() + word[1:], "Top-1")
    axes.legend(loc="lower right", frameon=False)
    return figure


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
