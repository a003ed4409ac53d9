"""The scripts of benchmarks/: they run, and what they write is what they say."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effnet_train.cli import build

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables():
    """Return the module that writes the tables."""
    spec = importlib.util.spec_from_file_location("performance_tables", ROOT / "benchmarks" / "performance_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MACHINE = {
    "cpu": "Abacus",
    "cpus": 2,
    "gpu": None,
    "load": 0.1,
    "packages": {"torch": "2", "timm": "1", "torchvision": "0"},
}
ROW = {
    "variant": "b0",
    "name": "ours",
    "path": "folded",
    "resolution": 224,
    "batch_size": 8,
    "precision": "fp32",
    "ms": 1234.5,
    "images_per_s": 6.5,
    "ratio": 1.25,
    "reference": "timm",
    "peak_mib": 1000.4,
    "floor": {"flops": 2e9, "bytes": 3e6, "ms": 100.0},
    "times_floor": 12.3,
    "kinds": {"convolution": 0.9, "copies": 0.1},
}


def test_tables_are_written_between_their_marks_and_again(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    device = {"bytes_per_s": 2e9, "flops_per_s": 3e12, "threads": 2}
    (tmp_path / "speed.json").write_text(json.dumps({"machine": MACHINE, "device": device, "rows": [ROW]}))
    starts = {"--help": {"seconds": 0.5, "limit_s": 1.0}}
    (tmp_path / "startup.json").write_text(json.dumps({"machine": MACHINE, "startup": starts}))
    page = tmp_path / "page.md"
    marks = [f"<!-- table: {name}.json -->\nstale\n<!-- end -->" for name in ("speed", "startup", "absent")]
    page.write_text("\n".join(["# Page", *marks, "the end"]))
    for _ in range(2):  # written a second time it is the same
        monkeypatch.setattr(sys, "argv", ["performance_tables.py", str(page)])
        tables.main()
        text = page.read_text()
        assert "stale" not in text
        row = "| b0, 224 px, batch 8, fp32 | ours (folded) | 1,234.5 | 6.5 | 1.25 timm | 1,000 | 12.3 |"
        assert text.count(row) == 1
        assert "floor of b0: 100.0 ms (2 GFLOP, 3 MB)." in text
        assert "| b0 | ours (folded) | convolution 90%, copies 10% |" in text
        assert "Abacus, 2 CPUs; torch 2, timm 1, torchvision 0; load 0.1" in text
        assert "| --help | 0.5 | under 1 |" in text
        assert "Not measured yet: there is no benchmarks/results/absent.json." in text
        assert text.startswith("# Page\n")
        assert text.endswith("the end")


def test_the_page_names_results_that_the_scripts_write():
    page = (ROOT / "docs" / "performance.md").read_text()
    scripts = "".join((ROOT / "benchmarks" / name).read_text() for name in ("cpu.sh", "gpu.sh"))
    for line in page.splitlines():
        if line.startswith("<!-- table: "):
            kind = line.split()[2].removesuffix(".json").removesuffix("-epyc-2cpu").removesuffix("-cuda")
            assert f"{kind}-$NAME.json" in scripts, line


def run(script: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), **variables}
    return subprocess.run(["sh", str(ROOT / "benchmarks" / script)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_gpus_script_is_rehearsed_on_a_cpu(tmp_path):
    words = "resolution=32 batch_size=2 rounds=1 seconds=0.01 memory=false kinds=false libraries=[ours,timm]"
    done = run("gpu.sh", tmp_path, DEVICE="cpu", NAME="try", TRAINING="max_steps=4", WORDS=words, MINUTES="60")
    assert done.returncode == 0, done.stdout + done.stderr
    names = {"train-try", "train-large-try", "eval-try", "latency-bench-try", "training-try"}
    assert {path.stem for path in tmp_path.glob("*.json")} == names
    rows = json.loads((tmp_path / "train-try.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {"b0", "b4"}


def test_an_interrupt_ends_what_the_gpus_script_runs(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = - ] && exit\necho $$ > "$OUT/pid"\nexec sleep 60\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path), "DEVICE": "cpu"}
    command = ["sh", str(ROOT / "benchmarks" / "gpu.sh")]
    # Tests begun in a shell's background ignore interrupts, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    script = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    started = tmp_path / "pid"
    until(lambda: started.exists() and started.read_text())
    os.killpg(script.pid, signal.SIGINT)
    stat = Path(f"/proc/{started.read_text().strip()}/stat")
    until(lambda: not stat.exists() or " Z " in stat.read_text())
    assert script.wait(10) != 0


def until(holds) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_kernels_calls_of_a_step_are_repeated(tmp_path):
    words = ["--variant", "nano", "--batch", "2", "--resolution", "32", "--output", str(tmp_path / "found.json")]
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    blocks = len(list(build.without_weights(build.model_variants()["nano"], 10).blocks()))
    calls = {row["kernel"]: 0 for row in found["rows"]}
    for row in found["rows"]:
        calls[row["kernel"]] += row["calls"]
    once = (
        "depthwise forward",
        "depthwise gradients",
        "gate squeeze",
        "gate parameter_gradients",
        "norm pool",
    )
    assert {name: calls[name] for name in once} == dict.fromkeys(once, blocks)


@pytest.mark.slow
def test_the_cpus_script_measures_all_of_its_page(tmp_path, tables, monkeypatch):
    done = run(
        "cpu.sh",
        tmp_path,
        WORDS="models=[b0] modes=[eager] resolution=32 batch_size=2 rounds=1 seconds=0.01 memory=false",
        CPU_WAYS="--rounds 1 --seconds 0.01 --resolution 32 --batch-size 2",
        ALL_REDUCE="--rounds 1 --resolution 32 --batch-size 2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for kind in ("startup", "train", "eval", "latency-bench", "cpu_ways", "all_reduce"):
        assert "Not measured" not in tables.written(f"{kind}-epyc-2cpu.json")


def test_without_a_gpu_the_gpus_script_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("gpu.sh", tmp_path)
    assert done.returncode == 2
    assert "torch sees no CUDA device here" in done.stderr
