"""`effnet-label`: a teacher's soft and hard pseudo-labels of images without labels, for `recipe=noisy_student`."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import command, run_rank

if TYPE_CHECKING:
    from effnet_train.data.sources import Source

SETTINGS = "settings.json"
_PATIENCE_S = 12 * 3600.0  # of ranks that have scored their pieces, for the others and for rank 0's choice among all


def task(cfg: DictConfig) -> None:
    """Label in as many processes as there are ranks."""
    from effnet_train import distributed
    from effnet_train.cli import check

    # The data set's preprocessing refers to a model's configuration: the teacher's own is used.
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    config["data"].pop("preprocess", None)
    config = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    check.check_config(config, check.LABEL)
    if not 0 <= config["confidence"] < 1:
        raise ValueError(f"confidence={config['confidence']} must be a probability: from 0 to below 1")
    device = distributed.resolve_device(config["device"])
    ranks = distributed.resolve_ranks(config["ranks"], device)
    if distributed.launched() or ranks == 1:
        label_rank(config, device)
    else:
        distributed.launch(run_rank, "label", label_rank, config, device, ranks=ranks)


def label_rank(config: dict[str, Any], device: str) -> None:
    """Label as one rank; rank 0 chooses, and says what came out."""
    from effnet_train.cli import build
    from effnet_train.data.device_batches import check_device
    from effnet_train.data.preprocess import Preprocess
    from effnet_train.distributed import open_session
    from effnet_train.engine.label import choose, probabilities, score_pieces
    from effnet_train.engine.teacher import fingerprint

    folder, size = Path(config["output"]), config["batch_size"]
    with open_session(device, _PATIENCE_S) as session:
        precision = build.resolve_precision(config["precision"], session.device)
        build.set_arithmetic(precision, True, session.device)
        model, meta = build.load_model(config["checkpoint"], session, which=config["weights"], source=config["source"])
        preprocess = Preprocess(**meta["preprocess"])
        if config["resolution"] is not None:
            preprocess = preprocess.at(config["resolution"])
        given = {**config["data"], "preprocess": {"_target_": _name(Preprocess), **preprocess.to_dict()}}
        data = replace(build.build_data(OmegaConf.create(given), session), preprocess=preprocess)
        check_device(data.backend, session.device, preprocess)
        source = data.val if config["split"] == "val" else data.train
        piece = -(-config["images"] // size) * size
        about = {
            "teacher": config["checkpoint"],
            "teacher_sha256": fingerprint(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "classes": list(meta["classes"]),
            "split": config["split"],
            "data": given,
            **_scored(source, config, precision, piece),
        }
        with session.main_first():
            if session.is_main:
                _claim(folder, about)
        workers = build.resolve_workers(config["workers"], session.device)
        score = partial(probabilities, model, data=data, precision=precision, device=session.device)
        how = {"size": piece, "batch_size": size, "workers": workers, "session": session}
        score_pieces(score, source, data, folder, **how)
        session.barrier()
        if session.is_main:
            options = {"threshold": config["confidence"], "per_class": config["per_class"], "seed": config["seed"]}
            print(_summary(choose(folder, source, about, **options), folder))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _scored(source: "Source", config: Mapping[str, Any], precision: str, piece: int) -> dict[str, Any]:
    """Return what else, beside the teacher, the probabilities come from."""
    from effnet_train.engine.label import names_digest

    if not len(source):
        raise ValueError(f"data.root={config['data']['root']} has no images in split={config['split']}")
    return {
        "images": len(source),
        "names_sha256": names_digest(source, config["data"]["root"]),
        "precision": precision,
        "batch_size": config["batch_size"],
        "piece": piece,
    }


def _claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Make the folder, or see that it holds scores of the same teacher and images. Raises ValueError."""
    from effnet_train.cli.app import differing_keys
    from effnet_train.engine.checkpoint import write_bytes

    settings = {key: value for key, value in about.items() if key not in ("teacher", "data")}
    settings["preprocess"] = about["data"]["preprocess"]
    file = folder / SETTINGS
    if file.exists():
        differing = differing_keys(json.loads(file.read_text()), settings)
        if differing:
            told = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in differing.items())
            raise ValueError(
                f"output={folder} holds another teacher's scores, or of other images: {told}. Give another output="
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output={folder} is there and not empty: give a folder of its own")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(file, json.dumps(settings, indent=1).encode() + b"\n")
    (folder / "scores").mkdir(exist_ok=True)


def _summary(manifest: Mapping[str, Any], folder: Path) -> str:
    counts = manifest["of_each_class"]
    empty = [name for name, count in zip(manifest["classes"], counts, strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        print(f"warning: {len(empty)} classes have no image: {shown}", file=sys.stderr)
    return (
        f"{manifest['kept']:,} of {manifest['images']:,} images kept at confidence={manifest['confidence']}, "
        f"{manifest['chosen']:,} with duplicates, {min(counts):,} to {max(counts):,} of a class: {folder}"
    )


main = command("label", task)

if __name__ == "__main__":
    main()
