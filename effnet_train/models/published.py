"""What timm, torchvision and the Hugging Face hub publish: names, files and preprocessing, and how to fetch them."""

import difflib
import hashlib
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

PREFIXES = ("timm:", "torchvision:", "hub:")
# The architectures that are ours too: others of this family share tensor names but not the network.
ARCHITECTURE = re.compile(r"(tf_)?efficientnet_(b[0-7]|lite[0-4])")
_LUKEMELAS = re.compile(r"(adv-)?efficientnet-b[0-7]-[0-9a-f]{8}\.pth")
_HASHED = re.compile(r".+-([0-9a-f]{8,})\.\w+")
_SHOWN = 20  # of choices, where none is close; timm has 1,500
_CFG_KEYS = ("input_size", "mean", "std", "crop_pct", "interpolation")


def is_name(text: str) -> bool:
    """Say whether `text` names published weights (timm:..., torchvision:..., hub:...) instead of a file."""
    return text.startswith(PREFIXES)


def timm_cfg(name: str) -> dict[str, Any]:
    """Return timm's description of `architecture.tag`, or of an architecture's default. Raises ValueError."""
    import timm

    architectures = {known.partition(".")[0] for known in _timm_names()}
    if name not in _timm_names() and name not in architectures:
        raise ValueError(f"timm:{name} is not known: {_closest(name, _timm_names())}")
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    return cfg.to_dict()


def timm_cfgs(architecture: str, classes: int) -> dict[str, dict[str, Any]]:
    """Return timm's descriptions of all weights of an architecture that have this many classes, by name."""
    import timm

    cfgs = {name: timm_cfg(name) for name in timm.list_pretrained(f"{architecture}.*")}
    return {name: cfg for name, cfg in cfgs.items() if cfg["num_classes"] == classes} or cfgs


@cache
def _timm_names() -> list[str]:
    import timm

    found = timm.list_pretrained("*efficientnet_*")
    return [name for name in found if ARCHITECTURE.fullmatch(name.partition(".")[0])]


def timm_preprocess(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return Preprocess's arguments for one of timm's descriptions, as timm evaluates by default. Raises ValueError."""
    missing = [key for key in _CFG_KEYS if cfg.get(key) is None]
    if missing:
        raise ValueError(f"timm's description of the weights lacks {', '.join(missing)}")
    if cfg.get("crop_mode", "center") != "center":
        raise ValueError(f"timm's crop_mode={cfg['crop_mode']} is not offered here: only center is")
    channels, height, width = cfg["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"timm's input_size={list(cfg['input_size'])} is not offered here: images are 3 x N x N")
    return {
        "resolution": height,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "crop_padding": 0,
        "interpolation": cfg["interpolation"],
        "resize": math.floor(height / cfg["crop_pct"]),
    }


def torchvision_weights(architecture: str) -> dict[str, Any]:
    """Return torchvision's published weights of an architecture by name (IMAGENET1K_V1, ...); none if unknown."""
    from torchvision.models import get_model_weights

    if not ARCHITECTURE.fullmatch(architecture) or "lite" in architecture or architecture.startswith("tf_"):
        return {}
    return {entry.name: entry for entry in get_model_weights(architecture)}  # without the alias DEFAULT


def torchvision_entry(name: str) -> tuple[str, str, Any]:
    """Return architecture, name and entry of `architecture.name`; alone, an architecture has torchvision's DEFAULT."""
    architecture, _, which = name.partition(".")
    known = torchvision_weights(architecture)
    if not known or (which and which not in known):
        every = [f"efficientnet_b{number}" for number in range(8)]
        choices = [*every, *(f"{arch}.{which}" for arch in every for which in torchvision_weights(arch))]
        raise ValueError(f"torchvision:{name} is not known: {_closest(name, choices)}")
    entry = known[which] if which else next(iter(known.values())).DEFAULT
    return architecture, entry.name, entry


def torchvision_preprocess(entry: Any) -> dict[str, Any]:
    """Return Preprocess's arguments for one of torchvision's published weights."""
    transforms = entry.transforms()
    return {
        "resolution": transforms.crop_size[0],
        "mean": list(transforms.mean),
        "std": list(transforms.std),
        "crop_padding": 0,
        "interpolation": transforms.interpolation.value,
        "resize": transforms.resize_size[0],
    }


def torchvision_eps(architecture: str) -> float:
    """Return BatchNorm's epsilon of torchvision's network: it has one for B0 to B4 and another for B5 to B7."""
    from torchvision.models import get_model

    with torch.device("meta"):
        network = get_model(architecture, weights=None)
    (eps,) = {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)}
    return eps


def file_name(file: Path) -> str | None:
    """Return what a file is by its published name: timm:NAME, torchvision:NAME, lukemelas or lukemelas_advprop.

    None where its name is not that of a published file, or its contents do not begin the hash in that name.
    """
    hashed = _HASHED.fullmatch(file.name)
    if hashed is None:
        return None
    found = _LUKEMELAS.fullmatch(file.name)
    name = _file_names().get(file.name) if found is None else "lukemelas_advprop" if found[1] else "lukemelas"
    if name is None:
        return None
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return name if digest.startswith(hashed[1]) else None


@cache
def _file_names() -> dict[str, str]:
    urls = {timm_cfg(name).get("url") or "": f"timm:{name}" for name in _timm_names()}
    for architecture in (f"efficientnet_b{number}" for number in range(8)):
        for which, entry in torchvision_weights(architecture).items():
            urls[entry.url] = f"torchvision:{architecture}.{which}"
    return {url.rpartition("/")[2]: name for url, name in urls.items() if url}


def fetch(name: str) -> Path:
    """Return the local file of published weights, downloaded where it is not there yet.

    `timm:NAME`, `torchvision:NAME` or `hub:OWNER/NAME`, where `@REVISION` may follow. Raises ValueError for an unknown
    name, FileNotFoundError where it cannot be fetched.
    """
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        return _download(name, torchvision_entry(rest)[2].url)
    if kind == "timm":
        return _timm_file(name, timm_cfg(rest))
    repository, _, revision = rest.partition("@")
    if repository.count("/") != 1:
        raise ValueError(f"{name} names no repository: give hub:owner/name")
    try:
        file = _from_hub(name, repository, "model.safetensors", revision or None)
    except AbsentError:
        file = _from_hub(name, repository, "pytorch_model.bin", revision or None)
    if not _says_all(file):
        with suppress(AbsentError):
            _from_hub(name, repository, "config.json", revision or None)  # which then lies beside the weights
    return file


def _timm_file(name: str, cfg: Mapping[str, Any]) -> Path:
    if not cfg["hf_hub_id"]:
        return _download(name, cfg["url"])
    return _from_hub(name, cfg["hf_hub_id"], "model.safetensors", None)


def is_other_of_timm(name: str) -> bool:
    """Say whether a name is of timm's, and not of an architecture that is ours too."""
    kind, _, rest = name.partition(":")
    return kind == "timm" and not ARCHITECTURE.fullmatch(rest.partition(".")[0])


def other_of_timm(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return any of timm's networks, `timm:NAME`, with its published weights, and timm's description of them.

    Raises ValueError for an unknown name, FileNotFoundError where the weights cannot be fetched.
    """
    import timm

    choices, rest = timm.list_pretrained(), name.removeprefix("timm:")
    if rest not in choices and rest not in {choice.partition(".")[0] for choice in choices}:
        raise ValueError(f"{name} is not known: {_closest(rest, choices)}")
    described = timm.get_pretrained_cfg(rest)
    assert described is not None
    cfg = described.to_dict()
    weights = {"file": str(_timm_file(name, cfg))}
    return timm.create_model(rest, pretrained=True, pretrained_cfg_overlay=weights), cfg


def _says_all(file: Path) -> bool:
    """Say whether weights are an export of ours, which needs no config.json."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return "effnet_train" in (opened.metadata() or {})
    except SafetensorError:  # another kind of file, or a damaged one, as reading it will tell
        return False


class AbsentError(FileNotFoundError):
    """A file that a repository of the hub does not have."""


def _from_hub(name: str, repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = f"{constants.ENDPOINT}/{repository}"
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (EntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise AbsentError(f"{name}: {where} has no {file}") from error
        raise _unfetched(name, f"{file} of {where}", f"{constants.HF_HUB_CACHE} (HF_HOME)", error) from error


def _download(name: str, url: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rpartition("/")[2]
    if not file.is_file():
        hashed = _HASHED.fullmatch(file.name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hashed[1] if hashed else None, progress=False)
        except (OSError, RuntimeError) as error:
            raise _unfetched(name, url, f"{folder} (TORCH_HOME)", error) from error
    return file


def _unfetched(name: str, what: str, cache_folder: str, error: Exception) -> FileNotFoundError:
    reason = (str(error).splitlines() or [""])[0]
    return FileNotFoundError(
        f"{name}: cannot fetch {what} ({type(error).__name__}: {reason}), and it is not in {cache_folder}: run once "
        "where there is a network and take that folder along, or give the file itself instead of the name"
    )


def _closest(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    more = f" and {len(choices) - _SHOWN:,} more" if len(choices) > _SHOWN else ""
    return f"did you mean {' or '.join(close)}?" if close else f"the choices are {', '.join(choices[:_SHOWN])}{more}"
