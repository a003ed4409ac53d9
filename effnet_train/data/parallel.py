"""A function over many pieces of work, in worker processes that neither outlive their parent nor die unnoticed."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from effnet_train.distributed import STOP_SIGNALS

Item = TypeVar("Item")
Result = TypeVar("Result")
_GRACE_S = 5.0


def map_ordered(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in their order, computed by `workers` processes; with 0, in this one.

    What the function raises is raised here. Closing the iterator ends the workers at once, whatever they do.
    Raises ChildProcessError where a worker died.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = _Pool(function, min(workers, len(items)))
    try:
        yield from pool.run(items)
    finally:
        pool.close()


class _Pool(Generic[Item, Result]):
    """A pipe to each worker. Nobody else holds its ends: where one side dies, the other reads an end of file."""

    def __init__(self, function: Callable[[Item], Result], workers: int) -> None:
        # From a clean server: forking this process's threads could deadlock.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["effnet_train.data.sources"])  # or each worker would load torch by itself
        self._processes: dict[Connection, Any] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, items: Sequence[Item]) -> Iterator[Result]:
        """Yield the results in order, working at most a few items ahead of the one that is waited for."""
        results: dict[int, Result] = {}
        asked, ahead = 0, 4 * len(self._processes)
        idle = list(self._processes)
        for place in range(len(items)):
            while place not in results:
                while idle and asked < min(len(items), place + ahead):
                    _send(idle.pop(), (asked, items[asked]))
                    asked += 1
                for pipe in wait(list(self._processes)):
                    assert isinstance(pipe, Connection)
                    done, result = self._receive(pipe)
                    results[done] = result
                    idle.append(pipe)
            yield results.pop(place)

    def _receive(self, pipe: Connection) -> tuple[int, Result]:
        try:
            place, result, error = pipe.recv()
        except (EOFError, ConnectionError):
            process = self._processes[pipe]
            process.join(_GRACE_S)
            raise ChildProcessError(
                f"a worker process died (exit code {process.exitcode}): if the machine is short of memory, set a "
                "smaller workers="
            ) from None
        if error is not None:
            raise error
        return place, result

    def close(self) -> None:
        """End the workers."""
        for pipe, process in self._processes.items():
            pipe.close()
            process.kill()  # not terminate: the data loader's server has its workers born with SIGTERM blocked
        for process in self._processes.values():
            process.join()


def _send(pipe: Connection, message: object) -> None:
    # Of a dead worker the end of file tells that reading gives.
    with contextlib.suppress(ConnectionError):
        pipe.send(message)


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    # These go to the whole group; the parent tells us.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            place, item = pipe.recv()
        except (EOFError, ConnectionError):  # the parent has ended, or has died
            return
        result, error = None, None
        try:
            result = function(item)
        except Exception as caught:
            error = caught
        try:
            pipe.send((place, result, error))
        except ConnectionError:
            return
