"""Mixup and CutMix against their definitions, and independence of ranks and micro-batches."""

import math

import numpy as np
import pytest
import torch

from effnet_train.data import mixing
from effnet_train.data.keys import rng
from effnet_train.data.mixing import Mixing


def batch(n: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    images = torch.randn(n, 3, size, size + 4, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 5, (n,), generator=generator), torch.randint(0, 2**62, (n,), generator=generator)


def expected(mixer: Mixing, images: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> tuple:
    """Mix one image at a time, in float64."""
    mixed, targets = images.double().clone(), torch.zeros(len(labels), 5, dtype=torch.float64)
    for i in range(len(images)):
        j = i ^ 1
        share, top, left, bottom, right = mixer.draw(int(keys[i - i % 2]), *images.shape[2:])
        if bottom > top and right > left:
            mixed[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right].double()
        else:
            mixed[i] = share * images[i].double() + (1 - share) * images[j].double()
        targets[i, labels[i]] += share
        targets[i, labels[j]] += 1 - share
    return mixed, targets


@pytest.mark.parametrize("mixer", [Mixing(0.2), Mixing(cutmix_alpha=1.0), Mixing(0.8, 1.0), Mixing(1.0, 1.0, prob=0.5)])
def test_mixes_as_defined(mixer: Mixing) -> None:
    images, labels, keys = batch(40)
    mixed, targets = mixer(images, labels, keys, 5)
    wanted, wanted_targets = expected(mixer, images, labels, keys)
    assert mixed.dtype == torch.float32
    assert targets.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(targets.double(), wanted_targets, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(40))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(mixed, images)


def test_share_of_a_cut_is_that_of_its_pixels() -> None:
    mixer = Mixing(cutmix_alpha=1.0)
    for key in range(300):
        share, top, left, bottom, right = mixer.draw(key, 30, 20)
        assert 0 <= top <= bottom <= 30
        assert 0 <= left <= right <= 20
        assert share == 1 - (bottom - top) * (right - left) / 600


def test_nothing_is_mixed_where_both_are_off() -> None:
    images, labels, keys = batch(7)
    for mixer in (Mixing(), Mixing(0.2, prob=0.0)):
        assert not mixer.enabled
        mixed, targets = mixer(images, labels, keys, 5)
        assert mixed is images
        assert targets is labels


def test_parts_of_a_batch_are_mixed_as_the_whole() -> None:
    mixer = Mixing(0.4, 1.0)
    images, labels, keys = batch(24)
    mixed, targets = mixer(images, labels, keys, 5)
    parts = [mixer(images[s], labels[s], keys[s], 5) for s in (slice(0, 8), slice(8, 10), slice(10, 24))]
    assert torch.equal(mixed, torch.cat([part[0] for part in parts]))
    assert torch.equal(targets, torch.cat([part[1] for part in parts]))


def test_unmixed_pairs_keep_their_bits() -> None:
    images, labels, keys = batch(60)
    mixer = Mixing(1.0, prob=0.5)
    mixed, targets = mixer(images, labels, keys, 5)
    kept = [mixer.draw(int(key), 12, 16)[0] == 1.0 for key in keys[::2]]
    assert 5 < sum(kept) < 25
    for pair, keep in enumerate(kept):
        same = torch.equal(mixed[2 * pair : 2 * pair + 2], images[2 * pair : 2 * pair + 2])
        assert same == keep
        if keep:
            assert torch.equal(targets[2 * pair].argmax(), labels[2 * pair])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed_and_switched_as_asked(alpha: float) -> None:
    drawn = [Mixing(alpha, 1.0, prob=0.9, switch_prob=0.3).draw(key, 64, 64) for key in range(12_000)]
    cut = sum(bottom > top for _, top, _, bottom, _ in drawn) / len(drawn)
    assert abs(cut - 0.9 * 0.3) < 0.03  # a few boxes are empty
    shares = np.array([Mixing(alpha).draw(key, 64, 64)[0] for key in range(12_000)])
    assert abs(shares.mean() - 0.5) < 0.02
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_other_draws_than_the_augmentations(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the pairs whose first image has a wide crop, say, would be mixed the most.
    generators = []
    monkeypatch.setattr(mixing, "rng", lambda *arguments: generators.append(rng(*arguments)) or rng(*arguments))
    for key in range(50):
        Mixing(1.0).draw(key, 8, 8)
        assert generators[-1].random() != rng(key).random()


def test_an_odd_batch_is_refused() -> None:
    images, labels, keys = batch(5)
    with pytest.raises(ValueError, match=r"this one has 5: make batch_size divisible by 2 x ranks x accumulate"):
        Mixing(0.2)(images, labels, keys, 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mixup_alpha": -1}, "mixing.mixup_alpha=-1 must be 0, for none, or positive"),
        ({"cutmix_alpha": math.inf}, "mixing.cutmix_alpha=inf must be 0"),
        ({"prob": 2}, "mixing.prob=2 must be a probability"),
        ({"switch_prob": -0.5}, "mixing.switch_prob=-0.5 must be a probability"),
    ],
)
def test_wrong_values_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing(**wrong)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_the_device_without_waiting_for_it() -> None:
    images, labels, keys = batch(16)
    mixer = Mixing(0.4, 1.0)
    wanted = mixer(images, labels, keys, 5)
    images, labels = images.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mixer(images, labels, keys, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)
