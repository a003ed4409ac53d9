"""What a user can mend ends with status 2 and one message that says how; nothing is left behind."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from torch._utils import ExceptionWrapper

from effnet_train.cli.app import fail, run_rank, user_message
from effnet_train.data.remote import RemoteError

Cli = Callable[..., Any]


def assert_refused(done: Any, message: str) -> None:
    """Assert that the command's last words, and its only ones, are the message."""
    assert done.status == 2, done
    assert done.err.startswith(("effnet-train: error: ", "effnet-eval: error: ")), done.err
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model=b9", "model=b9 is not known: did you mean model=b7 or model=b6 or model=b5? The choices are b0, b1"),
        ("model.widht=2", "model.widht is not a key of the configuration: did you mean model.width"),
        pytest.param(
            "+model.widht=2",
            "model.widht is not a key of EfficientNet: did you mean model.width?",
            marks=pytest.mark.slow,
        ),
        ("lr=0.1", "lr is not a key of the configuration: did you mean schedule.lr_per_256?"),
        pytest.param("+lr=0.1", "lr is not a key of the configuration: remove it", marks=pytest.mark.slow),
        ("loggers.progress.bar=true", "loggers.progress.bar is not a key of this configuration: one of the groups"),
        pytest.param(
            "model=null",
            "give group=option, where the groups are augment, cluster, data, debug, loggers, model",
            marks=pytest.mark.slow,
        ),
        ("data=folder data.root=???", "data.root has no value: give data.root=... on the command line"),
        pytest.param("model.width=-1", "width=-1 must be a number above 0 (in model)", marks=pytest.mark.slow),
        ("optim.eps=-1", "Invalid epsilon: -1 (in optim)"),
        pytest.param(
            "log_every.steps=0",
            "log_every: steps=0 must be a whole number of at least 1, or null for never",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "save_every.epochs=1",
            "save_every: steps=2 and epochs=1 are both set; choose one, the other is null",
            marks=pytest.mark.slow,
        ),
        ("schedule.warmup_epochs=7", "schedule.warmup_epochs=7 is not shorter than the run of epochs=1: try"),
        pytest.param(
            "batch_size=18 accumulate=4",
            "batch_size=18 (global) is no multiple of 4 (1 ranks x accumulate=4): try",
            marks=pytest.mark.slow,
        ),
        (
            "batch_size=17 ranks=2",
            "batch_size=17 (global) is no multiple of 2 (2 ranks x accumulate=1): try batch_size=16",
        ),
        ("batch_size=17 mixing.mixup_alpha=1", "no multiple of 2 (1 ranks x accumulate=1 x 2, as mixing pairs images)"),
        ("batch_size=2 accumulate=2", "batch_size=2 leaves one image to a micro-batch (1 ranks x accumulate=2), and"),
        ("mine", "mine is not of the form key=value: give key=value or group=option"),
        ("name=a=b", "name=a=b cannot be read as key=value: put two pairs of quotes around the value, name=\"'a=b'\""),
        ("precision=fp8", "precision=fp8 is not known: use auto, fp32, tf32, bf16, fp16"),
        pytest.param("device=tpu", "device=tpu is not known: use auto, cpu or cuda", marks=pytest.mark.slow),
        ("augment.flip=3", "augment.flip=3 must be a probability: from 0 to 1"),
        pytest.param(
            "checkpoint.keep=0", "checkpoint.keep=0: at least 1 must stay, to resume from", marks=pytest.mark.slow
        ),
        ("init_from=nowhere", "init_from=nowhere does not exist: give a .pt or .safetensors file, or a run's folder"),
    ],
)
def test_bad_input_is_refused_and_claims_no_folder(cli: Cli, tiny: list[str], overrides: str, message: str) -> None:
    assert_refused(cli("train", *tiny, *overrides.split()), message)
    assert not Path("run").exists()


def test_no_cuda_is_said(cli: Cli, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(
        cli("train", *tiny, "device=cuda"), "device=cuda, but torch sees no CUDA device here: use device=cpu"
    )


@pytest.fixture
def folder(few_digits: Path, tmp_path: Path) -> Path:
    """Return a copy of the digits that may be spoilt."""
    return shutil.copytree(few_digits, tmp_path / "images")


def on_folder(tiny: list[str], root: Path, *more: str) -> list[str]:
    return [*(text for text in tiny if not text.startswith("data.")), "data=folder", f"data.root={root}", *more]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            shutil.rmtree,
            "data.root={root} does not exist: set it to a folder that holds train/ and val/",
        ),
        (
            lambda root: shutil.rmtree(root / "val"),
            "data.root={root} has no folder data.val=val: set data.root to a folder with",
        ),
        (
            lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()],
            "data folder {root}/train holds no class folders: it should hold <class>/<image>",
        ),
        (
            lambda root: [path.unlink() for path in (root / "train" / "3").iterdir()],
            "the class folder {root}/train/3 holds no image (.jpeg, .jpg, .png",
        ),
        (
            lambda root: (root / "val" / "3").rename(root / "val" / "three"),
            "train has 10 classes and val 10, and they differ: only in train ['3'], only in val ['three']",
        ),
    ],
    ids=["absent", "no-val", "empty", "empty-class", "other-classes"],
)
def test_bad_data_folders(
    cli: Cli, tiny: list[str], folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    assert_refused(cli("train", *on_folder(tiny, folder)), message.format(root=folder))
    assert not Path("run").exists()


def test_a_corrupt_image_is_named_or_skipped_with_a_count(cli: Cli, tiny: list[str], folder: Path) -> None:
    for split in ("train", "val"):
        victim = sorted((folder / split / "7").iterdir())[0]
        victim.write_bytes(victim.read_bytes()[:60])
    # Two epochs of ten steps: every training image is met.
    longer = ("max_steps=20", "epochs=2", "batch_size=8", "evaluate_every.steps=20", "save_every.steps=20")
    arguments = on_folder(tiny, folder, *longer)
    refused = cli("train", *arguments)
    assert_refused(refused, "cannot read the image ")
    assert f"{folder}/" in refused.err
    assert "mend or remove it, or set data.on_error=skip to go on without it" in refused.err

    kept = [text for text in arguments if text not in ("name=run", "loggers=none")]
    done = cli("train", *kept, "name=skipping", "data.on_error=skip", "log_every.steps=20")
    assert done.status == 0, done.err
    rows = Path("skipping/metrics.jsonl").read_text()
    assert '"train/skipped": 2.0' in rows  # once an epoch
    scored = cli("eval", "checkpoint=skipping", "device=cpu", "workers=0")
    assert '"images": 39, "skipped": 1' in scored.out
    assert "(1 skipped)" in scored.out
    strict = cli("eval", "checkpoint=skipping", "device=cpu", "workers=0", "data.on_error=raise")
    assert_refused(strict, f"cannot read the image {folder}/val/7/")


def test_a_run_of_another_configuration_is_refused_and_free_keys_are_not(cli: Cli, tiny: list[str]) -> None:
    assert cli("train", *tiny).status == 0
    before = {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir()}
    refused = cli("train", *tiny, "model.dropout=0.3", "batch_size=8")
    assert_refused(
        refused, "batch_size was 16, now 8; model.dropout was 0.2, now 0.3. Give name=... for a folder of its"
    )
    assert "no checkpoint yet" not in refused.err
    assert before == {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir()}
    free = ("eval_batch_size=8", "accumulate=2", "model.checkpointing=true", "checkpoint.keep=1", "save_every.steps=1")
    more = [text for text in tiny if not text.startswith("max_steps")]
    done = cli("train", *more, *free, "max_steps=3")
    assert done.status == 0, done.err
    assert [path.name for path in Path("run").glob("step_*")] == ["step_000000003.pt"]


def test_a_folder_without_a_checkpoint_is_said_to_be_of_no_loss(cli: Cli, tiny: list[str]) -> None:
    assert cli("train", *tiny).status == 0
    for path in Path("run").glob("*.pt"):
        path.unlink()
    assert_refused(cli("train", *tiny, "seed=1"), "It has no checkpoint yet: to remove it loses nothing")


def test_a_place_that_cannot_be_written_to(cli: Cli, tiny: list[str]) -> None:
    Path("file").touch()
    arguments = [text for text in tiny if not text.startswith("run_root")]
    message = "cannot write to the run's folder file/run (Not a directory): choose another place with run_root=..."
    assert_refused(cli("train", *arguments, "run_root=file"), message)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint_kept(cli: Cli, tiny: list[str]) -> None:
    arguments = [text for text in tiny if not text.startswith("max_steps")]
    hot = ("optim=sgd", "schedule=constant", "save_every.steps=1", "log_every.steps=1", "evaluate_every.steps=null")
    stopped = cli("train", *arguments, *hot, "name=again", "schedule.lr_per_256=1e20", "max_steps=20")
    assert stopped.status == 2
    assert "is not a finite number at step " in stopped.err
    assert "Start a run of another name= with a lower schedule.lr_per_256" in stopped.err
    kept = sorted(Path("again").glob("step_*.pt"))
    if kept:
        assert f"the last good checkpoint is {kept[-1]}" in stopped.err
        assert all(t.isfinite().all() for t in torch.load(kept[-1], weights_only=True)["model"].values())
    else:
        assert "there is no checkpoint yet" in stopped.err


@pytest.mark.parametrize(("logger", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_missing_extra_is_named(
    cli: Cli, tiny: list[str], logger: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = cli("train", *(text for text in tiny if text != "loggers=none"), f"loggers={logger}")
    assert_refused(done, f"loggers={logger} needs the extra {logger}: pip install 'effnet-train[{logger}]'")


def test_memory_that_is_short_names_the_settings_to_change() -> None:
    text = user_message(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "train")
    assert text is not None
    assert text.startswith("out of memory (CUDA out of memory. Tried to allocate 2 GiB). Raise accumulate=")
    for setting in ("model.checkpointing=true", "precision=bf16", "batch_size="):
        assert setting in text
    on_cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert "out of memory" in str(user_message(on_cpu, "train"))


def test_our_own_mistakes_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for mistake in (AssertionError("ours"), KeyError("ours"), RuntimeError("shapes"), ZeroDivisionError()):
        assert user_message(mistake, "train") is None

    def wrong() -> None:
        raise AssertionError("ours")

    with pytest.raises(SystemExit) as left:
        run_rank("train", wrong)
    assert left.value.code == 1
    assert "AssertionError: ours" in capsys.readouterr().err


def test_another_ranks_message_says_which_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "3")

    def wrong() -> None:
        raise ValueError("seed=-1 must be at least 0")

    with pytest.raises(SystemExit) as left:
        run_rank("train", wrong)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith("[rank 3] error: seed=-1 must be at least 0\n")


def test_images_of_other_kinds_train_too(cli: Cli, tiny: list[str], image_root: Path) -> None:
    """Grey, palette, CMYK and transparent files, in one folder."""
    done = cli("train", *on_folder(tiny, image_root, "batch_size=6", "augment=autoaugment"))
    assert done.status == 0, done.err


def test_what_a_data_worker_raised_comes_without_its_traceback() -> None:
    try:
        raise RemoteError("cannot read x after 6 attempts (OSError: y)")
    except RemoteError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(RemoteError, match="Original Traceback") as error:
        wrapped.reraise()
    assert user_message(error.value, "train") == "cannot read x after 6 attempts (OSError: y)"


def test_a_store_out_of_reach_may_be_there_the_next_time(capsys: pytest.CaptureFixture[str]) -> None:
    for error, status in ((RemoteError("no route"), 1), (ValueError("no such key"), 2)):
        with pytest.raises(SystemExit) as left:
            fail(str(error), error)
        assert left.value.code == status
    assert "error: no route" in capsys.readouterr().err


def test_what_this_user_may_not_read_is_named() -> None:
    denied = PermissionError(13, "Permission denied", "images/val")
    wanted = "images/val: access denied (Permission denied): let this user in, or choose another place"
    assert user_message(denied, "train") == wanted
    wrapped = InstantiationException("Error in call to target\nfull_key: data")
    wrapped.__cause__ = denied
    assert user_message(wrapped, "train") == f"{wanted} (in data)"
