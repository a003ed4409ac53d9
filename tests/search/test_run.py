"""A search whose trainings are a function: what is trained, recorded and told, and that it may die at any moment."""

import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from effnet_train.search.controller import PPO
from effnet_train.search.journal import Entry, Journal
from effnet_train.search.reward import Reward
from effnet_train.search.run import JOURNAL, Limits, Outcome, Search
from effnet_train.search.searchers import Evolution, Random, Searcher
from effnet_train.search.space import Space, Stages, same_network

SPACE = Space(
    op=["separable", "mbconv3"],
    kernel=[3, 5],
    se_ratio=[0.0],
    skip=["none", "identity"],
    width=[1.0, 1.5],
    layers=[0, 1],
    blocks=[{"stride": 1, "channels": 16, "repeats": 1}, {"stride": 2, "channels": 32, "repeats": 1}],
)


class Dead(BaseException):  # as a process is: nothing is to catch it
    pass


def count(stages: Stages) -> dict[str, float]:
    return {"flops": float(sum(s["channels"] * s["repeats"] * s["kernel"] for s in stages)), "params": 1.0}


def top1(stages: Stages) -> float:
    text = json.dumps(stages)
    return random.Random(text).random()


class Trainer:
    """Trains in any order; remembers what; fails or dies where it is told to."""

    def __init__(self, *, fail: Callable[[Stages], bool] = lambda _: False, stop_after: int | None = None) -> None:
        self.trained: list[str] = []
        self.fail, self.stop_after = fail, stop_after
        self.order = random.Random(0)

    def __call__(self, networks: Mapping[int, Stages], ended: Callable[[int, Outcome], None]) -> None:
        numbers = list(networks)
        self.order.shuffle(numbers)
        for number in numbers:
            if self.stop_after is not None and len(self.trained) >= self.stop_after:
                return
            self.trained.append(json.dumps(networks[number]))
            if self.fail(networks[number]):
                ended(number, Outcome(None, "it broke", 1.0))
            else:
                ended(number, Outcome(top1(networks[number]), None, 2.0))


def search(folder: Path, train: Any, searcher: Searcher | None = None, **given: Any) -> Search:
    return Search(
        folder=folder,
        journal=Journal(folder / JOURNAL),
        space=SPACE,
        searcher=searcher or PPO(sizes=SPACE.sizes, seed=1, hidden=8),
        count=count,
        name=partial(same_network, stem_channels=SPACE.stem_channels),
        train=train,
        **{"reward": Reward(target=300), "limits": Limits(), **given},
    )


def entries(folder: Path) -> dict[int, Entry]:
    return Journal(folder / JOURNAL).entries


def test_each_network_is_trained_once_and_the_same_ones_share_what_came_of_it(tmp_path: Path) -> None:
    trainer = Trainer()
    assert search(tmp_path, trainer).run(60, 8)
    found = entries(tmp_path)
    assert sorted(found) == list(range(1, 61))
    assert len(set(trainer.trained)) == len(trainer.trained) < 60
    own = {e.network: e for e in found.values() if e.same_as is None}
    assert len(own) == len(trainer.trained)
    for entry in found.values():
        twin = own[entry.network]
        assert (entry.reward, entry.top1, entry.status) == (twin.reward, twin.top1, "trained")
        assert entry.same_as in (None, twin.number)
        stages = SPACE.decode(twin.tokens)
        assert entry.top1 == top1(stages)
        assert entry.reward == pytest.approx(top1(stages) * (count(stages)["flops"] / 300) ** -0.07)


def test_what_is_above_a_limit_is_never_trained_and_has_no_reward(tmp_path: Path) -> None:
    trainer = Trainer()
    assert search(tmp_path, trainer, limits=Limits(flops=300)).run(40, 8)
    found = entries(tmp_path)
    over = {n for n, e in found.items() if count(SPACE.decode(e.tokens))["flops"] > 300}
    assert over
    assert over == {number for number, entry in found.items() if entry.status == "over"}
    for number in over:
        assert (found[number].reward, found[number].top1) == (0.0, None)
        assert "is above limits.flops=300" in str(found[number].reason)
    assert all(count(tuple(json.loads(text)))["flops"] <= 300 for text in trainer.trained)


def test_what_fails_is_recorded_and_not_told_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[int] = []

    class Listening(Random):
        def tell(self, candidates: Any, rewards: Any) -> Mapping[str, float]:
            told.append(len(candidates))
            assert all(value > 0 for value in rewards)
            return {}

    def deep(stages: Stages) -> bool:
        return stages[0]["repeats"] == 2 and stages[1]["kernel"] == 5

    assert search(tmp_path, Trainer(fail=deep), Listening(sizes=SPACE.sizes)).run(40, 8)
    found = entries(tmp_path)
    failed = {number for number, entry in found.items() if entry.status == "failed"}
    assert failed == {number for number, entry in found.items() if deep(SPACE.decode(entry.tokens))}
    assert failed
    assert all((found[n].reason, found[n].reward) == ("it broke", None) for n in failed)
    assert sum(told) == 40 - len(failed)


def test_trainings_that_all_fail_end_the_search_and_are_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the last max_failures=4 trainings have all failed.*it broke"):
        search(tmp_path, Trainer(fail=lambda _: True), Random(sizes=SPACE.sizes), max_failures=4).run(12, 6)
    assert entries(tmp_path) == {}
    assert search(tmp_path, Trainer(), Random(sizes=SPACE.sizes), max_failures=4).run(12, 6)
    assert {entry.status for entry in entries(tmp_path).values()} == {"trained"}


def test_more_trials_go_on_from_the_last(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert search(whole, Trainer()).run(32, 8)
    assert search(parts, Trainer()).run(16, 8)
    before = entries(parts)
    assert search(parts, Trainer()).run(16, 8)
    assert entries(parts) == before
    assert search(parts, Trainer()).run(32, 8)
    assert entries(parts) == entries(whole)


@pytest.mark.parametrize("stop_after", [0, 1, 5, 11])
def test_where_it_is_stopped_it_says_so_and_goes_on(tmp_path: Path, stop_after: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert search(whole, Trainer()).run(24, 8)
    assert not search(parts, Trainer(stop_after=stop_after)).run(24, 8)
    assert len([e for e in entries(parts).values() if e.same_as is None]) == stop_after
    assert search(parts, Trainer()).run(24, 8)
    assert entries(parts) == entries(whole)


@pytest.mark.parametrize("name", ["ppo", "random", "evolution"])
@pytest.mark.parametrize("seed", range(4))
def test_it_may_die_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int) -> None:
    """Before, after or amid a write, ten times and more: the journal ends as that of an undisturbed search."""
    makers: dict[str, Callable[[], Searcher]] = {
        "ppo": lambda: PPO(sizes=SPACE.sizes, seed=seed, hidden=8),
        "random": lambda: Random(sizes=SPACE.sizes, seed=seed),
        "evolution": lambda: Evolution(sizes=SPACE.sizes, seed=seed, population=6, sample=3),
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert search(whole, Trainer(), makers[name]()).run(24, 6)

    generator, deaths = random.Random(seed), 0
    append, save = Journal.append, Search._save

    def chancy(write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Any, *arguments: Any) -> None:
            fate = generator.random()
            if fate < 0.15:
                raise Dead
            if fate < 0.3 and write is append:  # a line that is cut off
                path = self.path
                whole_line = json.dumps({"number": 1}).encode()
                path.write_bytes(
                    (path.read_bytes() if path.exists() else b"") + whole_line[: generator.randrange(1, 9)]
                )
                raise Dead
            write(self, *arguments)
            if fate > 0.85:
                raise Dead

        return wrapped

    monkeypatch.setattr(Journal, "append", chancy(append))
    monkeypatch.setattr(Search, "_save", chancy(save))
    for _ in range(1000):
        try:
            if search(parts, Trainer(), makers[name]()).run(24, 6):
                break
        except Dead:
            deaths += 1
    assert deaths >= 10
    assert entries(parts) == entries(whole)


def test_a_damaged_line_and_a_second_one_are_named(tmp_path: Path) -> None:
    assert search(tmp_path, Trainer()).run(6, 6)
    path = tmp_path / JOURNAL
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"trials.jsonl, line 2 is damaged .*remove it, and its trial is made again"):
        Journal(path)
    path.write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(ValueError, match=r"line 7 is a second one of trial \d"):
        Journal(path)


def test_a_line_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert search(tmp_path, Trainer()).run(6, 6)
    path = tmp_path / JOURNAL
    before, journal = path.read_bytes(), Journal(path)

    def full(_place: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.append(Entry(99, (0,), "trained", "x"))
    assert path.read_bytes() == before
    assert 99 not in journal.entries


def test_reading_alone_cuts_nothing_off(tmp_path: Path) -> None:
    assert search(tmp_path, Trainer()).run(6, 6)
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes() + b'{"numb')
    before = path.read_bytes()
    assert len(Journal(path, readonly=True).entries) == 6
    assert path.read_bytes() == before
    assert len(Journal(path).entries) == 6
    assert path.read_bytes() == before[:-6]


def test_a_trial_that_was_lost_is_named_and_made_again_without_the_others(tmp_path: Path) -> None:
    assert search(tmp_path, Trainer()).run(12, 6)
    path, whole = tmp_path / JOURNAL, entries(tmp_path)
    lost = next(number for number, entry in whole.items() if number <= 6 and entry.same_as is None)
    path.write_text(
        "".join(f"{line}\n" for line in path.read_text().splitlines() if json.loads(line)["number"] != lost)
    )
    with pytest.raises(ValueError, match=rf"trials.jsonl lacks trial {lost}, from which .* Move .*searcher.pt away"):
        search(tmp_path, Trainer()).run(12, 6)
    (tmp_path / "searcher.pt").unlink()
    trainer = Trainer()
    assert search(tmp_path, trainer).run(12, 6)
    assert len(trainer.trained) == 1
    assert entries(tmp_path) == whole
    assert search(tmp_path, Trainer()).run(24, 6)
    other = tmp_path / "other"
    other.mkdir()
    assert search(other, Trainer()).run(24, 6)
    assert entries(other) == entries(tmp_path)


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    assert search(tmp_path, Trainer()).run(6, 6)
    (tmp_path / "searcher.pt").unlink()
    with pytest.raises(ValueError, match=r"trials.jsonl: trial 1 is another candidate .* Give name= for a new search"):
        search(tmp_path, Trainer(), Random(sizes=SPACE.sizes, seed=7)).run(6, 6)


def test_accuracies_that_are_no_numbers_are_failures(tmp_path: Path) -> None:
    def train(networks: Mapping[int, Stages], ended: Callable[[int, Outcome], None]) -> None:
        for number in networks:
            ended(number, Outcome(float("nan") if number == 2 else 0.5))

    assert search(tmp_path, train, Random(sizes=SPACE.sizes)).run(4, 4)
    assert (entries(tmp_path)[2].status, entries(tmp_path)[2].reason) == ("failed", "top-1 is nan")


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"limits.params=0 must be above 0, or null for none"):
        Limits(params=0)
