"""A network's file for `model=`, in a folder of the user's own."""

from pathlib import Path

from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.outputs import make_place, writing


def checked_output(output: str | None) -> Path | None:
    """Return where the file goes. Raises ValueError where no command would find it there."""
    if output is None:
        return None
    file = Path(output)
    if file.suffix != ".yaml" or file.absolute().parent.name != "model":
        raise ValueError(
            f"output={output}: give a .yaml in a folder named model, as output=nets/model/mine.yaml, so that "
            "effnet-train --config-dir nets model=mine finds it"
        )
    shipped = CONFIG_DIR / "model" / file.name
    if shipped.exists() and file.absolute().parent.resolve() != shipped.parent.resolve():
        raise ValueError(f"output={output}: model={file.stem} is one of ours, which would be taken instead: rename it")
    make_place("output", file)
    return file


def write(file: Path, text: str) -> None:
    """Write the file and say how to train with it. Raises ValueError where it holds another network."""
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"output={file} holds another network: remove it, or give another name")
    with writing("output", file):
        file.write_text(text, encoding="utf-8")
    folder = file.absolute().parent.parent
    where = "" if folder.resolve() == CONFIG_DIR.resolve() else f"--config-dir {file.parent.parent} "
    print(f"\nwritten to {file}: effnet-train {where}model={file.stem} ...")
