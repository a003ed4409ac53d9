"""A rank that hangs: noticed in bounded time, told with where every rank stands, and ended."""

import os
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

from effnet_train.distributed import Session
from effnet_train.exit_codes import PASSING_EXIT_CODE

_LAUNCHER_S = 60
_PACKAGE = Path(__file__).parents[1]
_SILENT = "gives no sign: stopped, or its machine is out of reach"


class Watchdog:
    """End this process where `beat` was not called for `timeout_s` seconds (None: never); a context manager.

    Before it goes, it tells where its threads stand and where the other ranks are: of many that wait for one, that one
    is what matters. Until the first step is done it waits twice as long, as kernels are chosen and compiled then.
    A thread of its own looks after it: it does not notice code that never gives the interpreter's lock away.
    """

    def __init__(self, session: Session, timeout_s: float | None) -> None:
        self.session = session
        self.timeout_s = timeout_s
        self._main = threading.get_ident()
        self._started = False
        self._last = time.monotonic()
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        if self.timeout_s is not None:
            jobs = [self._guard, *([self._publish] if self.session.world_size > 1 else [])]
            self._threads = [threading.Thread(target=job, name="watchdog", daemon=True) for job in jobs]
            self._last = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(self._answer_s)

    def beat(self, *, started: bool = True) -> None:
        """Say that the training goes on; `started`: that its first step is done."""
        self._started = self._started or started
        self._last = time.monotonic()

    @property
    def _every_s(self) -> float:
        assert self.timeout_s is not None
        return min(5.0, self.timeout_s / 10)

    @property
    def _answer_s(self) -> float:
        """Return how long to wait for what the ranks told each other: the collectives' own end is at twice the time."""
        assert self.timeout_s is not None
        return min(10.0, self.timeout_s / 4)

    def _guard(self) -> None:
        assert self.timeout_s is not None
        before = time.monotonic()
        while not self._left.wait(self._every_s):
            now = time.monotonic()
            if now - before > 3 * self._every_s:  # this process was stopped as a whole, which is not its fault
                self._last += now - before
            before, last = now, self._last
            if now - last > self.timeout_s * (1 if self._started else 2):
                self._end(last)

    def _end(self, last: float) -> None:
        """Tell and leave, unless the training has gone on meanwhile."""
        stacks = self._stacks()  # as they are now
        waited = time.monotonic() - last
        lines = [f"[rank {self.session.rank}] error: no step for {waited:.0f} s (timeout_s={self.timeout_s:g})"]
        if self.session.world_size > 1:
            lines += [f"  {line}" for line in self._whereabouts()]
        if self._last == last and not self._left.is_set():
            print("\n".join([*lines, "  where this one's threads stand:", *stacks]), file=sys.stderr, flush=True)
            _end_a_deaf_launcher()
            os._exit(PASSING_EXIT_CODE)

    def _stacks(self) -> list[str]:
        frames = sys._current_frames()
        return [
            f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
            for thread in threading.enumerate()
            if thread.ident in frames and thread not in self._threads
        ]

    def _where(self) -> str:
        """Return the innermost place in our own code at which the training stands."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(_PACKAGE):
                return f"{file.relative_to(_PACKAGE.parent)}:{frame.f_lineno} in {frame.f_code.co_qualname}"
            frame = frame.f_back
        return "outside of the training"

    def _publish(self) -> None:
        """Tell the other ranks, now and then, that this process lives and where it stands."""
        number = 0
        while not self._left.is_set():
            with suppress(Exception):  # a store that is away for a while: this is for a message only
                store = self.session.store(timedelta(seconds=self._answer_s))
                while True:
                    number += 1
                    store.set(_key(self.session.rank), f"{os.getpid()}.{number} {self._where()}")
                    if self._left.wait(self._every_s):
                        return
            self._left.wait(self._every_s)

    def _whereabouts(self) -> list[str]:
        """Ask twice where the ranks stand; what has not changed is not alive. A store that is out of reach is told."""
        found: list[list[str]] = []

        def ask() -> None:
            with suppress(Exception):
                store = self.session.store(timedelta(seconds=self._answer_s))
                keys = [_key(rank) for rank in range(self.session.world_size)]
                for pause in (1.5 * self._every_s, 0):
                    found.append([store.get(key).decode() if store.check([key]) else "" for key in keys])
                    time.sleep(pause)

        asking = threading.Thread(target=ask, daemon=True)  # which may get no answer
        asking.start()
        asking.join(1.5 * self._every_s + self._answer_s)
        if len(found) < 2:
            return ["where the other ranks stand is not known: rank 0 is gone, or the network between"]
        ranks = defaultdict(list)
        for rank, (before, after) in enumerate(zip(*found, strict=True)):
            ranks[after.partition(" ")[2] if before != after else _SILENT].append(rank)
        return [
            f"{_numbers(members)}: {place}" for place, members in sorted(ranks.items(), key=lambda item: len(item[1]))
        ]


def _end_a_deaf_launcher() -> None:
    """Leave somebody behind who kills torchrun, where that has not noticed this process's end after a minute.

    It asks a store on another machine all the time. Where the network is cut it hangs there, deaf to its ranks and to
    signals, until the kernel gives the connection up: a quarter of an hour later (tcp_retries2).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        left = 'sleep "$3"; grep -q "^State:.Z" "/proc/$1/status" && kill -KILL "$2"'  # not waited for: a zombie
        words = ["sh", "-c", left, "sh", str(os.getpid()), str(os.getppid()), str(_LAUNCHER_S)]
        nowhere = subprocess.DEVNULL
        subprocess.Popen(words, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)


def _key(rank: int) -> str:
    return f"effnet_train/alive/{rank}"


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
