import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet_train.data.decode import DecodeError, decode

GOLDEN = np.load(Path(__file__).parents[1] / "golden/decode.npz")
KINDS = sorted(name.removesuffix("/file") for name in GOLDEN.files if name.endswith("/file"))
PIXELS = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_tensorflows(kind):
    image = decode(GOLDEN[f"{kind}/file"].tobytes())
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.array(image), GOLDEN[f"{kind}/pixels"])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_files_keep_every_pixel(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(np.array(decode(encoded(Image.fromarray(PIXELS), kind, **options))), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_jpegs_of_every_colour_space(mode):
    rows, columns = np.mgrid[0:48, 0:64]
    smooth = Image.fromarray(np.stack([rows * 5, columns * 3, 255 - rows * 4], -1).astype(np.uint8))
    image = decode(encoded(smooth.convert(mode), "JPEG", quality=98))
    expected = smooth.convert("L") if mode == "L" else smooth
    difference = np.abs(np.array(image, dtype=int) - np.array(expected.convert("RGB"), dtype=int))
    assert image.mode == "RGB"
    assert difference.mean() < 3


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_tiff_is_scaled(order):
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    pixels = np.array(decode(encoded(Image.fromarray(values.astype(order)), "TIFF")))
    np.testing.assert_array_equal(pixels, np.repeat(values[..., None] // 256, 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(dtype):
    with pytest.raises(DecodeError, match=r"pixels of 32 bits .* have no agreed range: save the image with 8 bits"):
        decode(encoded(Image.fromarray(np.ones((3, 3), dtype=dtype)), "TIFF"))


def test_images_that_are_decoded_already():
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(np.array(decode(grey)), np.repeat(PIXELS[..., :1], 3, axis=-1))


def test_palette_of_a_decoded_image_is_left_alone():
    image = Image.open(io.BytesIO(GOLDEN["png/palette with transparency/file"].tobytes()))
    for _ in range(2):
        np.testing.assert_array_equal(np.array(decode(image)), GOLDEN["png/palette with transparency/pixels"])
    assert image.mode == "P"


def test_orientation_tag_is_not_applied():
    tags = Image.Exif()
    tags[0x0112] = 6
    assert decode(encoded(Image.fromarray(PIXELS), "JPEG", exif=tags)).size == (16, 12)


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)) for value in (10, 200)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array(decode(data)).max() < 20


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"not an image, whatever its name", b"<html>404</html>" * 50])
def test_what_is_no_image(data):
    with pytest.raises(DecodeError, match=r"^the file holds no image of a known kind$"):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_truncated_file(kind, share):
    data = encoded(Image.fromarray(np.tile(PIXELS, (8, 8, 1))), kind)
    with pytest.raises(DecodeError, match="truncated"):
        decode(data[: int(len(data) * share)])


def test_image_too_large_to_be_honest():
    data = bytearray(encoded(Image.fromarray(PIXELS), "PNG"))
    # The header's chunk: its name, width and height, five bytes more, and the sum that guards them.
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DecodeError, match=r"DecompressionBombError: Image size \(400000000 pixels\) exceeds limit"):
        decode(bytes(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "PPM"])
def test_broken_files_raise_nothing_else(kind):
    generator = random.Random(kind)
    whole = encoded(Image.fromarray(PIXELS), kind)
    broken = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(min(len(data), 300))] = generator.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert decode(bytes(data)).mode == "RGB"
            except DecodeError:
                broken += 1
    assert broken > 10


def test_errors_of_any_kind_are_named(monkeypatch):
    def stumble(*_):
        raise TypeError("'float' object cannot be interpreted as an integer")

    monkeypatch.setattr(Image, "open", stumble)
    with pytest.raises(DecodeError, match="TypeError: 'float' object"):
        decode(b"")


def test_real_photographs(imagenet_jpegs):
    sizes = {decode(data).size for data in imagenet_jpegs.values()}
    assert len(sizes) > 5
    assert min(min(size) for size in sizes) > 50
