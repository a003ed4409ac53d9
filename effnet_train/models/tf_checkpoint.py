"""Read the authors' TensorFlow checkpoints: their variables under our names and in our layouts.

Source: tensorflow/tpu, models/official/efficientnet. `efficientnet_model.py` and Keras name the variables, where Keras
numbers the layers of one kind in a scope in the order of their first call; `utils.get_ema_vars` says what is averaged.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effnet_train.models.scaling import EFFICIENTNET_B0
from effnet_train.models.tensor_bundle import Bundle, read_bundle

AVERAGE = "/ExponentialMovingAverage"
OPTIMIZER_SLOTS = ("RMSProp", "RMSProp_1", "Momentum", "LARSOptimizer")
LISTED = 20  # names in an error, before the rest are only counted

_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_AXES = {"depthwise_kernel": (2, 3, 0, 1), "kernel": (3, 2, 0, 1)}  # HWC1 -> C1HW, HWIO -> OIHW


def read_tensorflow(prefix: Path, *, which: str = "ema") -> dict[str, Tensor]:
    """Read an EfficientNet or a Lite from the files `prefix.index` and `prefix.data-*` as our state dict, in float32.

    `which="ema"` takes the moving averages where the checkpoint holds any, `"raw"` the weights they follow.

    Raises: FileNotFoundError for files that are absent; ValueError for damage, and for a checkpoint whose variables are
    not those of one such network, naming them as TensorFlow does.
    """
    bundle = read_bundle(prefix)
    try:
        variables = _chosen(bundle, which)
        names = our_names({name: bundle.shape(stored) for name, stored in variables.items()})
    except ValueError as error:
        raise ValueError(f"checkpoint {prefix}: {error}") from error
    tensors = {}
    for theirs, ours in names.items():
        tensors[ours] = _tensor(bundle[variables[theirs]], theirs)
        if ours.endswith(".running_var"):
            # TensorFlow does not count batches, and our BatchNorm stays at 0.
            tensors[ours.replace("running_var", "num_batches_tracked")] = torch.zeros((), dtype=torch.int64)
    return tensors


def _chosen(bundle: Bundle, which: str) -> dict[str, str]:
    """Return the name in the checkpoint of every variable of the network, by the variable's own name."""
    if which not in ("ema", "raw"):
        raise ValueError(f"weights={which} is not known: use ema or raw")
    model = [name for name in bundle if name != "global_step" and name.rsplit("/", 1)[-1] not in OPTIMIZER_SLOTS]
    averages = {name.removesuffix(AVERAGE): name for name in model if name.endswith(AVERAGE)}
    raw = {name: name for name in model if not name.endswith(AVERAGE)}
    if which == "raw" or not averages:
        if not raw:
            raise ValueError("it holds moving averages only: use weights=ema")
        return raw
    if lacking := raw.keys() - averages.keys():
        raise ValueError(
            f"some variables have moving averages and {_listed(lacking)} have none: "
            "use weights=raw, or a checkpoint that is complete"
        )
    return averages


def our_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Map the names of a network's variables to those of our parameters and statistics, given TensorFlow's shapes.

    Raises: ValueError listing the variables that are missing, unexpected or of another number of dimensions.
    """
    scope = _scope(shapes)
    local = [name.removeprefix(scope) for name in shapes if name.startswith(scope)]
    # The authors' BatchNorm has another name with another optimizer.
    tpu = any("/tpu_batch_normalization" in name for name in local)
    norm = "tpu_batch_normalization" if tpu else "batch_normalization"
    names = {scope + theirs: ours for theirs, ours in _outside_blocks(norm)}
    blocks = {f"{scope}blocks_{i}/": layout for i, layout in enumerate(_block_layouts(local, norm))}
    inside = {prefix + theirs for prefix, layout in blocks.items() for theirs in layout}
    _check_complete(expected=names.keys() | inside, found=set(shapes))
    _check_dimensions(shapes)

    places = _places([_outline(shapes, prefix, layout) for prefix, layout in blocks.items()])
    for place, (prefix, layout) in zip(places, blocks.items(), strict=True):
        names |= {prefix + theirs: f"{place}.{ours}" for theirs, ours in layout.items()}
    return names


def _scope(names: Collection[str]) -> str:
    """Return what a network's variables begin with: its name and a slash, or nothing."""
    matches = (re.fullmatch(r"(?P<scope>(?:.*/)?)(?:stem|head|blocks_\d+)/.*", name) for name in names)
    scopes = {match["scope"] for match in matches if match}
    if not scopes:
        raise ValueError(
            f"it has no variables in stem, blocks_* or head, as the authors' code has, but {_listed(names)}"
        )
    if len(scopes) > 1:
        raise ValueError(f"it holds several networks ({', '.join(sorted(scopes))}): save one alone")
    return scopes.pop()


def _outside_blocks(norm: str) -> Iterator[tuple[str, str]]:
    for part in ("stem", "head"):
        yield f"{part}/conv2d/kernel", f"{part}.conv.weight"
        yield from ((f"{part}/{norm}/{theirs}", f"{part}.norm.{ours}") for theirs, ours in _NORM.items())
    yield "head/dense/kernel", "classifier.weight"
    yield "head/dense/bias", "classifier.bias"


def _block_layouts(local: Iterable[str], norm: str) -> list[dict[str, str]]:
    """Map the names within every block to ours."""
    within: dict[int, set[str]] = defaultdict(set)
    for name in local:
        match = re.fullmatch(r"blocks_(\d+)/(.*)", name)
        if match:
            within[int(match[1])].add(match[2])
    gated = any(name.startswith("se/") for names in within.values() for name in names)
    if within and max(within) >= len(within):
        raise ValueError(f"its blocks are numbered to {max(within)}, and there are only {len(within)} of them")
    layouts = []
    for i in range(len(within)):
        # Only a third BatchNorm, or a second plain convolution, tells a block that expands from one that does not.
        expands = any(name.startswith(("conv2d_1/", f"{norm}_2/")) for name in within[i])
        layouts.append(dict(_block_layout(norm, expands=expands, gated=gated)))
    return layouts


def _block_layout(norm: str, *, expands: bool, gated: bool) -> Iterator[tuple[str, str]]:
    convs, norms = _numbered("conv2d"), _numbered(norm)
    for part in ("expand", "depthwise", "project") if expands else ("depthwise", "project"):
        kernel = "depthwise_conv2d/depthwise_kernel" if part == "depthwise" else f"{next(convs)}/kernel"
        yield kernel, f"{part}.conv.weight"
        scope = next(norms)
        yield from ((f"{scope}/{theirs}", f"{part}.norm.{ours}") for theirs, ours in _NORM.items())
    if gated:
        for part, conv in (("reduce", "conv2d"), ("expand", "conv2d_1")):
            yield f"se/{conv}/kernel", f"squeeze_excite.{part}.weight"
            yield f"se/{conv}/bias", f"squeeze_excite.{part}.bias"


def _numbered(name: str) -> Iterator[str]:
    """Yield a name as Keras gives it to one layer after another."""
    yield name
    yield f"{name}_1"
    yield f"{name}_2"


def _check_complete(*, expected: set[str], found: set[str]) -> None:
    wrong = {"missing": expected - found, "unexpected": found - expected}
    if any(wrong.values()):
        text = "; ".join(f"{kind}: {_listed(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"its variables are not those of an EfficientNet of the authors' code; {text}")


def _check_dimensions(shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = []
    for name, shape in shapes.items():
        dimensions = 2 if name.endswith("/dense/kernel") else 4 if name.endswith("kernel") else 1
        if len(shape) != dimensions:
            wrong.append(f"{name} {shape}")
    if wrong:
        raise ValueError(f"its variables have other numbers of dimensions than the authors': {_listed(wrong)}")


def _outline(shapes: Mapping[str, tuple[int, ...]], scope: str, layout: Mapping[str, str]) -> tuple[int, bool, int]:
    """Return a block's kernel, whether it expands, and its output channels: what tells stages apart."""
    theirs = {ours: shapes[scope + name] for name, ours in layout.items()}
    return theirs["depthwise.conv.weight"][0], "expand.conv.weight" in theirs, theirs["project.conv.weight"][-1]


def _places(outlines: Iterable[tuple[int, bool, int]]) -> list[str]:
    """Return where each block stands in our network: the authors count through, we count within stages."""
    stages = [(outline, len(list(blocks))) for outline, blocks in groupby(outlines)]
    kernels = [kernel for (kernel, _, _), _ in stages]
    if kernels != [stage.kernel for stage in EFFICIENTNET_B0]:
        raise ValueError(f"its stages have kernels of {kernels}, which are not EfficientNet's")
    return [f"stages.{i}.{j}" for i, (_, repeats) in enumerate(stages) for j in range(repeats)]


def _tensor(values: np.ndarray, name: str) -> Tensor:
    """Bring a variable into torch's layout, in float32."""
    if name.endswith("/dense/kernel"):
        values = values.T
    elif axes := _AXES.get(name.rsplit("/", 1)[-1]):
        values = values.transpose(axes)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return ", ".join(ordered[:LISTED]) + more
