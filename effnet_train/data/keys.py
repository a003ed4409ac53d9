"""Random numbers without a stream: every sample's draws are a pure function of its key."""

import random

import numpy as np

# Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014 (SplitMix64).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """Scramble uint64 values, one to one, so that neighbours in have nothing in common coming out."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample_keys(seed: int, epochs: np.ndarray | int, indices: np.ndarray) -> np.ndarray:
    """Return the samples' keys, int64 in [0, 2**63), in the shape of `indices`.

    The key is SplitMix64's finaliser over seed, then epoch, then index: nothing else goes in, neither rank nor worker
    nor step, so none of them changes an augmentation.
    """
    indices = np.asarray(indices)
    state = np.full(indices.shape, seed % 2**64, dtype=np.uint64).reshape(-1)
    # Each input is added to the scrambled rest: (epoch 1, index 2) is not (epoch 2, index 1). One-dimensional, because
    # numpy warns of the intended overflow in scalars.
    for values in (np.zeros_like(indices), np.broadcast_to(epochs, indices.shape), indices):
        state = _mix(state + (values.reshape(-1).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(1)).astype(np.int64).reshape(indices.shape)


def rng(key: int, stream: int = 0) -> random.Random:
    """Return the generator of a key; another `stream` (>= 0) is independent of the first.

    Use only its `random()`, directly or by the functions below: Python promises that its sequence stays the same
    in all versions, which it does not for the other methods.
    """
    return random.Random(stream << 63 | key)


def uniform(generator: random.Random, low: float, high: float) -> float:
    """Draw from [low, high)."""
    return low + (high - low) * generator.random()


def integer(generator: random.Random, n: int) -> int:
    """Draw from 0 to n - 1, each equally likely."""
    return int(generator.random() * n)
