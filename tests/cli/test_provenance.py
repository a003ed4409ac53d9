import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effnet_train.cli import provenance
from effnet_train.cli.provenance import provenance as found
from effnet_train.engine.checkpoint import load_checkpoint

CPU = torch.device("cpu")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "effnet_train" / "cli" / "provenance.py"
    file.parent.mkdir(parents=True)
    shutil.copy(provenance.__file__, file)
    monkeypatch.setattr(provenance, "__file__", str(file))
    git(tmp_path, "init", "-q")
    (tmp_path / "other").touch()
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "other")
    assert found(CPU)["commit"] is None  # somebody else's checkout
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "this")
    assert found(CPU)["commit"] == git(tmp_path, "rev-parse", "HEAD")
    file.write_text(file.read_text() + "\n")
    assert found(CPU)["commit"] == git(tmp_path, "rev-parse", "HEAD") + "+"
    monkeypatch.setenv("PATH", "")
    assert found(CPU)["commit"] is None


def test_versions_are_those_installed() -> None:
    made = found(CPU)
    assert made["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert made["python"] == ".".join(map(str, sys.version_info[:3]))
    assert made["command"] == " ".join(sys.argv)


def test_a_checkpoint_carries_it(cli, tiny) -> None:
    assert cli("train", *tiny).status == 0
    (file, *_) = Path().rglob("step_*.pt")
    assert load_checkpoint(file)["provenance"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert "host" not in load_checkpoint(file)["meta"]  # which is published with the weights
