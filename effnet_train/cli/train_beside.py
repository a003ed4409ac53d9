"""`effnet-train` as the child of another command: asked to save and leave when its standard input ends.

So it is when the parent closes it, and when the parent dies in whichever way.
"""

import os
import signal
import sys
import threading

from effnet_train.cli import train


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


if __name__ == "__main__":
    main()
