"""The ordinary `effnet-train` as a process of its own."""

import sys
from collections.abc import Sequence
from functools import partial

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
