"""Whole runs, in this process or through the real commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.train import train_rank


def composed(config: str, *overrides: str) -> dict[str, Any]:
    """Return a plain, resolved configuration, as a rank gets it."""
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose(config, overrides=list(overrides))
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return plain


@pytest.fixture
def compose() -> Callable[..., dict[str, Any]]:
    """Return the function that gives a rank's configuration."""
    return composed


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the digits once the first run has written them."""
    return tmp_path_factory.mktemp("data") / "digits"


@pytest.fixture
def train(tmp_path: Path, digits_root: Path) -> Callable[..., Path]:
    """Return a function that trains `debug=tiny` with overrides in this process and returns the run's folder.

    On the CPU, unless an override says otherwise.
    """

    def run(name: str, *overrides: str) -> Path:
        where = [f"run_root={tmp_path}", f"name={name}", "device=cpu", f"data.root={digits_root}"]
        config = composed("train", "debug=tiny", "model.width=0.25", *where, *overrides)
        folder = tmp_path / name
        train_rank(config, str(folder), config["device"])
        return folder

    return run


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs one of the project's commands as a user would, in an empty folder."""

    def run(name: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        script = Path(sys.executable).with_name(name)
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            [str(script), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout
        )

    return run
