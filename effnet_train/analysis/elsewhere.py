"""Contenders of a benchmark, each in a process of its own, and the memory that they take.

So they are compiled beside one another, and nobody's memory is counted as another's.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from effnet_train.analysis import roofline
from effnet_train.analysis.throughput import COMPILED, Case, Work, build
from effnet_train.models.folding import PLAIN

_GRACE_S = 10.0
_MEMORY_WAITS = [1.0, 3.0, 10.0, 10.0, 30.0, 30.0]  # seconds, while others that get ready have a GPU's memory


class Elsewhere:
    """A case in a process of its own, which ends with this one; `peak` and `path` are there when it is prepared.

    From when it begins it has `wait_s` seconds to get ready, or as many as it takes.

    The peak are the bytes that it takes: weights, optimizer, average, activations. On a GPU what its allocator gives
    out or holds for graphs, on a CPU by how much the process grows.
    """

    def __init__(self, case: Case, set_up: Callable[[], object], wait_s: float | None = None) -> None:
        self.peak, self.path = 0, PLAIN
        self._case, self._asked = case, False
        self._wait_s, self._began = wait_s, math.inf
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs, set_up), daemon=True)
        # Compiling takes minutes and little memory of the device; the others get ready meanwhile, one after another.
        if case.mode in COMPILED:
            self._begin()

    def prepared(self) -> float:
        """Wait until the case can be measured, and return the seconds of a call. Raises TimeoutError."""
        if math.isinf(self._began):
            self._begin()
        self.rest()
        if not self._asked:
            raise TimeoutError(f"{self._case.name} of {self._case.variant} was not ready in wait_s={self._wait_s:g}")
        once, self.peak, self.path = self._answer()
        return float(once)

    def rest(self) -> None:
        """Wait until the process computes nothing; one that is not ready in time is ended."""
        if not self._asked:
            return
        left = None if self._wait_s is None else max(0.0, self._began + self._wait_s - time.monotonic())
        if not self._pipe.poll(left):
            self.close()

    def timed(self, count: int) -> float:
        """Return the seconds of `count` calls."""
        self._wait_s = None  # it was ready
        self._ask(_repeat, count)
        return float(self._answer())

    def kinds(self) -> dict[str, float]:
        """Return where the time goes, by kinds of layers."""
        self._ask(_kinds, self._case.device)
        return dict(self._answer())

    def close(self) -> None:
        """End the process, by force where it computes."""
        self._pipe.close()
        if self._process.is_alive():
            if not self._asked:
                self._process.join(_GRACE_S)  # it tidies up
            self._process.kill()
            self._process.join()
        self._asked = False

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._process.start()
        self._theirs.close()  # the process alone has it, so that its end is seen
        self._ask(_begin, self._case)

    def _ask(self, function: Callable[..., object], *arguments: object) -> None:
        with suppress(ConnectionError):  # the answer will tell
            self._pipe.send((function, arguments))
        self._asked = True

    def _answer(self) -> Any:
        try:
            result, error = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ChildProcessError(
                f"the process that measures {self._case.name} of {self._case.variant} died (exit code "
                f"{self._process.exitcode}): if the machine is short of memory, set a smaller batch_size="
            ) from None
        self._asked = False
        if error is not None:
            raise error
        return result


def rest(works: Iterable[Elsewhere]) -> None:
    """Wait until none of them computes anything."""
    for work in works:
        work.rest()


def _serve(pipe: Connection, set_up: Callable[[], object]) -> None:
    """Answer calls of functions until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to the whole group; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_up()
    with suppress(EOFError, ConnectionError):
        while True:
            function, arguments = pipe.recv()
            result, error = None, None
            try:
                result = function(*arguments)
            except Exception as caught:
                caught.add_note(traceback.format_exc())  # which does not travel by itself
                error = caught
            pipe.send((result, error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the other thread may compile for minutes


_works: list[Work] = []  # of this process, the one that it measures


def _begin(case: Case) -> tuple[float, int, str]:
    before = 0 if case.device == "cuda" else _resident_before(case)
    work = build(case)
    _works.append(work)
    once = _prepared(work)
    if case.device == "cpu":
        return once, _status("VmHWM") - before, work.path
    return once, _peak(work.run), work.path


def _prepared(work: Work) -> float:
    """Prepare the work; where others have the GPU's memory meanwhile, wait and try again what is left to do."""
    for wait in _MEMORY_WAITS if work.device == "cuda" else []:
        try:
            return work.prepared()
        except torch.OutOfMemoryError:
            pass  # the traceback, which ends here, holds the tensors
        torch.cuda.empty_cache()
        time.sleep(wait)
    return work.prepared()


def _peak(run: Callable[[], object]) -> int:
    """Return the bytes of a GPU that a call takes; what it does not need between calls is given back."""
    torch.cuda.reset_peak_memory_stats()  # cuDNN has tried its algorithms, and their work space does not count
    run()
    given_out = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    # A graph that was captured before takes nothing any more: what it needs is held for it, and is all that is held.
    return max(given_out, torch.cuda.memory_reserved())


def _repeat(count: int) -> float:
    work = _works[0]
    if work.device == "cpu":
        return work.timed(count)
    work.timed(1)  # takes its memory again
    seconds = work.timed(count)
    torch.cuda.empty_cache()  # for the others
    return seconds


def _kinds(device: str) -> dict[str, float]:
    return roofline.by_kind(_works[0].run, device)


def _resident_before(case: Case) -> int:
    """Return the bytes of this process when it has imported and set up all that the case needs, but nothing of it."""
    small: dict[str, Any] = {"resolution": 32, "batch_size": 2, "mode": "eager"}
    if case.library == "ours":
        small["config"] = {**case.config, "width": 0.25, "depth": 0.25}
    build(replace(case, **small)).run()
    before = _status("VmRSS")
    with suppress(OSError):  # where it may not be written, the peak so far counts, which a step exceeds
        Path("/proc/self/clear_refs").write_text("5")
    return before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
