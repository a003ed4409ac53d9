"""Runs of one base network scaled in depth, width and resolution: which there are, and what each is to its base."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from effnet_train.analysis.runs import Run, Scores, over_seeds, what_it_computes

DIMENSIONS = ("depth", "width", "resolution")
METHODS = (*DIMENSIONS, "compound")
# What differs between the members of a family: the dimensions, and what is regularised more in a larger network.
_SCALED = (
    *(f"model.{key}" for key in (*DIMENSIONS, "dropout", "drop_connect", "checkpointing", "fused")),
    "data.preprocess.resolution",
)
# What somebody scaled is dearer by so much; of candidates on one budget two may differ in one dimension, but by less.
_CLEARLY = 1.3


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
    def grows(self) -> bool:
        """Say whether each compound network is larger than the one before in all, so that a line through them is meant.

        A search's candidates are not: they share a budget.
        """
        pairs = pairwise(self.by("compound"))
        return all(other.factors[key] > one.factors[key] for one, other in pairs for key in DIMENSIONS)

    @property
    def name(self) -> str:
        """Word what it is: base network, its resolution, data set."""
        run = self.base.scores.first
        network = str(run.config["model"]["_target_"]).rpartition(".")[2]
        size = " x ".join(f"{key} {run.shape[key]:.3g}" for key in ("width", "depth") if run.shape[key] != 1)
        return f"{network}{f' ({size})' if size else ''} at {run.shape['resolution']} pixels, {run.data.name}"


def families(
    runs: Iterable[Run], multiply_adds: Callable[[Run], int], free: Sequence[str] = (), base: Path | None = None
) -> tuple[list[Family], list[Run]]:
    """Return the families of more than one network among the runs, the largest first, and who is in none.

    These are a run each of the networks that are trained as a family's are, but scaled from no base.
    `multiply_adds` counts a run's network, `free` are keys of the configuration that change no result. `base` is the
    folder of a run whose network is the base of the only family; without it, see `_owners`.
    """
    groups: dict[str, list[Member]] = {}
    for scores in over_seeds(runs, free):
        key = what_it_computes(scores.first, ("seed", *free, *_SCALED))
        groups.setdefault(key, []).append(Member(scores, multiply_adds(scores.first), {}))
    found, left_out = [], []
    for group in groups.values():
        group.sort(key=lambda member: member.multiply_adds)
        if base is None:
            owners = _owners(group)
        else:
            owners = _by_size(group, [i for i, one in enumerate(group) if _is_run_of(one, base)])
        for root in sorted(set(owners.values())):
            members = [group[i] for i in range(len(group)) if owners.get(i) == root]
            seen = [replace(member, factors=_factors(group[root], member)) for member in (group[root], *members)]
            found.append(Family(seen[0], tuple(seen[1:])))
        if owners:
            left_out += [one.scores.first for i, one in enumerate(group) if i not in {*owners, *owners.values()}]
    return sorted(found, key=lambda family: -len(family.members)), left_out


def _owners(group: Sequence[Member]) -> dict[int, int]:
    """Return the place of the base of each network that has one, among networks by multiply-adds.

    A base is scaled from no other network in one dimension or two, and others are from it in one; or it is of width and
    depth 1, as B0. Where there is neither, as among a search's candidates, it is what the most are larger than.
    What is scaled from several in more dimensions than one is the largest one's.
    """
    indices = range(len(group))
    single = [[i for i in indices if _larger(one, group[i]) == 1] for one in group]
    tops = [i for i in indices if not any(i in others for others in single)]
    roots = [i for i in tops if not any(0 < _larger(group[top], group[i]) < len(DIMENSIONS) for top in tops)]
    owners: dict[int, int] = {}
    for root in sorted(roots, key=lambda i: -len(single[i])):
        if any(group[i].multiply_adds > _CLEARLY * group[root].multiply_adds for i in single[root]):
            owners = {**dict.fromkeys(single[root], root), **owners}
    bases = [i for i in roots if i in owners.values() or _is_unscaled(group[i])]
    if not bases:
        bases = [max(indices, key=lambda i: sum(_larger(group[i], other) > 0 for other in group))]
    return {**_by_size(group, bases), **owners}


def _by_size(group: Sequence[Member], bases: Sequence[int]) -> dict[int, int]:
    """Return for each network the largest base that it is scaled from, where there is one."""
    found = ((i, [base for base in bases if _larger(group[base], one)]) for i, one in enumerate(group))
    return {i: max(those) for i, those in found if those and i not in bases}


def _larger(base: Member, other: Member) -> int:
    """Return in how many dimensions a network is larger than the base; 0 where it is smaller in one."""
    factors = [factor for factor in _factors(base, other).values() if not _is(factor, 1)]
    return len(factors) if all(factor > 1 for factor in factors) else 0


def _is_unscaled(member: Member) -> bool:
    return all(_is(member.scores.first.shape[key], 1) for key in ("depth", "width"))


def _is_run_of(member: Member, folder: Path) -> bool:
    return any(run.folder.resolve() == folder.resolve() for run in member.scores.runs)


def _factors(base: Member, member: Member) -> dict[str, float]:
    one, other = base.scores.first.shape, member.scores.first.shape
    return {key: float(other[key]) / float(one[key]) for key in DIMENSIONS}


def _is(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=2e-3)  # a resolution is a whole number of pixels
