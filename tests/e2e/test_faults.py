"""What becomes of a run with numbers that are not finite: stop, skip and rollback, through the training command."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from effnet_train.data.mixing import Mixing
from effnet_train.data.order import Order
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.engine.faults import FILE, NotFiniteError

Train = Callable[..., Path]
OPTIONS = ("max_steps=8", "save_every.steps=2", "log_every.steps=1", "workers=0", "evaluate_every.steps=4")
BATCH, IMAGES = 16, 1433  # of debug=tiny and the digits


def poison(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """Make the image that comes first in each of these steps of the stream (the first is 0) not a number."""
    order = Order(IMAGES, BATCH, seed=0)
    bad = torch.tensor([order.batch(step)[1][0] for step in steps])
    original = Mixing.__call__

    def call(self, images, labels, keys, num_classes):
        images = torch.where(torch.isin(keys, bad)[:, None, None, None], torch.nan, images)
        return original(self, images, labels, keys, num_classes)

    monkeypatch.setattr(Mixing, "__call__", call)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def logged(folder: Path) -> list[tuple[int, str]]:
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row["train/lr"]]


def assert_equal_runs(one: Path, other: Path) -> None:
    found, expected = (load_checkpoint(folder / "step_000000008.pt") for folder in (one, other))
    for part in ("model", "ema", "optimizer", "statistics"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert logged(one) == logged(other)


def test_stop_names_step_and_images(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, [5])
    with pytest.raises(NotFiniteError, match=r"the loss is not a finite number at step 6 .*step_000000004.pt.*on_nan"):
        train("run", *OPTIONS)
    (row,) = rows(tmp_path / "run")
    assert (row["step"], row["action"]) == (6, "stop")
    assert len(row["images"]) == BATCH
    assert all(Path(name).is_file() for name in row["images"])


@pytest.mark.parametrize("log", [1, 50])
def test_rollback_goes_on_as_if_the_batches_had_not_been_there(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: int
) -> None:
    options = (*OPTIONS, f"log_every.steps={log}")
    expected = tmp_path / "expected"
    expected.mkdir()
    row = {"step": 6, "action": "rollback", "what": "the loss", "lr": 0.0, "from_step": 4, "images": []}
    (expected / FILE).write_text(json.dumps(row) + "\n")
    train("expected", *options)
    with monkeypatch.context() as patch:
        poison(patch, [5])
        found = train("found", *options, "on_nan=rollback")
        (row,) = rows(found)
        assert (row["step"], row["action"], row["from_step"]) == (6, "rollback", 4)
        # Stopped and taken up again, before and after.
        train("stopped", *options, "on_nan=rollback", "max_steps=4")
        train("stopped", *options, "on_nan=rollback", "max_steps=7")
        stopped = train("stopped", *options, "on_nan=rollback")
    assert_equal_runs(found, expected)
    assert [step for step, _ in logged(found)] == sorted({step for step, _ in logged(found)})
    weights = [load_checkpoint(folder / "step_000000008.pt")["model"] for folder in (stopped, expected)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    clean = train("clean", *options)
    with pytest.raises(AssertionError):
        assert_equal_runs(clean, expected)


def test_rollback_before_the_first_checkpoint_starts_anew(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, [1])
    (row,) = rows(train("run", *OPTIONS, "on_nan=rollback"))
    assert (row["step"], row["from_step"]) == (2, 0)


def test_skip_changes_nothing_at_the_bad_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = load_checkpoint(train("clean", *OPTIONS, "max_steps=5", "save_every.steps=1") / "step_000000005.pt")
    poison(monkeypatch, [5])
    folder = train("run", *OPTIONS, "on_nan=skip", "save_every.steps=1", "checkpoint.keep=9")
    found = load_checkpoint(folder / "step_000000006.pt")
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(found[part], clean[part], rtol=0, atol=0)
    assert [row["action"] for row in rows(folder)] == ["skip"]
    assert found["step"] == 6
    last = load_checkpoint(folder / "step_000000008.pt")
    assert not torch.equal(last["model"]["classifier.weight"], found["model"]["classifier.weight"])
    # Taken up in the middle it is the same, and tells of the step once.
    again = train("again", *OPTIONS, "on_nan=skip", "max_steps=5", "save_every.steps=1", "checkpoint.keep=9")
    train("again", *OPTIONS, "on_nan=skip", "save_every.steps=1", "checkpoint.keep=9")
    torch.testing.assert_close(load_checkpoint(again / "step_000000008.pt")["model"], last["model"], rtol=0, atol=0)
    assert rows(again) == rows(folder)


def test_skip_is_training_without_it_where_all_is_well(train: Train) -> None:
    assert_equal_runs(train("skip", *OPTIONS, "on_nan=skip"), train("stop", *OPTIONS))


def test_what_would_never_end_is_ended(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(60))
    with pytest.raises(NotFiniteError, match=r"10 steps in a row had a loss or gradient .*, the last was 10"):
        train("skip", *OPTIONS, "max_steps=20", "on_nan=skip")
    with pytest.raises(NotFiniteError, match="the loss is not a finite number at step 1 "):
        train("back", *OPTIONS, "on_nan=rollback")
    assert [row["action"] for row in rows(tmp_path / "back")] == ["rollback"] * 10 + ["stop"]


def test_a_damaged_memory_is_not_guessed(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"faults.jsonl is damaged .*mend or remove it"):
        train("run", *OPTIONS)
