"""The policy's gradients against brute force, PPO against random search and evolution on tables, and their states."""

import copy
import io
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effnet_train.search.controller import PPO, Policy, clipped_loss
from effnet_train.search.searchers import Evolution, Random, Searcher

SMALL = (2, 3, 2)
SIZES = (3,) * 8
MAKERS: dict[str, Callable[..., Searcher]] = {
    "ppo": PPO,
    "random": Random,
    "evolution": lambda **given: Evolution(population=8, sample=3, **given),
}


def policy(sizes: Sequence[int] = SMALL) -> Policy:
    torch.manual_seed(3)
    made = Policy(sizes, 4).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.7)
    return made


def sequences(sizes: Sequence[int] = SMALL) -> Tensor:
    return torch.tensor(list(itertools.product(*(range(size) for size in sizes))))


def chances(made: Policy, tokens: Sequence[int]) -> float:
    """Return a sequence's probability, step by step and by hand."""
    with torch.no_grad():
        x, state = made.first, (torch.zeros(made.hidden).double(), torch.zeros(made.hidden).double())
        product = 1.0
        for place, token in enumerate(tokens):
            gates = made.cell.weight_ih @ x + made.cell.bias_ih + made.cell.weight_hh @ state[0] + made.cell.bias_hh
            i, f, g, o = gates.chunk(4)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            state = (o.sigmoid() * cell.tanh(), cell)
            head: Any = made.heads[place]
            scores = (head.weight @ state[0] + head.bias).exp()
            product *= float(scores[token] / scores.sum())
            if place < len(made.embeddings):
                x = made.embeddings[place].weight[token]  # type: ignore[union-attr,index]
        return product


def test_probabilities_are_an_lstms_and_sum_to_one() -> None:
    made, every = policy(), sequences()
    with torch.no_grad():
        log_p, entropy = made(every)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for tokens, value in zip(every.tolist(), log_p.tolist(), strict=True):
        assert math.exp(value) == pytest.approx(chances(made, tokens), rel=1e-10)
    # The entropies of the choices along each sequence average to that of sequences.
    assert (log_p.exp() * entropy).sum().item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=1e-10)


def test_it_draws_what_it_says() -> None:
    made = policy()
    drawn = made.sample(20_000, torch.Generator().manual_seed(0))
    for tokens in sequences():
        expected = chances(made, tokens.tolist())
        found = (drawn == tokens).all(1).double().mean().item()
        assert found == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-9)


def test_the_gradient_is_the_brute_force_policy_gradient() -> None:
    """The derivative of the expected reward, from all sequences of a tiny space, by finite differences."""
    made, every = policy(), sequences()
    rewards = torch.rand(len(every), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    baseline = 0.3

    def expected() -> float:
        return sum(chances(made, t) * r for t, r in zip(every.tolist(), rewards.tolist(), strict=True))

    with torch.no_grad():
        old = made(every)[0]
    # A batch in which each sequence stands as often as it is drawn: its advantage weighs so much more.
    log_p, _ = made(every)
    loss = clipped_loss(log_p, old, len(every) * old.exp() * (rewards - baseline), clip=0.2)
    loss.backward()
    for name, parameter in made.named_parameters():
        for place in range(0, parameter.numel(), 7):
            with torch.no_grad():
                flat, eps = parameter.view(-1), 1e-6
                before = flat[place].item()
                flat[place] = before + eps
                above = expected()
                flat[place] = before - eps
                below = expected()
                flat[place] = before
            assert parameter.grad is not None
            slope = -parameter.grad.view(-1)[place].item()
            assert slope == pytest.approx((above - below) / (2 * eps), rel=1e-5, abs=1e-8), (name, place)


def test_the_loss_is_clipped_where_going_on_would_gain_and_only_there() -> None:
    old = torch.zeros(4)
    log_p = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    clipped_loss(log_p, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.2).backward()
    assert log_p.grad is not None
    torch.testing.assert_close(log_p.grad * 4, torch.tensor([0.0, 1.5, -0.5, 0.0]))


def test_a_round_teaches_what_the_formulas_say() -> None:
    """Equation 9 of PPO without its value term, sequence by sequence; rounds of equals and of one among the others."""
    ppo = PPO(sizes=SMALL, seed=2, hidden=8, lr=0.03, epochs=4, clip=0.1, entropy=0.3, baseline_decay=0.8)
    own = copy.deepcopy(ppo.policy.double())  # as Adam makes steps of a gradient's rounding, too
    adam = torch.optim.Adam(own.parameters(), lr=0.03)
    baseline = spread = None
    for rewards in ([0.25, 0.25, 0.25], [0.1, 0.4, 0.9, 0.2], [0.5], [0.3, 0.3], [0.9, 0.0, 0.6]):
        asked = ppo.ask(len(rewards))
        told = ppo.tell(asked, rewards)
        mean = sum(rewards) / len(rewards)
        baseline = mean if baseline is None else baseline
        deviation = math.sqrt(sum((value - baseline) ** 2 for value in rewards) / len(rewards))
        spread = spread or deviation
        advantages = [(value - baseline) / spread if spread else 0.0 for value in rewards]
        drawn = [own(torch.tensor([tokens]))[0].item() for tokens in asked]
        for _ in range(4):
            loss = torch.zeros(())
            for tokens, advantage, before in zip(asked, advantages, drawn, strict=True):
                log_p, entropy = own(torch.tensor([tokens]))
                ratio = (log_p[0] - before).exp()
                kept = min(max(ratio.item(), 0.9), 1.1)
                gain = (
                    ratio * advantage
                    if ratio.item() * advantage <= kept * advantage
                    else torch.tensor(kept * advantage)
                )
                loss = loss - (gain + 0.3 * entropy[0]) / len(rewards)
            adam.zero_grad()
            loss.backward()
            adam.step()
        baseline, spread = 0.8 * baseline + 0.2 * mean, 0.8 * spread + 0.2 * deviation
        assert (told["baseline"], told["spread"]) == pytest.approx((baseline, spread), rel=1e-5, abs=1e-7)
        for one, other in zip(ppo.policy.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "equal"), [(1, 0), (20, 5)])
def test_ppo_learns_in_rounds_of_one_and_after_rounds_of_equals(count: int, equal: int) -> None:
    """Neither tells a spread: it must not make the next reward a thousand times what it is."""
    ppo = PPO(sizes=(3,) * 3, seed=0, hidden=32)
    for i in range(equal + 400 // count + 40):
        asked = ppo.ask(count)
        told = ppo.tell(asked, [0.1 if i < equal else 0.5 + sum(tokens) / 16 for tokens in asked])
    best = torch.tensor([[2, 2, 2]])
    with torch.no_grad():
        assert ppo.policy(best)[0].exp().item() > 0.5, told


@pytest.mark.parametrize("name", MAKERS)
def test_a_searcher_goes_on_from_its_state_as_if_it_had_never_stopped(name: str) -> None:
    def reward(tokens: tuple[int, ...]) -> float:
        return sum(tokens) / 16

    def rounds(searcher: Searcher, count: int) -> list[tuple[int, ...]]:
        seen = []
        for _ in range(count):
            asked = searcher.ask(6)
            seen += asked
            searcher.tell(asked, [reward(tokens) for tokens in asked])
        return seen

    whole = rounds(MAKERS[name](sizes=SIZES, seed=4), 6)
    one = MAKERS[name](sizes=SIZES, seed=4)
    first = rounds(one, 3)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    other = MAKERS[name](sizes=SIZES, seed=99)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert first + rounds(other, 3) == whole
    assert rounds(MAKERS[name](sizes=SIZES, seed=5), 6) != whole
    assert all(0 <= token < size for tokens in whole for token, size in zip(tokens, SIZES, strict=True))


def test_evolution_changes_one_token_of_a_good_one_and_forgets_the_oldest() -> None:
    searcher = Evolution(sizes=(4,) * 5, seed=0, population=4, sample=4)
    good, others = (1, 1, 1, 1, 1), [(0, 0, 0, 0, i) for i in range(3)]
    searcher.tell([good, *others], [1.0, 0.1, 0.1, 0.1])
    children = searcher.ask(50)
    distances = [sum(a != b for a, b in zip(child, good, strict=True)) for child in children]
    assert distances.count(1) > 25  # the best of four drawn with replacement is the good one in two of three
    assert len({child for child, distance in zip(children, distances, strict=True) if distance == 1}) > 8
    searcher.tell(others, [0.2, 0.2, 0.2])  # and the good one is the oldest but one no more
    searcher.tell(others[:1], [0.2])
    assert all(child[:3].count(0) >= 2 for child in searcher.ask(50))


def table(seed: int) -> Tensor:
    """Return rewards from 0 to 1 of all 6,561 sequences: each token's own, and each pair of neighbours'."""
    generator = torch.Generator().manual_seed(seed)
    own = [torch.rand(size, generator=generator) for size in SIZES]
    pairs = [torch.rand(*sizes, generator=generator) for sizes in itertools.pairwise(SIZES)]
    every = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    rewards = sum(values[every[:, i]] for i, values in enumerate(own))
    rewards = rewards + sum(values[every[:, i], every[:, i + 1]] for i, values in enumerate(pairs))
    assert isinstance(rewards, Tensor)
    return ((rewards - rewards.min()) / (rewards.max() - rewards.min())).view(SIZES)


def best_found(searcher: Searcher, rewards: Tensor, trials: int) -> float:
    best = 0.0
    for _ in range(trials // 20):
        asked = searcher.ask(20)
        values = [float(rewards[tokens]) for tokens in asked]
        searcher.tell(asked, values)
        best = max(best, *values)
    return best


def optima(make: Callable[..., Searcher], seeds: Sequence[int], trials: int) -> int:
    # Of other seeds than the tables', whose random numbers would be the searchers'.
    return sum(best_found(make(sizes=SIZES, seed=seed - 1000), table(seed), trials) == 1 for seed in seeds)


def test_ppo_finds_the_best_of_a_table_where_random_search_does_not() -> None:
    seeds = range(1000, 1003)
    assert optima(PPO, seeds, 640) >= 2
    assert optima(Random, seeds, 640) <= 1


@pytest.mark.slow
def test_ppo_finds_the_best_of_most_of_20_tables() -> None:
    """A tenth of a table in trials; docs/reproduce.md has the numbers."""
    seeds = range(1000, 1020)
    evolution = partial(Evolution, population=50, sample=10)
    makers: dict[str, Callable[..., Searcher]] = {"ppo": PPO, "random": Random, "evolution": evolution}
    found = {name: optima(make, seeds, 640) for name, make in makers.items()}
    assert found["ppo"] >= 17
    assert found["evolution"] >= 13
    assert found["random"] <= 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPO(sizes=SMALL, lr=0), "searcher.lr=0 must be above 0"),
        (lambda: PPO(sizes=SMALL, entropy=-1), "searcher.entropy=-1 must be at least 0"),
        (lambda: PPO(sizes=SMALL, baseline_decay=1), "searcher.baseline_decay=1 must be from 0 to below 1"),
        (lambda: Evolution(sizes=SMALL, population=4, sample=5), "sample=5 must be from 1 to searcher.population=4"),
    ],
)
def test_values_that_make_no_sense_are_refused(make: Callable[[], Searcher], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
