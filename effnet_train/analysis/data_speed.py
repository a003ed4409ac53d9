"""How fast images are read, decoded and augmented, beside other libraries; and what it costs in memory and waiting."""

import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from effnet_train.data.archives import shards as tar_shards
from effnet_train.data.augment import Augment
from effnet_train.data.autoaugment import AutoAugment
from effnet_train.data.backends import DEVICE_BACKENDS
from effnet_train.data.datasets import Data
from effnet_train.data.device_batches import check_device
from effnet_train.data.loader import Batch, eval_batches, train_batches
from effnet_train.data.order import Order
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import Files, FolderSource, Source

# Name -> a function of (root, train, batch_size, workers) that gives batches of uint8 images without end.
Contender = Callable[[str, bool, int, int], Iterator[int]]

REFERENCE = "timm"
_RESOLUTION = 224
_SHARDS = "*.tar"
_SHUFFLED = 1000  # images, still encoded, that webdataset draws from
_PACKAGES = (
    "effnet-train",
    "torch",
    "torchvision",
    "timm",
    "pillow",
    "simplejpeg",
    "nvidia-nvimgcodec-cu13",
    "webdataset",
    "numpy",
)


class _Repeated:
    """A folder whose images come again and again, as if they were `count`."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count, self.classes = source, count, source.classes

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Any, int]:
        return self.source.read(index % len(self.source))

    def name(self, index: int) -> str:
        return self.source.name(index % len(self.source))


def _device_of(backend: str) -> torch.device:
    device = torch.device("cuda" if backend in DEVICE_BACKENDS and torch.cuda.is_available() else "cpu")
    check_device(backend, device, Preprocess(_RESOLUTION))
    return device


def _arrived(batch: Batch) -> int:
    """Return how many images a batch has, once they are there."""
    if batch.images.is_cuda:
        torch.cuda.current_stream(batch.images.device).synchronize()
    return len(batch.labels)


def ours(backend: str, shards: str | None = None) -> Contender:
    """Return this package's loader with one of `data.backends.BACKENDS`, of a folder of images or one of shards.

    Raises ValueError where the backend needs a GPU.
    """
    device = _device_of(backend)

    def batches(root: str, train: bool, batch_size: int, workers: int) -> Iterator[int]:
        source: Source = FolderSource(root)
        if shards is not None:
            source = tar_shards(shards, train=_SHARDS, val=_SHARDS, preprocess=Preprocess(_RESOLUTION)).train
        if train:
            data = Data(source, source, None, Preprocess(_RESOLUTION), "raise", backend)
            order, augment = Order(len(source), batch_size, seed=0), Augment(policy=AutoAugment())
            found = train_batches(data, augment, order, start=0, stop=10**9, workers=workers, device=device)
        else:
            endless = _Repeated(source, 10**9)
            data = Data(endless, endless, None, Preprocess(_RESOLUTION), "raise", backend)
            found = eval_batches(endless, data, batch_size=batch_size, workers=workers, device=device)
        return map(_arrived, found)

    return batches


def _timm(root: str, train: bool, batch_size: int, workers: int) -> Iterator[int]:
    from timm.data import create_transform
    from timm.data.dataset import ImageDataset
    from timm.data.loader import fast_collate

    # timm's v0 fails with recent Pillows (no bits to posterize to); "original", of the paper, is as long. The
    # transform for its prefetcher leaves bytes, which go to the GPU as such, as ours do.
    options: dict[str, Any] = {"auto_augment": "original", "color_jitter": None} if train else {"crop_pct": 0.875}
    transform = create_transform(
        _RESOLUTION, is_training=train, interpolation="bicubic", use_prefetcher=True, **options
    )
    return _torch_batches(ImageDataset(root, transform=transform), train, batch_size, workers, fast_collate)


def _torchvision(root: str, train: bool, batch_size: int, workers: int, tensors: bool = False) -> Iterator[int]:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    options: dict[str, Any] = {"loader": _Decoder(decode_image, ImageReadMode.RGB)} if tensors else {}
    images = ImageFolder(root, _transform(train, tensors), **options)
    return _torch_batches(images, train, batch_size, workers, None)


def _transform(train: bool, tensors: bool) -> Callable[[Any], torch.Tensor]:
    """Return torchvision's transform, of Pillow images or of tensors."""
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    steps: list[Any] = [v2.Resize(256, bicubic), v2.CenterCrop(_RESOLUTION)]
    if train:
        steps = [v2.RandomResizedCrop(_RESOLUTION, interpolation=bicubic), v2.RandomHorizontalFlip(), v2.AutoAugment()]
    return v2.Compose(steps if tensors else [*steps, v2.PILToTensor()])


class _Decoder:
    """torchvision's decoder of a path's image; a class, so that it can be sent to workers."""

    def __init__(self, decode: Callable[..., torch.Tensor], mode: Any) -> None:
        self.decode, self.mode = decode, mode

    def __call__(self, path: str) -> torch.Tensor:
        return self.decode(path, mode=self.mode)


def _torchvision_tensors(root: str, train: bool, batch_size: int, workers: int) -> Iterator[int]:
    return _torchvision(root, train, batch_size, workers, tensors=True)


def _webdataset(shards: str) -> Contender:
    """Return webdataset's pipeline over a folder of shards, as its documentation builds it for ImageNet."""

    def batches(root: str, train: bool, batch_size: int, workers: int) -> Iterator[int]:
        try:
            import webdataset
        except ImportError as error:
            raise ImportError(
                "shards are also read by webdataset: pip install webdataset, or set shards=null"
            ) from error
        files = sorted(str(path) for path in Path(shards).glob(_SHARDS))
        if len(files) < workers:
            raise ValueError(
                f"shards={shards} holds {len(files)} files: each of webdataset's {workers} workers needs one"
            )
        images = webdataset.WebDataset(files, shardshuffle=len(files) if train else False, empty_check=False)
        images = (images.shuffle(_SHUFFLED) if train else images).decode("pil").to_tuple("jpg;jpeg;png", "cls")
        images = images.map_tuple(_transform(train, tensors=False)).batched(batch_size, partial=False).repeat()
        loader: DataLoader[Any] = DataLoader(
            images, batch_size=None, num_workers=workers, multiprocessing_context="forkserver" if workers else None
        )
        return (len(labels) for _, labels in loader)

    return batches


class _Endless(Sampler[int]):
    """All indices, in a new random order each time or in the same, without end."""

    def __init__(self, count: int, shuffle: bool) -> None:
        self.count, self.shuffle = count, shuffle

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from (torch.randperm(self.count, generator=generator).tolist() if self.shuffle else range(self.count))


def _torch_batches(
    images: Dataset[Any], train: bool, batch_size: int, workers: int, collate: Callable[..., Any] | None
) -> Iterator[int]:
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_size=batch_size,
        sampler=_Endless(len(images), train),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="forkserver" if workers else None,
    )
    return (len(labels) for _, labels in loader)


def contenders(backends: Sequence[str], shards: Mapping[str, str]) -> dict[str, Contender]:
    """Return what is measured: ours with each backend, timm, and torchvision with Pillow images and with tensors.

    And ours, with the first backend, and webdataset with each folder of `shards`, by their names.
    """
    of_shards: dict[str, Contender] = {}
    for name, folder in shards.items():
        if not any(Path(folder).glob(_SHARDS)):
            raise FileNotFoundError(f"shards.{name}={folder} holds no {_SHARDS}: make some with effnet-data convert")
        of_shards |= {f"webdataset, {name}": _webdataset(folder)}
        of_shards |= {f"ours, {name}": ours(backend, folder) for backend in backends[:1]}
    return {
        REFERENCE: _timm,
        "torchvision": _torchvision,
        "torchvision tensors": _torchvision_tensors,
        **{f"ours, {backend}": ours(backend) for backend in backends},
        **of_shards,
    }


def compare(
    root: str,
    measured: dict[str, Contender],
    *,
    train: bool,
    workers: int,
    rounds: int,
    seconds: float,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Measure each contender for `seconds` in each of `rounds`, in turn, and return rows of medians.

    A row: `name`, `job`, `workers`, `images_per_s`, `per_core` (of the workers; of the one process without), and
    `ratio` to timm: the median over rounds of the ratio within a round, as a machine's speed changes between them.
    """
    FolderSource(root)  # which says what is wrong with the folder
    iterators = {name: make(root, train, batch_size, workers) for name, make in measured.items()}
    speeds: dict[str, list[float]] = {name: [] for name in measured}
    for count in range(rounds + 1):
        for name, batches in iterators.items():
            # What the workers had ready, and one batch that began while others were measured.
            for _ in range(2 * workers + 1):
                next(batches)
            start, images = perf_counter(), 0
            while (passed := perf_counter() - start) < seconds or not images:
                images += next(batches)
            if count:  # the first round warms up
                speeds[name].append(images / passed)
    rows = []
    for name, found in speeds.items():
        ratios = [speed / other for speed, other in zip(found, speeds[REFERENCE], strict=True)]
        rows.append(
            {
                "name": name,
                "job": "train" if train else "eval",
                "workers": workers,
                "images_per_s": round(median(found), 1),
                "per_core": round(median(found) / max(1, workers), 1),
                "ratio": round(median(ratios), 3),
            }
        )
    return rows


def memory(root: str, *, backend: str, reads: int, batch_size: int) -> dict[str, float]:
    """Read so many images in this process: its memory in MiB after a tenth of them and at the end, and its peak."""
    batches, after_a_tenth = ours(backend)(root, True, batch_size, 0), 0.0
    done = 0
    while done < reads:
        done += next(batches)
        if not after_a_tenth and done >= reads / 10:
            after_a_tenth = _resident_mib()
    end = _resident_mib()
    # The system brings its peak up to date now and then only.
    peak = max(after_a_tenth, end, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"reads": done, "after_a_tenth_mib": after_a_tenth, "end_mib": end, "peak_mib": round(peak, 1)}


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return round(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def waiting(root: str, *, backend: str, images: int, batch_size: int) -> dict[str, float]:
    """Seconds from an index of so many images to the first batch of a worker, at the start and resumed at its middle.

    The images are the folder's, each many times; a name for each is in memory already: listing a folder is not in it.
    """
    folder = FolderSource(root)
    names = (os.fsencode(folder.name(index % len(folder))) for index in range(images))
    source = Files(names)
    data = Data(source, source, None, Preprocess(_RESOLUTION), "raise", backend)
    found = {}
    for name, step in (("fork_server", 0), ("start", 0), ("resume", images // batch_size // 2)):
        start = perf_counter()
        order = Order(len(source), batch_size, seed=0)
        augment, device = Augment(policy=AutoAugment()), _device_of(backend)
        _arrived(next(train_batches(data, augment, order, start=step, stop=step + 2, workers=1, device=device)))
        found[name] = round(perf_counter() - start, 2)
    del found["fork_server"]  # the first of a process starts the server that workers come from
    return found


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of what was measured."""
    model = platform.processor()
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    with open("/proc/meminfo") as file:
        memory_kb = int(next(file).split()[1])
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kb / 2**20, 1),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
        "load": round(os.getloadavg()[0], 2),
        "command": " ".join(sys.argv),
    }
