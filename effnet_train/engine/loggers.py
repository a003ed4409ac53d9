"""Write down what a run does: JSON lines, a table, TensorBoard, Weights & Biases, MLflow."""

import csv
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import numpy as np


class Logger(Protocol):
    """What the training loop tells about a run; only rank 0 has loggers."""

    def open(self, run_dir: Path, *, step: int, evaluated: int, config: Mapping[str, Any]) -> None:
        """Start writing, after `step` finished steps, the last evaluation having been after `evaluated` of them.

        With `step=0` a log of an earlier attempt in this folder is begun anew. Otherwise what it holds of later steps,
        and of later evaluations, is forgotten, so that a resumed run leaves the log of an uninterrupted one. `config`
        holds `total_steps` and `epochs` beside the run's own keys.
        """

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: float) -> None:
        """Write numbers such as `train/loss` or `val_ema/top1` of a step; both scores of an evaluation in one call."""

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Write images: (N, H, W, 3) uint8."""

    def close(self) -> None:
        """Finish; harmless where `open` was never called, and when called twice."""


def tell(loggers: Iterable[Logger], what: Callable[[Logger], None]) -> None:
    """Tell each logger something; that one fails, on a full disk or without its server, is a warning.

    The run is worth more. Services have errors of their own, of no common kind.
    """
    for logger in loggers:
        try:
            what(logger)
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            text = f"{type(logger).__name__} cannot write ({reason}): its log may lack lines"
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def image_grid(images: np.ndarray, padding: int = 2) -> np.ndarray:
    """Lay images out as one, nearly square and row by row: (N, H, W, 3) uint8 to (H', W', 3) uint8, black between."""
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    cell_height, cell_width = height + padding, width + padding
    grid = np.zeros((rows * cell_height + padding, columns * cell_width + padding, channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * cell_height + padding, i % columns * cell_width + padding
        grid[top : top + height, left : left + width] = image
    return grid


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        return list(file)


def _until(
    step: int, evaluated: int, lines: Iterable[str], read: Callable[[str], Mapping[str, Any]], path: Path
) -> list[str]:
    """Keep the lines of finished steps, and of evaluations the run knows of; `read` turns a line into its values."""
    kept, damaged = [], 0
    for line in lines:
        try:
            # A process that is killed while it writes leaves its last line without an end.
            row = read(line) if line.endswith("\n") else {}
            scored = any(is_score(key) and value not in (None, "") for key, value in row.items())
            if int(row["step"]) <= (evaluated if scored else step):
                kept.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
    if damaged:
        warnings.warn(f"{path}: left out {damaged} line(s) that an interruption had damaged", stacklevel=2)
    return kept


def is_score(key: str) -> bool:
    """Say whether a value is of an evaluation, not of training."""
    return key.startswith("val")


def _replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


class JsonlLogger:
    """Write one JSON object a line: `step`, `epoch` and the values; what is not finite is null."""

    def __init__(self, filename: str = "metrics.jsonl") -> None:
        self.filename = filename
        self._file: TextIO | None = None

    def open(self, run_dir: Path, *, step: int, evaluated: int, config: Mapping[str, Any]) -> None:
        """Cut what is later than `step`, and append from there."""
        path = run_dir / self.filename
        lines = _lines(path) if step else []
        kept = _until(step, evaluated, lines, json.loads, path)
        _replace_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: float) -> None:
        """Append a line."""
        assert self._file is not None
        row = {"step": step, "epoch": float(epoch)} | {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Write nothing: the file is for numbers."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class CsvLogger:
    """Write a table with a column for every value ever seen; a row leaves empty what it does not have."""

    def __init__(self, filename: str = "metrics.csv") -> None:
        self.filename = filename
        self._path = Path(filename)
        self._columns: list[str] = []
        self._file: TextIO | None = None

    def open(self, run_dir: Path, *, step: int, evaluated: int, config: Mapping[str, Any]) -> None:
        """Cut what is later than `step`, and append from there."""
        self._path = run_dir / self.filename
        header, *lines = (_lines(self._path) if step else []) or ["step,epoch\n"]
        columns = next(csv.reader([header]))

        def read(line: str) -> Mapping[str, Any]:
            return dict(zip(columns, next(csv.reader([line])), strict=True))  # a ValueError where some are missing

        kept = _until(step, evaluated, lines, read, self._path)
        self._rewrite(columns, list(csv.DictReader([header, *kept])))

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: float) -> None:
        """Append a row, and write the table anew where it needs more columns."""
        row = {"step": step, "epoch": float(epoch)} | {key: float(value) for key, value in values.items()}
        if new := [key for key in row if key not in self._columns]:
            self._rewrite([*self._columns, *new], list(csv.DictReader(_lines(self._path))))
        assert self._file is not None
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
        self._file.flush()

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Write nothing: the table is for numbers."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)
        # Only now: on a full disk the old table goes on.
        self.close()
        self._columns = columns
        self._file = self._path.open("a", encoding="utf-8", newline="")


class WandbLogger:
    """Write to Weights & Biases; a resumed run goes on in the same run there.

    Steps repeated after an interruption keep the values first logged: the service takes no step twice.

    Args:
        mode: online, offline or disabled; None leaves it to WANDB_MODE.
    """

    def __init__(
        self,
        project: str = "effnet_train",
        entity: str | None = None,
        *,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        self.project = project
        self.entity = entity
        self.name = name
        self.mode = mode
        self._run: Any = None

    def open(self, run_dir: Path, *, step: int, evaluated: int, config: Mapping[str, Any]) -> None:
        """Start the run, or go on in the one whose id the folder holds."""
        try:
            import wandb
        except ImportError as error:
            raise ImportError("loggers=wandb needs the extra wandb: pip install 'effnet-train[wandb]'") from error
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            _replace_text(id_file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or run_dir.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=plain(config),
            mode=self.mode,
        )

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: float) -> None:
        """Log the values of a step."""
        self._run.log({**values, "epoch": epoch}, step=step)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Log the images as one grid."""
        import wandb

        self._run.log({name: wandb.Image(image_grid(images))}, step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class MlflowLogger:
    """Write to MLflow; a resumed run goes on in the same run there.

    Steps repeated after an interruption keep the values first logged, else they would stand there twice.

    Args:
        tracking_uri: None for MLFLOW_TRACKING_URI, and without it for an SQLite file in the run's own folder.
    """

    def __init__(
        self, experiment: str = "effnet_train", tracking_uri: str | None = None, *, name: str | None = None
    ) -> None:
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.name = name
        self._client: Any = None
        self._run_id = ""
        self._logged: dict[str, int] = {}

    def open(self, run_dir: Path, *, step: int, evaluated: int, config: Mapping[str, Any]) -> None:
        """Start the run, or go on in the one whose id the folder holds."""
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param
        except ImportError as error:
            raise ImportError("loggers=mlflow needs the extra mlflow: pip install 'effnet-train[mlflow]'") from error
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        # MLflow's own choice would put the artifacts of a local run into the current folder.
        artifacts = None if uri else (run_dir / "mlflow_artifacts").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{(run_dir / 'mlflow.db').absolute()}")
        id_file = run_dir / "mlflow_id.txt"
        if id_file.exists():
            self._run_id = id_file.read_text().strip()
            self._client.update_run(self._run_id, status="RUNNING")
            for key in self._client.get_run(self._run_id).data.metrics:
                history = self._client.get_metric_history(self._run_id, key)
                self._logged[key] = max(metric.step for metric in history)
            return
        experiment = self._client.get_experiment_by_name(self.experiment)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(self.experiment, artifacts)
        )
        self._run_id = self._client.create_run(experiment_id, run_name=self.name or run_dir.name).info.run_id
        _replace_text(id_file, self._run_id + "\n")
        self._client.log_dict(self._run_id, plain(config), "config.json")
        params = [Param(key, value[:500]) for key, value in _flat(plain(config)).items()]
        for i in range(0, len(params), 100):  # MLflow takes 100 at once, of at most 500 characters each.
            self._client.log_batch(self._run_id, params=params[i : i + 100])

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: float) -> None:
        """Log the values of a step, but for those that MLflow has already."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {key: value for key, value in values.items() if step > self._logged.get(key, -1)}
        self._client.log_batch(self._run_id, metrics=[Metric(key, value, now, step) for key, value in new.items()])

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Store the images as one grid."""
        self._client.log_image(self._run_id, image_grid(images), artifact_file=f"{name}_{step}.png")

    def close(self) -> None:
        """Mark the run as finished."""
        if self._client is not None:
            self._client.set_terminated(self._run_id)
            self._client = None


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a config to what JSON has."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Name every leaf by its path: `model.width`."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat
