"""`effnet-label` and `recipe=noisy_student` through the real commands."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effnet_train.cli import build
from effnet_train.data.backends import open_picture
from effnet_train.data.preprocess import Preprocess, eval_image, normalize
from effnet_train.distributed import Session

Cli = Callable[..., Any]
WORDS = ("device=cpu", "workers=0", "batch_size=8", "images=10", "confidence=0.1", "output=labels")


@pytest.fixture(scope="session")
def unlabelled(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 40 digits that nobody has labelled."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for file in (few_digits / "val").rglob("*.png"):
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    return folder


@pytest.fixture
def label(cli: Cli, trained: Path, unlabelled: Path) -> Cli:
    """Return a function that labels these images by the trained network, with overrides."""

    def run(*overrides: str) -> Any:
        own = {text.partition("=")[0] for text in overrides}
        words = [text for text in WORDS if text.partition("=")[0] not in own]
        return cli("label", f"checkpoint={trained}", f"data.root={unlabelled}", *words, *overrides)

    return run


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.suffix != ".pt"
    }


def test_labels_are_the_teachers(label: Cli, trained: Path, unlabelled: Path) -> None:
    """Each image by itself through the network, as it is evaluated."""
    done = label("per_class=7")
    assert done.status == 0, done.err
    manifest = json.loads(Path("labels/manifest.json").read_text())
    model, meta = build.load_model(str(trained), Session())
    preprocess = Preprocess(**meta["preprocess"])
    files = sorted(unlabelled.iterdir())
    pixels = [eval_image(open_picture(file.read_bytes(), "pillow"), preprocess) for file in files]
    with torch.inference_mode():
        images = normalize(torch.from_numpy(np.stack(pixels)), preprocess.mean, preprocess.std)
        wanted = model(images).softmax(dim=1).numpy()
    chosen, soft = np.load("labels/chosen.npy"), np.load("labels/soft.npy")
    np.testing.assert_allclose(soft[chosen[:, 2]], wanted[chosen[:, 0]], atol=2e-3)
    assert chosen[:, 1].tolist() == wanted.argmax(1)[chosen[:, 0]].tolist()
    classes = set(wanted.argmax(1).tolist())
    assert manifest["of_each_class"] == [7 if number in classes else 0 for number in range(10)]
    assert ("classes have no image" in done.err) == (len(classes) < 10)
    table = list(csv.DictReader(Path("labels/labels.csv").read_text().splitlines()))
    assert sum(int(row["times"]) for row in table) == len(chosen) == manifest["chosen"]
    assert {row["image"] for row in table} <= {str(file) for file in files}


def test_labelling_goes_on_and_ranks_change_no_bit(
    label: Cli, trained: Path, unlabelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert label().status == 0
    whole = written(Path("labels"))
    assert sum(name.startswith("scores/") for name in whole) == 3  # pieces of 16
    kept = Path("labels/scores/000001.npy").stat().st_mtime_ns
    for name in ("scores/000000.npy", "scores/000002.npy", "manifest.json", "soft.npy"):
        (Path("labels") / name).unlink()
    assert label().status == 0
    assert written(Path("labels")) == whole
    assert Path("labels/scores/000001.npy").stat().st_mtime_ns == kept
    # The scores can be removed, and are made anew when asked for.
    shutil.rmtree("labels/scores")
    assert (done := label()).status == 0, done.err
    assert written(Path("labels")) == whole
    kept = Path("labels/scores/000001.npy").stat().st_mtime_ns
    # Another choice among the same scores.
    assert label("per_class=2").status == 0
    assert Path("labels/scores/000001.npy").stat().st_mtime_ns == kept
    assert json.loads(Path("labels/manifest.json").read_text())["chosen"] < 21
    other = label("resolution=40")
    assert other.status == 2
    assert (
        "output=labels holds another teacher's scores, or of other images: preprocess.resolution was 32, now 40"
        in other.err
    )


@pytest.mark.slow
def test_two_ranks_write_the_same(label: Cli) -> None:
    assert label().status == 0
    assert label("output=other", "ranks=2").status == 0
    one, two = written(Path("labels")), written(Path("other"))
    assert one == two


@pytest.mark.slow
def test_a_student_on_two_ranks_goes_on_exactly(label: Cli, goes_on_exactly: Callable[..., dict[str, Any]]) -> None:
    assert label().status == 0
    goes_on_exactly("recipe=noisy_student", "batch_size=8", "pseudo.labels=labels", "ranks=2")


def test_a_student_goes_on_exactly(
    label: Cli, cli: Cli, tiny: list[str], goes_on_exactly: Callable[..., dict[str, Any]]
) -> None:
    assert label("per_class=5").status == 0
    student = ("recipe=noisy_student", "batch_size=8", "pseudo.labels=labels", "accumulate=2", "workers=1")
    state = goes_on_exactly(*student, "mixing.mixup_alpha=0.2")
    shown = cli(
        "data", "show", *tiny[:-2], "recipe=noisy_student", "pseudo.labels=labels", "count=9", "output=sheet.png"
    )
    assert (shown.status, Path("sheet.png").exists()) == (0, True), shown.err
    assert state["meta"]["pseudo"]["sha256"] == json.loads(Path("labels/manifest.json").read_text())["sha256"]


def test_pseudo_labels_a_teacher_and_stages_go_together(
    label: Cli, trained: Path, goes_on_exactly: Callable[..., dict[str, Any]]
) -> None:
    assert label().status == 0
    stages = (
        "progressive.stages=2",
        "progressive.resolution=16",
        "progressive.mixup_alpha=0.1",
        "mixing.mixup_alpha=0.3",
    )
    others = (f"distill.teacher={trained}", "distill.resolution=student", "pseudo.labels=labels", "pseudo.ratio=2")
    goes_on_exactly("batch_size=8", *stages, *others)


def test_a_teachers_outputs_for_the_training_images_are_written_once(
    label: Cli, cli: Cli, tiny: list[str], few_digits: Path
) -> None:
    """Distillation without the teacher: each image by its label, and at the same time by what it was taken for."""
    words = ("data=digits", f"data.root={few_digits}", "data.expected=null", "data.minival=20", "split=train")
    assert (done := label(*words, "confidence=0")).status == 0, done.err
    manifest, chosen = json.loads(Path("labels/manifest.json").read_text()), np.load("labels/chosen.npy")
    assert (manifest["images"], manifest["kept"]) == (60, 60)  # none that is held out
    assert chosen[:, 0].tolist() == chosen[:, 2].tolist() == list(range(60))
    done = cli("train", *tiny, "data.minival=20", "batch_size=8", "pseudo.labels=labels", "loss.label_smoothing=0")
    assert done.status == 0, done.err


def test_what_cannot_be_is_told(
    label: Cli, cli: Cli, tiny: list[str], unlabelled: Path, few_digits: Path, tmp_path: Path
) -> None:
    base = (*tiny, "recipe=noisy_student", "batch_size=8")
    without = cli("train", *base)
    assert (without.status, "pseudo.ratio=3 needs pseudo-labels: give pseudo.labels=" in without.err) == (2, True)
    early = cli("train", *base, "pseudo.labels=labels")
    assert (early.status, "let effnet-label output=labels come to its end first" in early.err) == (2, True)
    assert cli("train", *tiny, "name=weak").status == 0
    weak = ("label", "checkpoint=weak", f"data.root={unlabelled}", *WORDS[:-2], "output=none")
    assert cli(*weak, "confidence=0").status == 0
    before = written(Path("none"))
    high = cli(*weak, "confidence=0.9")
    assert (high.status, "confidence=0.9 leaves none of the 40 images" in high.err) == (2, True)
    assert written(Path("none")) == before  # nothing was chosen anew: what was stays
    assert label().status == 0
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for file in sorted(unlabelled.iterdir())[1:]:
        shutil.copy(file, fewer)
    moved = cli("train", *base, "pseudo.labels=labels", f"pseudo.root={fewer}")
    assert (moved.status, "holds 39 images and 40 were labelled" in moved.err) == (2, True)
    gone = cli("train", *base, "pseudo.labels=labels", "pseudo.root=gone")
    assert (gone.status, "which does not exist: give pseudo.root=, the place" in gone.err) == (
        2,
        True,
    )
    for split in ("train", "val"):
        for name in "013":
            shutil.copytree(few_digits / split / name, tmp_path / "other" / split / name)
    words = [text for text in base if not text.startswith("data.root=")]
    classes = cli("train", *words, f"data.root={tmp_path / 'other'}", "pseudo.labels=labels")
    assert (classes.status, "are of the teacher's 10 classes, and the data set has 3" in classes.err) == (2, True)
    small = cli("train", *base, "pseudo.labels=labels", "model.width=0.1", "pseudo.soft=false")
    assert small.status == 0
    assert "in Noisy Student it has as many or more" in small.err
    assert label("output=run").status == 2
