"""What a network costs: parameters, multiply-adds, activations, memory of a training step; all without computing."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Hold what one part of a network costs an image; `activations` are the elements that convolutions put out."""

    name: str
    parameters: int
    multiply_adds: int
    activations: int


@dataclass(frozen=True)
class Complexity:
    """Hold what a network costs an image, as a whole and by its parts in order."""

    parameters: int
    multiply_adds: int
    activations: int
    parts: tuple[Cost, ...]


def complexity(model: nn.Module, resolution: int, *, by_layer: bool = False) -> Complexity:
    """Count what `model` costs an image of `resolution` pixels a side, from its own forward pass.

    Nothing is computed and `model` is not touched: the pass runs on the meta device. Multiply-adds are those of
    convolutions and matrix products, which the paper calls FLOPS. The parts are the model's children, and one by one
    the children of `stages`; or `by_layer` all modules with parameters of their own.
    """
    parts = dict(_layers(model) if by_layer else _parts(model))
    activations = dict.fromkeys(parts, 0)

    def counts(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            activations[name] += output.numel()

        return hook

    hooks = [
        module.register_forward_hook(counts(name))
        for name, part in parts.items()
        for module in part.modules()
        if isinstance(module, nn.Conv2d)
    ]
    counter = FlopCounterMode(display=False)
    try:
        with _mode(model, training=False), torch.no_grad(), counter:
            functional_call(model, _meta_state(model), torch.empty(1, 3, resolution, resolution, device="meta"))
    finally:
        for handle in hooks:
            handle.remove()
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    root = type(model).__name__
    costs = tuple(
        Cost(name, _count(part), _flops(f"{root}.{name}", part, flops) // 2, activations[name])
        for name, part in parts.items()
    )
    return Complexity(_count(model), counter.get_total_flops() // 2, sum(activations.values()), costs)


def kept_numbers(model: nn.Module, resolution: int, *, by_layer: bool = False) -> dict[str, int]:
    """Count what training keeps of an image for the backward pass, by the parts that `complexity` has.

    A tensor is the first part's that keeps it, and what is kept between two parts, as an activation is between layers,
    is the former's. Without checkpointing.
    """
    parts = dict(_layers(model) if by_layer else _parts(model))
    state = _meta_state(model)
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    seen = {id(tensor.untyped_storage()) for tensor in state.values()}
    alive: list[torch.UntypedStorage] = []  # so that no two have the same id
    kept = dict.fromkeys(parts, 0)
    current = next(iter(parts))

    def enters(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            nonlocal current
            current = name

        return hook

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # What BatchNorm keeps of the batch, a number a channel, no image adds to.
        if tensor.ndim > 1 and tensor.is_floating_point() and id(storage) not in seen:
            seen.add(id(storage))
            alive.append(storage)
            kept[current] += storage.nbytes() // tensor.itemsize
        return tensor

    # On all modules: a part that is a list of blocks is never called itself.
    owners = [(module, name) for name, part in parts.items() for module in part.modules()]
    hooks = [module.register_forward_pre_hook(enters(name)) for module, name in owners]
    # Two images: BatchNorm needs them in training where the last features are a single pixel.
    images = torch.empty(2, 3, resolution, resolution, device="meta")
    try:
        with _mode(model, training=True), _no_checkpointing(model), saved_tensors_hooks(pack, lambda tensor: tensor):
            functional_call(model, state, images)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: count // 2 for name, count in kept.items()}


def evaluation_memory(model: nn.Module, resolution: int, batch_size: int, *, activation_bytes: int = 4) -> int:
    """Estimate the bytes that evaluating a batch of `batch_size` images takes: the weights, and the peak beside them.

    What `training_memory` leaves out is left out.
    """
    live = _LiveNumbers()
    state = _meta_state(model)
    images = torch.empty(batch_size, 3, resolution, resolution, device="meta")
    with _mode(model, training=False), torch.no_grad(), live:
        live.count(images)
        functional_call(model, state, images)
    weights = sum(tensor.nbytes for tensor in state.values() if tensor.is_floating_point())
    return weights + live.peak * activation_bytes


def training_memory(model: nn.Module, resolution: int, batch_size: int, *, activation_bytes: int = 4) -> int:
    """Estimate the bytes that training takes on one device, with a batch of `batch_size` images there.

    That is weights, gradients, two slots of the optimizer and the moving average in the weights' precision, and the
    peak of everything else that is alive at once in a forward and a backward pass, at `activation_bytes` a number.
    Checkpointing counts as it works; layers count as plain ones, though those of a CPU keep less. Left out: the
    libraries' work space and what an allocator wastes, and under automatic mixed precision the weights' second copy.
    """
    live = _LiveNumbers()
    state = _meta_state(model)
    parameters = [state[name].requires_grad_() for name, _ in model.named_parameters()]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(_forget_gradient)  # gradients are counted below
    images = torch.empty(batch_size, 3, resolution, resolution, device="meta")
    with _mode(model, training=True), live:
        live.count(images)
        functional_call(_Step(model), {f"model.{name}": tensor for name, tensor in state.items()}, images)
    weights = sum(tensor.nbytes for tensor in state.values() if tensor.is_floating_point())
    trained = sum(parameter.nbytes for parameter in parameters)
    return weights * 2 + trained * 3 + live.peak * activation_bytes


class _Step(nn.Module):
    """Go forward and back in one call, so that blocks computed twice find the stand-ins the second time too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> None:
        self.model(images).sum().backward()


class _LiveNumbers(TorchDispatchMode):
    """Follow how many floating-point numbers the tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.untyped_storage() not in inputs:
                self.count(leaf)
        return outputs

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        numbers = storage.nbytes() // tensor.itemsize
        self._seen.add(storage)
        weakref.finalize(storage, self._forget, numbers)
        self.now += numbers
        self.peak = max(self.peak, self.now)

    def _forget(self, numbers: int) -> None:
        self.now -= numbers


class _QuickNorms(TorchDispatchMode):
    """Answer BatchNorm on the meta device with empty tensors of the right shapes: torch's own way is slow there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default and args[0].is_meta:
            x, _weight, _bias, mean, _variance, training = args[:6]
            saved = [mean.new_empty(x.shape[1] if training else 0) for _ in range(2)]
            return torch.empty_like(x), *saved
        if func is torch.ops.aten.native_batch_norm_backward.default and args[0].is_meta:
            _gradient, x, weight, *_, wanted = args
            made = (torch.empty_like(tensor) for tensor in (x, weight, weight))
            return tuple(tensor if want else None for tensor, want in zip(made, wanted, strict=True))
        return func(*args, **(kwargs or {}))


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if name == "stages":
            yield from ((f"{name}.{i}", stage) for i, stage in child.named_children())
        elif not isinstance(child, nn.Identity):  # which stands for a head that the network has not
            yield name, child


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in model.named_modules() if list(part.parameters(recurse=False)))


def _flops(name: str, module: nn.Module, flops: dict[str, int]) -> int:
    """Look up a module's count; one that is never called itself, like a list of blocks, has its children's."""
    if name in flops:
        return flops[name]
    return sum(_flops(f"{name}.{child_name}", child, flops) for child_name, child in module.named_children())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _meta_state(model: nn.Module) -> dict[str, Tensor]:
    """Return stand-ins for parameters and buffers, which share nothing with them."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: torch.empty_like(tensor, device="meta", requires_grad=False) for name, tensor in tensors}


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with _QuickNorms():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _no_checkpointing(model: nn.Module) -> Iterator[None]:
    before: Any = getattr(model, "checkpointing", None)
    try:
        if before is not None:
            model.checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        if before is not None:
            model.checkpointing = before
