"""Weights handed on: to timm, torchvision, the Hugging Face hub, ONNX and torch.export, each held against ours."""

import contextlib
import io
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_train.engine.checkpoint import EXPORT, Weights, export_safetensors, write_bytes
from effnet_train.models import published
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.formats import from_ours
from effnet_train.models.surgery import fold_batch_norm
from effnet_train.models.turning import turn

# The largest difference of logits, in units of the largest logit, that rounding may explain.
TOLERANCE = 1e-4
SUFFIXES: Mapping[str, str] = {
    "effnet_train": ".safetensors",
    "timm": ".timm.safetensors",
    "torchvision": ".torchvision.pth",
    "hub": ".hub",
    "onnx": ".onnx",
    "torch_export": ".pt2",
}
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "effnet_train": (".safetensors",),
    **dict.fromkeys(("timm", "torchvision"), (".safetensors", ".pth", ".pt")),
    "onnx": (".onnx",),
    "torch_export": (".pt2",),
}
GRAPHS = ("onnx", "torch_export")
Network = Callable[[Tensor], Tensor]


def export(
    model: nn.Module,
    meta: Mapping[str, Any],
    fmt: str,
    output: Path,
    *,
    variants: Mapping[str, Mapping[str, Any]],
    fold: bool = False,
    hub_name: str | None = None,
) -> float:
    """Write `model` to `output` in the format `fmt`, one of SUFFIXES; return how far the logits differ from ours.

    `meta` is what travels with weights, `variants` are model configurations by name, the published ones among them. The
    difference is the largest, over the largest logit. `hub_name` is for the model card.
    Nothing is written where it exceeds TOLERANCE.
    Raises ValueError, naming the remedy, where the format has no such network.
    """
    if fmt not in SUFFIXES:
        raise ValueError(f"format={fmt} is not known: use one of {', '.join(SUFFIXES)}")
    if fmt in ENDINGS and output.suffix not in ENDINGS[fmt]:
        raise ValueError(f"output={output}: of format={fmt} the name must end in {' or '.join(ENDINGS[fmt])}")
    if fold and fmt not in GRAPHS:
        raise ValueError(
            f"fold=true: format={fmt} holds weights of a network with BatchNorm; use {' or '.join(GRAPHS)}"
        )
    model = turn(model.eval(), on=False)  # a graph shall be what the paper draws
    with torch.no_grad():
        if fmt in GRAPHS:
            write = write_onnx if fmt == "onnx" else write_torch_export
            return write(fold_batch_norm(model) if fold else model, model, meta, output)
        if fmt == "effnet_train":
            export_safetensors(output, Weights(model.state_dict(), meta))
            return 0.0
        theirs = to_torchvision(model, meta, variants) if fmt == "torchvision" else to_timm(model, meta, variants)
        difference = _held(theirs, model, [(2, 3, 64, 96), (1, 3, 75, 53)], fmt)
    # So that it can be read back as what it is, with a BatchNorm of their epsilon.
    names = "torchvision" if fmt == "torchvision" else "timm"
    meta = {**meta, "names": names, "model": {**meta["model"], "bn_eps": _eps(theirs)}}
    if fmt == "hub":
        write_hub(theirs, {**meta, "data": {}}, output, name=hub_name)  # where images lie here is nobody's business
    else:
        write_state_dict(theirs, meta, output)
    return difference


def to_timm(model: nn.Module, meta: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Return timm's network with the weights of `model`, its configuration saying how to preprocess.

    Raises ValueError where timm has no such network.
    """
    import timm

    name = variant(meta["model"], variants, "timm")
    # timm's `tf_` networks pad as TensorFlow does, the others symmetrically.
    architecture = f"{'tf_' if meta['model']['padding'] == 'same' else ''}efficientnet_{name}"
    theirs = timm.create_model(
        architecture, num_classes=meta["model"]["num_classes"], pretrained_cfg_overlay=timm_config(meta["preprocess"])
    )
    return _filled(theirs, model, "timm")


def to_torchvision(model: nn.Module, meta: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Return torchvision's network with the weights of `model`. Raises ValueError where it has no such network."""
    from torchvision.models import get_model

    name = variant(meta["model"], variants, "torchvision")
    if meta["model"]["padding"] != "symmetric":
        raise ValueError(
            "torchvision pads symmetrically, these weights were trained with padding=same (TensorFlow's): their logits "
            "would differ. Use format=timm or hub, or train with model.padding=symmetric"
        )
    return _filled(get_model(f"efficientnet_{name}", num_classes=meta["model"]["num_classes"]), model, "torchvision")


def variant(config: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], library: str) -> str:
    """Return the name of the published variant whose shape `config` has. Raises ValueError where there is none."""
    kind = config["_target_"].rpartition(".")[2]
    if kind != EfficientNet.__name__:
        raise ValueError(
            f"format={library} is for EfficientNets, and this is a {kind}: choose onnx, torch_export or effnet_train"
        )
    shape = ("_target_", "width", "depth", "se_ratio", "activation", "fixed_ends")
    for name, described in variants.items():
        known = published.ARCHITECTURE.fullmatch(f"efficientnet_{name}") and (library == "timm" or "lite" not in name)
        if known and all(described[key] == config[key] for key in shape):
            return name
    text = ", ".join(f"{key}={config[key]}" for key in shape[1:])
    raise ValueError(f"{library} has no EfficientNet of {text}: choose format=onnx, torch_export or effnet_train")


def timm_config(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's words for a preprocessing, and nothing of the weights that it would itself take for the network.

    timm resizes before it cuts, the authors cut before they resize: the same square, but for rounding.
    """
    size = preprocess["resolution"]
    return {
        "input_size": (3, size, size),
        "mean": tuple(preprocess["mean"]),
        "std": tuple(preprocess["std"]),
        "interpolation": preprocess["interpolation"],
        "crop_pct": _share(size, preprocess.get("resize") or size + preprocess["crop_padding"]),
        "crop_mode": "center",
        **dict.fromkeys(("url", "hf_hub_id", "tag", "test_input_size", "test_crop_pct", "paper_ids", "origin_url")),
        **dict.fromkeys(("license", "description", "source", "notes", "paper_name")),
    }


def _share(size: int, resized: int) -> float:
    """Return the share that timm's floor(size / share) turns into `resized`, whatever floats round to."""
    share = size / resized
    while math.floor(size / share) < resized:
        share = math.nextafter(share, 0)
    return share


def _filled(theirs: nn.Module, ours: nn.Module, fmt: str) -> nn.Module:
    """Load our weights strictly into another library's network; it may have another eps than we."""
    tensors = _with_eps(ours, _eps(theirs))
    theirs.load_state_dict(from_ours(tensors, fmt))
    return theirs.eval()


def _eps(model: nn.Module) -> float:
    found = {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(found) == 1
    return found.pop()


def _with_eps(model: nn.Module, eps: float) -> dict[str, Tensor]:
    """Return the weights with which BatchNorm of another `eps` does the same: the variance takes up the difference."""
    shift, tensors = _eps(model) - eps, dict(model.state_dict())
    if shift == 0:
        return tensors
    for name, tensor in tensors.items():
        if name.endswith("running_var"):
            moved = tensor.double() + shift
            if moved.min() < 0:
                raise ValueError(
                    f"{name} is as small as {tensor.min():.3g}: bn_eps={_eps(model):g} cannot become theirs, {eps:g}"
                )
            tensors[name] = moved.to(tensor.dtype)
    return tensors


def _held(theirs: Network, ours: Network, shapes: list[tuple[int, ...]], what: str) -> float:
    """Return how far logits differ on random images of the shapes given. Raises ValueError beyond TOLERANCE."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        expected = ours(images)
        found = (theirs(images) - expected).abs().max() / expected.abs().max()
        worst = max(worst, found.item() if found.isfinite() else math.inf)
    if worst > TOLERANCE:
        raise ValueError(
            f"the exported {what} network's logits differ by {worst:.2g} of the largest, more than {TOLERANCE:g}: "
            "nothing was written"
        )
    return worst


def write_state_dict(theirs: nn.Module, meta: Mapping[str, Any], path: Path) -> None:
    """Write a state dict by the suffix of `path`, .safetensors, or torch's own .pth and .pt, and `meta` beside it."""
    tensors = theirs.state_dict()
    if path.suffix == ".safetensors":
        export_safetensors(path, Weights(tensors, meta))
    else:
        stream = io.BytesIO()
        torch.save(tensors, stream)
        # What is said of the former file must not be said of this one, should this be all that is written.
        beside = Path(f"{path}.json")
        beside.unlink(missing_ok=True)
        write_bytes(path, stream.getvalue())
        write_bytes(beside, json.dumps(meta, indent=2, sort_keys=True).encode() + b"\n")


def write_hub(theirs: nn.Module, meta: Mapping[str, Any], folder: Path, *, name: str | None = None) -> None:
    """Write a folder as the Hugging Face hub lays it out: model.safetensors, config.json, README.md.

    timm reads it (`timm.create_model("local-dir:...")`, or "hf-hub:owner/name" once it is there), and so do we, who
    find in the weights' header what timm's configuration has no words for. Raises FileExistsError where `folder` holds
    something else.
    """
    from timm.models import save_for_hf

    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output={folder} exists and is no folder of the hub's: choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        save_for_hf(theirs, str(unfinished), {"label_names": list(meta["classes"])}, safe_serialization=True)
        export_safetensors(unfinished / EXPORT, Weights(theirs.state_dict(), meta))
        (unfinished / "README.md").write_text(_card(theirs, meta, name or "OWNER/NAME"), encoding="utf-8")
        os.chmod(unfinished, 0o755)
        # The old folder makes way as a whole: no file of it may stand beside a new one.
        former = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        if folder.exists():
            os.replace(folder, former / "former")
        os.replace(unfinished, folder)
        shutil.rmtree(former)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _card(theirs: Any, meta: Mapping[str, Any], name: str) -> str:
    """Return the hub's model card."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="timm", pipeline_tag="image-classification", tags=["image-classification"])
    preprocess, architecture = meta["preprocess"], theirs.pretrained_cfg["architecture"]
    source = meta.get("source")
    whose = (
        f"Weights of {source}, converted with effnet_train." if source else "An EfficientNet trained with effnet_train."
    )
    crop = (
        f"shorter side resized to {preprocess['resize']}, centre cut"
        if preprocess.get("resize")
        else f"central square of {preprocess['resolution']} / "
        f"{preprocess['resolution'] + preprocess['crop_padding']} of the shorter side, resized"
    )
    rows = {
        "architecture": architecture,
        "classes": len(meta["classes"]),
        "input": f"{preprocess['resolution']} x {preprocess['resolution']} pixels, RGB",
        "crop": f"{crop} ({preprocess['interpolation']})",
        "mean": ", ".join(f"{value:g}" for value in preprocess["mean"]),
        "std": ", ".join(f"{value:g}" for value in preprocess["std"]),
        "padding": meta["model"]["padding"],
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"---\n{data}\n---\n# {architecture}\n\n{whose}\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n"
        f'```python\nimport timm\n\nmodel = timm.create_model("hf-hub:{name}", pretrained=True).eval()\n```\n\n'
        f"`effnet-eval checkpoint=hub:{name}` and `effnet-predict` read it as well, with its exact preprocessing.\n"
    )


def push_to_hub(folder: Path, name: str) -> str:
    """Upload a folder of `write_hub` to the hub's repository `name` (owner/name), made if need be; return its address.

    Raises ConnectionError where that fails: the folder is there all the same.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        api = HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={name} is no repository's name: give owner/name") from error
    except Exception as error:  # each version of the hub's library has its own HTTP client, with errors of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConnectionError(
            f"push_to_hub={name} failed ({reason[0]}). The folder {folder} is complete: log in (hf auth login), or "
            f"where there is a network: hf upload {name} {folder}"
        ) from error
    return str(address)


def write_onnx(graph: nn.Module, ours: nn.Module, meta: Mapping[str, Any], path: Path) -> float:
    """Write `graph` as ONNX, for any number of images at once, and hold it against `ours` in onnxruntime.

    Input `images` (N, 3, R, R) float32, preprocessed; output `logits` (N, classes). `meta` stands in its metadata under
    `effnet_train`. Raises ImportError naming the extra.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ImportError("format=onnx needs more packages: pip install 'effnet-train[onnx]'") from error
    size = meta["preprocess"]["resolution"]
    with _quiet():
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["effnet_train"] = json.dumps(meta)
    data: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def theirs(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    difference = _held(theirs, ours, [(1, 3, size, size), (3, 3, size, size)], "ONNX")
    write_bytes(path, data)
    return difference


def write_torch_export(graph: nn.Module, ours: nn.Module, meta: Mapping[str, Any], path: Path) -> float:
    """Write `graph` as torch.export's program, for any number of images; hold it, read back, against `ours`.

    `torch.export.load(path).module()` maps images (N, 3, R, R) to logits. `meta` is its extra file `effnet_train.json`.
    """
    size = meta["preprocess"]["resolution"]
    batch = torch.export.Dim("batch", min=1)
    stream = io.BytesIO()
    with _quiet():
        program = torch.export.export(graph, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
        torch.export.save(program, stream, extra_files={"effnet_train.json": json.dumps(meta)})
        stream.seek(0)
        theirs = torch.export.load(stream).module()
    difference = _held(theirs, ours, [(1, 3, size, size), (3, 3, size, size)], "exported")
    write_bytes(path, stream.getvalue())
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress and warnings about their own insides from the user."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
