"""What a run does about numbers that are not finite, and what it remembers of them in its folder."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnet_train.engine.checkpoint import write_bytes

ON_NAN = ("stop", "skip", "rollback")
FILE = "faults.jsonl"
# How often a run goes back, and how many steps in a row it leaves out, before it ends: it would not come further.
_MOST = 10
# Images that a message names; the file has all of the step.
_NAMED = 3


class NotFiniteError(FloatingPointError):
    """A loss, a gradient or a weight that is not a finite number: `what`, of `step` (the first is 1)."""

    def __init__(self, text: str, *, step: int, what: str) -> None:
        super().__init__(text)
        self.step, self.what = step, what


class RollBackError(NotFiniteError):
    """The run is to go on from its last checkpoint, and to pass over the batches from there to `step`."""


@dataclass
class Faults:
    """The faults of a run, and what `on_nan` says is done about them; the same on every rank.

    stop: the run ends. skip: a step with a bad loss or gradient changes nothing; to know it, the host waits for the
    device at each step. rollback: the run goes on from its last checkpoint with the batches that follow the bad one.

    `images` names the images of a step (the first is 1), `lr` is its learning rate. `known` are the rows of FILE.
    """

    folder: Path
    on_nan: str
    images: Callable[[int], Sequence[str]] = lambda step: ()
    lr: Callable[[int], float] = lambda step: 0.0
    is_main: bool = True
    known: list[dict[str, Any]] = field(default_factory=list)
    _in_a_row: int = field(default=0, init=False)
    _last: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.on_nan not in ON_NAN:
            raise ValueError(f"on_nan={self.on_nan} is not known: use one of {', '.join(ON_NAN)}")

    @property
    def may_roll_back(self) -> bool:
        """Say whether the next fault sends the run back to a checkpoint."""
        return self.on_nan == "rollback" and len(passed_over(self.known)) < _MOST

    def skipped(self, step: int) -> None:
        """Note that a step changed nothing. Raises NotFiniteError after too many in a row."""
        self._in_a_row, self._last = self._in_a_row + 1 if step == self._last + 1 else 1, step
        self.record(step, "a loss or gradient", action="skip")
        if self._in_a_row >= _MOST:
            text = f"{_MOST} steps in a row had a loss or gradient that is not a finite number, the last was {step}: "
            raise NotFiniteError(text + "set on_nan=rollback, or lower the learning rate", step=step, what="the loss")

    def record(self, step: int, what: str, *, action: str, from_step: int | None = None) -> None:
        """Say what happened, and add it to the folder's file, once, as a run that goes on may meet it again."""
        row: dict[str, Any] = {"step": step, "action": action, "what": what, "lr": self.lr(step)}
        row |= {} if from_step is None else {"from_step": from_step}
        # The same way back may be needed again: it passes over the next batches then.
        if action != "rollback" and any(row.items() <= other.items() for other in self.known):
            return
        row["images"] = list(self.images(step))
        self.known.append(row)
        if not self.is_main:
            return
        names = ", ".join(row["images"][:_NAMED])
        done = {
            "stop": "the run ends",
            "skip": "this step changes nothing",
            "rollback": f"back to step {from_step}, passing over the batches up to this one",
        }[action]
        text = (
            f"warning: {what} is not a finite number at step {step} (lr={row['lr']:.4g}): {done}; images: {names}, ..."
        )
        print(f"{text} ({self.folder / FILE})", file=sys.stderr)
        try:
            write_bytes(self.folder / FILE, "".join(json.dumps(one) + "\n" for one in self.known).encode())
        except OSError as error:
            if action == "rollback":
                raise  # without it, a run that is stopped would not find the same way again
            print(f"warning: cannot write {self.folder / FILE} ({error.strerror})", file=sys.stderr)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the faults that a run's folder tells of. Raises ValueError where its file is damaged."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(
            f"{folder / FILE} is damaged ({error}): it says which batches the run passed over; mend or remove it"
        ) from error


def passed_over(known: Sequence[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
    """Return (step, batches): from that step on, so many batches more are passed over."""
    back = (row for row in known if row["action"] == "rollback")
    return tuple((row["from_step"], row["step"] - row["from_step"]) for row in back)
