"""`effnet-data`: its jobs, their reports and exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("verfy data=folder", "verfy is no job: give one of verify"),
        ("verify data=folder data.root=nowhere", "data.root=nowhere does not exist"),
        (
            "verify data=folder data.root=nowhere ignore=[cmyk]",
            "ignore=cmyk is no kind of problem: choose among counts",
        ),
        ("verify data=folder reprot=x", "reprot is not a key of the configuration: did you mean report"),
        ("verify data=folder data.root=nowhere min_side=0", "min_side=0 must be at least 1"),
        ("verify data=folder data.root=. report=no/where.json", "report=no/where.json: its folder does not exist"),
        ("verify data=folder nonsense", "nonsense is not of the form key=value: give key=value"),
    ],
)
def test_bad_input(cli: Cli, words: str, message: str) -> None:
    done = cli("data", *words.split())
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("effnet-data: error: ")
    assert message in done.err


def test_help_names_the_jobs_and_needs_no_torch() -> None:
    code = "import sys; from effnet_train.cli.data import main; sys.argv = {!r}\ntry: main()\nexcept SystemExit: pass\n"
    for words in (["effnet-data", "--help"], ["effnet-data", "verify", "--help"]):
        script = code.format(words) + "assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "effnet-data verify" in done.stdout
