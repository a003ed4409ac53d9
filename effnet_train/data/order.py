"""Which images a step sees: a pure function of the seed and the step."""

from collections.abc import Sequence

import numpy as np

from effnet_train.data.keys import sample_keys

# The order's keys must have nothing to do with the keys that augment the same samples.
_ORDER_SALT = 0x6F72646572


def permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the order of `epoch` as int64 indices: every image once."""
    # Sorting hashed keys, not a library's generator: its stream might change with a version, and the run with it.
    return np.argsort(sample_keys(seed ^ _ORDER_SALT, epoch, np.arange(num_images)), kind="stable")


class Order:
    """The endless stream of training samples, cut into global batches.

    The permutations of epochs 0, 1, 2 ... stand one after another, and step `s` takes positions `s * batch_size` to
    `(s + 1) * batch_size`, as the authors' shuffle-repeat-batch does: every batch is full, every image is read
    once an epoch, and a batch may end one epoch and begin the next. Each rank takes its equal, consecutive part.
    `passed_over` (step, batches) are places in the stream at which batches are left out.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        passed_over: Sequence[tuple[int, int]] = (),
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} is not a positive multiple of the {world_size} ranks: "
                f"try batch_size={max(1, round(batch_size / world_size)) * world_size}"
            )
        if num_images < 1:
            raise ValueError("the training set has no images: check data.root")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size, self.passed_over = rank, world_size, tuple(passed_over)
        self._permutations: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's part of `step`'s batch: indices and keys, both int64 (batch_size / world_size,)."""
        size = self.batch_size // self.world_size
        step += sum(batches for place, batches in self.passed_over if place <= step)
        start = step * self.batch_size + self.rank * size
        epochs, places = np.divmod(np.arange(start, start + size), self.num_images)
        indices = np.empty(size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permutation(int(epoch))[places[here]]
        return indices, sample_keys(self.seed, epochs, indices)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = permutation(self.seed, epoch, self.num_images)
        return self._permutations[epoch]


class MixedOrder:
    """Two streams of samples in one: behind each of the first's in a batch stands an equal share of the second's.

    So micro-batches, however many, have the same mixture. The second's indices come after all of the first's.
    """

    def __init__(self, first: Order, second: Order) -> None:
        assert second.batch_size % first.batch_size == 0
        self.first, self.second = first, second
        self.batch_size, self.world_size = first.batch_size + second.batch_size, first.world_size

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's part of `step`'s batch: indices and keys."""
        indices, keys = self.first.batch(step)
        others, other_keys = self.second.batch(step)
        return _woven(indices, others + self.first.num_images), _woven(keys, other_keys)


def _woven(one: np.ndarray, several: np.ndarray) -> np.ndarray:
    return np.concatenate([one[:, None], several.reshape(len(one), -1)], axis=1).reshape(-1)
