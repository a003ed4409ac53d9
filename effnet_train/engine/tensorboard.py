"""TensorBoard's event files, of which a resumed run leaves those of an uninterrupted one."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from effnet_train.engine.loggers import image_grid, is_score, plain


class TensorBoardLogger:
    """Write TensorBoard's event files: numbers, grids of images, and the config as text."""

    def __init__(self, folder: str = "tensorboard") -> None:
        self.folder = folder
        self._path = Path(folder)
        self._writer: Any = None

    def open(self, run_dir: Path, *, step: int, evaluated: int, config: Mapping[str, Any]) -> None:
        """Begin an event file that tells readers to forget what earlier ones hold of later steps."""
        self._path = run_dir / self.folder
        earlier = list(self._path.glob("events.out.tfevents.*"))
        if step == 0:
            for file in earlier:
                file.unlink()
        again = self._again(step, evaluated) if step and earlier else None
        # The step named is itself forgotten.
        self._begin((step if again is None else evaluated) + 1 if step else None)
        for tag, event in again or ():
            self._writer.add_scalar(tag, event.value, event.step, event.wall_time)
        shown = {"config": config} if step == 0 or not earlier else {}
        # Code, packages and machine may be others after each start.
        for name, values in {**shown, "provenance": config.get("provenance", {})}.items():
            self._writer.add_text(name, f"```json\n{json.dumps(plain(values), indent=2)}\n```", step)
        self._writer.flush()

    def _again(self, step: int, evaluated: int) -> list[tuple[str, Any]] | None:
        """Return the numbers after `evaluated` that stay; None where there is no evaluation that has to go.

        Readers forget all from a step on. A run that was killed between an evaluation's numbers and the checkpoint
        that knows of them makes it again, but not the training before it.
        """
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if evaluated >= step:
            return None
        reader = EventAccumulator(str(self._path), {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1})
        reader.Reload()
        later = [
            (tag, event)
            for tag in reader.Tags()["scalars"]
            for event in reader.Scalars(tag)
            if evaluated < event.step <= step
        ]
        kept = [(tag, event) for tag, event in later if not is_score(tag)]
        return None if len(kept) == len(later) else kept

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: float) -> None:
        """Write each value under its name."""
        with self._writing() as writer:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Write the images as one grid."""
        with self._writing() as writer:
            writer.add_image(name, image_grid(images), step, dataformats="HWC")

    def _begin(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Here, because it takes seconds to import.

        self._writer = SummaryWriter(str(self._path), purge_step=purge_step)

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """Give the writer, in a new file where the one before failed: a writer whose thread has died stays dead."""
        if self._writer is None:
            self._begin()
        try:
            yield self._writer
            # Else a run that is killed loses two minutes of events that its checkpoint is already past.
            self._writer.flush()
        except OSError:
            self._writer = None
            raise

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
