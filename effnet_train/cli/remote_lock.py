"""One run at a time in a folder elsewhere, which several machines may name: an object that says who writes there."""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from effnet_train.cli.lock import LOCK, name_of, why_dead
from effnet_train.engine.remote_folder import RemoteFolder

BEAT_S = 20.0  # the owner writes the object anew as often
STALE_S = 120.0  # an owner that has not done so for so long is dead
_SILENT_BEATS = 2  # that we must have missed ourselves: clocks of two machines may differ
_SETTLE_S = 2.0  # in which another that found no owner either has written its name, or ours is the later one
_LEAVING_S = 60.0
_LOOK_S = 1.0


class RemoteLock:
    """The object `.lock` of a run's folder elsewhere: `owner`, and the number and time of its last beat.

    Stores have no creation that only one can do. So whoever writes its name waits a little and reads it back: of two
    that come at once the later stays. Raises ValueError where another process holds it, and what the store raises.
    """

    def __init__(self, folder: RemoteFolder, owner: Mapping[str, Any]) -> None:
        self.folder = folder
        self.owner = dict(owner)
        self._beats = 0
        self._released = threading.Event()
        self._wait_for_owner()
        self._write()
        time.sleep(_SETTLE_S)
        found = self._read()
        if found is not None and not self._is_mine(found):
            raise ValueError(self._refusal(found))
        self._thread = threading.Thread(target=self._beat, daemon=True, name="remote lock")
        self._thread.start()

    def release(self) -> None:
        """Remove the object; where the store is away it stays, and is stale after a while."""
        self._released.set()
        self._thread.join(timeout=_LEAVING_S)
        try:
            if (self._read() or {}).get("token") == self.owner["token"]:
                self.folder.remove(LOCK)
        except Exception as error:  # each file system has errors of its own
            print(f"warning: cannot remove {self._place()} ({error})", file=sys.stderr)

    def _wait_for_owner(self) -> None:
        """Return once nobody holds the folder. Raises ValueError where its owner is alive."""
        first, start, told = self._read(), time.monotonic(), False
        while first is not None:
            reason, waited = why_dead(first), time.monotonic() - start
            long_ago = time.time() - float(first.get("time", 0)) > STALE_S
            if reason is None and waited > (_SILENT_BEATS * BEAT_S if long_ago else STALE_S):
                reason = f"it has not been heard of for {waited:.0f} s and more"
            if reason is not None:
                print(f"{self._place()} is stale, {name_of(first)}: {reason}; taking over", file=sys.stderr)
                return
            if not told:
                print(f"waiting for {name_of(first)}, which holds {self._place()}, to be found dead", file=sys.stderr)
                told = True
            time.sleep(_LOOK_S)
            found = self._read()
            if found is not None and found != first:
                raise ValueError(self._refusal(found))
            first = found

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                found = self._read(patient=False)
                if found is None or self._is_mine(found):
                    self._write(patient=False)
                    continue
            except Exception:  # a store that is away for a while: checkpoints will say so
                continue
            # This process had been out of reach so long that another took it for dead: two must not write.
            print(f"{self._place()} was taken over by {name_of(found)}: leaving at once", file=sys.stderr, flush=True)
            os._exit(1)

    def _is_mine(self, found: dict[str, Any]) -> bool:
        # Not everything that is called a store shows objects only when they are whole.
        return found.get("token", self.owner["token"]) == self.owner["token"]

    def _read(self, *, patient: bool = True) -> dict[str, Any] | None:
        """Return the owner; None where there is none; nobody's description where it is not to be understood."""
        data = self.folder.read(LOCK, patient=patient)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {"unknown": data.hex()[:1000]}

    def _write(self, *, patient: bool = True) -> None:
        self._beats += 1
        text = json.dumps({**self.owner, "beat": self._beats, "time": datetime.now(UTC).timestamp()})
        self.folder.write(LOCK, text.encode(), patient=patient)

    def _place(self) -> str:
        return f"{self.folder.url}/{LOCK}"

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"checkpoint.remote: {self.folder.url} is being written by {name_of(owner)}: wait for it or stop it, "
            f"or give name=... for a folder of its own ({self._place()} goes with that process)"
        )
