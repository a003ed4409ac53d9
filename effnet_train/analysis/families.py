"""Runs of one base network scaled in depth, width and resolution: which there are, and what each is to its base."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effnet_train.analysis.runs import Run, Scores, over_seeds, without

DIMENSIONS = ("depth", "width", "resolution")
METHODS = (*DIMENSIONS, "compound")
# What differs between the members of a family: the dimensions, and what is regularised more in a larger network.
_SCALED = (
    *(f"model.{key}" for key in (*DIMENSIONS, "dropout", "drop_connect", "checkpointing", "fused")),
    "data.preprocess.resolution",
)


@dataclass(frozen=True)
class Member:
    """Hold a network's scores over seeds, its multiply-adds, and its dimensions as factors of the base's."""

    scores: Scores
    multiply_adds: int
    factors: Mapping[str, float]

    @property
    def method(self) -> str | None:
        """Return the dimension that alone is scaled, `compound` for all three, None for the base and for two."""
        changed = [key for key in DIMENSIONS if not _is(self.factors[key], 1)]
        if len(changed) == 1:
            return changed[0]
        return "compound" if len(changed) == len(DIMENSIONS) else None

    def at(self, **factors: float) -> bool:
        """Say whether the dimensions named have these factors."""
        return all(_is(self.factors[key], value) for key, value in factors.items())


@dataclass(frozen=True)
class Family:
    """Hold a base network and those scaled up from it, trained in the same way on the same data, by multiply-adds."""

    base: Member
    members: tuple[Member, ...]

    def by(self, method: str) -> list[Member]:
        """Return the base and what `method` makes of it."""
        return [self.base, *(member for member in self.members if member.method == method)]

    @property
    def name(self) -> str:
        """Word what it is: base network, its resolution, data set."""
        run = self.base.scores.first
        network = str(run.config["model"]["_target_"]).rpartition(".")[2]
        size = " x ".join(f"{key} {run.shape[key]:.3g}" for key in ("width", "depth") if run.shape[key] != 1)
        return f"{network}{f' ({size})' if size else ''} at {run.shape['resolution']} pixels, {run.data}"


def families(runs: Iterable[Run], multiply_adds: Callable[[Run], int], free: Sequence[str] = ()) -> list[Family]:
    """Return the families of more than one network among the runs, the largest first.

    The base is the member of the fewest multiply-adds; a member that is smaller than it in a dimension is left out.
    `multiply_adds` counts a run's network, `free` are keys of the configuration that change no result.
    """
    groups: dict[str, list[Scores]] = {}
    for scores in over_seeds(runs, free):
        config = without(scores.first.config, ("seed", "name", "run_root", *free, *_SCALED))
        groups.setdefault(json.dumps(config, sort_keys=True, default=str), []).append(scores)
    found = []
    for group in groups.values():
        counts = sorted(((multiply_adds(scores.first), scores) for scores in group), key=lambda pair: pair[0])
        base = counts[0][1].first.shape
        members = [Member(scores, count, _factors(scores.first.shape, base)) for count, scores in counts]
        larger = [member for member in members[1:] if all(member.factors[key] > 1 - 1e-6 for key in DIMENSIONS)]
        if larger:
            found.append(Family(members[0], tuple(larger)))
    return sorted(found, key=lambda family: -len(family.members))


def _factors(shape: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(shape[key]) / float(base[key]) for key in DIMENSIONS}


def _is(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=2e-3)  # a resolution is a whole number of pixels
