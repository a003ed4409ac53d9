"""The ordinary `effnet-train` as a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from effnet_train.distributed import STOP_SIGNALS
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE


def run_training(words: Sequence[str]) -> int:
    """Train as `effnet-train words...` would, and return its exit status.

    Signals that ask to stop reach it, once: it saves, and the status is 75.
    """
    started: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    former = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        # In a session of its own: else the terminal's Ctrl-C would reach it beside ours.
        command = [sys.executable, "-m", "effnet_train.cli.train", *words]
        started.append(subprocess.Popen(command, start_new_session=True))
        for number in asked:  # before there was anybody to tell
            started[0].send_signal(number)
        status = started[0].wait()
        # Whoever asked wants no next training either, also where this one had ended, or not yet begun to listen.
        return PREEMPTED_EXIT_CODE if asked else status
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
