"""`effnet-bench train`, `eval`, `latency` and `startup`: how fast all of it is, beside timm and torchvision."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.outputs import results_file, write_results

if TYPE_CHECKING:  # the command's help comes without torch
    from effnet_train.analysis.elsewhere import Elsewhere
    from effnet_train.analysis.roofline import Device
    from effnet_train.analysis.throughput import Case

_REFERENCE = "timm"
_VARIANTS = {"cuda": ["b0", "b4", "b6"], "cpu": ["b0"]}


def train(cfg: DictConfig) -> None:
    """Measure whole optimizer steps beside timm and torchvision: images a second, memory, distance from the floor."""
    _compare(cfg, training=True)


def evaluate(cfg: DictConfig) -> None:
    """Measure evaluation of batches beside timm and torchvision: images a second, memory, distance from the floor."""
    _compare(cfg, training=False)


def latency(cfg: DictConfig) -> None:
    """Measure how long one image takes, in one thread, beside timm and torchvision."""
    _compare(cfg, training=False)


def startup(cfg: DictConfig) -> None:
    """Measure how long the commands take to start: help, an error of the configuration, debug=tiny."""
    from effnet_train.analysis import data_speed
    from effnet_train.analysis import startup as starting
    from effnet_train.cli import check

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.BENCH_STARTUP)
    file = results_file(config["output"])
    found = starting.measure(config["rounds"])
    for name, row in found.items():
        print(f"{name:16} {row['seconds']:6.2f} s   (wanted: under {row['limit_s']:g} s)")
    write_results(file, {"machine": data_speed.machine(), "startup": found})


def _compare(cfg: DictConfig, *, training: bool) -> None:
    """Measure all that is asked for, a variant at a time, and print its table."""
    import torch

    from effnet_train.analysis import data_speed, roofline
    from effnet_train.analysis.elsewhere import Elsewhere
    from effnet_train.cli import build, check
    from effnet_train.distributed import resolve_device

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.BENCH_TRAIN if training else check.BENCH_SPEED)
    _check_lists(config)
    device = resolve_device(config["device"])
    place = torch.device(device)
    precision = build.resolve_precision(config["precision"], place)
    build.set_threads(config["threads"])
    build.set_arithmetic(precision, False, place)
    cases = _cases(config, training, device, precision)
    file = results_file(config["output"])
    capacity = roofline.measure_device(device, precision)
    torch.cuda.empty_cache()  # a gigabyte, which the contenders may need; does nothing on a CPU
    result: dict[str, Any] = {
        "machine": {**data_speed.machine(), "gpu": torch.cuda.get_device_name() if device == "cuda" else None},
        "device": {"kind": device, "threads": torch.get_num_threads(), **vars(capacity)},
        "job": "train" if training else "eval",
        "rows": [],
    }
    print(f"copies {capacity.bytes_per_s / 1e9:,.1f} GB/s, products {capacity.flops_per_s / 1e12:,.2f} TFLOP/s")
    set_up = partial(_set_up, config["threads"], precision, device)
    wait = config["wait_s"]
    works = {name: {case.name: Elsewhere(case, set_up, wait) for case in measured} for name, measured in cases.items()}
    everyone = [work for contenders in works.values() for work in contenders.values()]
    try:
        for name, measured in cases.items():
            rows = _rows(measured, works[name], everyone, config, capacity)
            result["rows"] += rows
            if rows:
                print(_table(name, rows), flush=True)
            write_results(file, result)  # what follows may fail, or find no time
            if config["kinds"]:
                _add_kinds(rows, works[name])
                write_results(file, result)
            for work in works[name].values():
                work.close()
    finally:
        for work in everyone:
            work.close()


def _check_lists(config: Mapping[str, Any]) -> None:
    """Raise ValueError for an empty list, a name that is none or there twice, and a duration that is none."""
    from effnet_train.analysis.throughput import LIBRARIES, MODES, OWN_MODES
    from effnet_train.cli import build

    own_modes = (*MODES, *OWN_MODES)
    known = {"models": build.model_variants(), "libraries": LIBRARIES, "modes": MODES, "own_modes": own_modes}
    for key, names in known.items():
        given = config.get(key)
        if given is None:
            continue
        if not given:
            raise ValueError(f"{key}=[] names none: choose among {', '.join(names)}")
        if len(set(given)) < len(given):
            raise ValueError(f"{key}=[{','.join(map(str, given))}] names one twice: name each once")
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
                hint = f"did you mean {' or '.join(close)}? " if close else ""
                raise ValueError(f"{key} has {name}, which is not known: {hint}The choices are {', '.join(names)}")
    if config["seconds"] <= 0:
        raise ValueError(f"seconds={config['seconds']} must be more than 0")


def _cases(config: Mapping[str, Any], training: bool, device: str, precision: str) -> dict[str, list["Case"]]:
    """Return what is to be measured of each variant. Raises ValueError for one that is no EfficientNet."""
    from effnet_train.analysis.complexity import complexity
    from effnet_train.analysis.throughput import MODES, OWN_MODES, Case, default_batch_size, has
    from effnet_train.cli import build

    on_gpu = device == "cuda"
    modes = config["modes"] or (MODES if on_gpu else MODES[:1])
    own_modes = config.get("own_modes") or (*modes, *(OWN_MODES if training and on_gpu else ()))
    fused = [mode for mode in own_modes if mode in OWN_MODES]
    if fused and not on_gpu:
        raise ValueError(f"own_modes has {fused[0]}, which is training on a GPU: leave it away, or give device=cuda")
    variants = build.model_variants()
    cases: dict[str, list[Case]] = {}
    for name in config["models"] or _VARIANTS[device]:
        arguments = dict(variants[name])
        if not arguments.pop("_target_").endswith(".EfficientNet"):
            raise ValueError(
                f"models has {name}, which is no EfficientNet: the other libraries' networks are only these"
            )
        model = build.without_weights(variants[name], 1000)
        size = config["resolution"] or arguments["resolution"]
        batch_size = config["batch_size"] or default_batch_size(complexity(model, size).activations, device)
        cases[name] = [
            Case(
                library=library,
                variant=name,
                config=arguments,
                training=training,
                resolution=size,
                batch_size=batch_size,
                precision=precision,
                mode=mode,
                device=device,
            )
            for library in config["libraries"]
            for mode in (own_modes if library == "ours" else modes)
            if has(library, name)
        ]
        if not cases[name]:
            raise ValueError(f"no library of libraries=[{','.join(config['libraries'])}] has {name}: add ours")
    return cases


def _rows(
    cases: Sequence["Case"],
    works: Mapping[str, "Elsewhere"],
    everyone: Sequence["Elsewhere"],
    config: Mapping[str, Any],
    capacity: "Device",
) -> list[dict[str, Any]]:
    """Measure the cases of one variant in turn, while `everyone` else rests, and return a row of each."""
    from statistics import median

    import torch

    from effnet_train.analysis import elsewhere, roofline, throughput
    from effnet_train.models.efficientnet import EfficientNet

    first = cases[0]
    times = throughput.interleaved(
        works,
        rounds=config["rounds"],
        seconds=config["seconds"],
        told=_told,
        quiet=partial(elsewhere.rest, everyone),
    )
    if not times:
        return []
    reference = _REFERENCE if _REFERENCE in times else next(iter(times))
    faster = throughput.ratios(times, reference)
    with torch.device("meta"):
        model = EfficientNet(**first.config)
    width = 4 if first.precision in ("fp32", "tf32") else 2
    least = roofline.floor(
        model, first.resolution, first.batch_size, training=first.training, number_bytes=width, device=capacity
    )
    rows = []
    for case in cases:
        if case.name not in times:
            continue
        seconds = median(times[case.name])
        row = {
            "variant": case.variant,
            "name": case.name,
            "path": works[case.name].path,
            **{key: getattr(case, key) for key in ("resolution", "batch_size", "precision")},
            "ms": round(1000 * seconds, 3),
            "images_per_s": round(case.batch_size / seconds, 2),
            "ratio": round(faster[case.name], 3),
            "reference": reference,
            "peak_mib": round(works[case.name].peak / 2**20, 1) if config["memory"] else None,
            "floor": {"flops": least.flops, "bytes": least.bytes, "ms": round(1000 * least.seconds, 3)},
            "times_floor": round(seconds / least.seconds, 2),
            "kinds": None,
            "runs_ms": [round(1000 * value, 3) for value in times[case.name]],
        }
        rows.append(row)
    return rows


def _add_kinds(rows: Sequence[dict[str, Any]], works: Mapping[str, "Elsewhere"]) -> None:
    """Measure where the time of each goes, print it, and put it into its row."""
    for row in rows:
        if row["name"].endswith(", graph"):  # which hides what layer started a kernel
            continue
        row["kinds"] = works[row["name"]].kinds()
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row["kinds"].items() if share >= 0.01)
        print(f"  {row['name']}: {shares}", flush=True)


def _set_up(threads: Any, precision: str, device: str) -> None:
    """Have a process compute as this one does."""
    import torch

    from effnet_train.cli import build

    build.set_threads(threads)
    build.set_arithmetic(precision, False, torch.device(device))


def _told(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:60}", end="", file=sys.stderr, flush=True)


def _table(variant: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the measurements of one variant for reading."""
    first = rows[0]
    title = f"{variant} at {first['resolution']}, batch {first['batch_size']}, {first['precision']}"
    lines = [f"{title:34} {'ms':>9} {'images/s':>9} {'x ' + first['reference']:>8} {'MiB':>8} {'x floor':>8}"]
    for row in rows:
        path = f" ({row['path']})" if row["path"] != "plain" else ""
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        lines.append(
            f"  {row['name'] + path:32} {row['ms']:9,.2f} {row['images_per_s']:9,.1f} {row['ratio']:8.2f} "
            f"{memory:>8} {row['times_floor']:8.1f}"
        )
    floor = first["floor"]
    lines.append(
        f"  {'floor':32} {floor['ms']:9,.2f}   {floor['flops'] / 1e9:,.1f} GFLOP, {floor['bytes'] / 1e6:,.1f} MB"
    )
    return "\n".join(lines)
