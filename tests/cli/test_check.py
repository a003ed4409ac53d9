"""A wrong key or value is named, with what is wanted, before anything is built."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from effnet_train.cli import check

Compose = Callable[..., dict[str, Any]]


def changed(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    node = config
    for name in path:
        node = node[name]
    node[last] = value
    return config


WRONG = {
    "epochs": ("abc", "epochs='abc' must be a finite number"),
    "ema_decay": (float("nan"), "ema_decay=nan must be a finite number"),
    "batch_size": (1.5, "batch_size=1.5 must be a whole number"),
    "accumulate": (0, "accumulate=0 must be at least 1"),
    "seed": (-1, "seed=-1 must be at least 0"),
    "max_steps": (0, "max_steps=0 must be at least 1"),
    "clip_norm": (0, "clip_norm=0 must be more than 0, or null for no clipping"),
    "cuda_graph": (1, "cuda_graph=1 must be true or false"),
    "compile": (1, "compile=1 must be true or false"),
    "ranks": ("two", "ranks='two' must be a whole number or auto"),
    "workers": (-1, "workers=-1 must be at least 0"),
    "threads": (0, "threads=0 must be at least 1"),
    "select_by": ("val", r"select_by='val' must be val_ema/top1 or .* or val/loss"),
    "init_from": (3, "init_from=3 must be text or null"),
    "name": ("", "name= is empty: the run needs a folder of its own in run_root"),
    "run_root": (None, "run_root=null must be text"),
    "log_every": (3, r"log_every=3 must be keys with values: give log_every\.steps=, log_every\.epochs="),
    "log_every.steps": (1.5, r"log_every\.steps=1\.5 must be a whole number or null"),
    "save_every.epoch": (1, r"save_every\.epoch is not a key of Every: did you mean save_every\.epochs\?"),
    "checkpoint.keep": (True, r"checkpoint\.keep=True must be a whole number"),
    "checkpoint.background": (1, r"checkpoint\.background=1 must be true or false"),
    "checkpoint.milestones": (
        "all",
        r"checkpoint\.milestones='all' must be a finite number or a list of finite numbers or null",
    ),
    "checkpoint.remote": (3, r"checkpoint\.remote=3 must be text or null"),
    "model.width": ("abc", r"model\.width='abc' must be a finite number"),
    "model.resolution": (33.5, r"model\.resolution=33\.5 must be a whole number"),
    "model.checkpointing": ("no", r"model\.checkpointing='no' must be true or false"),
    "model.fused": ("yes", r"model\.fused='yes' must be true or false or auto"),
    "model.widht": (1.0, r"model\.widht is not a key of EfficientNet: did you mean model\.width\?"),
    "model.num_classes": (5, r"model\.num_classes=5 is not to be set: the data set's number of classes is taken"),
    "optim.lr": (0.1, r"optim\.lr=0\.1 is not to be set: the schedule gives it, set schedule\.lr_per_256"),
    "optim.alpha": ("abc", r"optim\.alpha='abc' must be a finite number"),
    "schedule.decay": ("abc", r"schedule\.decay='abc' must be a finite number"),
    "schedule.lr_per_256": (float("inf"), r"schedule\.lr_per_256=inf must be a finite number"),
    "loss.label_smoothing": (None, r"loss\.label_smoothing=null must be a finite number"),
    "augment.area": ("all", r"augment\.area='all' must be a list or null"),
    "augment.policy.fill": ("abc", r"augment\.policy\.fill='abc' must be a whole number"),
    "augment.policy": ("v0", r"augment\.policy='v0' must be another kind of value or null"),
    "data.root": (None, r"data\.root=null must be text"),
    "data.minival": ("many", r"data\.minival='many' must be a whole number"),
    "data.expected": (1000, r"data\.expected=1000 must be keys with values or null"),
    "data.preprocess.mean": (0.5, r"data\.preprocess\.mean=0\.5 must be a list"),
    "loggers.csv.filename": (3, r"loggers\.csv\.filename=3 must be text"),
    "foo": (1, "foo is not a key of the configuration: remove it"),
    "batchsize": (1, r"batchsize is not a key of the configuration: did you mean batch_size"),
}


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return {}


@pytest.fixture
def config(default: dict[str, Any], compose: Compose) -> dict[str, Any]:
    if not default:
        default |= compose("train")
    return default


def test_the_default_is_right(config: dict[str, Any]) -> None:
    check.check_config(config, check.TRAIN)


@pytest.mark.parametrize(("key", "value", "message"), [(key, *rest) for key, rest in WRONG.items()], ids=WRONG)
def test_wrong(config: dict[str, Any], key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        check.check_config(changed(config, key, value), check.TRAIN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epochs", 1), ("ranks", 2), ("max_steps", 5), ("clip_norm", 1), ("name", 7), ("seed", 2**63 - 1)),
        *(("augment.policy", None), ("augment.area", [0.1, 1]), ("loggers.csv", None), ("model.width", 2)),
        *(("data.expected", None), ("init_from", "x"), ("log_every.steps", None), ("select_by", "val/loss")),
    ],
)
def test_right(config: dict[str, Any], key: str, value: object) -> None:
    check.check_config(changed(config, key, value), check.TRAIN)


def test_evaluation_is_checked_by_its_own_keys(compose: Compose) -> None:
    config = compose("eval", "checkpoint=x")
    check.check_config(config, check.EVAL)
    for key, value, message in (
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("resolution", "large", "resolution='large' must be a whole number or a list of whole numbers or null"),
        ("checkpoint", 3, "checkpoint=3 must be text or a list"),
        ("classes", "no", "classes='no' must be same or any or subset or index"),
        ("crops", 10, "crops=10 must be 1 or 5"),
        ("flip", "no", "flip='no' must be true or false"),
        ("epochs", 3, "epochs is not a key of the configuration: remove it"),
    ):
        with pytest.raises(ValueError, match=message):
            check.check_config(changed(config, key, value), check.EVAL)
