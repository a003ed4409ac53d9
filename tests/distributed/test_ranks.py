"""Real processes over gloo: what several ranks compute is what one computes."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from effnet_train import distributed
from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess
from effnet_train.engine.evaluate import ENSEMBLE, Member, evaluate, evaluate_members
from effnet_train.engine.scores import Measure, Metrics
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.train import Stepper
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.optim.ema import EMA
from effnet_train.optim.losses import CrossEntropy

RANKS = 2
COUNT = 16
PREPROCESS = Preprocess(resolution=32)


def global_batch(step: int, count: int = COUNT) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(5, (count,), generator=generator)
    return Batch(images, labels, torch.randint(2**62, (count,), generator=generator), [])


def part(batch: Batch, session: distributed.Session) -> Batch:
    size = len(batch.labels) // session.world_size
    mine = slice(session.rank * size, (session.rank + 1) * size)
    return Batch(batch.images[mine], batch.labels[mine], batch.keys[mine], [])


def steps(session: distributed.Session, *, sync_bn: int, accumulate: int = 1, count: int = 3) -> dict[str, Any]:
    """Train `count` steps as this rank and return the state; float64, so that only mistakes make a difference."""
    torch.manual_seed(session.rank)  # the ranks start apart: rank 0's weights must win
    model = EfficientNet(width=0.25, depth=0.3, resolution=32, num_classes=5, drop_connect=0.5).double().train()
    if session.world_size > 1:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    distributed.sync_batch_norm(model, session, sync_bn)
    state = TrainState(
        model,
        EMA(model, 0.9),
        torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9),
        torch.amp.GradScaler("cpu", enabled=False),
        no_statistics(torch.device("cpu")),
    )
    step = Stepper(
        network=AsDouble(session.parallel(model)),
        loss=CrossEntropy(),
        preprocess=PREPROCESS,
        num_classes=5,
        accumulate=accumulate,
        session=session,
    )
    for number in range(count):
        step(state, [part(global_batch(number), session)], 0.05)
    return state.state_dict(session)


class AsDouble(nn.Module):
    """Give a float64 network its input in float64."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.network(images.double(), keys)


def work(folder: str) -> None:
    """Compute as one of two ranks, and leave results in files for the test to read."""
    torch.set_num_threads(1)
    with distributed.open_session("cpu") as session:
        for name, sync_bn in (("synced", 2), ("unsynced", 0)):
            torch.save(steps(session, sync_bn=sync_bn), Path(folder) / f"{name}-{session.rank}.pt")
        checks(session, Path(folder))


def checks(session: distributed.Session, folder: Path) -> None:
    found: dict[str, Any] = {"rank": session.rank, "world": session.world_size}
    found["sum"] = session.sum_(torch.tensor([1.0 + session.rank])).item()
    found["min"] = session.min_(torch.tensor([5.0 - session.rank])).item()
    tensors = [torch.tensor([float(session.rank)]), torch.full((2, 2), 3.0 * session.rank)]
    session.mean_(tensors)
    found["mean"] = [tensor.flatten().tolist() for tensor in tensors]
    found["broadcast"] = session.broadcast({"from": session.rank})
    with distributed.PreemptionNotice(session) as notice:
        answers = []
        for step in range(5):
            if step == 2 and session.rank == 1:
                os.kill(os.getpid(), 10)  # SIGUSR1, to this rank alone
            answers.append(notice.agreed())
        found["agreed"] = answers
    # Eleven images over two ranks: six and five, none twice.
    whole = global_batch(9, 11)
    mine = slice(session.rank, None, session.world_size)
    share = [Batch(whole.images[mine], whole.labels[mine], whole.keys[mine], [])]
    torch.manual_seed(0)
    model = EfficientNet(width=0.25, depth=0.3, resolution=32, num_classes=5)
    metrics = evaluate({"m": model}, share, num_images=11, preprocess=PREPROCESS, precision="fp32", session=session)[
        "m"
    ]
    found["metrics"] = [metrics.top1, metrics.top5, metrics.loss, metrics.images]
    for count in (11, 1):
        metrics = measured(session, count)
        assert metrics.confusion is not None
        assert metrics.calibration is not None
        found[f"measured-{count}"] = [metrics.confusion.tolist(), metrics.calibration.tolist(), metrics.record()]
    (folder / f"checks-{session.rank}.json").write_text(json.dumps(found))


def measured(session: distributed.Session, count: int) -> Metrics:
    """Measure all that can be measured of two members' average, with crops and mirror images, in batches of four."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 5, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels, keys = torch.randint(5, (count,), generator=generator), torch.arange(count)
    mine, most = keys[session.rank :: session.world_size], -(-count // session.world_size)
    parts = [mine[start : start + 4] for start in range(0, most, 4)]  # of one image, the other rank's is empty
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = EfficientNet(width=0.25, depth=0.3, resolution=32, num_classes=5)
        batches = [Batch(images[part], labels[part], part, []) for part in parts]
        members.append(Member({str(seed): model}, batches, PREPROCESS))
    real = torch.stack([(labels + 1) % 5, torch.where(keys % 3 == 0, -1, labels)], 1)
    real[keys % 4 == 0] = -1
    measure = Measure(calibration=True, confusion=5, real=real)
    found = evaluate_members(members, num_images=count, precision="fp32", session=session, flip=True, measure=measure)
    return found[ENSEMBLE]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    distributed.launch(work, str(folder), ranks=RANKS)
    return folder


def load(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def close(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    for key in ("model", "ema", "statistics"):
        torch.testing.assert_close(one[key], other[key], **tolerance)


def test_two_ranks_with_shared_statistics_train_as_one(results: Path) -> None:
    alone = steps(distributed.Session(), sync_bn=0)
    close(load(results, "synced", 0), alone, rtol=1e-4, atol=1e-5)


def test_two_ranks_without_shared_statistics_do_not(results: Path) -> None:
    alone, apart = steps(distributed.Session(), sync_bn=0), load(results, "unsynced", 0)
    name = "stages.6.0.project.conv.weight"
    assert not torch.allclose(alone["model"][name], apart["model"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["synced", "unsynced"])
def test_all_ranks_hold_the_same_bits(results: Path, name: str) -> None:
    close(load(results, name, 0), load(results, name, 1), rtol=0, atol=0)


def test_reductions_notice_and_evaluation(results: Path) -> None:
    ours = [json.loads((results / f"checks-{rank}.json").read_text()) for rank in range(RANKS)]
    whole = global_batch(9, 11)
    torch.manual_seed(0)
    model = EfficientNet(width=0.25, depth=0.3, resolution=32, num_classes=5)
    session = distributed.Session()
    alone = evaluate({"m": model}, [whole], num_images=11, preprocess=PREPROCESS, precision="fp32", session=session)[
        "m"
    ]
    for rank, found in enumerate(ours):
        assert (found["rank"], found["world"]) == (rank, RANKS)
        assert (found["sum"], found["min"], found["broadcast"]) == (3.0, 4.0, {"from": 0})
        assert found["mean"] == [[0.5], [1.5] * 4]
        assert found["agreed"] == [False, False, False, True, True]
        assert found["metrics"][:2] == [alone.top1, alone.top5]
        assert found["metrics"][2] == pytest.approx(alone.loss, rel=1e-5)
        assert found["metrics"][3] == 11


@pytest.mark.parametrize("count", [11, 1])
def test_all_that_is_measured_adds_up_over_ranks(results: Path, count: int) -> None:
    """Also where a rank has no image at all."""
    alone = measured(distributed.Session(), count)
    assert alone.confusion is not None
    assert alone.calibration is not None
    assert alone.confusion.sum() == alone.images == count
    expected = alone.record()
    for rank in range(RANKS):
        confusion, calibration, record = json.loads((results / f"checks-{rank}.json").read_text())[f"measured-{count}"]
        assert confusion == alone.confusion.tolist()
        np.testing.assert_allclose(calibration, alone.calibration, rtol=1e-5)
        for key in ("top1", "top5", "images", "skipped", "real_top1", "real_images"):
            assert record[key] == expected[key]
        for key in ("loss", "ece"):
            assert record[key] == pytest.approx(expected[key], rel=1e-5)


def fail_on_rank_1(folder: str) -> None:
    with distributed.open_session("cpu") as session:
        if session.rank == 1:
            raise SystemExit(7)
        session.barrier()


def test_a_failing_ranks_exit_code_is_the_commands(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        distributed.launch(fail_on_rank_1, str(tmp_path), ranks=RANKS)
    assert error.value.code == 7


def download(folder: str) -> None:
    """Let each rank's part of a download take longer than a collective may."""
    from torch.distributed import distributed_c10d

    # What was private has a name of its own since torch 2.14.
    set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
    with distributed.open_session("cpu") as session:
        set_timeout(timedelta(seconds=1))
        with session.main_first():
            (Path(folder) / f"{time.time():.3f}-{session.rank}").touch()
            time.sleep(2)
        session.barrier()


def test_a_long_download_is_waited_for(tmp_path: Path) -> None:
    """By the others for rank 0's, and by rank 0 for that of another machine."""
    distributed.launch(download, str(tmp_path), ranks=RANKS)
    assert [name[-1] for name in sorted(os.listdir(tmp_path))] == ["0", "1"]
