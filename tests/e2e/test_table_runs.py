"""`effnet-table ... run=true`: the trainings of a table, stopped and gone on with, through real processes."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TABLE = [sys.executable, "-m", "effnet_train.cli.table", "table7"]


def words(digits_root: Path, *more: str) -> list[str]:
    small = ("model.resolution=32", "model.width=0.1", "model.depth=0.2", "epochs=1", "schedule.warmup_epochs=0")
    where = ("device=cpu", "threads=1", "workers=0", "loggers=none", *more)
    return ["run=true", "rate=1", "data=digits", "recipe=demo", f"data.root={digits_root}", "--", *small, *where]


def finish(tmp_path: Path, given: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TABLE, *given], cwd=tmp_path, capture_output=True, text=True, timeout=600)


def test_trainings_stop_with_all_saved_and_go_on(tmp_path: Path, digits_root: Path) -> None:
    given = words(digits_root)
    stopped = "table7-b0-depth-digits-demo-seed0"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*TABLE, *given], cwd=tmp_path, env=environment, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == f"table7: training 2 of 5, {stopped}\n":
                process.send_signal(signal.SIGTERM)
                break
        _, told = process.communicate(timeout=300)
    done = {path.parent.name for path in (tmp_path / "runs").glob("*/summary.json")}
    assert done == {"table7-b0-baseline-digits-demo-seed0"}
    assert process.returncode == 75
    assert f"stopped in {stopped}: the same command goes on" in told

    again = finish(tmp_path, [*given[:1], "format=csv", *given[1:]])
    assert again.returncode == 0, again.stderr
    assert "table7: 5 trainings, 1 finished, 4 to do" in again.stdout
    table = again.stdout[again.stdout.index("name,scaling") :]
    rows = {row["scaling"]: row for row in csv.DictReader(io.StringIO(table))}
    assert len(rows) == 5
    for scaling, row in rows.items():
        folder = tmp_path / "runs" / f"table7-b0-{scaling}-digits-demo-seed0"
        best = json.loads((folder / "summary.json").read_text())["best"]
        assert float(row["top1_here"]) == pytest.approx(best["val_ema/top1"], rel=1e-5)
        assert row["run"] == f"digits, 1 epochs, {folder.name}"
    third = finish(tmp_path, given)
    assert "table7: 5 trainings, 5 finished, 0 to do" in third.stdout
    assert "training 1 of" not in third.stdout


def test_a_training_that_fails_is_told_and_the_others_go_on(tmp_path: Path, digits_root: Path) -> None:
    blocked = tmp_path / "runs" / "table7-b0-width-digits-demo-seed0"
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's folder should be")
    done = finish(tmp_path, words(digits_root, "max_steps=1"))
    assert done.returncode == 1
    assert f"table7: failed, as said above: {blocked.name}" in done.stderr
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 4
    assert "Table 7" in done.stdout
