from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnet_train.data.mixing import Mixing
from effnet_train.data.order import MixedOrder, Order
from effnet_train.data.pseudo import Joined, Mixture, Pseudo, PseudoLabelled, SoftLabels, hard, select

teachers = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.3, 0.5, 0.9, 1.0])), min_size=1, max_size=60
)


@given(teachers, st.integers(1, 25), st.integers(0, 3))
def test_each_class_has_as_many_images(found, per_class, seed):
    """Xie et al., section 3.1: none below the threshold; the most confident, or duplicates until there are enough."""
    labels, confidences = (np.array(column) for column in zip(*found, strict=True))
    chosen = select(labels, confidences.astype(np.float32), threshold=0.3, per_class=per_class, seed=seed)
    times = Counter(chosen.tolist())
    assert all(confidences[index] >= 0.3 for index in times)
    for label in range(5):
        candidates = [i for i in range(len(labels)) if labels[i] == label and confidences[i] >= 0.3]
        mine = {index: count for index, count in times.items() if labels[index] == label}
        assert sum(mine.values()) == (per_class if candidates else 0)
        if len(candidates) >= per_class:
            assert set(mine.values()) == {1}
            assert min(confidences[i] for i in mine) >= max(
                (confidences[i] for i in candidates if i not in mine), default=0
            )
        elif candidates:
            assert set(mine) == set(candidates)
            assert max(mine.values()) - min(mine.values()) <= 1
    assert chosen.tolist() == select(labels, confidences, threshold=0.3, per_class=per_class, seed=seed).tolist()


@given(teachers)
def test_without_balancing_all_that_are_sure_are_kept_once(found):
    labels, confidences = (np.array(column) for column in zip(*found, strict=True))
    kept = select(labels, confidences, threshold=0.25, per_class=None)
    assert kept.tolist() == [i for i, confidence in enumerate(confidences) if confidence >= 0.25]
    assert 0.0 not in confidences[select(labels, confidences, threshold=0.0, per_class=None)]


def test_the_seed_draws_who_is_there_once_more():
    labels, confidences = np.zeros(10, dtype=int), np.ones(10)
    drawn = {tuple(sorted(select(labels, confidences, threshold=0, per_class=13, seed=seed))) for seed in range(20)}
    assert len(drawn) > 10


class Numbers:
    """Images that are their numbers."""

    def __init__(self, count, start, classes):
        self.count, self.start, self.classes = count, start, classes

    def __len__(self):
        return self.count

    def read(self, index):
        return self.start + index, index % 2

    def name(self, index):
        return f"image {self.start + index}"


def mixture(labelled=7, ratio=2, soft=True):
    first = Numbers(labelled, 0, ("a", "b", "c"))
    # Image 1 twice, image 4 once.
    chosen = np.array([[1, 2, 0], [1, 2, 0], [4, 0, 1]])
    second = PseudoLabelled(Numbers(5, 100, ()), chosen, first.classes, soft=soft)
    return Mixture(Joined(first, second), labelled, ratio)


def test_pseudo_labelled_images_come_behind_the_labelled_ones():
    source = mixture().source
    assert [source.read(index) for index in range(6, 10)] == [(6, 0), (101, 3), (101, 3), (104, 4)]
    assert [source.name(index) for index in (0, 9)] == ["image 0", "image 104"]
    assert [mixture(soft=False).source.read(index)[1] for index in (7, 9)] == [2, 0]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(0, 5))
def test_every_share_of_a_batch_has_the_same_mixture(labelled, pseudo, ratio, ranks, step):
    size = 6
    orders = [
        MixedOrder(
            Order(labelled, size, 0, rank=rank, world_size=ranks),
            Order(pseudo, size * ratio, 1, rank=rank, world_size=ranks),
        )
        for rank in range(ranks)
    ]
    parts = [order.batch(step) for order in orders]
    indices = np.concatenate([part[0] for part in parts]).reshape(size, 1 + ratio)
    assert (indices[:, 0] < labelled).all()
    assert (indices[:, 1:] >= labelled).all()
    # Whatever the ranks, they are the images and the keys of the two orders.
    assert indices[:, 0].tolist() == Order(labelled, size, 0).batch(step)[0].tolist()
    assert (indices[:, 1:] - labelled).reshape(-1).tolist() == Order(pseudo, size * ratio, 1).batch(step)[0].tolist()
    keys = np.concatenate([part[1] for part in parts]).reshape(size, 1 + ratio)
    assert keys[:, 1:].reshape(-1).tolist() == Order(pseudo, size * ratio, 1).batch(step)[1].tolist()


def test_without_pseudo_labels_the_order_is_the_usual_one():
    assert isinstance(Mixture(Numbers(4, 0, ()), 4).order(2, 0), Order)
    mixed = mixture(ratio=2).order(3, 0)
    assert (mixed.batch_size, len(mixed.batch(0)[0])) == (9, 9)
    # An image that both hold at the same place is augmented in another way.
    assert len(set(mixture(labelled=3, ratio=1).order(3, 0).batch(0)[1].tolist())) == 6


def test_soft_labels_become_targets_and_mix():
    rows = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.7998]], dtype=np.float16)
    targets = SoftLabels(rows)(torch.tensor([1, 3, 4]))
    torch.testing.assert_close(targets[:2], torch.tensor([[0.0, 1, 0], [0.5, 0.25, 0.25]]))
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    torch.testing.assert_close(hard(torch.tensor([1, 2])), torch.tensor([1, 2]))
    images, keys = torch.zeros(2, 3, 4, 4), torch.tensor([5, 6])
    mixing = Mixing(mixup_alpha=1.0)
    share = mixing.draw(5, 4, 4)[0]
    mixed = mixing(images, targets[:2], keys, 3)[1]
    torch.testing.assert_close(mixed[0], share * targets[0] + (1 - share) * targets[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"ratio": 3},
            "pseudo.ratio=3 needs pseudo-labels: give pseudo.labels=..., the folder that effnet-label wrote",
        ),
        ({"labels": "x", "ratio": 0}, "pseudo.ratio=0 must be at least 1"),
    ],
)
def test_what_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        Pseudo(**values)
