"""Keys are a pure, well-spread function of seed, epoch and index."""

import numpy as np
import pytest

from effnet_train.data.keys import integer, rng, sample_keys, uniform


def splitmix(state: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def reference_key(seed: int, epoch: int, index: int) -> int:
    state = seed % 2**64
    for value in (0, epoch, index):
        state = splitmix((state + (value + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return state >> 1


def test_finaliser_gives_the_published_sequence() -> None:
    # The first outputs of SplitMix64 from state 1234567, as in Rosetta Code's task and many libraries' tests.
    state, found = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        found.append(splitmix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**63, -5])
def test_keys_equal_the_formula_in_python_integers(seed: int) -> None:
    epochs, indices = np.array([0, 0, 3, 349]), np.array([0, 1, 7, 1_281_166])
    keys = sample_keys(seed, epochs, indices)
    assert keys.dtype == np.int64
    assert keys.tolist() == [reference_key(seed, e, i) for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)]


def test_one_epoch_for_all_and_any_shape() -> None:
    indices = np.arange(12).reshape(3, 4)
    assert (sample_keys(1, 5, indices) == sample_keys(1, np.full((3, 4), 5), indices)).all()
    assert sample_keys(1, 5, np.array([], dtype=np.int64)).shape == (0,)


def test_keys_differ_between_seeds_epochs_and_indices() -> None:
    keys = [sample_keys(seed, epoch, np.arange(2000)) for seed in range(5) for epoch in range(5)]
    assert len(np.unique(np.concatenate(keys))) == 25 * 2000
    assert np.concatenate(keys).min() >= 0


def test_every_bit_of_the_keys_is_fair_and_neighbours_are_independent() -> None:
    keys = sample_keys(0, 0, np.arange(20_000))
    bits = (keys[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)
    flipped = (bits[1:] != bits[:-1]).mean()
    assert abs(flipped - 0.5) < 0.002


def test_generator_gives_pythons_documented_stream_and_streams_differ() -> None:
    assert rng(42).random() == 0.6394267984578837  # Mersenne Twister, seed 42, in every version of Python 3
    first, second = ([rng(7, stream).random() for _ in range(1)] for stream in (0, 1))
    assert first != second
    assert rng(7, 1).random() == rng(7, 1).random()


def test_integers_are_fair_and_reals_stay_in_their_range() -> None:
    generator = rng(3)
    counts = np.bincount([integer(generator, 7) for _ in range(14_000)], minlength=7)
    assert len(counts) == 7
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
    values = [uniform(generator, -2, 3) for _ in range(5000)]
    assert -2 <= min(values) < -1.9 < 2.9 < max(values) < 3
    assert abs(np.mean(values) - 0.5) < 0.1
