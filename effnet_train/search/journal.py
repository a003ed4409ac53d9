"""What came of each candidate of a search: a line of JSON each, which is whole or not there."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from effnet_train.engine.checkpoint import write_bytes
from effnet_train.search.space import Tokens

Status = Literal["trained", "over", "failed"]


@dataclass(frozen=True)
class Entry:
    """Hold what came of candidate `number`, by `status`.

    `trained`: with `top1` (a fraction) and `reward`; `over` a limit, which `reason` names: not trained, reward 0;
    `failed`: without either, `reason` says why. Where an earlier candidate is the same network, `same_as` is its
    number, and the rest is what came of that. `costs` are those that were counted, by kind, `seconds` what it took.
    """

    number: int
    tokens: Tokens
    status: Status
    network: str
    costs: Mapping[str, float] = field(default_factory=dict)
    top1: float | None = None
    reward: float | None = None
    reason: str | None = None
    same_as: int | None = None
    seconds: float | None = None


class Journal:
    """The entries of a search by number, and the file that holds them.

    A line that was cut off, as the process died while it wrote, is taken away (with `readonly`, passed over: it may
    be about to be whole); its candidate has no entry then.
    Raises: ValueError where a line before the last is damaged, or two are of the same candidate.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self.entries: dict[int, Entry] = {}
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        for i, line in enumerate(whole.splitlines(), 1):
            entry = _entry(line, f"{path}, line {i}")
            if entry.number in self.entries:
                raise ValueError(f"{path}, line {i} is a second one of trial {entry.number}: remove one of them")
            self.entries[entry.number] = entry
        if len(whole) < len(text) and not readonly:
            os.truncate(path, len(whole))

    def append(self, entry: Entry) -> None:
        """Write an entry to the disk; on any error the file is as it was."""
        assert entry.number not in self.entries
        line = json.dumps(asdict(entry)).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(line)
                assert written == len(line)
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(self.path, size)
                raise
        self.entries[entry.number] = entry

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget entries, on the disk too."""
        for number in numbers:
            del self.entries[number]
        lines = [json.dumps(asdict(entry)).encode() + b"\n" for entry in self.entries.values()]
        write_bytes(self.path, b"".join(lines))

    def best(self) -> Entry | None:
        """Return the entry of the highest reward, the first of equals."""
        trained = [entry for entry in self.entries.values() if entry.status == "trained" and entry.reward is not None]
        return max(trained, key=lambda entry: (entry.reward, -entry.number), default=None)


def _entry(line: bytes, where: str) -> Entry:
    try:
        values: dict[str, Any] = json.loads(line)
        return Entry(**{**values, "tokens": tuple(values["tokens"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is damaged ({error}): remove it, and its trial is made again") from error
