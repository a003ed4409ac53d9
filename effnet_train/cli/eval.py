"""`effnet-eval`: scores, calibration and speed of a checkpoint, or of several averaged, on a data set."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import command, run_rank
from effnet_train.cli.checkpoint_data import data_config, without_preprocess
from effnet_train.cli.eval_sweep import attack_line, check_sweep, is_sweep, report_sweep, sizes_of

if TYPE_CHECKING:  # the commands' help comes without torch
    from torch import nn

    from effnet_train.data.datasets import Data
    from effnet_train.data.preprocess import Preprocess
    from effnet_train.data.sources import Source
    from effnet_train.distributed import Session
    from effnet_train.engine.evaluate import Member
    from effnet_train.engine.scores import Measure, Metrics

Config = Mapping[str, Any]


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
    config = without_preprocess(cfg)
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
    from effnet_train.data.classes import match_classes
    from effnet_train.distributed import open_session
    from effnet_train.engine.evaluate import evaluate_members

    asked = _asked(config)
    _check_request(config, asked)
    with open_session(device) as session:
        precision = build.resolve_precision(config["precision"], session.device)
        build.set_arithmetic(precision, False, session.device)
        parts = [_load(config, part, session, precision) for part in asked]
        first = parts[0]
        _check_same_classes(parts)
        data = build.build_data(
            OmegaConf.create(data_config(config["data"], first.label, first.meta, first.preprocess)), session
        )
        scored = match_classes(data.classes, first.classes, config["classes"])
        source = _split(data, config["split"])

        def score(parts: Sequence[Part]) -> "Mapping[str, Metrics]":
            return evaluate_members(
                [_member(config, part, scored=scored, data=data, source=source, session=session) for part in parts],
                num_images=len(source),
                precision=precision,
                session=session,
                flip=config["flip"],
                measure=_measure(config, source, scored, per_class=data.per_class),
            )

        if is_sweep(config, len(parts)):
            found = {size: _last(score([first.at(size)])) for size in config["resolution"]}
            if session.is_main:
                _write_record(config, [first], report_sweep(config, first, found))
            return
        results = score(parts)
        if session.is_main:
            report(config, parts, results)
            if config["details"] is not None:
                by_number = config["classes"] == "index"
                names = [first.classes[place] for place in scored] if by_number else data.classes
                _write_details(Path(config["details"]), _last(results), names)


@dataclass(frozen=True)
class Asked:
    """A checkpoint asked for: its file, or where published weights are given by name, none; and whose they are.

    `resolution` None is its own.
    """

    label: str
    file: Path | None
    source: str | None
    resolution: int | None


@dataclass(frozen=True)
class Part:
    """A checkpoint's network, what travels with it, which weights these are, and the preprocessing to score it by.

    `network` tells what was made of the network: one of those of `models.folding`.
    """

    label: str
    file: Path | None
    model: "nn.Module"
    meta: Mapping[str, Any]
    which: str
    preprocess: "Preprocess"
    network: str

    @property
    def member(self) -> str:
        """Return what tells it from the other members of an average."""
        return f"{self.label} at {self.preprocess.resolution} pixels"

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes it was trained for."""
        return list(self.meta["classes"])

    @property
    def step(self) -> int:
        """Return the step of the run that they are of; published weights have none."""
        return int(self.meta.get("step", 0))

    @property
    def whose(self) -> str:
        """Say where the weights are from."""
        published = "source" in self.meta
        return f"weights of {self.which}" if published else f"{self.which} weights of step {self.step:,}"

    def at(self, resolution: int) -> "Part":
        """Return the same, scored at another resolution."""
        return replace(self, preprocess=self.preprocess.at(resolution))


def _asked(config: Config) -> list[Asked]:
    """Return the checkpoints asked for, one or several. Raises ValueError."""
    from effnet_train.engine.checkpoint import find_checkpoint
    from effnet_train.models.published import is_name

    names = _listed(config["checkpoint"])
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"checkpoint={names} must be a file, a folder or a name, or several of them as [a,b]")
    sources = config["source"] if isinstance(config["source"], list) else [config["source"]] * len(names)
    if len(sources) != len(names) or not all(isinstance(source, str | None) for source in sources):
        raise ValueError(f"source={sources} must be one text or null for each of the {len(names)} checkpoints")
    files = [None if is_name(name) else find_checkpoint(Path(name)) for name in names]
    parts = zip(names, files, sources, sizes_of(config, len(names)), strict=True)
    asked = [Asked(str(file or name), file, source, size) for name, file, source, size in parts]
    places = [(part.label, part.resolution) for part in asked]
    twice = [label for label, size in places if places.count((label, size)) > 1]
    if twice:
        raise ValueError(
            f"checkpoint= names {twice[0]} twice: an average is of different weights, or of one's at several sizes, as "
            "checkpoint=[a,a] resolution=[224,288]"
        )
    return asked


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_request(config: Config, asked: Sequence[Asked]) -> None:
    """Check, before the work, what would only be noticed after it. Raises ValueError."""
    for part in asked:
        if part.file is not None and part.file.suffix == ".safetensors" and config["weights"] == "raw":
            raise ValueError(
                f"weights=raw: {part.file} holds the selected weights only; give the run's best.pt or step_*.pt"
            )
    for key in ("output", "details"):
        if config[key] and not Path(config[key]).absolute().parent.is_dir():
            raise ValueError(f"{key}={config[key]}: its folder does not exist, make it first")
    if config["details"] is not None:
        from effnet_train.analysis.details import new_figure

        if Path(config["details"]).exists() and not Path(config["details"]).is_dir():
            raise ValueError(f"details={config['details']} is a file: give a folder, which is made where it is absent")
        new_figure(1, 1)  # without matplotlib, say so now
    if config["attack"]["epsilon"] and (len(asked) > 1 or config["fold"] is True):
        other = "checkpoint= of several" if len(asked) > 1 else "fold=true, which has no gradients"
        raise ValueError(f"attack.epsilon={config['attack']['epsilon']} does not go with {other}")
    check_sweep(config, len(asked))
    if config["real_labels"] is not None and config["classes"] == "subset":
        raise ValueError("real_labels= are of all classes of ImageNet: they do not go with classes=subset")


def _load(config: Config, asked: Asked, session: "Session", precision: str) -> Part:
    """Read a checkpoint, and its preprocessing at the resolution asked for."""
    from effnet_train.cli import build
    from effnet_train.data.preprocess import Preprocess
    from effnet_train.models.folding import folded

    model, meta = build.load_model(asked.label, session, which=config["weights"], source=asked.source)
    exported = asked.file is not None and asked.file.suffix == ".safetensors"
    which = meta.get("source") or ("selected" if exported else config["weights"])
    preprocess = Preprocess(**meta["preprocess"])
    if asked.resolution is not None:
        preprocess = preprocess.at(asked.resolution)
    fold = False if config["attack"]["epsilon"] else config["fold"]
    model, network = folded(model, fold, device=session.device, precision=precision)
    return Part(asked.label, asked.file, model, meta, which, preprocess, network)


def _check_same_classes(parts: Sequence[Part]) -> None:
    first = parts[0]
    for other in parts[1:]:
        if other.classes != first.classes:
            raise ValueError(
                f"{first.label} and {other.label} were trained for other classes ({len(first.classes)} and "
                f"{len(other.classes)}, or other names): only models of the same ones can be averaged"
            )


def _split(data: "Data", split: str) -> "Source":
    held_out = data.test is not None
    splits = {"train": data.train, "val": data.test if data.test is not None else data.val}
    if held_out:
        splits["held_out"] = data.val
    splits = {name: source for name, source in splits.items() if len(source)}
    if split not in splits:
        raise ValueError(f"split={split} is not there: choose {' or '.join(splits)} (held_out needs data.minival)")
    return splits[split]


def _member(
    config: Config, part: Part, *, scored: Sequence[int], data: "Data", source: "Source", session: "Session"
) -> "Member":
    """Return a checkpoint's network, of the classes to score by, and this rank's images in its own preprocessing."""
    from effnet_train.cli import build
    from effnet_train.data.device_batches import check_device
    from effnet_train.data.loader import eval_batches
    from effnet_train.engine.adversarial import Attack, Attacker
    from effnet_train.engine.evaluate import Member, OfClasses, unchanged

    check_device(data.backend, session.device, part.preprocess)
    whole = list(scored) == list(range(len(part.classes)))
    model = part.model if whole else OfClasses(part.model, scored, session.device)
    attack = Attack(**config["attack"])
    attacker = Attacker(attack, part.preprocess, session.device) if attack.epsilon else unchanged
    workers = build.resolve_workers(config["workers"], session.device)
    if config["workers"] == "auto":  # the members decode side by side
        workers = max(1, workers // len(_listed(config["checkpoint"])))
    batches = eval_batches(
        source,
        replace(data, preprocess=part.preprocess),
        batch_size=config["batch_size"],
        rank=session.rank,
        world_size=session.world_size,
        workers=workers,
        device=session.device,
        crops=config["crops"],
    )
    return Member({part.member: model}, batches, part.preprocess, attacker)


def _measure(config: Config, source: "Source", scored: Sequence[int], *, per_class: bool) -> "Measure":
    from effnet_train.data.classes import real_labels
    from effnet_train.engine.scores import Measure

    real = None if config["real_labels"] is None else real_labels(Path(config["real_labels"]), source, scored)
    classes = len(scored)
    return Measure(
        calibration=True,
        confusion=classes if config["details"] is not None else 0,
        per_class=classes if per_class else 0,
        real=real,
    )


def report(config: Config, parts: Sequence[Part], results: Mapping[str, "Metrics"]) -> None:
    """Print a table for people and a JSON line for programs; write the line to the output file.

    `results` are those of the members, and where there are several, at the end that of their average.
    """
    from effnet_train.engine.adversarial import Attack

    members = [
        {
            "checkpoint": part.label,
            "weights": part.which,
            "step": part.step,
            "resolution": part.preprocess.resolution,
            "network": part.network,
        }
        for part in parts
    ]
    several, attacked = len(parts) > 1, Attack(**config["attack"]).record()
    record = {
        **({key: [member[key] for member in members] for key in members[0]} if several else members[0]),
        **{key: config[key] for key in ("split", "classes", "crops", "flip")},
        **({"attack": attacked} if attacked else {}),
        **_last(results).record(),
        **({"members_top1": [results[part.member].top1 for part in parts]} if several else {}),
    }
    for part in parts:
        alone = f": top-1 {results[part.member].top1:.2%}" if several else ""
        print(
            f"{part.label} ({part.whose}), {config['split']} at {part.preprocess.resolution} pixels, "
            f"{part.network}{alone}"
        )
    if attacked:
        print(attack_line(attacked))
    _print_scores(_last(results), _views(config, len(parts)))
    _write_record(config, parts, record)


def _write_record(config: Config, parts: Sequence[Part], record: Mapping[str, Any]) -> None:
    """Print the record as a JSON line, and write it to the output file."""
    from effnet_train.engine.checkpoint import write_bytes

    line = json.dumps(record)
    print(line)
    # Several checkpoints have no folder of their own; nor shall it be a cache, where names lead.
    beside = None if len(parts) > 1 or parts[0].file is None else parts[0].file.parent / "eval.json"
    output = Path(config["output"]) if config["output"] else beside
    if output is None:
        return
    try:
        write_bytes(output, line.encode() + b"\n")
    except OSError as error:
        if config["output"]:
            raise
        # Published weights often lie where one may only read.
        print(f"warning: not written to {output} ({error.strerror}): give output=...", file=sys.stderr)


def _last(results: Mapping[str, "Metrics"]) -> "Metrics":
    """Return the metrics that were asked for: of the only member, or of the average of all."""
    return list(results.values())[-1]


def _views(config: Config, members: int) -> str:
    """Say what was averaged, or nothing where nothing was."""
    parts = [f"{members} checkpoints"] * (members > 1) + [f"{config['crops']} crops"] * (config["crops"] > 1)
    return " x ".join(parts + ["the image and its mirror image"] * config["flip"])


def _print_scores(metrics: "Metrics", averaged: str) -> None:
    if averaged:
        print(f"  averaged over {averaged}")
    print(f"  top-1     {metrics.top1:8.2%}")
    print(f"  top-5     {metrics.top5:8.2%}")
    if metrics.per_class is not None:
        print(f"  per class {metrics.per_class:8.2%}   (mean of the classes' accuracies)")
    if metrics.real_top1 is not None:
        print(f"  ReaL      {metrics.real_top1:8.2%}   (of {metrics.real_images:,} images)")
    print(f"  loss      {metrics.loss:8.4f}")
    print(f"  ECE       {metrics.ece:8.4f}")
    print(f"  images    {metrics.images:8,d}" + (f"   ({metrics.skipped:,} skipped)" if metrics.skipped else ""))
    print(f"  images/s  {metrics.images_per_s:8,.0f}")


def _write_details(folder: Path, metrics: "Metrics", names: Sequence[str]) -> None:
    from effnet_train.analysis.details import write_details

    assert metrics.confusion is not None
    assert metrics.calibration is not None
    write_details(folder, metrics.confusion, metrics.calibration, names)
    print(f"details: {folder}", file=sys.stderr)


main = command("eval", task)

if __name__ == "__main__":
    main()
