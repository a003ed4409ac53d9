"""`effnet-train`: train one model as its configuration says, or go on where it stopped."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from effnet_train import slurm
from effnet_train.cli.app import PassingError, command, run_rank
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE

if TYPE_CHECKING:
    from effnet_train.distributed import PreemptionNotice, Session
    from effnet_train.engine.faults import RollBackError


def task(cfg: DictConfig) -> None:
    """Plan, or claim the run's folder and train in as many processes as there are ranks."""
    from effnet_train.cli import check

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.TRAIN)  # before torch is imported: what is wrong is told within a second
    from effnet_train import distributed
    from effnet_train.cli import build, objective, pseudo, run_folder

    build.check_start(cfg)
    objective.check_objective(cfg)
    pseudo.check_pseudo(cfg)
    _check_cluster()
    signals = [signal.Signals[name] for name in cfg.stop_signals]
    folder = run_folder.run_folder(cfg)
    device = distributed.resolve_device(cfg.device)
    if cfg.dry_run:
        from effnet_train.cli.plan import describe

        print(describe(cfg, folder, device))
        return
    ranks = distributed.resolve_ranks(cfg.ranks, device)
    if distributed.launched() and cfg.max_restarts:
        raise ValueError(
            f"max_restarts={cfg.max_restarts} is for ranks that this command starts, and a launcher has started this "
            "one: torchrun --max-restarts=N, or have SLURM requeue the job"
        )
    try:
        if distributed.launched() or (ranks == 1 and not cfg.max_restarts):
            train_rank(config, str(folder), device)
        else:
            build.check_batch(cfg, ranks)  # here already, so that it is said once
            rank = (run_rank, "train", train_rank, config, str(folder), device)
            distributed.launch(*rank, ranks=ranks, signals=signals, max_restarts=cfg.max_restarts)
    except SystemExit as stop:
        if stop.code == PREEMPTED_EXIT_CODE:
            _requeue()
        raise


def _check_cluster() -> None:
    """Raise ValueError where a cluster was chosen for a single run, which Hydra would start here in silence."""
    hydra_cfg = HydraConfig.get()
    cluster = hydra_cfg.runtime.choices.get("cluster", "local")
    if cluster != "local" and hydra_cfg.mode != RunMode.MULTIRUN:
        raise ValueError(f"cluster={cluster} submits sweeps: add -m (of one run, too), or leave cluster= away")


def _requeue() -> None:
    """Have submitit requeue its job, if this process is one, by the signal that it knows, which was ours till now."""
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or not callable(signal.getsignal(number)):
        return
    # SLURM would requeue a job that somebody has just cancelled.
    if not slurm.is_cancelled(os.environ):
        signal.raise_signal(number)


def train_rank(config: dict[str, Any], folder: str, device: str) -> None:
    """Train as one rank. Raises SystemExit(75) where a signal stopped it, with everything saved."""
    from effnet_train.cli.lock import locked
    from effnet_train.distributed import PreemptionNotice, open_session
    from effnet_train.engine.faults import RollBackError

    cfg = OmegaConf.create(config)
    signals = [signal.Signals[name] for name in cfg.stop_signals]
    with (
        # Twice: what hangs is to be found by the watchdog, which knows more.
        open_session(device, cfg.timeout_s and 2 * cfg.timeout_s) as session,
        PreemptionNotice(session, signals=signals) as notice,
        locked(Path(folder), session, cfg.checkpoint.remote),
    ):
        end = session.broadcast(slurm.end_time(os.environ) if session.is_main else None)
        notice.deadline = slurm.stop_time(end, cfg.stop_before_end_s, time.time())
        done, fault = False, None
        while True:
            try:
                done = _train_from_checkpoint(cfg, Path(folder), session, notice, fault)
                break
            except RollBackError as error:
                # Without its traceback, which holds on to the network and all else that is about to be built anew.
                fault = error.with_traceback(None)
    if not done:
        raise SystemExit(PREEMPTED_EXIT_CODE)


def _train_from_checkpoint(
    cfg: DictConfig, folder: Path, session: "Session", notice: "PreemptionNotice", fault: "RollBackError | None"
) -> bool:
    """Train to the end, and say whether it was reached. Raises RollBackError where this is to be called again."""
    from effnet_train.cli.rank import prepare
    from effnet_train.data.remote import RemoteError
    from effnet_train.engine.evaluate import Interrupted
    from effnet_train.engine.loggers import tell
    from effnet_train.engine.train import train
    from effnet_train.engine.watchdog import Watchdog

    run, finish = prepare(cfg, folder, session, fault)

    def stopped() -> bool:
        watchdog.beat()
        return notice.agreed()

    done = False
    try:
        with Watchdog(session, cfg.timeout_s) as watchdog, suppress(Interrupted):
            if train(run, notice, watchdog):
                finish(stopped)
                done = True
    except (OSError, RuntimeError, MemoryError, RemoteError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # of a GPU, whose memory will be as small the next time
            raise
        raise PassingError from error
    finally:
        run.checkpoints.close()
        tell(run.loggers, lambda logger: logger.close())
    if not done and session.is_main:
        print(f"stopped at step {run.state.step:,}, saved in {folder}: the same command goes on", file=sys.stderr)
    return done


main = command("train", task)

if __name__ == "__main__":
    main()
