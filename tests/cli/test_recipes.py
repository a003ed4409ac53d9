"""Every recipe, every overlay and every option that composes with them trains, evaluates and saves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effnet_train.engine.checkpoint import load_checkpoint

Cli = Callable[..., Any]

CASES = {
    "efficientnet": ("recipe=efficientnet",),
    "demo": ("recipe=demo", "batch_size=16"),
    "demo-cosine": ("recipe=demo", "batch_size=16", "schedule=cosine", "optim=sgd", "augment=small"),
    "demo-overfit": ("recipe=demo", "debug=overfit", "batch_size=16", "workers=0"),
    "overfit": ("debug=overfit", "model=nano", "data=digits", "batch_size=16", "workers=0"),
    "adamw-constant-autoaugment": ("optim=adamw", "schedule=constant", "augment=autoaugment", "precision=bf16"),
    "randaugment-clip-accumulate": ("augment=randaugment", "clip_norm=1.0", "accumulate=4", "model.padding=symmetric"),
    "inception-mixup-cutmix": ("augment=inception", "augment.erase=1.0", "mixing={mixup_alpha: 0.2, cutmix_alpha: 1}"),
    "lite-none": ("model=lite0", "model.width=0.1", "model.depth=0.1", "model.resolution=32", "augment=none"),
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_trains(cli: Cli, tiny: list[str], overrides: tuple[str, ...]) -> None:
    chosen = {text.partition("=")[0] for text in overrides}
    base = [text for text in tiny if text.partition("=")[0] not in chosen]
    rest = ["schedule.warmup_epochs=0"] if "debug" in chosen else []
    done = cli("train", *base, *overrides, *rest)
    assert done.status == 0, done.err
    assert "done: 2 steps" in done.out
    state = load_checkpoint(Path("run/step_000000002.pt"))
    assert (state["step"], state["evaluated"]) == (2, 2)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    written = {path.name for path in Path("run").iterdir()}
    assert written >= {"config.yaml", "best.pt", "model.safetensors", "model.json", "summary.json"}


@pytest.mark.parametrize(("select_by", "better"), [("val/loss", min), ("val_ema/top1", max)])
def test_the_best_is_chosen_by_the_score_asked_for(
    cli: Cli, tiny: list[str], select_by: str, better: Callable[..., float]
) -> None:
    """Evaluated at each of six steps at a rate that makes scores rise and fall."""
    watched = ("evaluate_every.steps=1", "max_steps=6", "loggers=default", "~loggers.tensorboard", "~loggers.progress")
    learning = ("optim=sgd", "schedule=constant", "schedule.lr_per_256=0.5", "ema_decay=0.5", f"select_by={select_by}")
    base = [text for text in tiny if not text.startswith(("loggers", "max_steps"))]
    assert cli("train", *base, "epochs=2", *watched, *learning).status == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row[select_by] for row in rows if select_by in row}
    assert scores.keys() == set(range(1, 7))
    best = json.loads(Path("run/summary.json").read_text())["best"]
    assert best[select_by] == better(scores.values())
    assert best["step"] == next(step for step, score in scores.items() if score == best[select_by])
    assert load_checkpoint(Path("run/best.pt"))["step"] == best["step"]


def test_held_out_images_select_and_the_validation_set_reports(cli: Cli, tiny: list[str]) -> None:
    done = cli("train", *tiny, "data.minival=20")
    assert done.status == 0, done.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test"].keys() == {"test/top1", "test/top5", "test/loss"}
    assert "test/top1" in done.out
    scores = {}
    for split in ("val", "held_out", "train"):
        assert cli("eval", "checkpoint=run", f"split={split}", "device=cpu", "workers=0").status == 0
        scores[split] = json.loads(Path("run/eval.json").read_text())
    assert {split: score["images"] for split, score in scores.items()} == {"val": 40, "held_out": 20, "train": 60}
    assert scores["val"]["loss"] == pytest.approx(summary["test"]["test/loss"], rel=1e-6)
    assert scores["held_out"]["loss"] == pytest.approx(summary["best"]["val_ema/loss"], rel=1e-6)
    assert scores["val"]["loss"] != scores["held_out"]["loss"]


def test_init_from_takes_the_weights_of_another_run(cli: Cli, tiny: list[str]) -> None:
    assert cli("train", *tiny).status == 0
    frozen = ("optim=sgd", "optim.momentum=0", "optim.nesterov=false", "schedule=constant", "schedule.lr_per_256=0")
    base = [text for text in tiny if text != "name=run"]
    done = cli("train", *base, "name=next", "init_from=run/model.safetensors", *frozen, "seed=3")
    assert done.status == 0, done.err
    first, second = (load_checkpoint(Path(name)) for name in ("run/best.pt", "next/best.pt"))
    for name, tensor in first["ema"].items():
        if "weight" in name:
            assert tensor.equal(second["model"][name])


def test_finetuning_puts_a_new_classifier_on_old_weights(cli: Cli, tiny: list[str], few_digits: Path) -> None:
    assert cli("train", *tiny).status == 0
    other = Path("other")
    for split in ("train", "val"):
        for name in "012":
            (other / split / f"digit{name}").parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(few_digits / split / name, other / split / f"digit{name}")
    base = [text for text in tiny if not text.startswith(("name=", "data.root="))] + ["name=next", f"data.root={other}"]
    frozen = ("optim=sgd", "optim.momentum=0", "optim.nesterov=false", "schedule.lr_per_256=0", "optim.weight_decay=0")
    refused = cli("train", *base, "init_from=run")
    assert refused.status == 2
    assert "for another number of classes (classifier.bias (3,) here, (10,) there)" in refused.err
    assert "new_classifier=true trains a new one on the rest of them, as recipe=finetune does" in refused.err
    without = cli("train", *base, "recipe=finetune")
    assert (without.status, "new_classifier=true needs weights to put it on" in without.err) == (2, True)
    plan = cli("train", *base, "recipe=finetune", "init_from=run", "dry_run=true")
    assert (plan.status, "weights        from run" in plan.out) == (0, True), plan.err
    done = cli("train", *base, "recipe=finetune", "init_from=run", *frozen)
    assert done.status == 0, done.err
    first, second = (load_checkpoint(Path(name)) for name in ("run/best.pt", "next/best.pt"))
    same = {key: tensor.equal(second["model"][key]) for key, tensor in first["ema"].items() if "weight" in key}
    assert [key for key, equal in same.items() if not equal] == ["classifier.weight"]
    assert second["model"]["classifier.weight"].shape[0] == 3
    assert second["meta"]["classes"] == ["digit0", "digit1", "digit2"]
