"""Pictures of a data set: augmented samples on a sheet, and histograms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from effnet_train.data.statistics import columns

_CELL = (112, 256)  # pixels: smaller samples are enlarged, larger ones reduced
_GAP, _LINE, _FONT = 8, 20, 14
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(images: Sequence[np.ndarray], names: Sequence[str], title: str, *, width: int = 8) -> Image.Image:
    """Return the images (R, R, 3) uint8 in rows of `width`, each above its name, under a title.

    Small ones are enlarged by a whole number, each pixel a square; those of more than 256 pixels are reduced.
    """
    font = ImageFont.load_default(_FONT)
    cells = [_cell(image) for image in images]
    side = max(cell.width for cell in cells)
    across = min(width, len(cells))
    rows = -(-len(cells) // across)
    total = _GAP + across * (side + _GAP)
    heading = _wrapped(title, font, total - 2 * _GAP)
    top = _GAP + len(heading) * _LINE + _GAP
    sheet = Image.new("RGB", (total, top + rows * (side + _LINE + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        draw.text((_GAP, _GAP + number * _LINE), line, fill=_INK, font=font)
    for place, (cell, name) in enumerate(zip(cells, names, strict=True)):
        left = _GAP + place % across * (side + _GAP)
        upper = top + place // across * (side + _LINE + _GAP)
        sheet.paste(cell, (left, upper))
        draw.text((left, upper + side + 2), shortened(name, font, side), fill=_INK, font=font)
    return sheet


def _cell(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    least, most = _CELL
    if image.width > most:
        return image.resize((most, most), Image.Resampling.BICUBIC)
    times = -(-least // image.width)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def shortened(text: str, font: Any, width: int) -> str:
    """Return the text, or as much of it as fits into `width` pixels and an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shortened(line, font, width) for line in lines]


def histograms(table: np.ndarray, statistics: Mapping[str, Any], output: Path) -> None:
    """Draw sizes, aspects and images per class from what `data.statistics.measure` found. Raises ImportError."""
    try:
        from matplotlib.figure import Figure  # Not pyplot: it keeps state and may look for a display.
    except ImportError as error:
        raise ImportError("picture= draws with matplotlib: pip install 'effnet-train[plots]'") from error
    found = columns(table)
    panels = {
        "Shorter side, pixels": found["shorter"],
        "Width / height": found["aspect"],
        "File, kB": found["bytes"] / 1000,
        "Images in a class": np.array(list(statistics["per_class"].values())),
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        # A few giants would leave the rest in one bar.
        low, high = np.quantile(values, [0, 0.995])
        axes.hist(np.clip(values, low, high), bins=40, color="#0072B2")
        axes.set_xlabel(label if high == values.max() else f"{label} (the last bar: and more)")
        axes.set_ylabel("classes" if label.startswith("Images") else "images")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{statistics['images']:,} images of {len(statistics['per_class']):,} classes")
    figure.savefig(output, dpi=150)
