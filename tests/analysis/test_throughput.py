import json
from dataclasses import replace

import pytest
import torch

from effnet_train.analysis import roofline, startup, throughput
from effnet_train.analysis.complexity import complexity
from effnet_train.analysis.roofline import Device
from effnet_train.analysis.throughput import Case, Work
from effnet_train.engine import graph
from effnet_train.models.efficientnet import EfficientNet

CONFIG = {"width": 1.0, "depth": 1.0, "resolution": 224, "dropout": 0.2, "drop_connect": 0.2}
CASE = Case(library="ours", variant="b0", config=CONFIG, training=True, resolution=32, batch_size=2)


def test_all_are_measured_in_turn_and_ratios_are_within_a_round(monkeypatch):
    order = []
    clock = {"now": 0.0, "round": 0}
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock["now"])

    def work(name, seconds):
        def run():
            order.append(name)
            # The machine gets slower for all: no ratio may change.
            clock["now"] += seconds * (1 + len(order) // 100)

        return Work(run, "cpu")

    works = {"timm": work("timm", 0.02), "ours": work("ours", 0.01)}
    times = throughput.interleaved(works, rounds=3, seconds=0.1, quiet=lambda: order.append("quiet"))
    assert order[:7] == ["timm"] * 3 + ["ours"] * 3 + ["quiet"]
    assert order[7:] == (["timm"] * 5 + ["ours"] * 10) * 3
    assert times["timm"] == pytest.approx([0.02] * 3)
    assert throughput.ratios(times, "timm") == pytest.approx({"timm": 1.0, "ours": 2.0})
    drifting = {"timm": [1.0, 2.0, 9.0], "ours": [0.5, 1.0, 4.5]}
    assert throughput.ratios(drifting, "timm")["ours"] == 2.0


def test_who_is_not_ready_in_time_is_left_out():
    class Late(Work):
        def prepared(self):
            raise TimeoutError("timm, compiled of b4 was not ready in wait_s=5")

    works = {"ours": Work(lambda: None, "cpu"), "timm, compiled": Late(lambda: None, "cpu")}
    with pytest.warns(UserWarning, match="timm, compiled of b4 was not ready in wait_s=5: left out"):
        times = throughput.interleaved(works, rounds=2, seconds=0.001)
    assert list(times) == ["ours"]
    assert len(times["ours"]) == 2


def test_a_graph_is_captured_before_time_is_taken():
    eager, capture = graph._EAGER_STEPS, 1
    assert throughput._FIRST_CALLS["cuda"] > eager + capture  # the last of them says how long a call takes


@pytest.mark.parametrize("library", throughput.LIBRARIES)
def test_a_step_changes_every_weight_and_an_evaluation_none(library, monkeypatch):
    made = []
    network = throughput._network
    monkeypatch.setattr(throughput, "_network", lambda case: made.append(network(case)) or made[-1])
    work = throughput.build(replace(CASE, library=library))
    before = [p.detach().clone() for p in made[0].parameters()]
    work.run()
    assert len(before) == len(list(EfficientNet().parameters()))
    assert sum(not torch.equal(p, q) for p, q in zip(before, made[0].parameters(), strict=True)) > 0.9 * len(before)
    throughput.build(replace(CASE, library=library, training=False)).run()
    assert not any(p.grad is not None for p in made[1].parameters())


def test_libraries_have_what_they_have():
    assert [throughput.has(library, "b0") for library in throughput.LIBRARIES] == [True, True, True]
    assert [throughput.has(library, "lite0") for library in throughput.LIBRARIES] == [True, True, False]
    assert [throughput.has(library, "nano") for library in throughput.LIBRARIES] == [True, False, False]


def test_batch_sizes_are_powers_of_two_that_shrink_with_the_variant():
    assert throughput.default_batch_size(6_700_000, "cpu") == 16
    assert throughput.default_batch_size(6_700_000, "cuda") == 256
    assert throughput.default_batch_size(50_000_000, "cuda") == 32
    assert throughput.default_batch_size(10**12, "cuda") == 4
    assert throughput.default_batch_size(1, "cpu") == 1024


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    model = EfficientNet(**CONFIG)
    cost = complexity(model, 32)
    few = roofline.floor(model, 32, 8, training=True, number_bytes=2, device=Device(1e9, 1e15))
    assert few.flops == 8 * 6 * cost.multiply_adds
    assert few.bytes == 8 * 12 * cost.activations + 48 * cost.parameters
    assert few.seconds == pytest.approx(few.bytes / 1e9)
    slow = roofline.floor(model, 32, 8, training=False, number_bytes=4, device=Device(1e12, 1e6))
    assert slow.flops == 8 * 2 * cost.multiply_adds
    assert slow.bytes == 8 * 8 * cost.activations + 4 * cost.parameters
    assert slow.seconds == pytest.approx(slow.flops / 1e6)


def test_the_device_is_measured():
    found = roofline.measure_device("cpu", "fp32")
    assert 1e8 < found.bytes_per_s < 1e12
    assert 1e8 < found.flops_per_s < 1e14


def test_time_is_shared_among_kinds_of_layers():
    shares = roofline.by_kind(throughput.build(replace(CASE, resolution=64, batch_size=4)).run, "cpu")
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert {"convolution, depthwise", "convolution, other", "normalisation", "optimizer and average"} <= shares.keys()
    assert shares.get("other", 0) < 0.3
    json.dumps(shares)


def test_a_start_takes_the_seconds_of_its_process():
    seconds = startup._seconds(("model.widht=2",), 2)
    assert 0.05 < seconds < 60
    with pytest.raises(ValueError, match=r"effnet-train model.widht=2 ended with status 2: .*model.width"):
        startup._seconds(("model.widht=2",), 0)


@pytest.mark.slow
def test_starts_are_as_quick_as_wanted():
    for name, row in startup.measure(3).items():
        assert min(row["runs_s"]) < row["limit_s"], name
