import io
import random
import re
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from effnet_train.data import backends
from effnet_train.data.augment import Augment, inception_crop
from effnet_train.data.autoaugment import AutoAugment
from effnet_train.data.backends import Decoded, check_backend, open_picture
from effnet_train.data.decode import DecodeError, decode
from effnet_train.data.keys import rng
from effnet_train.data.preprocess import Preprocess, central_box, eval_image, five_crops

FAST = ("simplejpeg", "nvimgcodec")
NOISE = np.random.default_rng(0).integers(256, size=(61, 83, 3), dtype=np.uint8)
# Wide enough for several blocks each way, smooth enough for JPEG; its sides are no multiples of a block's.
ROWS, COLUMNS = np.mgrid[0:117, 0:157]
SMOOTH = np.stack([ROWS * 2, COLUMNS, 255 - ROWS - COLUMNS // 2], -1).astype(np.uint8)


@pytest.fixture(params=FAST)
def backend(request):
    if request.param == "nvimgcodec":
        pytest.importorskip("nvidia.nvimgcodec", reason="the extra nvimgcodec is not installed")
    return request.param


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def boxes(width, height):
    yield 0, 0, width, height
    yield 0, 0, 1, 1
    yield width - 1, height - 1, 1, 1
    for seed in range(12):
        box = inception_crop(width, height, generator=rng(seed), area=(0.01, 0.5))
        if box is not None:
            yield box


def unscaled(data, box, backend):
    """The box's pixels at their own size, which no resizing changes."""
    return open_picture(data, backend).resized(box, box[2:], "bicubic")


OPTIONS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3, "subsampling": 2},
    "RGB, not YCbCr": {"keep_rgb": True},
    "low quality": {"quality": 5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("pixels", [SMOOTH, NOISE], ids=["smooth", "noise"])
def test_every_box_has_pillows_pixels(backend, pixels, options):
    data = encoded(pixels, **options)
    whole = np.array(decode(data))
    for left, top, width, height in boxes(pixels.shape[1], pixels.shape[0]):
        found = unscaled(data, (left, top, width, height), backend)
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_every_colour_space(backend, mode):
    data = encoded(Image.fromarray(SMOOTH).convert(mode))
    found = unscaled(data, (20, 30, 70, 60), backend)
    np.testing.assert_array_equal(found, np.array(decode(data))[30:90, 20:90])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_other_formats_are_pillows(backend, kind):
    data, box = encoded(SMOOTH, kind), (20, 30, 70, 60)
    expected = Decoded(decode(data)).resized(box, (33, 44), "bicubic")
    np.testing.assert_array_equal(open_picture(data, backend).resized(box, (33, 44), "bicubic"), expected)


def test_a_tag_does_not_turn_the_image(backend):
    tags = Image.Exif()
    tags[0x0112] = 6
    assert open_picture(encoded(SMOOTH, exif=tags), backend).size == (157, 117)
    assert unscaled(encoded(SMOOTH, exif=tags), (0, 0, 157, 117), backend).shape == (117, 157, 3)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_resizing_is_pillows(backend, interpolation):
    data, box = encoded(SMOOTH, quality=95), (10, 5, 120, 100)
    expected = Decoded(decode(data)).resized(box, (48, 40), interpolation).astype(int)
    found = open_picture(data, backend).resized(box, (48, 40), interpolation)
    assert found.dtype == np.uint8
    assert found.shape == (40, 48, 3)
    assert np.abs(found - expected).max() <= (1 if interpolation.startswith("bi") else 0)


@pytest.mark.parametrize("share", [0.3, 0.97])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_file_is_an_error_wherever_the_box_is(backend, share, progressive):
    data = encoded(SMOOTH, quality=95, progressive=progressive)
    data = data[: int(len(data) * share)]
    with pytest.raises(DecodeError, match="truncated"):
        open_picture(data, backend).resized((0, 0, 8, 8), (8, 8), "bicubic")


def test_damage_is_read_or_refused_as_by_pillow(capfd):
    generator, whole, refused = random.Random(0), encoded(SMOOTH, quality=90, subsampling=2), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(2, len(data) - 2)] = generator.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = np.array(decode(bytes(data)))
            except DecodeError as error:
                refused += 1
                with pytest.raises(DecodeError, match=f"^{re.escape(str(error))}$"):
                    unscaled(bytes(data), (0, 0, *open_picture(bytes(data), "simplejpeg").size), "simplejpeg")
                continue
            height, width = expected.shape[:2]
            picture = open_picture(bytes(data), "simplejpeg")
            assert picture.size == (width, height)
            for rows in (height, height // 2, 1):
                found = picture.resized((0, 0, width, rows), (width, rows), "bicubic")
                np.testing.assert_array_equal(found, expected[:rows])
    assert refused > 5
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"no image", b"\xff\xd8" + b"\xff" * 300 + b"\xff\xd9"]
)
def test_what_is_no_image(backend, data):
    with pytest.raises(DecodeError, match="the file holds no image of a known kind"):
        open_picture(data, backend)


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"data.backend=turbo is not known: use one of simplejpeg, pillow, nvimgcodec, nvjpeg, hybrid"
    ):
        check_backend("turbo")


def test_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    backends._nvimgcodec.cache_clear()
    with pytest.raises(ImportError, match=r"data.backend=nvimgcodec needs .*pip install 'effnet-train\[nvimgcodec\]'"):
        check_backend("nvimgcodec")


def test_photographs_are_pillows(backend, imagenet_jpegs):
    preprocess, timms, augment = Preprocess(96), Preprocess(96, resize=110), Augment(flip=0.5)
    for key, data in enumerate(imagenet_jpegs.values()):
        image, picture = decode(data), open_picture(data, backend)
        box = central_box(*image.size, preprocess)
        left, top, width, height = box
        expected = np.array(image)[top : top + height, left : left + width]
        np.testing.assert_array_equal(picture.resized(box, box[2:], "bicubic"), expected)
        for ours, pillows in (
            (augment(picture, preprocess, key), augment(image, preprocess, key)),
            (eval_image(picture, preprocess), eval_image(image, preprocess)),
            (eval_image(picture, timms), eval_image(image, timms)),
            (five_crops(picture, timms), five_crops(image, timms)),
        ):
            assert np.abs(ours.astype(int) - pillows).mean() < 0.5


def test_policies_see_the_same_image(backend):
    data, preprocess = encoded(SMOOTH, quality=95), Preprocess(64)
    augment = Augment(policy=AutoAugment([[["Rotate", 1.0, 5], ["Solarize", 0.5, 5]]]), erase=0.5)
    for key in range(5):
        found = augment(open_picture(data, backend), preprocess, key)
        expected = augment(decode(data), preprocess, key)
        assert np.abs(found.astype(int) - expected).mean() < 0.5
