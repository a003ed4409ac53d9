"""The paper's tables for `effnet-table` and `effnet-plot`: networks composed and counted, the user's runs found."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import nn

from effnet_train.analysis.runs import DataSet, Run, data_set, distinct, find_runs, of_length, shape_of
from effnet_train.analysis.tables import Network, counted, data_sets, read_table, scores_of, timm_network
from effnet_train.cli import build
from effnet_train.cli.app import CONFIG_DIR, user_message
from effnet_train.cli.run_folder import FREE

_FACTORS = ("depth", "width", "resolution")


def table(number: int) -> dict[str, Any]:
    """Return one of the paper's tables."""
    return read_table(CONFIG_DIR / "tables" / f"table{number}.yaml")


def composed(overrides: Iterable[str]) -> DictConfig:
    """Compose the configuration of a training run. Raises ValueError where the overrides cannot be."""
    words = list(overrides)
    running = GlobalHydra.instance()
    command, running.hydra = running.hydra, None  # Hydra composes for one program at a time
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose("train", overrides=words)
    except Exception as error:
        text = user_message(error, "train")
        if text is None:
            raise
        raise ValueError(f"there is no such training as effnet-train {' '.join(words)}: {text}") from error
    finally:
        running.hydra = command


def row_words(row: Mapping[str, Any], overrides: Sequence[str], base: Mapping[str, Any] | None = None) -> list[str]:
    """Return the overrides of effnet-train that build a row's network: its factors times what `overrides` set.

    `base` is the model's configuration under these, if it has been composed already.
    """
    words = [f"model={row['model']}", *overrides]
    if all(row.get(key, 1) == 1 for key in _FACTORS):
        return words
    values = _scaled(composed(words).model if base is None else base, row)
    kept = [word for word in words if word.partition("=")[0] not in {f"model.{key}" for key in values}]
    return [*kept, *(f"model.{key}={value:.6g}" for key, value in values.items())]


def _scaled(base: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: float(f"{base[key] * row[key]:.6g}") for key in _FACTORS if row.get(key, 1) != 1}
    return values | ({"resolution": round(values["resolution"])} if "resolution" in values else {})


def networks(rows: Sequence[Mapping[str, Any]], overrides: Sequence[str] = ()) -> list[Network | None]:
    """Count the network of each row, None where it is `absent`; the `overrides` change those that are ours."""
    classes = {row["name"]: row["classes"] for row in table(6)["rows"]}
    bases = {name: composed_model(name, overrides) for name in {row["model"] for row in rows if "model" in row}}
    return [_network(row, overrides, bases, classes.get(row["name"], 1000)) for row in rows]


def composed_model(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a model's configuration under overrides."""
    model: Any = OmegaConf.to_container(composed([f"model={name}", *overrides]).model, resolve=True)
    return model


def change_networks(rows: Sequence[Mapping[str, Any]], overrides: Sequence[str]) -> bool:
    """Say whether overrides make other networks of the rows than the paper's."""
    bases = {row["model"] for row in rows if "model" in row} if overrides else set()
    pairs = ([composed_model(base, words) for words in ([], overrides)] for base in bases)
    return any(shape_of(one, one["resolution"]) != shape_of(other, other["resolution"]) for one, other in pairs)


def _network(
    row: Mapping[str, Any], overrides: Sequence[str], bases: Mapping[str, Mapping[str, Any]], classes: int
) -> Network | None:
    if "timm" in row:
        note = row.get("note", "")
        return counted(timm_network(row["timm"]), row["resolution"], f"timm {row['timm']}", note=note)
    if "model" not in row:
        return None
    base = bases[row["model"]]
    model = {**base, **_scaled(base, row)}
    source = " ".join(word for word in row_words(row, overrides, base) if word.startswith("model"))
    note = "the paper prints no factors for this row; those assumed here are ours" if row.get("assumed") else ""
    return count_model(model, model["resolution"], classes, source=source, note=note)


def built(part: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Build the network of a row, with random weights, and return it with its resolution."""
    if "timm" in part:
        import timm

        return timm.create_model(part["timm"]), part["resolution"]
    model = build.build_model(composed([f"model={part['model']}"]).model, 1000)
    return model, int(model.resolution)  # type: ignore[arg-type]


def count_model(cfg: Mapping[str, Any], resolution: int, classes: int, *, source: str, note: str = "") -> Network:
    """Count a network of ours from its configuration."""
    model = build.without_weights(cfg, classes)
    return counted(model, resolution, source, shape=shape_of(cfg, resolution), note=note)


def count_run(run: Run) -> Network:
    """Count the network of a run."""
    return count_shape(run.shape, run.data.classes)


def count_shape(shape: Mapping[str, Any], classes: int) -> Network:
    """Count a network of ours from its shape, see `runs.shape_of`. Raises ValueError for one that is none of ours."""
    build.check_targets({"model": shape}, "a run's config.yaml")
    return count_model(shape, shape["resolution"], classes, source="")


def map_checkpoints(run_root: str) -> dict[str, str]:
    """Return the folders of the best runs of Table 7's networks, by what the table calls these.

    Raises ValueError where there are none.
    """
    rows = table(7)["rows"]
    runs = finished_runs(run_root)
    found = {
        row["scaling"]: str(scores[0].first.folder)
        for row, network in zip(rows, networks(rows), strict=True)
        if (scores := scores_of(network, runs, "ImageNet", FREE))
    }
    if not found:
        words = "; ".join(network.source for network in networks(rows) if network)
        raise ValueError(
            f"run_root={run_root} holds no finished run of a network of Table 7 ({words}): train them, or give "
            "checkpoints=[...], a run's folder or weights each"
        )
    return found


def finished_runs(run_root: str, max_steps: int | None = None, *, told: bool = True) -> list[Run]:
    """Return the finished runs below `run_root`, one of each configuration and seed, that are whole or of `max_steps`.

    Which are left out is said on standard error, unless `told` is False. Raises FileNotFoundError where there is no
    such folder.
    """
    root = Path(run_root)
    if not root.exists() and run_root == "runs":  # the default: nobody has trained here yet
        return []
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"run_root={run_root} {what}: give the folder that holds the runs' folders")
    runs, damaged = find_runs(root, _known())
    runs, short = of_length(runs, max_steps)
    runs, repeated = distinct(runs, FREE)
    for text in (*damaged, *short, *repeated) if told else ():
        print(f"warning: {text}", file=sys.stderr)
    return runs


def known_data_set(cfg: DictConfig, classes: int, images: int) -> DataSet:
    """Return which data set a configuration's is, by the numbers of its classes and of its training images."""
    return data_set(classes, images, str(cfg.root), _known())


@cache
def _known() -> tuple[tuple[str, int, int], ...]:
    return tuple(data_sets(table(6)))
