"""Saving a run: a copy in memory, written behind training; failures counted; the oldest checkpoints dropped."""

import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effnet_train.engine.checkpoint import (
    BEST,
    CheckpointError,
    load_checkpoint,
    step_files,
    step_name,
    step_of,
    write_atomically,
)
from effnet_train.engine.every import Every
from effnet_train.engine.remote_folder import RemoteFolder, beside, named
from effnet_train.engine.snapshot import Snapshots

_FETCHED = ".fetched"  # what is being taken over from elsewhere
_LONG_S = 60.0  # after which waiting for a disk is worth a word
_PATIENCE_S = 5.0  # with a write, when somebody wants to leave at once


class _Work:
    """One piece of work at a time, in a thread; `finish` raises what it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, function: Callable[[], None]) -> None:
        assert self._thread is None

        def run() -> None:
            try:
                function()
            except BaseException as error:
                self._error = error

        # A daemon: a disk that answers no more would keep the process from leaving.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self, *, at_most_s: float = math.inf) -> bool:
        """Wait for the end, telling of it now and then; say whether it has come."""
        patience, waited = min(_LONG_S, at_most_s), 0.0
        while self._thread is not None:
            self._thread.join(patience)
            waited += patience
            if not self._thread.is_alive():
                self._thread = None
            elif waited >= at_most_s:
                return False
            else:
                print(f"warning: a checkpoint has not been written in {waited:.0f} s; waiting for it", file=sys.stderr)
        return True

    def finish(self, *, at_most_s: float = math.inf) -> bool:
        """Wait as `join` does, and raise what the work raised."""
        if not self.join(at_most_s=at_most_s):
            return False
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True


@dataclass
class Checkpoints:
    """The checkpoints of one run's folder: `step_*.pt`, of which the last `keep` stay, and `best.pt`.

    `milestones` are epochs whose checkpoints stay for good, as `step_*.milestone.pt`: every so many, or a list.

    A save lets training wait for a copy in memory only, and is written by a thread; without `background` it is waited
    for. One that fails is reported and tried again at the next; failing at `max_failures` steps in a row ends the run.
    So does a disk that does not answer: a save that is due while the one before has not been written within
    `patience_s` is one that fails.

    `remote` is a URL (s3://, gs://, ...) under which a folder of the run's name gets all that is written, and the
    configuration, faults and logs; on a machine that has less, the run goes on from there.
    """

    folder: Path
    keep: int = 3
    milestones: float | list[float] | None = None
    background: bool = True
    remote: str | None = None
    max_failures: int = 3
    patience_s: float = field(default=300.0, init=False)
    failed_steps: set[int] = field(default_factory=set, init=False)
    written: int | None = field(default=None, init=False)  # the step that was written last
    _waited: bool = field(default=False, init=False, repr=False)  # all its patience, in vain
    _lost: Mapping[str, float] | None = field(default=None, init=False, repr=False)
    _snapshots: Snapshots = field(default_factory=Snapshots, init=False, repr=False)
    _work: _Work = field(default_factory=_Work, init=False, repr=False)
    _elsewhere: RemoteFolder | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep}: at least 1 must stay, to resume from")
        if self.max_failures < 1:
            raise ValueError(
                f"checkpoint.max_failures={self.max_failures}: the first at the earliest ends a run, give 1"
            )
        epochs = self.milestones if isinstance(self.milestones, list) else [self.milestones]
        for epoch in epochs if self.milestones is not None else ():
            if isinstance(epoch, bool) or not isinstance(epoch, int | float) or not 0 < epoch < math.inf:
                raise ValueError(
                    f"checkpoint.milestones={self.milestones}: give a number of epochs above 0, for every so many, "
                    "a list of epochs, or null for none"
                )

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, oldest first."""
        return list(step_files(self.folder))

    def path(self, step: int) -> Path:
        """Return where the checkpoint of `step` lies, or is to lie."""
        return step_files(self.folder).get(step, self.folder / step_name(step))

    def is_milestone(self, step: int, batch_size: int, num_images: int) -> bool:
        """Say whether `step` (the first is 1) is the first by which an epoch of the milestones was seen whole."""
        if isinstance(self.milestones, list):
            images = (Fraction(str(epoch)) * num_images for epoch in self.milestones)
            return step in {math.ceil(count / batch_size) for count in images}
        return Every(epochs=self.milestones).due(step, batch_size, num_images)

    def newest(self) -> dict[str, Any] | None:
        """Read the newest good checkpoint, or return None where there is none; say so of each damaged one passed over.

        The best one is the last resort. Raises CheckpointError where all are damaged: starting anew is for the user to
        decide.
        """
        best = self.folder / BEST
        paths = [*reversed(step_files(self.folder).values()), *([best] if best.is_file() else [])]
        for path in paths:
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                print(f"warning: {error}; trying the one before", file=sys.stderr)
        if paths:
            raise CheckpointError(
                f"all {len(paths)} checkpoints of {self.folder} are damaged: move the folder away to start anew"
            )
        return None

    def best_step(self) -> int | None:
        """Return the step of `best.pt`, or None where it is absent or damaged."""
        try:
            return int(load_checkpoint(self.folder / BEST)["step"])
        except CheckpointError:
            return None

    def clear_unfinished(self) -> None:
        """Remove what processes that were killed while they wrote or fetched a checkpoint have left."""
        shutil.rmtree(self.folder / _FETCHED, ignore_errors=True)
        for pattern in (".step_*.pt-*", f".{BEST}-*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def save(
        self,
        payload: Mapping[str, Any],
        *,
        step: bool = True,
        best_before: Mapping[str, float] | None = None,
        milestone: bool = False,
        must: bool = False,
    ) -> None:
        """Write the checkpoint of `payload["step"]` and drop the oldest ones.

        Where `payload["best"]` is new, `best_before` is what it was: `best.pt` is written too, and without `step` it
        alone. Where that fails, the checkpoint is written with what was the best before. `must` waits until all is on
        the disk, and makes a failure to write the checkpoint an error. Raises OSError, also for the save before.
        """
        if not self._work.finish(at_most_s=0 if self._waited else self.patience_s):
            text = f"the checkpoint before has not been written for {self.patience_s:.0f} s and more: the disk hangs"
            self._lost = best_before if best_before is not None else self._lost
            self._failed(payload["step"], text, TimeoutError(text), must=must)
            return
        copied = self._snapshots.take(dict(payload))
        write = partial(self._write, copied, step=step, best_before=best_before, milestone=milestone, must=must)
        self._work.start(write)
        if (must or not self.background) and not self._work.finish(at_most_s=self.patience_s) and must:
            text = f"the checkpoint of step {payload['step']} has not been written in {self.patience_s:.0f} s"
            self._failed(payload["step"], text, TimeoutError(text), must=True)

    def settle(self) -> Mapping[str, float] | None:
        """Wait, but no longer than `patience_s`, until all is written.

        Where `best.pt` could not be, return what the best was before. Raises OSError where a save that must be there is
        not, or too many have failed.
        """
        self._waited = not self._work.finish(at_most_s=self.patience_s)
        lost, self._lost = self._lost, None
        return lost

    def wait(self) -> None:
        """Wait, but no longer than `patience_s`, until nothing is being written; what came of it is told later."""
        self._work.join(at_most_s=self.patience_s)

    def close(self) -> None:
        """Wait until all is written, and say what went wrong instead of raising it; not for long if interrupted."""
        hurry = isinstance(sys.exception(), KeyboardInterrupt)
        if not self._work.join(at_most_s=min(_PATIENCE_S, self.patience_s) if hurry else self.patience_s):
            print("warning: leaving before a checkpoint was written; the one before is intact", file=sys.stderr)
            return
        try:
            self._work.finish()
            if self._elsewhere is not None and not hurry:
                self._elsewhere.put(self._elsewhere.beside())
        except (OSError, ValueError) as error:
            print(f"warning: {error}", file=sys.stderr)

    def _write(
        self,
        payload: Mapping[str, Any],
        *,
        step: bool,
        best_before: Mapping[str, float] | None,
        milestone: bool,
        must: bool,
    ) -> None:
        """Do what `save` says, in the thread."""
        self._snapshots.wait()
        _sync_logs(self.folder)  # a checkpoint that outlives its machine must not be past rows that do not
        number, well, names = payload["step"], True, []
        if best_before is not None:
            well = self._try(self.folder / BEST, payload, must=False)
            if well:
                names.append(BEST)
            else:
                payload, self._lost = {**payload, "best": dict(best_before)}, best_before
        if step:
            path = self.folder / step_name(number, milestone=milestone)
            if self._try(path, payload, must=must):
                self.written = number
                names.append(path.name)
                self._drop_old(number)
            else:
                well = False
        if names and self._elsewhere is not None:
            well = self._copy_elsewhere(self._elsewhere, names, number) and well
        if well:
            self.failed_steps.clear()

    def _try(self, path: Path, payload: Mapping[str, Any], *, must: bool) -> bool:
        try:
            write_atomically(path, lambda file: torch.save(payload, file))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            reason = error.strerror if isinstance(error, OSError) else f"not written whole: {_free(path.parent)}"
            self._failed(payload["step"], f"cannot write {path} ({reason})", error, must=must)
            return False
        return True

    def _failed(self, step: int, text: str, error: Exception, *, must: bool = False) -> None:
        """Count a failure and tell of it. Raises OSError where it is one too many."""
        self.failed_steps.add(step)
        if must:
            raise OSError(f"{text}; the checkpoints before it are intact, and the same command goes on") from error
        if len(self.failed_steps) >= self.max_failures:
            raise OSError(
                f"{text}, at {self.max_failures} steps in a row; the checkpoints before it are intact: "
                "make room, or mend the disk, and the same command goes on"
            ) from error
        print(f"warning: {text}; the one before is intact, training goes on", file=sys.stderr, flush=True)

    def _drop_old(self, newest: int) -> None:
        # Of later steps there may be damaged ones, which are no reason to drop a good one.
        with suppress(OSError):  # the next save tries again
            former = [step for step in self.steps() if step <= newest]
            for step in former[: -self.keep]:
                (self.folder / step_name(step)).unlink(missing_ok=True)

    def _copy_elsewhere(self, remote: RemoteFolder, names: list[str], step: int) -> bool:
        """Copy files, what lies beside them first: a checkpoint without the faults before it would go another way."""
        try:
            remote.put([*remote.beside(), *names])
            # Of what lies there, too, the last stay, and the milestones.
            former = [name for name in remote.names() if 0 < (step_of(name) or 0) <= step]
            for name in former[: -self.keep]:
                if name == step_name(step_of(name) or 0):
                    remote.remove(name)
        except Exception as error:  # each file system has errors of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._failed(step, f"cannot copy to {remote.url} ({reason})", error)
            return False
        return True

    def fetch(self, check: Callable[[Path], None]) -> None:
        """Where `remote` is further than this folder, take over what lies there, once `check` has seen it.

        Raises ValueError, OSError or ImportError where it cannot be read: starting anew is for the user to decide.
        """
        if self.remote is None:
            return
        self._elsewhere = RemoteFolder(self.folder, self.remote)
        with named(self.remote):
            names = self._elsewhere.names()
        here = self._good_step()
        further = [name for name in names if (step_of(name) or -1) > here]
        if not further:
            return
        try:
            self._take_over(self._elsewhere, names, further, check)
        finally:
            shutil.rmtree(self.folder / _FETCHED, ignore_errors=True)

    def _take_over(
        self, remote: RemoteFolder, names: list[str], further: list[str], check: Callable[[Path], None]
    ) -> None:
        fetched = self.folder / _FETCHED
        beside = [name for name in names if step_of(name) is None]
        for name in beside:
            remote.get(name, fetched)
        check(fetched)
        for name in reversed(further):
            remote.get(name, fetched)
            try:
                load_checkpoint(fetched / name)
            except CheckpointError as error:
                print(f"warning: {remote.url}: {error}; trying the one before", file=sys.stderr)
                continue
            # The checkpoint comes last: one that is here says that all is here.
            for one in [*beside, name]:
                (self.folder / one).parent.mkdir(exist_ok=True)
                os.replace(fetched / one, self.folder / one)
            print(f"goes on from {remote.url}/{name}", file=sys.stderr)
            return

    def announce(self) -> None:
        """Write the configuration to `remote`, so that a wrong name or want of access is found before any training."""
        if self._elsewhere is not None:
            with named(self._elsewhere.url):
                self._elsewhere.put(self._elsewhere.beside())

    def _good_step(self) -> int:
        for step, path in reversed(step_files(self.folder).items()):
            try:
                load_checkpoint(path)
            except CheckpointError:
                continue
            return step
        return -1


def _sync_logs(folder: Path) -> None:
    with suppress(OSError):  # of a disk that is full or away, the checkpoint tells
        for path in beside(folder):
            place = os.open(path, os.O_RDONLY)
            try:
                os.fsync(place)
            finally:
                os.close(place)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free on that disk"
    except OSError as error:  # a mount that has vanished
        return f"{folder}: {error.strerror}"
