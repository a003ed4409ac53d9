"""Contenders in processes of their own: what they tell, what they take, and how they end."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from effnet_train.analysis import elsewhere, throughput
from effnet_train.analysis.complexity import complexity
from effnet_train.analysis.elsewhere import Elsewhere, rest
from effnet_train.analysis.throughput import Case
from effnet_train.models.efficientnet import EfficientNet

CONFIG = {"width": 1.0, "depth": 1.0, "resolution": 224, "dropout": 0.2, "drop_connect": 0.2}
CASE = Case(library="ours", variant="b0", config=CONFIG, training=True, resolution=32, batch_size=2)
BUSY = """
import time
from functools import partial
from effnet_train.analysis.elsewhere import Elsewhere
from effnet_train.analysis.throughput import Case
case = Case(library="ours", variant="b0", config={}, training=True, resolution=32, batch_size=2, mode="compiled")
work = Elsewhere(case, partial(time.sleep, 600))
print(work._process.pid, flush=True)
time.sleep(600)
"""


def prepared(case: Case) -> Elsewhere:
    work = Elsewhere(case, partial(torch.set_num_threads, 1))
    assert work.prepared() > 0
    work.close()
    return work


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_same_work():
    work = Elsewhere(replace(CASE, training=False), partial(torch.set_num_threads, 1))
    once = work.prepared()
    assert work.timed(20) == pytest.approx(20 * once, rel=0.8)
    assert work.path == throughput.build(replace(CASE, training=False)).path != "plain"
    assert sum(work.kinds().values()) == pytest.approx(1, abs=0.01)
    work.close()
    assert work._process.exitcode == 0  # not by force


@pytest.mark.slow
def test_what_fails_in_a_process_fails_here():
    work = Elsewhere(replace(CASE, config={"wdith": 1}, mode="compiled"), partial(torch.set_num_threads, 1))
    rest([work])  # when it has failed, it rests
    with pytest.raises(TypeError, match="wdith") as caught:
        work.prepared()
    assert "elsewhere.py" in caught.value.__notes__[0]  # where it was raised
    work.close()


@pytest.mark.slow
def test_memory_is_that_of_one_process_and_grows_with_the_batch():
    small, large = (prepared(replace(CASE, batch_size=n, resolution=64)).peak for n in (2, 64))
    cost = complexity(EfficientNet(**CONFIG), 64)
    weights = 4 * 4 * cost.parameters  # weights, average, two slots; gradients are gone before the activations peak
    assert 0.5 * weights < small < 4 * weights
    # At least every convolution's output once, at most all that a network without tricks keeps, and twice the largest.
    assert 1 < (large - small) / (62 * 4 * cost.activations) < 5


@pytest.mark.slow
def test_a_process_that_computes_ends_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert running(child)
        parent.kill()
    deadline = time.monotonic() + 60  # it may have been importing
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(child)


def running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and " Z " not in stat.read_text()


@pytest.mark.slow
def test_a_process_that_dies_is_told_by_its_name():
    work = Elsewhere(replace(CASE, mode="compiled"), partial(os.kill, 0, 0))
    os.kill(work._process.pid, signal.SIGKILL)
    rest([work])
    message = r"measures ours, compiled of b0 died \(exit code -9\): if .*, set a smaller batch_size="
    with pytest.raises(ChildProcessError, match=message):
        work.prepared()
    work.close()


@pytest.mark.slow
def test_closing_does_not_wait():
    work = Elsewhere(replace(CASE, mode="compiled"), partial(time.sleep, 600))
    child = work._process.pid
    started = time.monotonic()
    work.close()
    work.close()
    assert time.monotonic() - started < 10
    assert not running(child)
    Elsewhere(CASE, partial(time.sleep, 600)).close()  # that was never begun


@pytest.mark.parametrize(("held", "peak"), [(300, 4000), (9000, 9000)])
def test_the_peak_on_a_gpu_has_what_is_held_for_graphs(monkeypatch, held, peak):
    calls = []
    for name, value in {
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 4000,
        "empty_cache": None,
        "memory_reserved": held,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: calls.append(name) or value)
    assert elsewhere._peak(lambda: calls.append("run")) == peak
    assert calls == ["reset_peak_memory_stats", "run", "max_memory_allocated", "empty_cache", "memory_reserved"]


@pytest.mark.gpu
def test_a_graph_takes_the_memory_of_its_step():
    case = replace(CASE, resolution=128, batch_size=32, precision="bf16", device="cuda")
    fused, graph = (elsewhere._peak(prepared_here(replace(case, mode=mode))) for mode in ("fused", "graph"))
    assert graph > 0.7 * fused


def prepared_here(case: Case):
    work = throughput.build(case)
    work.prepared()
    return work.run


def test_where_others_have_the_memory_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowded(throughput.Work):
        def prepared(self) -> float:
            calls.append(1)
            if len(calls) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 0.5

    calls: list[int] = []
    monkeypatch.setattr(elsewhere, "_MEMORY_WAITS", [0.0, 0.0])
    assert elsewhere._prepared(Crowded(lambda: None, "cuda")) == 0.5
    calls.clear()
    monkeypatch.setattr(elsewhere, "_MEMORY_WAITS", [0.0])
    with pytest.raises(torch.OutOfMemoryError):
        elsewhere._prepared(Crowded(lambda: None, "cuda"))
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_who_takes_too_long_is_ended(mode: str):
    work = Elsewhere(replace(CASE, mode=mode), partial(time.sleep, 600), wait_s=0.5)
    if mode == "compiled":
        rest([work])  # what waits for others ends it, too
    with pytest.raises(TimeoutError, match=r"of b0 was not ready in wait_s=0\.5"):
        work.prepared()
    assert not work._process.is_alive()
    work.close()
