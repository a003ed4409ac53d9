"""How fast a training goes."""

import time


class Clock:
    """Time spent training since the last log line, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.steps = 0
        self._forget()

    def _forget(self) -> None:
        self.images = 0
        self._seconds = self._waited = 0.0
        self.start()

    def start(self) -> None:
        """Start timing a step; what went before it does not count."""
        self._mark = time.perf_counter()

    def got_data(self) -> None:
        """Note that the batch is here."""
        self._waited += time.perf_counter() - self._mark
        self.did_wait()

    def did_wait(self) -> None:
        """Count the time since the last note as training."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now

    def did_step(self, images: int) -> None:
        """Note that a step over `images` images of all ranks was asked of the device."""
        self.did_wait()
        self.steps += 1
        self.images += images

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call and start anew."""
        seconds = max(self._seconds, 1e-9)
        values = {"train/images_per_s": self.images / seconds, "train/data_wait": self._waited / seconds}
        self._forget()
        return values
