"""Every option of every group composes, and every key in it is an argument of what it builds."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from effnet_train.cli import check
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.engine.every import Every
from effnet_train.engine.saving import Checkpoints

Compose = Callable[..., dict[str, Any]]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def nodes(node: object, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every mapping with a `_target_`, and where it stands."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, part in node.items():
            yield from nodes(part, f"{key}.{name}".lstrip("."))


def target(node: dict[str, Any]) -> Any:
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def assert_arguments_accepted(config: dict[str, Any]) -> int:
    found = list(nodes(config))
    for key, node in found:
        unknown = node.keys() - {"_target_"} - check.arguments_of(target(node)).keys()
        assert not unknown, f"{key}: {unknown}"
    return len(found)


GROUPS = ("data", "augment", "optim", "schedule", "loggers", "debug", "cluster")
MODELS = options("model")
TURNS = max(len(options(group)) for group in ("model", *GROUPS))


@pytest.mark.parametrize("place", range(TURNS))
def test_every_option_composes_and_its_keys_are_arguments(compose: Compose, place: int) -> None:
    """Turn by turn, with the next option of each group: every one of them is met."""
    model = MODELS[place % len(MODELS)]
    chosen = {group: options(group)[place % len(options(group))] for group in GROUPS}
    recipe = options("recipe")[place % len(options("recipe"))]
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    config = compose("train", f"model={model}", f"recipe={recipe}", *overrides)
    assert_arguments_accepted(config)
    check.check_config({**config, "data": {**config["data"], **asked_for(config["data"])}}, check.TRAIN)
    assert config["name"] == f"{model}-{chosen['data']}-{recipe}-seed0"


def asked_for(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a user has to give."""
    values = {"root": "/data", "dataset": "CIFAR10", "train": [{"train": True}], "val": [{"train": False}]}
    return {key: values[key] for key, value in data.items() if value == "???"}


def test_every_group_has_its_turns() -> None:
    assert {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()} == {
        *GROUPS,
        "model",
        "recipe",
        "preprocess",  # by data
        *("space", "searcher"),  # of effnet-search
        "tables",  # the paper's, no choices
        "hydra",
    }


@pytest.mark.parametrize("space", options("space"))
@pytest.mark.parametrize("searcher", options("searcher"))
def test_every_space_and_every_searcher_are_their_constructors_arguments(
    compose: Compose, space: str, searcher: str
) -> None:
    config = compose("search_run", f"space={space}", f"searcher={searcher}", "data.root=x")
    assert_arguments_accepted(config)
    check.check_config(config, check.SEARCH_RUN)
    sizes = instantiate(config["space"], _convert_="all").sizes
    assert len(instantiate(config["searcher"], sizes=sizes, seed=0).ask(1)[0]) == len(sizes)
    # What a user leaves away is what stands in the YAML.
    defaults = {name: p.default for name, p in inspect.signature(target(config["searcher"])).parameters.items()}
    own = {key: value for key, value in config["searcher"].items() if key != "_target_"}
    assert own == {key: value for key, value in defaults.items() if key not in ("sizes", "seed")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", options("recipe"))
@pytest.mark.parametrize("model", MODELS)
def test_every_model_with_every_recipe(compose: Compose, model: str, recipe: str) -> None:
    """The model chosen on the command line stands, whatever the recipe would choose; its own regularisation too.

    Except in the proxies of a search, which drop nothing, whatever the size, in FixRes, as in its authors' code, and
    for a noisy student.
    """
    config = compose("train", f"model={model}", f"recipe={recipe}")
    own = compose("train", f"model={model}", "recipe=efficientnet")
    changed = ("search_proxy", "fixres", "noisy_student")
    kept = ("width", "depth", "resolution", *(() if recipe in changed else ("dropout",)))
    assert {key: config["model"][key] for key in kept} == {key: own["model"][key] for key in kept}
    if recipe == "search_proxy":
        assert config["model"]["dropout"] == config["model"]["drop_connect"] == 0
    assert assert_arguments_accepted(config) >= 8


@pytest.mark.parametrize("data", ["cifar10", "digits", "folder", "imagenet"])
def test_data_sets_compose_for_evaluation(compose: Compose, data: str) -> None:
    config = compose("eval", f"data={data}", "+model.resolution=32", "checkpoint=x")
    assert assert_arguments_accepted(config) == 2
    assert "preprocess" in config["data"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=sgd", "schedule=cosine", "augment=inception", "loggers=wandb"),
        ("optim=adamw", "schedule=constant", "augment=randaugment", "loggers=mlflow"),
        ("recipe=demo", "augment=none", "loggers=none"),
        ("recipe=demo", "schedule=constant", "augment=small"),
    ],
    ids=lambda overrides: "-".join(part.partition("=")[2] for part in overrides),
)
def test_the_parts_are_built(compose: Compose, overrides: tuple[str, ...]) -> None:
    config = compose("train", *overrides)
    for key in ("augment", "schedule", "loss", "mixing"):
        assert isinstance(instantiate(config[key]), target(config[key]))
    for logger in config["loggers"].values():
        assert isinstance(instantiate(logger), target(logger))


@pytest.mark.parametrize(
    ("command", "types"), [("train", check.TRAIN), ("eval", check.EVAL), ("search_run", check.SEARCH_RUN)]
)
def test_the_checks_know_the_top_level_keys_and_no_others(compose: Compose, command: str, types: dict) -> None:
    assert compose(command).keys() == types.keys()


def test_frequencies_and_checkpoints_are_their_constructors_arguments(compose: Compose) -> None:
    config = compose("train")
    for key in ("log_every", "evaluate_every", "save_every"):
        Every(**config[key])
    Checkpoints(Path(), **config["checkpoint"])


def test_the_default_is_the_papers_recipe(compose: Compose) -> None:
    """The table of the authors' recipe, by hand."""
    config = compose("train")
    assert config["optim"] == {
        "_target_": "timm.optim.rmsprop_tf.RMSpropTF",
        **{"alpha": 0.9, "momentum": 0.9, "eps": 1e-3, "weight_decay": 1e-5},
    }
    assert config["schedule"] == {
        "_target_": "effnet_train.optim.schedules.Exponential",
        **{"lr_per_256": 0.016, "decay": 0.97, "decay_epochs": 2.4, "warmup_epochs": 5.0},
    }
    assert (config["epochs"], config["batch_size"], config["ema_decay"]) == (350, 4096, 0.9999)
    assert config["loss"]["label_smoothing"] == 0.1
    assert config["augment"]["policy"]["policy"] == "v0"
    assert (config["augment"]["area"], config["augment"]["flip"]) == ([0.08, 1.0], 0.5)
    assert (config["clip_norm"], config["mixing"]["mixup_alpha"], config["mixing"]["cutmix_alpha"]) == (None, 0, 0)
    assert (config["model"]["drop_connect"], config["model"]["bn_momentum"]) == (0.2, 0.01)
    assert config["data"]["preprocess"]["crop_padding"] == 32
