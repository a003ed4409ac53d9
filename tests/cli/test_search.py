"""`effnet-search`: a search of small trainings, its report, its network scaled; and what goes wrong."""

import csv
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effnet_train.cli import search_run
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.search import report
from effnet_train.search.journal import Entry, Journal

Cli = Callable[..., Any]
SPACE = (
    *(
        "space=small",
        "space.op=[separable,mbconv3]",
        "space.kernel=[3]",
        "space.se_ratio=[0.0]",
        "space.skip=[identity]",
    ),
    *("space.head_channels=64", "space.stem_channels=8"),
    "space.blocks=[{stride: 2, channels: 8, repeats: 1, layers: [0]}, {stride: 2, channels: 16, repeats: 1}]",
    *("space.width=[1.0,2.0]", "space.layers=[0,1]"),
)


@pytest.fixture
def words(tiny: list[str]) -> list[str]:
    own = [text for text in tiny if not text.startswith(("model.", "name=", "loggers="))]
    return [
        *own,
        *SPACE,
        "batch_size=16",
        "epochs=1",
        "model.resolution=32",
        "reward.target=2e5",
        "workers=0",
        "name=found",
    ]


def entries(folder: str = "found") -> dict[int, Entry]:
    return Journal(Path(folder) / "trials.jsonl", readonly=True).entries


def test_a_search_from_its_space_to_a_scaled_network(cli: Cli, words: list[str]) -> None:
    """Real trainings, two at a time; the same command again; its report; its best network trained and scaled."""
    plan = cli("search", "run", *words, "trials=3", "round=2", "dry_run=true")
    assert plan.status == 0, plan.err
    assert "block 2: stride 2; op separable/mbconv3; kernel 3; se_ratio 0; skip identity; channels 16/32" in plan.out
    assert "reward         top-1 * (flops / 200,000) ** -0.07" in plan.out
    assert "trials         3, each of 1 epochs, cut short after 2 steps\n" in plan.out
    assert f"cost           {3 * 2 * 16} images" in plan.out
    assert not Path("found").exists()

    done = cli("search", "run", *words, "trials=3", "round=2", "jobs=2")
    assert done.status == 0, done.err
    assert "done: 3 trials: " in done.out
    found = entries()
    assert sorted(found) == [1, 2, 3]
    own = [entry for entry in found.values() if entry.same_as is None]
    for entry in own:
        folder = Path("found") / f"trial{entry.number:05d}"
        summary = json.loads((folder / "summary.json").read_text())
        assert entry.top1 == summary["best"]["val_ema/top1"]
        assert entry.reward == pytest.approx(entry.top1 * (entry.costs["flops"] / 2e5) ** -0.07)
        assert not [*folder.glob("*.pt"), *folder.glob("*.safetensors")]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["model"]["stem_channels"], config["optim"]["_target_"]) == (8, "torch.optim.AdamW")
        assert len(config["model"]["stages"]) == 2
    board = EventAccumulator("found/tensorboard")
    board.Reload()
    assert [event.step for event in board.Scalars("trial/reward")] == [1, 2, 3]
    assert len(board.Scalars("searcher/entropy")) == 2

    before = {path: path.read_bytes() for path in Path("found").rglob("trial*") if path.is_file()}
    again = cli("search", "run", *words, "trials=3", "round=2")
    assert (again.status, "going on: 3 of 3 trials are done" in again.out) == (0, True)
    assert before == {path: path.read_bytes() for path in Path("found").rglob("trial*") if path.is_file()}
    other = cli("search", "run", *words, "trials=3", "round=3")
    assert (other.status, "round was 2, now 3" in other.err) == (2, True)

    told = cli("search", "report", "search=found")
    assert told.status == 0, told.err
    best = max(own, key=lambda entry: entry.reward or 0)
    assert told.out.split("\n")[3].split()[:2] == ["1", str(best.number)]
    rows = list(csv.DictReader(Path("found/report.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in rows] == [1, 2, 3]
    for name in ("rewards", "pareto"):
        assert Path(f"found/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in Path(f"found/{name}.svg").read_text()

    exported = cli("search", "export", "best", "search=found", "output=nets/model/mine.yaml")
    assert (exported.status, "model=mine" in exported.out) == (0, True), exported.err
    scaled = cli("scale", "apply", "--config-dir", "nets", "model=mine", "phi=1", "output=nets/model/larger.yaml")
    assert scaled.status == 0, scaled.err
    base = [text for text in words if not text.startswith(("space", "reward", "name", "model."))]
    trained = cli("train", "--config-dir", "nets", *base, "model=larger", "name=larger", "recipe=search_proxy")
    assert trained.status == 0, trained.err
    weights = load_checkpoint(Path("larger/best.pt"))["meta"]["model"]
    assert weights["_target_"].endswith("MnasNet")
    assert (weights["depth"], weights["width"], weights["head_channels"]) == (1.2, 1.1, 64)
    assert yaml.safe_load(Path("nets/model/larger.yaml").read_text())["resolution"] == 36  # 32 * 1.15


def stub(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have trials run `code` in place of a training, with `folder` its run's."""
    written = (
        "import json, os, signal, sys, time, yaml\nfrom pathlib import Path\n"
        "words = dict(word.split('=', 1) for word in sys.argv[1:] if '=' in word)\n"
        "folder = Path(words['run_root'].strip(chr(39))) / words['name']\n"
        "starts = folder / 'starts'; n = int(starts.read_text()) + 1 if starts.exists() else 1; "
        "starts.write_text(str(n))\nnumber = int(words['name'][-5:])\n"
    )
    monkeypatch.setattr(search_run, "training_command", lambda words: (sys.executable, "-c", written + code, *words))


FINISHES = """
(folder / 'config.yaml').write_text(json.dumps({'select_by': 'val_ema/top1', 'seed': 0, 'epochs': 1, 'batch_size': 4,
    'max_steps': None, 'data': {'root': 'x', 'preprocess': {'resolution': 8}}, 'init_from': None,
    'model': yaml.safe_load((folder.parent / f"candidates/model/{words['name']}.yaml").read_text())}))
(folder / 'model.json').write_text(json.dumps({'classes': ['a', 'b'], 'images': 4}))
best = {'step': 1, 'val_ema/top1': number / 100, 'val_ema/top5': 1.0, 'val/top1': 0.9}
(folder / 'summary.json').write_text(json.dumps({'best': best, 'steps': 1, **extra}))
"""


def test_what_crashes_or_hangs_is_recorded_with_its_reason(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(
        monkeypatch,
        "extra = {}\n"
        "if number == 1: print('effnet-train: error: out of memory (CUDA out of memory)'); sys.exit(2)\n"
        "if number == 2: print('started', flush=True); time.sleep(100)\n"
        "if number == 3 and n < 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if number == 4: print('a disk is away'); sys.exit(1)\n" + FINISHES,
    )
    done = cli("search", "run", *words, "trials=6", "round=6", "jobs=6", "searcher=random", "trial_limit_s=8", "seed=3")
    assert done.status == 0, done.err
    found = entries()
    starts = {n: int(Path(f"found/trial{n:05d}/starts").read_text()) for n in range(1, 7) if found[n].same_as is None}
    assert starts == {1: 1, 2: 1, 3: 3, 4: 3, 5: 1, 6: 1}
    reasons = {n: str(entry.reason) for n, entry in found.items() if entry.status == "failed"}
    assert sorted(reasons) == [1, 2, 4]
    assert reasons[1].startswith("out of memory (CUDA out of memory) (exit status 2; found/trial00001/log.txt")
    assert reasons[2] == "it took longer than trial_limit_s=8"
    assert reasons[4].startswith("a disk is away (exit status 1; ")
    assert {n: entry.top1 for n, entry in found.items() if entry.top1} == {3: 0.03, 5: 0.05, 6: 0.06}
    assert "trial 1: FAILED: out of memory" in done.out
    assert "3 trained, 0 the same as others, 0 over a limit, 3 failed, see found/trials.jsonl" in done.out
    exported = cli("search", "export", "1", "search=found")
    assert (exported.status, "# Trial 1 of found (effnet-search export)." in exported.out) == (0, True)


def test_a_training_of_a_start_before_that_still_runs_is_no_failure(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from effnet_train.cli.lock import Lock

    stub(
        monkeypatch,
        "from effnet_train.cli.lock import Lock\nextra = {}\n"
        "if number == 2:\n"
        "    try: Lock(folder).release()\n"
        "    except ValueError as error: print(f'effnet-train: error: {error}'); sys.exit(2)\n" + FINISHES,
    )
    held = Lock(Path("found/trial00002"))
    try:
        done = cli("search", "run", *words, "trials=2", "round=2", "jobs=2")
    finally:
        held.release()
    assert done.status == 75
    assert "effnet-search: trial 2 has no outcome yet: the folder found/trial00002 is being written by" in done.err
    assert sorted(entries()) == [1]
    assert cli("search", "run", *words, "trials=2", "round=2", "jobs=2").status == 0
    assert sorted(entries()) == [1, 2]


def test_a_limit_keeps_networks_from_being_trained(cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "extra = {}\n" + FINISHES)
    limits = ("limits.params=5000", "limits.latency_ms=1e6", "reward.cost=latency_ms", "reward.target=5")
    done = cli("search", "run", *words, "trials=12", "round=6", "jobs=4", "searcher=evolution", *limits)
    assert done.status == 0, done.err
    statuses = {entry.status for entry in entries().values()}
    assert statuses == {"trained", "over"}
    for number, entry in entries().items():
        assert (entry.costs["params"] > 5000) == (entry.status == "over")
        assert Path(f"found/trial{number:05d}").exists() == (entry.status == "trained" and entry.same_as is None)
        assert entry.costs["latency_ms"] > 0
        if entry.top1 is not None:
            assert entry.reward == pytest.approx(entry.top1 * (entry.costs["latency_ms"] / 5) ** -0.07)


def test_networks_that_scaling_makes_the_same_are_trained_once(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "extra = {}\n" + FINISHES)
    narrow = ("model.width=0.25", "space.layers=[0]", "trials=10", "round=5", "jobs=4", "searcher=random")
    assert cli("search", "run", *words, *narrow).status == 0
    found = report.read(Path("found"))
    candidates = {entry.tokens for entry in found.entries}
    operations = {tuple(stage["op"] for stage in found.space.decode(tokens)) for tokens in candidates}
    assert len(candidates) > len(operations)  # the others differ in channels, of which a quarter is 8 for all
    assert sum(entry.same_as is None for entry in found.entries) == len(operations)


def test_limits_that_no_candidate_keeps_end_in_an_error(cli: Cli, words: list[str]) -> None:
    done = cli("search", "run", *words, "trials=6", "round=3", "limits.params=100", "limits.flops=1e9")
    assert done.status == 2
    least = min(entry.costs["params"] for entry in entries().values())
    assert "none of 6 candidates was trained, see found/trials.jsonl: limits.flops=1e+09, the least was" in done.err
    assert f"; limits.params=100, the least was {least:,.6g}. Give name= and higher ones" in done.err
    assert "best" not in done.out
    told = cli("search", "report", "search=found")
    assert told.status == 0, told.err
    assert told.out.startswith("The search\n")


def test_a_search_that_has_but_failures_yet_is_reported(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "sys.exit(2)")
    assert cli("search", "run", *words, "trials=2", "round=2", "searcher=random").status == 2
    told = cli("search", "report", "search=found")
    assert (told.status, told.out.split("\n")[0]) == (0, "no trial has a reward yet"), told.err


def test_a_result_counts_for_its_own_network_only(cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "extra = {}\n" + FINISHES)
    command = ("search", "run", *words, "trials=3", "round=3", "searcher=random")

    def starts() -> list[int]:
        return [int(file.read_text()) for file in sorted(Path("found").glob("trial*/starts"))]

    assert cli(*command).status == 0
    before, first = entries(), Path("found/trial00001/config.yaml")
    assert starts() == [1, 1, 1]
    for name in ("trials.jsonl", "searcher.pt"):
        Path("found", name).unlink()
    assert cli(*command).status == 0
    assert ({n: e.top1 for n, e in before.items()}, starts()) == ({n: e.top1 for n, e in entries().items()}, [1, 1, 1])

    for name in ("trials.jsonl", "searcher.pt"):
        Path("found", name).unlink()
    config = json.loads(first.read_text())
    config["model"]["stages"][0]["channels"] = 32
    first.write_text(json.dumps(config))
    assert cli(*command).status == 0
    assert starts() == [2, 1, 1]


def test_a_search_of_one_length_of_trials_goes_on_with_no_other(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "extra = {}\n" + FINISHES)
    own = [text for text in words if not text.startswith("max_steps")]
    assert cli("search", "run", *own, "trials=2", "round=2", "max_steps=1").status == 0
    for other in ("max_steps=2", "max_steps=null"):
        refused = cli("search", "run", *own, "trials=4", "round=2", other)
        assert (refused.status, "max_steps of a trial was 1, now" in refused.err) == (2, True)


def test_what_differs_from_a_base_of_ones_own_is_exported(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "extra = {}\n" + FINISHES)
    Path("nets/model").mkdir(parents=True)
    Path("nets/model/swish.yaml").write_text("defaults: [mnasnet]\nactivation: swish\n")
    own = ("--config-dir", "nets", *words, "model=swish", "model.activation=relu", "trials=2", "round=2")
    assert cli("search", "run", *own).status == 0
    exported = cli("search", "export", "best", "search=found")
    assert exported.status == 0, exported.err
    values = yaml.safe_load(exported.out)
    assert (values["defaults"], values["activation"], values["head_channels"]) == (["swish"], "relu", 64)
    assert "_target_" not in values


def test_held_out_images_are_what_is_rewarded(cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "extra = {'test': {'test/top1': 0.77, 'test/top5': 1.0}}\n" + FINISHES)
    assert cli("search", "run", *words, "trials=2", "round=2", "jobs=2").status == 0
    assert entries()[1].top1 == 0.01


def test_searches_are_compared(cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "extra = {}\n" + FINISHES)
    own = [text for text in words if text != "name=found"]
    for searcher, seed in (("random", 0), ("random", 1), ("ppo", 0)):
        name = f"name={searcher}{seed}"
        assert (
            cli("search", "run", *own, name, f"searcher={searcher}", f"seed={seed}", "trials=4", "jobs=4").status == 0
        )
    outcome = cli("search", "report", "search=[random0,random1,ppo0]", "top=3")
    assert outcome.status == 0, outcome.err
    svg = Path("report/rewards.svg").read_text()
    assert Path("report/pareto.png").exists()
    assert "Random, mean of 2 seeds" in svg
    # The stub's accuracies are the trials' numbers: means by hand.
    rewards = {n: [e.reward or 0.0 for e in entries(f"random{n}").values()] for n in (0, 1)}
    best, last = (sum(f(rewards[n]) for n in (0, 1)) / 2 for f in (max, lambda values: sum(values) / 4))
    line = next(line for line in outcome.out.splitlines() if line.startswith("Random, mean of 2"))
    assert line.split()[-2:] == [f"{best:.4f}", f"{last:.4f}"]
    assert "PPO" in svg
    rows = list(csv.DictReader(Path("report/report.csv").read_text().splitlines()))
    assert {row["search"] for row in rows} == {"random0", "random1", "ppo0"}
    assert len(rows) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run -m", "effnet-search run takes no -m"),
        ("run model=b0", "model=b0 has no stages to search for: choose model=mnasnet"),
        ("run space.kernel=[4]", "kernel=4 must be odd"),
        ("run space.op=[mbconv]", "op='mbconv': choose conv, separable, or mbconv and its expansion"),
        ("run 'space.width=[wide]'", "space.blocks[0]: width=['wide'] must be a list of numbers to choose from"),
        ("run space.stem_channels=20", "space.stem_channels=20 must be a multiple of 8"),
        ("run searcher=pppo", "searcher=pppo is not known: did you mean searcher=ppo?"),
        ("run searcher.learning_rate=1", "searcher.learning_rate is not a key of the configuration"),
        ("run searcher.seed=1 ", "searcher.seed"),
        ("run reward.target=0", "reward.target=0 must be above 0"),
        ("run reward.cost=joules", "reward.cost='joules' must be flops or params or latency_ms"),
        ("run latency_device=gpu", "latency_device='gpu' must be cpu or cuda"),
        ("run limits.flops=-1", "limits.flops=-1 must be above 0, or null for none"),
        ("run epochs=0", "epochs=0 must be more than 0"),
        ("run schedule.warmup_epochs=2", "schedule.warmup_epochs=2 is not shorter than the run of epochs=1"),
        (
            "run data=imagenet data.root=nowhere 'data.expected={classes: 3, train: 9}'",
            "data.root=nowhere does not exist",
        ),
        ("run round=0", "round=0 must be at least 1"),
        ("report search=nowhere", "search=nowhere holds no trials.jsonl: give the folder of an effnet-search run"),
        ("report search=[]", "search=[] is empty: give the searches' folders"),
        ("export best search=nowhere output=mine.yaml", "output=mine.yaml: give a .yaml in a folder named model"),
        ("export search=nowhere trial=first", "trial='first' must be a whole number or best"),
        ("export", "search has no value"),
    ],
)
def test_what_is_wrong_is_named(cli: Cli, words: list[str], arguments: str, message: str) -> None:
    job, *rest = shlex.split(arguments)
    own = [text for text in words if text.partition("=")[0] not in {word.partition("=")[0] for word in rest}]
    outcome = cli("search", job, *(own if job == "run" else []), *rest)
    assert outcome.status == 2, outcome.out
    assert message in outcome.err
    assert not Path("found").exists()


def test_trainings_share_the_gpus_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_run, "is_remote", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert search_run._places("auto", "auto") == ["0", "1", "2", "3"]
    assert search_run._places(2, "cuda") == ["0,2", "1,3"]
    assert search_run._places(8, "auto") == ["0", "1", "2", "3", "0", "1", "2", "3"]
    assert search_run._places(1, "auto") == [None]
    assert search_run._places(2, "cpu") == [None, None]
    assert search_run._places("auto", "cpu") == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert search_run._places("auto", "auto") == ["5", "7"]
    monkeypatch.setattr(search_run, "is_remote", lambda: True)
    assert search_run._places("auto", "auto") == []
    assert search_run._places(3, "auto") == [None, None, None]
