"""Class activation maps: where in an image a network sees a class (the paper's Figure 7)."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# From cold to hot, in equal steps: from blue to yellow and ever lighter, which no colour blindness takes away. None is
# dark, so that the image stays visible below the colour.
_COLOURS = np.array([(50, 50, 200), (40, 110, 210), (40, 160, 185), (110, 205, 110), (255, 235, 50)], float)
_LEAST_PIXELS = 256  # of a picture's side: tiny images are enlarged
_CAPTION = 22  # pixels
_GAP = 4  # pixels between the image and its map


def activation_map(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Return each image's map (N, h, w) for its class in `classes` (N,), before bias and averaging.

    `features` (N, C, h, w) are what the classifier averages, `weight` (K, C) is the classifier's: the mean of a map and
    the class's bias add up to its logit. Source: Zhou et al., "Learning Deep Features for Discriminative
    Localization", 2016, equation 2.
    """
    return torch.einsum("nc,nchw->nhw", weight[classes], features)


def colours(heat: np.ndarray) -> np.ndarray:
    """Return the colours (..., 3) uint8 of values in [0, 1], from blue through green to yellow, ever lighter."""
    steps = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(heat, steps, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a map (h, w) over an image (H, W, 3) uint8: enlarged bicubically, stretched to [0, 1], half colour.

    A map that is the same everywhere has the colour of 0.
    """
    height, width = pixels.shape[:2]
    large = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(large, dtype=np.float64)
    low, high = values.min(), values.max()
    stretched = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return (0.5 * pixels + 0.5 * colours(stretched)).round().astype(np.uint8)


def picture(pixels: np.ndarray, heat: np.ndarray, caption: str) -> Image.Image:
    """Draw what the network saw, (R, R, 3) uint8, and beside it the same under its map; `caption` below."""
    size = max(_LEAST_PIXELS, pixels.shape[0])
    large = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST))
    canvas = Image.new("RGB", (2 * size + _GAP, size + _CAPTION), "white")
    canvas.paste(Image.fromarray(large), (0, 0))
    canvas.paste(Image.fromarray(overlay(large, heat)), (size + _GAP, 0))
    ImageDraw.Draw(canvas).text((4, size + 3), caption, fill="black", font=ImageFont.load_default(size=14))
    return canvas
