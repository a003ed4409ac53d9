"""The commands in this process: as a user gives them, without the seconds of a new interpreter."""

import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.train import train_rank
from effnet_train.data.datasets import digits
from effnet_train.data.preprocess import Preprocess
from effnet_train.engine.checkpoint import load_checkpoint


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that composes a command's configuration, plain and resolved."""

    def run(config: str, *overrides: str) -> dict[str, Any]:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = hydra.compose(config, overrides=list(overrides), return_hydra_config=True)
        # The run's name refers to what Hydra knows of the choices.
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        plain = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(plain, dict)
        return plain

    return run


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs `effnet-<name>` with arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> Outcome:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which the command sets, and must not be left set
        monkeypatch.setattr("sys.argv", [f"effnet-{name}", *arguments])
        main = importlib.import_module(f"effnet_train.cli.{name}").main
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as leave:
            status = int(leave.code or 0)
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes what a finished run leaves for tables and figures, without training.

    The scores are those of the EMA weights; `classes` and `images` are the data set's; `steps` None: it is whole.
    """

    def write(
        name: str,
        *overrides: str,
        top1: float,
        top5: float = 0.9,
        classes: int = 1000,
        images: int = 1281167,
        steps: int | None = None,
    ) -> Path:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            words = [f"name={name}", *overrides]
            cfg = hydra.compose("train", overrides=words)
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(OmegaConf.to_container(cfg, resolve=True)))
        best = {"step": 7, "val/top1": 0.001, "val_ema/top1": top1, "val_ema/top5": top5}
        whole = math.ceil(cfg.epochs * images / cfg.batch_size)
        (folder / "summary.json").write_text(json.dumps({"best": best, "steps": steps or whole}))
        meta = {"classes": [str(number) for number in range(classes)], "images": images}
        (folder / "model.json").write_text(json.dumps(meta))
        return folder

    return write


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 80 of the digits to train on and 40 to validate."""
    whole, few = tmp_path_factory.mktemp("whole") / "digits", tmp_path_factory.mktemp("few") / "digits"
    digits(str(whole), preprocess=Preprocess(resolution=32))
    for split, count in (("train", 8), ("val", 4)):
        for folder in (whole / split).iterdir():
            (few / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, few / split / folder.name)
    return few


@pytest.fixture(scope="session")
def tiny(few_digits: Path) -> list[str]:
    """Return the overrides that make a run of a second: two steps of a small network on few digits."""
    return [
        *("debug=tiny", "device=cpu", "threads=1", "loggers=none", "max_steps=2", "model.width=0.25"),
        *(f"data.root={few_digits}", "data.expected=null", "run_root=.", "name=run"),
    ]


@pytest.fixture(scope="session")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose raw and averaged weights differ, with its log. Not to be written to."""
    learning = [
        *("max_steps=30", "epochs=6", "optim=adamw", "schedule=constant", "schedule.lr_per_256=0.08", "augment=none"),
        *("model.dropout=0", "model.drop_connect=0", "loss.label_smoothing=0", "model.bn_momentum=0.5"),
        *("ema_decay=0.5", "evaluate_every.steps=15", "save_every.steps=15"),
    ]
    loggers = ("loggers=default", "~loggers.tensorboard", "~loggers.progress")
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose(
            "train", overrides=[*(text for text in tiny if text != "loggers=none"), *learning, *loggers]
        )
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_rank(plain, str(folder), "cpu")
    return folder


@pytest.fixture
def goes_on_exactly(cli: Callable[..., Outcome], tiny: list[str]) -> Callable[..., dict[str, Any]]:
    """Return a function that trains four steps, and two and two; it sees that they are the same bits, and returns them.

    The runs, `whole` and `parts`, are of the overrides given.
    """
    base = [text for text in tiny if not text.startswith(("name=", "max_steps="))]

    def state(name: str, step: int) -> dict[str, Any]:
        payload = load_checkpoint(Path(name) / f"step_{step:09d}.pt")
        del payload["provenance"]
        return payload

    def run(*overrides: str) -> dict[str, Any]:
        for words in (("name=whole",), ("name=parts", "max_steps=2"), ("name=parts",)):
            done = cli("train", *base, "max_steps=4", *overrides, *words)
            assert done.status == 0, done.err
        whole, early = state("whole", 4), state("whole", 2)
        assert alike(whole, state("parts", 4))
        assert not alike(whole["model"], early["model"])
        return whole

    return run


def alike(one: Any, other: Any) -> bool:
    """Compare nested plain values and tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)
