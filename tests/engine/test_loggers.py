import contextlib
import csv
import errno
import fcntl
import importlib.util
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from effnet_train.engine.loggers import (
    CsvLogger,
    JsonlLogger,
    MlflowLogger,
    WandbLogger,
    image_grid,
    tell,
)
from effnet_train.engine.progress import ProgressLogger, duration
from effnet_train.engine.tensorboard import TensorBoardLogger

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = {"total_steps": 8, "epochs": 2, "model": {"width": 1.0}, "folder": Path("/data")}
FILES = {JsonlLogger: "metrics.jsonl", CsvLogger: "metrics.csv"}

wandb_installed = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
mlflow_installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mlflow", "sqlalchemy", "alembic"))),
    reason="mlflow with its database store is not installed",
)


@pytest.fixture
def opened():
    """Open loggers that the test leaves as a killed process does; in the end they are closed for it."""
    loggers = []

    def open_(logger, run_dir, step=0):
        logger.open(run_dir, step=step, evaluated=step, config=CONFIG)
        loggers.append(logger)
        return logger

    yield open_
    for logger in loggers:
        logger.close()


def log(logger, *, start, stop):
    """Log steps start + 1 to stop, four to an epoch."""
    for step in range(start + 1, stop + 1):
        logger.scalars(step, {"train/loss": 1 / step, "train/lr": 0.1 * step}, epoch=step / 4)
        if step % 4 == 0:
            logger.scalars(step, {"val/top1": step / 10, "val_ema/top1": step / 9}, epoch=step / 4)
    return logger


def read_tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


@pytest.mark.parametrize("logger", FILES)
@pytest.mark.parametrize("resumed_at", [0, 2, 4, 5])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, opened, logger, resumed_at):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    log(opened(logger(), whole), start=0, stop=8)
    log(opened(logger(), cut), start=0, stop=6)
    before = (cut / FILES[logger]).read_bytes()
    log(opened(logger(), cut, resumed_at), start=resumed_at, stop=8)

    assert (cut / FILES[logger]).read_bytes() == (whole / FILES[logger]).read_bytes()
    assert before != (whole / FILES[logger]).read_bytes()
    assert os.listdir(cut) == [FILES[logger]]  # no temporary file stays


@pytest.mark.parametrize("logger", FILES)
@pytest.mark.parametrize("missing", [1, 5])
def test_a_half_written_line_is_dropped_and_said(tmp_path, opened, logger, missing):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    log(opened(logger(), whole), start=0, stop=8)
    log(opened(logger(), cut), start=0, stop=7)
    file = cut / FILES[logger]
    file.write_bytes(file.read_bytes()[:-missing])
    # A line that lacks its end alone must go too: the next one would be written on to it.
    with pytest.warns(UserWarning, match=rf"{FILES[logger]}: left out 1 line\(s\) that an interruption had damaged"):
        opened(logger(), cut, 7)
    assert file.read_bytes() == b"".join(whole.joinpath(FILES[logger]).read_bytes().splitlines(True)[:-3])


@pytest.mark.parametrize("logger", FILES)
def test_a_new_run_forgets_an_earlier_attempt_even_its_step_0(tmp_path, opened, logger):
    opened(logger(), tmp_path).scalars(0, {"val/top1": 0.1}, epoch=0)
    before = (tmp_path / FILES[logger]).read_text()
    opened(logger(), tmp_path).scalars(0, {"val/top1": 0.1}, epoch=0)
    assert (tmp_path / FILES[logger]).read_text() == before


def test_jsonl_keeps_every_digit_and_stays_json(tmp_path, opened):
    logger = opened(JsonlLogger(), tmp_path)
    values = {"a": 0.1 + 0.2, "b": float("nan"), "c": float("-inf"), "d": np.float32(0.1), "e": 3}
    logger.scalars(7, values, epoch=1 / 3)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    # Read before closing: each row is in the file at once.
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    expected = {"a": 0.1 + 0.2, "b": None, "c": None, "d": float(np.float32(0.1)), "e": 3.0}
    assert row == {"step": 7, "epoch": 1 / 3, **expected}


def test_csv_gets_new_columns_as_they_come(tmp_path, opened):
    logger = opened(CsvLogger(), tmp_path)
    logger.scalars(0, {"train/loss": 0.1 + 0.2}, epoch=0.0)
    logger.scalars(0, {"val/top1": 0.5}, epoch=0.0)
    logger.scalars(2, {"train/loss": float("nan"), "val/top1": 0.25}, epoch=1.0)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "epoch", "train/loss", "val/top1"],
            ["0", "0.0", "0.30000000000000004", ""],
            ["0", "0.0", "", "0.5"],
            ["2", "1.0", "nan", "0.25"],
        ]


@pytest.mark.parametrize("logger", FILES)
@pytest.mark.parametrize("damage", ["\0\0\0\n", "1\n", '{"step"\n', "{}\n", "1,1,1,1,1,1,1,1\n"])
def test_damage_inside_a_log_costs_its_line_alone(tmp_path, opened, logger, damage):
    file = tmp_path / FILES[logger]
    log(opened(logger(), tmp_path), start=0, stop=4)
    before = file.read_text()
    file.write_text(before + damage)
    with pytest.warns(UserWarning, match=r"left out 1 line\(s\)"):
        opened(logger(), tmp_path, 4)
    assert file.read_text() == before


def test_tensorboard_has_each_step_once_after_a_crash_and_a_resume(tmp_path, opened):
    first = log(opened(TensorBoardLogger(), tmp_path), start=0, stop=6)
    first.images(5, "train/images", np.zeros((5, 8, 8, 3), np.uint8))
    assert [e.step for e in read_tensorboard(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]  # nothing buffered
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    second = log(opened(TensorBoardLogger(), tmp_path, 4), start=4, stop=8)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    second.images(5, "train/images", images)

    events = read_tensorboard(tmp_path)
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([1 / s for s in range(1, 9)])
    assert [e.step for e in events.Scalars("val_ema/top1")] == [4, 8]
    [image] = events.Images("train/images")
    assert (image.width, image.height) == (32, 22)  # 3 x 2 tiles of 8 with 2 between
    [text] = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.startswith("```json\n")
    assert json.loads(shown.removeprefix("```json\n").removesuffix("\n```")) == {**CONFIG, "folder": "/data"}


def test_tensorboard_begun_anew_forgets_everything(tmp_path, opened):
    log(opened(TensorBoardLogger(), tmp_path), start=0, stop=3).images(
        0, "train/images", np.zeros((1, 8, 8, 3), np.uint8)
    )
    time.sleep(1.1)
    log(opened(TensorBoardLogger(), tmp_path), start=0, stop=2).images(
        0, "train/images", np.ones((1, 8, 8, 3), np.uint8)
    )
    events = read_tensorboard(tmp_path)
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2]
    assert len(events.Images("train/images")) == len(events.Tensors("config/text_summary")) == 1


def test_grid_holds_every_image_row_by_row():
    from torch import from_numpy
    from torchvision.utils import make_grid

    images = np.random.default_rng(0).integers(0, 256, (7, 6, 9, 3), np.uint8)
    expected = make_grid(from_numpy(images).permute(0, 3, 1, 2), nrow=3, padding=2).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(image_grid(images), expected)


# Progress


@pytest.fixture
def clock(monkeypatch):
    """Make time pass by hand."""
    now = [0.0]
    monkeypatch.setattr("effnet_train.engine.progress.monotonic", lambda: now[0])
    return now


TRAIN = {
    "train/loss": 2.9131,
    "train/top1": 0.412,
    "train/lr": 0.124,
    "train/images_per_s": 2489.4,
    "train/data_wait": 0.012,
}


def test_a_line_says_it_all(tmp_path, capsys, clock):
    logger = ProgressLogger()
    logger.open(tmp_path, step=15_000, evaluated=15_000, config={"total_steps": 437_500, "epochs": 350})
    clock[0] = 12 * 0.0273
    logger.scalars(15_012, TRAIN, epoch=12.0096)
    assert capsys.readouterr().out == ""
    logger.scalars(15_012, {"val/top1": 0.551, "val_ema/top1": 0.589, "val/loss": 2.0}, epoch=12.0096)
    assert capsys.readouterr().out == (
        "epoch 12/350  step 15,012/437,500  loss 2.913  top-1 41.2 %  val 55.1 % (EMA 58.9 %)  lr 0.124  "
        "2,489 images/s  data 1 %  left 3 h 12 min\n"
    )


def test_one_line_for_each_epoch_or_evaluation(tmp_path, capsys, clock):
    logger = ProgressLogger()
    logger.open(tmp_path, step=0, evaluated=0, config={"total_steps": 12, "epochs": 3})
    for step in range(1, 13):
        clock[0] = step
        logger.scalars(step, {"train/loss": float(step)}, epoch=step / 4)
        if step in (6, 8):
            logger.scalars(step, {"val/top1": step / 10}, epoch=step / 4)
    logger.close()
    logger.close()
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/3  step 4/12  loss 4.000  left 8 s",
        "epoch 1.5/3  step 6/12  loss 6.000  val 60.0 %  left 6 s",
        "epoch 2/3  step 8/12  loss 8.000  val 80.0 %  left 4 s",
        "epoch 3/3  step 12/12  loss 12.000  left 0 s",
    ]


def test_a_resumed_run_does_not_repeat_the_epoch(tmp_path, capsys):
    logger = ProgressLogger()
    logger.open(tmp_path, step=6, evaluated=6, config={"total_steps": 8, "epochs": 30})  # a run cut short by max_steps
    logger.scalars(7, {"train/loss": 1.0}, epoch=7 / 4)
    logger.close()
    assert capsys.readouterr().out == ""
    logger.open(tmp_path, step=6, evaluated=6, config={"total_steps": 8, "epochs": 30})
    logger.scalars(8, {"train/loss": 1.0}, epoch=2.0)
    logger.close()
    assert capsys.readouterr().out.startswith("epoch 2/30  step 8/8  loss 1.000")


def test_much_waiting_for_data_is_said_once(tmp_path, capsys):
    logger = ProgressLogger()
    logger.open(tmp_path, step=0, evaluated=0, config={"total_steps": 100, "epochs": 3})
    heard = []
    for step, share in enumerate((0.9, 0.1, 0.101, 0.5), start=1):
        logger.scalars(step, {"train/loss": 1.0, "train/data_wait": share}, epoch=step / 100)
        heard.append(capsys.readouterr().err)
    assert heard[:2] == ["", ""]  # the workers' start; and not over a tenth
    assert heard[2].startswith("hint: 10 % of the time is spent waiting for data; what helps: more workers=")
    assert "data.backend=" in heard[2]
    assert heard[3] == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599, "1 h 0 min"),
        (11_530, "3 h 12 min"),
        (86_390, "1 d 0 h"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_bar_on_a_terminal(tmp_path):
    program = f"""
from pathlib import Path
from effnet_train.engine.progress import ProgressLogger
logger = ProgressLogger()
logger.open(Path(), step=4, evaluated=4, config={{"total_steps": 8, "epochs": 2}})
for step in range(5, 9):
    logger.scalars(step, {TRAIN}, epoch=step / 4)
logger.scalars(8, {{"val/top1": 0.5}}, epoch=2.0)
logger.close()
"""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen([sys.executable, "-c", program], stderr=end, stdout=subprocess.PIPE, text=True) as process:
        os.close(end)
        shown = ""
        with contextlib.suppress(OSError):  # a terminal that nobody writes to any more ends so
            while part := os.read(terminal, 4096):
                shown += part.decode()
        os.close(terminal)
        lines = process.stdout.read()
    assert process.returncode == 0, shown
    words = "100%  2/2  loss 2.913  top-1 41.2%  lr 0.124  2,489 im/s  data 1%  left 0 s |"
    assert words in shown, shown
    assert lines.startswith("epoch 2/2  step 8/8  loss 2.913  top-1 41.2 %  val 50.0 %  lr 0.124")
    assert lines.count("\n") == 1


# Optional loggers


@pytest.mark.parametrize(("logger", "package"), [(WandbLogger, "wandb"), (MlflowLogger, "mlflow")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, logger, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"loggers={package} needs the extra {package}: pip install 'effnet-train\[{package}\]'"
    with pytest.raises(ImportError, match=message):
        logger().open(tmp_path, step=0, evaluated=0, config=CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("logger", [JsonlLogger, CsvLogger, TensorBoardLogger, WandbLogger, MlflowLogger])
def test_closing_what_was_never_opened_is_harmless(logger):
    logger().close()


@wandb_installed
@pytest.mark.filterwarnings("default")
def test_wandb_goes_on_in_the_same_run(tmp_path, opened):
    for start, stop in [(0, 6), (4, 8)]:
        logger = log(opened(WandbLogger(mode="offline"), tmp_path, start), start=start, stop=stop)
        logger.images(stop, "train/images", np.zeros((5, 8, 8, 3), np.uint8))
        run = logger._run
        logger.close()
        assert run.id == (tmp_path / "wandb_id.txt").read_text().strip()
        assert run.config["model"] == {"width": 1.0}
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name == f"run-{run.id}.wandb"
    assert all(json.dumps(1 / step).encode() in first.read_bytes() for step in range(1, 7))
    assert all(json.dumps(1 / step).encode() in second.read_bytes() for step in range(5, 9))
    assert json.dumps(1 / 3).encode() not in second.read_bytes()


@mlflow_installed
@pytest.mark.filterwarnings("default")
def test_mlflow_goes_on_in_the_same_run_without_repeating_a_step(tmp_path, opened, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log(opened(MlflowLogger(), tmp_path), start=0, stop=6)
    logger = log(opened(MlflowLogger(), tmp_path, 4), start=4, stop=8)
    logger.images(8, "train/images", np.zeros((5, 8, 8, 3), np.uint8))
    client, run_id = logger._client, logger._run_id
    logger.close()

    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")] == [
        (step, 1 / step) for step in range(1, 9)
    ]
    assert [m.step for m in client.get_metric_history(run_id, "val_ema/top1")] == [4, 8]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "1.0"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    stored = [path.name for path in (tmp_path / "mlflow_artifacts").rglob("*") if path.is_file()]
    assert sorted(stored) == ["config.json", "images_8.png"]


# Configs


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["+loggers=default"], ["progress", "tensorboard", "csv", "jsonl"]),
        (["+loggers=default", "~loggers.tensorboard"], ["progress", "csv", "jsonl"]),
        (["+loggers=default", "loggers.tensorboard=null"], ["progress", "csv", "jsonl"]),
        (["+loggers=none"], []),
        (["+loggers=wandb"], ["progress", "tensorboard", "csv", "jsonl", "wandb"]),
        (
            ["+loggers=mlflow", "loggers.mlflow.tracking_uri=http://x"],
            ["progress", "tensorboard", "csv", "jsonl", "mlflow"],
        ),
    ],
)
def test_configs_make_the_loggers_they_name(overrides, names):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loggers = instantiate(compose(overrides=overrides).loggers)
    made = {name: logger for name, logger in loggers.items() if logger is not None}
    assert list(made) == names
    assert all(hasattr(logger, "scalars") for logger in made.values())


def test_importing_the_loggers_is_light():
    program = (
        "import sys, effnet_train.engine.loggers; print([m for m in ('torch', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_full_disk_ends_no_run(tmp_path):
    """The device that is always full stands for the disk."""
    full, good = JsonlLogger(), JsonlLogger("other.jsonl")
    for logger in (full, good):
        logger.open(tmp_path, step=0, evaluated=0, config={})
    full.close()
    full._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    for step in (1, 2):
        with pytest.warns(RuntimeWarning, match=r"JsonlLogger cannot write \(No space left on device\)"):
            tell([full, good], lambda logger, step=step: logger.scalars(step, {"train/loss": 1.0}, epoch=0.5))
    assert [json.loads(line)["step"] for line in (tmp_path / "other.jsonl").read_text().splitlines()] == [1, 2]
    with pytest.warns(RuntimeWarning, match="its log may lack lines"):
        tell([full, good], lambda logger: logger.close())


class Failing:
    """A service whose errors are its own."""

    def scalars(self, *_, **__):
        raise type("ServiceError", (Exception,), {})("the server is away")


def test_a_service_that_fails_ends_no_run(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"Failing cannot write \(the server is away\): its log may lack lines"):
        tell([Failing()], lambda logger: logger.scalars(1, {}, epoch=0.1))


def test_a_table_that_cannot_grow_goes_on(tmp_path, monkeypatch):
    """A full disk when a new column is due: the row is lost, and those after it are not."""
    logger = CsvLogger()
    logger.open(tmp_path, step=0, evaluated=0, config={})
    logger.scalars(1, {"train/loss": 1.0}, epoch=0.1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            logger.scalars(2, {"val/loss": 2.0}, epoch=0.2)
    logger.scalars(3, {"train/loss": 3.0}, epoch=0.3)
    logger.scalars(4, {"val/loss": 4.0}, epoch=0.4)
    logger.close()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows] == [
        ("1", "1.0", ""),
        ("3", "3.0", ""),
        ("4", "", "4.0"),
    ]


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
def test_an_evaluation_that_the_run_does_not_know_of_is_forgotten(tmp_path, kind):
    """Killed between the log's line and the checkpoint that knows of it."""
    logger = kind()
    logger.open(tmp_path, step=0, evaluated=0, config={})
    for step in (2, 4):
        logger.scalars(step, {"train/loss": 1.0}, epoch=0.1)
        logger.scalars(step, {"val/loss": 1.0}, epoch=0.1)
    logger.close()
    logger.open(tmp_path, step=4, evaluated=2, config={})
    logger.scalars(4, {"val/loss": 1.0}, epoch=0.1)
    logger.close()
    text = (tmp_path / logger.filename).read_text().splitlines()
    rows = list(map(json.loads, text)) if kind is JsonlLogger else list(csv.DictReader(text))
    assert [(int(row["step"]), bool(row.get("val/loss"))) for row in rows] == [
        (2, False),
        (2, True),
        (4, False),
        (4, True),
    ]


def test_tensorboard_goes_on_in_a_new_file(tmp_path):
    """The writer's thread dies of its first error."""
    logger = TensorBoardLogger()
    logger.open(tmp_path, step=0, evaluated=0, config={})
    logger.scalars(1, {"train/loss": 1.0}, epoch=0.1)
    logger._writer.file_writer.event_writer._async_writer._worker.exception = OSError(errno.ENOSPC, "No space left")
    with pytest.raises(OSError, match="No space left"):
        logger.scalars(2, {"train/loss": 2.0}, epoch=0.2)
    time.sleep(1.1)  # names of event files have seconds
    logger.scalars(3, {"train/loss": 3.0}, epoch=0.3)
    logger.close()
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2
