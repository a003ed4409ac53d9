import pytest

from effnet_train.analysis.scaling_model import (
    Bucket,
    Cluster,
    Link,
    Step,
    buckets,
    efficiency,
    fitted,
    ring_s,
    step_s,
)
from effnet_train.models.efficientnet import EfficientNet

LINK = Link(1e-3, 1e6)
STEP = Step(1.0, 2.0, 0.5)


def test_a_ring_sends_all_but_a_ranks_own_share_twice():
    assert ring_s(4e6, 1, LINK) == 0
    assert ring_s(4e6, 2, LINK) == pytest.approx(2 * 1e-3 + 4e6 / 1e6)
    assert ring_s(4e6, 4, LINK) == pytest.approx(6 * 1e-3 + 2 * 3 / 4 * 4)


def test_machines_exchange_their_gpus_shares():
    one = Cluster(8, 8, LINK, Link(1.0, 1.0))
    assert one.all_reduce_s(8e3) == ring_s(8e3, 8, LINK)
    two = Cluster(16, 8, LINK, Link(0.0, 1e3))
    assert two.all_reduce_s(8e3) == pytest.approx(ring_s(8e3, 8, LINK) + 1.0)
    assert Cluster(1, 8, LINK, LINK).all_reduce_s(1e9) == 0


def test_sums_hide_behind_the_backward_pass_but_for_the_last():
    cluster = Cluster(2, 8, Link(0.0, 1.0), LINK)  # a byte takes a second, twice halved
    assert step_s(STEP, [Bucket(1, 0.25)], cluster) == pytest.approx(1 + 2 + 0.5)  # 0.5 to 1.5
    assert step_s(STEP, [Bucket(1, 1.0)], cluster) == pytest.approx(1 + 3 + 0.5)  # 2 to 3
    # One after the other: 0.5 to 1.5, 1.5 to 3.5, and statistics when both are over.
    queue = [Bucket(1, 0.25), Bucket(2, 0.5)]
    assert step_s(STEP, queue, cluster) == pytest.approx(1 + 3.5 + 0.5)
    assert step_s(STEP, queue, cluster, statistics_bytes=1) == pytest.approx(1 + 4.5 + 0.5)
    assert efficiency(STEP, queue, cluster) == pytest.approx(3.5 / 5)
    assert efficiency(STEP, queue, Cluster(1, 8, LINK, LINK)) == 1


def test_buckets_hold_all_gradients_from_the_last_layer_on():
    model = EfficientNet(width=0.5, depth=0.5)
    gradients = 4 * sum(p.numel() for p in model.parameters())
    found = buckets(model, 64, 2.0)
    assert sum(bucket.size for bucket in found) == gradients
    ready = [bucket.ready for bucket in found]
    assert ready == sorted(ready)
    assert ready[-1] == 1
    # The classifier alone fills the first, and puts out nothing that a convolution does.
    assert found[0] == Bucket(4 * (640 * 1000 + 1000), 0.0)
    assert all(bucket.size >= 2 * 2**20 for bucket in found[1:-1])
    assert len(buckets(model, 64, 1000.0)) == 2


def test_a_link_is_found_again_from_its_sums():
    sizes = [2**n for n in range(10, 26, 3)]
    link = fitted(sizes, [ring_s(size, 4, LINK) for size in sizes], 4)
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((LINK.latency_s, LINK.bytes_per_s))
