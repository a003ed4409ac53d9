"""`recipe=distill` through the real command."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from effnet_train.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.engine.teacher import Teacher
from effnet_train.models import published

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
    words = [text for text in words if not text.startswith("name=")]
    words += ["recipe=distill", "batch_size=16", f"distill.teacher={trained}"]
    other = cli("train", *words)
    assert other.status == 2
    assert "the data set has 3 classes, the checkpoint 10; its names are all among the checkpoint's: " in other.err
    assert not Path("run").exists()
    for name, classes in (("names", "subset"), ("numbers", "index")):
        some = cli("train", *words, f"distill.classes={classes}", f"name={name}")
        assert some.status == 0, some.err
    # The folders 0, 1 and 3 are those classes, by their names and by their numbers.
    one, two = (load_checkpoint(Path(name, "step_000000002.pt")) for name in ("names", "numbers"))
    for key, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][key]), key


def test_a_run_keeps_its_teacher(cli: Cli, tiny: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "teacher")
    words = (*tiny, "recipe=distill", "batch_size=16", "distill.teacher=teacher")
    assert cli("train", *words).status == 0
    shutil.copy(trained / "step_000000015.pt", tmp_path / "teacher" / "best.pt")
    changed = cli("train", *words, "max_steps=4")
    assert (changed.status, "holds other weights than those that this run began with" in changed.err) == (2, True)


def test_a_teacher_may_be_any_network_of_timm(
    cli: Cli, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets what timm says that it was trained with: here 160 pixels, a mean and a deviation of 0.5."""
    network, seen = timm.create_model("test_resnet").eval(), []
    file = tmp_path / "model.safetensors"
    save_file(network.state_dict(), file)
    monkeypatch.setattr(published, "_from_hub", lambda name, *_: file)
    call = Teacher.forward

    def watched(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        logits = call(self, images)
        pixels = images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        scaled = F.interpolate(pixels, (160, 160), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            torch.testing.assert_close(logits, network((scaled - 0.5) / 0.5)[:, :10], rtol=1e-3, atol=1e-3)
        seen.append(len(images))
        return logits

    monkeypatch.setattr(Teacher, "forward", watched)
    words = (*tiny, "recipe=distill", "batch_size=4", "distill.teacher=timm:test_resnet.r160_in1k")
    done = cli("train", *words, "distill.classes=index")
    assert (done.status, seen) == (0, [4, 4]), done.err
    for given, message in (
        ("distill.classes=same", "the data set has 10 classes, the checkpoint 1000; its names are numbers"),
        ("distill.source=timm", "distill.source=timm: timm:test_resnet.r160_in1k says itself what it is"),
        ("distill.teacher=timm:test_resnet.r61", "did you mean test_resnet.r160_in1k"),
    ):
        done = cli("train", *words, "name=other", given)
        assert (done.status, message in done.err) == (2, True), done.err


def test_a_plan_looks_for_the_teacher_and_for_pseudo_labels(cli: Cli, tiny: list[str]) -> None:
    for words, message in (
        (("recipe=distill", "distill.teacher=missing"), "missing"),
        (("recipe=noisy_student", "pseudo.labels=none"), "let effnet-label output=none come to its end first"),
    ):
        done = cli("train", *tiny, *words, "batch_size=8", "dry_run=true")
        assert (done.status, message in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "distill.teacher=missing does not exist: give a .pt or .safetensors file"),
        ("timm:tf_efficientnet_b99", "tf_efficientnet_b99"),
    ],
)
def test_a_teacher_that_is_not_there_is_named(cli: Cli, tiny: list[str], name: str, message: str) -> None:
    done = cli("train", *tiny, "recipe=distill", "batch_size=16", f"distill.teacher={name}")
    assert (done.status, message in done.err) == (2, True), done.err
