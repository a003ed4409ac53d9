"""docs/paper_map.md: all that it names exists, and its commands are ones."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effnet_train.cli import bench, data, plot, scale, search, table
from effnet_train.cli.app import CONFIG_DIR

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`]+)`", PAGE)
COMMANDS = sorted({span for span in SPANS if span.startswith("effnet-")})
FUNCTIONS = sorted({span for span in SPANS if re.match(r"[\w/]+\.py: ", span)})
KEYS = sorted(set(re.findall(r"keys? (`[\w.]+`(?:, `[\w.]+`)*)", PAGE)))
PATHS = sorted({*SPANS} - {*COMMANDS, *FUNCTIONS, *re.findall(r"`([\w.]+)`", " ".join(KEYS))})
LINKS = re.findall(r"\]\(([^)]+)\)", PAGE)


def roots_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the root file of a command and its overrides."""
    name, *rest = words
    if name in ("effnet-train", "effnet-predict"):
        return name.removeprefix("effnet-"), [word for word in rest if "=" in word]
    job, *overrides = rest
    if name == "effnet-plot":
        return plot.FIGURES[job][0], overrides
    if name == "effnet-table":
        return table.TABLES[job][0], overrides
    jobs: dict[str, Any] = {
        **{"effnet-scale": scale.JOBS, "effnet-bench": bench.JOBS, "effnet-data": data.JOBS},
        "effnet-search": search.JOBS,
    }
    assert job in jobs[name]
    return f"{name.removeprefix('effnet-')}_{job}", [word for word in overrides if word != "best"]


def test_the_page_names_things() -> None:
    assert len(COMMANDS) > 25
    assert len(FUNCTIONS) > 20
    assert len(PATHS) > 20
    assert len(KEYS) > 4


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_compose(command: str, compose: Callable[..., dict[str, Any]]) -> None:
    words = shlex.split(command)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert words[0] in scripts
    config, overrides = roots_of(words)
    compose(config, *overrides, *(["data.root=x"] if config == "train" else []))


@pytest.mark.parametrize("named", FUNCTIONS)
def test_its_functions_exist(named: str) -> None:
    module, _, names = named.partition(".py: ")
    found = importlib.import_module("effnet_train." + module.replace("/", "."))
    for name in names.split(", "):
        assert name in vars(found)
        assert getattr(vars(found)[name], "__module__", found.__name__) == found.__name__, "stands elsewhere"


@pytest.mark.parametrize("path", [*PATHS, *(f"docs/{link}" for link in LINKS)])
def test_its_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_its_keys_exist(compose: Callable[..., dict[str, Any]]) -> None:
    config = compose("train", "data.root=x")
    for key in re.findall(r"`([\w.]+)`", " ".join(KEYS)):
        node: Any = config
        for part in key.split("."):
            node = node[part]


def test_every_table_and_figure_is_there() -> None:
    for name in (*table.TABLES, *(name for name in plot.FIGURES if name.startswith("figure"))):
        assert re.search(rf"`effnet-(table|plot) {name}\b", PAGE), name
    assert (CONFIG_DIR / "tables").is_dir()
