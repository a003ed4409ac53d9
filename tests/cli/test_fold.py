"""`fold=` of effnet-eval and effnet-predict: the same answers, and which network gave them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
ONE = ("device=cpu", "workers=0")


@pytest.mark.parametrize(
    ("words", "network"),
    [
        ((), "folded, oneDNN"),
        (("fold=true",), "folded, oneDNN"),
        (("fold=false",), "plain"),
        (("precision=bf16",), "plain"),
        (("precision=bf16", "fold=true"), "folded"),
    ],
)
def test_an_evaluation_says_which_network_it_used(
    cli: Cli, trained: Path, few_digits: Path, words: tuple[str, ...], network: str
) -> None:
    plain = cli("eval", f"checkpoint={trained}", "fold=false", "output=plain.json", *ONE)
    done = cli("eval", f"checkpoint={trained}", "output=out.json", *words, *ONE)
    assert done.status == 0, done.err
    found, expected = json.loads(Path("out.json").read_text()), json.loads(Path("plain.json").read_text())
    assert found["network"] == network
    assert f"at 32 pixels, {network}" in done.out
    assert "at 32 pixels, plain" in plain.out
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5 if "precision=bf16" not in words else 0.05)


def test_predictions_and_maps_are_the_same(cli: Cli, trained: Path, few_digits: Path) -> None:
    image = str(next((few_digits / "val").glob("*/*.png")))
    tops = []
    for fold in ("auto", "true", "false"):
        done = cli("predict", image, f"checkpoint={trained}", f"fold={fold}", "format=jsonl", *ONE)
        assert done.status == 0, done.err
        tops.append(json.loads(done.out)["top"])
    for other in tops[:2]:
        assert [one["class"] for one in other] == [one["class"] for one in tops[2]]
        assert [one["probability"] for one in other] == pytest.approx([one["probability"] for one in tops[2]], rel=1e-4)


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_another_word_is_refused(cli: Cli, trained: Path, few_digits: Path, command: str) -> None:
    image = [str(next((few_digits / "val").glob("*/*.png")))] if command == "predict" else []
    done = cli(command, *image, f"checkpoint={trained}", "fold=always", *ONE)
    assert done.status == 2
    assert "fold='always' must be auto or True or False" in done.err
