"""scripts/recipes_cifar10.sh: every command in it is one that the commands take."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effnet_train.cli import check
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.soup import check_soup

SCRIPT = CONFIG_DIR.parent / "scripts" / "recipes_cifar10.sh"


def commands(folder: Path, study: str) -> tuple[int, list[list[str]]]:
    """Run a study with commands that only say how they were called."""
    for name in ("effnet-train", "effnet-eval", "effnet-export"):
        file = folder / name
        file.write_text(f'#!/bin/bash\nprintf "%s\\t" {name} "$@" >> calls; echo >> calls\n')
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LITE0": "lite0.pth"}
    done = subprocess.run(["bash", str(SCRIPT), study], cwd=folder, env=environment, capture_output=True, timeout=60)
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, [line.rstrip("\t").split("\t") for line in lines]


@pytest.mark.parametrize(("study", "trainings"), [("finetune", 2), ("fixres", 4), ("progressive", 2), ("soup", 5)])
def test_every_command_of_a_study_composes(
    compose: Callable[..., dict[str, Any]], tmp_path: Path, study: str, trainings: int
) -> None:
    status, called = commands(tmp_path, study)
    assert status == 0
    names = [word for name, *words in called if name == "effnet-train" for word in words if word.startswith("name=")]
    assert len(names) == len(set(names)) == 3 * trainings
    types = {"train": check.TRAIN, "eval": check.EVAL, "export": check.EXPORT}
    for command, *words in called[: len(called) // 3]:
        kind = command.removeprefix("effnet-")
        config = compose(kind, *words)
        check.check_config(config, types[kind])
        if kind == "export":
            check_soup(config)


def test_another_study_is_refused(tmp_path: Path) -> None:
    assert commands(tmp_path, "distil") == (2, [])
