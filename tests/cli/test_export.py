"""`effnet-export`: a run's checkpoint for others, and a clear word where it cannot be."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from effnet_train.cli import build
from effnet_train.engine.checkpoint import load_weights

Cli = Callable[..., Any]


@pytest.fixture
def b0(tiny: list[str], cli: Cli) -> Path:
    """Return the folder of a run of a network that timm has too, made in the current folder."""
    others = (text for text in tiny if not text.startswith("model.width"))
    done = cli("train", *others, "model=b0", "max_steps=1", "batch_size=4", "eval_batch_size=20")
    assert done.status == 0, done.err
    return Path("run").absolute()


def test_formats_of_a_run(cli: Cli, b0: Path) -> None:
    """Each beside the checkpoint, and the round trip through timm's names gives the same bits."""
    for fmt, name in (("timm", "best.timm.safetensors"), ("hub", "best.hub"), ("effnet_train", "best.safetensors")):
        done = cli("export", f"checkpoint={b0}", f"format={fmt}")
        assert done.status == 0, done.err
        assert done.out.startswith(f"{b0 / name}: {fmt}, logits within "), done.out
    ours = load_weights(b0 / "best.pt")
    for name in ("best.safetensors", "best.timm.safetensors", "best.hub"):
        again = load_weights(b0 / name)
        # Where images lie on this machine is for no hub.
        assert again.meta == (ours.meta if name != "best.hub" else {**ours.meta, "data": {}})
        assert again.tensors.keys() == ours.tensors.keys()
        assert all(torch.equal(again.tensors[key], tensor) for key, tensor in ours.tensors.items())
    theirs = load_file(b0 / "best.timm.safetensors")
    assert torch.equal(theirs["conv_stem.weight"], ours.tensors["stem.conv.weight"])
    assert len(theirs) == len(ours.tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("format=onyx", "format=onyx is not known: use one of effnet_train, timm, torchvision"),
        ("format=timm fold=true", "fold=true: format=timm holds weights of a network with BatchNorm"),
        ("format=timm", "timm has no EfficientNet of width=0.25"),
        ("format=onnx push_to_hub=me/mine", "push_to_hub=me/mine needs format=hub, not format=onnx"),
        ("format=onnx output=nowhere/model.onnx", "output=nowhere/model.onnx: its folder does not exist"),
        ("format=effnet_train output=CHECKPOINT", "is the checkpoint itself: choose another name"),
        ("format=effnet_train weights=best", "weights=best is not known: use ema or raw"),
        ("", "format has no value: give format=... on the command line"),
        ("formt=timm", "formt is not a key of the configuration: did you mean format?"),
    ],
)
def test_bad_input(cli: Cli, trained: Path, arguments: str, message: str) -> None:
    before = sorted(trained.iterdir())
    words = arguments.replace("CHECKPOINT", str(trained / "best.pt")).split()
    done = cli("export", f"checkpoint={trained}", *words)
    assert done.status == 2
    assert done.err.startswith("effnet-export: error: ")
    assert message in done.err
    assert sorted(trained.iterdir()) == before


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that an upload of small files asks for."""

    repositories: set[str]
    files: dict[str, bytes]

    def do_POST(self) -> None:
        """Make a repository, say how files are to come, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization") or "me"
            self.repositories.add(f"{owner}/{name}")
            self._answer({"url": f"http://{self.headers['Host']}/{owner}/{name}", "id": f"{owner}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = line["value"]["content"].encode()
            commit = f"http://{self.headers['Host']}/me/mine/commit/{'1' * 40}"
            self._answer({"commitUrl": commit, "commitOid": "1" * 40, "pullRequestUrl": None})
        else:
            self._answer({}, 404)

    def do_GET(self) -> None:
        """Say that a repository is there, and empty."""
        self._answer({"id": self.path, "sha": "0" * 40, "siblings": [], "private": False})

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Return a hub on this machine, which huggingface_hub takes for the real one."""
    Hub.repositories, Hub.files = set(), {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    try:
        yield Hub
    finally:
        server.shutdown()
        server.server_close()


def test_pushing_to_the_hub(cli: Cli, b0: Path, hub: type[Hub]) -> None:
    done = cli("export", f"checkpoint={b0}", "format=hub", "push_to_hub=me/mine")
    assert done.status == 0, done.err
    assert hub.repositories == {"me/mine"}
    assert {"README.md", "config.json", "model.safetensors"} <= hub.files.keys()


def test_a_hub_out_of_reach_leaves_the_folder(cli: Cli, b0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    done = cli("export", f"checkpoint={b0}", "format=hub", "push_to_hub=me/mine")
    assert done.status == 2
    assert "push_to_hub=me/mine failed (" in done.err
    assert f"hf upload me/mine {b0 / 'best.hub'}" in done.err
    assert (b0 / "best.hub" / "model.safetensors").is_file()
    done = cli("export", f"checkpoint={b0}", "format=hub", "push_to_hub=a/b/c")
    assert "push_to_hub=a/b/c is no repository's name: give owner/name" in done.err


def test_what_timm_itself_saved_is_read(cli: Cli, tmp_path: Path) -> None:
    """Its config.json names arguments that are as always, which are no changed network."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    save_for_hf(timm.create_model("tf_efficientnet_b0", num_classes=7), "saved", safe_serialization=True)
    arguments = json.loads(Path("saved/config.json").read_text()).get("model_args", {})
    weights = load_weights("saved", variants=build.model_variants())
    assert (weights.meta["source"], len(weights.meta["classes"])) == ("timm_tf", 7), arguments
    config = json.loads(Path("saved/config.json").read_text())
    config["model_args"] = {"in_chans": 1, "global_pool": "avg"}
    Path("saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"asks for a changed network, which is not offered here: in_chans=1"):
        load_weights("saved", variants=build.model_variants())


@pytest.mark.parametrize(
    ("fmt", "output"), [("effnet_train", "w.json"), ("timm", "w.bin"), ("onnx", "w.pth"), ("torch_export", "w")]
)
def test_a_name_that_does_not_fit_the_format(cli: Cli, trained: Path, fmt: str, output: str) -> None:
    done = cli("export", f"checkpoint={trained}", f"format={fmt}", f"output={output}")
    assert done.status == 2
    assert f"output={output}: of format={fmt} the name must end in ." in done.err
    assert not Path(output).exists()


def test_graphs_are_not_read_back(cli: Cli, trained: Path) -> None:
    done = cli("export", f"checkpoint={trained}", "format=torch_export", "output=w.pt2")
    assert done.status == 0, done.err
    done = cli("predict", str(trained / "config.yaml"), "checkpoint=w.pt2")
    assert "w.pt2: it is a graph for other programs, which is not read back: give what it was exported from" in done.err


def test_what_was_said_of_a_former_file_is_not_said_of_another(cli: Cli, b0: Path) -> None:
    """Two exports side by side have a description each; and without it nothing is guessed of other classes."""
    for name in ("w.pt", "w.pth"):
        done = cli("export", f"checkpoint={b0}", "format=timm", f"output={name}")
        assert f"{name}.json: its preprocessing and classes; keep it beside" in done.out
    assert load_weights("w.pt").meta == load_weights("w.pth").meta == load_weights(b0).meta
    Path("w.pt.json").unlink()
    with pytest.raises(ValueError, match="say whose weights they are: source=timm_tf"):
        load_weights("w.pt", variants=build.model_variants())


def test_the_hubs_folder_names_what_it_is(cli: Cli, b0: Path) -> None:
    assert cli("export", f"checkpoint={b0}", "format=hub", "output=hub").status == 0
    text = Path("hub/README.md").read_text() + Path("hub/model.json").read_text() + Path("hub/config.json").read_text()
    assert "An EfficientNet trained with effnet_train." in text
    assert str(b0.parent) not in text
    assert "few" not in text  # the folder of the images
    assert [path.name for path in Path().iterdir() if path.name.startswith(".hub")] == []


def test_weights_that_are_not_finite_are_of_no_use(cli: Cli, b0: Path) -> None:
    payload = torch.load(b0 / "best.pt", weights_only=True)
    payload["ema"]["classifier.bias"][3] = torch.nan
    torch.save(payload, "nan.pt")
    done = cli("export", "checkpoint=nan.pt", "format=timm")
    assert "nan.pt holds numbers that are not finite, in classifier.bias: it is of no use" in done.err
