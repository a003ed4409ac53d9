import time

import pytest
import torch
from torch import Tensor, nn

from effnet_train.analysis.latency import measure


class Sleeper(nn.Module):
    def __init__(self, name: str, seconds: float, seen: list[tuple[str, tuple[int, ...], int, bool]]) -> None:
        super().__init__()
        self.name, self.seconds, self.seen = name, seconds, seen

    def forward(self, images: Tensor) -> Tensor:
        # The first calls are slow: they must not count.
        mine = sum(entry[0] == self.name for entry in self.seen)
        time.sleep(self.seconds if mine > 1 else 0.2)
        self.seen.append((self.name, tuple(images.shape), torch.get_num_threads(), self.training))
        return images


def test_networks_are_timed_in_turn_without_the_first_rounds() -> None:
    seen: list[tuple[str, tuple[int, ...], int, bool]] = []
    networks = {"a": (Sleeper("a", 0.01, seen), 8), "b": (Sleeper("b", 0.04, seen), 16)}
    before = torch.get_num_threads()
    found = measure(networks, rounds=5, warmup=2, threads=1)
    assert seen == [("a", (1, 3, 8, 8), 1, False), ("b", (1, 3, 16, 16), 1, False)] * 7
    assert torch.get_num_threads() == before
    assert [len(times["runs_s"]) for times in found.values()] == [5, 5]
    assert found["a"]["median_s"] == pytest.approx(0.01, abs=0.008)
    assert found["b"]["mean_s"] == pytest.approx(0.04, abs=0.02)
