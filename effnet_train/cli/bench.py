"""`effnet-bench JOB ...`: measure speeds, count what networks cost. The first word says what, the rest is Hydra's."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli import speed
from effnet_train.cli.app import jobs, user_message
from effnet_train.cli.complexity import complexity
from effnet_train.cli.outputs import results_file, write_results


def main() -> None:
    """Measure what the first word names."""
    jobs("effnet-bench", "bench", "measure speeds, count what networks cost", JOBS)


def data(cfg: DictConfig) -> None:
    """Measure reading, decoding and augmenting: images per second and core, memory, waiting for the first batch."""
    import torch

    from effnet_train.analysis import data_speed
    from effnet_train.cli import check
    from effnet_train.data.backends import check_backend

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.BENCH_DATA)
    _check_values(config)
    for backend in config["backends"]:
        check_backend(backend, key="backends")
    if not Path(config["data"]["root"]).is_dir():
        raise FileNotFoundError(
            f"data.root={config['data']['root']} does not exist: set it to a folder that holds <class>/<image>"
        )
    file = results_file(config["output"])
    root, size, first = config["data"]["root"], config["batch_size"], (config["backends"] or ["pillow"])[0]
    torch.set_num_threads(1)  # speeds are those of a core
    result: dict[str, Any] = {"machine": data_speed.machine(), "root": root, "rows": []}
    measured = data_speed.contenders(config["backends"], config["shards"] or {})
    for job in config["jobs"]:
        for workers in config["workers"]:
            with _told_of_images(root):
                rows = data_speed.compare(
                    root,
                    measured,
                    train=job == "train",
                    workers=workers,
                    rounds=config["rounds"],
                    seconds=config["seconds"],
                    batch_size=size,
                )
            result["rows"] += rows
            print(_table(rows), flush=True)
    if config["index"]:
        waited = data_speed.waiting(root, backend=first, images=config["index"], batch_size=size)
        result["waiting_s"] = {"images": config["index"], **waited}
        text = "first batch of {images:,} images after {start} s; resumed at the middle after {resume} s"
        print(text.format(**result["waiting_s"]))
    if config["reads"]:
        result["memory"] = data_speed.memory(root, backend=first, reads=config["reads"], batch_size=size)
        text = "memory after a tenth of {reads:,} reads {after_a_tenth_mib} MiB, at the end {end_mib}, peak {peak_mib}"
        print(text.format(**result["memory"]))
    write_results(file, result)


def _check_values(config: Mapping[str, Any]) -> None:
    right: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("jobs", lambda job: job in ("train", "eval"), "jobs=[train,eval] or one of them"),
        ("workers", lambda count: type(count) is int and count >= 0, "whole numbers from 0 on, as workers=[0,1,2]"),
        ("backends", lambda name: isinstance(name, str), "names, as backends=[simplejpeg,pillow]"),
    )
    for key, fits, wanted in right:
        wrong = [value for value in config[key] if not fits(value)]
        if wrong:
            raise ValueError(f"{key} has {wrong[0]!r}: give {wanted}")
    for name, folder in (config["shards"] or {}).items():
        if not isinstance(folder, str):
            raise ValueError(f"shards.{name}={folder!r} must be a folder of shards")
    if config["seconds"] <= 0:
        raise ValueError(f"seconds={config['seconds']} must be more than 0")


@contextmanager
def _told_of_images(root: str) -> Iterator[None]:
    """Add to the error of an image, which may be another library's, what to do. Raises ValueError."""
    from effnet_train.data.loader import DataError

    try:
        yield
    except (OSError, DataError) as error:
        raise ValueError(
            f"{user_message(error, 'bench_data')}: mend or remove it, as all that are measured must read it; "
            f"{shlex.join(('effnet-data', 'verify', 'data=eval_folder', f'data.root={root}'))} names all such images"
        ) from error


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    title = f"{rows[0]['job']}, workers={rows[0]['workers']}"
    lines = (
        f"  {row['name']:24} {row['images_per_s']:9,.0f} {row['per_core']:9,.0f} {row['ratio']:7.2f}" for row in rows
    )
    return "\n".join([f"{title:26} {'images/s':>9} {'per core':>9} {'x timm':>7}", *lines])


JOBS = {
    "train": speed.train,
    "eval": speed.evaluate,
    "latency": speed.latency,
    "startup": speed.startup,
    "data": data,
    "complexity": complexity,
}

if __name__ == "__main__":
    main()
