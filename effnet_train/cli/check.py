"""Checks of a configuration before anything is built: a wrong key, and a value of a wrong type, are named."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from effnet_train.engine.every import Every

StopSignal = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]  # those of distributed.STOP_SIGNALS
# The top-level keys of each command, which are no constructor's arguments. The parts check themselves by theirs.
# A type given by name is imported last: torch comes with it, and an error need not wait for that.
_SHARED: Mapping[str, Any] = {
    "data": Mapping,
    **dict.fromkeys(("precision", "device"), str),
    **dict.fromkeys(("ranks", "workers"), int | Literal["auto"]),
    "batch_size": int,
}
TRAIN: Mapping[str, Any] = {
    **_SHARED,
    **dict.fromkeys(
        ("model", "augment", "optim", "schedule", "loggers", "loss", "mixing", "freeze", "progressive"), Mapping
    ),
    **dict.fromkeys(("log_every", "evaluate_every", "save_every"), Every),
    "checkpoint": "effnet_train.engine.saving.Checkpoints",
    "distill": "effnet_train.engine.teacher.Distill",
    "advprop": "effnet_train.engine.adversarial.AdvProp",
    "pseudo": "effnet_train.data.pseudo.Pseudo",
    **dict.fromkeys(("seed", "eval_batch_size"), int),
    "sync_bn": int | Literal["all"],
    **dict.fromkeys(("epochs", "ema_decay", "layer_decay"), float),
    **dict.fromkeys(("compile", "cuda_graph", "deterministic", "dry_run", "new_classifier"), bool),
    "max_steps": int | None,
    "clip_norm": float | None,
    "on_nan": Literal["stop", "skip", "rollback"],
    **dict.fromkeys(("accumulate", "threads"), int | Literal["auto"]),
    "select_by": Literal[
        *("val_ema/top1", "val_ema/top5", "val_ema/per_class", "val_ema/loss"),
        *("val/top1", "val/top5", "val/per_class", "val/loss"),
    ],
    **dict.fromkeys(("init_from", "init_source"), str | None),
    "stop_signals": list[StopSignal],
    "stop_before_end_s": float,
    "timeout_s": float | None,
    "max_restarts": int,
    "run_root": str,
    "name": str | int,
}
EVAL: Mapping[str, Any] = {
    **_SHARED,
    "checkpoint": str | list[str],
    **dict.fromkeys(("weights", "split"), str),
    "resolution": int | list[int] | None,
    "classes": "effnet_train.data.classes.Match",
    "crops": Literal[1, 5],
    "flip": bool,
    "fold": Literal["auto", True, False],
    "attack": "effnet_train.engine.adversarial.Attack",
    "source": str | list[str | None] | None,
    **dict.fromkeys(("real_labels", "details", "picture", "output"), str | None),
}
LABEL: Mapping[str, Any] = {
    **_SHARED,
    **dict.fromkeys(("checkpoint", "weights", "output"), str),
    "source": str | None,
    "split": Literal["train", "val"],
    "confidence": float,
    **dict.fromkeys(("per_class", "resolution"), int | None),
    **dict.fromkeys(("seed", "images"), int),
}
PREDICT: Mapping[str, Any] = {
    **dict.fromkeys(("checkpoint", "weights", "precision", "device", "backend"), str),
    **dict.fromkeys(("source", "cam", "output"), str | None),
    "cam_class": str | int | None,
    "resolution": int | None,
    "fold": Literal["auto", True, False],
    "format": Literal["table", "jsonl"],
    **dict.fromkeys(("top", "batch_size"), int),
    "workers": int | Literal["auto"],
}
EXPORT: Mapping[str, Any] = {
    **dict.fromkeys(("weights", "format", "device"), str),
    "fold": bool,
    **dict.fromkeys(("checkpoint", "source", "output", "push_to_hub"), str | None),
    "average": list[str] | None,
    "soup": Literal["uniform", "greedy"],
    "batch_norm": int | None,
    "data": Mapping,
    "batch_size": int,
    "workers": int | Literal["auto"],
}
DATA_VERIFY: Mapping[str, Any] = {
    "data": Mapping,
    "report": str | None,
    "min_side": int,
    "ignore": list[str],
    "workers": int | Literal["auto"],
}
DATA_STATS: Mapping[str, Any] = {
    "data": Mapping,
    "split": Literal["train", "val"],
    "resolution": int,
    "count": int | None,
    **dict.fromkeys(("output", "picture"), str | None),
    "workers": int | Literal["auto"],
}
DATA_SHOW: Mapping[str, Any] = {**TRAIN, **dict.fromkeys(("step", "count"), int), "output": str}
DATA_WRITE: Mapping[str, Any] = {
    "data": Mapping,
    **dict.fromkeys(("to", "output", "subsampling"), str),
    "quality": int,
    "megabytes": float | None,
    **dict.fromkeys(("images", "seed", "resize"), int | None),
    "workers": int | Literal["auto"],
}
BENCH_DATA: Mapping[str, Any] = {
    "data": Mapping,
    "shards": Mapping | None,
    "jobs": list[str],  # whose values the job itself looks at
    "backends": list[str],
    "workers": list[int],
    **dict.fromkeys(("rounds", "batch_size", "reads", "index"), int),
    "seconds": float,
    "output": str | None,
}
BENCH_SPEED: Mapping[str, Any] = {
    **dict.fromkeys(("models", "modes"), list[str] | None),
    "libraries": list[str],
    **dict.fromkeys(("resolution", "batch_size"), int | None),
    **dict.fromkeys(("precision", "device"), str),
    "threads": int | Literal["auto"],
    "rounds": int,
    "seconds": float,
    "wait_s": float | None,
    **dict.fromkeys(("memory", "kinds"), bool),
    "output": str | None,
}
BENCH_TRAIN: Mapping[str, Any] = {**BENCH_SPEED, "own_modes": list[str] | None}
BENCH_STARTUP: Mapping[str, Any] = {"rounds": int, "output": str | None}
SCALE_APPLY: Mapping[str, Any] = {
    "model": Mapping,
    **dict.fromkeys(("phi", "flops", "params", "latency_ms"), float | None),
    **dict.fromkeys(("alpha", "beta", "gamma"), float),
    **dict.fromkeys(("multiple", "num_classes"), int),
    "output": str | None,
}
SCALE_SEARCH: Mapping[str, Any] = {
    **TRAIN,
    **dict.fromkeys(("phi", "step", "tolerance", "flops_tolerance"), float),
    **dict.fromkeys(("alpha", "beta", "gamma"), list[float] | None),
    "multiple": int,
    "baseline": bool,
    "seeds": list[int] | None,
    "jobs": int | Literal["auto"],
}
SEARCH_RUN: Mapping[str, Any] = {
    **TRAIN,
    **dict.fromkeys(("space", "searcher"), Mapping),
    **dict.fromkeys(("trials", "round", "attempts", "max_failures"), int),
    "reward": "effnet_train.search.reward.Reward",
    "limits": "effnet_train.search.run.Limits",
    "latency_device": Literal["cpu", "cuda"],
    "jobs": int | Literal["auto"],
    "trial_limit_s": float | None,
    "keep_weights": bool,
}
SEARCH_REPORT: Mapping[str, Any] = {"search": str | list[str], "top": int, "output": str | None}
SEARCH_EXPORT: Mapping[str, Any] = {"search": str, "trial": int | Literal["best"], "output": str | None}
BENCH_COMPLEXITY: Mapping[str, Any] = {
    "model": Mapping,
    "models": list[str] | None,
    **dict.fromkeys(("num_classes", "batch_size"), int),
    "resolution": int | None,
    "by": Literal["total", "stage", "layer"],
    "precision": Literal["fp32", "bf16"],
    "format": Literal["table", "csv", "json"],
    "output": str | None,
}
TABLE_FIXED: Mapping[str, Any] = {
    "format": Literal["terminal", "markdown", "csv", "latex"],
    "output": str | None,
}
TABLE: Mapping[str, Any] = {
    **TABLE_FIXED,
    "run_root": str,
    "overrides": list[str],
    "seeds": list[int],
    "run": Literal[True, False, "plan"],
    "rate": float | None,
}
TABLE_LATENCY: Mapping[str, Any] = {
    **TABLE_FIXED,
    **dict.fromkeys(("rounds", "warmup", "threads"), int),
    "measured": str | None,
}
PLOT: Mapping[str, Any] = {"run_root": str, "output": str | None}
PLOT_SCALING: Mapping[str, Any] = {**PLOT, **dict.fromkeys(("base", "dataset"), str | None)}
PLOT_MAPS: Mapping[str, Any] = {
    "images": list[str],
    **dict.fromkeys(("checkpoints", "labels"), list[str] | None),
    "cam_class": str | int | None,
    **dict.fromkeys(("run_root", "device"), str),
    "output": str | None,
}
PLOT_CURVES: Mapping[str, Any] = {
    "runs": list[str],
    "labels": list[str] | None,
    **dict.fromkeys(("title", "output"), str | None),
}
# Arguments that the command itself gives: such a key would be ignored in silence.
_GIVEN: Mapping[str, str] = {
    "model.num_classes": "the data set's number of classes is taken",
    "optim.lr": "the schedule gives it, set schedule.lr_per_256",
    "optim.params": "the model gives them",
    "searcher.sizes": "the space gives them",
    "searcher.seed": "it is the run's, set seed",
}
_LEAST: Mapping[str, int] = {
    **dict.fromkeys(
        (
            "batch_size",
            "accumulate",
            "eval_batch_size",
            "max_steps",
            "ranks",
            "rounds",
            "threads",
            "resolution",
            "num_classes",
            "timeout_s",
            "top",
            "min_side",
            "count",
            "multiple",
            "jobs",
            "trials",
            "round",
            "attempts",
            "max_failures",
            "trial_limit_s",
            "per_class",
            "images",
        ),
        1,
    ),
    **dict.fromkeys(
        ("max_restarts", "seed", "stop_before_end_s", "sync_bn", "workers", "step", "reads", "index", "warmup"), 0
    ),
}
_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    list: "a list",
    Mapping: "keys with values",
}
_MANY: Mapping[Any, str] = {int: "whole numbers", float: "finite numbers"}


def check_config(config: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Check a plain configuration's keys and values, and the names and types of the arguments of all that it names.

    Raises ValueError naming the key, the value and what is wanted.
    """
    _check_names("", config, types, "the configuration")
    for key, value in config.items():
        if not isinstance(types[key], str):
            _check_type(key, value, types[key])
        if key in _LEAST and isinstance(value, int | float) and value < _LEAST[key]:
            raise ValueError(f"{key}={value} must be at least {_LEAST[key]}")
    for key, value in config.items():
        if isinstance(types[key], str):
            _check_type(key, value, get_object(types[key]))
        _check_parts(key, value)
    if config.get("name") == "":
        raise ValueError("name= is empty: the run needs a folder of its own in run_root")
    if (config.get("seed") or 0) >= 2**63:
        raise ValueError(f"seed={config['seed']} must be less than 2 ** 63")
    if config.get("clip_norm") is not None and config["clip_norm"] <= 0:
        raise ValueError(f"clip_norm={config['clip_norm']} must be more than 0, or null for no clipping")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are seeds to train with, each once."""
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**63 for seed in seeds):
        raise ValueError(f"seeds={list(seeds)} must be different numbers from 0 to below 2 ** 63, as seeds=[0,1,2]")


def _check_parts(key: str, node: object) -> None:
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        _check_arguments(key, node, get_object(node["_target_"]))
    for name, part in node.items():
        _check_parts(f"{key}.{name}", part)


def _check_arguments(key: str, arguments: Mapping[str, Any], function: Callable[..., Any]) -> None:
    parameters = arguments_of(function)
    own = {name: value for name, value in arguments.items() if not name.startswith("_")}  # Hydra's begin so
    _check_names(f"{key}.", own, parameters, function.__name__)
    for name, value in own.items():
        if f"{key}.{name}" in _GIVEN:
            raise ValueError(f"{key}.{name}={value} is not to be set: {_GIVEN[f'{key}.{name}']}")
        _check_type(f"{key}.{name}", value, parameters[name])


def arguments_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a function's arguments by name; those of `**rest: Unpack[...]` one by one."""
    hints: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if get_origin(parameter.annotation) is Unpack:
            hints |= get_type_hints(get_args(parameter.annotation)[0])
        else:
            hints[name] = parameter.annotation
    return hints


def _check_names(prefix: str, names: Mapping[str, Any], known: Mapping[str, Any], owner: str) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(prefix + other for other in close)}?" if close else "remove it"
            raise ValueError(f"{prefix}{name} is not a key of {owner}: {hint}")


def _check_type(key: str, value: object, hint: Any) -> None:
    # The parts that have no _target_ in the configuration are dataclasses.
    plain = Mapping if is_dataclass(hint) else hint
    if not _fits(value, plain):
        shown = "null" if value is None else repr(value)
        words = list(dict.fromkeys(_words(plain)))
        example = (
            f": give {key}=[{value}]"
            if words[0].startswith(_WORDS[list]) and len(words) == 1 and isinstance(value, str | int | float)
            else ""
        )
        if isinstance(hint, type) and is_dataclass(hint):
            example = f": give {', '.join(f'{key}.{field.name}=' for field in fields(hint))}"
        raise ValueError(f"{key}={shown} must be {' or '.join(words)}{example}")
    if is_dataclass(hint):
        assert isinstance(value, Mapping)
        assert isinstance(hint, type)
        _check_arguments(key, value, hint)


def _fits(value: object, hint: Any) -> bool:
    """Say whether a plain value can be what a type hint asks for; a hint of anything else refuses only scalars."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, Mapping, NoneType):
        return isinstance(value, hint)
    if origin is list and _is_looked_at(get_args(hint)[0]):
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    known = hint not in (Any, inspect.Parameter.empty) and not isinstance(hint, str)
    return not known or not isinstance(value, str | int | float | None)


def _is_looked_at(hint: Any) -> bool:
    """Say whether the values of a list of such are looked at: numbers, and choices that are few and known."""
    return hint in _MANY or get_origin(hint) is Literal


def _words(hint: Any) -> list[str]:
    """Return what a user would call the values that a type hint asks for."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return [word for part in get_args(hint) for word in _words(part)]
    if origin is Literal:
        return [str(value) for value in get_args(hint)]
    if origin is list and _is_looked_at(get_args(hint)[0]):
        return [f"a list of {_MANY.get(get_args(hint)[0]) or ', '.join(_words(get_args(hint)[0]))}"]
    if inspect.isclass(origin):
        hint = list if issubclass(origin, Sequence) else Mapping if issubclass(origin, Mapping) else hint
    return [_WORDS.get(hint, "another kind of value")]
