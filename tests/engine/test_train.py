"""The step and the loop, on models small enough to follow by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session
from effnet_train.engine.every import Every
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.train import Plan, Stepper, is_better
from effnet_train.optim.ema import EMA
from effnet_train.optim.losses import CrossEntropy
from effnet_train.optim.schedules import Constant, Exponential


class Linear(nn.Module):
    """No BatchNorm: micro-batches must then add up to the whole batch exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(12, 4)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.classifier(images.flatten(1))


def make_state(seed: int = 0, **optimizer: Any) -> TrainState:
    torch.manual_seed(seed)
    model = Linear().train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, **optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, EMA(model, 0.9), sgd, scaler, no_statistics(torch.device("cpu")))


def make_batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 2, 2, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(count) % 4, torch.arange(count), [])


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    parts = zip(*(tensor.chunk(count) for tensor in (batch.images, batch.labels, batch.keys)), strict=True)
    return [Batch(*part, []) for part in parts]


def make_step(state: TrainState, **options: Any) -> Stepper:
    loss = CrossEntropy(label_smoothing=0.1)
    return Stepper(network=state.model, loss=loss, preprocess=Preprocess(resolution=2), num_classes=4, **options)


def make_plan(**options: Any) -> Plan:
    never = Every()
    defaults: dict[str, Any] = {"num_images": 1000, "batch_size": 64, "epochs": 3, "schedule": Constant()}
    return Plan(**{**defaults, "log": never, "evaluate": never, "save": never, **options})


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_add_up_to_the_batch(accumulate: int) -> None:
    whole, parts = make_state(), make_state()
    make_step(whole)(whole, [make_batch()], 0.5)
    make_step(parts, accumulate=accumulate)(parts, micro_batches(make_batch(), accumulate), 0.5)
    torch.testing.assert_close(whole.model.state_dict(), parts.model.state_dict(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole.statistics, parts.statistics)
    assert whole.statistics[2] == 8


def test_a_step_is_sgd_on_the_smoothed_loss_and_the_average_follows() -> None:
    state, reference = make_state(), make_state()
    batch = make_batch()
    make_step(state)(state, [batch], 0.25)

    mean, std = torch.tensor(Preprocess(resolution=2).mean), torch.tensor(Preprocess(resolution=2).std)
    images = ((batch.images.double() / 255 - mean.double()) / std.double()).permute(0, 3, 1, 2)
    weight = reference.model.classifier.weight.double().detach().requires_grad_()
    bias = reference.model.classifier.bias.double().detach().requires_grad_()
    logits = images.flatten(1) @ weight.T + bias
    targets = torch.full_like(logits, 0.1 / 4)
    targets[range(8), batch.labels] += 0.9
    loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    expected = weight - 0.25 * weight.grad
    torch.testing.assert_close(state.model.classifier.weight.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    # The first update of the average has the decay 2 / 11, whatever lies above that.
    averaged = weight.detach() * 2 / 11 + expected.detach() * 9 / 11
    torch.testing.assert_close(state.ema.module.classifier.weight.double(), averaged, rtol=1e-5, atol=1e-6)
    assert state.statistics[0].item() / 8 == pytest.approx(loss.item(), rel=1e-5)
    assert state.step == 1


def test_clipping_bounds_the_global_norm() -> None:
    state, free = make_state(), make_state()
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    make_step(state, clip_norm=1e-3)(state, [make_batch()], 1.0)
    make_step(free)(free, [make_batch()], 1.0)

    def moved(after: TrainState) -> float:
        parts = [(after.model.state_dict()[name] - tensor).flatten() for name, tensor in before.items()]
        return torch.cat(parts).norm().item()

    assert moved(state) == pytest.approx(1e-3, rel=1e-3)
    assert moved(free) > 0.1


def test_the_first_bad_step_is_remembered() -> None:
    state = make_state()
    step = make_step(state)
    step(state, [make_batch()], 0.1)
    assert state.statistics[4] == torch.inf
    with torch.no_grad():
        state.model.classifier.bias[0] = torch.nan
    for _ in range(3):
        step(state, [make_batch()], 0.1)
    assert state.statistics[4] == 2  # steps are counted from 1, and the first was good
    assert not state.is_finite()


def test_the_length_of_a_run_is_exact() -> None:
    assert make_plan().total_steps == 47  # 3000 images in batches of 64: 46.9
    assert make_plan(epochs=0.1, num_images=640).total_steps == 1
    assert make_plan(max_steps=5).total_steps == 5
    imagenet = make_plan(num_images=1281167, batch_size=4096, epochs=350, schedule=Exponential())
    assert imagenet.total_steps == 109475
    assert imagenet.lr(0) == 0
    assert imagenet.lr(1563) == pytest.approx(0.256 * 0.97**2)
    with pytest.raises(ValueError, match="epochs=0 must be more than 0"):
        make_plan(epochs=0)


def test_the_end_is_due_for_everything() -> None:
    plan = make_plan(evaluate=Every(epochs=1))
    due = [step for step in range(1, plan.total_steps + 1) if plan.due(plan.evaluate, step)]
    assert due == [16, 32, 47]


def test_state_survives_a_journey_through_a_dictionary() -> None:
    state, other = make_state(momentum=0.9), make_state(seed=1, momentum=0.9)
    make_step(state)(state, [make_batch()], 0.5)
    state.best = {"step": 1, "val/top1": 0.5}
    other.load_state_dict(copy.deepcopy(state.state_dict(Session())), Session())
    for one in (state, other):
        make_step(one)(one, [make_batch()], 0.5)
    torch.testing.assert_close(state.state_dict(Session()), other.state_dict(Session()), rtol=0, atol=0)


def test_skipped_images_are_part_of_the_state() -> None:
    state = make_state()
    first, second = micro_batches(make_batch(), 2)
    make_step(state, accumulate=2)(state, [first._replace(errors=["a", "b"]), second._replace(errors=["c"])], 0.1)
    assert state.state_dict(Session())["statistics"][3] == 3


@pytest.mark.parametrize(
    ("score", "former", "least", "better"),
    [
        (0.6, 0.5, False, True),
        (0.5, 0.5, False, False),
        (0.6, 0.5, True, False),
        (0.4, 0.5, True, True),
        (math.nan, 0.5, False, False),
        (math.nan, 0.5, True, False),
        (0.1, math.nan, False, True),
        (0.1, math.nan, True, True),
        (math.nan, math.nan, False, False),
    ],
)
def test_what_is_better(score: float, former: float, least: bool, better: bool) -> None:
    assert is_better(score, former, least=least) is better


def test_a_group_has_its_share_of_the_learning_rate() -> None:
    whole, half = make_state(), make_state()
    half.optimizer.param_groups[0]["lr_scale"] = 0.5
    before = half.model.classifier.weight.detach().clone()
    make_step(whole)(whole, [make_batch()], 0.2)
    make_step(half)(half, [make_batch()], 0.4)
    assert torch.equal(whole.model.classifier.weight, half.model.classifier.weight)
    assert not torch.equal(before, half.model.classifier.weight)
