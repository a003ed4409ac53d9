"""`effnet-bench complexity`: what networks cost, as a table, CSV or JSON."""

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.outputs import check_file, writing

_COUNTS = ("parameters", "multiply_adds", "activations", "kept")
_COLUMNS = ("model", "part", "resolution", *_COUNTS, "training_bytes", "evaluation_bytes")


def complexity(cfg: DictConfig) -> None:
    """Count parameters, multiply-adds, activations and memory: of the whole, by stage or by layer."""
    from effnet_train.cli import check

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.BENCH_COMPLEXITY)
    chosen = _chosen(config)
    if config["output"]:
        check_file("output", Path(config["output"]))
    rows = [row for name, model in chosen.items() for row in _rows(name, model, config)]
    text = _TEXTS[config["format"]](rows)
    if config["output"]:
        with writing("output", Path(config["output"])):
            Path(config["output"]).write_text(text)
        print(f"written to {config['output']}")
    else:
        print(text, end="")


def _chosen(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the model configurations to count, by name. Raises ValueError for a name that is none."""
    from effnet_train.cli import build

    hydra = HydraConfig.get()
    given = [text.lstrip("+") for text in hydra.overrides.task if text.lstrip("+").startswith(("model=", "model."))]
    if config["models"] is None:
        changed = [text.removeprefix("model.") for text in given if not text.startswith("model=")]
        return {" ".join([hydra.runtime.choices["model"], *changed]): config["model"]}
    if given:
        raise ValueError(f"models={_listed(config['models'])} and {given[0]} are both given: leave one of them out")
    variants = build.model_variants()
    for name in config["models"]:
        if name not in variants:
            close = difflib.get_close_matches(name, variants, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"models has {name}, which is not known: {hint}The choices are {', '.join(variants)}")
    if not config["models"]:
        raise ValueError("models=[] names none: give names, as models=[b0,b1]")
    return {name: variants[name] for name in config["models"]}


def _listed(names: Sequence[str]) -> str:
    return f"[{','.join(names)}]"


def _rows(name: str, model_config: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a part and one of the whole, which alone has the bytes of a batch."""

    from effnet_train.analysis import complexity as counting
    from effnet_train.cli import build

    model = build.without_weights(model_config, config["num_classes"])
    size, by_layer = config["resolution"] or model_config["resolution"], config["by"] == "layer"
    cost = counting.complexity(model, size, by_layer=by_layer)
    kept = {} if config["by"] == "total" else counting.kept_numbers(model, size, by_layer=by_layer)
    memory = {"activation_bytes": 2 if config["precision"] == "bf16" else 4}
    whole = {
        "model": name,
        "part": "total",
        "resolution": size,
        **{column: getattr(cost, column) for column in _COUNTS if column != "kept"},
        "kept": sum(kept.values()) or None,  # told of parts only: of the whole, the memory tells more
        "training_bytes": counting.training_memory(model, size, config["batch_size"], **memory),
        "evaluation_bytes": counting.evaluation_memory(model, size, config["batch_size"], **memory),
    }
    if config["by"] == "total":
        return [whole]
    empty = dict.fromkeys(_COLUMNS)
    parts = (
        {
            **empty,
            **{"model": name, "part": part.name, "resolution": size},
            **{"parameters": part.parameters, "multiply_adds": part.multiply_adds},
            **{"activations": part.activations, "kept": kept[part.name]},
        }
        for part in cost.parts
    )
    return [*parts, whole]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return columns for reading: millions of numbers an image, MiB of a batch; a column that is empty is left out."""
    columns = {
        "model": [row["model"] for row in rows],
        "part": [row["part"] if any(other["part"] != "total" for other in rows) else "" for row in rows],
        "pixels": [str(row["resolution"]) for row in rows],
        "parameters": [f"{row['parameters']:,}" for row in rows],
        "mult-adds M": [_in(row["multiply_adds"], 1e6, 3) for row in rows],
        "activations M": [_in(row["activations"], 1e6, 3) for row in rows],
        "kept M": [_in(row["kept"], 1e6, 3) for row in rows],
        "training MiB": [_in(row["training_bytes"], 2**20, 0) for row in rows],
        "evaluation MiB": [_in(row["evaluation_bytes"], 2**20, 0) for row in rows],
    }
    padded = []
    for head, texts in columns.items():
        if any(texts):
            width = max(map(len, (head, *texts)))
            side = "<" if head in ("model", "part") else ">"
            padded.append([f"{text:{side}{width}}" for text in (head, *texts)])
    return "".join("  ".join(line).rstrip() + "\n" for line in zip(*padded, strict=True))


def _in(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(rows, indent=1) + "\n"


_TEXTS = {"table": _table, "csv": _csv, "json": _json}
