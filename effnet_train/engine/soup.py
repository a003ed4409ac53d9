"""Model soups: the weights of several trainings averaged into one network."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def average(members: Sequence[Tensors]) -> dict[str, Tensor]:
    """Return the mean of state dicts of the same names and shapes, summed in float64; of whole numbers the first's."""
    first = members[0]
    return {
        name: torch.stack([member[name].double() for member in members]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def greedy(members: Sequence[Tensors], score: Callable[[Tensors], float]) -> tuple[list[int], list[float]]:
    """Return which of `members` make the best average, in the order in which they joined, and each one's own score.

    They are tried from the best to the worst (of equals the first), and each joins that does not lower the average's
    score.

    Source: Wortsman et al., "Model soups", arXiv 2203.05482, recipe 1.
    """
    alone = [score(member) for member in members]
    best, *others = sorted(range(len(members)), key=lambda place: -alone[place])
    chosen, reached = [best], alone[best]
    for place in others:
        found = score(average([members[i] for i in (*chosen, place)]))
        if found >= reached:
            chosen, reached = [*chosen, place], found
    return chosen, alone
