"""`effnet-bench complexity`: the paper's numbers, and every form of them."""

import csv
import json
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
# Table 2 of the paper: billions of multiply-adds; and its parameters, exactly as torchvision has them.
PAPER = {
    "b0": (0.39, 5_288_548),
    "b1": (0.70, 7_794_184),
    "b2": (1.0, 9_109_994),
    "b3": (1.8, 12_233_232),
    "b4": (4.2, 19_341_616),
    "b5": (9.9, 30_389_784),
    "b6": (19, 43_040_704),
    "b7": (37, 66_347_960),
}


def test_the_papers_variants_in_seconds(cli: Cli) -> None:
    start = time.process_time()
    done = cli("bench", "complexity", f"models=[{','.join(PAPER)}]", "format=json")
    assert done.status == 0, done.err
    assert time.process_time() - start < 30  # on a slow core; a forward pass of B7 alone would take longer
    rows = json.loads(done.out)
    assert [row["model"] for row in rows] == list(PAPER)
    for row in rows:
        billions, parameters = PAPER[row["model"]]
        assert row["parameters"] == parameters
        assert row["multiply_adds"] / 1e9 == pytest.approx(billions, rel=0.07)
        # Weights, gradients, two slots and the average; then the activations of 32 images.
        assert row["training_bytes"] > 4 * (5 * parameters + 32 * row["activations"])
        assert 4 * parameters < row["evaluation_bytes"] < row["training_bytes"]


@pytest.mark.parametrize("by", ["stage", "layer"])
def test_parts_add_up_in_a_file(cli: Cli, by: str) -> None:
    given = ("model=mobilenet_v1", "model.width=2", "num_classes=10", "resolution=64")
    done = cli("bench", "complexity", *given, f"by={by}", "format=csv", "output=cost.csv")
    assert done.status == 0, done.err
    assert done.out == "written to cost.csv\n"
    *parts, whole = list(csv.DictReader(StringIO(Path("cost.csv").read_text())))
    assert (whole["model"], whole["part"], whole["resolution"]) == ("mobilenet_v1 width=2", "total", "64")
    assert len(parts) == (7 if by == "stage" else 2 * 27 + 1)
    for column in ("parameters", "multiply_adds", "activations", "kept"):
        assert sum(int(part[column]) for part in parts) == int(whole[column])
    assert int(parts[-1]["parameters"]) == 2048 * 10 + 10
    assert {part["training_bytes"] for part in parts} == {""}


def test_the_table_is_for_reading(cli: Cli) -> None:
    done = cli("bench", "complexity", "model=resnet50", "precision=bf16", "by=stage")
    assert done.status == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.split()[:3] == ["model", "part", "pixels"]
    assert [line.split()[1] for line in lines] == ["stem", *(f"stages.{i}" for i in range(4)), "classifier", "total"]
    assert lines[-1].split()[3:5] == ["25,557,032", "4,089.184"]
    alone = cli("bench", "complexity", "model=resnet50", "precision=fp32").out.splitlines()
    assert alone[0].split()[:2] == ["model", "pixels"]
    half, full = (float(text.split()[-1].replace(",", "")) for text in (lines[-1], alone[-1]))
    weights = 4 * (25_557_032 + 53_120) / 2**20  # with BatchNorm's statistics
    assert half - weights == pytest.approx((full - weights) / 2, abs=1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("models=[b9]", "models has b9, which is not known: did you mean b"),
        ("models=[]", "models=[] names none: give names, as models=[b0,b1]"),
        ("models=[b0] model.width=2", "models=[b0] and model.width=2 are both given: leave one of them out"),
        ("models=b0", "models='b0' must be a list or null"),
        ("by=block", "by='block' must be total or stage or layer"),
        ("format=xml", "format='xml' must be table or csv or json"),
        ("resolution=0", "resolution=0 must be at least 1"),
        ("num_classes=0", "num_classes=0 must be at least 1"),
        ("output=nowhere/cost.csv", "output=nowhere/cost.csv: its folder does not exist, make it first"),
        ("model.widht=2", "model.widht is not a key of the configuration: did you mean model.width"),
        ("model=resnet50 model.layers=51", "layers=51: choose one of 50, 101, 152"),
    ],
)
def test_bad_input(cli: Cli, arguments: str, message: str) -> None:
    done = cli("bench", "complexity", *arguments.split())
    assert done.status == 2
    assert message in done.err
