"""One run at a time in a folder: a file that says who writes there, on file systems that machines share too."""

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from effnet_train import slurm
from effnet_train.distributed import Session
from effnet_train.engine.remote_folder import RemoteFolder

LOCK = ".lock"
BEAT_S = 10.0  # the owner touches the file as often
STALE_S = 60.0  # an owner of another machine that has not done so for so long is dead
_TAKEOVER = f"{LOCK}.takeover"  # made by the one that may remove a stale lock
_SILENT_BEATS = 2  # that we must have missed ourselves: a file may be old as its file system was away for all
_LEAVING_S = 60.0  # for a rank to save and leave when its launcher is dead
_LOOK_S = 0.2


@contextmanager
def locked(folder: Path, session: Session, remote: str | None = None) -> Iterator[None]:
    """Hold the run's folder for this run, and the copy of it in `remote`: rank 0 for all ranks.

    Raises ValueError on rank 0, and SystemExit(2) on the others, where another process holds one; OSError where nothing
    can be written there, ImportError where a package for it is missing.
    """
    problem: Exception | None = None
    with ExitStack() as held:
        if session.is_main:
            try:
                lock = Lock(folder)
                held.callback(lock.release)
                if remote is not None:
                    from effnet_train.cli.remote_lock import RemoteLock

                    held.callback(RemoteLock(RemoteFolder(folder, remote), lock.owner).release)
            except (ValueError, OSError, ImportError) as error:
                problem = error
        if session.broadcast(problem is not None):
            raise problem or SystemExit(2)  # said once, by rank 0
        yield


class Lock:
    """The file `.lock` of a folder, made by one process alone, touched every 10 s and removed at the end.

    Its creation is atomic on NFS too (O_EXCL), where file locks are not to be relied on. A process that is killed
    leaves it: on the same machine its pid tells, from another one that the file is no longer touched.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.owner = _myself()
        self._made = [each for each in (folder, *folder.parents) if not each.exists()]
        self._released = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                with suppress(FileNotFoundError):  # it has just left
                    self._wait_for_owner()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(error.errno, error.strerror, str(folder)) from error  # with a remedy of its own
            raise OSError(
                f"cannot write to the run's folder {folder} ({error.strerror}): choose another place with run_root=..."
            ) from error
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def release(self) -> None:
        """Remove the file, and those folders that this lock made and that are empty."""
        self._released.set()
        self._thread.join(timeout=_LEAVING_S)  # it may be in a file system that does not answer
        with suppress(OSError):
            if (_read(self.path) or {}).get("token") == self.owner["token"]:
                self.path.unlink()
        with suppress(OSError):  # a run that was refused before it began leaves nothing
            for folder in self._made:
                folder.rmdir()

    def _create(self, name: str = LOCK) -> bool:
        path = self.path.with_name(name)
        try:
            place = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(place, json.dumps(self.owner).encode() + b"\n")
        except OSError:  # of a full disk: nobody must wait for an owner that is not named
            path.unlink()
            raise
        finally:
            os.close(place)
        return True

    def _wait_for_owner(self) -> None:
        """Return once the file is gone or was stale and is removed. Raises ValueError where its owner is alive."""
        start = time.monotonic()
        first = _touched(self.path)
        since = 0.0 if first is None else _now(self.path.parent) - first
        told = False
        while (touched := _touched(self.path)) is not None:
            owner, waited = _read(self.path) or {}, time.monotonic() - start
            reason = why_dead(owner)
            alive = _is_here(owner) and reason is None
            silent = touched == first and (waited > STALE_S or (since > STALE_S and waited > _SILENT_BEATS * BEAT_S))
            if reason is None and not alive and silent:
                reason = f"it has not been heard of for {max(since, waited):.0f} s"
            if reason is not None:
                self._take_over(owner, reason)
                return
            leaving = _is_leaving(owner) and waited < _LEAVING_S if alive else touched == first
            if not leaving:
                raise ValueError(_refusal(self.path, owner))
            if not told:
                print(
                    f"waiting for {name_of(owner)}, which holds {self.path}, to leave or to be found dead",
                    file=sys.stderr,
                )
                told = True
            time.sleep(_LOOK_S)

    def _take_over(self, owner: dict[str, Any], reason: str) -> None:
        """Remove the lock, if it is `owner`'s still, while no other process may do the same."""
        aside = self.path.with_name(_TAKEOVER)
        if not self._create(_TAKEOVER):
            with suppress(FileNotFoundError):
                other = _read(aside) or {}
                if why_dead(other) or _now(aside.parent) - aside.stat().st_mtime > STALE_S:
                    aside.unlink()  # it takes no time, but for one that died in its midst
            time.sleep(_LOOK_S)
            return
        try:
            # Who came before may have made a lock of its own here, after we read the stale one.
            with suppress(FileNotFoundError):
                if (_read(self.path) or {}).get("token") == owner.get("token"):
                    print(f"{self.path} is stale, {name_of(owner)}: {reason}; taking over", file=sys.stderr)
                    self.path.unlink()
        finally:
            aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                owner = _read(self.path)
                if owner is None or owner.get("token") == self.owner["token"]:
                    os.utime(self.path)
                    continue
            except FileNotFoundError:
                with suppress(OSError):
                    self._create()
                continue
            except OSError:  # a file system that is away for a while: checkpoints will say so
                continue
            # This process had slept so long that another took it for dead: two must not write.
            print(f"{self.path} was taken over by {name_of(owner)}: leaving at once", file=sys.stderr, flush=True)
            os._exit(1)


def _myself() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "started": _started(os.getpid()),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "slurm": slurm.job(os.environ),
    }


def _machine() -> str:
    """Return what tells where process ids mean the same: this start of the kernel, this container's view of it."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on (state, parent, ...), or none: no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _started(pid: int) -> str | None:
    """Return when a process was started, in ticks since the machine was, or None where it lives no more."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else None


def _is_here(owner: dict[str, Any]) -> bool:
    return owner.get("machine") == _machine()


def _is_leaving(owner: dict[str, Any]) -> bool:
    """Say whether the owner's launcher is dead, which its ranks notice and leave."""
    fields = _stat(owner["pid"])
    return not fields or int(fields[1]) != owner["parent"]


def why_dead(owner: dict[str, Any]) -> str | None:
    """Return why the owner can be alive no more, or None where that cannot be told."""
    if _is_here(owner) and _started(owner["pid"]) != owner["started"]:
        return "that process is dead"
    mine, others = slurm.job(os.environ), owner.get("slurm")
    if mine and others and mine != others and mine.partition(".")[0] == others.partition(".")[0]:
        return "that job was requeued, and this is it"
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """Return the owner; None where the file is not written yet, or not by us."""
    try:
        owner = json.loads(path.read_bytes())
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _touched(path: Path) -> float | None:
    # Opened, as a file's times may come out of NFS's cache otherwise.
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, which another machine may keep."""
    probe = folder / f"{LOCK}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def name_of(owner: dict[str, Any]) -> str:
    """Return what a message calls the owner of a lock."""
    if "pid" not in owner:
        return "an unknown process"
    job = f", SLURM job {owner['slurm'].partition('.')[0]}" if owner.get("slurm") else ""
    return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"


def _refusal(path: Path, owner: dict[str, Any]) -> str:
    return (
        f"the folder {path.parent} is being written by {name_of(owner)}: wait for it or stop it, "
        f"or give name=... for a folder of its own ({path} goes with that process)"
    )
