"""`effnet-table`: the paper's numbers, what is computed, what was trained."""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml

from effnet_train.analysis.tables import network_table
from effnet_train.cli import paper
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.table import with_overrides

Cli = Callable[..., Any]
Finished = Callable[..., Path]
GOLDEN = Path(__file__).parents[1] / "golden/efficientnet_variants.csv"
# Where the printed multiply-adds and ours differ by more than 7 %, and by how much: nothing is hidden in a tolerance.
FAR = {
    "table2": {"PNASNet": 0.084},
    "table3": {
        "MobileNetV1 compound": 0.074,
        "ResNet-50 depth": -0.101,
        "ResNet-50 width": 0.096,
    },
    "table7": {"EfficientNet-B0 depth": -0.125, "EfficientNet-B0 width": -0.194, "EfficientNet-B0 resolution": -0.191},
}


def rows(cli: Cli, *words: str) -> list[dict[str, str]]:
    done = cli("table", *words, "format=csv")
    assert done.status == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out)))


def name(row: dict[str, str]) -> str:
    return f"{row['name']} {row.get('scaling') or ''}".strip()


@pytest.mark.parametrize("table", FAR)
def test_multiply_adds_are_the_papers_within_7_percent_or_named(cli: Cli, table: str) -> None:
    found = rows(cli, table)
    off = {
        name(row): float(row["multiply_adds_b_here"]) / float(row["multiply_adds_b_paper"]) - 1
        for row in found
        if row["multiply_adds_b_here"] and row["multiply_adds_b_paper"]
    }
    assert len(off) == {"table2": 19, "table3": 14, "table7": 5}[table]
    assert {key: value for key, value in off.items() if abs(value) > 0.07} == pytest.approx(FAR[table], abs=0.001)
    for row in found:
        if name(row) in off:
            assert float(row["multiply_adds_b_difference"]) == pytest.approx(off[name(row)], abs=1e-5)
    if table == "table2":
        parameters = {row["name"]: float(row["parameters_m_here"] or 0) * 1e6 for row in found}
        exact = exact_parameters()
        assert {key: parameters[key] for key in exact} == pytest.approx(exact, rel=1e-5)
        absent = {"DenseNet-264", "PolyNet", "AmoebaNet-A", "AmoebaNet-C", "GPipe"}
        assert {key for key, value in parameters.items() if not value} == absent


def exact_parameters() -> dict[str, int]:
    with GOLDEN.open() as file:
        exact = {f"EfficientNet-{row['variant'].upper()}": int(row["parameters"]) for row in csv.DictReader(file)}
    with torch.device("meta"):
        others = {
            "ResNet-50": torchvision.models.resnet50(),
            "ResNet-152": torchvision.models.resnet152(),
            "Inception-v4": timm.create_model("inception_v4"),
        }
    return exact | {key: sum(p.numel() for p in model.parameters()) for key, model in others.items()}


def test_the_papers_numbers() -> None:
    """A few of each table, read from the paper by hand."""
    tables = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIG_DIR / "tables").glob("*.yaml")}
    assert tables.keys() == {f"table{number}" for number in range(1, 8)}
    assert {key: len(table["rows"]) for key, table in tables.items()} == {
        **{"table1": 9, "table2": 24, "table3": 14, "table4": 2, "table5": 16, "table6": 8, "table7": 5}
    }
    [b7] = [row for row in tables["table2"]["rows"] if row["name"] == "EfficientNet-B7"]
    assert (b7["top1"], b7["top5"], b7["first_top1"], b7["parameters_m"]) == (0.843, 0.970, 0.844, 66)
    v1 = [(row["scaling"], row["top1"]) for row in tables["table3"]["rows"] if row["name"] == "MobileNetV1"]
    assert v1 == [("baseline", 0.706), ("width", 0.742), ("resolution", 0.727), ("compound", 0.756)]
    assert [row["speedup"] for row in tables["table4"]["rows"]] == [5.7, 6.1]
    assert all(0 < row["top1"] < 1 for key in ("table2", "table3", "table5", "table7") for row in tables[key]["rows"])
    cifar = [row for row in tables["table5"]["rows"] if row["name"] == "CIFAR-100"]
    assert [(row["model"], row["top1"], row["other"]["top1"]) for row in cifar] == [
        ("b0", 0.881, 0.875),
        ("b7", 0.917, 0.913),
    ]


def test_table_1_is_the_networks_own(cli: Cli) -> None:
    found = rows(cli, "table1")
    assert [row["layers_here"] for row in found] == list("112233411")
    assert [row["channels_here"] for row in found] == ["32", "16", "24", "40", "80", "112", "192", "320", "1280"]
    assert {row["same"] for row in found} == {"yes"}


def test_table_6_differs_in_the_pets_test_images_only(cli: Cli) -> None:
    found = {row["name"]: row["difference"] for row in rows(cli, "table6")}
    assert len(found) == 8
    assert {key: value for key, value in found.items() if value} == {"Oxford-IIIT Pets": "test +300"}


def test_runs_are_known_by_their_networks(cli: Cli, finished: Finished) -> None:
    for seed, top1 in enumerate((0.76, 0.77, 0.762)):
        finished(f"any{seed}", "model=b0", "model.dropout=0.1", f"seed={seed}", top1=top1)
    finished("b0-in-name-only", "model=b1", "model.width=1.5", top1=0.9)
    flowers = ("data=folder", "data.root=x/flowers17")
    finished("other-data", "model=b0", "model.width=2", *flowers, top1=0.99, classes=17, images=1000)
    found = {row["scaling"]: row for row in rows(cli, "table7")}
    assert float(found["baseline"]["top1_here"]) == pytest.approx(0.764)
    assert float(found["baseline"]["top1_here_spread"]) == pytest.approx(0.00529150, rel=1e-4)
    assert float(found["baseline"]["top1_difference"]) == pytest.approx(-0.009)
    assert found["baseline"]["run"] == "ImageNet, 350 epochs, any0 and 2 more"
    assert (found["baseline"]["from_paper"], found["depth"]["from_paper"]) == ("", "top1_here")
    # Of another data set: shown, with its name, and not compared.
    wide = found["width"]
    assert (wide["top1_here"], wide["run"], wide["top1_difference"]) == (
        "0.99",
        "flowers17, 350 epochs, other-data",
        "",
    )
    only = cli("table", "table7", "data=imagenet").out
    assert "flowers17" not in only
    assert "77.3  76.4 ± 0.53  -0.9" in only


def test_table_5_compares_on_the_rows_own_data_set(finished: Finished, tmp_path: Path) -> None:
    finished("mine", "model=b0", "data=cifar10", "init_from=x", top1=0.979, classes=10, images=50000)
    table = paper.table(5)
    asked = [row for row in table["rows"] if row["model"] == "b0"]
    counted = paper.networks(asked)
    runs = paper.finished_runs(str(tmp_path / "runs"))
    ten, hundred = network_table({**table, "rows": asked}, counted, runs).rows
    # B0's 1,281 weights a class are all that changes.
    assert (ten["parameters_m_here"], hundred["parameters_m_here"]) == (4.020358, 5.288548 - 900 * 1281 / 1e6)
    assert (ten["top1_here"], ten["from_paper"]) == (0.979, [])
    assert ten["top1_difference"] == pytest.approx(-0.002)
    assert (hundred["top1_here"], hundred["from_paper"]) == (0.881, ["top1_here"])


def test_finetuned_runs_stand_in_table_5_and_others_elsewhere(cli: Cli, finished: Finished) -> None:
    finished("scratch", "model=b0", "epochs=90", top1=0.75)
    finished("longer", "model=b0", top1=0.76)
    finished("tuned", "model=b0", "init_from=runs/longer", top1=0.80)
    finished("taught", "model=b0", "recipe=distill", "distill.teacher=x", "epochs=60", top1=0.81)
    made = {"classes": 10, "images": 50000}
    finished("cifar", "model=b0", "data=cifar10", top1=0.97, **made)
    finished("cifar-tuned", "model=b0", "data=cifar10", "recipe=finetune", "init_from=runs/longer", top1=0.95, **made)
    row = rows(cli, "table2", "data=imagenet")[0]
    assert (row["top1_here"], row["run"]) == ("0.76", "ImageNet, 350 epochs, longer, the best of 2 trainings")
    assert "77.3   81.0  +3.7" in cli("table", "table7", "--", "distill.teacher=x").out
    row = rows(cli, "table5")[0]
    assert (row["top1_here"], row["run"]) == ("0.95", "CIFAR-10, 100 epochs from runs/longer, cifar-tuned")
    assert "77.3   80.0  +2.7" in cli("table", "table7", "--", "init_from=runs/longer").out


def test_trainings_have_their_networks_recipe(cli: Cli) -> None:
    out = cli("table", "table3", "run=plan", "rate=100").out
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  table3-")]
    recipes = {name.split("-")[1]: name.split("-")[4] for name in names}
    assert recipes == {"mobilenet_v1": "mobilenet", "mobilenet_v2": "mobilenet", "resnet50": "resnet"}
    assert "recipe=efficientnet" in cli("table", "table3", "run=plan", "recipe=efficientnet", "--", "optim.x=1").err
    done = cli("table", "table3", "run=plan", "data=cifar10", "recipe=demo", "--", "optim.x=1")
    [words] = [line for line in done.err.splitlines() if "there is no such training as" in line]
    assert (words.count("data="), words.count("recipe=")) == (1, 1)


def test_a_real_run_on_a_base_of_ones_own(cli: Cli, trained: Path) -> None:
    base = ("model.width=0.25", "model.depth=0.279", "model.resolution=32")
    done = cli("table", "table7", f"run_root={trained.parent}", "format=csv", "--", *base)
    first, *rest = csv.DictReader(io.StringIO(done.out))
    best = json.loads((trained / "summary.json").read_text())["best"]
    assert float(first["top1_here"]) == pytest.approx(best["val_ema/top1"], rel=1e-5)
    assert first["source"] == "model=b0 model.width=0.25 model.depth=0.279 model.resolution=32"
    assert all(row["top1_here"] == "" for row in rest)  # the paper's is another network's
    assert "from_paper" not in first
    assert rest[-1]["source"] == "model=b0 model.depth=0.3906 model.width=0.3 model.resolution=42"
    assert "multiply_adds_b_difference" not in first
    terminal = cli("table", "table7", f"run_root={trained.parent}", "--", *base).out
    assert f"The networks here are not the paper's: {' '.join(base)}" in terminal


def test_an_unreadable_run_is_told_and_left_out(cli: Cli, finished: Finished) -> None:
    folder = finished("broken", "model=b0", top1=0.7)
    (folder / "summary.json").write_text("{")
    done = cli("table", "table7")
    assert done.status == 0
    assert "warning: runs/broken is left out, as its config.yaml or a .json file is damaged\n" in done.err
    assert "No finished run was found in runs/." in done.out


def test_a_plan_prices_what_is_missing_and_writes_nothing(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    finished("there", "model=b0", "data.root=/images", top1=0.77)
    words = ("table7", "run=plan", "rate=100", "data.root=/images", "--", "epochs=10")
    before = sorted(tmp_path.rglob("*"))
    done = cli("table", *words)
    assert done.status == 0, done.err
    assert "table7: 5 trainings, 0 finished, 5 to do" in done.out
    line = next(line for line in done.out.splitlines() if "table7-b0-depth-" in line)
    assert line.split()[0] == "table7-b0-depth-imagenet-efficientnet-seed0"
    assert "10 epochs x 1,281,167 images x 1.575 B multiply-adds" in line
    lines = [line for line in done.out.splitlines() if line.startswith("  table7-")]
    assert len({(len(line), line.index(" epochs x"), line.index(":")) for line in lines}) == 1
    # 10 x 1,281,167 images at 1.575 billion each, 100 billion a second
    assert line.endswith(f"{10 * 1281167 * 1.575 / 100 / 86400:.1f} days")
    assert "table7: 5 trainings, 1 finished, 4 to do" in cli("table", *words[:-2]).out
    assert sorted(tmp_path.rglob("*")) == before


def shards(folder: Path, classes: int, images: int) -> str:
    """Write shards of images that nobody reads, and return the words that choose them."""
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for number in range(images):
                for name, content in ((f"{number}.cls", str(number % classes).encode()), (f"{number}.png", b"x")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"data.root={folder}"


def test_only_runs_on_the_data_set_asked_for_count_wherever_it_lies(
    cli: Cli, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of the paper's is known by its counts, not by its folder; another one by its folder too."""
    monkeypatch.setattr(paper, "_known", lambda: (("Twelve", 3, 12),))
    roots = {}
    for name, images in (("mine", 12), ("moved", 12), ("other", 9), ("third", 9)):
        (tmp_path / name).mkdir()
        roots[name] = shards(tmp_path / name, 3, images)
    patterns = ("data.train=train-0.tar", "data.val=val-0.tar")
    for name, images in (("mine", 12), ("other", 9), ("third", 9)):
        finished(f"on-{name}", "model=b0", "data=shards", roots[name], *patterns, top1=0.4, classes=3, images=images)
    for asked, found in (("moved", "Twelve, 350 epochs, on-mine"), ("third", "third, 350 epochs, on-third")):
        row = rows(cli, "table7", "data=shards", roots[asked], *patterns)[0]
        assert row["run"] == found


def test_a_plan_takes_neither_another_data_set_nor_a_shorter_run_for_done(
    cli: Cli, finished: Finished, few_digits: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(few_digits, tmp_path / "copy" / "digits")
    words = ("model=b0", "data=digits", "data.expected=null", "batch_size=8", "epochs=2", "schedule.warmup_epochs=0")
    made = {"classes": 10, "images": 80, "top1": 0.5}
    finished("cut", *words, f"data.root={few_digits}", "max_steps=7", steps=7, **made)
    asked = ("table7", "run=plan", "rate=100", "data=digits", f"data.root={few_digits}", "--", *words[2:])
    done = cli("table", *asked)
    assert "table7: 5 trainings, 0 finished, 5 to do" in done.out, done.err
    assert "warning: runs/cut is left out, as it ended after 7 steps, not 20 (max_steps)" in done.err
    cut = cli("table", *asked, "max_steps=7").out
    assert "table7: 5 trainings, 1 finished, 4 to do" in cut
    assert "  7 steps x 8 images x 1.57" in cut
    finished("whole", *words, f"data.root={few_digits}", "max_steps=7", **made)  # it went on from there
    assert "5 trainings, 1 finished" in cli("table", *asked).out
    elsewhere = [text.replace(str(few_digits), str(copy)) for text in asked]
    assert "5 trainings, 0 finished" in cli("table", *elsewhere).out


def test_a_run_cut_short_is_in_no_table_but_where_its_length_is_asked_for(cli: Cli, finished: Finished) -> None:
    finished("cut", "model=b0", "max_steps=100", steps=100, top1=0.3)
    done = cli("table", "table7", "format=csv")
    assert "cut" not in done.out
    assert "warning: runs/cut is left out, as it ended after 100 steps, not 109,475 (max_steps)" in done.err
    assert "ImageNet, 350 epochs cut short at step 100, cut" in cli("table", "table7", "--", "max_steps=100").out


def test_an_overlay_may_say_where_trainings_end_and_what_they_train(cli: Cli, finished: Finished) -> None:
    finished("tiny", "debug=tiny", "model=b0", steps=4, top1=0.3)
    first = next(csv.DictReader(io.StringIO(cli("table", "table7", "format=csv", "--", "debug=tiny").out)))
    assert float(first["top1_here"]) == 0.3
    assert first["source"] == "model=b0"
    assert float(first["multiply_adds_b_here"]) < 0.01  # at 32 pixels


def test_a_seed_trained_twice_counts_once(cli: Cli, finished: Finished) -> None:
    for name, seed, top1 in (("a", 0, 0.70), ("b", 1, 0.72), ("b-again", 1, 0.78)):
        finished(name, "model=b0", f"seed={seed}", top1=top1)
    done = cli("table", "table7", "format=csv")
    assert "ImageNet, 350 epochs, a and 1 more" in done.out
    assert "warning: runs/b-again is left out, as runs/b is of the same configuration and seed" in done.err


def test_trainings_may_go_to_a_new_folder(cli: Cli) -> None:
    done = cli("table", "table7", "run=plan", "rate=100", "run_root=new/runs", "data.root=/images")
    assert done.status == 0, done.err
    assert "table7: 5 trainings, 0 finished, 5 to do" in done.out
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table9",), "table9 is no table: give one of table1, table2,"),
        (("table2", "format=html"), "format='html' must be terminal or markdown or csv or latex"),
        (
            ("table2", "run_root=nowhere"),
            "run_root=nowhere does not exist: give the folder that holds the runs' folders",
        ),
        (("table2", "run_root=/dev/null"), "run_root=/dev/null is no folder: give the folder that holds the runs'"),
        (("table2", "run=yes"), "run='yes' must be True or False or plan"),
        (("table2", "rate=3"), "rate=3 has no effect without run=plan or run=true"),
        (("table2", "rate=0", "run=plan"), "rate=0 must be above 0"),
        (("table7", "seeds=[]", "run=plan"), "seeds=[] must be different numbers from 0 to below 2 ** 63"),
        (("table7", "seeds=[0,0]", "run=true"), "seeds=[0, 0] must be different numbers from 0 to below 2 ** 63"),
        (("table2", "outptu=x"), "outptu is not a key of the configuration: did you mean output?"),
        (("table2", "output=no/x.md"), "output=no/x.md: its folder does not exist"),
        (("table1", "run=plan"), "run is not a key of effnet-table table1, but of table2, table3, table5, table7"),
        (("table2", "threads=1"), "threads=1 is for the trainings: give it after --, as in: -- threads=1"),
        (("table2", "model.width=2"), "model.width=2 is for the trainings: give it after --"),
        (("table7", "--", "model.widht=2"), "model.widht is not a key of the configuration: did you mean model.width"),
        (("table7", "--", "max_steps=few"), "max_steps=few must be a whole number or null"),
        (("table7", "data=imagnet"), "data=imagnet is not known: did you mean data=imagenet"),
        (("table5", "run=plan"), "new_classifier=true needs weights to put it on: give init_from=..."),
        (("table4", "rounds=0"), "rounds=0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(cli: Cli, words: tuple[str, ...], message: str) -> None:
    done = cli("table", *words)
    assert done.status == 2
    assert message in done.err


def test_a_table_goes_to_a_file(cli: Cli) -> None:
    printed = cli("table", "table6", "format=latex").out
    assert cli("table", "table6", "format=latex", "output=t.tex").out == "written to t.tex\n"
    assert Path("t.tex").read_text() == printed


def test_words_for_trainings() -> None:
    words = ["run=true", "data=digits", "recipe=demo", "seeds=[0,1]", "--", "init_from=a b/{model}"]
    assert with_overrides(words) == [
        "run=true",
        "seeds=[0,1]",
        'overrides=["data=digits", "recipe=demo", "init_from=a b/{model}"]',
    ]
    assert with_overrides(["format=csv"]) == ["format=csv"]


@pytest.mark.slow
def test_table_4_measures(cli: Cli) -> None:
    done = cli("table", "table4", "rounds=1", "warmup=1", "measured=times.json", "format=csv")
    assert done.status == 0, done.err
    found = {row["name"]: row for row in csv.DictReader(io.StringIO(done.out))}
    times = {name: float(row["mean_s"]) for name, row in found.items()}
    assert times["EfficientNet-B1"] < times["ResNet-152"] < times["EfficientNet-B7"]
    assert float(found["ResNet-152"]["speedup_here"]) == pytest.approx(
        times["ResNet-152"] / times["EfficientNet-B1"], rel=1e-4
    )
    assert found["GPipe"]["stands"] == "nasnetalarge"
    written = json.loads(Path("times.json").read_text())
    assert written["rows"]["EfficientNet-B7"]["network"] == "b7"
    assert written["machine"]["command"].startswith("effnet-table table4 rounds=1")
