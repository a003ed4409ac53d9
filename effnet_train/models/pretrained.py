"""What a state dict alone does not say: whose weights they are, and so their padding, epsilon and preprocessing."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from effnet_train.models import formats, published

# The names that the hub's config.json stands beside; any other file has a .json of its own name.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HARMLESS_ARGUMENTS = {"num_classes", "drop_rate", "drop_path_rate"}  # they change no logit in evaluation
_USUAL_ARGUMENTS = {"in_chans": 3, "global_pool": "avg"}  # timm writes them down also where they are as always


@dataclass(frozen=True)
class Source:
    """Hold what a source's weights are, and whose names they may have (see `formats.FORMATS`, and TensorFlow's)."""

    meaning: str
    formats: tuple[str, ...]
    advprop: bool = False
    lite: bool = False  # Lite, and nothing else


SOURCES: Mapping[str, Source] = {
    "timm_tf": Source("tf_efficientnet_* of timm or geffnet, without AdvProp (SAME padding)", ("timm",)),
    "timm_tf_advprop": Source("tf_efficientnet_*_ap, of AdvProp (SAME padding)", ("timm",), advprop=True),
    "timm": Source("efficientnet_* that timm or geffnet trained (symmetric padding)", ("timm",)),
    "torchvision": Source("torchvision's IMAGENET1K_V1", ("torchvision",)),
    "torchvision_v2": Source("torchvision's IMAGENET1K_V2, which B1 alone has", ("torchvision",)),
    "lukemelas": Source("EfficientNet-PyTorch's efficientnet-b*.pth", ("lukemelas",)),
    "lukemelas_advprop": Source("EfficientNet-PyTorch's adv-efficientnet-b*.pth", ("lukemelas",), advprop=True),
    "tensorflow": Source("the authors' checkpoints, without AdvProp", ("tensorflow",)),
    "tensorflow_advprop": Source("the authors' checkpoints of AdvProp", ("tensorflow",), advprop=True),
    "lite": Source(
        "EfficientNet-Lite, the authors' or efficientnet-lite-pytorch's", ("lukemelas", "tensorflow"), lite=True
    ),
}


@dataclass(frozen=True)
class Origin:
    """Hold whose weights they are, and `why` that is known.

    `name` is that of published weights, as `checkpoint=` takes it; `cfg` is timm's description of exactly these.
    """

    source: str
    why: str
    name: str | None = None
    cfg: Mapping[str, Any] | None = None
    labels: tuple[str, ...] | None = None

    @property
    def architecture(self) -> str | None:
        """Return the library's name of the network, where it is known."""
        if self.cfg is not None:
            return str(self.cfg["architecture"])
        return self.name.partition(":")[2].partition(".")[0] if self.name else None


def given_origin(source: str | None) -> Origin | None:
    """Return what `source=` says: a key of SOURCES, or the name of published weights. Raises ValueError."""
    if source is None:
        return None
    if source in SOURCES:
        return Origin(source, f"source={source}")
    if published.is_name(source) and not source.startswith("hub:"):
        return named_origin(source, f"source={source}")
    close = difflib.get_close_matches(source, SOURCES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"source={source} is not known: {hint}{_listed(list(SOURCES))}")


def named_origin(name: str, why: str) -> Origin:
    """Return the origin of `timm:NAME` or `torchvision:NAME`. Raises ValueError where there is no such name."""
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        architecture, which, _ = published.torchvision_entry(rest)
        source = "torchvision_v2" if which.endswith("_V2") else "torchvision"
        return Origin(source, why, name=f"torchvision:{architecture}.{which}")
    cfg = published.timm_cfg(rest)
    full = f"timm:{cfg['architecture']}.{cfg['tag']}"
    return Origin(_timm_source(cfg["architecture"], cfg), why, name=full, cfg=cfg)


def _timm_source(architecture: str, cfg: Mapping[str, Any]) -> str:
    if not published.ARCHITECTURE.fullmatch(architecture):
        raise ValueError(f"timm's architecture {architecture} is none of B0 to B7 and Lite0 to Lite4")
    if not architecture.startswith("tf_"):
        return "timm"
    return "timm_tf_advprop" if str(cfg.get("tag")).startswith("ap") else "timm_tf"


def evident_origin(file: Path, name: str | None = None) -> Origin | None:
    """Return what is evident of a file's origin: from its published name, or from what lies beside it.

    `name` is what it was fetched by. A published file's name counts where its contents have the hash that is in it.
    """
    if name is not None and not name.startswith("hub:"):
        return named_origin(name, name)
    beside = described_beside(file, "architecture")
    if beside is not None:
        return _described_origin(*beside)
    published_as = published.file_name(file)
    if published_as is None:
        return None
    why = f"the name and the contents of {file.name}"
    return Origin(published_as, why) if published_as in SOURCES else named_origin(published_as, why)


def described_beside(file: Path, key: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the JSON file beside `file` that describes it, by `key` and more, and its contents. Raises ValueError."""
    beside = [
        Path(f"{file}.json"),
        file.with_suffix(".json"),
        *([file.parent / "config.json"] if file.name in _HUB_FILES else []),
    ]
    for path in beside:
        if not path.is_file():
            continue
        try:
            described = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}, which should describe it, is not JSON ({error})") from error
        if isinstance(described, dict) and key in described:
            return path, described
    return None


def _described_origin(path: Path, described: Mapping[str, Any]) -> Origin:
    """Return the origin that a model's config.json, as timm writes them, tells of."""
    architecture = str(described["architecture"])
    cfg = {"tag": None, **described.get("pretrained_cfg", described), "architecture": architecture}
    arguments = sorted(
        f"{key}={value}"
        for key, value in (described.get("model_args") or {}).items()
        if key not in _HARMLESS_ARGUMENTS and _USUAL_ARGUMENTS.get(key, ...) != value
    )
    if arguments:
        raise ValueError(f"{path} asks for a changed network, which is not offered here: {', '.join(arguments)}")
    labels = described.get("label_names") or cfg.get("label_names")
    source = _timm_source(architecture, cfg)
    return Origin(source, str(path), cfg=cfg, labels=tuple(map(str, labels)) if isinstance(labels, list) else None)


def interpret(
    tensors: Mapping[str, Tensor],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    given: Origin | None = None,
    found: Origin | None = None,
    tensorflow: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a foreign state dict under our names, and its metadata: model, preprocess, classes, images, data, source.

    `variants` are model configurations by name, among which names and shapes choose. `given` is what the user says of
    the tensors' origin, `found` what is evident. `preprocess` holds what differs from Preprocess's defaults.
    `tensorflow` tensors have our names already. Raises ValueError for all that is unknown or contradictory.
    """
    fmt = formats.recognise(tensors)
    kind = "tensorflow" if tensorflow else fmt
    variant = formats.nearest(tensors, fmt, variants)
    config, classes = variants[variant], formats.num_classes(tensors, fmt)
    try:
        converted = formats.to_ours(tensors, fmt, formats.skeleton(config, classes))
    except ValueError as error:
        raise ValueError(f"its tensors have {kind}'s names, but even from {variant}, the closest, {error}") from error
    origin = _settled(given, found, kind, variant, lite=config["se_ratio"] == 0, classes=classes)
    model, preprocess = _settings(origin, variant, config, classes)
    labels = list(origin.labels or class_names(classes))
    if len(labels) != classes:
        raise ValueError(f"{origin.why} names {len(labels)} classes, and the classifier has {classes}")
    return converted, {
        "model": {**config, **model, "num_classes": classes},
        "preprocess": preprocess,
        "classes": labels,
        "images": 0,
        "data": {},
        "source": origin.name or origin.source,
    }


def class_names(count: int) -> list[str]:
    """Return ImageNet's synset ids, in the order that all published weights have, for 1000 classes, else numbers."""
    if count != 1000:
        return [str(number) for number in range(count)]
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def _settled(
    given: Origin | None, found: Origin | None, kind: str, variant: str, *, lite: bool, classes: int
) -> Origin:
    """Return the origin that all that is known agrees on; of other than ImageNet's classes no names tell it."""
    choices = _choices(kind, variant, lite=lite)
    for origin in (given, found):
        if origin is not None and origin.source not in choices:
            raise ValueError(
                f"{origin.why} ({SOURCES[origin.source].meaning}) contradicts the tensors, which are {variant}'s under "
                f"{kind}'s names: {_listed(choices)}"
            )
    if given is not None and found is not None:
        if given.source != found.source or (given.name and found.name and given.name != found.name):
            raise ValueError(f"{given.why} contradicts {found.why}, which says source={found.name or found.source}")
        return found if found.cfg or not given.cfg else given
    if given is not None or found is not None:
        return given or found  # type: ignore[return-value]
    if len(choices) == 1 and classes == 1000:
        return Origin(choices[0], "the tensors' names")
    raise ValueError(
        f"the tensors are {variant}'s under {kind}'s names, which does not say how images are padded and normalised: "
        f"{_listed(choices)}"
    )


def _choices(kind: str, variant: str, *, lite: bool) -> list[str]:
    """Return the sources that publish a variant under a format's names."""
    keys = [key for key, source in SOURCES.items() if kind in source.formats]
    if kind == "torchvision":  # it publishes no Lite, and two sets of weights of B1 only
        return keys[: len(published.torchvision_weights(f"efficientnet_{variant}"))]
    if kind == "timm":
        return [key for key in keys if not (lite and SOURCES[key].advprop)]
    return [key for key in keys if SOURCES[key].lite == lite]


def _listed(choices: list[str]) -> str:
    if not choices:
        return "no published weights have this form"
    return "say whose weights they are: " + "; ".join(f"source={key}, {SOURCES[key].meaning}" for key in choices)


def _settings(
    origin: Origin, variant: str, config: Mapping[str, Any], classes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's arguments and the preprocessing that the origin asks for. Raises ValueError."""
    source = SOURCES[origin.source]
    architecture = f"tf_efficientnet_{variant}" if origin.source.startswith("timm_tf") else f"efficientnet_{variant}"
    if origin.architecture not in (None, architecture):
        raise ValueError(f"{origin.why} speaks of {origin.architecture}, but the tensors are those of {architecture}")
    if "timm" in source.formats:
        preprocess = published.timm_preprocess(origin.cfg or _timm_cfg(origin, architecture, classes))
        same = origin.source != "timm"
        model = {"padding": "same" if same else "symmetric", "bn_eps": 1e-3 if same else 1e-5}
        return {**model, "resolution": preprocess["resolution"]}, preprocess
    if "torchvision" in source.formats:
        which = "IMAGENET1K_V2" if origin.source == "torchvision_v2" else "IMAGENET1K_V1"
        preprocess = published.torchvision_preprocess(published.torchvision_weights(architecture)[which])
        model = {"padding": "symmetric", "bn_eps": published.torchvision_eps(architecture)}
        return {**model, "resolution": preprocess["resolution"]}, preprocess
    preprocess = {"resolution": config["resolution"]}
    # Source: tensorflow/tpu, models/official/efficientnet: efficientnet_builder.py and efficientnet_lite_builder.py.
    if source.advprop:
        preprocess |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    if source.lite:
        preprocess |= {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    return {"padding": "same", "bn_eps": 1e-3}, preprocess


def _timm_cfg(origin: Origin, architecture: str, classes: int) -> Mapping[str, Any]:
    """Return what timm's descriptions of all weights from this source agree on. Raises ValueError where they do not."""
    cfgs = published.timm_cfgs(architecture, classes)
    cfgs = {name: cfg for name, cfg in cfgs.items() if _timm_source(architecture, cfg) == origin.source}
    if not cfgs:
        raise ValueError(f"timm publishes no {architecture} for {origin.why}: a config.json is needed beside the file")
    described = [published.timm_preprocess(cfg) for cfg in cfgs.values()]
    if any(one != described[0] for one in described):
        raise ValueError(
            f"{origin.why} leaves open which of timm's weights they are, whose preprocessing differs: say "
            f"{' or '.join(f'source=timm:{name}' for name in cfgs)}"
        )
    return next(iter(cfgs.values()))
