"""What was built on EfficientNet, through the real command: two steps, a stop in their middle, and what is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from effnet_train.cli import build
from effnet_train.cli import plan as plan_of_a_run
from effnet_train.cli.rank import prepare
from effnet_train.distributed import Session
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.engine.progressive import StagedStepper
from effnet_train.engine.train import Stepper

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
    assert "80 training images (counted in " in plan.out


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


@pytest.fixture
def progressive(tiny: list[str]) -> list[str]:
    small = ("progressive.resolution=16", "model.resolution=48", "augment=randaugment", "augment.policy.magnitude=15")
    # Four steps in four stages, of which `max_steps` moves none: the digits' 80 images in batches of 20.
    return [*without(tiny, "name"), "recipe=progressive", *small, "batch_size=20", "ema_decay=0.5"]


def sizes_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, int]]:
    """Return a list that is to hold the pixels, the dropout and the micro-batches of each step."""
    seen, call = [], Stepper.__call__

    def watched(self: Stepper, state: Any, batch: Any, lr: float) -> bool:
        seen.append((batch[0].images.shape[1], round(state.model.dropout, 3), len(batch)))
        return call(self, state, batch, lr)

    monkeypatch.setattr(Stepper, "__call__", watched)
    return seen


def test_images_grow_and_a_run_resumes_across_stages(
    cli: Cli, progressive: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = sizes_seen(monkeypatch)
    words = [*progressive, "mixing.mixup_alpha=0.4", "progressive.mixup_alpha=0", "accumulate=2"]
    found = trained_and_resumed(cli, words)
    assert seen == [(16, 0.1, 2), (26, 0.133, 2)] * 2
    assert found["meta"]["preprocess"]["resolution"] == 48
    rest = without(words, "max_steps")
    assert cli("train", *rest, "name=parts", "max_steps=4").status == 0
    assert cli("train", *rest, "name=whole4", "max_steps=4").status == 0
    assert seen[4:6] == [(37, 0.167, 2), (48, 0.2, 2)]
    assert_same(state("parts", 4)["model"], state("whole4", 4)["model"])
    scores = cli("eval", "checkpoint=whole4", "device=cpu", "workers=0")
    assert "at 48 pixels" in scores.out


def test_the_plan_tells_of_stages_and_memory_settles_micro_batches(
    cli: Cli, progressive: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_of_a_run, "images_per_s", lambda *_: (0.2, "timed"))
    plan = cli("train", *progressive, "name=plan", "dry_run=true")
    # Two batches of 20 images, of 16 and 26 pixels in place of 48.
    assert f"about {40 * ((16 / 48) ** 2 + (26 / 48) ** 2) / 2 / 0.2:.0f} s without" in plan.out
    stages = "16 pixels, dropout 0.1, magnitude 5 from step 0; 26 pixels, dropout 0.133, magnitude 8.33 from step 1;"
    assert (plan.status, stages in plan.out) == (0, True), plan.err + plan.out
    # As a GPU's memory would settle it: more micro-batches for more pixels.
    monkeypatch.setattr(build, "resolve_accumulate", lambda *_: 1 if _[-1] == 16 else 2)
    seen = sizes_seen(monkeypatch)
    assert (done := cli("train", *progressive, "name=run")).status == 0, done.err
    assert [count for *_, count in seen] == [1, 2]


def test_a_run_that_goes_back_has_the_same_micro_batches(
    compose: Callable[..., dict[str, Any]], progressive: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fit(cfg: DictConfig, *rest: Any) -> int:
        return (1 if rest[-1] == 16 else 2) if cfg.accumulate == "auto" else cfg.accumulate

    monkeypatch.setattr(build, "resolve_accumulate", fit)
    cfg = OmegaConf.create(compose("train", *progressive, "name=run"))
    for _ in range(2):  # as after a RollBackError
        run, _ = prepare(cfg, tmp_path / "run", Session())
        run.checkpoints.close()
        assert isinstance(run.step, StagedStepper)
        assert [stepper.accumulate for stepper in run.step.steppers] == [1, 2, 2, 2]


def test_samples_are_shown_as_their_step_sees_them(cli: Cli, progressive: list[str]) -> None:
    for step, size in ((0, 16), (3, 48)):
        done = cli("data", "show", *progressive, f"step={step}", "count=2", "name=shown")
        assert (done.status, f"at {size} x {size}" in done.out) == (0, True), done.err


def test_a_graph_has_one_size(cli: Cli, progressive: list[str]) -> None:
    done = cli("train", *progressive, "name=run", "cuda_graph=true")
    assert (done.status, "cuda_graph=true cannot be with progressive.stages=4" in done.err) == (2, True), done.err


@pytest.fixture
def finetune(trained: Path, tiny: list[str]) -> list[str]:
    return [*without(tiny, "name"), "recipe=finetune", f"init_from={trained}", "model.resolution=32"]


def test_finetuning_takes_its_options_together_and_resumes(cli: Cli, finetune: list[str], trained: Path) -> None:
    words = ["freeze={up_to: 2, batch_norm: true}", "layer_decay=0.5", "schedule=cosine", "mixing.mixup_alpha=0.2"]
    words += ["data.per_class=true", "select_by=val_ema/per_class", "schedule.warmup_epochs=0", "ema_decay=0"]
    found, before = trained_and_resumed(cli, [*finetune, *words]), load_checkpoint(trained / "best.pt")["ema"]
    same = {name for name, tensor in found["model"].items() if tensor.equal(before[name])}
    norms = {name for name in before if ".norm." in name}
    frozen = {name for name in before if name.startswith(("stem.", "stages.0.", "stages.1."))}
    assert same == norms | frozen
    rates = {group["lr_scale"]: group["lr"] for group in found["optimizer"]["param_groups"]}
    assert len(rates) == 7  # five stages, head, classifier
    for scale, rate in rates.items():
        assert rate == pytest.approx(rates[1.0] * scale)
    assert found["best"]["val_ema/per_class"] == pytest.approx(found["best"]["val_ema/top1"])  # four images a class
    scores = cli("eval", "checkpoint=whole", "device=cpu", "workers=0")
    assert "per class" in scores.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("layer_decay=1.5",), "layer_decay=1.5 must lie in (0, 1]"),
        (("layer_decay=0.5", "cuda_graph=true"), "layer_decay=0.5 asks for several learning rates"),
        (("select_by=val/per_class",), "select_by=val/per_class is not measured: give data.per_class=true"),
    ],
)
def test_what_finetuning_refuses(cli: Cli, finetune: list[str], words: tuple[str, ...], message: str) -> None:
    done = cli("train", *finetune, "name=run", *words)
    assert (done.status, message in done.err) == (2, True), done.err
    assert not Path("run").exists()
