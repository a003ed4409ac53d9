"""`effnet-eval`: the same numbers from every form of the same weights, and a clear word where they don't fit."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from effnet_train.cli import build
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.engine.checkpoint import load_checkpoint

Cli = Callable[..., Any]
ONE = ("device=cpu", "workers=0")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder of a run."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("eval.json"))  # of another test


def scored(done: Any) -> dict[str, Any]:
    """Return the JSON line, which is the last one."""
    assert done.status == 0, done.err
    record = json.loads(done.out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def test_all_forms_give_what_training_logged(cli: Cli, run: Path, few_digits: Path, tmp_path: Path) -> None:
    logged = json.loads((run / "summary.json").read_text())["best"]
    assert logged["val_ema/top1"] > 0.2  # not of a network that has learnt nothing
    expected = {name: pytest.approx(logged[f"val_ema/{name}"], rel=1e-6) for name in ("top1", "top5", "loss")}
    for form in (run, run / "best.pt", run / "model.safetensors"):
        record = scored(cli("eval", f"checkpoint={form}", *ONE))
        assert {name: record[name] for name in expected} == expected
        assert (record["images"], record["skipped"], record["resolution"]) == (40, 0, 32)
        assert record["step"] == logged["step"]
    assert json.loads((run / "eval.json").read_text()) == record
    # Both kinds of weights, of the last step.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "val/loss" in row)
    newest = f"checkpoint={run / 'step_000000030.pt'}"
    raw = scored(cli("eval", newest, "weights=raw", *ONE))
    ema = scored(cli("eval", newest, *ONE))
    assert raw["loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert ema["loss"] == pytest.approx(last["val_ema/loss"], rel=1e-6)
    assert raw["loss"] != pytest.approx(ema["loss"], rel=1e-3)
    assert (raw["weights"], ema["weights"]) == ("raw", "ema")


def test_options(cli: Cli, run: Path, few_digits: Path, tmp_path: Path) -> None:
    record = scored(cli("eval", f"checkpoint={run}", "output=scores.json", "batch_size=7", *ONE))
    assert json.loads(Path("scores.json").read_text()) == record
    assert not (run / "eval.json").exists()
    larger = scored(cli("eval", f"checkpoint={run}", "resolution=48", *ONE))
    assert larger["resolution"] == 48
    assert larger["loss"] != record["loss"]
    moved = shutil.copytree(few_digits, tmp_path / "elsewhere")
    shutil.rmtree(moved / "val" / "9")
    shutil.rmtree(moved / "train" / "9")
    for split in ("train", "val"):
        shutil.copytree(few_digits / split / "8", moved / split / "9")
    assert scored(cli("eval", f"checkpoint={run}", f"data.root={moved}", *ONE))["loss"] != record["loss"]
    table = cli("eval", f"checkpoint={run}", "split=train", *ONE).out
    assert f"{run / 'best.pt'} (ema weights of step" in table
    assert "train at 32 pixels" in table
    assert "  images          80\n" in table


def assert_refused(done: Any, message: str) -> None:
    assert done.status == 2
    assert done.err.startswith("effnet-eval: error: "), done.err
    assert message in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "checkpoint has no value: give checkpoint=... on the command line"),
        ("checkpoint=none.pt", "checkpoint=none.pt does not exist: give a .pt or .safetensors file, or a run's folder"),
        ("checkpoint=.", "checkpoint=. holds neither best.pt nor step_*.pt: is it a run's folder?"),
        ("checkpoint=run split=test", "split=test is not there: choose train or val (held_out needs data.minival)"),
        ("checkpoint=run split=held_out", "split=held_out is not there: choose train or val"),
        ("checkpoint=run weights=best", "weights=best is not known: use ema or raw"),
        ("checkpoint=run/model.safetensors weights=raw", "holds the selected weights only; give the run's best.pt"),
        ("checkpoint=run output=no/such.json", "output=no/such.json: its folder does not exist, make it first"),
        (
            "checkpoint=run data.root=run",
            "data.root=run has no folder data.train=train: set data.root to a folder with",
        ),
        ("checkpoint=run data=digits data.preprocess.mean=[0,0,0]", "the checkpoint's own preprocessing is used"),
        (
            "checkpoint=run data=digits preprocess@data.preprocess=imagenet",
            "the checkpoint's own preprocessing is used",
        ),
        ("checkpoint=run data.backend=nvjpeg", "data.backend=nvjpeg works on a GPU, and device=cpu is none"),
        ("checkpoint=run data=folder", "data.root=null must be text"),
        ("checkpoint=run batch_size=0", "batch_size=0 must be at least 1"),
        ("checkpoint=run model.width=2", "model.width is not a key of the configuration"),
    ],
)
def test_requests_that_cannot_be_met(cli: Cli, run: Path, arguments: str, message: str) -> None:
    del run
    assert_refused(cli("eval", *arguments.split(), *ONE), message)


@pytest.mark.parametrize("crops", [1, 5])
def test_the_devices_pixels_are_scored_alike(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, crops: int) -> None:
    # A CPU in the GPU's place; the digits are PNG, which Pillow reads for both.
    monkeypatch.setattr("effnet_train.data.device_batches.check_device", lambda *arguments: None)
    options = (f"checkpoint={run}", f"crops={crops}", *ONE)
    ours, theirs = (scored(cli("eval", *options, f"data.backend={name}")) for name in ("nvjpeg", "pillow"))
    assert {**ours, "images_per_s": 0} == {**theirs, "images_per_s": 0}


def test_other_classes_are_refused(cli: Cli, run: Path, few_digits: Path, image_root: Path, tmp_path: Path) -> None:
    other = ("data=folder", f"data.root={image_root}")
    number = "the data set has 3 classes, the checkpoint 10: choose the data it was trained on"
    assert_refused(cli("eval", f"checkpoint={run}", *other, *ONE), number)
    renamed = shutil.copytree(few_digits, tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "9").rename(renamed / split / "nine")
    arguments = (f"checkpoint={run}", "data=folder", f"data.root={renamed}", *ONE)
    names = "1 classes are named differently: class 9 is 'nine' in the data set and '9' in the checkpoint"
    assert_refused(cli("eval", *arguments), names)
    same = scored(cli("eval", f"checkpoint={run}", *ONE))
    assert scored(cli("eval", *arguments, "classes=any"))["loss"] == same["loss"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("# A title\n\nand words\n"),
        lambda path: torch.save([1, 2], path),
        lambda path: path.write_text("step,epoch\n1,2\n"),
        lambda path: torch.save({"effnet_train": 1}, path),
    ],
    ids=["words", "list", "table", "half"],
)
def test_a_file_of_another_kind_is_refused(cli: Cli, write: Callable[[Path], Any]) -> None:
    write(Path("file.pt"))
    assert_refused(cli("eval", "checkpoint=file.pt", *ONE), "checkpoint")


class _Hostile:
    """Unpickles by making a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_a_hostile_file_cannot_run_code(cli: Cli, run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, write in (
        ("torch.pt", torch.save),
        ("plain.pt", lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))),
    ):
        write({"effnet_train": 1, "model": _Hostile(mark)}, tmp_path / name)
        assert_refused(cli("eval", f"checkpoint={name}", *ONE), "or holds code, which is never run")
        assert not mark.exists()
    # It would have worked.
    torch.load(tmp_path / "torch.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "effnet_train.data.sources.os.system",
        "effnet_train.data.loader.multiprocessing.Process",
        "effnet_train.models.efficientnet.checkpoint",
        "effnet_train.data.datasets._write_digits",
        "effnet_train.cli.train.main",
        "effnet_train.models.published.fetch",
        "effnet_train.models.nope.X",
        "${oc.env:HOME}",
    ],
)
def test_hostile_targets_are_refused(cli: Cli, target: str) -> None:
    for place in ({"model": {"_target_": target}}, {"data": [{"x": {"_target_": target, "root": "mark"}}]}):
        with pytest.raises((ValueError, ImportError)) as refused:
            build.check_targets(place, "x.pt")
        assert target.rpartition(".")[0] in str(refused.value)


def test_what_may_be_called_stands_in_its_own_place_alone() -> None:
    model, data = "effnet_train.models.efficientnet.EfficientNet", "effnet_train.data.datasets.digits"
    preprocess = {"_target_": "effnet_train.data.preprocess.Preprocess", "resolution": 32}
    build.check_targets({"model": {"_target_": model}, "data": {"_target_": data, "preprocess": preprocess}}, "x.pt")
    for meta in (
        {"model": {"_target_": data}},
        {"data": {"_target_": model}},
        {"model": {"_target_": model, "width": {"_target_": model}}},
        {"data": {"_target_": data, "root": preprocess}},
        {"preprocess": preprocess},
    ):
        with pytest.raises(ValueError, match="is no model or data set of effnet_train: refused"):
            build.check_targets(meta, "x.pt")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "data").glob("*.yaml")))
def test_checkpoints_of_every_data_set_may_be_read(compose: Callable[..., Any], name: str) -> None:
    config = compose("train", f"data={name}", "data.root=x")
    build.check_targets({"model": config["model"], "data": config["data"]}, "x.pt")


def test_nothing_is_made_where_a_file_says(cli: Cli, run: Path) -> None:
    payload = load_checkpoint(run / "best.pt")
    payload["meta"]["data"]["root"] = "chosen/by/it"
    torch.save(payload, "hostile.pt")
    message = "hostile.pt was trained on data.root=chosen/by/it, which is not here: give data.root=..."
    assert_refused(cli("eval", "checkpoint=hostile.pt", *ONE), message)
    assert not Path("chosen").exists()


def test_a_hostile_target_in_a_checkpoint_is_refused(cli: Cli, run: Path) -> None:
    payload = load_checkpoint(run / "best.pt")
    payload["meta"]["data"]["_target_"] = "subprocess.check_output"
    torch.save(payload, "hostile.pt")
    message = "hostile.pt asks for 'subprocess.check_output', which is no model or data set of effnet_train: refused"
    assert_refused(cli("eval", "checkpoint=hostile.pt", *ONE), message)


def test_the_exported_file_carries_all_that_is_needed(run: Path) -> None:
    described = json.loads((run / "model.json").read_text())
    assert described["classes"] == [str(digit) for digit in range(10)]
    assert described["preprocess"]["resolution"] == 32
    assert described["model"]["width"] == 0.25
    tensors = load_file(run / "model.safetensors")
    best = load_checkpoint(run / "best.pt")["ema"]
    assert tensors.keys() == best.keys()
    assert all(tensors[name].equal(best[name]) for name in best)


@pytest.mark.parametrize(
    "hidden",
    [
        {"x": "${oc.create:{_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: [mark]}]}}"},
        {"x": ["a", {"y": "${oc.env:HOME}"}]},
        {"x": {"_args_": ["mark"]}},
    ],
)
def test_what_would_become_a_target_later_is_refused(cli: Cli, run: Path, hidden: dict) -> None:
    payload = load_checkpoint(run / "best.pt")
    payload["meta"]["model"] |= hidden
    torch.save(payload, "hidden.pt")
    found = cli("eval", "checkpoint=hidden.pt", *ONE)
    assert_refused(found, "refused")
    assert not Path("mark").exists()
