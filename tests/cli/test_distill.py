"""`recipe=distill` through the real command."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_a_student_goes_on_exactly(goes_on_exactly: Callable[..., dict[str, Any]], trained: Path) -> None:
    student = ("recipe=distill", f"distill.teacher={trained}", "distill.resolution=40", "model.width=0.1")
    state = goes_on_exactly(*student, "batch_size=16")
    known = state["meta"]["distill"]
    assert (known["teacher"], len(known["sha256"])) == (str(trained), 64)


@pytest.mark.slow
def test_a_student_on_two_ranks_goes_on_exactly(goes_on_exactly: Callable[..., dict[str, Any]], trained: Path) -> None:
    goes_on_exactly("recipe=distill", f"distill.teacher={trained}", "batch_size=16", "ranks=2", "precision=bf16")


def test_the_teacher_is_one_that_can_teach(cli: Cli, tiny: list[str], trained: Path, tmp_path: Path) -> None:
    without = cli("train", *tiny, "recipe=distill")
    assert (without.status, "distill.temperature=2.0 needs a teacher: give distill.teacher=" in without.err) == (
        2,
        True,
    )
    graph = cli("train", *tiny, "recipe=distill", f"distill.teacher={trained}", "cuda_graph=true")
    assert (graph.status, "with distill.teacher= set cuda_graph=false" in graph.err) == (2, True)
    slip = cli("train", *tiny, "distill={teacher: x, classes: some}")
    assert (slip.status, "distill.classes='some' must be same or any or subset or index" in slip.err) == (2, True)
    for split in ("train", "val"):
        for name in "013":
            source = next(text for text in tiny if text.startswith("data.root=")).removeprefix("data.root=")
            shutil.copytree(Path(source) / split / name, tmp_path / "other" / split / name)
    words = [text for text in tiny if not text.startswith("data.root=")] + [f"data.root={tmp_path / 'other'}"]
    words += ["recipe=distill", "batch_size=16", f"distill.teacher={trained}"]
    other = cli("train", *words)
    assert other.status == 2
    assert "the data set has 3 classes, the checkpoint 10; its names are all among the checkpoint's: " in other.err
    assert not Path("run").exists()
    some = cli("train", *words, "distill.classes=subset")
    assert some.status == 0, some.err


def test_a_run_keeps_its_teacher(cli: Cli, tiny: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "teacher")
    words = (*tiny, "recipe=distill", "batch_size=16", "distill.teacher=teacher")
    assert cli("train", *words).status == 0
    shutil.copy(trained / "step_000000015.pt", tmp_path / "teacher" / "best.pt")
    changed = cli("train", *words, "max_steps=4")
    assert (changed.status, "holds other weights than those that this run began with" in changed.err) == (2, True)


@pytest.mark.parametrize("name", ["missing", "timm:tf_efficientnet_b99"])
def test_a_teacher_that_is_not_there_is_named(cli: Cli, tiny: list[str], name: str) -> None:
    done = cli("train", *tiny, "recipe=distill", "batch_size=16", f"distill.teacher={name}")
    assert (done.status, name.removeprefix("timm:") in done.err) == (2, True)
