import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from effnet_train.data.augment import Augment
from effnet_train.data.autoaugment import AutoAugment
from effnet_train.data.backends import open_picture
from effnet_train.data.datasets import Data, image_folders
from effnet_train.data.loader import DataError, _Shared, eval_batches, listing, train_batches
from effnet_train.data.order import Order
from effnet_train.data.preprocess import Preprocess, eval_image, five_crops
from effnet_train.data.sources import Subset
from effnet_train.distributed import STOP_SIGNALS

PREPROCESS = Preprocess(16)
MORE_WORKERS_THAN_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
AUGMENT = Augment(policy=AutoAugment(), erase=0.3)


class Numbers:
    """Images whose grey value and label tell their index; those in `broken` are no images."""

    classes = ("a", "b", "c")

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)
        self.asked = []

    def __len__(self):
        return self.count

    def read(self, index):
        self.asked.append(index)
        return b"broken" if index in self.broken else Image.new("RGB", (8, 8), (index,) * 3), index % 3

    def name(self, index):
        return f"numbers[{index}]"


def numbers(count, broken=(), on_error="raise"):
    source = Numbers(count, broken)
    return Data(source, source, None, Preprocess(4), on_error)


def seen(batch):
    """Return the indices of the images of a batch of `Numbers`."""
    return batch.images[:, 0, 0, 0].tolist()


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for part in ("images", "labels", "keys"):
            assert torch.equal(getattr(one, part), getattr(other, part)), part
            assert getattr(one, part).dtype == getattr(other, part).dtype
        assert one.errors == other.errors


def corrupt(data, index, content=b"broken"):
    Path(data.train.name(index)).write_bytes(content)


# --- training ---


@MORE_WORKERS_THAN_CORES
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(image_root, workers):
    data = image_folders(str(image_root), preprocess=PREPROCESS, on_error="skip")
    for index in (4, 11):
        corrupt(data, index)
    order = Order(len(data.train), 5, 0)

    def read(workers):
        return list(train_batches(data, AUGMENT, order, start=0, stop=8, workers=workers))

    expected = read(0)
    assert sum(len(batch.errors) for batch in expected) >= 4
    assert_same(read(workers), expected)


def test_workers_read_a_relative_folder_after_a_change_of_folder(image_root, monkeypatch):
    monkeypatch.chdir(image_root.parent)
    data = image_folders(image_root.name, preprocess=PREPROCESS)
    order = Order(len(data.train), 6, 0)
    assert len(list(train_batches(data, AUGMENT, order, start=0, stop=2, workers=1))) == 2


def test_start_goes_on_where_another_run_stopped(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)

    def read(start, stop):
        return list(train_batches(data, AUGMENT, Order(len(data.train), 4, 3), start=start, stop=stop))

    whole = read(0, 12)
    for start in (1, 4, 5, 11):
        assert_same(read(start, 12), whole[start:])
    # The same images again in the second epoch, but augmented otherwise: equal batches above are no accident.
    assert not torch.equal(whole[0].images, whole[9].images)
    assert list(train_batches(data, AUGMENT, Order(18, 4, 3), start=5, stop=5)) == []


def test_a_batch_is_the_order_decoded_and_augmented(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    order = Order(len(data.train), 6, 1)
    for step, batch in enumerate(train_batches(data, AUGMENT, order, start=0, stop=4)):
        indices, keys = order.batch(step)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (6, 16, 16, 3)
        assert batch.keys.tolist() == keys.tolist()
        assert batch.labels.tolist() == [data.train.read(index)[1] for index in indices]
        for pixels, index, key in zip(batch.images, indices, keys, strict=True):
            expected = AUGMENT(open_picture(data.train.read(index)[0], data.backend), PREPROCESS, int(key))
            np.testing.assert_array_equal(pixels.numpy(), expected)


def test_ranks_share_the_batches_of_one(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)

    def read(rank, world_size):
        order = Order(len(data.train), 6, 0, rank=rank, world_size=world_size)
        return list(train_batches(data, AUGMENT, order, start=0, stop=4))

    for whole, *parts in zip(read(0, 1), *(read(rank, 3) for rank in range(3)), strict=True):
        for name in ("images", "labels", "keys"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


# --- evaluation ---


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 6),
    broken=st.sets(st.integers(0, 39)),
)
def test_each_image_is_read_once_over_all_ranks(count, batch_size, world_size, broken):
    data = numbers(count, broken, on_error="skip")
    found, labels, errors, lengths = [], [], [], set()
    for rank in range(world_size):
        share = list(eval_batches(data.val, data, batch_size=batch_size, rank=rank, world_size=world_size))
        lengths.add(len(share))
        for batch in share:
            assert len(batch.labels) + len(batch.errors) <= batch_size
            assert len(batch.images) == len(batch.labels) == len(batch.keys)
            assert batch.keys.tolist() == seen(batch)
            found += seen(batch)
            labels += batch.labels.tolist()
            errors += batch.errors
    assert len(lengths) == 1  # ranks agree on something after each batch
    assert sorted(data.val.asked) == list(range(count))
    assert sorted(found) == [index for index in range(count) if index not in broken]
    assert labels == [index % 3 for index in found]
    assert sorted(error.partition(":")[0] for error in errors) == sorted(f"numbers[{i}]" for i in broken if i < count)


@MORE_WORKERS_THAN_CORES
@pytest.mark.parametrize("workers", [1, 3])
def test_evaluation_does_not_depend_on_workers(image_root, workers):
    data = image_folders(str(image_root), preprocess=PREPROCESS, on_error="skip")
    Path(data.val.name(2)).write_bytes(b"broken")
    expected = list(eval_batches(data.val, data, batch_size=5))
    assert sum(len(batch.labels) for batch in expected) == len(data.val) - 1
    assert_same(list(eval_batches(data.val, data, batch_size=5, workers=workers)), expected)


def test_evaluation_takes_the_central_crop(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    images = torch.cat([batch.images for batch in eval_batches(data.val, data, batch_size=5)])
    expected = [eval_image(open_picture(data.val.read(i)[0], data.backend), PREPROCESS) for i in range(len(data.val))]
    np.testing.assert_array_equal(images.numpy(), np.stack(expected))


def test_evaluation_takes_five_crops(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS, on_error="skip")
    Path(data.val.name(2)).write_bytes(b"broken")
    batches = list(eval_batches(data.val, data, batch_size=5, crops=5))
    assert [batch.images.shape for batch in batches] == [(4, 5, 16, 16, 3), (5, 5, 16, 16, 3), (2, 5, 16, 16, 3)]
    keys = torch.cat([batch.keys for batch in batches]).tolist()
    assert keys == [index for index in range(12) if index != 2]
    expected = [five_crops(open_picture(data.val.read(i)[0], data.backend), PREPROCESS) for i in keys]
    np.testing.assert_array_equal(torch.cat([batch.images for batch in batches]).numpy(), np.stack(expected))


def test_more_ranks_than_images():
    data = numbers(2)
    shares = [[seen(b) for b in eval_batches(data.val, data, batch_size=4, rank=r, world_size=3)] for r in range(3)]
    assert shares == [[[0]], [[1]], [[]]]


def test_batch_of_broken_images_alone():
    data = numbers(6, broken=(2, 3), on_error="skip")
    batches = list(eval_batches(data.val, data, batch_size=2))
    assert [seen(batch) for batch in batches] == [[0, 1], [], [4, 5]]
    assert batches[1].images.shape == (0, 4, 4, 3)
    assert len(batches[1].errors) == 2


# --- images that cannot be read ---

REMEDY = "mend or remove it, or set data.on_error=skip to go on without it"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file holds no image"), (b"GET / HTTP", "the file holds no image"), (None, "truncated")],
)
def test_corrupt_image_is_named(image_root, workers, content, reason):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    path = image_root / "train/bee/a.jpg"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    order = Order(len(data.train), 6, 0)
    with pytest.raises(DataError, match=rf"cannot read the image {path}: .*{reason}.*; {REMEDY}"):
        list(train_batches(data, AUGMENT, order, start=0, stop=3, workers=workers))
    with pytest.raises(DataError, match=rf"cannot read the image {path}: .*{reason}.*; {REMEDY}"):
        list(eval_batches(data.train, data, batch_size=4, workers=workers))


def test_vanished_image_is_named(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    (image_root / "train/cow/c.JPEG").unlink()
    with pytest.raises(DataError, match=rf"{image_root}/train/cow/c.JPEG: .*No such file or directory.*; {REMEDY}"):
        list(train_batches(data, AUGMENT, Order(18, 6, 0), start=0, stop=3))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_forbidden_image_is_named(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    (image_root / "train/cow/c.JPEG").chmod(0)
    with pytest.raises(DataError, match=rf"{image_root}/train/cow/c.JPEG: .*Permission denied.*; {REMEDY}"):
        list(eval_batches(data.train, data, batch_size=4))


def test_next_image_takes_a_corrupt_ones_place():
    broken = {3, 7, 8, 19}
    data = numbers(20, broken, on_error="skip")
    augment = Augment(area=None, flip=0)
    order = Order(20, 5, 0)
    for step, batch in enumerate(train_batches(data, augment, order, start=0, stop=8)):
        indices, keys = order.batch(step)
        # 8 is broken too, and after the last comes the first.
        expected = [{3: 4, 7: 9, 8: 9, 19: 0}.get(index, index) for index in indices.tolist()]
        assert seen(batch) == expected
        assert batch.labels.tolist() == [index % 3 for index in expected]
        assert batch.keys.tolist() == keys.tolist()
        assert len(batch.errors) == sum({3: 1, 7: 2, 8: 1, 19: 1}.get(index, 0) for index in indices.tolist())


def test_nine_corrupt_images_in_a_row_are_passed_over_and_ten_are_too_many():
    augment, order = Augment(area=None, flip=0), Order(30, 30, 0)
    data = numbers(30, broken=range(5, 14), on_error="skip")
    (batch,) = train_batches(data, augment, order, start=0, stop=1)
    assert sorted(seen(batch)).count(14) == 10

    data = numbers(30, broken=range(5, 15), on_error="skip")
    with pytest.raises(
        DataError, match=r"10 images in a row cannot be read, the last numbers\[\d+\]: .*; mend or remove"
    ):
        list(train_batches(data, augment, order, start=0, stop=1))


def test_fewer_images_than_substitutes():
    data = numbers(3, broken=(0, 1), on_error="skip")
    (batch,) = train_batches(data, Augment(area=None, flip=0), Order(3, 3, 0), start=0, stop=1)
    assert seen(batch) == [2, 2, 2]


def test_other_errors_are_not_taken_for_corrupt_images():
    class Faulty(Numbers):
        def read(self, index):
            raise KeyError("a mistake of ours")

    data = Data(Faulty(3), Faulty(3), None, Preprocess(4), "skip")
    with pytest.raises(KeyError, match="a mistake of ours"):
        list(eval_batches(data.val, data, batch_size=2))


def test_want_of_open_files_is_no_corrupt_image(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS, on_error="skip")
    expected = list(eval_batches(data.val, data, batch_size=4))  # what needs to be imported is
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, former[1]))
    try:
        with pytest.raises(OSError, match=rf"Too many open files: '{image_root}"):
            list(eval_batches(data.val, data, batch_size=4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)
    assert_same(list(eval_batches(data.val, data, batch_size=4)), expected)


def test_a_reader_that_stops_early_leaves_no_workers(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    batches = train_batches(data, AUGMENT, Order(18, 3, 0), start=0, stop=1000, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    del batches
    assert multiprocessing.active_children() == []


class Deadly(Numbers):
    """Whose reader dies at the sixth image, when the two batches of two before have been sent."""

    def read(self, index):
        if index == 5:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def ended(pid):
    """Say whether a process is dead, if only as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(
    ("backend", "noticed"),
    [("simplejpeg", True), ("simplejpeg", False), pytest.param("hybrid", True, marks=pytest.mark.slow)],
)
def test_a_dead_worker_is_told_and_nothing_hangs(backend, noticed):
    """Also where the server that workers come from has not noticed yet."""
    source = Deadly(8)
    batches = eval_batches(source, Data(source, source, None, Preprocess(4), "raise", backend), batch_size=2, workers=1)
    assert len(next(batches).labels) == 2
    (worker,), server = multiprocessing.active_children(), forkserver._forkserver._forkserver_pid
    if not noticed:
        os.kill(server, signal.SIGSTOP)
    try:
        until = time.monotonic() + 20
        while not ended(worker.pid):
            assert time.monotonic() < until
            time.sleep(0.02)
        threading.Timer(0.5, os.kill, (server, signal.SIGCONT)).start()
        with pytest.raises(RuntimeError, match=r"^DataLoader worker .*exited unexpectedly"):
            list(batches)
    finally:
        os.kill(server, signal.SIGCONT)


def test_no_batches_need_no_memory(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    assert list(train_batches(data, AUGMENT, Order(18, 6, 0), start=2, stop=2, workers=1)) == []
    assert list(eval_batches(Subset(data.val, np.arange(0)), data, batch_size=4, workers=1)) == []


def test_memory_is_shared_for_no_more_batches_than_there_are(image_root, monkeypatch):
    rooms, make = [], _Shared.__init__
    monkeypatch.setattr(
        _Shared, "__init__", lambda self, images, *counts: rooms.append(counts) or make(self, images, *counts)
    )
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    for size in (5, 20):
        expected = list(eval_batches(data.val, data, batch_size=size))
        assert_same(list(eval_batches(data.val, data, batch_size=size, workers=2)), expected)
    assert len(list(train_batches(data, AUGMENT, Order(18, 6, 0), start=0, stop=7, workers=2))) == 7
    assert rooms == [(5, 3), (12, 1), (6, 5)]


# What a container with little shared memory does: files may have 100 kB.
LITTLE_MEMORY = """
import resource, sys
from effnet_train.data.augment import Augment
from effnet_train.data.datasets import image_folders
from effnet_train.data.loader import train_batches
from effnet_train.data.order import Order
from effnet_train.data.preprocess import Preprocess

data = image_folders(sys.argv[1], preprocess=Preprocess(64))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    list(train_batches(data, Augment(), Order(18, 6, 0), start=0, stop=9, workers=1))
except ValueError as error:
    print(error)
"""


def test_too_little_shared_memory_is_told(image_root):
    found = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(image_root)], capture_output=True, text=True, timeout=60
    )
    assert re.match(
        r"data workers need 0\.0 GB of shared memory for 3 batches of 6 images, which is not to be had \(.*\): "
        r"set fewer workers=, more accumulate=, or give a container more",
        found.stdout,
    ), found


def test_skipped_images_are_listed_once(tmp_path):
    """Over epochs, evaluations, and starts of a run."""
    data, file = numbers(6, broken=(2, 3), on_error="skip"), tmp_path / "bad_images.txt"
    for _ in range(2):
        batches = list(listing(eval_batches(data.val, data, batch_size=4), file))
        assert [seen(batch) for batch in batches] == [[0, 1], [4, 5]]
    assert [line.partition(":")[0] for line in file.read_text().splitlines()] == ["numbers[2]", "numbers[3]"]
    whole = numbers(6)
    list(listing(eval_batches(whole.val, whole, batch_size=4), tmp_path / "none.txt"))
    assert not (tmp_path / "none.txt").exists()


def test_workers_are_born_with_requests_to_stop_blocked() -> None:
    """All of them: a scheduler sends SIGTERM to every process of a job. In a fresh process, as servers start once."""
    program = (
        "import multiprocessing.forkserver as server, pathlib\n"
        "from effnet_train.data import workers\n"
        "workers.worker_context()\n"
        "status = pathlib.Path(f'/proc/{server._forkserver._forkserver_pid}/status').read_text()\n"
        "print(status.partition('SigBlk:')[2].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    blocked = int(done.stdout, 16)
    assert [number.name for number in STOP_SIGNALS if not blocked >> (number - 1) & 1] == []
