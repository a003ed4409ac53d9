"""`effnet-bench train`, `eval`, `latency` and `startup` through their command."""

import json

import pytest

from effnet_train.analysis import elsewhere, roofline

TINY = ("resolution=32", "batch_size=2", "rounds=1", "seconds=0.001")


@pytest.fixture(autouse=True)
def known_device(monkeypatch):
    """Spare these tests the measurement of the machine."""
    monkeypatch.setattr(roofline, "measure_device", lambda *_: roofline.Device(1e10, 1e11))


@pytest.mark.parametrize("job", ["train", "eval"])
def test_ours_is_measured_beside_the_others(cli, tmp_path, job):
    found = cli("bench", job, "models=[nano,b0]", *TINY, "memory=false", "output=results/speed.json")
    assert found.status == 0, found.err
    assert "written to results/speed.json" in found.out
    result = json.loads((tmp_path / "results/speed.json").read_text())
    assert result["job"] == job
    assert result["machine"]["packages"]["timm"]
    assert result["device"]["bytes_per_s"] > 0
    rows = result["rows"]
    assert [(row["variant"], row["name"]) for row in rows] == [
        ("nano", "ours"),
        ("b0", "ours"),
        ("b0", "timm"),
        ("b0", "torchvision"),
    ]
    assert [row["reference"] for row in rows] == ["ours", "timm", "timm", "timm"]
    assert rows[2]["ratio"] == 1
    assert {row["path"] for row in rows[2:]} == {"plain"}
    assert rows[1]["path"] == ("folded, oneDNN" if job == "eval" else "plain")
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1000 * row["batch_size"] / row["ms"], rel=0.01)
        assert row["times_floor"] == pytest.approx(row["ms"] / row["floor"]["ms"], rel=0.02)
        assert sum(row["kinds"].values()) == pytest.approx(1, abs=0.01)
        assert row["peak_mib"] is None
    assert "x timm" in found.out
    assert ("ours (folded, oneDNN)" in found.out) == (job == "eval")


def test_memory_and_precision(cli, tmp_path):
    words = ("models=[nano]", "libraries=[ours]", "modes=[eager]", "precision=bf16", "kinds=false", "output=out.json")
    found = cli("bench", "train", *words, *TINY)
    assert found.status == 0, found.err
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert 1 < row["peak_mib"] < 200
    assert row["precision"] == "bf16"
    assert row["kinds"] is None


@pytest.mark.parametrize("kinds", ["kinds=false", "kinds=true"])
def test_what_is_measured_is_kept_when_the_next_fails_and_nobody_is_left(cli, tmp_path, monkeypatch, kinds):
    closed = set()

    class Contender:
        path, peak = "plain", 0

        def __init__(self, case, set_up, wait_s):
            self.case = case

        def prepared(self):
            if self.case.variant == "b0":
                raise ChildProcessError("it died")
            return 0.1

        def rest(self):
            assert not closed

        def timed(self, count):
            return 0.1 * count

        def kinds(self):
            raise ChildProcessError("it died")

        def close(self):
            closed.add(self.case.name + self.case.variant)

    monkeypatch.setattr(elsewhere, "Elsewhere", Contender)
    found = cli("bench", "train", "models=[nano,b0]", *TINY, kinds, "output=out.json")
    assert (found.status, "it died" in found.err) == (2, True)
    assert [row["variant"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["nano"]
    assert closed == {"oursnano", "oursb0", "timmb0", "torchvisionb0"}


def test_latency_is_of_one_image_in_one_thread(cli, tmp_path):
    words = ("resolution=32", "rounds=1", "seconds=0.001", "libraries=[ours,timm]", "output=out.json")
    found = cli("bench", "latency", *words)
    assert found.status == 0, found.err
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["device"]["threads"] == 1
    assert [row["batch_size"] for row in result["rows"]] == [1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models=[b9]"], "models has b9, which is not known: did you mean b"),
        (["models=[]"], "models=[] names none"),
        (["modes=[eager,eager]"], "modes=[eager,eager] names one twice: name each once"),
        (["models=[resnet50]"], "models has resnet50, which is no EfficientNet"),
        (["libraries=[keras]"], "libraries has keras, which is not known"),
        (
            ["modes=[x]"],
            "modes has x, which is not known: The choices are eager, compiled, reduce-overhead",
        ),
        (
            ["own_modes=[eager,fused]"],
            "own_modes has fused, which is training on a GPU: leave it away, or give device=cuda",
        ),
        (["own_modes=[grahp]"], "own_modes has grahp, which is not known: did you mean graph? The choices are eager,"),
        (["seconds=0"], "seconds=0 must be more than 0"),
        (["rounds=0"], "rounds=0 must be at least 1"),
        (["batch_size=0"], "batch_size=0 must be at least 1"),
        (["precision=fp8"], "precision=fp8 is not known"),
        (["device=tpu"], "device=tpu is not known"),
        (["libraries=[timm]", "models=[nano]"], "no library of libraries=[timm] has nano"),
        (["output=/proc/x/y.json"], "output=/proc/x/y.json"),
        (["job=train"], "job is not a key"),
    ],
)
def test_bad_input_is_named(cli, words, message):
    found = cli("bench", "train" if words[0].startswith("own_") else "eval", *words)
    assert found.status == 2
    assert message in found.err


def test_startup_refuses_what_it_does_not_know(cli):
    assert "rounds=0 must be at least 1" in cli("bench", "startup", "rounds=0").err
    help_text = cli("bench", "startup", "--help").out
    assert "effnet-bench startup" in help_text


def test_startup_writes_its_seconds(cli, tmp_path, monkeypatch):
    from effnet_train.analysis import startup

    monkeypatch.setattr(startup, "_seconds", lambda words, status: 0.5)
    found = cli("bench", "startup", "output=out.json")
    assert found.status == 0, found.err
    rows = json.loads((tmp_path / "out.json").read_text())["startup"]
    assert rows["debug=tiny"] == {"seconds": 0.5, "limit_s": 15.0, "runs_s": [0.5] * 3}
    assert "wanted: under 15 s" in found.out
