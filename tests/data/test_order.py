import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_train.data.order import Order, permutation

SEEDS = st.integers(0, 2**64)
SIZES = st.integers(1, 60)
RANKS = st.integers(1, 5)


def stream(order, steps):
    """Return the indices and keys of the first steps, each as one array."""
    batches = [order.batch(step) for step in range(steps)]
    return tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))


@settings(deadline=None)
@given(num_images=SIZES, part=st.integers(1, 25), ranks=RANKS, seed=SEEDS)
def test_each_epoch_holds_every_image_once(num_images, part, ranks, seed):
    batch_size, epochs = part * ranks, 3
    steps = -(-epochs * num_images // batch_size)
    indices, _ = stream(Order(num_images, batch_size, seed), steps)
    for epoch in range(epochs):
        window = indices[epoch * num_images : (epoch + 1) * num_images]
        assert sorted(window) == list(range(num_images))


@settings(deadline=None)
@given(num_images=SIZES, part=st.integers(1, 25), ranks=RANKS, seed=SEEDS, step=st.integers(0, 10**6))
def test_ranks_share_the_batch_of_one(num_images, part, ranks, seed, step):
    batch_size = part * ranks
    whole = Order(num_images, batch_size, seed).batch(step)
    shares = [Order(num_images, batch_size, seed, rank=r, world_size=ranks).batch(step) for r in range(ranks)]
    for one, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert [len(share) for share in parts] == [part] * ranks
        np.testing.assert_array_equal(np.concatenate(parts), one)
        assert one.dtype == np.int64


@settings(deadline=None)
@given(num_images=SIZES, batch_size=st.integers(1, 100), seed=SEEDS)
def test_no_two_draws_share_a_key(num_images, batch_size, seed):
    steps = -(-4 * num_images // batch_size)
    _, keys = stream(Order(num_images, batch_size, seed), steps)
    assert len(set(keys.tolist())) == len(keys) == steps * batch_size
    assert keys.min() >= 0
    # Other seeds give other keys to the same samples.
    _, others = stream(Order(num_images, batch_size, seed + 1), steps)
    assert not set(keys.tolist()) & set(others.tolist())


@given(num_images=SIZES, seed=SEEDS, epoch=st.integers(0, 3), place=st.integers(0, 59), sizes=st.tuples(SIZES, SIZES))
def test_a_key_depends_on_epoch_and_image_alone(num_images, seed, epoch, place, sizes):
    position = epoch * num_images + place % num_images
    found = []
    for batch_size in sizes:
        indices, keys = Order(num_images, batch_size, seed).batch(position // batch_size)
        found.append((indices[position % batch_size], keys[position % batch_size]))
    assert found[0] == found[1]


@settings(deadline=None)
@given(num_images=SIZES, batch_size=SIZES, seed=SEEDS, steps=st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_steps_can_be_asked_in_any_order(num_images, batch_size, seed, steps):
    used = Order(num_images, batch_size, seed)
    for step in steps:
        for found, fresh in zip(used.batch(step), Order(num_images, batch_size, seed).batch(step), strict=True):
            np.testing.assert_array_equal(found, fresh)


def test_epochs_and_seeds_are_shuffled_each_its_own_way():
    orders = [permutation(seed, epoch, 500) for seed in (0, 1, 2, 2**63) for epoch in (0, 1, 2)]
    for number, order in enumerate(orders):
        # Places that hold the same image in two random orders: one, give or take.
        for other in [*orders[:number], np.arange(500)]:
            assert (order == other).sum() < 10


def test_shuffling_is_even():
    # Over many orders each image stands at each place equally often: chi-square, of 9 x 9 degrees of freedom.
    count, size = 4_000, 10
    table = np.zeros((size, size))
    for epoch in range(count):
        table[np.arange(size), permutation(7, epoch, size)] += 1
    chi_square = ((table - count / size) ** 2 / (count / size)).sum()
    assert 40 < chi_square < 140


def splitmix64(state):
    """Return the scrambled state, as Steele, Lea and Flood's nextSeed and mix64 have it, one number at a time."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@pytest.mark.parametrize(("seed", "epoch", "num_images"), [(0, 0, 20), (3, 5, 101), (2**40, 349, 33), (-1, 2, 50)])
def test_order_is_by_hashed_keys(seed, epoch, num_images):
    # A promise too: a run that is resumed with a newer version must see the same images.
    def key(image):
        state = (seed ^ int.from_bytes(b"order")) % 2**64
        for value in (0, epoch, image):
            state = splitmix64((state + (value + 1) * 0x9E3779B97F4A7C15) % 2**64)
        return state

    assert permutation(seed, epoch, num_images).tolist() == sorted(range(num_images), key=key)


def test_batch_larger_than_the_set():
    indices, keys = Order(3, 8, 0).batch(0)
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]
    assert len(set(keys.tolist())) == 8


@pytest.mark.parametrize(("batch_size", "ranks", "hint"), [(10, 4, 8), (7, 2, 8), (1, 8, 8), (0, 2, 2), (-4, 2, 2)])
def test_batch_that_ranks_do_not_divide(batch_size, ranks, hint):
    message = f"batch_size={batch_size} is not a positive multiple of the {ranks} ranks: try batch_size={hint}"
    with pytest.raises(ValueError, match=message):
        Order(100, batch_size, 0, world_size=ranks)


def test_no_images():
    with pytest.raises(ValueError, match=r"the training set has no images: check data\.root"):
        Order(0, 4, 0)
