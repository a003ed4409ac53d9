"""From configuration to parts; no part receives the configuration."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from effnet_train.analysis.complexity import training_memory
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.data.datasets import Data
from effnet_train.data.manifest import check_whole
from effnet_train.distributed import Session
from effnet_train.engine.checkpoint import Weights, load_weights
from effnet_train.engine.every import Every
from effnet_train.engine.train import Plan
from effnet_train.models.fused import resolve
from effnet_train.models.surgery import with_classifier_of
from effnet_train.models.turning import turn
from effnet_train.optim.param_groups import param_groups

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# What a checkpoint's metadata may name to be called, by where it stands in `model` and `data`.
_TARGETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "model": {
        "": (
            "effnet_train.models.efficientnet.EfficientNet",
            *(f"effnet_train.models.mobilenet.{name}" for name in ("MobileNetV1", "MobileNetV2")),
            "effnet_train.models.mnasnet.MnasNet",
            "effnet_train.models.resnet.ResNet",
        )
    },
    "data": {
        "": (
            *(f"effnet_train.data.datasets.{name}" for name in ("image_folders", "birdsnap", "eval_folder", "digits")),
            "effnet_train.data.datasets.torchvision_splits",
            *(f"effnet_train.data.archives.{name}" for name in ("imagenet_tars", "shards", "unlabelled")),
            "effnet_train.data.parquet.parquet",
        ),
        "preprocess": ("effnet_train.data.preprocess.Preprocess",),
    },
}


def build_data(cfg: DictConfig | Mapping[str, Any], session: Session, *, whole: bool = True) -> Data:
    """Build the data set; rank 0 first, which may download or write it.

    Raises ValueError where `whole` is asked for and a conversion has not ended, or has lost a shard since.
    """
    with session.main_first():
        if whole:
            check_whole(str(cfg["root"]), {key: cfg[key] for key in ("train", "val") if isinstance(cfg.get(key), str)})
        return instantiate(cfg, _convert_="all")


def build_model(cfg: DictConfig | Mapping[str, Any], num_classes: int) -> nn.Module:
    """Build the model of a configuration for `num_classes` classes."""
    return instantiate(cfg, num_classes=num_classes, _convert_="all")


def meta_model(cfg: DictConfig, num_classes: int, device: torch.device) -> nn.Module:
    """Build the model without numbers, to count with, as it would train on the device: also what `auto` comes to."""
    part = cfg.model.copy()
    if "fused" in part:
        plain = cfg.advprop.epsilon or cfg.freeze.batch_norm  # see `ConvNorm.fusable`
        part.fused = not plain and resolve(part.fused, device, compiled=cfg.compile)
    return without_weights(part, num_classes)


def without_weights(config: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Build the network of a configuration on the meta device: its shapes alone."""
    with torch.device("meta"):
        return build_model(config, num_classes)


def check_targets(meta: Mapping[str, Any], source: str) -> None:
    """Refuse metadata from a file that would build anything but a network and a data set of ours.

    Raises ValueError: what `_target_` names is called, so a hostile file must not choose it; nor may it hold what
    becomes a `_target_` only later, an interpolation or another of Hydra's own keys.
    """
    for place, value in meta.items():
        _check_targets(value, source, _TARGETS.get(place, {}), "")


def _check_targets(config: Any, source: str, allowed: Mapping[str, tuple[str, ...]], place: str) -> None:
    if isinstance(config, str) and "${" in config:
        raise ValueError(f"{source} holds the interpolation {config!r}, which is never resolved: refused")
    if isinstance(config, Mapping):
        hydras = [key for key in config if str(key).startswith("_") and key != "_target_"]
        if hydras:
            raise ValueError(f"{source} holds the key {hydras[0]!r}, which is Hydra's own: refused")
        if "_target_" in config and config["_target_"] not in allowed.get(place, ()):
            raise ValueError(
                f"{source} asks for {config['_target_']!r}, which is no model or data set of effnet_train: refused"
            )
        for key, value in config.items():
            _check_targets(value, source, allowed, f"{place}.{key}" if place else str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            _check_targets(value, source, {}, place)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move `model` to `device`, its convolutions channels-last, as the images are; on a CPU turned, where it can be."""
    return turn(model, device.type == "cpu").to(device).to(memory_format=torch.channels_last)


def for_training(cfg: DictConfig, model: nn.Module, device: torch.device) -> nn.Module:
    """Place `model`, in training mode but for what is frozen."""
    model = place(model, device).train()
    instantiate(cfg.freeze)(model)
    return model


def build_optimizer(cfg: DictConfig, model: nn.Module, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """Build the optimizer over `model`'s parameter groups; the step sets the learning rate."""
    arguments = cfg.copy()  # which still knows its place in the configuration, for messages
    with open_dict(arguments):
        groups = param_groups(model, arguments.pop("weight_decay", 0.0), layer_decay)
    return instantiate(arguments, groups, lr=0.0, _convert_="all")


def build_plan(cfg: DictConfig, num_images: int) -> Plan:
    """Build the plan of a run over `num_images` training images. Raises ValueError where its parts don't fit."""
    if num_images == 0:
        raise ValueError(
            f"data.root={cfg.data.root} is read as images to evaluate on, with none to train on: choose data=folder, "
            "for root/train/<class>/ and root/val/<class>/, or another data set"
        )
    plan = Plan(
        num_images=num_images,
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        schedule=instantiate(cfg.schedule),
        log=_every(cfg, "log_every"),
        evaluate=_every(cfg, "evaluate_every"),
        save=_every(cfg, "save_every"),
        max_steps=cfg.max_steps,
    )
    if cfg.schedule.warmup_epochs >= plan.epochs and cfg.schedule.warmup_epochs > 0:
        raise ValueError(
            f"schedule.warmup_epochs={cfg.schedule.warmup_epochs} is not shorter than the run of epochs={plan.epochs}: "
            f"try schedule.warmup_epochs={plan.epochs / 70:.2g}"
        )
    return plan


def check_size(batch_size: int, num_images: int) -> str | None:
    """Return what to say of a batch that a data set does not fill."""
    if batch_size <= num_images:
        return None
    return (
        f"batch_size={batch_size} is more than the {num_images} training images: each step reads some twice, lower it"
    )


def _every(cfg: DictConfig, key: str) -> Every:
    try:
        return Every(**cfg[key])
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def check_batch(cfg: DictConfig, ranks: int, accumulate: int | None = None) -> None:
    """Check that the global batch can be divided among ranks and micro-batches, if known. Raises ValueError."""
    pairs = _mixes(cfg)
    accumulate = accumulate or (1 if cfg.accumulate == "auto" else cfg.accumulate)
    parts = ranks * accumulate * (2 if pairs else 1)
    if cfg.batch_size % parts:
        near = max(1, round(cfg.batch_size / parts)) * parts
        why = f"{ranks} ranks x accumulate={accumulate}" + (" x 2, as mixing pairs images" if pairs else "")
        raise ValueError(
            f"batch_size={cfg.batch_size} (global) is no multiple of {parts} ({why}): try batch_size={near}"
        )
    fewest = cfg.progressive.resolution or cfg.data.preprocess.resolution
    pixels = math.ceil(fewest / 32) ** 2  # of the last feature map
    if cfg.batch_size // (ranks * accumulate) * pixels < 2:
        raise ValueError(
            f"batch_size={cfg.batch_size} leaves one image to a micro-batch ({ranks} ranks x accumulate={accumulate}), "
            f"and BatchNorm needs two at {fewest} pixels: try batch_size={2 * ranks * accumulate}"
        )


def views(cfg: DictConfig) -> int:
    """Return how many images a step takes through the network for each of `batch_size`."""
    return (1 + (cfg.pseudo.ratio if cfg.pseudo.labels is not None else 0)) * (2 if cfg.advprop.epsilon else 1)


def _mixes(cfg: DictConfig) -> bool:
    """Say whether a batch is paired at any time of the run."""
    return instantiate(cfg.mixing).enabled or bool(cfg.progressive.mixup_alpha)


def resolve_accumulate(
    cfg: DictConfig, ranks: int, device: torch.device, classes: int, precision: str, resolution: int | None = None
) -> int:
    """Return `accumulate`, with `auto` as the fewest micro-batches whose estimated memory fits the GPU; 1 on a CPU.

    At `resolution`, None for that at which the run ends.
    """
    if cfg.accumulate != "auto":
        return cfg.accumulate
    if device.type != "cuda":
        return 1
    model = meta_model(cfg, classes, device)
    size, width = resolution or cfg.data.preprocess.resolution, 4 if precision == "fp32" else 2
    few, more = (training_memory(model, size, count, activation_bytes=width) for count in (2, 4))
    per_image, fixed = (more - few) / 2, 2 * few - more
    # The rest is for what no count of tensors shows: the allocator's gaps, the libraries' workspaces.
    room = 0.85 * torch.cuda.get_device_properties(device).total_memory - fixed
    batch, per_image = cfg.batch_size // ranks, per_image * views(cfg)
    step = 2 if _mixes(cfg) else 1
    fitting = [n for n in range(1, batch + 1) if batch % (n * step) == 0 and batch / n * per_image <= room]
    return fitting[0] if fitting else batch // step


def resolve_precision(precision: str, device: torch.device, former: str | None = None) -> str:
    """Return `precision`, with `auto` as bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU.

    A run that began in the precision `former` keeps it under `auto`, also where it goes on on another kind of device.
    """
    if precision == "auto":
        best = "fp32"
        if device.type == "cuda":
            best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return former or best
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is not known: use auto, {', '.join(PRECISIONS)}")
    return precision


def resolve_workers(workers: int | str, device: torch.device) -> int:
    """Return the number of worker processes of this rank; `auto` shares the machine's cores among its ranks."""
    if workers != "auto":
        return int(workers)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores if device.type == "cuda" else cores // 4)


def set_threads(threads: int | str) -> None:
    """Set the CPU threads of this rank's arithmetic; `auto` leaves what the session chose."""
    if threads != "auto":
        torch.set_num_threads(int(threads))


def set_arithmetic(precision: str, deterministic: bool, device: torch.device) -> None:
    """Choose between algorithms that give the same bits every time and whichever are fastest; fp32 means float32."""
    if device.type != "cuda":
        return
    # torch's default is TF32, with ten bits of mantissa, in convolutions and float32 in matrix products.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def metadata(cfg: DictConfig, data: Data, precision: str) -> dict[str, Any]:
    """Return what travels with the weights, as plain values: model, preprocessing, classes, data."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return {
        "model": {**config["model"], "num_classes": len(data.classes)},
        "preprocess": _plain(asdict(data.preprocess)),
        "classes": list(data.classes),
        "images": len(data.train),
        "data": config["data"],
        "precision": precision,
    }


def model_variants() -> dict[str, dict[str, Any]]:
    """Return the model configurations that `model=` may choose, by name, without those that only others build on."""
    nodes: Any = {path.stem: OmegaConf.load(path) for path in sorted((CONFIG_DIR / "model").glob("*.yaml"))}
    bases = {name: list(node.pop("defaults", [])) for name, node in nodes.items()}
    inherited = {base for names in bases.values() for base in names}

    def whole(name: str) -> Any:
        return OmegaConf.merge(*(whole(base) for base in bases[name]), nodes[name])

    found: Any = {name: OmegaConf.to_container(whole(name)) for name in nodes if name not in inherited}
    return found


def read_weights(
    name: str, session: Session, *, which: str = "ema", source: str | None = None, key: str = "checkpoint"
) -> Weights:
    """Read weights from a file, a folder, or by name; rank 0 first, which may download them."""
    with session.main_first():
        return load_weights(name, which, source=source, variants=model_variants(), key=key)


def load_model(
    name: str, session: Session, *, which: str = "ema", source: str | None = None
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return a checkpoint's network on the session's device, ready for evaluation, and what travels with it."""
    weights = read_weights(name, session, which=which, source=source)
    check_targets(dict(weights.meta), name)
    model = build_model(weights.meta["model"], len(weights.meta["classes"]))
    load_into(model, weights, name)
    return place(model, session.device).eval(), weights.meta


def check_start(cfg: DictConfig) -> None:
    """Raise ValueError where weights are needed to start from and none are given; or freezing needs plain layers."""
    freeze = instantiate(cfg.freeze)
    if freeze.batch_norm and cfg.model.get("fused") is True:
        raise ValueError(
            "freeze.batch_norm=true does not go with model.fused=true, whose kernels normalise by the batch: use "
            "model.fused=auto or false"
        )
    if (freeze.up_to != 0 or freeze.batch_norm) and cfg.init_from is None:
        key = f"freeze.up_to={freeze.up_to}" if freeze.up_to != 0 else "freeze.batch_norm=true"
        raise ValueError(
            f"{key} would freeze what nobody has trained: give init_from=..., a run's folder, a file, or a name as "
            "timm:tf_efficientnet_b0.aa_in1k"
        )
    if cfg.select_by.endswith("per_class") and not cfg.data.get("per_class", False):
        raise ValueError(
            f"select_by={cfg.select_by} is not measured: give data.per_class=true, or select_by=val_ema/top1"
        )
    if cfg.new_classifier and cfg.init_from is None:
        raise ValueError(
            "new_classifier=true needs weights to put it on: give init_from=..., a run's folder, a file, or a name as "
            "timm:tf_efficientnet_b0.aa_in1k (or new_classifier=false, to train from scratch)"
        )


def check_same_settings(cfg: DictConfig, meta: Mapping[str, Any]) -> None:
    """Check that a run computes and normalises as the weights it starts from expect, which no shape tells.

    Raises ValueError naming every key that differs, both values, and the overrides to give.
    """
    here = {"model": cfg.model, "data.preprocess": cfg.data.preprocess}
    there = {"model": meta["model"], "data.preprocess": meta["preprocess"]}
    keys = {"model": ("padding", "bn_eps", "activation"), "data.preprocess": ("mean", "std")}
    differing = {
        f"{part}.{key}": (here[part][key], there[part][key])
        for part, names in keys.items()
        for key in names
        if not _alike(here[part][key], there[part][key])
    }
    if differing:
        told = "; ".join(f"{key} is {one} here and {other} there" for key, (one, other) in differing.items())
        overrides = " ".join(f"{key}={str(other).replace(' ', '')}" for key, (_, other) in differing.items())
        raise ValueError(f"init_from={cfg.init_from} holds weights of other settings ({told}): give {overrides}")
    here, there = cfg.data.preprocess.resolution, meta["preprocess"]["resolution"]
    if cfg.freeze.up_to == "last_norm" and here < there:
        raise ValueError(
            f"recipe=fixres (freeze.up_to=last_norm) adapts weights to a larger test size: model.resolution={here} is "
            f"below {there}, at which those of init_from={cfg.init_from} were trained; give at least that, or train at "
            "less"
        )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return math.isclose(one, other, rel_tol=1e-4) if isinstance(other, float) else bool(one == other)


def load_into(model: nn.Module, weights: Weights, source: str, *, new_classifier: bool = False) -> None:
    """Load weights of the same architecture into `model`, with `new_classifier` all but the classifier's.

    Raises ValueError naming the first tensors that differ.
    """
    own = model.state_dict()
    if new_classifier:
        weights = replace(weights, tensors=with_classifier_of(model, weights.tensors))
    wrong = [
        f"{name} {tuple(own[name].shape) if name in own else 'absent'} here, "
        f"{tuple(weights.tensors[name].shape) if name in weights.tensors else 'absent'} there"
        for name in sorted(own.keys() | weights.tensors.keys())
        if name not in own or name not in weights.tensors or own[name].shape != weights.tensors[name].shape
    ]
    classifier = [text for text in wrong if text.startswith("classifier.")]
    if wrong and len(wrong) == len(classifier):
        raise ValueError(
            f"{source} holds weights for another number of classes ({classifier[0]}): new_classifier=true trains a new "
            "one on the rest of them, as recipe=finetune does"
        )
    if wrong:
        raise ValueError(
            f"{source} holds weights of another model ({len(wrong)} tensors differ): {'; '.join(wrong[:3])}"
        )
    infinite = [name for name, tensor in weights.tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"{source} holds numbers that are not finite, in {', '.join(infinite[:3])}: it is of no use")
    model.load_state_dict(weights.tensors)


def _plain(value: Any) -> Any:
    """Return `value` with tuples as lists: the same after a journey through JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
