import csv
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.tensor_bundle import crc32c, read_bundle, read_table
from effnet_train.models.tf_checkpoint import our_names, read_tensorflow

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "tf_checkpoint.npz")
META = json.loads(str(GOLDEN["meta"]))
TINY = {"width": META["tiny"]["width_coefficient"], "depth": META["tiny"]["depth_coefficient"], "num_classes": 7}
LITE = {"activation": "relu6", "se_ratio": 0.0, "fixed_ends": True}
AVERAGE = "/ExponentialMovingAverage"
VARIANTS = {
    f"efficientnet-{row['variant']}": {"width": float(row["width"]), "depth": float(row["depth"]), **options}
    for file, options in (("efficientnet_variants.csv", {}), ("lite_variants.csv", LITE))
    for row in csv.DictReader((FOLDER / file).read_text().splitlines())
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the authors' tiny checkpoints."""
    for name in GOLDEN.files:
        if name.startswith("files/efficientnet"):
            (tmp_path / name.removeprefix("files/")).write_bytes(GOLDEN[name].tobytes())
    return tmp_path


def logits(state: dict[str, Tensor], **options: object) -> np.ndarray:
    model = EfficientNet(**TINY, **options)
    model.load_state_dict(state)
    images = torch.from_numpy(GOLDEN["images"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.eval()(images).numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def variables(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the authors' name and shape of every parameter and statistic of ours, counting layers as Keras does."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(ours: str, theirs: str, module: nn.Module) -> None:
        if isinstance(module, nn.BatchNorm2d):
            leaves = {
                "weight": "gamma",
                "bias": "beta",
                "running_mean": "moving_mean",
                "running_var": "moving_variance",
            }
            found.update({f"{ours}.{k}": (f"{theirs}/{v}", (module.num_features,)) for k, v in leaves.items()})
            return
        out, *rest = module.weight.shape
        depthwise = getattr(module, "groups", 1) > 1
        shape = (*rest[1:], out, 1) if depthwise else (*rest[1:], rest[0], out)
        found[f"{ours}.weight"] = (f"{theirs}/{'depthwise_kernel' if depthwise else 'kernel'}", shape)
        if module.bias is not None:
            found[f"{ours}.bias"] = (f"{theirs}/bias", (out,))

    def add_all(ours: str, scope: str) -> None:
        counts: dict[str, int] = {}
        for name, module in model.get_submodule(ours).named_modules(prefix=ours):
            kinds = {nn.BatchNorm2d: "tpu_batch_normalization", nn.Conv2d: "conv2d"}
            kind = next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)
            if kind is not None:
                kind = "depthwise_conv2d" if getattr(module, "groups", 1) > 1 else kind
                inner = f"{scope}/se/" if ".squeeze_excite." in name else f"{scope}/"
                number = counts[inner + kind] = counts.get(inner + kind, -1) + 1
                add(name, f"{inner}{kind}_{number}" if number else inner + kind, module)

    add_all("stem", "stem")
    blocks = [name for name, _ in model.named_modules() if name.startswith("stages.") and name.count(".") == 2]
    for i, name in enumerate(blocks):
        add_all(name, f"blocks_{i}")
    add_all("head", "head")
    add("classifier", "head/dense", model.classifier)
    return found


def masked(checksum: int) -> int:
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def write_table(pairs: dict[bytes, bytes]) -> bytes:
    """Return a LevelDB table of one block, uncompressed and without sharing."""
    file = b""

    def block(pairs: dict[bytes, bytes]) -> bytes:
        nonlocal file
        items = sorted(pairs.items())
        data = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in items)
        data += struct.pack("<II", 0, 1)
        handle = varint(len(file)) + varint(len(data))
        file += data + b"\0" + struct.pack("<I", masked(crc32c(data + b"\0")))
        return handle

    last = max(pairs)
    handles = block({}), block({last: block(pairs)})
    return file + b"".join(handles).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def rename(prefix: Path, new_name: Callable[[str], str | None]) -> None:
    """Rename a checkpoint's tensors, or drop those whose new name is None."""
    index = Path(f"{prefix}.index")
    renamed = {}
    for key, value in read_table(index.read_bytes()).items():
        name = new_name(key.decode()) if key else ""
        if name is not None:
            renamed[name.encode()] = value
    index.write_bytes(write_table(renamed))


def test_logits_of_the_averages_are_the_authors(folder: Path) -> None:
    found = logits(read_tensorflow(folder / "efficientnet-b0"))
    assert difference(found, GOLDEN["efficientnet-b0/ema"]) < 1e-5
    assert difference(found, GOLDEN["efficientnet-b0/raw"]) > 0.1


def test_logits_of_the_raw_weights_are_the_authors(folder: Path) -> None:
    found = logits(read_tensorflow(folder / "efficientnet-b0", which="raw"))
    assert difference(found, GOLDEN["efficientnet-b0/raw"]) < 1e-5


def test_logits_of_lite_are_the_authors(folder: Path) -> None:
    for which in ("ema", "raw"):  # it has no averages
        found = logits(read_tensorflow(folder / "efficientnet-lite0", which=which), **LITE)
        assert difference(found, GOLDEN["efficientnet-lite0/raw"]) < 1e-5


@pytest.mark.parametrize("wrong", [{"bn_eps": 1e-5}, {"padding": "symmetric"}, {"activation": "relu6"}])
def test_another_network_has_other_logits(folder: Path, wrong: dict[str, object]) -> None:
    found = logits(read_tensorflow(folder / "efficientnet-b0"), **wrong)
    assert difference(found, GOLDEN["efficientnet-b0/ema"]) > 1e-4


def test_tensors_are_float32_and_theirs_to_change(folder: Path) -> None:
    state = read_tensorflow(folder / "efficientnet-b0")
    assert {tensor.dtype for name, tensor in state.items() if "num_batches" not in name} == {torch.float32}
    for tensor in state.values():
        assert tensor.is_contiguous()
        tensor.add_(1)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_of_every_variant(name: str) -> None:
    with torch.device("meta"):
        model = EfficientNet(**VARIANTS[name])
    pairs = variables(model)
    assert pairs.keys() == {key for key in model.state_dict() if "num_batches_tracked" not in key}
    shapes = {f"{name}/{theirs}": shape for theirs, shape in pairs.values()}
    # First the names made here are held against those of the authors' code, then the reader against the names.
    lines = sorted(f"{theirs} {list(shape)}" for theirs, shape in shapes.items())
    assert [len(lines), zlib.crc32("\n".join(lines).encode())] == META["variables"][name]
    assert our_names(shapes) == {f"{name}/{theirs}": ours for ours, (theirs, _) in pairs.items()}


@pytest.mark.parametrize("scope", ["", "mnasnet/", "a/b/"])
@pytest.mark.parametrize("norm", ["tpu_batch_normalization", "batch_normalization"])
def test_any_scope_and_either_batch_norm(folder: Path, scope: str, norm: str) -> None:
    expected = read_tensorflow(folder / "efficientnet-b0")
    rename(
        folder / "efficientnet-b0",
        lambda name: name.replace("efficientnet-b0/", scope).replace("tpu_batch_normalization", norm),
    )
    found = read_tensorflow(folder / "efficientnet-b0")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_of_averages_alone(folder: Path) -> None:
    prefix = folder / "efficientnet-b0"
    expected = read_tensorflow(prefix)
    rename(prefix, lambda name: name if name.endswith(AVERAGE) else None)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_tensorflow(prefix).items())
    with pytest.raises(ValueError, match="it holds moving averages only: use weights=ema"):
        read_tensorflow(prefix, which="raw")


def test_averages_of_some_variables_are_refused(folder: Path) -> None:
    prefix, lost = folder / "efficientnet-b0", "efficientnet-b0/blocks_3/se/conv2d/bias"
    rename(prefix, lambda name: None if name == lost + AVERAGE else name)
    with pytest.raises(ValueError, match=rf"checkpoint {prefix}: some variables have .* and {lost} have none: use"):
        read_tensorflow(prefix)
    assert difference(logits(read_tensorflow(prefix, which="raw")), GOLDEN["efficientnet-b0/raw"]) < 1e-5


@pytest.mark.parametrize("part", ["stem/conv2d/kernel", "blocks_5/conv2d_1/kernel", "head/dense/bias"])
def test_a_missing_variable_is_named(folder: Path, part: str) -> None:
    prefix = folder / "efficientnet-lite0"
    rename(prefix, lambda name: None if name.endswith(part) else name)
    with pytest.raises(ValueError, match=rf"checkpoint {prefix}: .*; missing: efficientnet-lite0/{part}$"):
        read_tensorflow(prefix)


def test_missing_and_unexpected_variables_are_named(folder: Path) -> None:
    prefix = folder / "efficientnet-lite0"
    rename(prefix, lambda name: name.replace("blocks_2/conv2d/kernel", "blocks_2/conv2d/weights"))
    with pytest.raises(
        ValueError, match=r"missing: \S*/blocks_2/conv2d/kernel; unexpected: \S*/blocks_2/conv2d/weights$"
    ):
        read_tensorflow(prefix)


def test_many_wrong_variables_are_counted(folder: Path) -> None:
    prefix = folder / "efficientnet-lite0"
    rename(prefix, lambda name: name.replace("gamma", "scale"))
    count = sum(name.endswith("scale") for name in read_bundle(prefix))
    with pytest.raises(ValueError, match=rf"missing: .*gamma and {count - 20} more; unexpected: .*scale and"):
        read_tensorflow(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: name.replace("blocks_7", "blocks_99999999"), "numbered to 99999999, and there are only 10"),
        (lambda name: name.replace("efficientnet-lite0/stem", "other/stem"), "several networks .*lite0/, other/"),
        (lambda name: name.replace("/", "."), r"no variables in stem, blocks_\* or head, .*, but efficientnet"),
    ],
)
def test_other_networks_are_refused(folder: Path, change: Callable[[str], str], message: str) -> None:
    rename(folder / "efficientnet-lite0", change)
    with pytest.raises(ValueError, match=message):
        read_tensorflow(folder / "efficientnet-lite0")


def test_other_stages_are_refused() -> None:
    with torch.device("meta"):
        pairs = variables(EfficientNet(**TINY))
    shapes = dict(pairs.values())
    shapes["blocks_2/depthwise_conv2d/depthwise_kernel"] = (7, 7, 48, 1)
    with pytest.raises(ValueError, match=r"its stages have kernels of \[3, 3, 7, 3, 5, 5, 3\]"):
        our_names(shapes)
    shapes["blocks_2/depthwise_conv2d/depthwise_kernel"] = (5, 48)
    with pytest.raises(
        ValueError, match=r"numbers of dimensions .*blocks_2/depthwise_conv2d/depthwise_kernel \(5, 48\)"
    ):
        our_names(shapes)


def test_unknown_kind_of_weights(folder: Path) -> None:
    with pytest.raises(ValueError, match="weights=best is not known: use ema or raw"):
        read_tensorflow(folder / "efficientnet-b0", which="best")


def test_damage_in_a_second_file_is_found(folder: Path) -> None:
    prefix = folder / "efficientnet-b0"
    entries = read_bundle(prefix).entries
    name = next(name for name, entry in entries.items() if entry.shard == 1 and name.endswith(AVERAGE))
    shard = Path(f"{prefix}.data-00001-of-00002")
    data = bytearray(shard.read_bytes())
    data[entries[name].offset] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard} is damaged \(the checksum of {name} is wrong\)"):
        read_tensorflow(prefix)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard} does not exist: .*index says that 2 such files"):
        read_tensorflow(prefix)


def test_damage_to_what_is_not_wanted_does_no_harm(folder: Path) -> None:
    prefix = folder / "efficientnet-b0"
    entry = read_bundle(prefix).entries["efficientnet-b0/head/dense/kernel/RMSProp"]
    shard = Path(f"{prefix}.data-{entry.shard:05d}-of-00002")
    data = bytearray(shard.read_bytes())
    data[entry.offset] ^= 1
    shard.write_bytes(data)
    assert difference(logits(read_tensorflow(prefix)), GOLDEN["efficientnet-b0/ema"]) < 1e-5
