"""`effnet-search JOB ...`: networks of a space searched for. The first word says what to do, the rest is Hydra's."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import jobs
from effnet_train.cli.model_file import checked_output, write
from effnet_train.cli.outputs import check_folder, writing


def main() -> None:
    """Run the job that the first word names."""
    # effnet-search export best: a word that is no key=value is the trial.
    if sys.argv[1:2] == ["export"] and sys.argv[2:] and "=" not in sys.argv[2] and not sys.argv[2].startswith("-"):
        sys.argv[2] = f"trial={sys.argv[2]}"
    jobs("effnet-search", "search", "architecture search, from a space to a model's file", JOBS)


def run(cfg: DictConfig) -> None:
    """Search: train candidate after candidate, and learn from them."""
    from effnet_train.cli.search_run import search

    search(cfg)


def report(cfg: DictConfig) -> None:
    """Print the best networks, and draw what was found."""
    from effnet_train.analysis.figures import save
    from effnet_train.cli import check
    from effnet_train.search import report as reports

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.SEARCH_REPORT)
    names = [config["search"]] if isinstance(config["search"], str) else config["search"]
    if not names:
        raise ValueError("search=[] is empty: give the searches' folders")
    found = [reports.read(Path(name)) for name in names]
    folder = Path(config["output"] or (names[0] if len(names) == 1 else "report"))
    check_folder("output", folder)
    print(reports.text(found, config["top"]))
    files = {"rewards": reports.rewards_figure(found), "pareto": reports.pareto_figure(found)}
    with writing("output", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.csv").write_text(reports.csv_text(found), encoding="utf-8")
        written = [folder / "report.csv"]
        for name, figure in files.items():
            own = [folder / f"{name}{suffix}" for suffix in (".png", ".svg")]
            save(figure, own)
            written += own
    print("\nwritten to", ", ".join(map(str, written)))


def export(cfg: DictConfig) -> None:
    """Print, or write, a network that was found as a file for model=."""
    from effnet_train.cli import check
    from effnet_train.cli.search_run import network_file
    from effnet_train.search import report as reports

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.SEARCH_EXPORT)
    file = checked_output(config["output"])
    found = reports.read(Path(config["search"]))
    entry = found.entry(config["trial"])
    stages = found.space.decode(entry.tokens)
    about = f"Trial {entry.number} of {found.folder.name}"
    if entry.reward is not None and entry.top1 is not None:
        about += f": reward {entry.reward:.4f}, top-1 {entry.top1:.2%} as it was trained there"
    text = network_file(f"{about} (effnet-search export).", found.base, found.space, stages, _shape(found))
    if file is None:
        print(text, end="")
    else:
        write(file, text)


def _shape(found: Any) -> dict[str, Any]:
    """Return what a search's model has otherwise than its base, and makes the network's shape: no regularisation."""
    from effnet_train.analysis.runs import shape_of
    from effnet_train.cli.app import CONFIG_DIR

    model = found.config["model"]
    # What a base of the user's own has is not known here: all is written then.
    base = yaml.safe_load((CONFIG_DIR / "model" / "mnasnet.yaml").read_text(encoding="utf-8"))
    base = base if found.base == "mnasnet" else {"_target_": base["_target_"]}
    own = shape_of(model, found.config["data"]["preprocess"]["resolution"])
    return {key: value for key, value in own.items() if base.get(key) != value and key != "stages"}


JOBS: Mapping[str, Callable[[DictConfig], None]] = {"run": run, "report": report, "export": export}

if __name__ == "__main__":
    main()
