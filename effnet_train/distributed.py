"""The only user of torch.distributed: ranks, the session, exact reductions, synchronised BatchNorm, preemption."""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from effnet_train import slurm
from effnet_train.exit_codes import INTERRUPTED_EXIT_CODE, PASSING_EXIT_CODE, PREEMPTED_EXIT_CODE, USER_ERROR_EXIT_CODE

# After these the ranks are not started again: it would end the same way, or was asked to end.
_FINAL = (USER_ERROR_EXIT_CODE, PREEMPTED_EXIT_CODE, INTERRUPTED_EXIT_CODE)
# All that can ask a run to stop; which of them do is its configuration's choice.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A terminal or a scheduler may signal a rank and its launcher, which hands the signal on: that is one request, not two.
_ONE_REQUEST_S = 3.0
_TIMEOUT_S = 1800.0  # of a collective, in which all ranks should be at about the same place
_PATIENCE = timedelta(hours=12)  # of ranks that wait for another's download; they notice its death at once


@dataclass(frozen=True)
class Session:
    """One rank's place among all ranks. A world of one rank needs no process group and takes the same code path."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Say whether this rank writes files and logs."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def min_(self, tensor: Tensor) -> Tensor:
        """Take the least of `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average floating-point tensors over all ranks in place, in one collective."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (small and picklable) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def store(self, timeout: timedelta) -> dist.Store:
        """Return a connection of its own to the keys and values that all ranks share, for a thread beside the training.

        It gives an error, not after `timeout` alone but also at once, where rank 0 or its launcher has left.
        """
        return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the others, so that what it downloads or writes is there for them.

        However long it takes, on rank 0 or, where a machine has to download for itself, on another.
        """
        if self.world_size == 1:
            yield
            return
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(patient, dist.ProcessGroup)  # which every rank is a member of
        if not self.is_main:
            dist.barrier(group=patient)
        try:
            yield
        finally:
            if self.is_main:
                dist.barrier(group=patient)
        dist.barrier(group=patient)
        dist.destroy_process_group(patient)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap `model` so that gradients are averaged over ranks; weights are taken from rank 0."""
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Its successor, forward_sync_buffers, is not in all the versions of torch that we work with.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            # BatchNorm's statistics are averaged by the step itself (`mean_`), so that every rank holds the same.
            return DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients local inside the block: all micro-batches of a step but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def resolve_device(device: str) -> str:
    """Return `device`, with `auto` as `cuda` where there is one, else `cpu`. Raises ValueError for what is absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device} is not known: use auto, cpu or cuda (ranks= says how many)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device here: use device=cpu, or mend the driver")
    return device


def resolve_ranks(ranks: int | str, device: str) -> int:
    """Return how many ranks this machine is to run: `auto` is one for each GPU, one on a CPU."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if ranks == "auto":
        return max(1, gpus)
    count = int(ranks)
    if count < 1 or (device == "cuda" and count > gpus):
        raise ValueError(
            f"ranks={ranks} does not fit device={device}: give 1 or more, and at most the {gpus} GPUs here"
        )
    return count


def launched() -> bool:
    """Say whether a launcher (torchrun, srun, or our own) has already given this process its rank.

    A place that srun gave then stands where torchrun's does.
    """
    slurm.take_place(os.environ)
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def open_session(device: str, timeout_s: float | None = None) -> Iterator[Session]:
    """Take this process's place from the environment (RANK, WORLD_SIZE, LOCAL_RANK) and leave it in order.

    A collective that takes longer than `timeout_s` (None: half an hour) is an error on the ranks that wait.
    Raises ValueError where this machine has fewer GPUs than ranks.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = torch.device("cuda", _gpu(local_rank, local_world)) if device == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    elif local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if world == 1:
        yield Session(device=place)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    device_id = place if place.type == "cuda" else None
    timeout = timedelta(seconds=_TIMEOUT_S if timeout_s is None else timeout_s)
    dist.init_process_group(backend, device_id=device_id, timeout=timeout)
    try:
        yield Session(rank, world, place)
    finally:
        # After an error the other ranks may never come to a collective: leave without asking them.
        if sys.exc_info()[0] is None:
            dist.barrier(device_ids=[place.index] if place.type == "cuda" else None)
            dist.destroy_process_group()


def _gpu(local_rank: int, local_world: int) -> int:
    """Return which of the GPUs that this process sees is its own: schedulers show a task all, or its own alone."""
    gpus = torch.cuda.device_count()
    if gpus > local_world and local_rank == 0 and "WORLD_SIZE" in os.environ:  # a launcher has settled the ranks
        text = (
            f"{local_world} of the {gpus} GPUs of this machine will be used, as its launcher has started so many ranks"
        )
        print(f"warning: {text} (torchrun --nproc-per-node={gpus}, srun --ntasks-per-node={gpus})", file=sys.stderr)
    if 1 < gpus < local_world:
        raise ValueError(f"{local_world} ranks on this machine, which has {gpus} GPUs: start one for each GPU")
    return local_rank if gpus > 1 else 0


def launch(
    function: Callable[..., None],
    *args: Any,
    ranks: int,
    signals: Sequence[signal.Signals] = STOP_SIGNALS,
    max_restarts: int = 0,
) -> None:
    """Run `function(*args)` in `ranks` processes of this machine, through torch's elastic launcher.

    The exit code of the first rank that failed becomes this process's. The ranks are told of `signals`. Where a rank
    died or hung, all are started again, `max_restarts` times at most; not after an error that would only come again.
    """
    for restart in range(1, max_restarts + 2):
        status, stopped = _launch(function, args, ranks, signals)
        if status == 0:
            return
        if status in _FINAL or stopped or restart > max_restarts:
            raise SystemExit(status)
        print(f"status {status}: starting the ranks again ({restart} of {max_restarts})", file=sys.stderr, flush=True)


def _launch(
    function: Callable[..., None], args: Sequence[Any], ranks: int, signals: Sequence[signal.Signals]
) -> tuple[int, bool]:
    """Run the ranks once; return the exit code to leave with, and whether a signal came.

    Torch's own restarts would follow a signal, too.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = tempfile.TemporaryDirectory(prefix="effnet_train-", ignore_cleanup_errors=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="127.0.0.1",  # the host's own name may not resolve
        start_method="spawn",
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # the others go to the ranks, which know how to stop
        logs_specs=DefaultLogsSpecs(logs.name),  # its own choice stays in the temporary folder for ever
    )
    # Each rank tells of its own failure, once; the launcher would repeat it with tracebacks of its own.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with logs, _forwarded_signals(signals) as forwarded:
            elastic_launch(config, function)(*args)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        if -failures[0].exitcode in forwarded:  # before the rank could take notice: nothing was there to be saved
            return PREEMPTED_EXIT_CODE, True
        for failure in failures:
            if failure.exitcode < 0:
                killed = signal.Signals(-failure.exitcode)
                hint = " (if by the kernel, for want of memory, dmesg tells)" if killed == signal.SIGKILL else ""
                print(f"rank {failure.local_rank} was killed by {killed.name}{hint}", file=sys.stderr, flush=True)
        return failures[0].exitcode if failures[0].exitcode > 0 else PASSING_EXIT_CODE, bool(forwarded)
    return 0, bool(forwarded)


@contextmanager
def _forwarded_signals(signals: Sequence[signal.Signals]) -> Iterator[set[int]]:
    """Hand the signals that ask to stop on to the ranks, whose exit codes then say what came of it; give their set."""
    forwarded: set[int] = set()

    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded.add(number)
        children = multiprocessing.active_children()
        if not children:  # they have yet to be started, and would not hear of it: nothing is there to be saved
            raise SystemExit(PREEMPTED_EXIT_CODE)
        for child in children:
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    former = {number: signal.signal(number, forward) for number in signals}
    try:
        yield forwarded
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class PreemptionNotice:
    """Notice `signals` and the end of the job's time, and let all ranks agree on the step at which to stop.

    The same signal some seconds later, or SIGINT after any, stops at once: a scheduler's warning may be followed by
    SIGTERM while the run is being saved. A context manager; outside the main thread it notices no signal.
    `deadline`: when to stop unasked, in seconds since 1970.
    """

    def __init__(
        self,
        session: Session,
        *,
        signals: Sequence[signal.Signals] = STOP_SIGNALS,
        deadline: float | None = None,
    ) -> None:
        self.session = session
        self.signals = signals
        self.deadline = deadline
        self.given = False
        self._heard: dict[int, float] = {}
        self._former: dict[int, Any] = {}
        self._flag: Tensor | None = None
        self._work: Any = None

    def __enter__(self) -> "PreemptionNotice":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._on_signal) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._work is not None and sys.exc_info()[0] is None:
            self._work.wait()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        before = self._heard.values() if number == signal.SIGINT else filter(None, [self._heard.get(number)])
        if any(now - then > _ONE_REQUEST_S for then in before):
            raise KeyboardInterrupt
        self._heard.setdefault(number, now)
        if not self.given:
            self._give(signal.Signals(number).name, "; once more to leave at once")

    def _give(self, reason: str, more: str = "") -> None:
        self.given = True
        if self.session.is_main:
            print(f"{reason}: saving after this step, then leaving{more}", file=sys.stderr)

    def agreed(self) -> bool:
        """Say whether any rank had notice by its last call; every rank gets the same answer, none waits for long.

        The reduction asked for at one step is read at the next, when it has long arrived.
        """
        if self.deadline is not None and time.time() >= self.deadline and not self.given:
            self._give("the job's time is nearly up")
        if self.session.world_size == 1:
            return self.given
        if self._work is not None:
            self._work.wait()
        answer = self._flag is not None and bool(self._flag.item())
        self._flag = torch.tensor(float(self.given))
        self._work = dist.all_reduce(self._flag, async_op=True)
        return answer


class _SumOverGroup(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        result = tensor.clone()
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sync_batch_norm(model: nn.Module, session: Session, group_size: int) -> None:
    """Make every BatchNorm of `model` take its batch statistics over groups of `group_size` ranks, in place.

    `group_size` 0 or 1 changes nothing. Raises ValueError where it does not divide the number of ranks.
    The modules must offer `reduce_statistics`, as `models.layers.BatchNorm2d` does.
    """
    if group_size <= 1 or session.world_size == 1:
        return
    if session.world_size % group_size:
        raise ValueError(
            f"sync_bn={group_size} does not divide the {session.world_size} ranks: choose a divisor, "
            "or sync_bn=all; a run that goes on may change it"
        )
    group, _ = dist.new_subgroups(group_size)

    def total(tensor: Tensor) -> Tensor:
        return _SumOverGroup.apply(tensor, group)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reduce_statistics = total  # type: ignore[assignment]
