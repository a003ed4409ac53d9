"""`effnet-predict`: the likeliest classes of images: files, folders, or standard input."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import command

# Hydra's options whose value is a word of its own.
_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
_UNREADABLE_EXIT_CODE = 1
_STDIN = "-"


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into Hydra's words and the inputs: those without `=`, and all that follow `--`."""
    hydras: list[str] = []
    inputs: list[str] = []
    for before, word in zip(("", *words), words, strict=False):
        if word == "--":
            return hydras, [*inputs, *words[words.index("--") + 1 :]]
        option = "=" in word or (word[:1] in ("-", "+", "~") and word != _STDIN)
        (hydras if option or before in _WITH_VALUE else inputs).append(word)
    return hydras, inputs


def main() -> None:
    """Take the inputs out of the command line, which Hydra would refuse, and predict."""
    sys.argv[1:], inputs = split_words(sys.argv[1:])
    command("predict", partial(task, inputs))()


def task(inputs: Sequence[str], cfg: DictConfig) -> None:
    """Print each image's likeliest classes; raise SystemExit(1) at the end where one could not be read."""
    from effnet_train import distributed
    from effnet_train.analysis.details import readable_names
    from effnet_train.analysis.prediction import Predictor, class_number
    from effnet_train.cli import build, check
    from effnet_train.data.preprocess import Preprocess
    from effnet_train.data.sources import find_files

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.PREDICT)
    if not inputs:
        raise ValueError(f"no image is given: effnet-predict IMAGE... checkpoint={config['checkpoint']} (- for stdin)")
    files = find_files(inputs, stdin=sys.stdin.buffer.read() if _STDIN in inputs else None)
    maps = Path(config["cam"]) if config["cam"] else None
    if maps is not None:
        maps.mkdir(parents=True, exist_ok=True)
    with distributed.open_session(distributed.resolve_device(config["device"])) as session:
        model, meta = build.load_model(config["checkpoint"], session, which=config["weights"], source=config["source"])
        preprocess, words = Preprocess(**meta["preprocess"]), readable_names(meta["classes"])
        predictor = Predictor(
            model=model,
            preprocess=preprocess.at(config["resolution"]) if config["resolution"] else preprocess,
            classes=meta["classes"],
            words=words,
            top=config["top"],
            precision=build.resolve_precision(config["precision"], session.device),
            maps=maps,
            mapped=class_number(config["cam_class"], meta["classes"], words),
        )
        size = config["batch_size"]
        workers = min(build.resolve_workers(config["workers"], session.device), len(files) // size)  # none for a few
        unreadable = 0
        for row in predictor(files, batch_size=size, workers=workers, device=session.device):
            unreadable += "error" in row
            try:
                print(json.dumps(row, ensure_ascii=False) if config["format"] == "jsonl" else _table(row), flush=True)
            except BrokenPipeError:  # whoever read the results has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return
    if unreadable:
        raise SystemExit(_UNREADABLE_EXIT_CODE)


def _table(row: Mapping[str, Any]) -> str:
    """Word a row for people."""
    if "error" in row:
        return f"{row['file']}\n  cannot be read: {row['error']}"
    lines = [f"  {entry['probability']:7.2%}  {entry['name']}{_beside(entry)}" for entry in row["top"]]
    return "\n".join([row["file"], *lines])


def _beside(entry: Mapping[str, Any]) -> str:
    return "" if entry["class"] in entry["name"] else f"  [{entry['class']}]"


if __name__ == "__main__":
    main()
