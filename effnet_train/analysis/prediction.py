"""The likeliest classes of images, and pictures of where in them the network sees these."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnet_train.analysis.activation_map import activation_map, overlay, picture
from effnet_train.data.backends import BACKENDS, open_picture
from effnet_train.data.datasets import Data
from effnet_train.data.device_batches import check_device
from effnet_train.data.loader import Batch, eval_batches
from effnet_train.data.preprocess import Preprocess, eval_image, normalize
from effnet_train.data.sources import Files
from effnet_train.engine.evaluate import autocast

_STEM_LETTERS = 60  # of an image's name in its map's: 240 bytes at most, where file systems allow 255


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A network with what its outputs mean.

    `classes` are its own names of the classes, `words` those that people use. With `maps`, a folder, a picture of each
    image under its activation map goes there: of the class `mapped`, or of the likeliest where that is None.
    Raises ValueError where the features have a single pixel, of which there is no map.
    """

    model: Any  # a network in evaluation mode, of `features` and a `classifier` of their means
    preprocess: Preprocess
    classes: Sequence[str]
    words: Sequence[str]
    top: int = 5
    precision: str = "fp32"
    backend: str = BACKENDS[0]
    maps: Path | None = None
    mapped: int | None = None

    def __call__(
        self, files: Files, *, batch_size: int, workers: int, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for each file, in their order: `file`, and its likeliest classes `top`, or the `error` it gave.

        A class is `class`, `name` and `probability`; the likeliest comes first. Rows come as batches are done.
        """
        data = Data(files, files, None, self.preprocess, "skip", self.backend)
        check_device(self.backend, device, self.preprocess, key="backend")
        batches = eval_batches(files, data, batch_size=batch_size, workers=workers, device=device)
        for number, batch in enumerate(batches):
            places = range(number * batch_size, min((number + 1) * batch_size, len(files)))
            found = dict(zip(batch.keys.tolist(), self.batch(batch, files, device), strict=True))
            lost = [place for place in places if place not in found]
            reasons = dict(zip(lost, batch.errors, strict=True))
            for place in places:
                name = files.name(place)
                reason = reasons.get(place) or ("" if found[place] else "the network's outputs are not finite numbers")
                yield {
                    "file": name,
                    **({"error": reason.removeprefix(f"{name}: ")} if reason else {"top": found[place]}),
                }

    @torch.inference_mode()
    def batch(self, batch: Batch, files: Files, device: torch.device) -> list[list[dict[str, Any]]]:
        """Return the likeliest classes of each image that a batch holds; draw the maps that are asked for.

        An image whose logits are not finite has none.
        """
        if not len(batch.labels):
            return []
        pixels = batch.images.to(device, non_blocking=True)
        with autocast(device, self.precision):
            features = self.model.features(normalize(pixels, self.preprocess.mean, self.preprocess.std))
            logits = self.model.classifier(features.mean((2, 3)))
        whole = logits.isfinite().all(dim=1).tolist()
        probabilities = logits.float().softmax(dim=1)
        shares, indices = probabilities.topk(min(self.top, len(self.classes)), dim=1)
        if self.maps is not None:
            mapped = indices[:, 0] if self.mapped is None else torch.full_like(indices[:, 0], self.mapped)
            self._draw(batch, files, features.float(), mapped, probabilities)
        return [
            [
                {"class": self.classes[index], "name": self.words[index], "probability": share}
                for index, share in zip(*image, strict=True)
                if finite
            ]
            for finite, *image in zip(whole, indices.tolist(), shares.tolist(), strict=True)
        ]

    def _draw(self, batch: Batch, files: Files, features: Tensor, mapped: Tensor, probabilities: Tensor) -> None:
        assert self.maps is not None
        if features.shape[-2:] == (1, 1):
            raise ValueError(
                f"cam={self.maps}: at {self.preprocess.resolution} pixels the last features are a single one, which "
                "tells no place from another. Leave cam out, or train at 64 pixels or more; a larger resolution= draws "
                "maps, but of a network that was not trained for it"
            )
        heat = activation_map(features, self.model.classifier.weight.float(), mapped).cpu().numpy()
        shares = probabilities.gather(1, mapped[:, None])[:, 0].tolist()
        for place, index, share, pixels, one in zip(
            batch.keys.tolist(), mapped.tolist(), shares, batch.images.cpu().numpy(), heat, strict=True
        ):
            # Files of several folders may have the same name; and a name may be as long as the disk allows.
            target = self.maps / f"{place:05d}-{Path(files.name(place)).stem[:_STEM_LETTERS]}.png"
            picture(pixels, one, f"{self.words[index]}, {share:.1%}").save(target)


@dataclass(frozen=True)
class Seen:
    """Hold what a network saw of an image, (R, R, 3) uint8, the same under its map, and the mapped class."""

    pixels: np.ndarray
    overlay: np.ndarray
    word: str
    probability: float


@torch.inference_mode()
def seen(
    model: Any, preprocess: Preprocess, words: Sequence[str], image: str, mapped: int | None, *, source: str
) -> Seen:
    """Return an image under its activation map: of the class `mapped`, or of the likeliest. `source` names the network.

    Raises ValueError where the features have a single pixel, of which there is no map.
    """
    pixels = eval_image(open_picture(Path(image).read_bytes(), BACKENDS[0]), preprocess)
    device = next(model.parameters()).device
    batch = torch.from_numpy(pixels)[None].to(device)
    features = model.features(normalize(batch, preprocess.mean, preprocess.std))
    if features.shape[-2:] == (1, 1):
        raise ValueError(
            f"{source}: at {preprocess.resolution} pixels the last features are a single one, which tells no place "
            "from another: give a network of 64 pixels or more"
        )
    probabilities = model.classifier(features.mean((2, 3))).softmax(dim=1)[0]
    index = int(probabilities.argmax()) if mapped is None else mapped
    heat = activation_map(features, model.classifier.weight, torch.tensor([index], device=device))[0].cpu().numpy()
    return Seen(pixels, overlay(pixels, heat), words[index], float(probabilities[index]))


def class_number(asked: str | int | None, classes: Sequence[str], words: Sequence[str]) -> int | None:
    """Return the number of the class meant by its name, by the word that people use, or by the number itself.

    Raises ValueError for a class that there is not.
    """
    if asked is None:
        return None
    text = str(asked)
    for names in (classes, words):
        if text in names:
            return list(names).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise ValueError(f"cam_class={text} is no class of the checkpoint: give its name, or a number below {len(classes)}")
