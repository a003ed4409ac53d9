"""`effnet-eval`: top-1, top-5, loss and speed of a checkpoint on a data set."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import command, run_rank


def task(cfg: DictConfig) -> None:
    """Score the checkpoint in as many processes as there are ranks."""
    from effnet_train import distributed
    from effnet_train.cli import check

    wrong = [text for text in HydraConfig.get().overrides.task if "data.preprocess" in text.partition("=")[0]]
    if wrong:
        raise ValueError(
            f"{wrong[0]}: the checkpoint's own preprocessing is used, whatever the data set says; "
            "resolution=... is what can be changed"
        )
    # The data set's preprocessing refers to a model's configuration, which there is none of here.
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    config["data"].pop("preprocess", None)
    config = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    check.check_config(config, check.EVAL)
    device = distributed.resolve_device(cfg.device)
    ranks = distributed.resolve_ranks(cfg.ranks, device)
    if distributed.launched() or ranks == 1:
        evaluate_rank(config, device)
    else:
        distributed.launch(run_rank, "eval", evaluate_rank, config, device, ranks=ranks)


def evaluate_rank(config: dict[str, Any], device: str) -> None:
    """Score as one rank; rank 0 prints the table and the JSON line."""
    from effnet_train.cli import build
    from effnet_train.data.loader import eval_batches
    from effnet_train.distributed import open_session
    from effnet_train.engine.evaluate import evaluate

    file = _file(config)
    _check_request(config, file)
    with open_session(device) as session:
        weights = build.read_weights(
            str(file or config["checkpoint"]), session, which=config["weights"], source=config["source"]
        )
        meta = weights.meta
        build.check_targets(dict(meta), str(file or config["checkpoint"]))
        data = build.build_data(OmegaConf.create(_data_config(config, meta)), session)
        check_classes(data.classes, meta["classes"], by_name=config["check_classes"])
        model = build.build_model(meta["model"], len(meta["classes"]))
        build.load_into(model, weights, config["checkpoint"])
        model = build.place(model, session.device)
        source = _split(data, config["split"])
        batches = eval_batches(
            source,
            data,
            batch_size=config["batch_size"],
            rank=session.rank,
            world_size=session.world_size,
            workers=build.resolve_workers(config["workers"], session.device),
            pin=session.device.type == "cuda",
        )
        metrics = evaluate(
            {"model": model},
            batches,
            num_images=len(source),
            preprocess=data.preprocess,
            precision=build.resolve_precision(config["precision"], session.device),
            session=session,
        )["model"]
        if session.is_main:
            report(file, config, metrics, data.preprocess.resolution, meta)


def _file(config: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint's file, or None where it is given by the name of published weights."""
    from effnet_train.engine.checkpoint import find_checkpoint
    from effnet_train.models.published import is_name

    return None if is_name(config["checkpoint"]) else find_checkpoint(Path(config["checkpoint"]))


def _check_request(config: Mapping[str, Any], file: Path | None) -> None:
    """Check, before the work, what would only be noticed after it. Raises ValueError."""
    if file is not None and file.suffix == ".safetensors" and config["weights"] == "raw":
        raise ValueError(f"weights=raw: {file} holds the selected weights only; give the run's best.pt or step_*.pt")
    if config["output"] and not Path(config["output"]).absolute().parent.is_dir():
        raise ValueError(f"output={config['output']}: its folder does not exist, make it first")


def _data_config(config: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data set asked for, or the checkpoint's own, with the checkpoint's preprocessing."""
    from effnet_train.data.preprocess import Preprocess

    chosen = config["data"]
    if "_target_" not in chosen:
        if not meta["data"]:
            raise ValueError(
                f"checkpoint={config['checkpoint']} carries no data set: choose one, as data=imagenet data.root=/path"
            )
        chosen = {**meta["data"], **{key: value for key, value in chosen.items() if value is not None}}
    elif not Path(chosen["root"]).is_dir() and all(
        chosen.get(k) == meta["data"].get(k) for k in ("_target_", "dataset")
    ):
        chosen = {**chosen, "root": meta["data"]["root"]}  # the same data set, where the checkpoint's run had it
    preprocess = Preprocess(**meta["preprocess"])
    if config["resolution"] is not None:
        preprocess = preprocess.at(config["resolution"])
    target = {"_target_": "effnet_train.data.preprocess.Preprocess"}
    return {**chosen, "preprocess": {**target, **preprocess.to_dict()}}


def check_classes(found: tuple[str, ...], expected: list[str], *, by_name: bool) -> None:
    """Check that a data set's classes are those the weights were trained for. Raises ValueError."""
    if len(found) != len(expected):
        raise ValueError(
            f"the data set has {len(found)} classes, the checkpoint {len(expected)}: choose the data it was trained on"
        )
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    if wrong and by_name:
        place, here, there = wrong[0]
        raise ValueError(
            f"{len(wrong)} classes are named differently: class {place} is {here!r} in the data set and {there!r} in "
            "the checkpoint; if only the names differ and the order is the same, set check_classes=false"
        )


def _split(data: Any, split: str) -> Any:
    held_out = data.test is not None
    splits = {"train": data.train, "val": data.test if held_out else data.val}
    if held_out:
        splits["held_out"] = data.val
    if split not in splits:
        raise ValueError(f"split={split} is not there: choose {' or '.join(splits)} (held_out needs data.minival)")
    return splits[split]


def report(
    file: Path | None, config: Mapping[str, Any], metrics: Any, resolution: int, meta: Mapping[str, Any]
) -> None:
    """Print a table for people and a JSON line for programs; write the line to the output file."""
    from dataclasses import asdict

    from effnet_train.engine.checkpoint import write_atomically

    step = int(meta.get("step", 0))
    exported = file is not None and file.suffix == ".safetensors"
    which = meta.get("source") or ("selected" if exported else config["weights"])
    record = {
        "checkpoint": str(file or config["checkpoint"]),
        "weights": which,
        "split": config["split"],
        "step": step,
        "resolution": resolution,
        **asdict(metrics),
    }
    whose = f"weights of {which}" if "source" in meta else f"{which} weights of step {step:,}"
    print(f"{record['checkpoint']} ({whose}), {config['split']} at {resolution} pixels")
    print(f"  top-1     {metrics.top1:8.2%}")
    print(f"  top-5     {metrics.top5:8.2%}")
    print(f"  loss      {metrics.loss:8.4f}")
    print(f"  images    {metrics.images:8,d}" + (f"   ({metrics.skipped:,} skipped)" if metrics.skipped else ""))
    print(f"  images/s  {metrics.images_per_s:8,.0f}")
    line = json.dumps(record)
    print(line)
    beside = None if file is None else file.parent / "eval.json"  # but not into a cache, where names lead
    output = Path(config["output"]) if config["output"] else beside
    if output is None:
        return
    try:
        write_atomically(output, lambda stream: _write(stream, line + "\n"))
    except OSError as error:
        if config["output"]:
            raise
        # Published weights often lie where one may only read.
        print(f"warning: not written to {output} ({error.strerror}): give output=...", file=sys.stderr)


def _write(stream: Any, text: str) -> None:
    stream.write(text.encode())


main = command("eval", task)

if __name__ == "__main__":
    main()
