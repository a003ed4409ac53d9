"""The folder of a run: named by its choices, and refused to another configuration."""

import os
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from effnet_train.cli.app import differing_keys

# What may change from one start of a run to the next: where and how it runs and is watched, not what it computes.
FREE = (
    "accumulate",
    "checkpoint",
    "data.root",
    "device",
    "dry_run",
    "log_every",
    "loggers",
    "max_steps",
    "name",
    "ranks",
    "run_root",
    "save_every",
    "threads",
    "workers",
)
# Overrides that are part of the folder's name already, or have no part in it.
_NOT_IN_NAME = (*FREE, "model", "data", "recipe", "seed", "debug")


def run_folder(cfg: DictConfig) -> Path:
    """Return the run's folder; in a sweep, with the overrides that tell its runs apart."""
    folder = Path(cfg.run_root) / str(cfg.name)
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return folder
    told_apart = [o for o in hydra_cfg.overrides.task if o.split("=")[0].lstrip("+") not in _NOT_IN_NAME]
    return folder.with_name("-".join([folder.name, *(o.lstrip("+").replace("/", "_") for o in told_apart)]))


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Make the run's folder and write its configuration, or check that it holds the same one.

    Raises ValueError, naming the keys, where the folder belongs to another configuration.
    """
    file = folder / "config.yaml"
    if file.exists():
        former = yaml.safe_load(file.read_text())
        differing = {
            key: values
            for key, values in differing_keys(former, config).items()
            if not any(key == free or key.startswith(f"{free}.") for free in FREE)
        }
        if differing:
            text = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in differing.items())
            raise ValueError(
                f"the folder {folder} holds a run of another configuration: {text}. "
                "Give name=... for a folder of its own, or the former values to go on"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".config-{os.getpid()}.yaml")
    temporary.write_text(yaml.safe_dump(config, sort_keys=False))
    temporary.rename(file)
