"""`effnet-train` as the child of another command: it saves and leaves when its standard input ends.

So it is when the parent dies, in whichever way.
"""

import os
import signal
import sys
import threading
import time

from effnet_train.cli import train
from effnet_train.exit_codes import PASSING_EXIT_CODE

# To save and leave in, of the minute that a next start of the same run waits for it. (Evaluations end after a batch.)
LEAVING_S = 45.0


def main() -> None:
    """Train, and watch standard input."""
    sys.argv[0] = "effnet-train"
    threading.Thread(target=_watch, daemon=True).start()
    train.main()


def _watch() -> None:
    # Of the descriptor: an object's lock, held while reading, would stop the interpreter at its end.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    # A long step, or what hangs: nothing is lost but the steps since the last save.
    time.sleep(LEAVING_S)
    text = f"{LEAVING_S:.0f} s after its parent's death this training has not left: it does so now, unsaved"
    print(text, file=sys.stderr, flush=True)
    os._exit(PASSING_EXIT_CODE)


if __name__ == "__main__":
    main()
