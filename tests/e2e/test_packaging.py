"""The wheel, installed elsewhere, carries its configurations and runs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from effnet_train.cli.app import CONFIG_DIR

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from a copy of what is there: a build leaves files in its folder."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("effnet_train", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    if built.returncode and "hatchling" in built.stdout + built.stderr and "No matching" in built.stdout + built.stderr:
        pytest.skip("no package index here to take the build's own requirement from")
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scripts of an environment that holds the wheel, and sees what it needs in this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # As a plain path: this environment's own .pth files, that of the editable project among them, are not read.
    (Path(site) / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return environment / "bin"


def test_the_wheel_holds_every_configuration_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {f"effnet_train/configs/{path.relative_to(CONFIG_DIR)}" for path in CONFIG_DIR.rglob("*.yaml")}
    assert configs <= names
    metadata = {name for name in names if ".dist-info/" in name}
    assert all(name.startswith("effnet_train/") for name in names - metadata)
    assert {name for name in names if name.startswith("effnet_train/configs/")} == configs
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_wheel_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    def run(name: str, *arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [str(installed / name), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("python", "-c", "from effnet_train.cli.app import CONFIG_DIR; print(CONFIG_DIR)").strip()
    assert Path(where).is_relative_to(installed.parent)
    assert Path(where).parts[-2:] == ("effnet_train", "configs")
    assert "_target_: effnet_train.models.efficientnet.EfficientNet" in run("effnet-train", "--cfg", "job")
    assert "parameters" in run("effnet-train", "debug=tiny", "dry_run=true", "device=cpu")
    assert list(tmp_path.iterdir()) == []
    tiny = ("debug=tiny", "device=cpu", "threads=1", "model.width=0.25", "max_steps=2", "name=run")
    assert "done: 2 steps" in run("effnet-train", *tiny)
    assert '"images": 364' in run("effnet-eval", "checkpoint=runs/debug/run", "device=cpu", "workers=0")
