"""A run's folder is named by its choices, and by what tells the runs of a sweep apart."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from effnet_train.cli.app import differing_keys
from effnet_train.cli.run_folder import claim, run_folder


def folder(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], *, mode: RunMode = RunMode.MULTIRUN, name: str = "b0-seed0"
) -> str:
    known = {"hydra": {"mode": mode, "overrides": {"task": overrides}}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(known))
    return str(run_folder(OmegaConf.create({"run_root": "runs", "name": name})))


@pytest.mark.parametrize(
    ("overrides", "suffix"),
    [
        (["model=b0", "data=digits", "recipe=demo", "seed=1"], ""),
        (["model.width=0.3"], "-model.width_0.3"),
        (["optim=sgd", "+model.se_ratio=0"], "-optim_sgd-model.se_ratio_0"),
        (["device=cpu", "data.root=/x", "log_every.steps=5", "~loggers.tensorboard", "checkpoint.keep=1"], ""),
        (["debug=tiny", "augment=none"], "-augment_none"),
        (["init_from=runs/x/best.pt"], "-init_from_runs_x_best.pt"),
        (["sync_bn=all"], "-sync_bn_all"),
    ],
)
def test_a_sweep_tells_its_runs_apart(monkeypatch: pytest.MonkeyPatch, overrides: list[str], suffix: str) -> None:
    assert folder(monkeypatch, overrides) == f"runs/b0-seed0{suffix}"
    assert folder(monkeypatch, overrides, mode=RunMode.RUN) == "runs/b0-seed0"


def test_a_name_of_ones_own_says_nothing_of_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder(monkeypatch, ["name=mine", "seed=1", "model=b1"], name="mine") == "runs/mine-seed_1-model_b1"


def test_a_claim_is_kept(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model": {"width": 1.0},
        "seed": 0,
        "workers": 2,
        "data": {"root": "a", "val": "val"},
        "sync_bn": 3,
    }
    claim(tmp_path / "a" / "b", config)
    assert yaml.safe_load((tmp_path / "a" / "b" / "config.yaml").read_text()) == config
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]
    claim(tmp_path / "a" / "b", {**config, "workers": 4, "data": {"root": "c", "val": "val"}, "sync_bn": 2})
    with pytest.raises(ValueError, match=r"a/b holds a run of another configuration: data\.val was 'val', now 'test'"):
        claim(tmp_path / "a" / "b", {**config, "data": {"root": "a", "val": "test"}})
    with pytest.raises(ValueError, match=r"extra was None, now 1; seed was 0, now None\."):
        claim(tmp_path / "a" / "b", {"extra": 1, **{key: config[key] for key in ("model", "workers", "data")}})


def test_a_run_of_a_former_version_goes_on_without_what_is_new(tmp_path: Path, compose: Callable[..., Any]) -> None:
    """Parts that do nothing unless asked for, and switches within parts."""
    config = compose("train", "recipe=demo")
    new = ("distill", "pseudo", "advprop", "progressive", "freeze", "layer_decay")
    old = {key: value for key, value in config.items() if key not in new}
    claim(tmp_path / "run", {**old, "data": {key: old["data"][key] for key in old["data"] if key != "per_class"}})
    claim(tmp_path / "run", config)
    message = r"configuration: distill\.classes was None, now 'same'; .*distill\.teacher was None, now 'x'"
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "run", {**config, "distill": {**config["distill"], "teacher": "x"}})
    with pytest.raises(ValueError, match=r"layer_decay was None, now 0\.8\. Give"):
        claim(tmp_path / "run", {**config, "layer_decay": 0.8})


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2, "c": None}}, ["a.b"]),
        ({"a": {}}, {"a": {"b": 1}}, ["a", "a.b"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a"]),
    ],
)
def test_differing_keys(one: object, other: object, keys: list[str]) -> None:
    assert list(differing_keys(one, other)) == keys


def test_nothing_is_left_where_the_folder_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write to the run's folder .*run \(No space left on device\): choose"):
        claim(tmp_path / "run", {"seed": 0})
    assert not list((tmp_path / "run").iterdir())
