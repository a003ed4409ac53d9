"""`recipe=advprop` through the real command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Cli = Callable[..., Any]


def test_a_run_goes_on_exactly_and_its_model_needs_nothing_more(
    goes_on_exactly: Callable[..., dict[str, Any]], cli: Cli
) -> None:
    state = goes_on_exactly("recipe=advprop", "advprop={epsilon: 2, steps: 2}", "batch_size=8", "accumulate=2")
    auxiliary, model = state["auxiliary"], state["model"]
    assert auxiliary
    assert not any(".auxiliary." in name for name in (*model, *state["ema"], *load_file("whole/model.safetensors")))
    # Adversarial images have statistics of their own.
    norms = [name for name in model if name.endswith("running_var")]
    for name in norms:
        other = auxiliary[name.replace(".norm.", ".norm.auxiliary.")]
        assert other.shape == model[name].shape
        assert not other.equal(model[name])
    for words in (("checkpoint=whole",), ("checkpoint=whole", "weights=raw")):
        done = cli("eval", *words, "device=cpu", "workers=0")
        assert done.status == 0, done.err


@pytest.mark.slow
def test_ranks_that_share_statistics_go_on_exactly(goes_on_exactly: Callable[..., dict[str, Any]]) -> None:
    state = goes_on_exactly("recipe=advprop", "advprop.epsilon=2", "batch_size=8", "ranks=2", "sync_bn=all")
    assert state["auxiliary"]


def test_accuracy_under_attack(cli: Cli, trained: Path, tmp_path: Path) -> None:
    """The stronger the attack, the less is right."""
    words = (f"checkpoint={trained}", "device=cpu", "workers=0")
    scores = []
    for number, attack in enumerate(("epsilon: 0", "epsilon: 4, steps: 5", "epsilon: 32, steps: 10, step_size: 4")):
        done = cli("eval", *words, f"attack={{{attack}}}", f"output={tmp_path / str(number)}")
        assert done.status == 0, done.err
        scores.append(json.loads((tmp_path / str(number)).read_text()))
    assert scores[0]["loss"] < scores[1]["loss"] < scores[2]["loss"]
    assert scores[0]["top1"] > scores[2]["top1"]
    assert "attack" not in scores[0]
    assert scores[2]["attack"] == {"epsilon": 32, "steps": 10, "step_size": 4}
    assert "  attacked  epsilon 32, steps 10, step_size 4" in done.out
    done = cli("eval", *words, "attack.epsilon=3")
    assert "  attacked  epsilon 3, steps 4, step_size 1" in done.out
    assert json.loads(done.out.splitlines()[-1])["attack"]["steps"] == 4
    done = cli("eval", *words, "attack={epsilon: 32, steps: 10, step_size: 4}", "precision=bf16")
    assert json.loads(done.out.splitlines()[-1])["loss"] == pytest.approx(scores[2]["loss"], rel=0.2), done.err
    for refused, why in (("fold=true", "fold=true, which has no gradients"), ("attack.eps=1", "did you mean attack.")):
        done = cli("eval", *words, "attack.epsilon=1", refused)
        assert (done.status, why in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("advprop.epsilon=0", "advprop.steps=5"), "advprop.steps=5 has no effect without advprop.epsilon=, say 1"),
        (("cuda_graph=true",), "with advprop.epsilon= set cuda_graph=false"),
        (("model.fused=true",), "model.fused=true: the fused kernels have no auxiliary BatchNorm"),
        (
            ("init_from=x", "freeze.batch_norm=true"),
            "freeze= keeps BatchNorms as they are, and advprop.epsilon= trains",
        ),
        (("distill.teacher=x",), "distill.teacher= and advprop.epsilon= are two objectives: choose one"),
        (("advprop.step=5",), "did you mean advprop.step"),
    ],
)
def test_what_cannot_be(cli: Cli, tiny: list[str], words: tuple[str, ...], message: str) -> None:
    done = cli("train", *tiny, "recipe=advprop", *words)
    assert (done.status, message in done.err) == (2, True), done.err
    assert not Path("run").exists()
