"""`effnet-plot FIGURE ...`: the paper's figures with one's own runs, and the curves of runs."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import check_places, command, first_word
from effnet_train.cli.outputs import check_folder, make_place, writing

if TYPE_CHECKING:
    from effnet_train.analysis.figures import Point
    from effnet_train.analysis.runs import Run

_FOLDER = Path("figures")
_SUFFIXES = (".png", ".svg", ".pdf")


def main() -> None:
    """Draw the figure that the first word names."""
    about = "the paper's figures with your runs, and the curves of runs"
    name = first_word("effnet-plot", "figure", about, {name: line for name, (_, _, line) in FIGURES.items()})
    config, draw, _ = FIGURES[name]
    check_places("effnet-plot", name, sys.argv[1:], {figure: entry[0] for figure, entry in FIGURES.items()})
    command(config, partial(draw, name))()


def accuracy(name: str, cfg: DictConfig) -> None:
    """Draw Figure 1 or 5: accuracy against parameters or multiply-adds, from Table 2."""
    from effnet_train.analysis import figures
    from effnet_train.analysis.runs import over_seeds
    from effnet_train.cli import check, paper
    from effnet_train.cli.run_folder import FREE

    config, outputs = _checked(name, cfg, check.PLOT)
    key, cost, label, title = {
        "figure1": ("parameters_m", "parameters", "Parameters, millions", "Figure 1: model size and accuracy"),
        "figure5": ("multiply_adds_b", "multiply_adds", "Multiply-adds, billions", "Figure 5: FLOPS and accuracy"),
    }[name]
    rows = [row for row in paper.table(2)["rows"] if row.get(key) is not None]
    points = {row["name"]: figures.Point(_short(row["name"]), row[key], row["top1"]) for row in rows}
    ours = [point for row_name, point in points.items() if row_name.startswith("EfficientNet")]
    trained = []
    runs = paper.finished_runs(config["run_root"])
    plain = (run for run in runs if run.data.name == "ImageNet" and not run.transferred and not run.helped)
    for scores in over_seeds(plain, FREE):
        value = getattr(paper.count_run(scores.first), cost) / {"parameters": 1e6, "multiply_adds": 1e9}[cost]
        trained.append(figures.Point(scores.first.folder.name, value, scores.top1, scores.spread))
    others = [point for point in points.values() if point not in ours]
    _save(figures.accuracy_figure(ours, others, trained, label=label, title=title), outputs)


def transfer(name: str, cfg: DictConfig) -> None:
    """Draw Figure 6: accuracy against parameters on the data sets of Table 5."""
    from effnet_train.analysis import figures
    from effnet_train.analysis.runs import over_seeds
    from effnet_train.cli import check, paper
    from effnet_train.cli.run_folder import FREE

    config, outputs = _checked(name, cfg, check.PLOT)
    trained: dict[str, list[Point]] = {}
    runs = paper.finished_runs(config["run_root"])
    rows = paper.table(5)["rows"]
    names = {row["name"] for row in rows}
    tuned = (run for run in runs if run.data.name in names and run.transferred and not run.helped)
    for scores in over_seeds(tuned, FREE):
        millions = paper.count_run(scores.first).parameters / 1e6
        point = figures.Point(scores.first.folder.name, millions, scores.top1, scores.spread)
        trained.setdefault(scores.first.data.name, []).append(point)
    counted = paper.networks(rows)
    # Where the paper prints no size of an EfficientNet, it is known all the same.
    sized = [
        {"parameters_m": network.parameters / 1e6, **row} for row, network in zip(rows, counted, strict=True) if network
    ]
    _save(figures.transfer_figure(sized, trained, title="Figure 6: size and accuracy after transfer"), outputs)


def scaling(name: str, cfg: DictConfig) -> None:
    """Draw Figure 3, 4 or 8 from the runs of networks scaled from the same base."""
    from effnet_train.analysis import families, figures
    from effnet_train.cli import check, paper
    from effnet_train.cli.run_folder import FREE

    config, outputs = _checked(name, cfg, check.PLOT_SCALING)
    runs = paper.finished_runs(config["run_root"])
    base = None if config["base"] is None else Path(config["base"])
    if base and not any(run.folder.resolve() == base.resolve() for run in runs):
        raise ValueError(
            f"base={base} is no finished run below run_root={config['run_root']}: give such a run's folder"
        )
    runs = [run for run in runs if config["dataset"] in (None, run.data.name)]

    @cache
    def multiply_adds(shape: tuple[tuple[str, Any], ...], classes: int) -> int:
        return paper.count_shape(dict(shape), classes).multiply_adds

    def cost(run: "Run") -> int:
        return multiply_adds(tuple(run.shape.items()), run.data.classes)

    found, left_out = families.families(runs, cost, FREE, base)
    for run in left_out:
        print(f"note: {run.folder} is not drawn: its network is scaled from no base of such runs", file=sys.stderr)
    wanted = {"figure3": families.DIMENSIONS, "figure4": ("width",), "figure8": families.METHODS}[name]
    found = [family for family in found if any(len(family.by(method)) > 1 for method in wanted)]
    if not found:
        raise ValueError(
            f"run_root={config['run_root']} holds {len(runs)} finished runs, and among them no network beside the same "
            f"network scaled in {', '.join(wanted)}, which {name} draws. Train some, alike in all else: "
            "effnet-train -m model=b0 data=... model.depth=1,2,4 seed=0,1,2, and so with model.width, model.resolution"
        )
    _save(figures.FAMILY_FIGURES[name](found), outputs)


def maps(name: str, cfg: DictConfig) -> None:
    """Draw Figure 7: class activation maps of images under several networks."""
    from effnet_train.analysis import figures
    from effnet_train.analysis.details import readable_names
    from effnet_train.analysis.prediction import class_number, seen
    from effnet_train.cli import build, check, paper
    from effnet_train.data.preprocess import Preprocess
    from effnet_train.distributed import open_session, resolve_device

    config, outputs = _checked(name, cfg, check.PLOT_MAPS)
    for image in config["images"]:
        if not Path(image).is_file():
            raise FileNotFoundError(f"images: {image} does not exist, or is no file")
    if not config["images"]:
        raise ValueError("images=[] is empty: give the images to look at")
    checkpoints = config["checkpoints"] or paper.map_checkpoints(config["run_root"])
    named = checkpoints if isinstance(checkpoints, dict) else {path: path for path in checkpoints}
    labels = config["labels"] or [Path(label).name for label in named]
    if len(labels) != len(named):
        raise ValueError(f"labels={labels}: {len(labels)} for {len(named)} checkpoints; give each one of its own")
    columns = []
    with open_session(resolve_device(config["device"])) as session:
        for path in named.values():
            model, meta = build.load_model(path, session)
            words = readable_names(meta["classes"])
            mapped = class_number(config["cam_class"], meta["classes"], words)
            preprocess = Preprocess(**meta["preprocess"])
            columns.append([seen(model, preprocess, words, image, mapped, source=path) for image in config["images"]])
    rows = [[(columns[-1][i].pixels, Path(image).name)] for i, image in enumerate(config["images"])]
    for i, row in enumerate(rows):
        row += [(column[i].overlay, f"{column[i].word}, {column[i].probability:.0%}") for column in columns]
    _save(figures.maps_figure(["image", *labels], rows), outputs)


def curves(name: str, cfg: DictConfig) -> None:
    """Draw the curves of runs."""
    from effnet_train.analysis.plots import read_metrics, run_name, training_curve
    from effnet_train.cli import check

    config, outputs = _checked(name, cfg, check.PLOT_CURVES)
    runs = [Path(run) for run in config["runs"]]
    labels = config["labels"] or config["runs"]
    if not runs:
        raise ValueError("runs=[] is empty: give the runs' folders")
    if len(labels) != len(runs) or len(set(labels)) != len(labels):
        raise ValueError(f"labels: {len(labels)} for {len(runs)} runs; give each run one of its own, or none at all")
    rows = [read_metrics(run) for run in runs]
    title = config["title"] or (run_name(runs[0]) if len(runs) == 1 else None)
    for output in outputs:
        with writing("output", output):
            training_curve(dict(zip(labels, rows, strict=True)), output, title=title)
        print(output)


def _checked(name: str, cfg: DictConfig, types: Mapping[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """Check the configuration, and return it with the files to write."""
    from effnet_train.cli import check

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, types)
    if config["output"]:
        file = Path(config["output"])
        make_place("output", file, _SUFFIXES)
        return config, [file]
    check_folder("output", _FOLDER)
    return config, [_FOLDER / f"{name}{suffix}" for suffix in (".png", ".svg")]


def _short(name: str) -> str:
    return name.replace("EfficientNet-", "")


def _save(figure: Any, outputs: Sequence[Path]) -> None:
    from effnet_train.analysis.figures import save

    for output in outputs:
        with writing("output", output):
            save(figure, [output])
        print(output)


_Draw = Callable[[str, DictConfig], None]
FIGURES: Mapping[str, tuple[str, _Draw, str]] = {
    "figure1": ("plot", accuracy, "ImageNet accuracy against parameters"),
    "figure3": ("plot_scaling", scaling, "width, depth and resolution scaled by themselves (of runs)"),
    "figure4": ("plot_scaling", scaling, "width scaled under several depths and resolutions (of runs)"),
    "figure5": ("plot", accuracy, "ImageNet accuracy against multiply-adds"),
    "figure6": ("plot", transfer, "accuracy against parameters on eight data sets"),
    "figure7": ("plot_figure7", maps, "class activation maps of scaled networks"),
    "figure8": ("plot_scaling", scaling, "the methods of scaling compared (of runs)"),
    "curves": ("plot_curves", curves, "loss, accuracy and learning rate of runs"),
}

if __name__ == "__main__":
    main()
