"""Batches whose pixels a device makes against those of the CPU path: the same draws, the same images.

On a CPU the device's part runs as on a GPU, but for what decodes; tests marked `gpu` hold that too.
"""

import io
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effnet_train.data.augment import Augment
from effnet_train.data.autoaugment import AutoAugment, RandAugment
from effnet_train.data.backends import open_picture
from effnet_train.data.datasets import Data, image_folders
from effnet_train.data.decode import DecodeError, decode
from effnet_train.data.device_batches import ahead, check_device
from effnet_train.data.device_decode import (
    MOST_SHRUNK,
    NvjpegDecoder,
    code_stream,
    decode_on_cpu,
    decode_params,
    rounded_,
    scaled,
)
from effnet_train.data.loader import DataError, eval_batches, train_batches
from effnet_train.data.order import Order
from effnet_train.data.preprocess import Preprocess, central_box

FULL = Augment(policy=AutoAugment(), erase=0.3)
CPU = torch.device("cpu")


class Images:
    """A source of images: encoded, or decoded already."""

    classes = ("a", "b")

    def __init__(self, images):
        self.images = list(images)

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index], index % 2

    def name(self, index):
        return f"images[{index}]"


def data(images, backend, preprocess, on_error="raise"):
    source = Images(images)
    return Data(source, source, None, preprocess, on_error, backend)


def trained(found, augment=FULL, *, batch_size=8, steps=range(4), **options):
    order = Order(len(found.train), batch_size, 5)
    return list(train_batches(found, augment, order, start=steps.start, stop=steps.stop, **options))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def smooth(width, height):
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 200], -1)
    return pixels.astype(np.uint8)


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        for part in ("images", "labels", "keys"):
            found, expected = getattr(ours, part).cpu(), getattr(theirs, part)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found.numpy(), expected.numpy(), err_msg=part)
        assert ours.errors == theirs.errors


def assert_close(one, other, *, mean):
    """Check that batches are of the same samples, and pixels differ by at most `mean` on average."""
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.keys, theirs.keys)
        assert ours.images.shape == theirs.images.shape
        assert (ours.images.cpu().int() - theirs.images.int()).abs().float().mean() < mean


@pytest.fixture(scope="module")
def decoded():
    """Return images that have no file: nothing but the device's operations can differ."""
    sizes = [(60, 40), (33, 90), (64, 64), (500, 30), (5, 7), (48, 47), (130, 101), (20, 20), (41, 77)]
    return [Image.fromarray(noise(*size, seed) if seed % 2 else smooth(*size)) for seed, size in enumerate(sizes)]


AUGMENTS = {
    "paper": FULL,
    "randaugment": Augment(policy=RandAugment(3, 17), flip=0.3),
    "moved": Augment(area=None, pad=6, flip=0.5, erase=0.5),
    "plain": Augment(),
    "none": Augment(area=None, flip=0.0),
}


@pytest.mark.parametrize("resize", [None, 40])
@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_training_pixels_are_the_cpus(decoded, augment, resize):
    preprocess = Preprocess(32, resize=resize)
    expected = trained(data(decoded, "pillow", preprocess), augment)
    assert_same(trained(data(decoded, "nvjpeg", preprocess), augment), expected)


@pytest.mark.parametrize("crops", [1, 5])
@pytest.mark.parametrize("resize", [None, 40])
def test_evaluation_pixels_are_the_cpus(decoded, crops, resize):
    kept = [image for image in decoded if max(image.size) < 10 * min(image.size)]
    found, expected = (data(kept, backend, Preprocess(32, resize=resize)) for backend in ("nvjpeg", "pillow"))
    ours = list(eval_batches(found.val, found, batch_size=3, crops=crops))
    assert ours[0].images.shape == ((3, 32, 32, 3) if crops == 1 else (3, 5, 32, 32, 3))
    assert_same(ours, list(eval_batches(expected.val, expected, batch_size=3, crops=crops)))


def test_files_of_all_kinds_are_read(image_root):
    # JPEG, PNG, grey, transparent, CMYK, palette: what is no plain JPEG is the CPU's to decode.
    preprocess, augment = Preprocess(16), Augment(erase=0.3)
    found, expected = (image_folders(str(image_root), preprocess=preprocess, backend=b) for b in ("nvjpeg", "pillow"))
    assert_close(trained(found, augment), trained(expected, augment), mean=1 / 20)
    ours, theirs = (list(eval_batches(one.val, one, batch_size=5)) for one in (found, expected))
    assert_close(ours, theirs, mean=1 / 20)


@pytest.mark.parametrize("crops", [1, 5])
def test_hybrid_is_simplejpeg_bit_for_bit(imagenet_jpegs, decoded, crops):
    files = [*imagenet_jpegs.values(), encoded(smooth(90, 70)), *decoded[:2]]
    for resize in (None, 80):
        found, expected = (data(files, name, Preprocess(64, resize=resize)) for name in ("hybrid", "simplejpeg"))
        for augment in (*AUGMENTS.values(), Augment(area=None, pad=3)):
            assert_same(trained(found, augment), trained(expected, augment))
        ours, theirs = (list(eval_batches(one.val, one, batch_size=5, crops=crops)) for one in (found, expected))
        assert_same(ours, theirs)


def test_photographs_are_pillows(imagenet_jpegs):
    files, preprocess = list(imagenet_jpegs.values()), Preprocess(112)
    found, expected = (data(files, backend, preprocess) for backend in ("nvjpeg", "pillow"))
    # No more than by data.backend=simplejpeg: recent Pillows scale columns before rows where that is less to compute.
    assert_close(trained(found, Augment()), trained(expected, Augment()), mean=0.1)
    # Operations such as Solarize make much of little.
    assert_close(trained(found), trained(expected), mean=0.5)
    for crops in (1, 5):
        ours, theirs = (list(eval_batches(one.val, one, batch_size=16, crops=crops)) for one in (found, expected))
        assert_close(ours, theirs, mean=0.01)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(image_root, workers):
    found = image_folders(str(image_root), preprocess=Preprocess(16), backend="nvjpeg", on_error="skip")
    Path(found.train.name(4)).write_bytes(b"broken")
    assert_same(trained(found, workers=workers), trained(found))
    ours = list(eval_batches(found.val, found, batch_size=5, workers=workers))
    assert_same(ours, list(eval_batches(found.val, found, batch_size=5)))


def test_a_resumed_run_sees_what_an_undisturbed_one_would(image_root):
    found = image_folders(str(image_root), preprocess=Preprocess(16), backend="nvjpeg")
    whole = trained(found, steps=range(6))
    assert_same(trained(found, steps=range(3, 6)), whole[3:])
    assert not torch.equal(whole[0].images, whole[3].images)


def test_micro_batches_are_parts_of_the_batch(image_root):
    found = image_folders(str(image_root), preprocess=Preprocess(16), backend="nvjpeg")
    (whole,), parts = trained(found, steps=range(1)), trained(found, steps=range(1), accumulate=4)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(0, 2**63 - 1),
    st.sampled_from([FULL, *AUGMENTS.values()]),
    st.sampled_from([Preprocess(24), Preprocess(24, resize=30)]),
)
def test_draws_are_those_of_the_cpu_path(size, key, augment, preprocess):
    if max(size) > 100 * min(size):
        return
    image = Image.fromarray(np.broadcast_to(noise(size[0], 1), (size[1], size[0], 3)).copy())
    expected = augment(image, preprocess, key)
    draws = augment.draw(image.size, preprocess, key)
    view = draws.view
    pixels = view.cut(open_picture(image, "pillow").resized(view.box, view.size, "bicubic"), 24)[0]
    pixels = pixels[:, ::-1].copy() if draws.flip else pixels
    for operation in draws.operations:
        pixels = operation(pixels)
    found = pixels.copy()
    if draws.erase is not None:
        left, top, width, height = draws.erase
        found[top : top + height, left : left + width] = [124, 116, 104]
    np.testing.assert_array_equal(found, expected)


# --- what the device cannot decode ---


def damaged():
    """Return a JPEG whose header and end are sound, and nothing in between: no decoder reads it."""
    file = bytearray(encoded(smooth(90, 70), quality=90))
    scan = file.index(b"\xff\xda")
    huffman = file.index(b"\xff\xc4")
    # A table of Huffman codes that says it holds more than there can be.
    file[huffman + 5 : huffman + 21] = b"\xff" * 16
    assert huffman < scan
    with pytest.raises(DecodeError):
        decode(bytes(file))
    return bytes(file)


class _Blind:
    """A decoder that cannot read some files, as nvJPEG cannot read some that libjpeg can."""

    def __init__(self, unread):
        self.unread = unread

    def __call__(self, files, boxes):
        found = decode_on_cpu(files, boxes)
        return [None if file.tobytes() in self.unread else one for file, one in zip(files, found, strict=True)]


def test_what_only_the_cpu_reads_is_read_there(monkeypatch):
    files = [encoded(smooth(60 + number, 50)) for number in range(12)]
    preprocess = Preprocess(16)
    expected = trained(data(files, "simplejpeg", preprocess))
    monkeypatch.setattr("effnet_train.data.loader.decoder_on", lambda device, backend: _Blind(files))
    assert_same(trained(data(files, "nvjpeg", preprocess)), expected)
    monkeypatch.setattr("effnet_train.data.loader.decoder_on", lambda device, backend: _Blind(files[3:6]))
    assert_close(trained(data(files, "nvjpeg", preprocess)), expected, mean=0.5)


def test_damage_that_only_decoding_finds_is_reported_as_on_the_cpu():
    files = [encoded(smooth(60 + number, 50)) for number in range(12)]
    files[4] = files[5] = damaged()
    for job in ("train", "val"):
        results = []
        for backend in ("simplejpeg", "nvjpeg"):
            found = data(files, backend, Preprocess(16), on_error="skip")
            plain = Augment()
            results.append(
                trained(found, plain) if job == "train" else list(eval_batches(found.val, found, batch_size=5))
            )
        expected, ours = results
        assert [batch.errors for batch in ours] == [batch.errors for batch in expected]
        assert sum(len(batch.errors) for batch in ours) >= 2
        assert_close(ours, expected, mean=0.5)
        found = data(files, "nvjpeg", Preprocess(16))
        with pytest.raises(DataError, match=r"cannot read the image images\[[45]\]: .*data.on_error=skip"):
            trained(found) if job == "train" else list(eval_batches(found.val, found, batch_size=5))


def test_a_batch_of_which_nothing_can_be_read():
    found = data([b"broken"] * 4, "nvjpeg", Preprocess(16), on_error="skip")
    for crops in (1, 5):
        (batch,) = eval_batches(found.val, found, batch_size=4, crops=crops)
        assert batch.images.shape == ((0, 16, 16, 3) if crops == 1 else (0, 5, 16, 16, 3))
        assert len(batch.labels) == 0
        assert len(batch.errors) == 4
    with pytest.raises(DataError, match="10 images in a row cannot be read"):
        trained(found)
    # All of a batch found to be damaged on the device.
    found = data([damaged()] * 4, "nvjpeg", Preprocess(16), on_error="skip")
    (batch,) = eval_batches(found.val, found, batch_size=4)
    assert batch.images.shape == (0, 16, 16, 3)
    assert len(batch.errors) == 4


def test_what_shrinks_too_much_is_scaled_on_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "effnet_train.data.loader.decoder_on",
        lambda device, backend: (
            lambda files, boxes: [asked.append(box) for box in boxes] or decode_on_cpu(files, boxes)
        ),
    )
    files = [encoded(smooth(8 * MOST_SHRUNK + 9, 8 * MOST_SHRUNK + 9)), encoded(smooth(8 * MOST_SHRUNK - 9, 200))]
    preprocess = Preprocess(8, crop_padding=0)
    found = data(files, "nvjpeg", preprocess)
    (batch,) = eval_batches(found.val, found, batch_size=2)
    assert asked == [central_box(8 * MOST_SHRUNK - 9, 200, preprocess)]
    expected = data(files, "simplejpeg", preprocess)
    assert_close([batch], list(eval_batches(expected.val, expected, batch_size=2)), mean=0.5)


# Bilinear weights are small fractions, by which many values are halves or nearly: those may go either way.
@pytest.mark.parametrize(("interpolation", "differing"), [("bicubic", 1e-3), ("bilinear", 0.05)])
def test_scaling_is_pillows(interpolation, differing):
    # Sizes for which all Pillows scale rows first.
    for width, height, size in ((83, 50, (24, 32)), (300, 200, (61, 75)), (40, 30, (64, 64)), (24, 50, (24, 60))):
        pixels = noise(width, height)
        expected = np.array(Image.fromarray(pixels).resize(size, Image.Resampling[interpolation.upper()]))
        found = scaled(torch.from_numpy(pixels), size, interpolation).permute(1, 2, 0)
        found = rounded_(found).to(torch.uint8).numpy().astype(int)
        # Pillow's weights have 22 bits, floats 24.
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < differing
    assert torch.equal(scaled(torch.from_numpy(pixels), (24, 50), interpolation).permute(1, 2, 0), torch.tensor(pixels))


def test_boxes_are_told_to_nvimagecodec_as_they_are_meant():
    codec = pytest.importorskip("nvidia.nvimgcodec", reason="the extra nvjpeg is not installed")
    decoder = codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
        max_num_cpu_threads=1,
        options=":fancy_upsampling=1",
    )
    tags = Image.Exif()
    tags[0x0112] = 6  # turned, which is not looked at
    file, box = encoded(Image.fromarray(smooth(157, 117)), exif=tags, subsampling=2), (13, 22, 70, 61)
    streams = [code_stream(codec, np.frombuffer(file, np.uint8), box)]
    (image,) = decoder.decode(streams, params=decode_params(codec))
    np.testing.assert_array_equal(np.asarray(image), pillows(file, box))


# --- running ahead ---


def test_one_batch_is_made_while_another_is_used():
    made, used = [], []

    def make():
        made.append(threading.current_thread().name)
        return len(made) if len(made) < 5 else None

    for number in ahead(make, CPU, lambda _: ()):
        used.append(number)
        deadline = time.monotonic() + 10
        while len(made) < number + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        # The next one exactly: no more is held than one.
        assert len(made) == number + 1
    assert used == [1, 2, 3, 4]
    assert all(name.startswith("device-batches") for name in made)


def test_an_error_in_making_is_raised_where_the_batch_was_due_and_no_thread_stays():
    numbers = iter([1, 2])

    def make():
        try:
            return next(numbers)
        except StopIteration:
            raise FloatingPointError("no more") from None

    found = ahead(make, CPU, lambda _: ())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(FloatingPointError, match="no more"):
        next(found)
    left = ahead(lambda: 1, CPU, lambda _: ())
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("device-batches")]


# --- what is refused ---


def test_a_device_backend_needs_a_gpu():
    with pytest.raises(ValueError, match=r"data.backend=nvjpeg works on a GPU, and device=cpu is none: .*simplejpeg"):
        check_device("nvjpeg", CPU, Preprocess(16))
    check_device("simplejpeg", CPU, Preprocess(16))


def test_other_filters_and_policies_are_refused(monkeypatch):
    monkeypatch.setattr("effnet_train.data.device_batches.import_nvimgcodec", lambda backend: None)
    cuda = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"preprocess.interpolation=lanczos is none of bicubic, bilinear"):
        check_device("nvjpeg", cuda, Preprocess(16, interpolation="lanczos"))

    def policy(image, generator):
        return image

    with pytest.raises(ValueError, match=r"augment.policy=function has no method draw"):
        check_device("nvjpeg", cuda, Preprocess(16), Augment(policy=policy))
    check_device("nvjpeg", cuda, Preprocess(16), FULL)
    check_device("pillow", CPU, Preprocess(16, interpolation="lanczos"), Augment(policy=policy))


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(ImportError, match=r"data.backend=nvjpeg needs .*pip install 'effnet-train\[nvjpeg\]'"):
        check_device("nvjpeg", torch.device("cuda"), Preprocess(16))


# --- on a GPU ---


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda", 0)


def pillows(file, box):
    left, top, width, height = box
    return np.array(decode(file))[top : top + height, left : left + width].astype(int)


@pytest.mark.gpu
def test_nvjpeg_decodes_boxes_as_pillow(gpu, imagenet_jpegs):
    decoder, files = NvjpegDecoder(gpu), list(imagenet_jpegs.values())
    boxes = []
    for key, file in enumerate(files):
        width, height = decode(file).size
        left, top = random.Random(key).randrange(width // 2), random.Random(-key - 1).randrange(height // 2)
        boxes.append((0, 0, width, height) if key % 2 else (left, top, width // 2, height // 2))
    found = decoder([np.frombuffer(file, np.uint8) for file in files], boxes)
    unread = 0
    for image, file, box in zip(found, files, boxes, strict=True):
        unread += image is None
        if image is not None:
            assert image.device == gpu
            assert image.shape == (box[3], box[2], 3)
            assert np.abs(image.cpu().numpy() - pillows(file, box)).mean() < 2
    assert unread < 3  # CMYK at most


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"subsampling": 2}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_nvjpeg_decodes_all_plain_jpegs(gpu, options, mode):
    file = encoded(Image.fromarray(smooth(157, 117)).convert(mode), **options)
    boxes = [(0, 0, 157, 117), (13, 22, 70, 61), (140, 100, 17, 17)]
    for image, box in zip(NvjpegDecoder(gpu)([np.frombuffer(file, np.uint8)] * 3, boxes), boxes, strict=True):
        assert image is not None
        assert np.abs(image.cpu().numpy() - pillows(file, box)).mean() < 2


@pytest.mark.gpu
def test_nvjpeg_gives_the_same_pixels_every_time_and_in_any_batch(gpu, imagenet_jpegs):
    decoder = NvjpegDecoder(gpu)
    files = [np.frombuffer(file, np.uint8) for file in list(imagenet_jpegs.values())[:16]]
    boxes = [(3, 5, 60, 50)] * 16
    together, again = decoder(files, boxes), decoder(files, boxes)
    alone = [decoder([file], [(3, 5, 60, 50)])[0] for file in files]
    for one, two, three in zip(together, again, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_on_a_gpu_decoded_images_have_the_cpus_pixels(gpu, decoded, augment):
    # What the CPU has scaled: all that is left are the device's operations.
    preprocess = Preprocess(32)
    expected = trained(data(decoded, "pillow", preprocess), augment)
    assert_same(trained(data(decoded, "nvjpeg", preprocess), augment, device=gpu), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_photographs_on_a_gpu(gpu, imagenet_jpegs, workers):
    files, preprocess = list(imagenet_jpegs.values()), Preprocess(112)
    found, expected = (data(files, backend, preprocess) for backend in ("nvjpeg", "pillow"))
    ours = trained(found, Augment(erase=0.3), device=gpu, workers=workers)
    assert all(batch.images.device == gpu for batch in ours)
    assert_close(ours, trained(expected, Augment(erase=0.3)), mean=2)
    assert_same(
        trained(found, device=gpu, workers=workers),
        [batch._replace(images=batch.images.cpu()) for batch in trained(found, device=gpu)],
    )
    for crops in (1, 5):
        ours = list(eval_batches(found.val, found, batch_size=16, crops=crops, device=gpu, workers=workers))
        assert_close(ours, list(eval_batches(expected.val, expected, batch_size=16, crops=crops)), mean=2)


@pytest.mark.gpu
def test_on_a_gpu_damage_is_reported_as_on_the_cpu(gpu):
    files = [encoded(smooth(60 + number, 50)) for number in range(12)]
    files[4] = files[7][: len(files[7]) // 2]
    files[5] = encoded(smooth(50, 50), "PNG")
    found, expected = (data(files, backend, Preprocess(16), "skip") for backend in ("nvjpeg", "pillow"))
    ours, theirs = trained(found, Augment(), device=gpu), trained(expected, Augment())
    assert [batch.errors for batch in ours] == [batch.errors for batch in theirs]
    assert sum(len(batch.errors) for batch in ours) > 0
    assert_close(ours, theirs, mean=2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_never_waits_for_the_gpu(gpu, imagenet_jpegs):
    files = list(imagenet_jpegs.values())
    found = data(files, "nvjpeg", Preprocess(112))
    expected = [batch._replace(images=batch.images.cpu()) for batch in trained(found, device=gpu)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = trained(found, device=gpu, workers=2)
        # To be used at once, by another stream than that which made them.
        doubled = [batch.images.to(torch.int16) * 2 for batch in ours]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(doubled, expected, strict=True):
        assert torch.equal(one.cpu(), other.images.to(torch.int16) * 2)


@pytest.mark.gpu
def test_a_gpu_without_nvjpeg_says_which_extra_to_install(gpu, monkeypatch):
    monkeypatch.setattr(NvjpegDecoder, "__call__", lambda self, files, boxes: [None for _ in files])
    with pytest.raises(ImportError, match=r"the library nvJPEG, .*pip install 'effnet-train\[nvjpeg\]'"):
        NvjpegDecoder(gpu)
