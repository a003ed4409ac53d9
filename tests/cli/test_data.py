"""`effnet-data`: its jobs, their reports and exit codes."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image
from scipy.io import savemat

from effnet_train.cli import build, check
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.data.archives import shards
from effnet_train.data.classes import real_labels
from effnet_train.data.loader import train_batches
from effnet_train.data.order import Order
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session

Cli = Callable[..., Any]


def test_verify_tells_by_its_exit_code(cli: Cli, few_digits: Path, tmp_path: Path) -> None:
    words = ("verify", "data=folder", f"data.root={few_digits}", "workers=0")
    done = cli("data", *words, "report=report.json")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == "no problems"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["splits"]["train"]["images"] == 80
    assert report["problems"] == {}
    short = cli("data", *words, "data.expected={classes: 10, train: 1433, val: 40}")
    assert short.status == 1
    assert "  train: 1,433 expected, 80 found" in short.out.splitlines()
    ignored = cli("data", *words, "data.expected={classes: 10, train: 1433, val: 40}", "ignore=[counts]")
    assert ignored.status == 0
    assert "note: 1 other numbers than expected (counts)" in ignored.out


def test_verify_reads_all_of_train(cli: Cli, few_digits: Path) -> None:
    done = cli("data", "verify", "data=folder", f"data.root={few_digits}", "data.minival=30", "workers=0")
    assert done.out.startswith("train: 80 images")


def test_stats_tells_numbers_and_draws(cli: Cli, few_digits: Path, tmp_path: Path) -> None:
    words = ("stats", "data=folder", f"data.root={few_digits}", "resolution=32", "preprocess@data.preprocess=small")
    done = cli("data", *words, "output=stats.json", "picture=stats.svg", "workers=0")
    assert done.status == 0, done.err
    assert "images   80 of 80" in done.out
    found = json.loads((tmp_path / "stats.json").read_text())
    pixels = [
        np.asarray(Image.open(file).resize((32, 32), Image.Resampling.BICUBIC)) for file in few_digits.glob("train/*/*")
    ]
    assert found["mean"] == pytest.approx([np.mean(pixels) / 255] * 3)
    assert found["std"] == pytest.approx([np.std(pixels) / 255] * 3)
    assert (tmp_path / "stats.svg").stat().st_size > 1000


def test_show_pictures_what_a_run_sees(cli: Cli, compose: Callable[..., Any], few_digits: Path, tmp_path: Path) -> None:
    """The first images of a step, as the training loop gets them in whole batches."""
    words = ("recipe=demo", f"data.root={few_digits}", "data.expected=null", "seed=3")
    done = cli("data", "show", *words, "step=2", "count=40", "output=sheet.png")
    assert done.status == 0, done.err
    config = compose("train", *words)
    data = build.build_data(config["data"], Session())
    batches = train_batches(data, instantiate(config["augment"]), Order(80, 32, 3), start=2, stop=4)
    images = np.concatenate([batch.images.numpy() for batch in batches])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for place in range(40):
        row, column = divmod(place, 8)
        cell = sheet[36 + 156 * row :, 8 + 136 * column :][:128, :128]
        assert np.array_equal(cell[2::4, 2::4], images[place])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("verfy data=folder", "verfy is no job: give one of verify"),
        ("verify data=folder data.root=nowhere", "data.root=nowhere does not exist"),
        (
            "verify data=folder data.root=nowhere ignore=[cmyk]",
            "ignore=cmyk is no kind of problem: choose among damaged, counts",
        ),
        ("verify data=folder reprot=x", "reprot is not a key of the configuration: did you mean report"),
        ("verify data=folder data.root=nowhere min_side=0", "min_side=0 must be at least 1"),
        ("verify data=folder data.root=. report=no/where.json", "report=no/where.json: its folder does not exist"),
        ("stats data=folder data.root=DIGITS count=0", "count=0 must be at least 1"),
        ("stats data=eval_folder data.root=DIGITS/train", "split=train has no images: choose val"),
        ("stats data=folder data.root=. picture=no/where.png", "picture=no/where.png: its folder does not exist"),
        ("show recipe=demo data.root=DIGITS output=sheet.gif", "output=sheet.gif must end in .png, .jpg or .webp"),
        ("show recipe=demo step=-1", "step=-1 must be at least 0"),
        ("convert data=folder data.root=DIGITS", "output has no value: give output=... on the command line"),
        ("convert data=folder data.root=DIGITS output=o to=zip", "to=zip is not known: use folder or shards"),
        ("convert data=folder data.root=DIGITS output=DIGITS", "holds train and no manifest.json: choose an empty"),
        ("prepare data.root=DIGITS output=o", "ILSVRC2012_img_train.tar does not exist: put ImageNet's archives there"),
        ("verify data=folder data.root=. report=DIGITS", "report=DIGITS is a folder: give a file in it"),
        ("verify data=folder data.root=. report=/proc/no", "report=/proc/no cannot be written (No such file or"),
        ("verify data=folder data.root=. ignore=tiny", "ignore='tiny' must be a list: give ignore=[tiny]"),
        ("stats data=folder data.root=. picture=p.foo", "picture=p.foo must end in .png, .svg or .pdf"),
        (
            "convert data=folder data.root=DIGITS output=/dev/null",
            "output=/dev/null cannot be made, as /dev/null is a f",
        ),
        (
            "convert data=folder data.root=DIGITS output=/dev/null/o",
            "output=/dev/null/o cannot be made, as /dev/null is",
        ),
        ("convert data=folder data.root=DIGITS output=/proc/no", "output=/proc/no cannot be written (No such file or"),
        ("verify data=parquet data.root=. data.columns={picture:x}", "data.columns.picture is not a key of the config"),
        ("verify data=folder nonsense", "nonsense is not of the form key=value: give key=value"),
    ],
)
def test_bad_input(cli: Cli, few_digits: Path, words: str, message: str) -> None:
    done = cli("data", *words.replace("DIGITS", str(few_digits)).split())
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("effnet-data: error: ")
    assert message.replace("DIGITS", str(few_digits)) in done.err


def test_a_report_that_cannot_be_written_is_told_all_the_same(cli: Cli, few_digits: Path) -> None:
    done = cli("data", "verify", "data=folder", f"data.root={few_digits}", "workers=0", "report=/dev/full")
    assert done.status == 2
    assert done.out.splitlines()[-1] == "no problems"
    assert "report=/dev/full cannot be written (No space left on device): choose another place" in done.err


def test_braces_that_a_shell_has_unfolded_are_refused(cli: Cli, few_digits: Path) -> None:
    """Hydra would take the last, and the run would see one shard of all."""
    words = ("data=folder", f"data.root={few_digits}", "workers=0")
    done = cli("data", "verify", *words, "data.train=train-0.tar", "data.train=train-1.tar", "data.train=train-2.tar")
    assert done.status == 2
    assert "data.train is given twice" in done.err
    assert """quote them twice: "data.train='train-{0000..0146}.tar'\"""" in done.err
    assert cli("data", "verify", *words, "data.train=train", "data.val=val").status == 0


def test_convert_tells_how_to_read_what_it_wrote(cli: Cli, few_digits: Path, tmp_path: Path) -> None:
    """The words are a shell's: names with spaces in quotes; of images to evaluate on alone there is no train."""
    for data, root in (("folder", few_digits), ("eval_folder", few_digits / "val")):
        for to in ("folder", "shards"):
            output = tmp_path / f"{data} as {to}"
            done = cli("data", "convert", f"data={data}", f"data.root={root}", f"output={output}", f"to={to}")
            assert done.status == 0, done.err
            words = shlex.split(done.out.splitlines()[-1].removeprefix(f"{output}: "))
            read = cli("data", "verify", *words, "ignore=[across]", "workers=0")
            assert read.status == 0, read.err
            assert "val: 40 images" in read.out


def test_an_unfinished_conversion_is_verified_but_not_trained_on(
    cli: Cli, few_digits: Path, tmp_path: Path, tiny: list[str]
) -> None:
    cli("data", "convert", "data=folder", f"data.root={few_digits}", "output=out", "images=20")
    (tmp_path / "out/train-000001.tar").unlink()
    refused = cli("train", *tiny, "data=shards", "data.root=out")
    assert refused.status == 2
    assert "data.root=out is not complete: out/train-000001.tar is missing" in refused.err
    told = cli("data", "verify", "data=shards", "data.root=out", "workers=0")
    assert told.status == 1
    assert "  out/train-000001.tar: missing" in told.out.splitlines()


@pytest.mark.parametrize(
    ("job", "types"),
    [
        ("verify", check.DATA_VERIFY),
        ("stats", check.DATA_STATS),
        ("show", check.DATA_SHOW),
        ("prepare", check.DATA_WRITE),
        ("convert", check.DATA_WRITE),
    ],
)
def test_the_checks_know_each_jobs_keys_and_no_others(job: str, types: dict[str, Any]) -> None:
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        assert hydra.compose(f"data_{job}").keys() == types.keys()


def test_help_names_the_jobs_and_needs_no_torch() -> None:
    code = "import sys; from effnet_train.cli.data import main; sys.argv = {!r}\ntry: main()\nexcept SystemExit: pass\n"
    for words in (["effnet-data", "--help"], ["effnet-data", "verify", "--help"]):
        script = code.format(words) + "assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "effnet-data verify" in done.stdout


SYNSETS = ("n01440764", "n02084071", "n03000000")
# Their numbers in the devkit, which are not those of the sorted names.
NUMBERS = {"n01440764": 2, "n02084071": 3, "n03000000": 1}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def official(imagenet_jpegs: dict[str, bytes], tmp_path: Path) -> Path:
    """Return a folder with ImageNet's archives in small, `images/` beside it with the same images in folders."""
    root, images = tmp_path / "official", iter(imagenet_jpegs.values())
    root.mkdir()

    def keep(path: str) -> bytes:
        file, data = tmp_path / "images" / path, next(images)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return data

    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in reversed(SYNSETS):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for name in (f"{synset}_{number}.JPEG" for number in (30, 4, 200)):
                    add(inner, name, keep(f"train/{synset}/{name}"))
            add(outer, f"{synset}.tar", stream.getvalue())
    labels = [SYNSETS[i] for i in (2, 0, 0, 1)]
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (2, 4, 1, 3):
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            add(tar, name, keep(f"val/{labels[number - 1]}/{name}"))
    rows = [(NUMBERS[synset], synset, "words") for synset in SYNSETS] + [(4, "n00001740", "an inner node")]
    table = np.array(rows, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    stream = io.BytesIO()
    savemat(stream, {"synsets": table[:, None]})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", stream.getvalue())
        text = "".join(f"{NUMBERS[synset]}\n" for synset in labels).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text)
    return root


def images_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.JPEG")}


def test_prepare_unpacks_the_official_archives(cli: Cli, official: Path, tmp_path: Path) -> None:
    words = ("prepare", f"data.root={official}", "data.cache=cache", "data.expected=null")
    done = cli("data", *words, "to=folder", "output=out")
    assert done.status == 0, done.err
    assert done.out.splitlines()[0].startswith("train: 9 images in out/train, ")
    assert images_below(tmp_path / "out") == images_below(tmp_path / "images")
    refused = cli("data", *words, "to=folder", "output=out", "resize=64")
    assert refused.status == 2
    assert "resize was None, now 64" in refused.err


def test_prepared_shards_are_trained_on(cli: Cli, official: Path, tmp_path: Path, tiny: list[str]) -> None:
    words = ("prepare", f"data.root={official}", "data.cache=cache", "data.expected=null", "output=out")
    done = cli("data", *words, "images=4", "resize=48", "workers=2")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == "out: data=shards data.root=out"
    assert (tmp_path / "out/classes.txt").read_text().split() == list(SYNSETS)
    verified = cli("data", "verify", "data=shards", "data.root=out", "data.cache=cache")
    assert verified.status == 0, verified.out
    assert "train: 9 images" in verified.out
    options = [text for text in tiny if not text.startswith("data.root")]
    trained = cli("train", *options, "data=shards", "data.root=out", "data.cache=cache", "batch_size=4")
    assert trained.status == 0, trained.err
    (tmp_path / "out/train-000001.tar").write_bytes((tmp_path / "out/train-000000.tar").read_bytes())
    damaged = cli("data", "verify", "data=shards", "data.root=out", "data.cache=cache")
    assert damaged.status == 1
    assert "out/train-000001.tar: not what was written" in damaged.out


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGINT, 0)])
def test_convert_asked_to_stop_leaves_nothing_unfinished(
    cli: Cli, tmp_path: Path, imagenet_jpegs: dict[str, bytes], number: signal.Signals, workers: int
) -> None:
    """A signal to the whole group, as a terminal and a scheduler send it, in the middle of a piece."""
    for place in range(300):
        folder = tmp_path / "images" / ("train" if place % 5 else "val") / "ab"[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place:04d}.jpg").write_bytes(list(imagenet_jpegs.values())[place % 40])
    words = ["convert", "data=folder", "data.root=images", "output=out", "images=100", "resize=200"]
    command = [sys.executable, "-m", "effnet_train.cli.data", *words, f"workers={workers}"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("out/.train-*.tmp")):
            assert time.monotonic() < until
            time.sleep(0.01)
        os.killpg(process.pid, number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert told.endswith(f"{number.name}: stopped; the same command goes on from what is written\n")
    assert "Traceback" not in told
    assert not list(tmp_path.glob("out/.*"))
    assert cli("data", *words, "workers=0").status == 0


def test_the_exit_code_holds_wherever_the_signal_struck(tmp_path: Path) -> None:
    """Python leaves by SIGINT where a KeyboardInterrupt has passed through an `exec` of a text, whoever caught it."""
    (tmp_path / "stopped.py").write_text(
        "from effnet_train.cli.data import _told_when_stopped\n"
        "with _told_when_stopped():\n"
        "    exec('import os, signal; os.kill(os.getpid(), signal.SIGINT)')\n"
    )
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr


def test_reassessed_labels_find_their_images_in_shards(cli: Cli, official: Path, tmp_path: Path) -> None:
    """By the names that the images have had in ImageNet's own archive."""
    words = ("prepare", f"data.root={official}", "data.cache=cache", "data.expected=null")
    done = cli("data", *words, "output=out", "resize=64", "images=3")
    assert done.status == 0, done.err
    val = shards("out", train="train-*.tar", val="val-*.tar", cache="cache", preprocess=Preprocess(16)).val
    (tmp_path / "real.json").write_text(json.dumps([[0], [1], [2], []]))
    real = real_labels(tmp_path / "real.json", val, range(3))[:, 0].tolist()
    # The validation images 1 to 4 are of the classes 2, 0, 0, 1.
    assert sorted(zip(real, [val.read(i)[1] for i in range(4)], strict=True)) == [(-1, 1), (0, 2), (1, 0), (2, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["shards", "folder"])
def test_convert_killed_again_and_again_loses_nothing(
    cli: Cli, tmp_path: Path, imagenet_jpegs: dict[str, bytes], to: str
) -> None:
    """SIGKILL to the real command, at ever other moments; what it wrote in the end is what an undisturbed one wrote."""
    for place in range(1200):
        folder = tmp_path / "images" / ("train" if place % 5 else "val") / "abc"[place % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place:04d}.jpg").write_bytes(list(imagenet_jpegs.values())[place % 40] + str(place).encode())
    words = ["convert", "data=folder", "data.root=images", f"to={to}", "images=25", "resize=200"]
    done, seen = None, set()
    for attempt in range(60):
        with subprocess.Popen(
            [sys.executable, "-m", "effnet_train.cli.data", *words, "output=killed", "workers=2"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as process:
            try:
                done = process.wait(timeout=3 + 0.37 * attempt)
                assert done == 0, process.stderr and process.stderr.read()
                break
            except subprocess.TimeoutExpired:
                process.kill()
        manifest = tmp_path / "killed/manifest.json"
        seen.add(len(json.loads(manifest.read_text())["pieces"]) if manifest.exists() else 0)
    assert done == 0
    assert len(seen) > 1  # it was killed, and had got further
    assert cli("data", *words, "output=whole", "workers=2").status == 0
    files = [
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("killed", "whole")
    ]
    assert files[0].keys() == files[1].keys()
    assert files[0] == files[1]
