"""`effnet-export average=[...]`: weights averaged through the real command, chosen, and with new statistics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_train.engine.checkpoint import load_checkpoint, load_weights

Cli = Callable[..., Any]
OURS = ("format=effnet_train", "device=cpu", "workers=0")


@pytest.fixture
def members(trained: Path) -> list[str]:
    return [str(trained / "step_000000015.pt"), str(trained / "step_000000030.pt")]


def test_a_soup_is_the_mean_of_its_members_and_is_read_back(cli: Cli, members: list[str]) -> None:
    done = cli("export", f"average=[{','.join(members)}]", *OURS)
    assert done.status == 0, done.err
    soup, (one, other) = load_weights(Path("soup.safetensors")), map(load_weights, map(Path, members))
    for name, tensor in soup.tensors.items():
        mean = (one.tensors[name].double() + other.tensors[name].double()) / 2
        assert torch.equal(tensor, mean.to(tensor.dtype)), name
    assert soup.meta["average"] == members
    assert "step" not in soup.meta
    scored = cli("eval", "checkpoint=soup.safetensors", "device=cpu", "workers=0")
    assert scored.status == 0, scored.err


def test_greedy_takes_what_scores_no_lower(cli: Cli, members: list[str], tmp_path: Path) -> None:
    bad = load_checkpoint(Path(members[0]))
    bad["ema"]["classifier.weight"] *= -3
    torch.save(bad, tmp_path / "bad.pt")
    done = cli("export", f"average=[{tmp_path}/bad.pt,{members[1]}]", "soup=greedy", *OURS)
    assert done.status == 0, done.err
    scored = cli("eval", f"checkpoint={members[1]}", "fold=false", "output=eval.json", "device=cpu", "workers=0")
    top1 = json.loads(scored.out.splitlines()[-1])["top1"]
    assert done.out.splitlines()[1:3] == [
        f"{members[1]}: top-1 {top1:.2%}",
        f"average of {members[1]}: top-1 {top1:.2%}",
    ]
    found, best = load_weights(Path("soup.safetensors")), load_weights(Path(members[1]))
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in best.tensors.items())
    assert found.meta["average"] == [members[1]]


def test_statistics_of_training_images_take_the_place_of_the_runs(cli: Cli, members: list[str]) -> None:
    done = cli("export", f"checkpoint={members[1]}", "batch_norm=70", "batch_size=20", "output=new.safetensors", *OURS)
    assert done.status == 0, done.err
    found, before = load_weights(Path("new.safetensors")), load_weights(Path(members[1]))
    changed = {name for name, tensor in found.tensors.items() if not torch.equal(tensor, before.tensors[name])}
    statistics = {name for name in before.tensors if name.endswith(("running_mean", "running_var"))}
    assert changed == statistics
    assert json.loads(Path("new.json").read_text())["step"] == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give checkpoint=..., or average=[a,b,c] to average the weights of several"),
        (("checkpoint=a", "average=[b,c]"), "give checkpoint=..., or average=[a,b,c]"),
        (("average=[a]",), "average=['a'] must be several different checkpoints, as [runs/A,runs/B]"),
        (("average=[a,a]",), "average=['a', 'a'] must be several different checkpoints"),
        (("checkpoint=a", "soup=greedy"), "soup=greedy chooses among several: give average=[a,b,c]"),
        (("average=[a,b]", "source=timm"), "source=timm goes with checkpoint="),
        (("checkpoint=a", "batch_norm=10"), "batch_norm=10 is less than batch_size=64"),
        (("checkpoint=a", "soup=tasty"), "soup='tasty' must be uniform or greedy"),
    ],
)
def test_what_makes_no_soup_is_told(cli: Cli, words: tuple[str, ...], message: str) -> None:
    done = cli("export", *words, *OURS)
    assert (done.status, message in done.err) == (2, True), done.err


def test_members_are_of_one_network_and_the_data_set_is_theirs(
    cli: Cli, members: list[str], tmp_path: Path, few_digits: Path
) -> None:
    other = load_checkpoint(Path(members[0]))
    other["meta"]["preprocess"]["crop_padding"] = 7
    torch.save(other, tmp_path / "other.pt")
    done = cli("export", f"average=[{members[0]},other.pt]", *OURS)
    assert (done.status, "differ: preprocess.crop_padding is 0 and 7" in done.err) == (2, True), done.err
    for changed, message in (
        ("nan", "not finite, in classifier.bias"),
        ("wide", "classifier.bias (10,) here, (12,) there"),
    ):
        other = load_checkpoint(Path(members[0]))
        other["ema"]["classifier.bias"] = torch.full((10,), torch.nan) if changed == "nan" else torch.zeros(12)
        torch.save(other, tmp_path / "other.pt")
        done = cli("export", f"average=[{members[0]},other.pt]", *OURS)
        assert (done.status, message in done.err) == (2, True), done.err
    many = cli("export", f"checkpoint={members[0]}", "batch_norm=640", *OURS, "output=x.safetensors")
    assert (many.status, "batch_norm=640 is more than the 80 training images" in many.err) == (2, True), many.err
