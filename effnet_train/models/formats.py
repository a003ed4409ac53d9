"""State dicts of other libraries: recognised by their names, turned into ours and back."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.scaling import EFFICIENTNET_B0, scale

_SHOWN = 20  # of the tensors that differ
_COUNTER = "num_batches_tracked"  # absent from what TensorFlow's weights were turned into; ours stays 0
# What training scripts put around a state dict (timm, torchvision and others), the averaged weights' names first.
_WRAPPERS = {
    "ema": ("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    "raw": ("state_dict", "model", "model_state_dict", "net"),
}


@dataclass(frozen=True)
class Format:
    """What a library calls our modules: those outside the blocks, and those of a block that expands or does not.

    `block` may refer to a block's {stage} and {place} in it, both from 0, to {feature}, the stage from 1, and to its
    {number} through all stages. `gated_only`: the library has no network without squeeze-excite.
    """

    block: str
    ends: Mapping[str, str]
    expanding: Mapping[str, str]
    plain: Mapping[str, str]
    gated_only: bool = False


_ENDS = ("stem.conv", "stem.norm", "head.conv", "head.norm", "classifier")
_PARTS = (
    *("expand.conv", "expand.norm", "depthwise.conv", "depthwise.norm"),
    *("squeeze_excite.reduce", "squeeze_excite.expand", "project.conv", "project.norm"),
)


def _named(parts: tuple[str, ...], theirs: str) -> dict[str, str]:
    return dict(zip(parts, theirs.split(), strict=True))


_OURS = Format(
    block="stages.{stage}.{place}",
    ends=_named(_ENDS, " ".join(_ENDS)),
    expanding=_named(_PARTS, " ".join(_PARTS)),
    plain=_named(_PARTS[2:], " ".join(_PARTS[2:])),
)
FORMATS: Mapping[str, Format] = {
    "effnet_train": _OURS,
    "timm": Format(
        block="blocks.{stage}.{place}",
        ends=_named(_ENDS, "conv_stem bn1 conv_head bn2 classifier"),
        expanding=_named(_PARTS, "conv_pw bn1 conv_dw bn2 se.conv_reduce se.conv_expand conv_pwl bn3"),
        plain=_named(_PARTS[2:], "conv_dw bn1 se.conv_reduce se.conv_expand conv_pw bn2"),
    ),
    "torchvision": Format(
        block="features.{feature}.{place}.block",
        ends=_named(_ENDS, "features.0.0 features.0.1 features.8.0 features.8.1 classifier.1"),
        expanding=_named(_PARTS, "0.0 0.1 1.0 1.1 2.fc1 2.fc2 3.0 3.1"),
        plain=_named(_PARTS[2:], "0.0 0.1 1.fc1 1.fc2 2.0 2.1"),
        gated_only=True,
    ),
    "lukemelas": Format(
        block="_blocks.{number}",
        ends=_named(_ENDS, "_conv_stem _bn0 _conv_head _bn1 _fc"),
        expanding=_named(_PARTS, "_expand_conv _bn0 _depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2"),
        plain=_named(_PARTS[2:], "_depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2"),
    ),
}
_OUR_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.(.+)")


def names(ours: Iterable[str], fmt: str) -> dict[str, str]:
    """Map our names of a whole network's tensors to those of the format `fmt`, one of FORMATS."""
    ours = list(ours)
    places = sorted({(int(match[1]), int(match[2])) for match in map(_OUR_BLOCK.fullmatch, ours) if match})
    known = set(ours)
    modules = dict(FORMATS[fmt].ends)
    for number, (stage, place) in enumerate(places):
        own = _OURS.block.format(stage=stage, place=place)
        theirs = FORMATS[fmt].block.format(stage=stage, place=place, feature=stage + 1, number=number)
        expands = f"{own}.expand.conv.weight" in known
        parts = FORMATS[fmt].expanding if expands else FORMATS[fmt].plain
        modules |= {f"{own}.{part}": f"{theirs}.{name}" for part, name in parts.items()}
    split = {name: name.rpartition(".") for name in ours}
    return {name: f"{modules[module]}.{leaf}" for name, (module, _, leaf) in split.items()}


def from_ours(tensors: Mapping[str, Tensor], fmt: str) -> dict[str, Tensor]:
    """Give a whole network's tensors the names of the format `fmt`. Raises ValueError where it has no such network."""
    if FORMATS[fmt].gated_only and not any(".squeeze_excite." in name for name in tensors):
        raise ValueError(f"{fmt} has no EfficientNet without squeeze-excite (Lite): choose another format")
    theirs = names(tensors, fmt)
    return {theirs[name]: tensor for name, tensor in tensors.items()}


def to_ours(tensors: Mapping[str, Tensor], fmt: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of the format `fmt` our names and types: those of `like`, our state dict, whose values are not used.

    Counters of batches become 0. Raises ValueError listing, by their names, what is missing, unknown or misshapen.
    """
    theirs = names(like, fmt)
    wrong = []
    for name, own in like.items():
        found = tensors.get(theirs[name])
        if found is None:
            wrong += [] if name.endswith(_COUNTER) else [f"{theirs[name]} is missing"]
        elif found.shape != own.shape:
            wrong.append(f"{theirs[name]} is {tuple(found.shape)}, not {tuple(own.shape)}")
        elif found.is_floating_point() != own.is_floating_point() and not name.endswith(_COUNTER):
            wrong.append(f"{theirs[name]} is {str(found.dtype).removeprefix('torch.')}, not a floating-point number")
    wrong += [f"{name} is not part of it" for name in sorted(set(tensors) - set(theirs.values()))]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{len(wrong)} tensors differ: {'; '.join(wrong[:_SHOWN])}{more}")
    return {
        name: torch.zeros((), dtype=own.dtype) if name.endswith(_COUNTER) else tensors[theirs[name]].to(own.dtype)
        for name, own in like.items()
    }


def recognise(tensors: Mapping[str, Any]) -> str:
    """Return the format that the names belong to. Raises ValueError where they belong to none."""
    found = {fmt: sum(name in tensors for name in _end_weights(fmt)) for fmt in FORMATS}
    best = max(found, key=lambda fmt: found[fmt])
    if not found[best]:
        shown = ", ".join(list(tensors)[:3]) or "none at all"
        raise ValueError(f"its tensors' names ({shown}, ...) are not those of an EfficientNet of {', '.join(FORMATS)}")
    return best


def _end_weights(fmt: str) -> list[str]:
    # Not the classifier, which other kinds of networks have too.
    return [f"{FORMATS[fmt].ends[end]}.weight" for end in ("stem.conv", "head.conv")]


def num_classes(tensors: Mapping[str, Tensor], fmt: str) -> int:
    """Return the number of classes of a state dict of the format `fmt`; 1000 where its classifier is missing."""
    bias = tensors.get(f"{FORMATS[fmt].ends['classifier']}.bias")
    return len(bias) if bias is not None and bias.ndim == 1 else 1000


def is_gated(tensors: Mapping[str, Any], fmt: str) -> bool:
    """Say whether a state dict of the format `fmt` holds squeeze-excite, which Lite has not."""
    parts = {FORMATS[fmt].plain["squeeze_excite.reduce"], FORMATS[fmt].expanding["squeeze_excite.reduce"]}
    return any(name.endswith(tuple(f".{part}.weight" for part in parts)) for name in tensors)


def nearest(tensors: Mapping[str, Tensor], fmt: str, variants: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which of the variants, model configurations by name, is the most like a state dict of the format `fmt`.

    Only EfficientNets among them are looked at: our other networks have no foreign names. The widths of the depthwise
    convolutions tell all variants apart but B0 and Lite0, which squeeze-excite does.
    """
    found = Counter(len(tensor) for tensor in tensors.values() if tensor.ndim == 4 and tensor.shape[1] == 1)
    gated = is_gated(tensors, fmt)

    def distance(name: str) -> tuple[int, bool]:
        config = variants[name]
        stages = scale(EFFICIENTNET_B0, config["width"], config["depth"], fixed_ends=config["fixed_ends"])
        expected = Counter(block.in_channels * block.expand_ratio for stage in stages for block in stage.blocks)
        differing = (found - expected).total() + (expected - found).total()
        return differing, (config["se_ratio"] > 0) != gated

    known = (name for name, config in variants.items() if config["_target_"].endswith(f".{EfficientNet.__name__}"))
    return min(known, key=distance)


def skeleton(config: Mapping[str, Any], classes: int) -> dict[str, Tensor]:
    """Return the names, shapes and types of a model configuration's state dict, without its values."""
    arguments = {key: value for key, value in config.items() if key != "_target_"}
    with torch.device("meta"):
        return EfficientNet(**{**arguments, "num_classes": classes}).state_dict()


def state_dict_of(payload: object, which: str) -> dict[str, Tensor]:
    """Find the state dict in what a training script saved, the `ema` or the `raw` one where there are both.

    What data parallelism and compilation put before the names is taken off. Raises ValueError where there is none.
    """
    if not isinstance(payload, Mapping):
        raise ValueError(f"it holds a {type(payload).__name__}, not a state dict")
    # Where there are no averages, the weights are what was to be evaluated; but averages are not the raw weights.
    for key in (*_WRAPPERS[which], *(_WRAPPERS["raw"] if which == "ema" else ())):
        if isinstance(payload.get(key), Mapping):
            return state_dict_of(payload[key], which)
    averages = [key for key in _WRAPPERS["ema"] if isinstance(payload.get(key), Mapping)]
    if averages:
        raise ValueError(f"weights=raw: it holds averages only ({averages[0]}): use weights=ema")
    # torch's own averaged model counts its updates.
    tensors = {str(key): value for key, value in payload.items() if key != "n_averaged"}
    plain = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if plain or not tensors:
        raise ValueError(f"it holds no state dict: {', '.join(plain[:3]) or 'nothing'} where tensors should be")
    stripped = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        raise ValueError("it holds the same tensors twice, with and without the prefixes module. or _orig_mod.")
    return stripped
