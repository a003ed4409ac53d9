import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.lock import locked
from effnet_train.cli.scale_search import cost_of, ranked
from effnet_train.distributed import Session
from effnet_train.search.coefficients import PUBLISHED_PHI, Coefficients, scaled

FEW = ("alpha=[1.4,2.0]", "beta=[1.0,1.2]", "gamma=[1.0]", "flops_tolerance=0.5", "baseline=false", "multiple=8")
CANDIDATES = ("alpha1.4-beta1.2-gamma1", "alpha2-beta1-gamma1")


@pytest.mark.parametrize(
    ("phi", "dimensions", "rounded_by_hand"),
    [
        (0, (1.0, 1.0, 224), (1, 1, 224)),
        (3.5, (1.8929, 1.396, 364), (1.8, 1.4, 380)),
    ],
)
def test_apply_prints_the_law_beside_the_published_variant(
    cli: Any, phi: float, dimensions: tuple[float, float, int], rounded_by_hand: tuple[float, float, int]
) -> None:
    outcome = cli("scale", "apply", f"phi={phi}", "alpha=1.2", "beta=1.1", "gamma=1.15")
    assert outcome.status == 0
    assert "depth {:g}, width {:g}, {} pixels".format(*dimensions) in outcome.out
    text = outcome.out.partition("\n\n")[2]
    assert yaml.safe_load(text) == {
        "defaults": ["b0"],
        **dict(zip(("depth", "width", "resolution"), dimensions, strict=True)),
    }
    name = next(name for name, at in PUBLISHED_PHI.items() if at == phi)
    if rounded_by_hand:
        assert (
            "published      model={}: depth {:g}, width {:g}, {} pixels".format(name, *rounded_by_hand) in outcome.out
        )


def test_b0_is_phi_0_with_the_papers_numbers(cli: Any) -> None:
    out = cli("scale", "apply", "phi=0").out
    assert "parameters     5,288,548\n" in out  # timm's efficientnet_b0
    assert "0.3858 billion" in out


def test_a_budget_is_kept_and_used(cli: Any, tmp_path: Path) -> None:
    outcome = cli("scale", "apply", "model=nano", "flops=2e6", "output=nets/model/mine.yaml", "multiple=1")
    assert outcome.status == 0, outcome.err
    counted = float(outcome.out.partition("multiply-adds  ")[2].split(" million")[0]) * 1e6
    assert 1.7e6 < counted <= 2e6
    assert "effnet-train --config-dir nets model=mine" in outcome.out
    trained = cli("train", "--config-dir", "nets", "model=mine", "data=digits", "--cfg", "job")
    assert trained.status == 0, trained.err
    here = yaml.safe_load(trained.out)["model"]
    written = yaml.safe_load((tmp_path / "nets/model/mine.yaml").read_text(encoding="utf-8"))
    assert written.pop("defaults") == ["nano"]
    assert written.items() <= here.items()
    assert written["width"] > 0.513


def test_parameters_of_another_base_and_its_keys(cli: Any) -> None:
    depth_alone = ("alpha=2", "beta=1", "gamma=1")
    outcome = cli("scale", "apply", "model=mobilenet_v1", "model.dropout=0.1", "params=6e6", *depth_alone)
    found = yaml.safe_load(outcome.out.partition("\n\n")[2])
    assert found["defaults"] == ["mobilenet_v1"]
    assert (found["width"], found["resolution"], found["dropout"]) == (1.0, 224, 0.1)
    assert found["depth"] > 1.2
    assert 4.9e6 < int(outcome.out.partition("parameters     ")[2].split("\n")[0].replace(",", "")) <= 6e6


def test_latency_is_measured(cli: Any) -> None:
    outcome = cli("scale", "apply", "model=nano", "latency_ms=20", "multiple=32")
    assert outcome.status == 0, outcome.err
    assert "ms measured here" in outcome.out


@pytest.mark.parametrize(("again", "told"), [(1.0, ""), (1.05, "; 5.0% above the 60 asked for")])
def test_a_latency_that_is_not_kept_is_told(cli: Any, monkeypatch: pytest.MonkeyPatch, again: float, told: str) -> None:
    def latency(model: dict[str, Any], _classes: int) -> float:
        here = 60.0 * model["width"] / 0.513
        return here * again if model["width"] in seen else seen.add(model["width"]) or here

    seen = set[float]()
    monkeypatch.setattr("effnet_train.cli.scale._latency_ms", latency)
    outcome = cli("scale", "apply", "model=nano", "latency_ms=60", "alpha=1", "beta=2", "gamma=1")
    assert f"latency        {60 * again:g} ms measured here{told}\n" in outcome.out
    assert ("warning: latency_ms=60 is not kept" in outcome.err) == bool(told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "none of them: give one of phi=, flops=, params=, latency_ms="),
        (("phi=1", "flops=1e9"), "phi=1 and flops=1000000000.0: give one of phi="),
        (("flops=-1",), "flops=-1 must be above 0"),
        (("phi=1", "alpha=0.9"), "alpha=0.9: a scaling coefficient is at least 1"),
        (("phi=1", "multiple=0"), "multiple=0 must be at least 1"),
        (("phi=1", "output=mine.yaml"), "output=mine.yaml: give a .yaml in a folder named model"),
        (("phi=1", "output=nets/model/b4.yaml"), "model=b4 is one of ours, which would be taken instead"),
        (("phi=1", "alfa=2"), "alfa is not a key of the configuration: did you mean alpha?"),
        (
            ("params=1e7", "model=nano", "alpha=1", "beta=1", "gamma=1"),
            "params=1e+07: even phi=16 costs less than 1e+07",
        ),
        (("phi=60",), "phi=60 must be from -16 to 16"),
        (("phi=1000",), "phi=1000 must be from -16 to 16"),
        (("phi=1", "alpha=1e300", "beta=1e300"), "phi=1 with alpha=1e+300 takes depth from 1 to more than 32: lower"),
        (("phi=12", "alpha=1", "beta=1.4", "gamma=1"), "phi=12 with beta=1.4 takes width from 1 to more than 32"),
        (("phi=11", "alpha=1", "beta=1", "gamma=1.4"), "with gamma=1.4 takes resolution from 224 to more than 8192"),
        (
            ("flops=2e9", "model=nano", "alpha=2", "beta=1", "gamma=1"),
            "flops=2e+09: even the largest network of this law, of phi=6.84, costs",
        ),
    ],
)
def test_what_apply_refuses(cli: Any, arguments: tuple[str, ...], message: str) -> None:
    outcome = cli("scale", "apply", *arguments)
    assert outcome.status == 2
    assert message in outcome.err


def test_another_network_is_not_written_over(cli: Any) -> None:
    assert cli("scale", "apply", "model=nano", "phi=1", "output=nets/model/mine.yaml").status == 0
    assert cli("scale", "apply", "model=nano", "phi=1", "output=nets/model/mine.yaml").status == 0
    outcome = cli("scale", "apply", "model=nano", "phi=2", "output=nets/model/mine.yaml")
    assert "output=nets/model/mine.yaml holds another network: remove it" in outcome.err


def test_the_plan_tells_what_is_dropped_and_why(cli: Any, tiny: list[str]) -> None:
    few = ("alpha=[1.6,1.65,2.0]", "beta=[1.0,1.1]", "gamma=[1.0]", "tolerance=0.2", "flops_tolerance=0.1")
    outcome = cli("scale", "search", "model=nano", "data=digits", "dry_run=true", *few)
    assert outcome.status == 0, outcome.err
    assert "candidate      alpha1.6-beta1.1-gamma1: depth 0.4464, width 0.5643, 32 pixels" in outcome.out
    assert "dropped        alpha1.65-beta1.1-gamma1: the same network as alpha1.6-beta1.1-gamma1" in outcome.out
    assert "dropped        alpha2-beta1-gamma1: -17.4% off the budget" in outcome.out
    assert "trainings      2 of 3 epochs" in outcome.out
    assert not Path("runs").exists()


def test_a_search_trains_ranks_and_tells_of_failures(cli: Any, tiny: list[str]) -> None:
    # A candidate's run is refused, as its folder is another's.
    folder, (good, bad) = Path("found"), CANDIDATES
    own = folder / f"{bad}-seed0"
    own.mkdir(parents=True)
    (own / "config.yaml").write_text("{epochs: 77}", encoding="utf-8")
    # The base is a file of the user's own.
    assert cli("scale", "apply", "model=nano", "phi=0", "multiple=1", "output=my nets/model/mine.yaml").status == 0
    words = ["--config-dir", "my nets", "model=mine", *(text for text in tiny if not text.startswith("name="))]
    outcome = cli("scale", "search", *words, *FEW, "name=found", "jobs=2")
    assert outcome.status == 1, outcome.err
    assert f"training 2 of 2: {bad}, seed 0" in outcome.out
    assert f"{bad}, seed 0 FAILED: the folder" in outcome.out
    assert "holds a run of another configuration" in outcome.out
    with (folder / "search.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["alpha"], row["seeds"]) for row in rows] == [("1", "1.4", "1"), ("", "2.0", "0")]
    run = folder / f"{good}-seed0"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert float(rows[0]["top1"]) == summary["best"]["val_ema/top1"]
    trained = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert [trained["model"][key] for key in ("depth", "width", "resolution")] == [0.3906, 0.3, 32]
    assert trained["max_steps"] == 2

    # What has ended is not trained again; what failed is, once its reason is gone.
    before = (run / "summary.json").stat().st_mtime_ns
    (own / "config.yaml").unlink()
    again = cli("scale", "search", *words, *FEW, "name=found")
    assert again.status == 0, again.out
    assert "1 of 2 trainings have ended before" in again.out
    assert f"training 1 of 1: {bad}, seed 0" in again.out
    assert (run / "summary.json").stat().st_mtime_ns == before

    further = again.out.partition("the best, scaled further: effnet-scale ")[2]
    assert "multiple=8 num_classes=10" in further
    assert cli("scale", *shlex.split(further)).status == 0
    # At the search's own phi it is the network that was trained.
    same = cli("scale", *shlex.split(further.replace("phi=2", "phi=1")), "output=my nets/model/best.yaml")
    best = json.loads((folder / "search.json").read_text(encoding="utf-8"))["rows"][0]
    assert f"parameters     {best['parameters']:,}\n" in same.out
    kept = [word for word in words if not word.startswith("model")]
    planned = cli("train", *kept, "model=best", "name=other", "dry_run=true")
    assert f"parameters     {best['parameters']:,}\n" in planned.out, planned.err
    written = yaml.safe_load(Path("my nets/model/best.yaml").read_text(encoding="utf-8"))
    assert [written[key] for key in ("depth", "width", "resolution")] == [
        best[key] for key in ("depth", "width", "resolution")
    ]

    # What was cut short is no result of a search for longer trainings, and goes on.
    longer = cli("scale", "search", *words, *FEW, "name=found", "max_steps=3")
    assert longer.status == 0, longer.out
    assert "have ended before" not in longer.out
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"] == 3

    # One search at a time in a folder.
    with locked(folder, Session()):
        second = cli("scale", "search", *words, *FEW, "name=found", "max_steps=3")
    assert second.status == 2
    assert "the folder found is being written by process" in second.err
    assert not (folder / ".lock").exists()

    other = cli("scale", "search", *words, *FEW, "name=found", "batch_size=8")
    assert other.status == 2
    assert "batch_size was 16, now 8" in other.err


def test_a_search_on_b0_holds_the_papers_answer(cli: Any) -> None:
    own = ("alpha=[1.2]", "beta=[1.1]", "gamma=[1.15]")
    outcome = cli("scale", "search", "model=b0", "data=imagenet", "data.root=/path", *own, "dry_run=true")
    assert outcome.status == 0, outcome.err
    assert "candidate      alpha1.2-beta1.1-gamma1.15: depth 1.2, width 1.1, 256 pixels" in outcome.out


def test_examples_of_a_search_have_candidates(cli: Any) -> None:
    footer = yaml.safe_load((CONFIG_DIR / "scale_search.yaml").read_text(encoding="utf-8"))["hydra"]["help"]["footer"]
    examples = [line.split() for line in footer.splitlines() if "model=nano" in line]
    assert len(examples) == 2
    for words in examples:
        outcome = cli("scale", *(word.strip("'") for word in words[1:]), "dry_run=true")
        assert outcome.status == 0, outcome.err
        assert outcome.out.count("candidate      alpha") > 1


def test_equals_share_a_rank() -> None:
    found = [(1.1, 0.5, 30), (1.2, 0.75, 20), (1.3, None, 10), (1.4, 0.75, 10), (None, 0.9, 1), (1.6, 0.25, 10)]
    rows = [{"alpha": alpha, "top1": top1, "multiply_adds": cost} for alpha, top1, cost in found]
    ranks = [(row["alpha"], row["rank"]) for row in ranked(rows)]
    assert ranks == [(1.4, 1), (1.2, 1), (1.1, 3), (1.6, 4), (1.3, None), (None, None)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m",), "effnet-scale search takes no -m"),
        (("phi=0",), "phi=0 must be above 0"),
        (("tolerance=0.01", "step=0.3"), "no alpha * beta^2 * gamma^2 is within tolerance=0.01 of 2"),
        (("flops_tolerance=0.001",), "no candidate is within flops_tolerance=0.001 of the budget"),
        (("epochs=0",), "epochs=0 must be more than 0"),
        (("jobs=0",), "jobs=0 must be at least 1"),
        (("seeds=[a]",), "seeds=['a'] must be a list of whole numbers or null"),
        (("seeds=[0,1.5]",), "seeds=[0, 1.5] must be a list of whole numbers or null"),
        (("seeds=3",), "seeds=3 must be a list of whole numbers or null"),
        (("seeds=[-1]",), "seeds=[-1] must be different numbers from 0 to below 2 ** 63"),
        (("seeds=[0,0]",), "seeds=[0, 0] must be different numbers from 0 to below 2 ** 63"),
        (("alpha=[a]",), "alpha=['a'] must be a list of finite numbers or null"),
        (("data.preprocess.resolution=32",), "give the base's resolution as model.resolution=32"),
    ],
)
def test_what_search_refuses(cli: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    base = ("model=nano", "data=digits", "alpha=[1.6]", "beta=[1.1]", "gamma=[1.0]")
    words = base[:2] if "step=0.3" in arguments else base
    outcome = cli("scale", "search", *words, *arguments)
    assert outcome.status == 2
    assert message in outcome.err


def test_the_points_of_the_study_cost_the_same(compose: Callable[..., dict[str, Any]]) -> None:
    script = (CONFIG_DIR.parent / "scripts" / "scaling_cifar10.sh").read_text(encoding="utf-8")
    points = [line.removeprefix('    echo "').rstrip('"').split() for line in script.split("points()")[1].splitlines()]
    points = [words for words in points if len(words) > 1 and words[1].startswith("model.")]
    model = {name: compose("train", "model=nano", "data.root=x", *words)["model"] for name, *words in points}
    counted = {name: cost_of(config, 10).multiply_adds for name, config in model.items()}
    assert counted["baseline"] == 712_944
    budget = counted["resolution"]
    assert all(0.97 < counted[name] / budget <= 1 for name in ("depth", "width", "resolution", "compound"))
    # They are the largest that the law makes within the budget: phi as effnet-scale apply flops=1315824 finds it.
    laws = {"depth": ((2, 1, 1), 1.8408), "width": ((1, 2**0.5, 1), 0.8438), "compound": ((1.2, 1.1, 1.15), 0.9648)}
    for name, (law, phi) in laws.items():
        largest, larger = (
            cost_of(model["baseline"] | scaled(model["baseline"], Coefficients(*law), at), 10)
            for at in (phi, phi + 0.01)
        )
        assert counted[name] == pytest.approx(largest.multiply_adds, rel=0.005)
        assert larger.multiply_adds > budget


def test_jobs_are_listed(cli: Any) -> None:
    assert "effnet-scale apply" in cli("scale", "--help").out
    assert "applie is no job" in cli("scale", "applie").err
