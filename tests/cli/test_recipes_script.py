"""scripts/recipes_cifar10.sh, scripts/noisy_student.sh: every command in them is one that the commands take."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effnet_train.cli import check
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.soup import check_soup

SCRIPTS = CONFIG_DIR.parent / "scripts"


def commands(folder: Path, script: str, *words: str) -> tuple[int, list[list[str]]]:
    """Run a script with commands that only say how they were called."""
    for name in ("effnet-train", "effnet-eval", "effnet-export", "effnet-label"):
        file = folder / name
        file.write_text(f'#!/bin/bash\nprintf "%s\\t" {name} "$@" >> calls; echo >> calls\n')
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LITE0": "lite0.pth"}
    command = ["bash", str(SCRIPTS / script), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60)
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done.returncode, [line.rstrip("\t").split("\t") for line in lines]


@pytest.mark.parametrize(("study", "trainings"), [("finetune", 2), ("fixres", 4), ("progressive", 2), ("soup", 5)])
def test_every_command_of_a_study_composes(
    compose: Callable[..., dict[str, Any]], tmp_path: Path, study: str, trainings: int
) -> None:
    status, called = commands(tmp_path, "recipes_cifar10.sh", study)
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
    assert commands(tmp_path, "recipes_cifar10.sh", "distil") == (2, [])


def test_noisy_student_labels_where_it_has_not_or_otherwise(
    compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    words = ["runs/teacher", "/images", "runs/noisy", "b0 b1", "130", "data=imagenet", "data.root=/path"]
    status, called = commands(tmp_path, "noisy_student.sh", *words)
    assert (status, [name for name, *_ in called]) == (0, ["effnet-label", "effnet-train"] * 2)
    assert "checkpoint=runs/noisy/round-1-b0" in called[2]
    for command, *given in called:
        kind = command.removeprefix("effnet-")
        own = ["~data.preprocess"] if kind == "label" else []  # the teacher's is taken
        check.check_config(compose(kind, *given, *own), {"train": check.TRAIN, "label": check.LABEL}[kind])
    for number, teacher in ((1, "runs/teacher"), (2, "runs/noisy/round-1-b0")):
        manifest = {"teacher": teacher, "per_class": 130, "seed": 0}
        (tmp_path / f"runs/noisy/labels-{number}").mkdir()
        (tmp_path / f"runs/noisy/labels-{number}/manifest.json").write_text(json.dumps(manifest, indent=1))
    assert [name for name, *_ in commands(tmp_path, "noisy_student.sh", *words)[1]] == ["effnet-train"] * 2
    for place, other in ((0, "runs/other"), (4, "13")):
        changed = [*words[:place], other, *words[place + 1 :]]
        assert commands(tmp_path, "noisy_student.sh", *changed)[1][0][0] == "effnet-label"
    assert commands(tmp_path, "noisy_student.sh", *words[:4]) == (2, [])
