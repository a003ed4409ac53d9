"""`effnet-train`: train one model as its configuration says, or go on where it stopped."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import command, run_rank


def task(cfg: DictConfig) -> None:
    """Plan, or claim the run's folder and train in as many processes as there are ranks."""
    from effnet_train import distributed
    from effnet_train.cli import build, check, run_folder

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.TRAIN)
    folder = run_folder.run_folder(cfg)
    device = distributed.resolve_device(cfg.device)
    if cfg.dry_run:
        from effnet_train.cli.plan import describe

        print(describe(cfg, folder, device))
        return
    ranks = distributed.resolve_ranks(cfg.ranks, device)
    if distributed.launched() or ranks == 1:
        train_rank(config, str(folder), device)
    else:
        build.check_batch(cfg, ranks)  # here already, so that it is said once
        distributed.launch(run_rank, "train", train_rank, config, str(folder), device, ranks=ranks)


def train_rank(config: dict[str, Any], folder: str, device: str) -> None:
    """Train as one rank. Raises SystemExit(75) where a signal stopped it, with everything saved."""
    from effnet_train.cli.rank import prepare
    from effnet_train.distributed import PREEMPTED_EXIT_CODE, PreemptionNotice, open_session
    from effnet_train.engine.loggers import tell
    from effnet_train.engine.train import train

    cfg = OmegaConf.create(config)
    with open_session(device) as session, PreemptionNotice(session) as notice:
        run, finish = prepare(cfg, Path(folder), session)
        try:
            done = train(run, notice)
            if done:
                finish()
        finally:
            tell(run.loggers, lambda logger: logger.close())
        if not done and session.is_main:
            print(f"stopped at step {run.state.step:,}, saved in {folder}: the same command goes on", file=sys.stderr)
    if not done:
        raise SystemExit(PREEMPTED_EXIT_CODE)


main = command("train", task)

if __name__ == "__main__":
    main()
