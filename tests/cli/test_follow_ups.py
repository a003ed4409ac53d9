"""What was built on EfficientNet, through the real command: two steps, a stop in their middle, and what is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_train.engine.checkpoint import load_checkpoint

Cli = Callable[..., Any]


def without(words: Sequence[str], *keys: str) -> list[str]:
    return [word for word in words if word.partition("=")[0] not in keys]


def state(folder: str, step: int = 2) -> dict[str, Any]:
    return load_checkpoint(Path(folder, f"step_{step:09d}.pt"))


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def trained_and_resumed(cli: Cli, words: Sequence[str]) -> dict[str, Any]:
    """Train two steps at once, and one and one, to the same bits; return the state at their end."""
    assert (done := cli("train", *words, "name=whole")).status == 0, done.err
    rest = without(words, "max_steps")
    assert (done := cli("train", *rest, "name=parts", "max_steps=1")).status == 0, done.err
    assert (done := cli("train", *rest, "name=parts", "max_steps=2")).status == 0, done.err
    whole, parts, half = state("whole"), state("parts"), state("parts", 1)
    for key in ("model", "ema", "optimizer"):
        assert_same(whole[key], parts[key])
    assert not all(tensor.equal(half["model"][name]) for name, tensor in whole["model"].items())
    return whole


@pytest.fixture
def fixres(trained: Path, tiny: list[str]) -> list[str]:
    return [*without(tiny, "name"), "recipe=fixres", f"init_from={trained}", "model.resolution=48"]


def test_fixres_changes_what_its_paper_says_and_resumes(cli: Cli, fixres: list[str], trained: Path) -> None:
    found, before = trained_and_resumed(cli, fixres), load_checkpoint(trained / "best.pt")["ema"]
    changed = {name for name, tensor in found["model"].items() if not tensor.equal(before[name])}
    norm = {f"head.norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
    assert changed == {"classifier.weight", "classifier.bias"} | norm
    assert {name for name, tensor in found["ema"].items() if not tensor.equal(before[name])} == changed
    assert found["meta"]["preprocess"]["resolution"] == 48
    plan = cli("train", *fixres, "name=plan", "dry_run=true")
    assert (plan.status, "at 48 pixels" in plan.out) == (0, True), plan.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.resolution=24",),
            "adapts weights to a larger test size: model.resolution=24 is below 32, at which those of init_from=",
        ),
        (("init_from=null",), "freeze.up_to=last_norm would freeze what nobody has trained: give init_from="),
        (("freeze.up_to=9",), "freeze.up_to=9 is more than the network's 7 stages"),
        (("freeze.up_to=head",), "freeze.up_to='head' must be a whole number or last_norm or classifier"),
        (("freeze.batch_norm=true",), "freeze.batch_norm=true freezes the BatchNorm that freeze.up_to=last_norm"),
        (
            ("freeze={up_to: 0, batch_norm: true}", "model.fused=true"),
            "freeze.batch_norm=true does not go with model.fused",
        ),
    ],
)
def test_what_does_not_go_with_freezing_is_told(
    cli: Cli, fixres: list[str], overrides: tuple[str, ...], message: str
) -> None:
    done = cli("train", *fixres, "name=run", *overrides)
    assert (done.status, message in done.err) == (2, True), done.err
    assert not Path("run").exists()
