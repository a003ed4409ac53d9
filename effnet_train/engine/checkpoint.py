"""Checkpoints that are whole or absent: written beside, synced, renamed; read without running code."""

import argparse
import errno
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from effnet_train.data.preprocess import Preprocess
from effnet_train.models import formats, pretrained, published
from effnet_train.models.tf_checkpoint import read_tensorflow

BEST = "best.pt"
# What a description of weights may end in that somebody else wrote, and that has not the shape it should have.
_SHAPELESS = (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError)
_GRAPHS = (".onnx", ".pt2")
_KEYS = ("effnet_train", "step", "model", "ema", "meta")
EXPORT = "model.safetensors"  # the hub's name for it too
_INDEX = ".index"  # of a TensorFlow checkpoint
_NAME = re.compile(r"step_(\d{9})(\.milestone)?\.pt")


class CheckpointError(ValueError):
    """A checkpoint that is absent, unreadable, or of another kind."""


class _Writer(Protocol):
    def __call__(self, file: IO[bytes]) -> None: ...


def write_atomically(path: Path, write: _Writer) -> None:
    """Let `write` fill a temporary file, sync it to disk, and rename it to `path`: whole or not there at all.

    On any error, a full disk among them, the file that stood at `path` is untouched.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):  # on a disk that has gone, this fails as well, for a reason that says less
            Path(name).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one of our checkpoints to host memory. No code in it is run.

    Raises CheckpointError, with the reason; OSError where the file is there and cannot be read just now, and
    MemoryError, neither of which says anything of the checkpoint.
    """
    return _whole(_load_payload(path), path)


def _whole(payload: Any, path: Path) -> dict[str, Any]:
    lacking = [key for key in _KEYS if not isinstance(payload, dict) or key not in payload]
    if lacking:
        raise CheckpointError(f"{path} is not a checkpoint of effnet_train: it lacks {', '.join(lacking)}")
    return payload


def _is_ours(payload: object) -> bool:
    return isinstance(payload, dict) and "effnet_train" in payload


def _load_payload(path: Path) -> Any:
    try:
        _check_sums(path)
        # Training scripts save their command line along: a namespace, which is no more than a dictionary.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except (OSError, MemoryError) as error:
        # The disk's answer, or the system's: passing on to an older checkpoint would lose steps that are there. But
        # torch's reader, and Python's, say OSError too of what they do not understand, without a number then.
        if isinstance(error, MemoryError) or error.errno not in (None, errno.EINVAL):
            raise
        raise CheckpointError(f"checkpoint {path} is damaged ({error})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read as plain tensors: it is damaged, or holds code, which is never run"
        ) from error
    except Exception as error:  # an unpickler that meets other bytes than a pickle's may raise anything
        if "allocate memory" in str(error):  # torch's allocator, of a file whose checksums are right
            raise MemoryError(f"checkpoint {path} does not fit the memory that is free ({error})") from error
        reason = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"checkpoint {path} is damaged ({reason[0].partition('. This is')[0]})") from error


def _check_sums(path: Path) -> None:
    """Hold every part of torch's zip file against its checksum, which reading alone does not do."""
    if not zipfile.is_zipfile(path):
        return  # torch says what else it may be
    with zipfile.ZipFile(path) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")


def step_files(folder: Path) -> dict[int, Path]:
    """Return the checkpoints `step_*.pt` of a run's folder by their steps, oldest first."""
    found = sorted((match, path) for path in folder.glob("step_*.pt") if (match := step_of(path.name)) is not None)
    return dict(found)


def step_name(step: int, *, milestone: bool = False) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:09d}{'.milestone' * milestone}.pt"


def step_of(name: str) -> int | None:
    """Return the step that a file's name is of; None where it is no checkpoint's, or that of `best.pt`."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def find_checkpoint(path: Path, key: str = "checkpoint") -> Path:
    """Return the file meant by `path`: itself; of a folder, a run's `best.pt`, else its newest step, else an export.

    A TensorFlow checkpoint, given by its prefix or its folder, is its `.index` file. Errors say that `key` has it.
    """
    if path.is_file():
        return path
    index = _tensorflow_index(path, key)
    if index is not None:
        return index
    if not path.is_dir():
        raise CheckpointError(
            f"{key}={path} does not exist: give a .pt or .safetensors file, or a run's folder, or a name "
            f"({'..., '.join(published.PREFIXES)}...)"
        )
    if (path / BEST).is_file():
        return path / BEST
    steps = step_files(path)
    if steps:
        return steps[max(steps)]
    if (path / EXPORT).is_file():
        return path / EXPORT
    raise CheckpointError(f"{key}={path} holds neither {BEST} nor step_*.pt: is it a run's folder?")


def _tensorflow_index(path: Path, key: str) -> Path | None:
    """Return the `.index` file of a TensorFlow checkpoint's prefix, or of a folder that holds one."""
    beside = Path(f"{path}{_INDEX}")
    if beside.is_file():
        return beside
    inside = sorted(path.glob(f"*{_INDEX}")) if path.is_dir() else []
    if len(inside) > 1:
        raise CheckpointError(
            f"{key}={path} holds {len(inside)} TensorFlow checkpoints: give one of "
            f"{', '.join(str(index.with_suffix('')) for index in inside)}"
        )
    return inside[0] if inside else None


@dataclass(frozen=True)
class Weights:
    """Weights with all that is needed to use them: `meta` holds model, preprocess, classes, data, step.

    Published weights have no data and no step; `source` says whose they are.
    """

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


def load_weights(
    path: Path | str,
    which: str = "ema",
    *,
    source: str | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    key: str = "checkpoint",
) -> Weights:
    """Read the `ema` or the `raw` weights of a checkpoint, a run's folder, an export, or of other libraries' weights.

    `path` may also be a name, `timm:...`, `torchvision:...` or `hub:...`, which is fetched where it is not here yet.
    For other libraries' weights: `source` says whose they are, where that is not evident (`pretrained.SOURCES`), and
    `variants` are the model configurations, by name, that they may be of. `key` is what errors call `path`.
    Raises ValueError, FileNotFoundError.
    """
    if which not in ("ema", "raw"):
        raise ValueError(f"weights={which} is not known: use ema or raw")
    given = pretrained.given_origin(source)
    name = str(path) if published.is_name(str(path)) else None
    file = published.fetch(name) if name else find_checkpoint(Path(path), key)
    try:
        tensors, meta = _read(file, which)
        if meta is not None:
            if given is not None:
                raise ValueError(f"source={source}: it says itself what it holds; leave source= away")
            return Weights(tensors, meta)
        tensors, meta = pretrained.interpret(
            tensors,
            variants or {},
            given=given,
            found=pretrained.evident_origin(file, name),
            tensorflow=file.suffix == _INDEX,
        )
    except CheckpointError:
        raise
    except _SHAPELESS as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"checkpoint {name or file}: {reason}") from error
    return Weights(tensors, {**meta, "preprocess": Preprocess(**meta["preprocess"]).to_dict()})


def _read(file: Path, which: str) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """Read a file's tensors and what they are; where it doesn't say, None, and the tensors under their own names."""
    if file.suffix == _INDEX:
        return read_tensorflow(file.with_suffix(""), which=which), None
    if file.suffix in _GRAPHS:
        raise ValueError("it is a graph for other programs, which is not read back: give what it was exported from")
    payload: Any
    header = None
    if file.suffix == ".safetensors":
        payload, header = _load_safetensors(file)
    else:
        payload = _load_payload(file)
    if _is_ours(payload):
        payload = _whole(payload, file)
        return payload["ema" if which == "ema" else "model"], {**_described(payload["meta"]), "step": payload["step"]}
    tensors, beside = formats.state_dict_of(payload, which), pretrained.described_beside(file, "preprocess")
    if not header and beside is None:
        return tensors, None
    if which == "raw":
        raise ValueError("weights=raw: it holds the selected weights only; give the run's best.pt or step_*.pt")
    meta = _described(json.loads(header) if header else beside[1])  # type: ignore[index]
    names = meta.pop("names", None)
    if names is not None:  # an export, under those of the library that can read it as well
        if names not in formats.FORMATS:
            raise ValueError(f"its metadata say that its tensors have the names of {names!r}, which is not known")
        tensors = formats.to_ours(tensors, names, formats.skeleton(meta["model"], len(meta["classes"])))
    return tensors, meta


def _described(meta: Any) -> dict[str, Any]:
    """Return what a file says of itself, having seen that it says enough. Raises ValueError."""
    kinds = {"model": dict, "preprocess": dict, "classes": list}
    lacking = [key for key, kind in kinds.items() if not isinstance(meta, dict) or not isinstance(meta.get(key), kind)]
    if lacking:
        raise ValueError(f"its metadata say nothing of its {', '.join(lacking)}")
    Preprocess(**meta["preprocess"])
    return {"data": {}, **meta}


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read a .safetensors file's tensors, and our part of its header, where there is one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("effnet_train")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error})") from error


def export_safetensors(path: Path, weights: Weights) -> None:
    """Write weights to `path` and what they are to its header and to a JSON file beside it."""
    from safetensors.torch import save

    assert path.suffix == ".safetensors"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.tensors.items()}
    text = json.dumps(weights.meta, indent=2, sort_keys=True)
    write_bytes(path, save(tensors, {"effnet_train": text, "format": "pt"}))
    write_bytes(path.with_suffix(".json"), text.encode() + b"\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`: whole, or not at all."""

    def write(file: IO[bytes]) -> None:
        file.write(data)

    write_atomically(path, write)
