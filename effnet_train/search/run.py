"""A search: candidates asked for in rounds, counted, trained, rewarded, told; where it stands lies on the disk."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effnet_train.engine.checkpoint import write_bytes
from effnet_train.search.journal import Entry, Journal
from effnet_train.search.reward import Reward
from effnet_train.search.searchers import Searcher
from effnet_train.search.space import Space, Stages, Tokens

STATE = "searcher.pt"
JOURNAL = "trials.jsonl"


@dataclass(frozen=True)
class Limits:
    """Hold what no candidate may cost to be trained at all, None where there is no limit.

    Raises: ValueError naming the key.
    """

    flops: float | None = None
    params: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"limits.{name}={value:g} must be above 0, or null for none")

    def exceeded(self, costs: Mapping[str, float]) -> str | None:
        """Say which limit the costs are above, None where they keep all."""
        for name, value in asdict(self).items():
            if value is not None and costs[name] > value:
                return f"{name} {costs[name]:,.6g} is above limits.{name}={value:,.6g}"
        return None


@dataclass(frozen=True)
class Outcome:
    """Hold what came of a training: top-1 (a fraction), or the reason why there is none; and what it took."""

    top1: float | None
    reason: str | None = None
    seconds: float | None = None


# Trains networks by number and tells each that has ended. It leaves out those that it was kept from by a signal.
Train = Callable[[Mapping[int, Stages], Callable[[int, Outcome], None]], None]


@dataclass
class Search:
    """Hold the parts of a search, which keeps where its searcher stands in `folder`.

    `count` returns a network's costs by kind, without training it, `name` what is equal of stages that make the same
    network. `told` is called after each entry, `learnt` after each round with what the searcher has to say.
    `max_failures` trainings that fail one after another end the search: they say nothing of networks.
    """

    folder: Path
    journal: Journal
    space: Space
    searcher: Searcher
    reward: Reward
    limits: Limits
    count: Callable[[Stages], dict[str, float]]
    name: Callable[[Stages], str]
    train: Train
    told: Callable[[Entry], None] = lambda _: None
    learnt: Callable[[Mapping[str, float]], None] = lambda _: None
    max_failures: int = 8

    def run(self, trials: int, round_size: int) -> bool:
        """Go on until there are `trials` entries, and say whether it came to that: it did not where it was stopped.

        At any moment it may die, and go on. Raises ValueError where the journal is not this search's, or lacks a trial,
        and where training after training fails.
        """
        first, asked = self._resumed()
        while True:
            if not self._evaluate(first, asked):
                return False
            entries = [self.journal.entries[first + i] for i in range(len(asked))]
            rewarded = [entry for entry in entries if entry.reward is not None]
            if rewarded:
                self.learnt(self.searcher.tell(*zip(*((e.tokens, e.reward or 0.0) for e in rewarded), strict=True)))
            first += len(asked)
            left = trials + 1 - first
            asked = self.searcher.ask(min(round_size, left)) if left > 0 else []
            self._save(first, asked)
            if not asked:
                return True

    def _resumed(self) -> tuple[int, list[Tokens]]:
        """Return the number of the first candidate of the round at hand, and the round's candidates."""
        file = self.folder / STATE
        if not file.exists():  # what the journal holds teaches a new searcher the same
            return 1, []
        state = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
        lacking = next((number for number in range(1, state["first"]) if number not in self.journal.entries), None)
        if lacking is not None:
            raise ValueError(
                f"{self.journal.path} lacks trial {lacking}, from which the searcher has learnt. Move {file} away, and "
                "the same command goes through its rounds again, and trains only what is lacking"
            )
        self.searcher.load_state_dict(state["searcher"])
        return state["first"], [tuple(tokens) for tokens in state["asked"]]

    def _save(self, first: int, asked: list[Tokens]) -> None:
        buffer = io.BytesIO()
        state = {"first": first, "asked": [list(tokens) for tokens in asked], "searcher": self.searcher.state_dict()}
        torch.save(state, buffer)
        write_bytes(self.folder / STATE, buffer.getvalue())

    def _evaluate(self, first: int, asked: list[Tokens]) -> bool:
        """Make the round's entries that are missing, and say whether all are there."""
        known = {entry.network: number for number, entry in self.journal.entries.items() if entry.same_as is None}
        waiting: dict[int, Entry] = {}
        stages: dict[int, Stages] = {}
        copies: dict[int, tuple[Tokens, str]] = {}
        for number, tokens in enumerate(asked, first):
            if number in self.journal.entries:
                self._check_tokens(number, tokens)
                continue
            decoded = self.space.decode(tokens)
            network = self.name(decoded)
            if known.setdefault(network, number) != number:
                copies[number] = tokens, network
                continue
            costs = self.count(decoded)
            entry = Entry(number, tokens, "over", network, costs, reward=0.0, reason=self.limits.exceeded(costs))
            if entry.reason is None:
                waiting[number], stages[number] = entry, decoded
            else:
                self._record(entry)

        def ended(number: int, outcome: Outcome) -> None:
            self._record(self._rewarded(waiting[number], outcome))

        self.train(stages, ended)
        if any(number not in self.journal.entries for number in stages):
            return False
        for number, (tokens, network) in copies.items():
            twin = self.journal.entries[known[network]]
            same = asdict(twin) | {"number": number, "tokens": tokens, "same_as": twin.number, "seconds": 0.0}
            self._record(Entry(**same))
        self._check_failures(first)
        return True

    def _check_tokens(self, number: int, tokens: Tokens) -> None:
        found = self.journal.entries[number].tokens
        if found != tokens:
            raise ValueError(
                f"{self.journal.path}: trial {number} is another candidate ({found}) than the searcher asks for "
                f"({tokens}): its lines are of another search, or of other rounds. Give name= for a new search"
            )

    def _rewarded(self, entry: Entry, outcome: Outcome) -> Entry:
        values: dict[str, Any] = asdict(entry) | {"tokens": entry.tokens, "seconds": outcome.seconds}
        if outcome.top1 is None or not math.isfinite(outcome.top1):
            return Entry(
                **values | {"status": "failed", "reward": None, "reason": outcome.reason or f"top-1 is {outcome.top1}"}
            )
        value = self.reward(outcome.top1, entry.costs)
        return Entry(**values | {"status": "trained", "reward": value, "top1": outcome.top1, "reason": None})

    def _record(self, entry: Entry) -> None:
        self.journal.append(entry)
        self.told(entry)

    def _check_failures(self, first: int) -> None:
        """Raise ValueError where the last trainings have all failed; those of this round are forgotten."""
        own = [entry for entry in self.journal.entries.values() if entry.same_as is None and entry.status != "over"]
        streak = own[-self.max_failures :]
        if len(streak) == self.max_failures and all(entry.status == "failed" for entry in streak):
            again = [number for number, e in self.journal.entries.items() if number >= first and e.status == "failed"]
            self.journal.drop(again)
            raise ValueError(
                f"the last max_failures={self.max_failures} trainings have all failed, of which none is the network's "
                f"fault: {streak[-1].reason}. When that is mended, the same command tries those of the round again"
            )
