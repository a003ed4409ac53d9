"""A factorised hierarchical space: blocks that each have their own operation, kernel, gate, skip, width and depth."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effnet_train.models.efficientnet import squeezed
from effnet_train.models.mnasnet import STAGE_KEYS, FoundStage, found_stages
from effnet_train.models.scaling import round_channels, scale

Stages = tuple[Mapping[str, Any], ...]
Tokens = tuple[int, ...]
# What a block's tokens say, in this order.
DECISIONS = ("op", "kernel", "se_ratio", "skip", "channels", "repeats")
_SHAPE = ("stride", "channels", "repeats")
# What the lists hold, and what that is called.
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("op", "skip"), ((str,), "words")),
    **dict.fromkeys(("kernel", "layers"), ((int,), "whole numbers")),
    **dict.fromkeys(("se_ratio", "width"), ((int, float), "numbers")),
}


@dataclass(frozen=True)
class Decision:
    """Hold what one token chooses: the block, the key of its stage, the values to choose from."""

    block: int
    key: str
    values: tuple[Any, ...]


class Space:
    """Turn tokens into the stages of a network and back.

    `blocks` are a reference's stages: `stride`, `channels`, `repeats`. A block's width is one of the factors `width` of
    its channels, rounded as scaling rounds them; its depth has `layers` added, and is at least 1. A block that holds a
    list of its own under one of `op`, `kernel`, `se_ratio`, `skip`, `width`, `layers` chooses from that. Values that
    rounding makes equal are one, and what leaves no choice takes no token, so that different tokens are different
    stages. `stem_channels` and `head_channels`, multiples of 8, are those of all networks.

    Source: Tan et al., arXiv 1807.11626, section 4.1; the reference there is MobileNetV2.
    Raises: ValueError naming the key.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[Mapping[str, Any]],
        op: Sequence[str],
        kernel: Sequence[int],
        se_ratio: Sequence[float],
        skip: Sequence[str],
        width: Sequence[float],
        layers: Sequence[int],
        stem_channels: int = 32,
        head_channels: int = 1280,
    ) -> None:
        shared = {"op": op, "kernel": kernel, "se_ratio": se_ratio, "skip": skip, "width": width, "layers": layers}
        if not isinstance(blocks, list | tuple) or not blocks:
            raise ValueError(f"space.blocks={blocks} holds none: give a list of the reference's stages")
        for name, value in {"stem_channels": stem_channels, "head_channels": head_channels}.items():
            if type(value) is not int or value < 8 or value % 8:
                raise ValueError(f"space.{name}={value} must be a multiple of 8, to which scaling rounds")
        self.stem_channels = stem_channels
        self.head_channels = head_channels
        self._choices: list[dict[str, tuple[Any, ...]]] = []
        for i, block in enumerate(blocks):
            try:
                self._choices.append(_choices(block, shared))
            except ValueError as error:
                raise ValueError(f"space.blocks[{i}]: {error}") from None
        self._strides = [block["stride"] for block in blocks]
        self.decisions = tuple(
            Decision(i, key, choices[key])
            for i, choices in enumerate(self._choices)
            for key in DECISIONS
            if len(choices[key]) > 1
        )
        if not self.decisions:
            raise ValueError("space holds a single network: give lists of several values to choose from")
        self._check_values()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of values of each token."""
        return tuple(len(decision.values) for decision in self.decisions)

    @property
    def count(self) -> int:
        """Return the number of token sequences."""
        return math.prod(self.sizes)

    def decode(self, tokens: Sequence[int]) -> Stages:
        """Return the stages that tokens stand for, as `models.mnasnet.MnasNet` takes them."""
        assert len(tokens) == len(self.decisions)
        chosen = [{key: values[0] for key, values in choices.items()} for choices in self._choices]
        for token, decision in zip(tokens, self.decisions, strict=True):
            chosen[decision.block][decision.key] = decision.values[token]
        found = ({**values, "stride": stride} for values, stride in zip(chosen, self._strides, strict=True))
        return tuple({key: values[key] for key in STAGE_KEYS} for values in found)

    def encode(self, stages: Sequence[Mapping[str, Any]]) -> Tokens:
        """Return the tokens of stages. Raises ValueError where the space holds no such network, saying what."""
        if len(stages) != len(self._choices):
            raise ValueError(f"the space has {len(self._choices)} blocks, and the network {len(stages)} stages")
        tokens = []
        for i, (stage, choices, stride) in enumerate(zip(stages, self._choices, self._strides, strict=True)):
            wanted = {"se_ratio": 0.0, "skip": "identity", **stage}
            missing = [key for key in DECISIONS if wanted[key] not in choices[key]]
            if missing or wanted["stride"] != stride:
                key = missing[0] if missing else "stride"
                known = choices[key] if missing else (stride,)
                raise ValueError(f"block {i + 1} of the space has no {key}={wanted[key]}, only {_listed(known)}")
            tokens += [choices[key].index(wanted[key]) for key in DECISIONS if len(choices[key]) > 1]
        return tuple(tokens)

    def describe(self) -> Iterator[str]:
        """Word each block's choices, a line each."""
        for i, (choices, stride) in enumerate(zip(self._choices, self._strides, strict=True)):
            words = [f"{key} {_listed(choices[key])}" for key in DECISIONS]
            yield f"block {i + 1}: stride {stride}; {'; '.join(words)}"

    def _check_values(self) -> None:
        """Build the stages of each value once. Raises ValueError for one that no network has."""
        for number in range(max(self.sizes)):
            found_stages(self.decode([min(number, size - 1) for size in self.sizes]), self.stem_channels)


def _choices(block: Mapping[str, Any], shared: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """Return a block's values by decision, none twice."""
    if not isinstance(block, Mapping):
        raise ValueError(f"{block!r} is no stage: give {', '.join(_SHAPE)}")
    unknown = [str(key) for key in block if key not in (*_SHAPE, *shared)]
    lacking = [key for key in _SHAPE if key not in block]
    if unknown or lacking:
        problem = f"{unknown[0]} is not a key of it" if unknown else f"it lacks {lacking[0]}"
        raise ValueError(f"{problem}: {', '.join(_SHAPE)}, and lists under {', '.join(shared)}")
    for key in _SHAPE:
        if type(block[key]) is not int or block[key] < 1:
            raise ValueError(f"{key}={block[key]} must be a whole number above 0")
    own = {**shared, **{key: block[key] for key in shared if key in block}}
    for key, values in own.items():
        kinds, word = _KINDS[key]
        if not isinstance(values, list | tuple) or not values or not all(type(value) in kinds for value in values):
            raise ValueError(f"{key}={values} must be a list of {word} to choose from")
    own["channels"] = [round_channels(block["channels"], width) for width in own.pop("width")]
    own["repeats"] = [max(1, block["repeats"] + added) for added in own.pop("layers")]
    own["se_ratio"] = [float(value) for value in own["se_ratio"]]
    return {key: tuple(dict.fromkeys(own[key])) for key in DECISIONS}


def _listed(values: Sequence[Any]) -> str:
    return "/".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def same_network(
    stages: Sequence[Mapping[str, Any]], stem_channels: int, *, width: float = 1.0, depth: float = 1.0
) -> str:
    """Return what is equal of stages that, scaled so, make the same network, though their values are others.

    An identity that shapes allow nowhere in a stage is none, and so is a pooled skip where nothing is pooled. Ratios of
    squeeze-excite are what they come to, in a stage's first block and in the others.
    """
    scaled = scale(found_stages(stages, stem_channels), width, depth)
    found = []
    for stage in scaled:
        assert isinstance(stage, FoundStage)
        first, *others = stage.blocks
        same = first.stride == 1 and first.in_channels == first.out_channels
        skip = stage.skip
        if skip == "pool" and same:
            skip = "identity"
        if skip == "identity" and not same and not others:
            skip = "none"
        op = stage.op if stage.op == "conv" else f"mbconv{stage.expand_ratio}"
        gates = "/".join(str(squeezed(block.in_channels, stage.se_ratio)) for block in stage.blocks[:2])
        shape = (op, stage.kernel, stage.stride, stage.out_channels, stage.repeats, gates, skip)
        found.append(" ".join(map(str, shape)))
    return f"{scaled[0].in_channels}; {'; '.join(found)}"
