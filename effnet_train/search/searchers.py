"""What proposes candidates: the interface of all searchers, and the two that learn nothing by gradients."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from effnet_train.search.space import Tokens


class Searcher(Protocol):
    """Propose candidates in rounds, and learn from what came of them.

    A searcher is a function of its arguments and of what it was told, in order: the state says where it stands, so that
    a search goes on as if it had never stopped. `sizes` are the number of values of each token.
    """

    def ask(self, count: int) -> list[Tokens]:
        """Return candidates; the same again after `load_state_dict` of a state from before."""

    def tell(self, candidates: Sequence[Tokens], rewards: Sequence[float]) -> Mapping[str, float]:
        """Learn the rewards of candidates that were asked for, and return what is worth a curve."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes: tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where `state_dict` was called."""


class Random:
    """Propose any candidate as likely as any other."""

    def __init__(self, *, sizes: Sequence[int], seed: int = 0) -> None:
        self._sizes = tuple(sizes)
        self._generator = torch.Generator().manual_seed(seed)

    def ask(self, count: int) -> list[Tokens]:
        """Return candidates."""
        return [tuple(self._below(size) for size in self._sizes) for _ in range(count)]

    def tell(self, candidates: Sequence[Tokens], rewards: Sequence[float]) -> Mapping[str, float]:
        """Learn nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return where the random numbers stand."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._generator.set_state(state["generator"])

    def _below(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self._generator))


class Evolution(Random):
    """Propose changes of good candidates: the best of a few, drawn from the last ones, with one token changed.

    The `population` is of the newest candidates, however good the older were; the first ones are random. `sample` of
    them compete to be a parent.

    Source: Real et al., arXiv 1802.01548 (regularised evolution); theirs are 100 and 25.
    Raises: ValueError naming the key.
    """

    def __init__(self, *, sizes: Sequence[int], seed: int = 0, population: int = 100, sample: int = 25) -> None:
        super().__init__(sizes=sizes, seed=seed)
        if not 1 <= sample <= population:
            raise ValueError(f"searcher.sample={sample} must be from 1 to searcher.population={population}")
        self._needed = population
        self._sample = sample
        self._population: deque[tuple[Tokens, float]] = deque(maxlen=population)

    def ask(self, count: int) -> list[Tokens]:
        """Return random candidates until the population is full, then children of it."""
        if len(self._population) < self._needed:
            return super().ask(count)
        return [self._child() for _ in range(count)]

    def tell(self, candidates: Sequence[Tokens], rewards: Sequence[float]) -> Mapping[str, float]:
        """Take candidates into the population, from which as many of the oldest go."""
        self._population.extend(zip(candidates, rewards, strict=True))
        return {"population": sum(value for _, value in self._population) / max(1, len(self._population))}

    def state_dict(self) -> dict[str, Any]:
        """Return the population, too."""
        return {**super().state_dict(), "population": [(list(tokens), value) for tokens, value in self._population]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with that population."""
        super().load_state_dict(state)
        self._population.clear()
        self._population.extend((tuple(tokens), value) for tokens, value in state["population"])

    def _child(self) -> Tokens:
        drawn = [self._population[self._below(len(self._population))] for _ in range(self._sample)]
        parent = list(max(drawn, key=lambda member: member[1])[0])
        place = self._below(len(parent))
        # Another value than the parent's: a child is never its parent.
        parent[place] = (parent[place] + 1 + self._below(self._sizes[place] - 1)) % self._sizes[place]
        return tuple(parent)
