"""Data workers' processes: how they are started, and that none is left behind."""

import multiprocessing
import os
import signal
import threading
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.util import Finalize
from typing import Any

from effnet_train.distributed import STOP_SIGNALS


def worker_context() -> Any:
    """Return the way to start workers: forked from a clean server, as forking this process's threads could deadlock.

    The server and its workers are born with the signals blocked that ask a run to stop: those go to whole process
    groups, and the training process needs its workers until its last step is done.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["effnet_train.data.loader"])
    resource_tracker.ensure_running()  # the server's start would start it, which unblocks SIGTERM and SIGINT
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    _end_workers_at_exit()
    return context


@cache
def _end_workers_at_exit() -> None:
    """Have the workers ended that are left when this process ends, as after an error whose traceback holds them.

    Else multiprocessing would send them SIGTERM, which they block, and wait for them for ever.
    """

    def end() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    Finalize(None, end, exitpriority=0)  # unlike atexit's, its functions are called by spawned processes too


def leave_with_the_trainer(_worker: int) -> None:
    """End this worker when the process ends that it works for, however that happens.

    torch's own watchdog looks at the parent, which is the fork server here; and that waits for its workers.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
