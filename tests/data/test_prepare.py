import fcntl
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet_train.data import pieces
from effnet_train.data.archives import shards
from effnet_train.data.decode import decode
from effnet_train.data.manifest import check_whole, damaged
from effnet_train.data.pieces import Options, shrink
from effnet_train.data.prepare import write
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import FolderSource, Subset

SOURCE = {"made": "here"}


@pytest.fixture
def photos(imagenet_jpegs, tmp_path):
    """Return real images: train/ with three classes, 23 images in all, val/ with the same, 8 images."""
    root = tmp_path / "photos"
    for place, data in enumerate(list(imagenet_jpegs.values())[:31]):
        folder = root / ("train" if place < 23 else "val") / ("ant", "bee", "cow")[place % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place:02d}.JPEG").write_bytes(data)
    return {split: FolderSource(root / split) for split in ("train", "val")}


def contents(source):
    """Return how often each (bytes, class name) is there."""
    read = [source.read(index) for index in range(len(source))]
    return Counter((data, source.classes[label]) for data, label in read)


def read_shards(folder, tmp_path):
    return shards(
        str(folder), train="train-*.tar", val="val-*.tar", preprocess=Preprocess(8), cache=str(tmp_path / "c")
    )


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_every_image_once(photos, tmp_path, workers):
    out = tmp_path / "out"
    manifest = write(photos, out, Options("shards", images=5), source=SOURCE, workers=workers)
    data = read_shards(out, tmp_path)
    assert contents(data.train) == contents(photos["train"])
    assert contents(data.val) == contents(photos["val"])
    assert data.classes == ("ant", "bee", "cow")
    names = [*(f"train-{i:06d}" for i in range(5)), "val-000000", "val-000001"]
    assert sorted(os.listdir(out)) == sorted(
        ["classes.txt", "manifest.json", *(f"{name}{suffix}" for name in names for suffix in (".tar", ".index.json"))]
    )
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["complete"]
    for record in manifest["pieces"].values():
        assert hashlib.sha256((out / record["file"]).read_bytes()).hexdigest() == record["sha256"]
        assert (out / record["file"]).stat().st_size == record["bytes"]
    assert sum(record["images"] for record in manifest["pieces"].values()) == 31
    assert damaged(out) == []


def test_webdataset_reads_the_shards(photos, tmp_path):
    """The library whose layout it is."""
    write(photos, tmp_path / "out", Options("shards", images=4), source=SOURCE)
    code = (
        "import sys, hashlib, webdataset\n"
        "for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):\n"
        "    print(sample['__key__'], int(sample['cls']), hashlib.sha256(sample['jpg']).hexdigest())\n"
    )
    names = [str(tmp_path / f"out/val-{i:06d}.tar") for i in (0, 1)]
    # In a process of its own: it leaves files open.
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=60)
    ours = [(Path(photos["val"].name(i)).stem, *photos["val"].read(i)) for i in range(8)]
    expected = [f"{key} {label} {hashlib.sha256(data).hexdigest()}" for key, data, label in ours]
    assert done.stdout.splitlines() == expected, done.stderr


def test_the_index_beside_is_that_of_the_tar(photos, tmp_path):
    """As the headers tell, read by Python's tarfile."""
    write(photos, tmp_path / "out", Options("shards", images=5), source=SOURCE)
    for archive in (tmp_path / "out").glob("*.tar"):
        found = json.loads(archive.with_suffix(".index.json").read_text())
        with tarfile.open(archive) as tar:
            members = {member.name: member for member in tar}
            labels = {name.removesuffix(".cls"): int(tar.extractfile(name).read()) for name in members if "cls" in name}
        images = [[m.offset_data, m.size, labels[n.removesuffix(".jpg")], n] for n, m in members.items() if "jpg" in n]
        assert found == {"version": 1, "bytes": archive.stat().st_size, "images": images}
    first = tmp_path / "out/val-000000.index.json"
    first.write_text(first.read_text().replace(",0,", ",1,"))
    assert damaged(tmp_path / "out") == [f"{first}: not what was written"]


NAMES = ["a/x/1.png", "a/y/1.png", "b/1.png", "b/two.dots.PNG", "b/" + "long" * 50 + ".png", "b/é猫.jpeg"]


def test_shards_keep_the_images_names(tmp_path):
    """But for dots, at which a sample's key would end, and names that are there already."""
    for number, path in enumerate(NAMES):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(tmp_path / "in" / path)
    source = FolderSource(tmp_path / "in")
    write({"train": source, "val": source}, tmp_path / "out", Options("shards", seed=None), source=SOURCE)
    data = read_shards(tmp_path / "out", tmp_path)
    names = [data.val.name(i).partition(".tar:")[2] for i in range(6)]
    assert names == ["1.png", "1-000001.png", "1-000002.png", "long" * 50 + ".png", "two_dots.png", "é猫.jpg"]
    assert contents(data.val) == contents(source)
    for index in (tmp_path / "out").glob("*.index.json"):
        index.unlink()
    scanned = shards(
        str(tmp_path / "out"), train="train-*.tar", val="val-*.tar", preprocess=Preprocess(8), cache=str(tmp_path / "d")
    )
    assert [scanned.val.name(i) for i in range(6)] == [data.val.name(i) for i in range(6)]
    assert contents(scanned.val) == contents(source)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 17 * 512, 17 * 512 + 1, 30_000])
@pytest.mark.parametrize("name", ["a.jpg", "long" * 50 + ".jpg", "\u732b.jpg"])
def test_the_size_of_a_shard_is_known_before(length, name):
    stream, content = io.BytesIO(), b"x" * length
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(pieces.member(name, content), io.BytesIO(content))
    assert pieces.shard_size(pieces.member_size(pieces.member(name, content))) == len(stream.getvalue())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resize", [None, 100])
def test_shards_of_a_size(photos, tmp_path, resize, workers):
    """None is larger, and none could have held the next image too; images are another limit."""
    limit = 700_000 if resize is None else 60_000
    options = Options("shards", images=7, megabytes=limit / 1e6, resize=resize)
    write(photos, tmp_path / "out", options, source=SOURCE, workers=workers)
    found = []
    for archive in sorted((tmp_path / "out").glob("train-*.tar")):
        with tarfile.open(archive) as tar:
            ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar if member.name.endswith(".cls")]
        found.append((archive.stat().st_size, ends))
    assert sum(len(ends) for _, ends in found) == 23
    assert max(len(ends) for _, ends in found) <= 7
    assert max(size for size, _ in found) <= limit
    for (_, ends), (_, following) in itertools.pairwise(found):
        together = -(-(ends[-1] + following[0] + 1024) // 10240) * 10240
        assert len(ends) == 7 or together > limit
    assert len(found) > 4  # the size counts
    assert contents(read_shards(tmp_path / "out", tmp_path).train).total() == 23


def test_shards_of_a_size_go_on(photos, tmp_path):
    options, out = Options("shards", images=None, megabytes=0.6), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write({**photos, "train": _StopAfter(photos["train"], 23 + 9)}, out, options, source=SOURCE)
    resumed = _StopAfter(photos["train"], 22)  # fewer than all: sizes are known
    write({**photos, "train": resumed}, out, options, source=SOURCE)
    write(photos, tmp_path / "whole", options, source=SOURCE)
    assert tree(out) == tree(tmp_path / "whole")
    # An image that is larger than all that a shard may hold has one to itself.
    write(photos, tmp_path / "small", Options("shards", megabytes=0.001), source=SOURCE)
    assert len(list((tmp_path / "small").glob("*.tar"))) == 31


def test_the_seed_settles_the_order_of_train_only(photos, tmp_path):
    def order(name, split, **options):
        write(photos, tmp_path / name, Options("shards", images=99, **options), source=SOURCE)
        with tarfile.open(tmp_path / name / f"{split}-000000.tar") as tar:
            return [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]

    plain = [photos["train"].read(i)[0] for i in range(23)]
    assert order("a", "train", seed=None) == plain
    first, second = order("b", "train", seed=0), order("c", "train", seed=1)
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != second
    assert plain not in (first, second)
    assert order("d", "train", seed=0) == first
    assert order("b", "val", seed=0) == [photos["val"].read(i)[0] for i in range(8)]
    assert tree(tmp_path / "b") == tree(tmp_path / "d")


def test_there_and_back_is_the_same(photos, tmp_path):
    write(photos, tmp_path / "shards", Options("shards", images=5), source=SOURCE)
    data = read_shards(tmp_path / "shards", tmp_path)
    write({"train": data.train, "val": data.val}, tmp_path / "folder", Options("folder"), source=SOURCE)
    for split in ("train", "val"):
        assert contents(FolderSource(tmp_path / "folder" / split)) == contents(photos[split])


def test_folders_keep_names_and_bytes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "FOLDER_PIECE", 4)
    out = tmp_path / "out"
    write(photos, out, Options("folder"), source=SOURCE)
    written = {name: data for name, data in tree(out).items() if name not in ("manifest.json", "classes.txt")}
    assert written == tree(tmp_path / "photos")


def test_resized_images(imagenet_jpegs):
    options = Options("shards", resize=100)
    for data in list(imagenet_jpegs.values())[:10]:
        with Image.open(io.BytesIO(shrink(data, options))) as small:
            assert min(small.size) == 100
            assert (small.mode, small.format) == ("RGB", "JPEG")
            whole = decode(data)
            # In brightness: colour has half the pixels.
            reference = np.asarray(whole.resize(small.size, Image.Resampling.BICUBIC).convert("L"), dtype=float)
            assert np.abs(np.asarray(small.convert("L"), dtype=float) - reference).mean() < 2
            ratio = whole.width / whole.height
            assert small.width / small.height == pytest.approx(ratio, abs=0.01)
    data = next(iter(imagenet_jpegs.values()))
    assert len(shrink(data, Options("shards", resize=100, quality=50))) < len(shrink(data, options))
    full = Options("shards", resize=100, subsampling="4:4:4")
    assert [Image.open(io.BytesIO(shrink(data, o))).layer[0][1:3] for o in (options, full)] == [(2, 2), (1, 1)]


def test_small_images_are_left_alone_and_others_lose_what_is_no_pixel():
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    noise = Image.effect_noise((90, 60), 50)
    noise.save(stream, "JPEG", exif=exif, comment=b"secret", icc_profile=b"a profile")
    assert shrink(stream.getvalue(), Options("shards", resize=60)) is None
    small = shrink(stream.getvalue(), Options("shards", resize=30))
    assert b"secret" not in small
    with Image.open(io.BytesIO(small)) as image:
        assert (image.size, image.mode) == ((45, 30), "RGB")
        assert not image.getexif()
        assert "icc_profile" not in image.info


def test_images_that_are_decoded_already_lose_nothing(tmp_path):
    class Pictures:
        classes = ("a", "b")

        def __len__(self):
            return 3

        def read(self, index):
            return Image.new("RGB", (9, 5), (index, 7, 8)), index % 2

        def name(self, index):
            return f"Pictures[0][{index}]"

    write({"val": Pictures()}, tmp_path / "out", Options("folder"), source=SOURCE)
    found = FolderSource(tmp_path / "out/val")
    assert [os.path.relpath(found.name(i), tmp_path) for i in range(3)] == [
        "out/val/a/000000.png",
        "out/val/a/000002.png",
        "out/val/b/000001.png",
    ]
    assert decode(found.read(2)[0]).getpixel((0, 0)) == (1, 7, 8)


class _StopAfter:
    """Fails at the n-th image read."""

    def __init__(self, source, count):
        self.source, self.count, self.classes = source, count, source.classes

    def __len__(self):
        return len(self.source)

    def name(self, index):
        return self.source.name(index)

    def read(self, index):
        self.count -= 1
        if self.count < 0:
            raise KeyboardInterrupt
        return self.source.read(index)


@pytest.mark.parametrize("to", ["shards", "folder"])
@pytest.mark.parametrize("count", [0, 4, 12, 22])
def test_what_was_begun_goes_on(photos, tmp_path, monkeypatch, to, count):
    monkeypatch.setattr(pieces, "FOLDER_PIECE", 4)
    options, out, whole = Options(to, images=4), tmp_path / "out", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        write({**photos, "train": _StopAfter(photos["train"], count)}, out, options, source=SOURCE)
    begun = json.loads((out / "manifest.json").read_text())
    assert len(begun["pieces"]) == count // 4
    assert not begun["complete"]
    assert damaged(out)[0].endswith("not complete: run the same effnet-data again, which goes on")
    left = 23 - count // 4 * 4
    resumed = _StopAfter(photos["train"], left)  # just those that are missing
    write({**photos, "train": resumed}, out, options, source=SOURCE)
    assert resumed.count == 0
    write(photos, whole, options, source=SOURCE)
    assert tree(out) == tree(whole)


def test_a_lost_shard_is_made_again_and_a_changed_one_is_found(photos, tmp_path):
    out, options = tmp_path / "out", Options("shards", images=5)
    write(photos, out, options, source=SOURCE)
    before = tree(out)
    (out / "train-000001.tar").unlink()
    (out / ".train-000001.tar.123.tmp").write_bytes(b"half")
    changed = bytearray(before["train-000002.tar"])
    changed[5000] ^= 1
    (out / "train-000002.tar").write_bytes(changed)
    assert damaged(out) == [f"{out}/train-000001.tar: missing", f"{out}/train-000002.tar: not what was written"]
    (out / "train-000002.tar").unlink()
    write(photos, out, options, source=SOURCE)
    assert tree(out) == before


@pytest.fixture(params=["not ended", "a shard gone", "a shard cut"])
def broken(request, photos, tmp_path):
    """Return a folder of shards of which some are missing or short."""
    out = tmp_path / "out"
    write(photos, out, Options("shards", images=5), source=SOURCE)
    if request.param == "not ended":
        edit_manifest(out, complete=False)
    elif request.param == "a shard gone":
        (out / "train-000001.tar").unlink()
    else:
        os.truncate(out / "train-000001.tar", 5000)
    return out


def edit_manifest(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_not_whole_is_refused(broken):
    with pytest.raises(
        ValueError, match=rf"data\.root={broken} is not complete: .*as train-\{{000000\.\.000041\}}\.tar"
    ):
        check_whole(str(broken), {"train": "train-*.tar", "val": "val-*.tar"})
    # Shards that are named one by one are what is wanted, and their absence is told when they are opened.
    check_whole(str(broken), {"train": "train-{000002..000004}.tar", "val": "val-000000.tar"})


def test_what_is_whole_is_taken(photos, tmp_path):
    for to in ("shards", "folder"):
        write(photos, tmp_path / to, Options(to), source=SOURCE)
        check_whole(str(tmp_path / to), {"train": "train-*.tar" if to == "shards" else "train", "val": "val-*.tar"})
    edit_manifest(tmp_path / "folder", complete=False)
    with pytest.raises(ValueError, match=r"is not complete: .*move manifest\.json away"):
        check_whole(str(tmp_path / "folder"), {"train": "train", "val": "val"})


@pytest.mark.parametrize("content", ["[]", '{"name": "an app"}', None])
def test_a_manifest_of_another_program_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    check_whole(str(tmp_path), {"train": "train-*.tar"})
    assert damaged(tmp_path) == []


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"a')
    assert len(damaged(tmp_path)) == 1
    assert damaged(tmp_path)[0].startswith(f"{tmp_path}/manifest.json: cannot be read (Unterminated string")
    with pytest.raises(ValueError, match=r"manifest\.json: cannot be read .*: copy it again, or move it away"):
        check_whole(str(tmp_path), {"train": "train-*.tar"})


def test_another_output_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    write(photos, out, Options("shards", images=5), source=SOURCE)
    with pytest.raises(ValueError, match=r"holds other images: images was 5, now 6; resize was None, now 64\. Give"):
        write(photos, out, Options("shards", images=6, resize=64), source=SOURCE)
    with pytest.raises(ValueError, match="made was 'here', now 'there'"):
        write(photos, out, Options("shards", images=5), source={"made": "there"})
    fewer = {**photos, "val": Subset(photos["val"], np.arange(3))}
    with pytest.raises(ValueError, match="val was 8, now 3"):
        write(fewer, out, Options("shards", images=5), source=SOURCE)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged or of another program"):
        write(photos, out, Options("shards", images=5), source=SOURCE)
    with pytest.raises(ValueError, match=r"holds train and no manifest.json: choose an empty folder"):
        write(photos, tmp_path / "photos", Options("shards"), source=SOURCE)


def test_two_at_a_time_are_refused(photos, tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="is being written by another process"):
        write(photos, tmp_path, Options("shards"), source=SOURCE)
    os.close(descriptor)


def test_images_that_cannot_be_read(photos, tmp_path):
    bad = photos["train"].name(3)
    with open(bad, "r+b") as file:
        file.truncate(1000)
    options = Options("shards", images=6, resize=64)
    with pytest.raises(ValueError, match=rf"cannot read the image {bad}: .*set data.on_error=skip to leave it out"):
        write(photos, tmp_path / "out", options, source=SOURCE)
    manifest = write(photos, tmp_path / "out", options, source=SOURCE, on_error="skip")
    skipped = [text for record in manifest["pieces"].values() for text in record.get("skipped", [])]
    assert [text.partition(": ")[0] for text in skipped] == [bad]
    assert len(read_shards(tmp_path / "out", tmp_path).train) == 22
    # Without resizing nothing is decoded, and the bytes stay as they are.
    write(photos, tmp_path / "same", Options("shards"), source=SOURCE)
    assert contents(read_shards(tmp_path / "same", tmp_path).train) == contents(photos["train"])


def test_names_that_meet_lose_no_image_in_silence(tmp_path):
    for number, path in enumerate(("a/x/1.png", "a/y/1.png", "b/1.png")):
        (tmp_path / "in" / path).parent.mkdir(parents=True)
        Image.new("L", (4, 4), number).save(tmp_path / "in" / path)
    source = {"val": FolderSource(tmp_path / "in")}
    with pytest.raises(ValueError, match=r"3 images of val have become 2 files: .* to=shards keeps both"):
        write(source, tmp_path / "out", Options("folder"), source=SOURCE)
    assert write(source, tmp_path / "shards", Options("shards"), source=SOURCE)["complete"]


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden"])
def test_classes_that_are_no_folders_names(photos, tmp_path, name):
    photos["train"].classes = ("ant", name, "cow")
    with pytest.raises(ValueError, match="cannot be a folder's name: to=shards takes it"):
        write(photos, tmp_path / "out", Options("folder"), source=SOURCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "zip"}, "to=zip is not known: use folder or shards"),
        ({"subsampling": "4:1:0"}, "subsampling=4:1:0 is not known"),
        ({"images": 0}, "images=0 must be at least 1"),
        ({"megabytes": 0}, "megabytes=0 is the size of a shard: give more than 0, and to=shards, or null"),
        ({"megabytes": 3, "to": "folder"}, "megabytes=3 is the size of a shard"),
        ({"resize": 0}, "resize=0 must be at least 1"),
        ({"quality": 101}, "quality=101 must be at most 100"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"to": "shards", **options})
