import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from effnet_train.analysis.families import families
from effnet_train.analysis.runs import DataSet, distinct, find_runs, of_length, over_seeds, same_shape, shape_of

MODEL = {"_target_": "x.EfficientNet", "width": 1.0, "depth": 1.0, "resolution": 224, "dropout": 0.2, "se_ratio": 0.25}


def write(
    folder: Path,
    *,
    top1: float = 0.5,
    seed: int = 0,
    images: int = 100,
    epochs: int = 3,
    steps: int | None = None,
    root: str = "data/some",
    **model: Any,
) -> Path:
    """Write a run of batches of 16, of its whole length if `steps` don't say otherwise."""
    folder.mkdir(parents=True)
    chosen = {**MODEL, **model}
    data = {"root": root, "minival": 0, "preprocess": {"resolution": chosen["resolution"]}}
    config = {"seed": seed, "name": folder.name, "epochs": epochs, "batch_size": 16, "select_by": "val_ema/top1"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model": chosen, "data": data, "workers": seed}))
    best = {"val/top1": 0.9, "val_ema/top1": top1, "val_ema/top5": 0.8}
    whole = math.ceil(epochs * images / 16)
    (folder / "summary.json").write_text(json.dumps({"best": best, "steps": steps or whole}))
    (folder / "model.json").write_text(json.dumps({"classes": ["a", "b"], "images": images}))
    return folder


def test_scores_are_those_that_selected(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "er" / "one", top1=0.7)
    [run] = find_runs(tmp_path)[0]
    assert (run.top1, run.top5, run.data.name) == (0.7, 0.8, "some")


def test_the_mean_over_classes_stands_for_top1_where_it_was_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", top1=0.7)
    summary = json.loads((folder / "summary.json").read_text())
    summary["best"]["val_ema/per_class"] = 0.65
    (folder / "summary.json").write_text(json.dumps(summary))
    [run] = find_runs(tmp_path)[0]
    assert run.top1 == 0.65


def test_held_out_images_give_way_to_the_validation_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", images=75)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["minival"] = 25
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    scores = {"best": {"val_ema/top1": 0.9}, "test": {"test/top1": 0.6, "test/top5": 0.7}, "steps": 15}
    (folder / "summary.json").write_text(json.dumps(scores))
    [run] = find_runs(tmp_path, [("Hundred", 2, 100)])[0]
    assert (run.top1, run.data) == (0.6, DataSet("Hundred", 2, 100, None))
    assert run.steps == run.whole_steps  # 3 epochs of the 75 images that are trained on


def test_what_has_not_ended_is_no_run_and_what_is_damaged_is_told(tmp_path: Path) -> None:
    (write(tmp_path / "running") / "summary.json").unlink()
    (write(tmp_path / "cut") / "summary.json").write_text('{"best": {"val_em')
    (write(tmp_path / "old") / "config.yaml").write_text("seed: 1\n")
    write(tmp_path / "good")
    runs, wrong = find_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["good"]
    assert [str(tmp_path / name) in text for name, text in zip(("cut", "old"), wrong, strict=True)] == [True, True]
    assert [text.partition(" is left out, as ")[2] for text in wrong] == [
        "its config.yaml or a .json file is damaged",
        "its files lack 'data', which a run's have",
    ]


def test_runs_that_differ_in_seed_and_free_keys_are_one(tmp_path: Path) -> None:
    values = [0.5, 0.6, 0.64]
    for seed, top1 in enumerate(values):
        write(tmp_path / f"s{seed}", seed=seed, top1=top1)
    write(tmp_path / "longer", epochs=4, top1=0.9)
    groups = {len(group.runs): group for group in over_seeds(find_runs(tmp_path)[0], ["workers"])}
    assert groups.keys() == {1, 3}
    assert groups[3].top1 == pytest.approx(statistics.mean(values))
    assert groups[3].spread == pytest.approx(statistics.stdev(values))
    assert (groups[1].spread, groups[1].describe()) == (None, "some, 4 epochs, longer")
    assert len(over_seeds(find_runs(tmp_path)[0])) == 4


def test_runs_cut_short_are_whole_to_nobody(tmp_path: Path) -> None:
    """Whole are 3 epochs of 100 images in batches of 16: 18.75 steps, so 19."""
    write(tmp_path / "whole", seed=0)
    write(tmp_path / "short", seed=1, steps=5)
    found = find_runs(tmp_path)[0]
    kept, told = of_length(found, None)
    assert [run.folder.name for run in kept] == ["whole"]
    assert told == [f"{tmp_path}/short is left out, as it ended after 5 steps, not 19 (max_steps)"]
    assert [run.folder.name for run in of_length(found, 5)[0]] == ["short"]
    assert [run.folder.name for run in of_length(found, 100)[0]] == ["whole"]
    assert len(over_seeds(found, ["workers"])) == 2


def test_data_sets_of_one_kind_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", seed=0, root=f"{tmp_path}/A/shards")
    write(tmp_path / "b", seed=1, root=f"{tmp_path}/B/shards")
    write(tmp_path / "c", seed=2, root=f"{tmp_path}/A/../A/shards")
    write(tmp_path / "d", seed=3, root=f"{tmp_path}/A/shards", images=101)
    groups = over_seeds(find_runs(tmp_path)[0], ["workers", "data.root"])
    assert sorted([run.folder.name for run in group.runs] for group in groups) == [["a", "c"], ["b"], ["d"]]
    # A set of the paper's is the same wherever it lies.
    known = find_runs(tmp_path, [("Hundred", 2, 100)])[0]
    assert sorted(len(group.runs) for group in over_seeds(known, ["workers", "data.root"])) == [1, 3]


def test_the_same_training_counts_once(tmp_path: Path) -> None:
    for name, seed, top1 in (("one", 0, 0.5), ("two", 1, 0.6), ("two-again", 1, 0.8)):
        write(tmp_path / name, seed=seed, top1=top1)
    kept, told = distinct(find_runs(tmp_path)[0], ["workers"])
    assert [run.folder.name for run in kept] == ["one", "two"]
    assert told == [f"{tmp_path}/two-again is left out, as {tmp_path}/two is of the same configuration and seed"]


def test_shapes(tmp_path: Path) -> None:
    shape = shape_of(MODEL, 224)
    assert same_shape(shape, shape_of({**MODEL, "dropout": 0.5, "width": 1.0 + 1e-9}, 224))
    assert not same_shape(shape, shape_of({**MODEL, "width": 1.1}, 224))
    assert not same_shape(shape, shape_of(MODEL, 240))
    assert not same_shape(shape, shape_of({**MODEL, "se_ratio": 0.0}, 224))


def cost(run: Any) -> int:
    return round(run.shape["depth"] * run.shape["width"] ** 2 * run.shape["resolution"] ** 2)


def bases_of(root: Path, networks: dict[str, tuple[float, float, int]], base: str | None = None) -> dict[str, str]:
    """Return what `families` makes of networks (depth, width, resolution): the base of each that has one."""
    for name, (depth, width, resolution) in networks.items():
        write(root / name, depth=depth, width=width, resolution=resolution)
    found, left_out = families(find_runs(root)[0], cost, base=base and root / base)
    owners = {m.scores.first.folder.name: f.base.scores.first.folder.name for f in found for m in f.members}
    assert {run.folder.name for run in left_out} == networks.keys() - owners.keys() - {*owners.values()}
    return owners


NANO = {"nano": (0.279, 0.513, 32)}
PUBLISHED = {"b0": (1.0, 1.0, 224), "b1": (1.1, 1.0, 240), "b2": (1.2, 1.1, 260), "b3": (1.4, 1.2, 300)}
PAPER_STUDY = {"b0": (1.0, 1.0, 224), "deep": (4.0, 1.0, 224), "wide": (1.0, 2.0, 224), "all": (1.4, 1.2, 291)}
NANO_STUDY = {**NANO, "nano-deep": (1.0, 0.513, 32), "nano-fine": (0.279, 0.513, 48), "nano-all": (0.33, 0.56, 36)}
SEARCH = {"base": (0.279, 0.513, 16), "x": (0.33, 0.56, 18), "y": (0.34, 0.56, 18), "z": (0.30, 0.60, 18)}


def test_a_smaller_network_beside_them_is_not_the_base_of_all(tmp_path: Path) -> None:
    assert bases_of(tmp_path / "a", NANO | PUBLISHED) == dict.fromkeys(("b1", "b2", "b3"), "b0")
    without_b1 = {name: network for name, network in PUBLISHED.items() if name != "b1"}
    assert bases_of(tmp_path / "b", NANO | without_b1) == dict.fromkeys(("b2", "b3"), "b0")
    assert bases_of(tmp_path / "c", NANO | PAPER_STUDY) == dict.fromkeys(("deep", "wide", "all"), "b0")


def test_two_studies_in_one_folder_have_a_base_each(tmp_path: Path) -> None:
    assert bases_of(tmp_path, NANO_STUDY | PAPER_STUDY) == {
        **dict.fromkeys(("nano-deep", "nano-fine", "nano-all"), "nano"),
        **dict.fromkeys(("deep", "wide", "all"), "b0"),
    }


def test_a_searchs_candidates_are_scaled_from_its_base(tmp_path: Path) -> None:
    """Two of which may differ in one dimension, and none is the base of the other."""
    assert bases_of(tmp_path / "a", SEARCH) == dict.fromkeys("xyz", "base")
    [family], _ = families(find_runs(tmp_path / "a")[0], cost)
    assert not family.grows
    chain = {"base": (0.3, 0.5, 16), "one": (0.36, 0.55, 18), "two": (0.43, 0.6, 21)}
    assert bases_of(tmp_path / "b", chain) == dict.fromkeys(("one", "two"), "base")
    [family], _ = families(find_runs(tmp_path / "b")[0], cost)
    assert family.grows


def test_a_base_can_be_chosen(tmp_path: Path) -> None:
    owners = bases_of(tmp_path, NANO | PUBLISHED, base="nano")
    assert owners == dict.fromkeys(PUBLISHED, "nano")
    assert bases_of(tmp_path / "else", PUBLISHED, base="b2") == {"b3": "b2"}


def test_families(tmp_path: Path) -> None:
    """Multiply-adds here are depth x width² x resolution²."""
    scaled = {
        "base": {},
        "deep": {"depth": 2.0},
        "wide": {"width": 1.5, "dropout": 0.3},
        "fine": {"resolution": 448},
        "all": {"depth": 1.2, "width": 1.1, "resolution": 258},
        "two": {"depth": 2.0, "width": 1.5},
        "narrower": {"width": 0.9, "resolution": 448},
    }
    for name, model in scaled.items():
        for seed in (0, 1):
            write(tmp_path / f"{name}-{seed}", seed=seed, **model)
    write(tmp_path / "alone", epochs=9)

    [family], left_out = families(find_runs(tmp_path)[0], cost, ["workers"])
    assert [run.folder.name for run in left_out] == ["narrower-0"]
    assert family.base.scores.first.folder.name == "base-0"
    methods = {member.scores.first.folder.name[:-2]: member.method for member in family.members}
    one = {"deep": "depth", "wide": "width", "fine": "resolution"}
    assert methods == {**one, "all": "compound", "two": None}
    assert [member.multiply_adds for member in family.by("compound")] == [224**2, round(1.2 * 1.1**2 * 258**2)]
    assert all(len(member.scores.runs) == 2 for member in family.members)
    assert family.name == "EfficientNet at 224 pixels, some"
