"""`effnet-predict`: the likeliest classes of images: files, folders, or standard input."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import command

# Hydra's options whose value is a word of its own.
_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--info", "-i", "--experimental-rerun"),
)
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
    unreadable: list[int] = []

    @cache  # a sweep's runs all want it, and it can be read once
    def stdin() -> bytes:
        return sys.stdin.buffer.read()

    command("predict", lambda cfg: unreadable.append(task(cfg, inputs, stdin)))()
    if any(unreadable):  # only now: to leave from within would end a sweep
        raise SystemExit(_UNREADABLE_EXIT_CODE)


def task(cfg: DictConfig, inputs: Sequence[str], stdin: Callable[[], bytes]) -> int:
    """Write each image's likeliest classes; return the number of images that could not be read."""
    from effnet_train import distributed
    from effnet_train.analysis.details import readable_names
    from effnet_train.analysis.prediction import Predictor, class_number
    from effnet_train.cli import build, check
    from effnet_train.data.backends import check_backend
    from effnet_train.data.preprocess import Preprocess
    from effnet_train.data.sources import find_files
    from effnet_train.models.folding import folded

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.PREDICT)
    if not inputs:
        raise ValueError(f"no image is given: effnet-predict IMAGE... checkpoint={config['checkpoint']} (- for stdin)")
    files = find_files(inputs, stdin=stdin() if _STDIN in inputs else None)
    if config["cam_class"] is not None and not config["cam"]:
        raise ValueError(f"cam_class={config['cam_class']} has no effect without cam=FOLDER")
    check_backend(config["backend"], key="backend")
    _check_output(config["output"], [*inputs, config["checkpoint"]])
    maps = _folder_of_maps(config["cam"])
    with distributed.open_session(distributed.resolve_device(config["device"])) as session:
        model, meta = build.load_model(config["checkpoint"], session, which=config["weights"], source=config["source"])
        preprocess, words = Preprocess(**meta["preprocess"]), readable_names(meta["classes"])
        precision = build.resolve_precision(config["precision"], session.device)
        build.set_arithmetic(precision, False, session.device)
        model, _ = folded(model, config["fold"], device=session.device, precision=precision)
        predictor = Predictor(
            model=model,
            preprocess=preprocess.at(config["resolution"]) if config["resolution"] else preprocess,
            classes=meta["classes"],
            words=words,
            top=config["top"],
            precision=precision,
            backend=config["backend"],
            maps=maps,
            mapped=class_number(config["cam_class"], meta["classes"], words),
        )
        size = config["batch_size"]
        workers = min(build.resolve_workers(config["workers"], session.device), len(files) // size)  # none for a few
        word = partial(json.dumps, ensure_ascii=False, allow_nan=False) if config["format"] == "jsonl" else _table
        unreadable = 0
        with _opened(config["output"], config["format"]) as output:
            for row in predictor(files, batch_size=size, workers=workers, device=session.device):
                unreadable += "error" in row
                try:
                    print(word(row), file=output, flush=True)
                except BrokenPipeError:  # whoever read the results has seen enough
                    os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
                    break
    return unreadable


def _folder_of_maps(cam: str | None) -> Path | None:
    if not cam:
        return None
    if os.path.exists(cam) and not os.path.isdir(cam):
        raise ValueError(f"cam={cam} is a file: give a folder for the maps")
    os.makedirs(cam, exist_ok=True)
    return Path(cam)


def _check_output(output: str | None, read: Sequence[str]) -> None:
    """Check that the results can go to `output`, and not over an image or what else is read. Raises ValueError."""
    from effnet_train.data.sources import IMAGE_SUFFIXES

    if not output:
        return
    if not Path(output).absolute().parent.is_dir():
        raise ValueError(f"output={output}: its folder does not exist, make it first")
    if os.path.isdir(output):
        raise ValueError(f"output={output} is a folder: give a file for the results")
    given = os.path.exists(output) and any(os.path.exists(name) and os.path.samefile(name, output) for name in read)
    if given or output.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"output={output} would be written over an image or the checkpoint: choose another name")


@contextmanager
def _opened(output: str | None, form: str) -> Iterator[TextIO]:
    """Open the file for the results, or take standard output, in UTF-8 with file names that are not.

    These stand in a table as their own bytes, as in `ls`, and in JSON as the escapes that Python's json reads back.
    """
    errors = "backslashreplace" if form == "jsonl" else "surrogateescape"
    if output:
        with open(output, "w", encoding="utf-8", errors=errors) as file:
            yield file
    else:
        assert isinstance(sys.stdout, io.TextIOWrapper)
        sys.stdout.reconfigure(encoding="utf-8", errors=errors)
        yield sys.stdout


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
