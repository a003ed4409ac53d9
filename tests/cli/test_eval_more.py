"""`effnet-eval` beyond top-1: views, several checkpoints, details, reassessed labels and parts of the classes.

Expected values come from the same networks fed by torchvision's transforms, and from NumPy and scikit-learn.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torchvision.transforms import FiveCrop, InterpolationMode, Resize
from torchvision.transforms import functional as tv

from effnet_train.cli import build
from effnet_train.engine.checkpoint import load_checkpoint, load_weights

Cli = Callable[..., Any]
ONE = ("device=cpu", "workers=0")
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder of a run."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("eval.json"))  # of another test


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    """Return a checkpoint of other weights, at another resolution, with a crop."""
    payload = load_checkpoint(run / "best.pt")
    generator = torch.Generator().manual_seed(0)
    weight = payload["ema"]["classifier.weight"]  # all of them changed would make it sure of everything: classes tie
    weight *= 1 + 0.5 * torch.rand(weight.shape, generator=generator)
    payload["meta"]["preprocess"] |= {"resolution": 40, "crop_padding": 8, "mean": [0.1, 0.2, 0.3]}
    torch.save(payload, tmp_path / "other.pt")
    return tmp_path / "other.pt"


@pytest.fixture(scope="session")
def wide(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the digits' validation images as class folders, in a grey frame that is not square."""
    root = tmp_path_factory.mktemp("wide") / "digits"
    for file in sorted((few_digits / "val").rglob("*.png")):
        image = Image.new("RGB", (13, 10), (70, 90, 110))
        image.paste(Image.open(file).convert("RGB"), (4, 1))
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        image.save(root / file.parent.name / file.name)
    return root


def scored(done: Any) -> dict[str, Any]:
    """Return the JSON line, which is the last one."""
    assert done.status == 0, done.err
    record = json.loads(done.out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def assert_refused(done: Any, message: str) -> None:
    assert done.status == 2
    assert done.err.startswith("effnet-"), done.err
    assert message in done.err


def table(name: str) -> list[list[str]]:
    return list(csv.reader(Path(f"details/{name}.csv").read_text(encoding="utf-8").splitlines()))


def images_of(root: Path) -> tuple[list[Image.Image], np.ndarray]:
    """Return the images below class folders and their labels, in the order of names."""
    files = sorted(root.rglob("*.png"))
    classes = sorted({file.parent.name for file in files})
    return [Image.open(file).convert("RGB") for file in files], np.array([classes.index(f.parent.name) for f in files])


def logits_of(file: Path, images: list[Image.Image]) -> np.ndarray:
    """Return the logits of a checkpoint's network for images that have its resolution."""
    weights = load_weights(file)
    model = build.build_model(weights.meta["model"], len(weights.meta["classes"])).eval()
    build.load_into(model, weights, str(file))
    preprocess = weights.meta["preprocess"]
    inputs = [tv.normalize(tv.to_tensor(image), preprocess["mean"], preprocess["std"]) for image in images]
    with torch.inference_mode():
        logits: np.ndarray = model(torch.stack(inputs)).double().numpy()
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def assert_scores(record: dict[str, Any], shares: np.ndarray, labels: np.ndarray) -> None:
    classes = range(shares.shape[1])
    assert record["images"] == len(labels)
    assert record["top1"] == top_k_accuracy_score(labels, shares, k=1, labels=classes)
    five = 1.0 if len(classes) <= 5 else top_k_accuracy_score(labels, shares, k=5, labels=classes)
    assert record["top5"] == five
    assert record["loss"] == pytest.approx(-np.log(shares[np.arange(len(labels)), labels]).mean(), rel=1e-4)


@pytest.mark.parametrize("resolution", [32, 24])
@pytest.mark.parametrize("flip", [False, True])
def test_five_crops_and_mirror_images(cli: Cli, run: Path, wide: Path, flip: bool, resolution: int) -> None:
    asked = [f"checkpoint={run}", "data=eval_folder", f"data.root={wide}", "crops=5", f"flip={str(flip).lower()}"]
    done = cli("eval", *asked, *([f"resolution={resolution}"] if resolution != 32 else []), *ONE)
    record = scored(done)
    images, labels = images_of(wide)
    scaled = [Resize(resolution, InterpolationMode.BICUBIC)(image) for image in images]
    views = list(zip(*(FiveCrop(resolution)(image) for image in scaled), strict=True))
    views += [tuple(tv.hflip(image) for image in view) for view in views] if flip else []
    assert_scores(record, np.mean([softmax(logits_of(run / "best.pt", list(view))) for view in views], axis=0), labels)
    assert (record["crops"], record["flip"], record["resolution"]) == (5, flip, resolution)
    words = "  averaged over 5 crops x the image and its mirror image\n" if flip else "  averaged over 5 crops\n"
    assert words in done.out


def test_several_checkpoints_are_averaged_each_in_its_own_preprocessing(
    cli: Cli, run: Path, other: Path, few_digits: Path, tmp_path: Path
) -> None:
    done = cli("eval", f"checkpoint=[{run},{other}]", "flip=true", "resolution=null", "output=both.json", *ONE)
    record = scored(done)
    images, labels = images_of(few_digits / "val")
    alone = []
    for file, resolution, crop in ((run / "best.pt", 32, 8), (other, 40, 6)):
        start = (8 - crop) // 2  # 8 * 40 / 48 is 6
        pixels = [
            tv.resized_crop(i, start, start, crop, crop, [resolution] * 2, InterpolationMode.BICUBIC) for i in images
        ]
        views = (pixels, [tv.hflip(image) for image in pixels])
        alone.append(np.mean([softmax(logits_of(file, view)) for view in views], axis=0))
    assert_scores(record, np.mean(alone, axis=0), labels)
    for found, shares in zip(record["members_top1"], alone, strict=True):
        likeliest = shares == shares.max(1, keepdims=True)  # two views that are sure of different classes tie
        hits = likeliest[np.arange(len(labels)), labels]
        assert (hits & (likeliest.sum(1) == 1)).mean() <= found <= hits.mean()
    assert record["checkpoint"] == [str(run / "best.pt"), str(other)]
    assert record["resolution"] == [32, 40]
    assert json.loads(Path("both.json").read_text()) == record
    for file, top1, pixels in zip(record["checkpoint"], record["members_top1"], (32, 40), strict=True):
        told = f"{file} (ema weights of step {record['step'][0]}), val at {pixels} pixels, {record['network'][0]}: "
        assert f"{told}top-1 {top1:.2%}" in done.out
    # One resolution for all, and none of the members' own results is written over.
    again = scored(cli("eval", f"checkpoint=[{run},{other}]", "resolution=32", *ONE))
    assert again["resolution"] == [32, 32]
    assert not (run / "eval.json").exists()


def test_the_average_of_one_checkpoint_twice_is_itself(cli: Cli, run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "best.pt", tmp_path / "copy.pt")
    one = scored(cli("eval", f"checkpoint={run}", *ONE))
    two = scored(cli("eval", f"checkpoint=[{run},copy.pt]", "batch_size=7", *ONE))
    assert (two["top1"], two["top5"], two["members_top1"]) == (one["top1"], one["top5"], [one["top1"]] * 2)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["ece"] == pytest.approx(one["ece"], abs=1e-5)


def test_one_checkpoint_at_several_sizes_is_an_ensemble(cli: Cli, run: Path, few_digits: Path) -> None:
    sizes = (24, 32, 40)
    words = (f"checkpoint=[{','.join([str(run)] * 3)}]", f"resolution=[{','.join(map(str, sizes))}]")
    done = cli("eval", *words, "output=self.json", *ONE)
    record = scored(done)
    images, labels = images_of(few_digits / "val")
    pixels = [[tv.resize(i, [size, size], InterpolationMode.BICUBIC) for i in images] for size in sizes]
    alone = [softmax(logits_of(run / "best.pt", view)) for view in pixels]
    assert_scores(record, np.mean(alone, axis=0), labels)
    assert record["members_top1"] == [(shares.argmax(1) == labels).mean() for shares in alone]
    assert len(set(record["members_top1"])) > 1
    assert (record["checkpoint"], record["resolution"]) == ([str(run / "best.pt")] * 3, list(sizes))
    for size, top1 in zip(sizes, record["members_top1"], strict=True):
        assert f"val at {size} pixels, {record['network'][0]}: top-1 {top1:.2%}" in done.out


def test_details_of_every_class(cli: Cli, run: Path, few_digits: Path) -> None:
    done = cli("eval", f"checkpoint={run}", "details=details", *ONE)
    record = scored(done)
    images, labels = images_of(few_digits / "val")
    shares = softmax(logits_of(run / "best.pt", [tv.resize(i, [32, 32], InterpolationMode.BICUBIC) for i in images]))
    matrix = confusion_matrix(labels, shares.argmax(1), labels=range(10))
    header, *rows = table("confusion")
    assert header == ["true class / predicted", *DIGITS]
    assert [row[0] for row in rows] == DIGITS
    assert np.array([row[1:] for row in rows], dtype=int).tolist() == matrix.tolist()
    header, *rows = table("per_class")
    assert header == ["class", "name", "images", "top1"]
    expected = [[digit, digit, "4", f"{matrix[i, i] / 4:.6f}"] for i, digit in enumerate(DIGITS)]
    assert rows == expected
    assert matrix.trace() / matrix.sum() == record["top1"] < 1
    for name in ("confusion.png", "calibration.png"):
        with Image.open(Path("details") / name) as picture:
            assert min(picture.size) > 600
    # Expected calibration error, in the words of its definition.
    confidence, right = shares.max(1), shares.argmax(1) == labels
    bins = np.ceil(confidence * 15)
    error = sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(1, 16)) / len(labels)
    assert record["ece"] == pytest.approx(error, abs=1e-5)
    assert f"  ECE       {record['ece']:8.4f}\n" in done.out


def test_some_of_the_classes(cli: Cli, run: Path, wide: Path, tmp_path: Path) -> None:
    """As ImageNet-A and -R are scored: among the classes there are, by name."""
    part = tmp_path / "part"
    for name in ("7", "2", "5"):
        shutil.copytree(wide / name, part / name)
    asked = (f"checkpoint={run}", "data=eval_folder", f"data.root={part}", *ONE)
    assert_refused(cli("eval", *asked), "the data set has 3 classes, the checkpoint 10; its names are all among the")
    record = scored(cli("eval", *asked, "classes=subset", "details=details"))
    images, labels = images_of(part)
    pixels = [tv.resized_crop(i, 0, 2, 10, 10, [32, 32], InterpolationMode.BICUBIC) for i in images]
    shares = softmax(logits_of(run / "best.pt", pixels)[:, [2, 5, 7]])
    assert_scores(record, shares, labels)
    assert [row[0] for row in table("confusion")[1:]] == ["2", "5", "7"]
    (part / "2").rename(part / "two")
    message = "classes=subset: 1 of the data set's 3 classes are none of the checkpoint's 10: 'two'"
    assert_refused(cli("eval", *asked, "classes=subset"), message)


def test_folders_named_by_number(cli: Cli, run: Path, wide: Path, tmp_path: Path) -> None:
    """As ImageNet-V2's are: the number is the class, whatever its name; classes without a folder compete too."""
    payload = load_checkpoint(run / "best.pt")
    payload["meta"]["classes"] = [f"n{i:08d}" for i in range(10)]
    torch.save(payload, "named.pt")
    part = tmp_path / "part"
    for name in ("7", "2"):
        shutil.copytree(wide / name, part / f"{name}")
    asked = ("checkpoint=named.pt", "data=eval_folder", *ONE)
    whole = scored(cli("eval", *asked, f"data.root={wide}", "classes=index"))
    assert_refused(cli("eval", *asked, f"data.root={wide}"), "its names are numbers: with classes=index they are the")
    images, labels = images_of(wide)
    pixels = [tv.resized_crop(i, 0, 2, 10, 10, [32, 32], InterpolationMode.BICUBIC) for i in images]
    assert_scores(whole, softmax(logits_of(run / "best.pt", pixels)), labels)
    some = scored(cli("eval", *asked, f"data.root={part}", "classes=index", "details=details"))
    images, labels = images_of(part)
    pixels = [tv.resized_crop(i, 0, 2, 10, 10, [32, 32], InterpolationMode.BICUBIC) for i in images]
    assert_scores(some, softmax(logits_of(run / "best.pt", pixels)), np.array([2, 7])[labels])
    rows = {row[0]: row for row in table("per_class")}
    assert (rows["n00000002"][2], rows["n00000007"][2], rows["n00000000"][2:]) == ("4", "4", ["0", ""])


def test_reassessed_labels(cli: Cli, run: Path, few_digits: Path, tmp_path: Path) -> None:
    root, real, found = tmp_path / "val", [], []
    files = sorted((few_digits / "val").rglob("*.png"))
    images, labels = images_of(few_digits / "val")
    pixels = [tv.resize(i, [32, 32], InterpolationMode.BICUBIC) for i in images]
    predicted = logits_of(run / "best.pt", pixels).argmax(1)
    order = np.random.default_rng(0).permutation(len(files))
    for number, place in enumerate(order):
        folder = root / files[place].parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[place], folder / f"ILSVRC2012_val_{number + 1:08d}.png")
        # One in four has no label; another, where the network errs, allows for it; another is of a third class only.
        label, other = int(labels[place]), int(predicted[place])
        right = [[], [label, other], [(other + 1) % 10], [label]][number % 4]
        real.append(right)
        if right:
            found.append(other in right)
    Path("real.json").write_text(json.dumps(real + [[0]] * 3))
    asked = (f"checkpoint={run}", "data=eval_folder", f"data.root={root}", *ONE)
    done = cli("eval", *asked, "real_labels=real.json")
    record = scored(done)
    assert (record["real_images"], record["real_top1"]) == (30, np.mean(found))
    assert 0 < record["real_top1"] < 1
    assert f"  ReaL      {np.mean(found):8.2%}   (of 30 images)\n" in done.out
    assert "real_top1" not in scored(cli("eval", *asked))
    wrong = "is not named as ILSVRC2012_val_00000001.JPEG is"
    assert_refused(cli("eval", f"checkpoint={run}", "real_labels=real.json", *ONE), wrong)
    assert_refused(cli("eval", *asked, "real_labels=no.json"), "real_labels=no.json does not exist: give ReaL's")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint=[run,none.pt]", "checkpoint=none.pt does not exist"),
        ("checkpoint=[]", "checkpoint=[] must be a file, a folder or a name, or several of them as [a,b]"),
        ("checkpoint=[run,3]", "checkpoint=['run', 3] must be a file, a folder or a name"),
        ("checkpoint=[run,run/best.pt]", "checkpoint= names run/best.pt twice: an average is of different weights, or"),
        ("checkpoint=[run,run/step_000000030.pt] source=[null]", "must be one text or null for each of the 2"),
        ("checkpoint=run crops=10", "crops=10 must be 1 or 5"),
        ("checkpoint=run classes=some", "classes='some' must be same or any or subset or index"),
        ("checkpoint=run details=no/such", "details=no/such: its folder does not exist, make it first"),
        ("checkpoint=run details=run/best.pt", "details=run/best.pt is a file: give a folder"),
        ("checkpoint=run real_labels=x classes=subset", "they do not go with classes=subset"),
        ("checkpoint=run data=eval_folder", "data.root=null must be text"),
        ("checkpoint=run data=eval_folder data.root=no", "data.root=no does not exist: set it to a folder that holds"),
        ("checkpoint=run data.expected=40", "data.expected=40 must be own, the checkpoint's; null; or counts as {val:"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met(cli: Cli, run: Path, arguments: str, message: str) -> None:
    del run
    assert_refused(cli("eval", *arguments.split(), *ONE), message)


def test_members_of_other_classes_are_refused(cli: Cli, run: Path) -> None:
    payload = load_checkpoint(run / "best.pt")
    payload["meta"]["classes"][3] = "three"
    torch.save(payload, "renamed.pt")
    message = f"{run / 'best.pt'} and renamed.pt were trained for other classes (10 and 10, or other names)"
    assert_refused(cli("eval", f"checkpoint=[{run},renamed.pt]", *ONE), message)


def test_a_folder_for_evaluation_has_a_val_only_and_is_not_trained_on(cli: Cli, run: Path, wide: Path) -> None:
    asked = ("data=eval_folder", f"data.root={wide}")
    message = "split=train is not there: choose val"
    assert_refused(cli("eval", f"checkpoint={run}", *asked, "split=train", *ONE), message)
    for more in ((), ("dry_run=true",)):
        done = cli("train", *asked, "model=nano", "name=x", "device=cpu", *more)
        assert_refused(done, f"data.root={wide} is read as images to evaluate on, with none to train on: choose data=")
    assert not Path("runs").exists()


def test_the_counts_of_the_checkpoints_data_set_hold_elsewhere_too(
    cli: Cli, run: Path, few_digits: Path, tmp_path: Path
) -> None:
    """What a complete copy holds goes with the data set, not with the place, unless it is told otherwise."""
    payload = load_checkpoint(run / "best.pt")
    payload["meta"]["data"]["expected"] = {"classes": 10, "train": 80, "val": 40}
    torch.save(payload, "counted.pt")
    assert scored(cli("eval", "checkpoint=counted.pt", *ONE))["images"] == 40
    moved = shutil.copytree(few_digits, tmp_path / "elsewhere")
    next((moved / "val" / "3").iterdir()).unlink()
    asked = ("checkpoint=counted.pt", f"data.root={moved}", *ONE)
    message = "is not complete (val: 40 expected, 39 found): mend it, or set data.expected=null"
    assert_refused(cli("eval", *asked), message)
    assert scored(cli("eval", *asked, "data.expected=null"))["images"] == 39
    assert scored(cli("eval", *asked, "data.expected={val: 39}"))["images"] == 39
