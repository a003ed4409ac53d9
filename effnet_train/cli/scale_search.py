"""`effnet-scale search`: candidates on the budget, each an `effnet-train`, ranked."""

import csv
import io
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from effnet_train.analysis.complexity import Complexity, complexity
from effnet_train.cli import check, plan, run_folder
from effnet_train.cli.build import without_weights
from effnet_train.cli.launch import config_dir_words, is_remote, training_command, words_beside
from effnet_train.cli.lock import locked
from effnet_train.distributed import Session
from effnet_train.engine.checkpoint import write_bytes
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE
from effnet_train.search.coefficients import DIMENSIONS, Coefficients, grid, scaled
from effnet_train.search.trials import Trial, run_trials, stop_signals

_FAILED_EXIT_CODE = 1
# Keys that choose candidates and settle no training: another start may add to them.
_CHOOSING = ("step", "tolerance", "alpha", "beta", "gamma", "flops_tolerance", "baseline", "seeds", "seed", "jobs")
_OWN = (*_CHOOSING, "phi", "multiple")  # not effnet-train's
_COLUMNS = (
    *("rank", "alpha", "beta", "gamma", "product", *DIMENSIONS, "parameters", "multiply_adds", "times_base"),
    *("top1", "spread", "seeds", "failed"),
)


@dataclass(frozen=True)
class Candidate:
    """Hold a network to train: its dimensions and what it costs; the base has no coefficients."""

    coefficients: Coefficients | None
    dimensions: Mapping[str, Any]
    cost: Complexity

    @property
    def name(self) -> str:
        """Word it as the name of a folder."""
        return self.coefficients.name if self.coefficients else "baseline"

    def is_same_network(self, other: "Candidate") -> bool:
        """Say whether both have the same layers at the same resolution."""
        return self.dimensions["resolution"] == other.dimensions["resolution"] and self.cost == other.cost


def search(cfg: DictConfig) -> None:
    """Plan, or train what has not been trained yet and rank.

    Raises SystemExit(1) where a training failed, SystemExit(75) where it was stopped.
    """
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        raise ValueError("effnet-scale search takes no -m: jobs= trains several candidates at a time, or cluster= does")
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.SCALE_SEARCH)
    _check_resolution(cfg)
    seeds = config["seeds"] or [config["seed"]]
    check.check_seeds(seeds)
    _, classes = plan.of_trainings(cfg)
    base, kept, dropped = _candidates(config, classes)
    budget = 2 ** config["phi"] * base.cost.multiply_adds
    print("\n".join(_plan(config, base, kept, dropped, len(seeds), budget)), flush=True)
    if not kept:
        raise ValueError(
            f"no candidate is within flops_tolerance={config['flops_tolerance']:g} of the budget: "
            "raise it, or give other alpha=, beta=, gamma= or step="
        )
    if config["dry_run"]:
        return
    kept = [*([base] if config["baseline"] else []), *kept]
    folder = Path(config["run_root"]) / str(config["name"])
    with locked(folder, Session()):
        run_folder.claim(folder, {key: value for key, value in config.items() if key not in _CHOOSING})
        _train(kept, seeds, folder, config, base.cost.multiply_adds, classes)


def _train(
    kept: Sequence[Candidate], seeds: Sequence[int], folder: Path, config: Mapping[str, Any], base: int, classes: int
) -> None:
    """Train what has not been trained yet, and rank. Raises SystemExit as `search` does."""
    trials = {(one.name, seed): _trial(one, seed, folder, config) for one in kept for seed in seeds}
    jobs = config["jobs"] if config["jobs"] != "auto" else (len(trials) if is_remote() else 1)
    with stop_signals() as asked:
        failed = run_trials(list(trials.values()), jobs=jobs, told=lambda text: print(text, flush=True), asked=asked)
    rows = _rows(kept, seeds, trials, failed, base)
    _write(folder, rows, config)
    print("\n".join(_table(rows, folder, config, classes)))
    if asked:
        print(f"effnet-scale: stopped, all saved in {folder}: the same command goes on", file=sys.stderr)
        raise SystemExit(PREEMPTED_EXIT_CODE)
    if failed:
        raise SystemExit(_FAILED_EXIT_CODE)


def _check_resolution(cfg: DictConfig) -> None:
    """Raise ValueError where images do not come in the size of each candidate, which is what is counted."""
    other = cfg.copy()
    other.model.resolution = cfg.model.resolution + 1
    if other.data.preprocess.resolution != other.model.resolution:
        size = cfg.data.preprocess.resolution
        raise ValueError(
            f"data.preprocess.resolution={size} would be the size of every candidate's images, whatever gamma: "
            f"leave it away, and give the base's resolution as model.resolution={size}"
        )


def _candidates(
    config: Mapping[str, Any], classes: int
) -> tuple[Candidate, list[Candidate], list[tuple[Candidate, str]]]:
    """Return the base, the candidates on the budget, and those that are not to be trained, with the reason."""
    model, phi = config["model"], config["phi"]
    if phi <= 0:
        raise ValueError(f"phi={phi:g} must be above 0: the budget is 2 ** phi times the base's multiply-adds")
    if config["flops_tolerance"] <= 0:
        raise ValueError(f"flops_tolerance={config['flops_tolerance']:g} must be above 0")
    costs: dict[str, Complexity] = {}

    def candidate(coefficients: Coefficients | None) -> Candidate:
        own = {key: model[key] for key in DIMENSIONS}
        dimensions = own if coefficients is None else scaled(model, coefficients, phi, multiple=config["multiple"])
        key = str(dimensions)
        if key not in costs:
            costs[key] = cost_of(model | dimensions, classes)
        return Candidate(coefficients, dimensions, costs[key])

    axes = {key: config[key] for key in ("step", "tolerance", "alpha", "beta", "gamma")}
    base, all_of_them = candidate(None), [candidate(one) for one in grid(**axes)]
    if not all_of_them:
        raise ValueError(
            f"no alpha * beta^2 * gamma^2 is within tolerance={config['tolerance']:g} of 2: raise it, or lower step="
        )
    budget = 2**phi * base.cost.multiply_adds
    kept: list[Candidate] = []
    dropped: list[tuple[Candidate, str]] = []
    for one in all_of_them:
        off = one.cost.multiply_adds / budget - 1
        # Rounding makes the same network of neighbours: it is trained once.
        twin = next((other.name for other in kept if other.is_same_network(one)), None)
        if abs(off) > config["flops_tolerance"]:
            dropped.append((one, f"{off:+.1%} off the budget"))
        elif twin:
            dropped.append((one, f"the same network as {twin}"))
        else:
            kept.append(one)
    return base, kept, dropped


def cost_of(model: Mapping[str, Any], classes: int) -> Complexity:
    """Count the network of a configuration, without its weights."""
    return complexity(without_weights(model, classes), model["resolution"])


def _plan(
    config: Mapping[str, Any],
    base: Candidate,
    kept: Sequence[Candidate],
    dropped: Sequence[tuple[Candidate, str]],
    seeds: int,
    budget: float,
) -> list[str]:
    trainings = (len(kept) + config["baseline"]) * seeds
    passes = sum(one.cost.multiply_adds for one in kept) / base.cost.multiply_adds + config["baseline"]
    lines = [
        f"base           {_words(base)}",
        f"budget         {budget:,.0f} multiply-adds an image, 2 ** {config['phi']:g} times the base's",
        f"candidates     {len(kept)} of {len(kept) + len(dropped)} within {config['flops_tolerance']:.0%} of it",
        f"trainings      {trainings} of {config['epochs']:g} epochs; as much as {passes * seeds:.1f} of the base",
    ]
    lines += [f"candidate      {one.name}: {_words(one)} ({one.cost.multiply_adds / budget - 1:+.1%})" for one in kept]
    lines += [f"dropped        {one.name}: {reason}" for one, reason in dropped]
    return lines


def _words(one: Candidate) -> str:
    sizes = "depth {depth:g}, width {width:g}, {resolution} pixels".format(**one.dimensions)
    return f"{sizes}, {one.cost.parameters:,} parameters, {one.cost.multiply_adds:,} multiply-adds"


def _trial(one: Candidate, seed: int, folder: Path, config: Mapping[str, Any]) -> Trial:
    """Return the `effnet-train` of a candidate: the words of this command line, with its own in their place."""
    place = folder / f"{one.name}-seed{seed}"
    own = [*(f"model.{key}={value}" for key, value in one.dimensions.items()), f"seed={seed}"]
    words = words_beside(own, (*_OWN, *(f"model.{key}" for key in DIMENSIONS)), place, ("recipe",))
    return Trial(f"{one.name}, seed {seed}", place, training_command(words), config["max_steps"])


def _rows(
    kept: Sequence[Candidate],
    seeds: Sequence[int],
    trials: Mapping[tuple[str, int], Trial],
    failed: Mapping[str, str],
    base: int,
) -> list[dict[str, Any]]:
    """Return what came of each candidate, in the order of `ranked`."""
    rows: list[dict[str, Any]] = []
    for one in kept:
        own = [trials[one.name, seed] for seed in seeds]
        found = [run.top1 for trial in own if (run := trial.result()) is not None]
        values = one.coefficients
        row: dict[str, Any] = {"name": one.name}
        row |= {key: getattr(values, key) if values else None for key in ("alpha", "beta", "gamma", "product")}
        row |= {
            **one.dimensions,
            "parameters": one.cost.parameters,
            "multiply_adds": one.cost.multiply_adds,
            "times_base": one.cost.multiply_adds / base,
            "top1": statistics.fmean(found) if found else None,
            "spread": statistics.stdev(found) if len(found) > 1 else None,
            "seeds": len(found),
            "failed": [failed[trial.name] for trial in own if trial.name in failed],
        }
        rows.append(row)
    return ranked(rows)


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in order, the base and those without a result last; equals share a rank, the cheapest first."""
    scores = [row["top1"] for row in rows if row["alpha"] is not None and row["top1"] is not None]

    def rank(row: Mapping[str, Any]) -> int | None:
        absent = row["alpha"] is None or row["top1"] is None
        return None if absent else 1 + sum(score > row["top1"] for score in scores)

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["alpha"] is None, row["top1"] is None, -(row["top1"] or 0), row["multiply_adds"]

    return [{**row, "rank": rank(row)} for row in sorted(rows, key=place)]


def _write(folder: Path, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
    found = {"phi": config["phi"], "model": config["model"], "epochs": config["epochs"], "rows": rows}
    write_bytes(folder / "search.json", json.dumps(found, indent=1).encode() + b"\n")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "failed": "; ".join(row["failed"])} for row in rows)
    write_bytes(folder / "search.csv", text.getvalue().encode())


def _table(rows: Sequence[Mapping[str, Any]], folder: Path, config: Mapping[str, Any], classes: int) -> list[str]:
    lines = [
        "",
        f"{'rank':>4}  {'alpha':>5} {'beta':>5} {'gamma':>5}  {'x base':>6}  {'top-1':>8}  {'spread':>6}  seeds",
    ]
    for row in rows:
        factors = [f"{row[key]:5g}" if row["alpha"] is not None else "    -" for key in ("alpha", "beta", "gamma")]
        top1 = f"{row['top1']:8.2%}" if row["top1"] is not None else "       -"
        spread = f"{row['spread']:6.2%}" if row["spread"] is not None else "     -"
        note = "  (base)" if row["alpha"] is None else ""
        note += f"  FAILED: {row['failed'][0]}" if row["failed"] else ""
        rank = row["rank"] or "-"
        lines.append(
            f"{rank:>4}  {' '.join(factors)}  {row['times_base']:6.2f}  {top1}  {spread}  {row['seeds']:>5}{note}"
        )
    lines += ["", f"written to {folder / 'search.csv'} and search.json"]
    best = next((row for row in rows if row["rank"] == 1), None)
    if best:
        hydra_cfg = HydraConfig.get()
        given = [text.lstrip("+") for text in hydra_cfg.overrides.task]
        # The base's dimensions in full: recipe= and debug= may have set them, too.
        sizes = {f"model.{key}": config["model"][key] for key in DIMENSIONS}
        own = [text for text in given if text.startswith("model.") and text.partition("=")[0] not in sizes]
        values = {**sizes, **{key: best[key] for key in ("alpha", "beta", "gamma")}}
        values |= {"multiple": config["multiple"], "num_classes": classes}
        words = [*config_dir_words(), f"model={hydra_cfg.runtime.choices['model']}", *own]
        words += [f"{key}={value}" for key, value in values.items()]
        lines.append(f"the best, scaled further: effnet-scale apply {shlex.join(words)} phi=2")
    return lines
