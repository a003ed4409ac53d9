"""The folder of a run: named by its choices, and refused to another configuration."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from effnet_train.cli.app import CONFIG_DIR, differing_keys
from effnet_train.engine.checkpoint import write_bytes

# What may change from one start of a run to the next: where and how it runs and is watched, not what it is to compute.
# (Ranks and micro-batches do change what BatchNorm sees as one batch: a cluster does not always give the same again.)
FREE = (
    "accumulate",
    "checkpoint",
    "cuda_graph",
    "data.cache",
    "data.copy",
    "data.on_error",
    "data.root",
    "data.shard_cache",
    "device",
    "dry_run",
    "eval_batch_size",
    "log_every",
    "loggers",
    "max_restarts",
    "max_steps",
    "model.checkpointing",
    "model.fused",
    "name",
    "new_classifier",
    "on_nan",
    "pseudo.root",
    "ranks",
    "run_root",
    "save_every",
    "stop_before_end_s",
    "stop_signals",
    "threads",
    "timeout_s",
    "workers",
)
# What tells the runs of a sweep apart, and may change where one goes on: of six ranks there are no groups of four.
_MAY_CHANGE = ("sync_bn",)
# Overrides that the default name holds already.
_IN_NAME = ("model", "data", "recipe", "seed")


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _may_change(key: str) -> bool:
    return _is_free(key) or key in _MAY_CHANGE


def run_folder(cfg: DictConfig) -> Path:
    """Return the run's folder; in a sweep, with the overrides that tell its runs apart."""
    folder = Path(cfg.run_root) / str(cfg.name)
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return folder
    overrides = {text.partition("=")[0].lstrip("+~"): text.lstrip("+") for text in hydra_cfg.overrides.task}
    said = ("cluster", "debug", *(() if "name" in overrides else _IN_NAME))
    told_apart = [text for key, text in overrides.items() if key not in said and not _is_free(key)]
    # Nothing in it that a shell or Hydra would read: the folder is to be given as checkpoint=.
    return folder.with_name("-".join([folder.name, *(re.sub(r"[^\w.+-]+", "_", text) for text in told_apart)]))


def check(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError, naming the keys, where the folder belongs to another configuration."""
    file = folder / "config.yaml"
    if file.exists():
        _check_same(folder, yaml.safe_load(file.read_text()), config)


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Make the run's folder and write its configuration, where it does not hold the same already.

    Raises ValueError, naming the keys, where it holds another one.
    """
    check(folder, config)
    file = folder / "config.yaml"
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(file, yaml.safe_dump(config, sort_keys=False).encode())
        elif not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(
            f"cannot write to the run's folder {folder} ({error.strerror}): choose another place with run_root=..."
        ) from error


def _parts_since(former: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of the configuration that a former version had not, where they are what does nothing."""
    new = config.keys() - former.keys()
    defaults = yaml.safe_load((CONFIG_DIR / "train.yaml").read_text(encoding="utf-8")) if new else {}
    return {key: config[key] for key in new if key in defaults and defaults[key] == config[key]}


def _check_same(folder: Path, former: object, config: dict[str, Any]) -> None:
    if isinstance(former, dict):
        former = {**_parts_since(former, config), **former}
    differing = {
        key: (was, now)
        for key, (was, now) in differing_keys(former, config).items()
        if not (_may_change(key) or (was is None and now is False))  # a switch that was not there yet is off
    }
    if differing:
        text = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in differing.items())
        nothing = "" if any(folder.glob("*.pt")) else ". It has no checkpoint yet: to remove it loses nothing"
        raise ValueError(
            f"the folder {folder} holds a run of another configuration: {text}. "
            f"Give name=... for a folder of its own, or the former values to go on{nothing}"
        )
