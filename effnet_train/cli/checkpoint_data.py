"""The data set that a checkpoint is held against: the one asked for, or its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from effnet_train.data.preprocess import Preprocess

Config = Mapping[str, Any]


def without_preprocess(cfg: DictConfig) -> dict[str, Any]:
    """Return a plain configuration without its data set's preprocessing, which would refer to a model's."""
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    config["data"].pop("preprocess", None)
    plain: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    return plain


def data_config(chosen: Config, label: str, meta: Config, preprocess: "Preprocess") -> dict[str, Any]:
    """Return the data set asked for, or the checkpoint's own, with the checkpoint's preprocessing."""
    own = meta["data"]
    if "_target_" not in chosen:
        if not own:
            raise ValueError(f"checkpoint={label} carries no data set: choose one, as data=imagenet data.root=/path")
        given = {key: value for key, value in chosen.items() if value is not None}
        # A file chooses no place to write.
        own = {key: None if key in ("cache", "shard_cache") else value for key, value in own.items()}
        chosen = {**own, **given, "expected": _expected(chosen["expected"], own.get("expected"))}
        if "root" not in given and not Path(own["root"]).is_dir():
            # Nothing is made or fetched at a place that a file chose.
            raise FileNotFoundError(
                f"checkpoint={label} was trained on data.root={own['root']}, which is not here: give data.root=..."
            )
    elif chosen["root"] is None:
        raise ValueError("data.root has no value: give data.root=... on the command line")
    elif not (Path(chosen["root"]).is_dir() or chosen["root"].startswith("hub:") or "://" in chosen["root"]) and all(
        chosen.get(k) == own.get(k) for k in ("_target_", "dataset")
    ):
        chosen = {**chosen, "root": own["root"]}  # the same data set, where the checkpoint's run had it
    target = {"_target_": "effnet_train.data.preprocess.Preprocess"}
    return {**chosen, "preprocess": {**target, **preprocess.to_dict()}}


def _expected(chosen: Any, own: Any) -> Any:
    if chosen == "own":
        return own
    if chosen is not None and not isinstance(chosen, Mapping):
        raise ValueError(f"data.expected={chosen} must be own, the checkpoint's; null; or counts as {{val: 50000}}")
    return chosen
