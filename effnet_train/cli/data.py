"""`effnet-data JOB ...`: look after data sets. The first word says what to do, all that follows is Hydra's."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import jobs
from effnet_train.cli.outputs import check_file, check_folder, writing

_PROBLEMS_EXIT_CODE = 1
_DRAWN = (".png", ".svg", ".pdf")
# What does not make other images of a data set: where they lie, how they are read.
_ASIDE = ("root", "cache", "shard_cache", "backend", "on_error", "preprocess", "minival", "expected")


def main() -> None:
    """Run the job that the first word names."""
    jobs("effnet-data", "data", "look after data sets", JOBS)


def verify(cfg: DictConfig) -> None:
    """Read every image and say what is wrong.

    Raises SystemExit(1) where there are problems.
    """
    from effnet_train.cli import check
    from effnet_train.data.manifest import damaged
    from effnet_train.data.verify import KINDS, NOTES, report_lines
    from effnet_train.data.verify import verify as read_all

    config = _plain(cfg, resolution=1)
    check.check_config(config, check.DATA_VERIFY)
    wrong = [kind for kind in config["ignore"] if kind not in KINDS or kind in NOTES]
    if wrong:
        problems = [kind for kind in KINDS if kind not in NOTES]
        raise ValueError(f"ignore={wrong[0]} is no kind of problem: choose among {', '.join(problems)}")
    if config["report"]:
        check_file("report", Path(config["report"]))
    expected = config["data"].get("expected")
    splits = _splits(config["data"], whole=False)  # what is missing is for the report to tell
    report = read_all(
        splits, expected=expected, min_side=config["min_side"], workers=_workers(config["workers"], splits)
    )
    if damage := damaged(Path(str(config["data"].get("root", "")))):
        report["problems"] = {"damaged": damage} | report["problems"]
    for kind in config["ignore"]:
        report["notes"] |= {kind: report["problems"].pop(kind)} if kind in report["problems"] else {}
    print("\n".join(report_lines(report)))
    if config["report"]:
        _write_json("report", Path(config["report"]), report)
    if report["problems"]:
        raise SystemExit(_PROBLEMS_EXIT_CODE)


def stats(cfg: DictConfig) -> None:
    """Measure sizes, shapes and colours of the images."""
    from effnet_train.analysis.data_pictures import histograms
    from effnet_train.cli import check
    from effnet_train.data.preprocess import Preprocess
    from effnet_train.data.statistics import measure, statistics_lines

    config = _plain(cfg, resolution=cfg.resolution)
    check.check_config(config, check.DATA_STATS)
    for key, suffixes in (("output", ()), ("picture", _DRAWN)):
        if config[key]:
            check_file(key, Path(config[key]), suffixes)
    splits = _splits(config["data"])
    if config["split"] not in splits:
        raise ValueError(f"split={config['split']} has no images: choose {' or '.join(splits)}")
    source = splits[config["split"]]
    arguments = {key: value for key, value in config["data"]["preprocess"].items() if key != "_target_"}
    workers = _workers(config["workers"], {"": source})
    found, table = measure(source, Preprocess(**arguments), count=config["count"], workers=workers)
    print("\n".join(statistics_lines(found)))
    if config["output"]:
        _write_json("output", Path(config["output"]), found)
    if config["picture"]:
        with writing("picture", Path(config["picture"])):
            histograms(table, found, Path(config["picture"]))


def show(cfg: DictConfig) -> None:
    """Picture training samples as a run sees them."""
    from effnet_train.analysis.data_pictures import contact_sheet
    from effnet_train.analysis.details import readable_names
    from effnet_train.cli import build, check
    from effnet_train.cli.stages import build_stages
    from effnet_train.distributed import Session
    from effnet_train.engine.progressive import stage_at

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.DATA_SHOW)
    output = Path(config["output"])
    check_file("output", output, (".png", ".jpg", ".webp"))
    data = build.build_data(config["data"], Session())
    stages = build_stages(cfg, len(data.train))
    stage = stages[stage_at(stages, config["step"])]
    data = stage.data(data)
    images, labels = _samples(config, data, stage)
    names = readable_names(data.classes)
    size = data.preprocess.resolution
    title = (
        f"{len(data.train):,} training images of {len(data.classes):,} classes, at {size} x {size}: seed "
        f"{config['seed']}, batches of {config['batch_size']:,} from step {config['step']:,} on"
    )
    sheet = contact_sheet(images, [names[label] for label in labels], title)
    with writing("output", output):
        sheet.save(output)
    print(f"{output}: {len(images)} samples, {title}")


def _samples(config: Mapping[str, Any], data: Any, stage: Any) -> tuple[list[Any], list[int]]:
    """Return pixels and labels of the first samples that a run draws from a step on."""
    from hydra.utils import instantiate

    from effnet_train.cli.pseudo import build_reading
    from effnet_train.data.loader import train_batches
    from effnet_train.distributed import Session

    augment = stage.augment(instantiate(config["augment"], _convert_="all"))
    count, size = config["count"], config["batch_size"]
    start, stop = config["step"], config["step"] + -(-count // size)
    reading = build_reading(OmegaConf.create(dict(config)), data, Session(), None)
    order = reading.mixture.order(size, config["seed"])
    # In as small pieces as the batch falls into: no more is decoded than is shown.
    batches = train_batches(reading.data, augment, order, start=start, stop=stop, accumulate=order.batch_size)
    found = [batch for _, batch in zip(range(count), batches, strict=False)]
    targets = [reading.targets(batch.labels)[0] for batch in found]
    return [batch.images[0].numpy() for batch in found], [int(one.argmax() if one.ndim else one) for one in targets]


def prepare(cfg: DictConfig) -> None:
    """Write ImageNet's official archives as shards or folders."""
    _write(cfg)


def convert(cfg: DictConfig) -> None:
    """Write any data set as shards or folders."""
    _write(cfg)


def _write(cfg: DictConfig) -> None:
    from effnet_train.cli import check
    from effnet_train.data.pieces import Options
    from effnet_train.data.prepare import summary_lines, write

    config = _plain(cfg, resolution=1)
    check.check_config(config, check.DATA_WRITE)
    options = Options(**{field.name: config[field.name] for field in fields(Options)})
    data, output = config["data"], Path(config["output"])
    check_folder("output", output)
    with _told_when_stopped():
        splits = _splits(data, expected=data.get("expected"))
        with writing("output", output):
            output.mkdir(parents=True, exist_ok=True)
        manifest = write(
            splits,
            output,
            options,
            source={key: value for key, value in data.items() if key not in _ASIDE},
            on_error=data.get("on_error", "raise"),
            workers=_workers(config["workers"], splits),
        )
    print("\n".join(summary_lines(output, manifest)))
    print(f"{output}: {_words_to_read(options.to, output, splits)}")


def _words_to_read(to: str, output: Path, splits: Collection[str]) -> str:
    """Return what a shell takes to read what was written: of train and val, or of val alone, to evaluate on."""
    words = [f"data={to}", f"data.root={output}"]
    if "train" not in splits:
        alone = ["data=eval_folder", f"data.root={output / 'val'}"]
        words = alone if to == "folder" else [*words, "data.train=val-*.tar"]
    return shlex.join(words)


class _Stopped(BaseException):
    """Say that a signal asked to stop: no KeyboardInterrupt, after which Python may leave by SIGINT, not by our status.

    It does so where one has passed through `exec` of a text, as of a data class that a library is just making.
    """


@contextmanager
def _told_when_stopped() -> Iterator[None]:
    """Turn a request to stop into an orderly end, with a message and the exit status by which a scheduler requeues."""
    from effnet_train.distributed import STOP_SIGNALS
    from effnet_train.exit_codes import PREEMPTED_EXIT_CODE

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:  # a second one must not disturb the end
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(signal.Signals(number).name)

    former = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except _Stopped as request:
        name = Path(sys.argv[0]).name
        print(f"{name}: {request}: stopped; the same command goes on from what is written", file=sys.stderr)
        raise SystemExit(PREEMPTED_EXIT_CODE) from None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _plain(cfg: DictConfig, *, resolution: int) -> dict[str, Any]:
    """Return the plain configuration; the data set's preprocessing is for images of `resolution` pixels."""
    given: Any = OmegaConf.merge({"model": {"resolution": resolution}}, cfg)
    config: Any = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
    return {key: value for key, value in config.items() if key != "model"}


def _splits(
    data: Mapping[str, Any], *, expected: Mapping[str, int] | None = None, whole: bool = True
) -> dict[str, Any]:
    """Build the data set's train and val, whole; where `expected` is None, however many images they hold."""
    from effnet_train.cli import build
    from effnet_train.distributed import Session

    all_of_it = {"expected": expected, "minival": 0}
    given = {**data, **{key: value for key, value in all_of_it.items() if key in data}}
    built = build.build_data(given, Session(), whole=whole)
    return {name: source for name, source in (("train", built.train), ("val", built.val)) if len(source)}


def _workers(workers: int | str, splits: Mapping[str, Any]) -> int:
    """Return how many processes read: the CPUs, but none for a few images."""
    if workers != "auto":
        return int(workers)
    few = sum(map(len, splits.values())) < 200
    return 0 if few else len(os.sched_getaffinity(0))


def _write_json(key: str, path: Path, found: object) -> None:
    with writing(key, path):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


JOBS: Mapping[str, Callable[[DictConfig], None]] = {
    "verify": verify,
    "stats": stats,
    "show": show,
    "prepare": prepare,
    "convert": convert,
}

if __name__ == "__main__":
    main()
