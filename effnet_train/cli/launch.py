"""The ordinary `effnet-train` as a process of its own, with this command line's words or others."""

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase as fnmatch
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from effnet_train.exit_codes import PREEMPTED_EXIT_CODE
from effnet_train.search.trials import run_all, start, stop_signals


def training_command(words: Sequence[str]) -> tuple[str, ...]:
    """Return the command of `effnet-train words...` as a child, which saves and leaves when its parent is dead."""
    return sys.executable, "-m", "effnet_train.cli.train_beside", *words


def run_training(words: Sequence[str]) -> int:
    """Train as `effnet-train words...` would, and return its exit status.

    Signals that ask to stop reach it, once: it saves, and the status is 75.
    """
    statuses: list[int] = []
    with stop_signals() as asked:
        starts = {"": partial(start, training_command(words))}
        run_all(starts, jobs=1, asked=asked, ended=lambda _, status: statuses.append(status))
    # Whoever asked wants no next training either, also where this one had ended, or not yet begun to listen.
    return PREEMPTED_EXIT_CODE if asked else statuses[0]


def is_remote() -> bool:
    """Say whether trainings are submitted somewhere by a launcher of Hydra's."""
    return bool(HydraConfig.get().runtime.choices.get("cluster", "local") != "local")


def words_beside(own: Sequence[str], taken: Sequence[str], place: Path, changed: Sequence[str]) -> list[str]:
    """Return an `effnet-train`'s words: those of this command line whose keys match none of `taken`, and `own`.

    Its run's folder is `place`, or in it. `changed` are the groups in which this command chooses otherwise than
    `effnet-train` does.
    """
    hydra_cfg = HydraConfig.get()
    keys = {text: text.lstrip("+~").partition("=")[0] for text in hydra_cfg.overrides.task}
    patterns = (*taken, "dry_run", "name", "run_root")
    given = [text for text, key in keys.items() if not any(fnmatch(key, pattern) for pattern in patterns)]
    choices = [f"{group}={hydra_cfg.runtime.choices[group]}" for group in changed if group not in keys.values()]
    # A sweep of one adds its overrides to its folder's name, which is found in a folder of its own.
    root = place if is_remote() else place.parent
    words = [*choices, *given, *own, f"name={place.name}", f"run_root={quoted(str(root))}"]
    if is_remote():
        words = ["-m", *words, *(text for text in hydra_cfg.overrides.hydra if text.startswith("hydra.launcher."))]
    return words + config_dir_words()


def config_dir_words() -> list[str]:
    """Return the words that name a folder of configurations of the user's own."""
    sources = HydraConfig.get().runtime.config_sources
    found = [source.path for source in sources if source.provider == "command-line"]
    return [word for path in found for word in ("--config-dir", path)]


def quoted(text: str) -> str:
    """Return a text as Hydra reads it, whatever is in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
