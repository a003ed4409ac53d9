"""The step as graphs. Without a GPU a graph is a function that is called again, on the same memory."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim.rmsprop_tf import RMSpropTF
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_train.data.loader import Batch
from effnet_train.data.mixing import Mixing
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session
from effnet_train.engine import graph
from effnet_train.engine.graph import GraphStepper, check_graph
from effnet_train.engine.objectives import Loss
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.train import Stepper
from effnet_train.engine.working_weights import WorkingWeights
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.optim.ema import EMA
from effnet_train.optim.losses import CrossEntropy
from effnet_train.optim.one_pass import OnePass
from effnet_train.optim.param_groups import param_groups

pytest.importorskip("triton", reason="Triton is not here: pip install triton")


class Small(nn.Module):
    """A network whose classes depend on the keys, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, 4)

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        return self.classifier(self.norm(self.conv(images)).mean((2, 3)) + 0.1 * keys[:, None])


def make_state(model: Callable[[], nn.Module], device: torch.device) -> TrainState:
    torch.manual_seed(0)
    network = model().to(device).to(memory_format=torch.channels_last).train()
    optimizer = RMSpropTF(param_groups(network, 1e-3), lr=0.0, alpha=0.9, momentum=0.9, eps=1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return TrainState(network, EMA(network, 0.9), optimizer, scaler, no_statistics(device))


def make_step(state: TrainState, *, graphs: bool, size: int = 4, **options: Any) -> Stepper:
    device = state.statistics.device
    parts: dict[str, Any] = {
        "network": state.model,
        "loss": CrossEntropy(label_smoothing=0.1),
        "preprocess": Preprocess(resolution=size),
        "num_classes": 4,
        "session": Session(device=device),
        **options,
    }
    return GraphStepper(**parts, update=OnePass(state.optimizer, state.ema)) if graphs else Stepper(**parts)


def run(state: TrainState, step: Stepper, steps: range, size: int = 4) -> None:
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        parts = []
        for _ in range(step.accumulate):
            images = torch.randint(256, (6, size, size, 3), dtype=torch.uint8, generator=generator)
            numbers = torch.randint(4, (6,), generator=generator)
            parts.append(Batch(images, numbers, numbers + i, ["a"] if i == 2 else []))
        assert step(state, parts, 0.01 * (i + 1))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have what would be captured be called, and what would go to another stream too; return what was done."""
    done: list[str] = []

    def captured(work: Callable[[], None]) -> Callable[[], None]:
        done.append("captured")

        def replay() -> None:
            done.append("replayed")
            work()

        return replay

    def aside(work: Callable[[], None]) -> None:
        done.append("eager")
        work()

    monkeypatch.setattr(graph, "captured", captured)
    monkeypatch.setattr(graph, "aside", aside)
    return done


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2, "clip_norm": 0.5}, {"mixing": Mixing(mixup_alpha=0.2)}],
    ids=["plain", "accumulated-and-clipped", "mixed"],
)
def test_graphs_train_as_the_plain_step_does(by_hand: list[str], options: dict[str, Any]) -> None:
    plain, graphs = (make_state(Small, torch.device("cpu")) for _ in range(2))
    run(plain, make_step(plain, graphs=False, **options), range(5))
    run(graphs, make_step(graphs, graphs=True, **options), range(5))
    torch.testing.assert_close(
        graphs.state_dict(Session()), plain.state_dict(Session()), rtol=1e-4, atol=1e-5, check_dtype=True
    )
    assert graphs.step == 5
    learned = options.get("accumulate", 1) + 1
    assert by_hand.count("eager") == 3 * learned
    assert by_hand.count("captured") == 2
    assert by_hand.count("replayed") == 2 * learned


@pytest.mark.usefixtures("by_hand")
def test_going_on_is_exact() -> None:
    """Whether a step is captured or not changes no bit, and nothing outlives a checkpoint."""
    whole = make_state(Small, torch.device("cpu"))
    step = make_step(whole, graphs=True)
    run(whole, step, range(3))
    between = copy.deepcopy(whole.state_dict(Session()))
    run(whole, step, range(3, 6))
    again = make_state(Small, torch.device("cpu"))
    again.load_state_dict(between, Session())
    run(again, make_step(again, graphs=True), range(3, 6))
    torch.testing.assert_close(again.state_dict(Session()), whole.state_dict(Session()), rtol=0, atol=0)


@pytest.mark.usefixtures("by_hand")
def test_the_first_bad_step_is_remembered() -> None:
    state = make_state(Small, torch.device("cpu"))
    step = make_step(state, graphs=True)
    run(state, step, range(4))
    with torch.no_grad():
        state.model.classifier.bias[0] = torch.nan
    run(state, step, range(4, 6))
    assert state.statistics[4] == 5


def network(**options: Any) -> Callable[[], nn.Module]:
    return lambda: EfficientNet(width=0.25, depth=0.25, num_classes=4, drop_connect=0.5, **options)


def partly_trained() -> nn.Module:
    """Return a network with a part that is frozen and one that is never used."""
    model = network()()
    model.stem.requires_grad_(False)  # type: ignore[union-attr]
    model.unused = nn.Linear(2, 2)
    return model


def twice(network: nn.Module, loss: Loss, images: Tensor, targets: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    logits = network(images, keys)
    return loss(logits, targets) + loss(network(images.flip(3), keys), targets), logits


class Count(TorchDispatchMode):
    """Count the operators that are called, and the casts of what is at an address of `weights`."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.found = weights, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.found[name] += 1
        self.found["weights cast"] += name == "_to_copy" and args[0].data_ptr() in self.weights
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (network(), {"accumulate": 2, "clip_norm": 0.5}),
        (network(checkpointing=True), {}),
        (partly_trained, {}),
        (network(), {"objective": twice}),
        (network(), {"precision": "fp32"}),
    ],
    ids=["accumulated-and-clipped", "checkpointing", "partly-trained", "twice", "fp32"],
)
@pytest.mark.usefixtures("by_hand")
def test_all_weights_at_once_are_the_same_bits(
    model: Callable[[], nn.Module], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when autocast casts weights, and autograd adds up their gradients, one by one."""
    at_once, one_by_one = (make_state(model, torch.device("cpu")) for _ in range(2))
    settings = {"precision": "bf16", "size": 32, **options}
    run(at_once, make_step(at_once, graphs=True, **settings), range(4), size=32)
    monkeypatch.setattr(GraphStepper, "learn", Stepper.learn)
    run(one_by_one, make_step(one_by_one, graphs=True, **settings), range(4), size=32)
    torch.testing.assert_close(at_once.state_dict(Session()), one_by_one.state_dict(Session()), rtol=0, atol=0)


@pytest.mark.usefixtures("by_hand")
def test_weights_are_cast_and_gradients_added_by_one_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for learn in (GraphStepper.learn, Stepper.learn):
        monkeypatch.setattr(GraphStepper, "learn", learn)
        state = make_state(network(), torch.device("cpu"))
        step = make_step(state, graphs=True, precision="bf16", size=32)
        weights = list(state.model.parameters())
        with Count({p.data_ptr() for p in weights}) as count:
            run(state, step, range(1), size=32)
        found.append(count.found)
    at_once, one_by_one = found
    layers = [m for m in state.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    depthwise = sum(getattr(layer, "groups", 1) > 1 for layer in layers)
    cast = sum(len(list(layer.parameters())) for layer in layers)
    assert (one_by_one["weights cast"], at_once["weights cast"]) == (cast, depthwise)
    assert one_by_one["_to_copy"] - at_once["_to_copy"] == 2 * (cast - depthwise)  # there and back
    assert one_by_one["add_"] - at_once["add_"] == len(weights)
    assert at_once["_foreach_copy_"] == 2
    assert at_once["_foreach_add_"] == one_by_one["_foreach_add_"] + 1
    assert at_once["clone"] == one_by_one["clone"]  # gradients are taken as they are


def test_weights_are_back_whatever_happens() -> None:
    state = make_state(Small, torch.device("cpu"))
    before = dict(state.model.named_parameters())
    at_work: dict[str, nn.Parameter] = {}

    def interrupted() -> None:
        with WorkingWeights(state.model, torch.bfloat16).at_work():
            at_work.update(state.model.named_parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    cast = {name for name, p in at_work.items() if p.dtype == torch.bfloat16}
    assert cast == {"conv.weight", "conv.bias", "classifier.weight", "classifier.bias"}
    assert at_work["norm.weight"].data_ptr() == before["norm.weight"].data_ptr()
    assert all(p is before[name] for name, p in state.model.named_parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_graphs_on_a_gpu(fused: bool) -> None:
    def model() -> nn.Module:
        return EfficientNet(width=0.5, depth=0.3, num_classes=4, drop_connect=0.5, fused=fused)

    device = torch.device("cuda")
    plain, graphs = make_state(model, device), make_state(model, device)
    run(plain, make_step(plain, graphs=False, size=64, accumulate=2), range(8), size=64)
    run(graphs, make_step(graphs, graphs=True, size=64, accumulate=2), range(8), size=64)
    torch.testing.assert_close(graphs.statistics[0], plain.statistics[0], rtol=1e-2, atol=1e-2)  # the losses' sum
    torch.testing.assert_close(graphs.statistics[2:], plain.statistics[2:], rtol=0, atol=0)  # hits may differ by a few
    ours, theirs = (state.state_dict(Session())["ema"] for state in (graphs, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_all_weights_at_once_are_the_same_bits_on_a_gpu(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    at_once, one_by_one = (make_state(network(fused=fused), device) for _ in range(2))
    settings: dict[str, Any] = {"precision": "bf16", "size": 64, "accumulate": 2, "clip_norm": 0.5}
    run(at_once, make_step(at_once, graphs=True, **settings), range(8), size=64)
    monkeypatch.setattr(GraphStepper, "learn", Stepper.learn)
    run(one_by_one, make_step(one_by_one, graphs=True, **settings), range(8), size=64)
    torch.testing.assert_close(at_once.state_dict(Session()), one_by_one.state_dict(Session()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("session", "options", "message"),
    [
        (Session(device=torch.device("cpu")), {}, "device=cpu has no CUDA graphs"),
        (Session(0, 2, torch.device("cuda")), {}, "the 2 ranks meet within a step"),
        (Session(device=torch.device("cuda")), {"precision": "fp16"}, "precision=fp16 has the host read"),
        (Session(device=torch.device("cuda")), {"on_nan": "skip"}, "on_nan=skip has the host wait"),
        (Session(device=torch.device("cuda")), {"compiled": True}, "compile=true captures graphs of its own"),
    ],
)
def test_what_cannot_be_captured_is_refused(session: Session, options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"precision": "bf16", "on_nan": "stop", "compiled": False, **options}
    with pytest.raises(ValueError, match=f"cuda_graph=true cannot be: {message}.* or use cuda_graph=false"):
        check_graph(session, **settings)


def test_the_usual_is_not_refused() -> None:
    check_graph(Session(device=torch.device("cuda")), precision="bf16", on_nan="rollback", compiled=False)
