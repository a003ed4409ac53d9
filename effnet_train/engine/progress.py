"""Show on the terminal, or in a job's output, where a run stands."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

# The share of time spent waiting for data from which it is worth a word.
_MUCH_WAITING = 0.1


class ProgressLogger:
    """Print a line for each epoch and each evaluation, and show a bar on a terminal.

    Lines go to standard output, whoever reads it; the bar goes to standard error. An epoch at whose end there is an
    evaluation has one line, not two.

    Args:
        bar: whether to show the bar; None where standard error is a terminal.
    """

    def __init__(self, bar: bool | None = None) -> None:
        self.bar = bar
        self._tqdm: Any = None
        self._latest: dict[str, float] = {}
        self._waiting: tuple[int, str] | None = None

    def open(self, run_dir: Path, *, step: int, evaluated: int, config: Mapping[str, Any]) -> None:
        """Start the clock; `config` names `total_steps` and `epochs`."""
        self._total_steps = int(config["total_steps"])
        self._epochs = float(config["epochs"])
        self._start_step, self._start_time = step, monotonic()
        self._epochs_said: int | None = None
        self._rates = 0  # -1: said
        if sys.stderr.isatty() if self.bar is None else self.bar:
            self._tqdm = tqdm(
                total=self._total_steps,
                initial=step,
                file=sys.stderr,
                dynamic_ncols=True,
                miniters=1,
                # Our own speed and time left: tqdm would count steps, not images.
                bar_format="{percentage:3.0f}%  {desc} |{bar}|",
            )

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: float) -> None:
        """Move the bar, and print a line where one is due."""
        self._latest |= values
        if "train/data_wait" in values:
            self._hint(values["train/data_wait"])
        if self._epochs_said is None:  # Those before the start were said then.
            self._epochs_said = _whole(epoch * self._start_step / max(1, step))
        if self._tqdm is not None:
            words = [f"{_epoch(epoch)}/{self._epochs:g}", *_short(self._latest, self._left(step))]
            self._tqdm.set_description_str("  ".join(words), refresh=False)
            self._tqdm.update(step - self._tqdm.n)
        evaluated = any(key.startswith("val") for key in values)
        if self._waiting is not None and not (evaluated and step == self._waiting[0]):
            self._print(self._waiting[1])
        self._waiting = None
        if evaluated:
            self._print(self._line(step, epoch, values))
        elif _whole(epoch) > self._epochs_said:
            # The evaluation of this step, if there is one, comes next: its line will say it all.
            self._waiting = (step, self._line(step, epoch, values))
        self._epochs_said = max(self._epochs_said, _whole(epoch))

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Show nothing: a terminal has no pictures."""

    def close(self) -> None:
        """Print what waits and leave the bar as it is."""
        if self._waiting is not None:
            self._print(self._waiting[1])
            self._waiting = None
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None

    def _hint(self, waiting: float) -> None:
        """Say once what helps where much time goes by waiting for data; the first share holds the workers' start."""
        if self._rates < 0:
            return
        self._rates += 1
        if self._rates > 1 and waiting > _MUCH_WAITING:
            self._rates = -1
            share = f"{waiting:.0%}".replace("%", " %")
            text = (
                f"hint: {share} of the time is spent waiting for data; what helps: more workers=, "
                "data.backend=nvimgcodec (on a GPU hybrid or nvjpeg), smaller stored images, or a faster disk"
            )
            tqdm.write(text, file=sys.stderr)

    def _left(self, step: int) -> str | None:
        steps = step - self._start_step
        if steps <= 0:
            return None
        return duration((monotonic() - self._start_time) / steps * (self._total_steps - step))

    def _line(self, step: int, epoch: float, values: Mapping[str, float]) -> str:
        """Say all that is known of a step; of evaluations only its own."""
        known = {key: value for key, value in self._latest.items() if not key.startswith("val")} | dict(values)
        place = [f"epoch {_epoch(epoch)}/{self._epochs:g}", f"step {step:,}/{self._total_steps:,}"]
        return "  ".join(place + _long(known, self._left(step)))

    def _print(self, line: str) -> None:
        if self._tqdm is None:
            print(line, flush=True)
        else:
            self._tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


def duration(seconds: float) -> str:
    """Word a time in its two largest units: 45 s, 12 min, 3 h 12 min, 2 d 3 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _whole(epoch: float) -> int:
    """Count finished epochs; a float may lie a hair under the whole number that it means."""
    return math.floor(epoch + 1e-6)


def _epoch(epoch: float) -> str:
    return f"{epoch:.1f}".removesuffix(".0")


def _long(values: Mapping[str, float], left: str | None) -> list[str]:
    """Word the values that are there for a line."""
    formats = {
        "train/loss": "loss {:.3f}",
        "train/top1": "top-1 {:.1%}",
        "val/top1": "val {:.1%}",
        "val_ema/top1": "(EMA {:.1%})" if "val/top1" in values else "val (EMA) {:.1%}",
        "train/lr": "lr {:.3g}",
        "train/images_per_s": "{:,.0f} images/s",
        "train/data_wait": "data {:.0%}",
    }
    words = [template.format(values[key]).replace("%", " %") for key, template in formats.items() if key in values]
    joined = "  ".join(words).replace("  (EMA", " (EMA")
    return [*([joined] if joined else []), *([f"left {left}"] if left else [])]


def _short(values: Mapping[str, float], left: str | None) -> list[str]:
    """Word the values that are there for a bar, which shares 80 columns with them."""
    formats = {
        "train/loss": "loss {:.3f}",
        # Not every run scores its training images: mixed ones have no one label.
        "train/top1" if "train/top1" in values else "val_ema/top1": "top-1 {:.1%}",
        "train/lr": "lr {:.3g}",
        "train/images_per_s": "{:,.0f} im/s",
        "train/data_wait": "data {:.0%}",
    }
    words = [template.format(values[key]) for key, template in formats.items() if key in values]
    return [*words, *([f"left {left}"] if left else [])]
