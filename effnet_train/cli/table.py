"""`effnet-table TABLE ...`: the paper's tables beside what is computed, measured and trained here."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import CONFIG_DIR, check_places, command, fail, first_word
from effnet_train.cli.outputs import check_file, writing
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE

# Words that may stand among those of effnet-table and are the trainings': Hydra knows them as groups, not as keys.
_OF_TRAININGS = ("data=", "data.", "recipe=")
_TRANSFER = 5  # the table whose networks began with another training's weights; those of the others did not


def main() -> None:
    """Print the table that the first word names."""
    about = "the paper's tables beside what is computed and trained here"
    name = first_word("effnet-table", "table", about, {name: line for name, (_, _, line) in TABLES.items()})
    config, job, _ = TABLES[name]
    if config == "table":
        sys.argv[1:] = with_overrides(sys.argv[1:])
        _check_own(sys.argv[1:])
    check_places("effnet-table", name, sys.argv[1:], {table: entry[0] for table, entry in TABLES.items()})
    statuses: list[int] = []
    command(config, lambda cfg: statuses.append(job(cfg)))()
    if any(statuses):
        raise SystemExit(max(statuses))


def with_overrides(words: Sequence[str]) -> list[str]:
    """Return the words with those for the trainings as the list `overrides`, quoted as Hydra wants it.

    These are the choices of data set and recipe, and all that follow `--`.
    """
    end = words.index("--") if "--" in words else len(words)
    own = [word for word in words[:end] if not word.startswith(_OF_TRAININGS)]
    given = [word for word in words[:end] if word.startswith(_OF_TRAININGS)] + list(words[end + 1 :])
    return [*own, f"overrides={json.dumps(given, ensure_ascii=False)}"] if given else own


def _check_own(words: Sequence[str]) -> None:
    """Refuse words that are for the trainings, where only the table's own may stand."""
    known = {name: yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text()) for name in ("table", "train")}
    groups = {next(iter(entry)) for entry in known["train"]["defaults"] if isinstance(entry, dict)}
    for word in words:
        key = word.partition("=")[0].lstrip("+~").partition(".")[0]
        if "=" in word and key not in known["table"] and key in {*known["train"], *groups}:
            fail(f"{word} is for the trainings: give it after --, as in: -- {word}")


def stages(cfg: DictConfig) -> int:
    """Print Table 1."""
    from effnet_train.analysis.tables import stage_table
    from effnet_train.cli import build, check, paper

    config = _checked(cfg, check.TABLE_FIXED)
    table = paper.table(1)
    model: Any = build.build_model(paper.composed([f"model={table['model']}"]).model, 1000)
    return _write(stage_table(table, model.table()), config)


def data_sets(cfg: DictConfig) -> int:
    """Print Table 6."""
    from effnet_train.analysis.tables import data_table
    from effnet_train.cli import check, paper

    config = _checked(cfg, check.TABLE_FIXED)
    table = paper.table(6)
    here: list[Mapping[str, int]] = [paper.composed([f"data={row['data']}"]).data.expected for row in table["rows"]]
    return _write(data_table(table, here), config)


def networks(cfg: DictConfig, number: int) -> int:
    """Print Table 2, 3, 5 or 7, after having trained what is missing where that is asked for."""
    from effnet_train.analysis.runs import HELP
    from effnet_train.analysis.tables import network_table
    from effnet_train.cli import check, paper, table_runs
    from effnet_train.cli.run_folder import FREE

    config = _checked(cfg, check.TABLE)
    table = paper.table(number)
    if config["rate"] is not None and not config["run"]:
        raise ValueError(f"rate={config['rate']} has no effect without run=plan or run=true")
    if config["rate"] is not None and config["rate"] <= 0:
        raise ValueError(f"rate={config['rate']:g} must be above 0: billion multiply-adds a second")
    check.check_seeds(config["seeds"])
    status = 0
    if config["run"]:
        status = table_runs.train_missing(table, f"table{number}", config)
        if config["run"] == "plan" or status == PREEMPTED_EXIT_CODE:
            return status
    words = [text for text in config["overrides"] if text.startswith(("recipe=", "debug=", "model."))]
    changed = paper.change_networks(table["rows"], words)
    asked = table_runs.data_asked_for(config["overrides"])
    runs = paper.finished_runs(config["run_root"], table_runs.steps_asked_for(config["overrides"]))
    transferred = number == _TRANSFER or table_runs.choice(config["overrides"], "init_from") is not None
    helped = any(table_runs.choice(config["overrides"], key) not in (None, "null", "0") for key in HELP)
    wanted = transferred, helped
    runs = [run for run in runs if asked in (None, run.data) and (run.transferred, run.helped) == wanted]
    notes = [f"The networks here are not the paper's: {' '.join(words)}"] if changed else []
    notes += [f"No finished run was found in {config['run_root']}/."] if not runs else []
    counted = paper.networks(table["rows"], words)
    sheet = network_table(table, counted, runs, free=FREE, changed=changed, notes=notes)
    return _write(sheet, config) or status


def latency(cfg: DictConfig) -> int:
    """Measure and print Table 4."""
    from effnet_train.analysis.data_speed import machine
    from effnet_train.analysis.latency import measure
    from effnet_train.analysis.tables import latency_table
    from effnet_train.cli import check, paper

    config = _checked(cfg, check.TABLE_LATENCY)
    if config["measured"]:
        check_file("measured", Path(config["measured"]))
    table = paper.table(4)
    parts = [part for row in table["rows"] for part in (row, row["against"])]
    told = partial(print, end="\r", file=sys.stderr, flush=True) if sys.stderr.isatty() else lambda _: None
    about = {**machine(), "command": shlex.join(["effnet-table", "table4", *sys.argv[1:]])}
    measured = measure(
        {part["name"]: paper.built(part) for part in parts},
        rounds=config["rounds"],
        warmup=config["warmup"],
        threads=config["threads"],
        told=told,
    )
    if config["measured"]:
        file = Path(config["measured"])
        models = {part["name"]: part.get("model") or f"timm:{part['timm']}" for part in parts}
        rows = {name: {"network": models[name], **times} for name, times in measured.items()}
        with writing("measured", file):
            file.write_text(json.dumps({"machine": about, "threads": config["threads"], "rows": rows}, indent=1) + "\n")
    where = f"{about['cpu']}, {config['threads']} thread(s), torch {about['packages']['torch']}"
    note = f"Here: {config['rounds']} runs in turn, batch 1, float32 on {where}; the ratio is that of the means."
    return _write(latency_table(table, measured, [note]), config)


def _checked(cfg: DictConfig, types: Mapping[str, Any]) -> dict[str, Any]:
    from effnet_train.cli import check

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, types)
    if config["output"]:
        check_file("output", Path(config["output"]))
    return config


def _write(sheet: Any, config: Mapping[str, Any]) -> int:
    text = sheet.render(config["format"])
    if config["output"]:
        file = Path(config["output"])
        with writing("output", file):
            file.write_text(text + "\n", encoding="utf-8")
        print(f"written to {file}")
    else:
        print(text)
    return 0


_Job = Callable[[DictConfig], int]
TABLES: Mapping[str, tuple[str, _Job, str]] = {
    "table1": ("table_fixed", stages, "B0's stages"),
    "table2": ("table", partial(networks, number=2), "parameters, multiply-adds and accuracy of networks on ImageNet"),
    "table3": ("table", partial(networks, number=3), "MobileNets and ResNet-50, scaled"),
    "table4": ("table_latency", latency, "latency, measured here"),
    "table5": ("table", partial(networks, number=5), "transfer to eight data sets"),
    "table6": ("table_fixed", data_sets, "those data sets: images and classes"),
    "table7": ("table", partial(networks, number=7), "B0 scaled in one dimension, and in all"),
}

if __name__ == "__main__":
    main()
