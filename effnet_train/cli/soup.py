"""`effnet-export average=[...]` and `batch_norm=`: weights averaged, statistics estimated anew."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from effnet_train.cli.app import differing_keys
from effnet_train.cli.checkpoint_data import data_config

if TYPE_CHECKING:
    from torch import nn

    from effnet_train.data.datasets import Data
    from effnet_train.data.loader import Batch
    from effnet_train.data.sources import Source
    from effnet_train.distributed import Session
    from effnet_train.engine.checkpoint import Weights
    from effnet_train.engine.soup import Tensors

Config = Mapping[str, Any]
# What of a model changes how it is trained, and not what its weights compute.
_OF_TRAINING = ("dropout", "drop_connect", "bn_momentum", "checkpointing", "fused", "resolution")
_SEED = 0  # which training images the statistics are of


def check_soup(config: Config) -> None:
    """Check what is asked for together. Raises ValueError."""
    names = config["average"]
    if (config["checkpoint"] is None) == (names is None):
        raise ValueError("give checkpoint=..., or average=[a,b,c] to average the weights of several: one of them")
    if names is not None and (len(names) < 2 or len(set(names)) < len(names) or not all(map(str, names))):
        raise ValueError(f"average={names} must be several different checkpoints, as [runs/A,runs/B]")
    if names is None and config["soup"] != "uniform":
        raise ValueError(f"soup={config['soup']} chooses among several: give average=[a,b,c]")
    if names is not None and config["source"] is not None:
        raise ValueError(
            f"source={config['source']} goes with checkpoint=: weights are averaged that say whose they are"
        )
    if config["batch_norm"] is not None and config["batch_norm"] < config["batch_size"]:
        raise ValueError(
            f"batch_norm={config['batch_norm']} is less than batch_size={config['batch_size']}: statistics are of "
            "whole batches, raise it"
        )


def cook(config: Config) -> tuple["nn.Module", dict[str, Any]]:
    """Return the network of the checkpoint or of the average asked for, on the CPU, and what travels with it."""
    from effnet_train.cli import build
    from effnet_train.distributed import Session
    from effnet_train.engine.soup import average, greedy

    session, names = _session(config), config["average"] or [config["checkpoint"]]
    how = {
        "which": config["weights"],
        "source": config["source"],
        "key": "average" if config["average"] else "checkpoint",
    }
    members = [build.read_weights(name, session, **how) for name in names]
    _check_alike(names, members)
    meta = dict(members[0].meta)
    model = build.build_model(meta["model"], len(meta["classes"]))
    for name, member in zip(names, members, strict=True):
        build.load_into(model, member, name)  # each is looked at, the last stays
    model = build.place(model, session.device).eval()
    data = _data(config, names[0], meta, session) if config["soup"] == "greedy" or config["batch_norm"] else None

    def take(tensors: "Tensors") -> None:
        model.load_state_dict(tensors)
        if data is not None and config["batch_norm"]:
            _estimate(config, model, data, session)

    def score(tensors: "Tensors") -> float:
        assert data is not None
        take(tensors)
        return _top1(config, model, data, session)

    if config["average"]:
        chosen = list(range(len(names)))
        if config["soup"] == "greedy":
            chosen, alone = greedy([member.tensors for member in members], score)
            print("\n".join(f"{name}: top-1 {top1:.2%}" for name, top1 in zip(names, alone, strict=True)))
        mean = average([members[place].tensors for place in chosen])
        meta = {key: value for key, value in meta.items() if key not in ("step", "source")}
        meta["average"] = [names[place] for place in chosen]
        take(mean)
        told = f": top-1 {_top1(config, model, data, session):.2%}" if data is not None else ""
        print(f"average of {', '.join(meta['average'])}{told}")
    elif config["batch_norm"]:
        take(members[0].tensors)
    return build.place(model, Session().device), meta


def _session(config: Config) -> "Session":
    import torch

    from effnet_train.distributed import Session, resolve_device

    return Session(device=torch.device(resolve_device(config["device"])))


def _check_alike(names: Sequence[str], members: Sequence["Weights"]) -> None:
    """Check that all are weights of the same network, for the same classes and inputs. Raises ValueError."""
    from effnet_train.cli import build

    def what(meta: Config) -> dict[str, Any]:
        model = {key: value for key, value in meta["model"].items() if key not in _OF_TRAINING}
        return {"model": model, "preprocess": meta["preprocess"], "classes": list(meta["classes"])}

    for name, member in zip(names, members, strict=True):
        build.check_targets(dict(member.meta), name)
        differing = differing_keys(what(members[0].meta), what(member.meta))
        if differing:
            key, (one, other) = next(iter(differing.items()))
            raise ValueError(
                f"average= is of weights of one network, and {names[0]} and {name} differ: {key} is {one} and {other}"
            )


def _data(config: Config, label: str, meta: Config, session: "Session") -> "Data":
    from effnet_train.cli import build
    from effnet_train.data.preprocess import Preprocess

    chosen = data_config(config["data"], label, meta, Preprocess(**meta["preprocess"]))
    data = build.build_data(OmegaConf.create(chosen), session)
    if list(data.classes) != list(meta["classes"]):
        raise ValueError(f"data.root={chosen['root']} has other classes than {label}: give the data set of the weights")
    if config["batch_norm"] and len(data.train) < config["batch_norm"]:
        raise ValueError(f"batch_norm={config['batch_norm']} is more than the {len(data.train):,} training images")
    return data


def _estimate(config: Config, model: "nn.Module", data: "Data", session: "Session") -> None:
    """Estimate BatchNorm's statistics over training images in the evaluation crop, as the network will be used."""
    from effnet_train.data.order import permutation
    from effnet_train.data.sources import Subset
    from effnet_train.engine.precise_norm import estimate_statistics

    count = config["batch_norm"] // config["batch_size"] * config["batch_size"]  # a batch of one has no variance
    images = Subset(data.train, permutation(_SEED, 0, len(data.train))[:count])
    found = estimate_statistics(model, _batches(config, images, data, session), data.preprocess, session.device)
    assert data.on_error == "skip" or found == count


def _top1(config: Config, model: "nn.Module", data: "Data", session: "Session") -> float:
    """Return top-1 on the images that a run selects by."""
    from effnet_train.engine.evaluate import evaluate

    results = evaluate(
        {"model": model},
        _batches(config, data.val, data, session),
        num_images=len(data.val),
        preprocess=data.preprocess,
        precision="fp32",
        session=session,
    )
    return results["model"].top1


def _batches(config: Config, source: "Source", data: "Data", session: "Session") -> Iterator["Batch"]:
    from effnet_train.cli import build
    from effnet_train.data.loader import eval_batches

    workers = build.resolve_workers(config["workers"], session.device)
    return eval_batches(source, data, batch_size=config["batch_size"], workers=workers, device=session.device)
