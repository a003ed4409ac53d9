"""The one loop: every recipe, paper or follow-up, trains through here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effnet_train.data.loader import Batch
from effnet_train.data.mixing import Mixing
from effnet_train.data.preprocess import Preprocess, normalize
from effnet_train.data.pseudo import hard
from effnet_train.distributed import PreemptionNotice, Session, no_sync
from effnet_train.engine.clock import Clock
from effnet_train.engine.evaluate import Interrupted, autocast
from effnet_train.engine.every import Every
from effnet_train.engine.faults import Faults, NotFiniteError, RollBackError
from effnet_train.engine.loggers import Logger, tell
from effnet_train.engine.objectives import Objective, supervised
from effnet_train.engine.saving import Checkpoints
from effnet_train.engine.scores import Metrics, hits
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.watchdog import Watchdog
from effnet_train.models.layers import frozen_statistics
from effnet_train.optim.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to train, how fast, and when to look: pure functions of the step."""

    num_images: int
    batch_size: int
    epochs: float
    schedule: Schedule
    log: Every
    evaluate: Every
    save: Every
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs} must be more than 0")

    @property
    def steps_per_epoch(self) -> float:
        """Return images over batch size: a fraction, as in the authors' schedule."""
        return self.num_images / self.batch_size

    @property
    def total_steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        whole = whole_steps(self.epochs, self.num_images, self.batch_size)
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def lr(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        return self.schedule.lr(
            step, batch_size=self.batch_size, steps_per_epoch=self.steps_per_epoch, epochs=self.epochs
        )

    def epoch(self, step: int) -> float:
        """Return how many times the training images have been read after `step` steps."""
        return step * self.batch_size / self.num_images

    def due(self, every: Every, step: int) -> bool:
        """Say whether it is time for `every` after `step` steps; the end of the run is time for everything."""
        return step == self.total_steps or every.due(step, self.batch_size, self.num_images)


def whole_steps(epochs: float, num_images: int, batch_size: int) -> int:
    """Return the number of optimizer steps of a run that is not cut short."""
    return math.ceil(Fraction(str(epochs)) * num_images / batch_size)


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """One optimizer step on one batch of this rank, in `accumulate` micro-batches."""

    network: nn.Module  # the state's model, wrapped for several ranks
    loss: nn.Module
    preprocess: Preprocess
    num_classes: int
    precision: str = "fp32"
    accumulate: int = 1
    clip_norm: float | None = None
    mixing: Mixing = field(default_factory=Mixing)
    objective: Objective = supervised
    targets: Callable[[Tensor], Tensor] = hard
    skip_bad: bool = False
    session: Session = field(default_factory=Session)

    def __call__(self, state: TrainState, batch: Sequence[Batch], lr: float) -> bool:
        """Train `state` on the equal micro-batches of `batch`; say whether it did.

        With `skip_bad`, a loss or gradient that is not finite changes nothing, on any rank, but the number of steps.
        Nothing else here waits for the device.
        """
        assert len(batch) == self.accumulate
        former = [tensor.clone() for tensor in state.summed] if self.skip_bad else []
        *first, last = batch
        with no_sync(self.network):
            for part in first:
                self._backward(state, part)
        self._backward(state, last)
        if self.skip_bad and not self._is_finite(state):
            for tensor, value in zip(state.summed, former, strict=True):
                tensor.copy_(value)
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            return False
        self.session.mean_(state.running_statistics)
        if self.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), self.clip_norm)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.ema.update(state.step)
        return True

    def _is_finite(self, state: TrainState) -> bool:
        finite = state.statistics[4].isinf()  # no step had a bad loss
        if not state.scaler.is_enabled():  # it looks for bad gradients itself, which are its way to find a scale
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            finite = finite & nn.utils.get_total_norm(gradients).isfinite()
        return bool(self.session.min_(finite.to(torch.float64)).item())

    def settle(self, state: TrainState, batch_size: int) -> None:
        """Run one backward pass on black images and forget it: then DDP has ordered its buckets before a step counts.

        It orders them anew after the first backward pass of a process. From three ranks on, a sum's last digit depends
        on that order: the first step after a resume would differ from the same step of a run that was not stopped.
        """
        if self.session.world_size == 1:
            return
        statistics = state.statistics.clone()
        count, size = batch_size // self.session.world_size // self.accumulate, self.preprocess.resolution
        numbers = torch.zeros(count, dtype=torch.int64)
        with frozen_statistics(state.model):
            self._backward(state, Batch(torch.zeros(count, size, size, 3, dtype=torch.uint8), numbers, numbers, []))
        state.optimizer.zero_grad(set_to_none=True)
        state.statistics.copy_(statistics)

    def _backward(self, state: TrainState, part: Batch) -> None:
        self.learn(state, *self.inputs(part), float(state.step + 1))
        state.statistics[3] += len(part.errors)

    def inputs(self, part: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return a micro-batch's images, targets and keys on the device."""
        device = self.session.device
        images = normalize(part.images.to(device, non_blocking=True), self.preprocess.mean, self.preprocess.std)
        labels = self.targets(part.labels).to(device, non_blocking=True)
        images, targets = self.mixing(images, labels, part.keys, self.num_classes)
        return images, targets, part.keys.to(device, non_blocking=True)

    def learn(self, state: TrainState, images: Tensor, targets: Tensor, keys: Tensor, number: float | Tensor) -> None:
        """Add a micro-batch of step `number` (the first is 1) to gradients and statistics."""
        with autocast(self.session.device, self.precision):
            loss, logits = self.objective(self.network, self.loss, images, targets, keys)
        state.scaler.scale(loss / self.accumulate).backward()
        with torch.no_grad():
            add_statistics(state.statistics, loss, logits, targets, number)


class Step(Protocol):
    """What trains on a batch: a `Stepper`, or several of them in turn."""

    def __call__(self, state: TrainState, batch: Sequence[Batch], lr: float) -> bool:
        """Train `state` on the micro-batches of this rank; say whether it did."""
        ...

    def settle(self, state: TrainState, batch_size: int) -> None:
        """Do what is to be done before the first step of a process."""
        ...


def add_statistics(statistics: Tensor, loss: Tensor, logits: Tensor, targets: Tensor, step: float | Tensor) -> None:
    """Add one micro-batch of step `step` (the first is 1) to the sums of `no_statistics`, in place.

    The host does not wait for the device.
    """
    labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
    count = torch.full_like(loss, len(labels))
    bad_step = torch.where(loss.isfinite(), torch.inf, step)
    sums = torch.stack([loss * count, hits(logits, labels, 1).to(loss.dtype), count])
    statistics[:3] += sums
    statistics[4] = torch.minimum(statistics[4], bad_step)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a training run; each was made elsewhere and knows nothing of the others."""

    state: TrainState
    plan: Plan
    step: Step
    batches: Callable[[int], Iterable[Sequence[Batch]]]  # from a step to the end, each in micro-batches
    # Asks the second argument now and then; raises Interrupted where it says yes.
    evaluate: Callable[[dict[str, nn.Module], Callable[[], bool]], dict[str, Metrics]]
    checkpoints: Checkpoints
    meta: Mapping[str, Any]  # travels with the weights: model, preprocess, classes, data
    select_by: str
    faults: Faults
    provenance: Mapping[str, Any] = field(default_factory=dict)  # code, packages and machine, kept beside the state
    loggers: Sequence[Logger] = ()
    session: Session = field(default_factory=Session)


def train(run: Run, notice: PreemptionNotice, watchdog: Watchdog) -> bool:
    """Train from the state's step to the last; return False where a signal asked to stop before, with all saved.

    Raises NotFiniteError, on every rank, where the loss or a weight stops being finite; RollBackError, to go back.
    """
    state, plan = run.state, run.plan
    clock = Clock()

    def agreed() -> bool:
        watchdog.beat(started=clock.steps > 0)
        return notice.agreed()

    stopped = _look(run, clock, agreed)  # an evaluation that the end of the last process cut off
    batches: Iterable[Sequence[Batch]] = ()
    if state.step < plan.total_steps and not stopped:
        run.step.settle(state, plan.batch_size)
        batches = run.batches(state.step)
        clock.start()
    for batch in batches:
        clock.got_data()
        if state.step == 0 and run.loggers:
            _log_images(run, batch[0])
        if not run.step(state, batch, plan.lr(state.step)):
            run.faults.skipped(state.step)
        clock.did_step(sum(len(part.labels) for part in batch) * run.session.world_size)
        stopped = _look(run, clock, agreed)
        if stopped:
            break
    _settle(run)
    # An evaluation that a signal put off is still to be done.
    return state.step == plan.total_steps and not (stopped and state.evaluated < state.step)


def _look(run: Run, clock: Clock, agreed: Callable[[], bool]) -> bool:
    """Log, save and evaluate, where it is time; return whether ranks have `agreed` to stop, with all saved.

    A save that is due comes before the evaluation, which may crash or be killed, and again with its scores; the next
    start makes up an evaluation that was cut off. After a resume nothing is new but such a one.
    """
    state, plan = run.state, run.plan
    stopped, trained = agreed(), clock.steps > 0
    if clock.images and plan.due(plan.log, state.step):
        _log_training(run, clock)
    end = state.step == plan.total_steps
    saved = trained and (stopped or plan.due(plan.save, state.step) or _is_milestone(run))
    if saved:
        _save(run, must=stopped or end)
    # A signal leaves little time: the evaluation that is due is then made on resuming.
    if not stopped and state.evaluated < state.step and plan.due(plan.evaluate, state.step):
        try:
            best_before = _evaluate(run, agreed)
        except Interrupted:
            stopped = True
            _settle(run)
            if trained and not run.session.broadcast(run.checkpoints.written == state.step):
                _save(run, must=True)
        else:
            step = saved or not trained  # so that a checkpoint of this step knows what was found
            if step or best_before is not None:
                _save(run, step=step, best_before=best_before, must=end)
    clock.start()  # looking is not training: it does not count against images/s
    return stopped


def _is_milestone(run: Run) -> bool:
    return run.checkpoints.is_milestone(run.state.step, run.plan.batch_size, run.plan.num_images)


def _save(run: Run, *, must: bool, step: bool = True, best_before: Mapping[str, float] | None = None) -> None:
    """Hand the state to `Checkpoints.save`; it is written while training goes on."""
    _check_finite(run)
    _settle(run)
    payload = _payload(run)
    if run.session.is_main:
        run.checkpoints.save(payload, step=step, best_before=best_before, milestone=_is_milestone(run), must=must)


def _settle(run: Run) -> None:
    """Wait for the save that is under way; what is said to be the best must be there, and is so on every rank."""
    best = run.session.broadcast(run.checkpoints.settle())
    if best is not None:
        run.state.best = dict(best)


def _log_training(run: Run, clock: Clock) -> None:
    state, plan = run.state, run.plan
    total = state.statistics.clone()
    run.session.sum_(total[:4])
    run.session.min_(total[4:])
    state.statistics.copy_(no_statistics(total.device))
    loss_sum, correct, images, skipped, bad_step = total.tolist()  # waits for the device
    clock.did_wait()
    if math.isfinite(bad_step):
        raise _not_finite(run, int(bad_step), "the loss")
    values = {
        # Of steps that were all left out there is nothing to tell.
        **({"train/loss": loss_sum / images, "train/top1": correct / images} if images else {}),
        "train/lr": plan.lr(state.step - 1),
        **clock.rates(),
        **({"train/skipped": skipped} if skipped else {}),
    }
    tell(run.loggers, lambda logger: logger.scalars(state.step, values, epoch=plan.epoch(state.step)))


def _check_finite(run: Run) -> None:
    bad_step = run.session.min_(run.state.statistics[4:].clone()).item()
    if math.isfinite(bad_step):
        raise _not_finite(run, int(bad_step), "the loss")
    if not run.state.is_finite():
        raise _not_finite(run, run.state.step, "a weight")


def _not_finite(run: Run, step: int, what: str) -> NotFiniteError:
    if run.faults.may_roll_back:
        return RollBackError(f"{what} is not a finite number at step {step}", step=step, what=what)
    run.faults.record(step, what, action="stop")
    run.checkpoints.wait()
    steps = run.checkpoints.steps()
    kept = f"the last good checkpoint is {run.checkpoints.path(steps[-1])}" if steps else "there is no checkpoint yet"
    back = "" if run.faults.on_nan == "rollback" else "; or go on with on_nan=rollback"
    return NotFiniteError(
        f"{what} is not a finite number at step {step} (epoch {run.plan.epoch(step):.2f}, "
        f"lr={run.plan.lr(step - 1):.4g}); {kept}. Start a run of another name= with a lower schedule.lr_per_256, "
        f"a longer schedule.warmup_epochs, clip_norm=1, or precision=bf16 or fp32{back}",
        step=step,
        what=what,
    )


def _evaluate(run: Run, agreed: Callable[[], bool]) -> Mapping[str, float] | None:
    """Score raw and averaged weights, and log both; where they are the best, return what the best was before.

    Raises Interrupted where ranks agree to stop.
    """
    state = run.state
    _check_finite(run)
    results = run.evaluate({"val": state.model, "val_ema": state.ema.module}, agreed)
    values: dict[str, float] = {}
    for name, metrics in results.items():
        values |= metrics.scalars(name)
    state.evaluated = state.step
    tell(run.loggers, lambda logger: logger.scalars(state.step, values, epoch=run.plan.epoch(state.step)))
    _settle(run)
    former = state.best
    if not former or is_better(values[run.select_by], former[run.select_by], least=run.select_by.endswith("loss")):
        state.best = {"step": state.step, **values}
        return former
    return None


def is_better(score: float, former: float, *, least: bool) -> bool:
    """Say whether a score is better than a former one; what is not a number is worse than any that is."""
    if math.isnan(score) or math.isnan(former):
        return not math.isnan(score)
    return score < former if least else score > former


def _payload(run: Run) -> dict[str, Any]:
    return {
        "effnet_train": 1,
        "meta": dict(run.meta),
        "provenance": dict(run.provenance),
        **run.state.state_dict(run.session),
    }


def _log_images(run: Run, batch: Batch) -> None:
    pixels = batch.images[:32].cpu().numpy()
    tell(run.loggers, lambda logger: logger.images(run.state.step, "train/images", pixels))
