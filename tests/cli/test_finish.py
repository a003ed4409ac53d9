"""The end of a run on several ranks: all score what rank 0 has chosen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from effnet_train import distributed
from effnet_train.cli.rank import _finish
from effnet_train.engine.checkpoint import load_weights
from effnet_train.engine.saving import Checkpoints

META = {"model": {"_target_": "m"}, "preprocess": {"resolution": 8}, "classes": ["a", "b"], "data": {}}


def network(value: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model


def work(folder: str) -> None:
    """Finish as one of two ranks; the other one's file system is behind, with the best of before."""
    with distributed.open_session("cpu") as session:
        mine = Path(folder) / str(session.rank)
        mine.mkdir()
        tensors = network(3.0 - session.rank).state_dict()
        payload = {"effnet_train": 1, "step": 3 - session.rank, "model": tensors, "ema": tensors, "meta": META}
        torch.save(payload, mine / "best.pt")
        state = SimpleNamespace(ema=SimpleNamespace(module=network(9.0)), best={"step": 3}, step=5)
        run: Any = SimpleNamespace(
            session=session, checkpoints=Checkpoints(mine), select_by="val_ema/top1", state=state, meta=META
        )

        def score(_source: Any, models: dict[str, nn.Module], _stopped: Any) -> Any:
            scored = {name: tensor.unique().tolist() for name, tensor in models["test"].state_dict().items()}
            (mine / "scored.json").write_text(json.dumps(scored))
            return {"test": SimpleNamespace(scalars=lambda name: {f"{name}/top1": 0.5}, top1=0.5)}

        data: Any = SimpleNamespace(test="held out")
        _finish(run, data, score, lambda: False)


def test_all_ranks_score_the_weights_that_rank_0_has(tmp_path: Path) -> None:
    distributed.launch(work, str(tmp_path), ranks=2)
    mine, other = (json.loads((tmp_path / str(rank) / "scored.json").read_text()) for rank in (0, 1))
    assert mine == other == {name: [3.0] for name in network(0).state_dict()}
    assert load_weights(tmp_path / "0" / "model.safetensors").meta["step"] == 3
    assert not (tmp_path / "1" / "model.safetensors").exists()
